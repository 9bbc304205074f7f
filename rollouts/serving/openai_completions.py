"""``/v1/completions``: text or token ids in, text (and token ids) out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rollouts.inference import Completion, CompletionChunk
from rollouts.serving.errors import RequestError
from rollouts.serving.generation import Job, generate, stream
from rollouts.serving.log_probs import completion_log_probs
from rollouts.serving.metrics import Metrics
from rollouts.serving.openai_schema import CompletionRequest
from rollouts.serving.served_model import ServedModel
from rollouts.serving.text import TextStream, completion_text
from rollouts.serving.usage import finish_reason, usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's
NAMES = {"top_log_probs": "logprobs"}


async def prepare(served: ServedModel, request: CompletionRequest) -> list[Job]:
    """One job a prompt. Raises RequestError."""
    prompts = await _prompt_ids(served, request)
    if len(prompts) > served.settings.max_prompts:
        raise RequestError(f"prompt: at most {served.settings.max_prompts} prompts are allowed", "prompt")
    if request.stream and len(prompts) > 1:
        raise RequestError("prompt: only one prompt can be streamed at a time", "prompt")
    arguments = request.sampling()
    jobs = []
    for ids in prompts:
        room = served.engine.max_length - len(ids)
        max_tokens = min(DEFAULT_MAX_TOKENS, room) if request.max_tokens is None else request.max_tokens
        arguments |= {"max_tokens": max_tokens, "top_log_probs": request.logprobs or 0}
        jobs.append(Job(ids, served.sampling_params(len(ids), NAMES, **arguments)))
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
    choices = [
        _choice(served, request, job, completion)
        for job, group in zip(jobs, groups, strict=True)
        for completion in group
    ]
    for index, choice in enumerate(choices):
        choice["index"] = index
    return {**_head(served), "choices": choices, "usage": usage(jobs, groups)}


def _choice(served: ServedModel, request: CompletionRequest, job: Job, completion: Completion) -> dict[str, Any]:
    skip_special = request.skip_special_tokens is not False
    choice: dict[str, Any] = {
        "index": completion.sample_index,
        "text": completion_text(served.tokenizer, completion, skip_special=skip_special),
        "finish_reason": finish_reason(completion),
        "stop_reason": completion.stop_match,
        "logprobs": None,
    }
    if request.logprobs is not None:
        choice["logprobs"] = completion_log_probs(served.token_names, completion)
    if request.return_token_ids:
        choice |= {"prompt_token_ids": job.prompt_ids, "token_ids": completion.token_ids}
    return choice


async def events(
    served: ServedModel, metrics: Metrics, request: CompletionRequest, job: Job
) -> AsyncIterator[dict[str, Any]]:
    """The response in pieces."""
    head = _head(served)
    skip_special = request.skip_special_tokens is not False
    texts = [TextStream(served.tokenizer, job.params.stop, skip_special=skip_special) for _ in range(job.params.n)]
    positions = [0] * job.params.n
    finals: list[Completion] = []
    first = [True] * job.params.n
    async for chunk in stream(served, metrics, job):
        i, completion = chunk.sample_index, chunk.completion
        source: Completion | CompletionChunk = chunk
        if completion is None:
            if job.params.top_log_probs:  # the engine tells them when the sample is done
                continue
            text = texts[i].push(chunk.token_ids)
        else:
            text = texts[i].finish(completion)
            finals.append(completion)
            if job.params.top_log_probs:
                source = completion
        choice: dict[str, Any] = {
            "index": i,
            "text": text,
            "finish_reason": None if completion is None else finish_reason(completion),
            "stop_reason": None if completion is None else completion.stop_match,
            "logprobs": None,
        }
        if request.logprobs is not None and source.token_ids:
            choice["logprobs"] = completion_log_probs(served.token_names, source, offset=positions[i])
            positions[i] += sum(map(len, choice["logprobs"]["tokens"]))
        if request.return_token_ids:
            choice |= {"token_ids": source.token_ids, "prompt_token_ids": job.prompt_ids if first[i] else None}
            first[i] = False
        if text or completion is not None or request.logprobs is not None or request.return_token_ids:
            yield {**head, "choices": [choice], **({"usage": None} if request.include_usage else {})}
    if request.include_usage:
        yield {**head, "choices": [], "usage": usage([job], [finals])}
