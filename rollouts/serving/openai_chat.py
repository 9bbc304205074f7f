"""``/v1/chat/completions``: a conversation in, the assistant's next message out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from rollouts.inference import Completion, CompletionChunk, SamplingParams
from rollouts.serving import reasoning as reasoning_tags
from rollouts.serving import tool_calls
from rollouts.serving.chat_messages import forced_functions, template_messages, template_options, template_tools
from rollouts.serving.errors import RequestError
from rollouts.serving.generation import Job, generate, stream
from rollouts.serving.log_probs import chat_log_probs
from rollouts.serving.message_reader import MessageForm, MessageReader, read_message
from rollouts.serving.metrics import Metrics
from rollouts.serving.openai_schema import ChatRequest
from rollouts.serving.served_model import ServedModel
from rollouts.serving.sse import TextEvent
from rollouts.serving.structured import format_constraint, tool_grammar
from rollouts.serving.text import TextStream, completion_text, decode
from rollouts.serving.usage import finish_reason, usage


@dataclass(frozen=True)
class Prepared:
    """A request's job, and what to look for in the answers."""

    job: Job
    form: MessageForm


async def prepare(served: ServedModel, request: ChatRequest) -> Prepared:
    """What a request asks for. Raises RequestError."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs: needs logprobs to be true", "top_logprobs")
    arguments, names = request.sampling(), request.constraint_names
    tools = template_tools(request)
    if tools and (grammar := _grammar(served, request)) is not None:
        arguments = {name: value for name, value in arguments.items() if name not in names} | {"grammar": grammar}
        names = {**names, "grammar": "tools"}
    ids = await served.encode_chat(template_messages(request), tools, template_options(request))
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    room = served.engine.max_length - len(ids)
    arguments |= {"max_tokens": room if asked is None else asked, "top_log_probs": request.top_logprobs or 0}
    names = {**names, "max_tokens": name, "top_log_probs": "top_logprobs"}
    params = await served.sampling_params(len(ids), names, **arguments)
    if tools and request.parallel_tool_calls is False and not params.constrained:
        params = _up_to_one_call(served, params)
    served.check_places(params.n)
    # A text that is bound begins where it is sampled, whatever the prompt has opened.
    ending = decode(served.tokenizer, ids[-4:], skip_special=False).rstrip()
    opened = ending.endswith(reasoning_tags.OPEN) and not params.constrained
    form = MessageForm(request.separate_reasoning is not False, opened, bool(tools))
    return Prepared(Job(ids, params), form)


def _grammar(served: ServedModel, request: ChatRequest) -> str | None:
    """What binds the text when a tool must be called, or when an answer may be either a call or of a given form."""
    forced = forced_functions(request)
    parallel = request.parallel_tool_calls is not False and request.tool_choice in (None, "auto", "required")
    answer = None
    if not forced:
        answer = format_constraint(request.response_format).get("json_schema")
        if answer is None:
            return None
        forced = [tool.function for tool in request.tools or []]
    return tool_grammar(forced, parallel, served.has_tokens(tool_calls.OPEN, tool_calls.CLOSE), answer)


def _up_to_one_call(served: ServedModel, params: SamplingParams) -> SamplingParams:
    """The parameters of an answer that ends with its first call."""
    if served.has_tokens(tool_calls.CLOSE):
        end = served.tokenizer.convert_tokens_to_ids(tool_calls.CLOSE)
        return replace(params, stop_token_ids=(*params.stop_token_ids, end))
    return replace(params, stop=(*params.stop, tool_calls.CLOSE))


def _head(served: ServedModel, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": served.name}


async def answer(served: ServedModel, metrics: Metrics, request: ChatRequest, prepared: Prepared) -> dict[str, Any]:
    """The whole response."""
    job = prepared.job
    groups = await generate(served, metrics, [job])
    response = {
        **_head(served, "chat.completion"),
        "choices": [_choice(served, request, prepared.form, completion) for completion in groups[0]],
        "usage": usage([job], groups),
    }
    if request.return_token_ids:
        response["prompt_token_ids"] = job.prompt_ids
    return response


def _choice(served: ServedModel, request: ChatRequest, form: MessageForm, completion: Completion) -> dict[str, Any]:
    text = completion_text(served.tokenizer, completion, skip_special=request.skip_special_tokens is not False)
    part = read_message(form, text)
    content = part.content if part.content or not part.calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if part.reasoning:
        message["reasoning_content"] = part.reasoning
    if part.calls:
        message["tool_calls"] = [call.to_openai() for call in tool_calls.whole_calls(part.calls)]
    choice: dict[str, Any] = {
        "index": completion.sample_index,
        "message": message,
        "finish_reason": _finish_reason(completion, bool(part.calls)),
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

    def __init__(self, served: ServedModel, request: ChatRequest, prepared: Prepared) -> None:
        self._text = TextStream(
            served.token_names, prepared.job.params.stop, skip_special=request.skip_special_tokens is not False
        )
        self._reader = MessageReader(prepared.form)
        self.called = False

    def push(self, chunk: CompletionChunk) -> list[dict[str, Any]]:
        """The deltas that a chunk makes: what it says or thinks, then the parts of calls, one each."""
        completion = chunk.completion
        text = self._text.push(chunk.token_ids) if completion is None else self._text.finish(completion)
        part = self._reader.push(text, last=completion is not None)
        delta: dict[str, Any] = {"content": part.content} if part.content else {}
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        self.called = self.called or bool(part.calls)
        return ([delta] if delta else []) + [{"tool_calls": [call.to_openai()]} for call in part.calls]


async def events(
    served: ServedModel, metrics: Metrics, request: ChatRequest, prepared: Prepared
) -> AsyncIterator[dict[str, Any] | str]:
    """The response in pieces, values of events or events: for each choice its role, what it says, why it ended."""
    job = prepared.job
    head = _head(served, "chat.completion.chunk")
    tail: dict[str, Any] = {"usage": None} if request.include_usage else {}
    choices = [_Choice(served, request, prepared) for _ in range(job.params.n)]
    finals: list[Completion] = []
    for i in range(job.params.n):
        opening = _piece(i, {"role": "assistant", "content": ""})
        ids = {"prompt_token_ids": job.prompt_ids} if request.return_token_ids and i == 0 else {}
        yield {**head, "choices": [opening], **ids, **tail}
    only_text = not request.logprobs and not request.return_token_ids
    said = [
        TextEvent({**head, "choices": [_piece(i, {"content": TextEvent.HERE})], **tail}) for i in range(job.params.n)
    ]
    async for chunk in stream(served, metrics, job):
        i, completion = chunk.sample_index, chunk.completion
        deltas = choices[i].push(chunk)
        if only_text and completion is None:
            for delta in deltas:
                plain = delta.keys() == {"content"}
                yield said[i].of(delta["content"]) if plain else {**head, "choices": [_piece(i, delta)], **tail}
            continue
        *deltas, last = deltas or [{}]
        for delta in deltas:
            yield {**head, "choices": [_piece(i, delta)], **tail}
        choice = _piece(i, last)
        if request.logprobs and chunk.token_ids:
            choice["logprobs"] = chat_log_probs(served.token_names, chunk)
        if request.return_token_ids:
            choice["token_ids"] = chunk.token_ids
        if completion is not None:
            finals.append(completion)
            choice["finish_reason"] = _finish_reason(completion, choices[i].called)
            choice["stop_reason"] = completion.stop_match
        yield {**head, "choices": [choice], **tail}
    if request.include_usage:
        yield {**head, "choices": [], "usage": usage([job], [finals])}


def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    """A choice in the middle of a stream."""
    return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
