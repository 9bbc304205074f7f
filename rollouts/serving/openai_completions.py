"""``/v1/completions``: text or token ids in, text (and token ids) out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from rollouts.inference import Completion, StopReason
from rollouts.serving.errors import RequestError
from rollouts.serving.generation import Job, generate, stream
from rollouts.serving.log_probs import completion_log_probs, prompt_log_probs
from rollouts.serving.metrics import Metrics
from rollouts.serving.openai_schema import CompletionRequest
from rollouts.serving.served_model import ServedModel
from rollouts.serving.sse import TextEvent
from rollouts.serving.text import TextStream, completion_text, decode
from rollouts.serving.usage import finish_reason, usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def prepare(served: ServedModel, request: CompletionRequest) -> list[Job]:
    """One job a prompt. Raises RequestError."""
    prompts = await _prompt_ids(served, request)
    if len(prompts) > served.settings.max_prompts:
        raise RequestError(f"prompt: at most {served.settings.max_prompts} prompts are allowed", "prompt")
    if request.stream and len(prompts) > 1:
        raise RequestError("prompt: only one prompt can be streamed at a time", "prompt")
    scored = request.prompt_logprobs is not None or bool(request.echo and request.logprobs is not None)
    if request.stream and scored:
        raise RequestError("stream: log-probs of prompts are not streamed", "stream")
    if request.max_tokens == 0 and not (request.echo or scored):
        raise RequestError("max_tokens: 0 is for requests with echo or prompt_logprobs", "max_tokens")
    num_top = max(request.logprobs or 0, request.prompt_logprobs or 0)
    names = {
        "top_log_probs": "logprobs" if num_top == request.logprobs else "prompt_logprobs",
        **request.constraint_names,
    }
    arguments = {**request.sampling(), "top_log_probs": num_top, "prompt_log_probs": scored}
    jobs = []
    for ids in prompts:
        room = served.engine.max_length - len(ids)
        # Where no token is asked for, one is sampled and dropped.
        max_tokens = min(DEFAULT_MAX_TOKENS, room) if request.max_tokens is None else max(request.max_tokens, 1)
        params = await served.sampling_params(len(ids), names, **arguments, max_tokens=max_tokens)
        jobs.append(Job(ids, params))
    served.check_places(sum(job.params.n for job in jobs))
    return jobs


async def _prompt_ids(served: ServedModel, request: CompletionRequest) -> list[list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [await served.encode(prompt, "prompt")]
    if not prompt:
        raise RequestError("prompt is empty", "prompt")
    if isinstance(prompt[0], int):
        return [served.check_prompt(prompt, "prompt")]  # type: ignore[arg-type]
    if len(prompt) > served.settings.max_prompts:
        raise RequestError(f"prompt: at most {served.settings.max_prompts} prompts are allowed", "prompt")
    return [
        await served.encode(p, f"prompt.{i}") if isinstance(p, str) else served.check_prompt(p, f"prompt.{i}")  # type: ignore[arg-type]
        for i, p in enumerate(prompt)
    ]


def _head(served: ServedModel) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": served.name,
    }


async def answer(
    served: ServedModel, metrics: Metrics, request: CompletionRequest, jobs: Sequence[Job]
) -> dict[str, Any]:
    """The whole response."""
    groups = await generate(served, metrics, jobs)
    if request.max_tokens == 0:
        groups = [[_without_tokens(completion) for completion in group] for group in groups]
    choices = [
        _choice(served, request, job, completion)
        for job, group in zip(jobs, groups, strict=True)
        for completion in group
    ]
    for index, choice in enumerate(choices):
        choice["index"] = index
    return {**_head(served), "choices": choices, "usage": usage(jobs, groups)}


def _without_tokens(completion: Completion) -> Completion:
    tops: list[list[tuple[int, float]]] | None = None if completion.top_log_probs is None else []
    return replace(
        completion, token_ids=[], log_probs=[], raw_log_probs=[], top_log_probs=tops, weight_versions=[],
        stop_reason=StopReason.LENGTH, stop_match=None,
    )  # fmt: skip


def _prompt_text(served: ServedModel, request: CompletionRequest, job: Job) -> str:
    if isinstance(request.prompt, str):
        return request.prompt
    return decode(served.tokenizer, job.prompt_ids, request.skip_special_tokens is not False)


def _choice(served: ServedModel, request: CompletionRequest, job: Job, completion: Completion) -> dict[str, Any]:
    skip_special = request.skip_special_tokens is not False
    text = completion_text(served.tokenizer, completion, skip_special=skip_special)
    choice: dict[str, Any] = {
        "index": completion.sample_index,
        "text": _prompt_text(served, request, job) + text if request.echo else text,
        "finish_reason": finish_reason(completion),
        "stop_reason": completion.stop_match,
        "logprobs": None,
    }
    if request.logprobs is not None:
        echoed = job.prompt_ids if request.echo else []
        choice["logprobs"] = completion_log_probs(served.token_names, completion, request.logprobs, prompt_ids=echoed)
    if request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_log_probs(
            served.token_names, job.prompt_ids, completion, request.prompt_logprobs
        )
    if request.return_token_ids:
        choice |= {"prompt_token_ids": job.prompt_ids, "token_ids": completion.token_ids}
    return choice


async def events(
    served: ServedModel, metrics: Metrics, request: CompletionRequest, job: Job
) -> AsyncIterator[dict[str, Any] | str]:
    """The response in pieces, as values of events or events; an echoed prompt comes with the first of each choice."""
    head = _head(served)
    tail: dict[str, Any] = {"usage": None} if request.include_usage else {}
    skip_special = request.skip_special_tokens is not False
    texts = [TextStream(served.token_names, job.params.stop, skip_special=skip_special) for _ in range(job.params.n)]
    echoes = [_prompt_text(served, request, job) if request.echo else ""] * job.params.n
    positions = [len(echo) for echo in echoes]
    finals: list[Completion] = []
    first = [True] * job.params.n
    only_text = request.logprobs is None and not request.return_token_ids
    pieces = [TextEvent({**head, "choices": [_piece(i, TextEvent.HERE)], **tail}) for i in range(job.params.n)]
    async for chunk in stream(served, metrics, job):
        i, completion = chunk.sample_index, chunk.completion
        text = texts[i].push(chunk.token_ids) if completion is None else texts[i].finish(completion)
        if completion is not None:
            finals.append(completion)
        if request.max_tokens == 0:
            if completion is None:
                continue
            text = ""
        text, echoes[i] = echoes[i] + text, ""
        if only_text and completion is None:
            if text:
                yield pieces[i].of(text)
            continue
        choice = _piece(i, text)
        if completion is not None:
            choice |= {"finish_reason": finish_reason(completion), "stop_reason": completion.stop_match}
        if request.logprobs is not None and chunk.token_ids:
            choice["logprobs"] = completion_log_probs(served.token_names, chunk, request.logprobs, positions[i])
            positions[i] += sum(map(len, choice["logprobs"]["tokens"]))
        if request.return_token_ids:
            choice |= {"token_ids": chunk.token_ids, "prompt_token_ids": job.prompt_ids if first[i] else None}
            first[i] = False
        yield {**head, "choices": [choice], **tail}
    if request.include_usage:
        yield {**head, "choices": [], "usage": usage([job], [finals])}


def _piece(index: int, text: str) -> dict[str, Any]:
    """A choice in the middle of a stream."""
    return {"index": index, "text": text, "finish_reason": None, "stop_reason": None, "logprobs": None}
