"""SGLang's ``/generate``: prompts in, samples out with their ids, log-probs and weight versions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from rollouts.inference import Completion, StopReason
from rollouts.serving.errors import RequestError
from rollouts.serving.generation import Job, generate, stream
from rollouts.serving.log_probs import LOWEST, scaled_top_log_probs
from rollouts.serving.metrics import Metrics
from rollouts.serving.served_model import ServedModel
from rollouts.serving.sglang_schema import GenerateRequest, SglangSampling
from rollouts.serving.text import TextStream, completion_text

NAMES = {
    "max_tokens": "sampling_params.max_new_tokens",
    "n": "sampling_params.n",
    "stop": "sampling_params.stop",
    "stop_token_ids": "sampling_params.stop_token_ids",
    "logit_bias": "sampling_params.logit_bias",
    "json_schema": "sampling_params.json_schema",
    "regex": "sampling_params.regex",
    "top_log_probs": "top_logprobs_num",
}


@dataclass(frozen=True)
class Prepared:
    """A request's jobs, and how to write down what becomes of them."""

    jobs: list[Job]
    sampling: list[SglangSampling]
    rids: list[str]
    listed: bool  # the response is a list


async def prepare(served: ServedModel, request: GenerateRequest) -> Prepared:
    """The jobs that a request asks for. Raises RequestError."""
    field, prompts, batched = request.prompts()
    if not prompts or len(prompts) > served.settings.max_prompts:
        raise RequestError(f"{field}: send 1 to {served.settings.max_prompts} prompts", field)
    sampling = _for_each(request.sampling_params or SglangSampling(), len(prompts), "sampling_params")
    given = request.rid if batched or not isinstance(request.rid, str) else [request.rid]
    if isinstance(given, str):
        raise RequestError("rid: a batch takes a list of ids, one a prompt", "rid")
    rids = given and _for_each(given, len(prompts), "rid")
    if rids and len(set(rids)) < len(rids):
        raise RequestError("rid: the ids of one batch must differ", "rid")
    names = rids or [uuid.uuid4().hex for _ in prompts]
    jobs = []
    for i, prompt in enumerate(prompts):
        where = f"{field}.{i}" if batched else field
        ids = await served.encode(prompt, where) if isinstance(prompt, str) else served.check_prompt(prompt, where)
        arguments = sampling[i].sampling()
        arguments.setdefault("max_tokens", min(128, served.engine.max_length - len(ids)))
        arguments |= {"top_log_probs": request.top_logprobs_num or 0, "prompt_log_probs": request.scores_prompt}
        params = await served.sampling_params(len(ids), NAMES, **arguments)
        jobs.append(Job(ids, params, names[i] if rids or request.stream else None))
    if request.stream and len(jobs) > 1:
        raise RequestError("stream: only one prompt can be streamed at a time", "stream")
    if rids and any(rid in served.request_ids for rid in rids):
        raise RequestError("rid: a request with this id is running already", "rid")
    served.check_places(sum(job.params.n for job in jobs))
    return Prepared(jobs, sampling, names, batched or jobs[0].params.n > 1)


