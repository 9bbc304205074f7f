"""Samples that another request may end early, with what they have so far."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import anyio

from rollouts.inference import Completion, CompletionChunk, EmbeddedEngine, SamplingParams, StopReason
from rollouts.training.types import WeightSpan


class AbortHandle:
    """Ends one request's sampling; the waits that it interrupts run under ``scope``."""

    def __init__(self) -> None:
        self.aborted = False
        self.scope = anyio.CancelScope()

    def abort(self) -> None:
        self.aborted = True
        self.scope.cancel()


async def abortable_stream(
    engine: EmbeddedEngine, prompt_ids: list[int], params: SamplingParams, handle: AbortHandle
) -> AsyncIterator[CompletionChunk]:
    """``engine.stream``, whose samples end as ABORTED, with the tokens that were delivered, once ``handle`` says so."""
    partial = {i: Completion([], [], [], StopReason.ABORTED, sample_index=i) for i in range(params.n)}
    async with aclosing(engine.stream(prompt_ids, params)) as chunks:  # type: ignore[type-var]
        while not handle.aborted:
            chunk = None
            with anyio.CancelScope() as handle.scope:
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            if chunk.completion is not None:
                del partial[chunk.sample_index]
            else:
                _grow(partial[chunk.sample_index], chunk, engine.weight_version)
            yield chunk
    if handle.aborted:
        for index, completion in partial.items():
            yield CompletionChunk(index, [], [], [], replace(completion, num_prompt_tokens=len(prompt_ids)))


def _grow(completion: Completion, chunk: CompletionChunk, version: int) -> None:
    start = len(completion.token_ids)
    completion.token_ids.extend(chunk.token_ids)
    completion.log_probs.extend(chunk.log_probs)
    completion.raw_log_probs.extend(chunk.raw_log_probs)
    spans, end = completion.weight_versions, len(completion.token_ids)
    if spans and spans[-1].version == version:
        start = spans.pop().start
    spans.append(WeightSpan(version, start, end))
