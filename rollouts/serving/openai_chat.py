"""``/v1/chat/completions``: a conversation in, the assistant's next message out, tool calls told from text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from rollouts.inference import Completion, CompletionChunk
from rollouts.serving.chat_messages import template_messages, template_options, template_tools
from rollouts.serving.errors import RequestError
from rollouts.serving.generation import Job, generate, stream
from rollouts.serving.log_probs import chat_log_probs
from rollouts.serving.metrics import Metrics
from rollouts.serving.openai_schema import ChatRequest
from rollouts.serving.served_model import ServedModel
from rollouts.serving.text import TextStream, completion_text
from rollouts.serving.tool_calls import ToolCall, ToolCallSplitter
from rollouts.serving.usage import finish_reason, usage


async def prepare(served: ServedModel, request: ChatRequest) -> Job:
    """The job that a request asks for. Raises RequestError."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs: needs logprobs to be true", "top_logprobs")
    arguments = request.sampling()
    tools = template_tools(request)
    ids = await served.encode_chat(template_messages(request), tools, template_options(request))
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    room = served.engine.max_length - len(ids)
    arguments |= {"max_tokens": room if asked is None else asked, "top_log_probs": request.top_logprobs or 0}
    params = served.sampling_params(len(ids), {"max_tokens": name, "top_log_probs": "top_logprobs"}, **arguments)
    served.check_places(params.n)
    return Job(ids, params)


def _head(served: ServedModel, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": served.name}


async def answer(served: ServedModel, metrics: Metrics, request: ChatRequest, job: Job) -> dict[str, Any]:
    """The whole response."""
    groups = await generate(served, metrics, [job])
    response = {
        **_head(served, "chat.completion"),
        "choices": [_choice(served, request, completion) for completion in groups[0]],
        "usage": usage([job], groups),
    }
    if request.return_token_ids:
        response["prompt_token_ids"] = job.prompt_ids
    return response


def _choice(served: ServedModel, request: ChatRequest, completion: Completion) -> dict[str, Any]:
    text = completion_text(served.tokenizer, completion, skip_special=request.skip_special_tokens is not False)
    calls: list[ToolCall] = []
    if template_tools(request):
        splitter = ToolCallSplitter()
        text, calls = splitter.push(text)
        rest, last = splitter.finish()
        text, calls = text + rest, calls + last
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = [call.to_openai() for call in calls]
    choice: dict[str, Any] = {
        "index": completion.sample_index,
        "message": message,
        "finish_reason": _finish_reason(completion, bool(calls)),
        "stop_reason": completion.stop_match,
        "logprobs": chat_log_probs(served.token_names, completion) if request.logprobs else None,
    }
    if request.return_token_ids:
        choice["token_ids"] = completion.token_ids
    return choice


def _finish_reason(completion: Completion, called: bool) -> str:
    reason = finish_reason(completion)
    return "tool_calls" if called and reason == "stop" else reason


class _Choice:
    """One sample of a streamed answer: what its text has turned out to be so far."""

    def __init__(self, served: ServedModel, request: ChatRequest, job: Job) -> None:
        self._text = TextStream(
            served.tokenizer, job.params.stop, skip_special=request.skip_special_tokens is not False
        )
        self._splitter = ToolCallSplitter() if template_tools(request) else None
        self._num_calls = 0

    def push(self, chunk: CompletionChunk) -> dict[str, Any]:
        """The delta that a chunk makes."""
        completion = chunk.completion
        text = self._text.push(chunk.token_ids) if completion is None else self._text.finish(completion)
        calls: list[ToolCall] = []
        if self._splitter is not None:
            text, calls = self._splitter.push(text)
            if completion is not None:
                rest, last = self._splitter.finish()
                text, calls = text + rest, calls + last
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = self._num_calls
            delta["tool_calls"] = [{"index": first + i, **call.to_openai()} for i, call in enumerate(calls)]
            self._num_calls += len(calls)
        return delta

    @property
    def called(self) -> bool:
        return self._num_calls > 0


async def events(
    served: ServedModel, metrics: Metrics, request: ChatRequest, job: Job
) -> AsyncIterator[dict[str, Any]]:
    """The response in pieces: for each choice its role, then what it says, then why it ended."""
    head = _head(served, "chat.completion.chunk")
    tail: dict[str, Any] = {"usage": None} if request.include_usage else {}
    choices = [_Choice(served, request, job) for _ in range(job.params.n)]
    finals: list[Completion] = []
    for i in range(job.params.n):
        opening = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        ids = {"prompt_token_ids": job.prompt_ids} if request.return_token_ids and i == 0 else {}
        yield {**head, "choices": [opening], **ids, **tail}
    async for chunk in stream(served, metrics, job):
        completion = chunk.completion
        source: Completion | CompletionChunk = chunk
        if job.params.top_log_probs:  # the engine tells them when the sample is done
            if completion is None:
                continue
            source = completion
        delta = choices[chunk.sample_index].push(chunk)
        choice: dict[str, Any] = {
            "index": chunk.sample_index,
            "delta": delta,
            "finish_reason": None,
            "logprobs": chat_log_probs(served.token_names, source) if request.logprobs and source.token_ids else None,
        }
        if request.return_token_ids:
            choice["token_ids"] = source.token_ids
        if completion is not None:
            finals.append(completion)
            choice["finish_reason"] = _finish_reason(completion, choices[chunk.sample_index].called)
            choice["stop_reason"] = completion.stop_match
        if delta or completion is not None or request.logprobs or request.return_token_ids:
            yield {**head, "choices": [choice], **tail}
    if request.include_usage:
        yield {**head, "choices": [], "usage": usage([job], [finals])}
