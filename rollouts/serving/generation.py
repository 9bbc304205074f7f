"""Asking a served model's engine for samples, with a place in line, metrics and a way to abort."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

import anyio

from rollouts.inference import Completion, CompletionChunk, SamplingParams
from rollouts.serving.aborts import AbortHandle, abortable_stream
from rollouts.serving.errors import RequestError
from rollouts.serving.metrics import Metrics
from rollouts.serving.served_model import ServedModel


@dataclass(frozen=True)
class Job:
    """One prompt and how to continue it; ``abort_id`` is what another request may end it by."""

    prompt_ids: list[int]
    params: SamplingParams
    abort_id: str | None = None


async def generate(served: ServedModel, metrics: Metrics, jobs: Sequence[Job]) -> list[list[Completion]]:
    """The samples of every job, in order."""
    results: list[list[Completion]] = [[] for _ in jobs]

    async def one(i: int) -> None:
        job = jobs[i]
        if job.abort_id is None:  # the engine then does no work per token
            results[i] = await served.engine.generate_group(job.prompt_ids, job.params)
            return
        chunks = [chunk async for chunk in _chunks(served, job)]
        finals = [chunk.completion for chunk in chunks if chunk.completion is not None]
        results[i] = sorted(finals, key=lambda completion: completion.sample_index)

    with served.places(sum(job.params.n for job in jobs)):
        async with anyio.create_task_group() as tasks:
            for i in range(len(jobs)):
                tasks.start_soon(one, i)
    for job, completions in zip(jobs, results, strict=True):
        metrics.count_samples(served.name, len(job.prompt_ids), completions)
    return results


async def stream(served: ServedModel, metrics: Metrics, job: Job) -> AsyncIterator[CompletionChunk]:
    """The samples of one job as they grow."""
    completions: list[Completion] = []
    with served.places(job.params.n):
        async with aclosing(_chunks(served, job)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.completion is not None:
                    completions.append(chunk.completion)
                yield chunk
    metrics.count_samples(served.name, len(job.prompt_ids), completions)


async def _chunks(served: ServedModel, job: Job) -> AsyncIterator[CompletionChunk]:
    with _registered(served, job.abort_id) as handle:
        async with aclosing(abortable_stream(served.engine, job.prompt_ids, job.params, handle)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk


@contextmanager
def _registered(served: ServedModel, abort_id: str | None) -> Iterator[AbortHandle]:
    handle = AbortHandle()
    if abort_id is None:
        yield handle
        return
    if abort_id in served.aborts:
        raise RequestError(f"rid: a request with the id {abort_id[:80]!r} is running already", "rid")
    served.aborts[abort_id] = handle
    try:
        yield handle
    finally:
        del served.aborts[abort_id]
