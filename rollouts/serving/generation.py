"""Asking a served model's engine for samples, with a place in line, metrics and a way to abort."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import anyio

from rollouts.inference import Completion, CompletionChunk, SamplingParams
from rollouts.serving.metrics import Metrics
from rollouts.serving.served_model import ServedModel


@dataclass(frozen=True)
class Job:
    """One prompt and how to continue it; ``request_id`` is what another request may end it by."""

    prompt_ids: list[int]
    params: SamplingParams
    request_id: str | None = None


async def generate(served: ServedModel, metrics: Metrics, jobs: Sequence[Job]) -> list[list[Completion]]:
    """The samples of every job, in order."""
    results: list[list[Completion]] = [[] for _ in jobs]

    async def one(i: int) -> None:
        job = jobs[i]
        with served.named(job.request_id):
            results[i] = await served.engine.generate_group(job.prompt_ids, job.params, job.request_id)

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
    with served.places(job.params.n), served.named(job.request_id):
        async with aclosing(served.engine.stream(job.prompt_ids, job.params, job.request_id)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.completion is not None:
                    completions.append(chunk.completion)
                yield chunk
    metrics.count_samples(served.name, len(job.prompt_ids), completions)
