"""Many streams at once are given their tokens several at a time, and never late when nothing more is sampled."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from transformers import PreTrainedModel

from rollouts.inference import CompletionChunk, EmbeddedEngine, SamplingParams, engine_thread
from rollouts.inference.model_runner import NativeForward

pytestmark = pytest.mark.anyio

PARAMS = SamplingParams(max_tokens=60, seed=4, top_log_probs=2, ignore_eos=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine(make_tiny_model: Callable[..., PreTrainedModel]) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(make_tiny_model(initializer_range=0.2), max_length=256, max_rows=16) as one:
        yield one


async def gather(engine: EmbeddedEngine, count: int, params: SamplingParams) -> list[list[CompletionChunk]]:
    """The chunks of so many streams that run side by side."""
    gathered: list[list[CompletionChunk]] = [[] for _ in range(count)]

    async def one(i: int) -> None:
        async for chunk in engine.stream([20 + i, 30, 40], replace(params, seed=i)):
            gathered[i].append(chunk)

    async with anyio.create_task_group() as tasks:
        for i in range(count):
            tasks.start_soon(one, i)
    return gathered


@pytest.mark.parametrize("num_rows", [2, 16])
async def test_chunks_of_a_crowd_hold_all_that_was_sampled(
    make_tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    """Years between the messages: every token but the first ones comes with the end, of preempted samples too."""
    monkeypatch.setattr(engine_thread, "STREAM_SECONDS", 1e9)
    monkeypatch.setattr(engine_thread, "FEW_STREAMS", 1)
    model = make_tiny_model(initializer_range=0.2)
    # 16 pages for 12 samples of 5 pages each: some have to wait for others in between.
    with EmbeddedEngine(model, max_length=256, max_rows=num_rows, cache_bytes=1) as engine:
        for chunks in await gather(engine, 12, PARAMS):
            final = chunks[-1].completion
            assert final is not None and not chunks[-1].token_ids
            assert [t for chunk in chunks for t in chunk.token_ids] == final.token_ids
            assert [p for chunk in chunks for p in chunk.log_probs] == final.log_probs
            assert [p for chunk in chunks for p in chunk.raw_log_probs] == final.raw_log_probs
            assert [top for chunk in chunks for top in chunk.top_log_probs or []] == final.top_log_probs
        assert (engine.num_preemptions > 0) == (num_rows == 16)


async def test_a_pause_and_new_weights_hold_nothing_back(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients see all that there is while nothing more comes; and each chunk is of one version."""
    monkeypatch.setattr(engine_thread, "STREAM_SECONDS", 1e9)
    tokens: dict[int, int] = defaultdict(int)
    versions: dict[int, list[Any]] = defaultdict(list)

    async def one(i: int) -> None:
        async for chunk in engine.stream([20 + i, 30, 40], replace(PARAMS, seed=i, max_tokens=200)):
            tokens[i] += len(chunk.token_ids)
            versions[i] += [chunk.weight_version] * len(chunk.token_ids)
            if chunk.completion is not None:
                spans = chunk.completion.weight_versions
                assert versions[i] == [span.version for span in spans for _ in range(span.start, span.end)]

    async with anyio.create_task_group() as tasks:
        for i in range(12):
            tasks.start_soon(one, i)
        with anyio.fail_after(60):
            while len(tokens) < 12:
                await anyio.sleep(0.001)
        await engine.pause_generation()
        with anyio.fail_after(60):
            while sum(tokens.values()) < engine.num_sampled_tokens:
                await anyio.sleep(0.001)
        await engine.update_weights(None, 7, "continue")
        await engine.continue_generation()
    assert all(told[-1] == 7 or 7 not in told for told in versions.values())
    assert {version for told in versions.values() for version in told} <= {0, 7}


async def test_few_streams_are_given_each_token_when_it_is_sampled(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine makes one step at a time, and the token comes before the next."""
    monkeypatch.setattr(engine_thread, "STREAM_SECONDS", 1e9)
    told = engine._thread._tell_tokens
    sizes = []

    def noted(sample: Any) -> bool:
        before = sample.num_told
        found = told(sample)
        sizes.append(sample.num_told - before)
        return found

    monkeypatch.setattr(engine._thread, "_tell_tokens", noted)
    await gather(engine, 3, PARAMS)
    assert sum(sizes) == 180 and max(sizes) == 1


@pytest.mark.usefixtures("compiler")
async def test_a_core_that_is_lent_for_a_moment_is_used_again_at_once(engine: EmbeddedEngine) -> None:
    """Writing to a crowd slows a step now and then; only steps that are slow in a row end in one thread."""
    forward = engine._thread._forward
    assert isinstance(forward, NativeForward)
    for _ in range(2):
        forward._note_waits(9)
        assert forward._alone_until <= time.monotonic()
        for slow in range(1, 30):
            before = time.monotonic()
            forward._note_waits(9)
            assert forward._alone_until >= before + min(0.005 * slow, 0.05)
            assert forward._alone_until <= time.monotonic() + 0.05
        forward._note_waits(0)