def _for_each(value: Any, count: int, param: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{param}: {len(value)} for {count} prompts; send one a prompt", param)
    return value


async def answer(
    served: ServedModel, metrics: Metrics, request: GenerateRequest, prepared: Prepared
) -> dict[str, Any] | list[dict[str, Any]]:
    """The response: an object, or a list of them when the prompts were a list or n > 1."""
    started = time.perf_counter()
    groups = await generate(served, metrics, prepared.jobs)
    results = [
        _result(served, request, prepared, i, completion, time.perf_counter() - started)
        for i, group in enumerate(groups)
        for completion in group
    ]
    return results if prepared.listed else results[0]


def _result(
    served: ServedModel, request: GenerateRequest, prepared: Prepared, i: int, completion: Completion, seconds: float
) -> dict[str, Any]:
    sampling = prepared.sampling[i]
    text = completion_text(
        served.tokenizer,
        completion,
        skip_special=sampling.skip_special_tokens is not False,
        trim=not sampling.no_stop_trim,
    )
    meta: dict[str, Any] = {
        "id": prepared.rids[i],
        "finish_reason": finish(completion),
        "prompt_tokens": len(prepared.jobs[i].prompt_ids),
        "completion_tokens": len(completion.token_ids),
        "cached_tokens": completion.num_cached_tokens,
        "weight_version": str(
            served.engine.weight_version if completion.weight_version is None else completion.weight_version
        ),
        "weight_versions": [
            {"version": str(span.version), "start": span.start, "end": span.end} for span in completion.weight_versions
        ],
        "e2e_latency": seconds,
    }
    if request.return_logprob:
        meta |= _log_probs(served, request, prepared.jobs[i], completion)
    return {"text": text, "output_ids": completion.token_ids, "meta_info": meta}


def _log_probs(served: ServedModel, request: GenerateRequest, job: Job, completion: Completion) -> dict[str, Any]:
    """At the sampling temperature; those of the prompt at 1, as SGLang's."""
    params, prompt_ids = job.params, job.prompt_ids

    def entry(log_prob: float | None, token_id: int) -> list[Any]:
        text = served.token_names.text(token_id) if request.return_text_in_logprobs else None
        return [None if log_prob is None else max(log_prob, LOWEST), token_id, text]

    pairs = zip(completion.log_probs, completion.token_ids, strict=True)
    fields: dict[str, Any] = {
        "input_token_logprobs": [],
        "output_token_logprobs": [entry(log_prob, token) for log_prob, token in pairs],
    }
    start = request.logprob_start_len or 0
    if completion.prompt_log_probs is not None:
        scored = zip(completion.prompt_log_probs, prompt_ids, strict=True)
        fields["input_token_logprobs"] = [entry(*pair) for pair in scored][start:]
    if request.top_logprobs_num:
        tops = scaled_top_log_probs(completion, params.temperature)
        fields["output_top_logprobs"] = [[entry(*pair) for pair in top] for top in tops]
        prompt_tops = [[entry(p, token) for token, p in top] for top in completion.prompt_top_log_probs or []]
        fields["input_top_logprobs"] = [top or None for top in prompt_tops[start:]]
    return fields


def finish(completion: Completion) -> dict[str, Any]:
    """SGLang's ``finish_reason``."""
    if completion.stop_reason is StopReason.LENGTH:
        return {"type": "length", "length": len(completion.token_ids)}
    if completion.stop_reason is StopReason.ABORTED:
        return {"type": "abort", "message": "aborted"}
    return {"type": "stop", "matched": completion.stop_match}


async def events(
    served: ServedModel, metrics: Metrics, request: GenerateRequest, prepared: Prepared
) -> AsyncIterator[dict[str, Any]]:
    """The response as it grows: each event holds all of its sample so far, as SGLang's do.

    An event comes with each of the first 32 tokens, then whenever a sample has grown by a 32nd, so that a long sample's
    events are some 32 times its size and not its square.
    """
    started = time.perf_counter()
    job, sampling = prepared.jobs[0], prepared.sampling[0]
    skip_special, trim = sampling.skip_special_tokens is not False, not sampling.no_stop_trim
    streams = [
        TextStream(served.token_names, job.params.stop, skip_special=skip_special, trim=trim)
        for _ in range(job.params.n)
    ]
    texts, ids = [""] * job.params.n, [list[int]() for _ in range(job.params.n)]
    log_probs = [list[list[Any]]() for _ in range(job.params.n)]
    due = [1] * job.params.n  # length at which a sample's next event comes
    async for chunk in stream(served, metrics, job):
        i = chunk.sample_index
        if chunk.completion is not None:
            result = _result(served, request, prepared, 0, chunk.completion, time.perf_counter() - started)
        else:
            texts[i] += streams[i].push(chunk.token_ids)
            ids[i] += chunk.token_ids
            meta: dict[str, Any] = {
                "id": prepared.rids[0],
                "finish_reason": None,
                "prompt_tokens": len(job.prompt_ids),
                "completion_tokens": len(ids[i]),
                "weight_version": str(chunk.weight_version),
            }
            if request.return_logprob:
                log_probs[i] += [
                    [max(p, LOWEST), t, None] for p, t in zip(chunk.log_probs, chunk.token_ids, strict=True)
                ]
                meta["output_token_logprobs"] = log_probs[i]
            if len(ids[i]) < due[i]:
                continue
            due[i] = len(ids[i]) + max(1, len(ids[i]) // 32)
            result = {"text": texts[i], "output_ids": ids[i], "meta_info": meta}
        yield {"index": i, **result} if prepared.listed else result
