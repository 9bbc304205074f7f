"""Generating, streaming and cancelling under asyncio and trio."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace

import anyio
import anyio.to_thread
import pytest
import torch
from plain import Held, plain_greedy, plain_log_probs, random_prompt
from transformers import PreTrainedModel

from rollouts.errors import UserError
from rollouts.inference import Completion, CompletionChunk, EmbeddedEngine, SamplingParams, StopReason
from rollouts.inference import engine as engine_module
from rollouts.inference.sequences import Request
from rollouts.training.types import WeightSpan

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=100_000, ignore_eos=True)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(peaked_model: PreTrainedModel) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(peaked_model, max_length=4096, max_rows=8) as engine:
        yield engine


def hold_at(engine: EmbeddedEngine, count: int, there: Callable[[], bool]) -> Held:
    """The engine begins when ``count`` samples are in line, and stands still from where ``there()`` is true."""
    begun, stands = False, False

    def may_step() -> bool:
        nonlocal begun, stands
        begun = begun or engine.num_running + engine.num_waiting == count
        stands = stands or (begun and there())
        return begun and not stands

    return Held(engine, may_step)


async def until(condition, seconds: float = 60) -> None:  # type: ignore[no-untyped-def]
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.002)


async def test_concurrent_requests_get_their_own_samples(engine: EmbeddedEngine, peaked_model: PreTrainedModel) -> None:
    prompts = [random_prompt(length, length) for length in range(1, 40, 4)]  # more than there are rows
    results: dict[int, list[int]] = {}

    async def one(i: int) -> None:
        await anyio.sleep(0.003 * (i % 5))
        results[i] = (await engine.generate(prompts[i], GREEDY)).token_ids

    async with anyio.create_task_group() as tasks:
        for i in range(len(prompts)):
            tasks.start_soon(one, i)
    assert results == {i: plain_greedy(peaked_model, prompt, 24) for i, prompt in enumerate(prompts)}


async def test_groups_and_the_n_of_generate(engine: EmbeddedEngine) -> None:
    params = SamplingParams(n=3, max_tokens=5, seed=1, ignore_eos=True)
    group = await engine.generate_group([5, 6], params)
    assert [c.sample_index for c in group] == [0, 1, 2]
    assert (
        group[0].token_ids
        == (await engine.generate([5, 6], SamplingParams(max_tokens=5, seed=1, ignore_eos=True))).token_ids
    )
    with pytest.raises(UserError, match="generate_group"):
        await engine.generate([5, 6], params)


async def test_streams_give_every_token_and_then_the_completion(engine: EmbeddedEngine) -> None:
    params = SamplingParams(n=2, max_tokens=30, seed=4, ignore_eos=True)
    expected = await engine.generate_group([7, 8, 9], params)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    log_probs: dict[int, list[float]] = {0: [], 1: []}
    finals = {}
    async for chunk in engine.stream([7, 8, 9], params):
        assert chunk.sample_index not in finals
        tokens[chunk.sample_index] += chunk.token_ids
        log_probs[chunk.sample_index] += chunk.log_probs
        if chunk.completion is not None:
            finals[chunk.sample_index] = chunk.completion
    assert [tokens[i] for i in (0, 1)] == [c.token_ids for c in expected]
    assert [finals[i].token_ids for i in (0, 1)] == [c.token_ids for c in expected]
    assert [log_probs[i] for i in (0, 1)] == [finals[i].log_probs for i in (0, 1)]


async def test_a_stream_that_looks_while_its_end_is_told_misses_nothing(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread is held where it hands over the last chunk, until the stream has taken all before it."""
    begun, ending, go_on = threading.Event(), threading.Event(), threading.Event()

    class Held(deque[CompletionChunk]):
        num_appended = 0

        def append(self, chunk: CompletionChunk) -> None:
            self.num_appended += 1
            if self.num_appended == 2:
                assert begun.wait(120)
            if chunk.completion is not None:
                ending.set()
                assert go_on.wait(120)
            super().append(chunk)

    monkeypatch.setattr(engine_module, "Request", lambda *args: replace(Request(*args), chunks=Held()))
    chunks: list[CompletionChunk] = []
    async with aclosing(engine.stream([7, 8, 9], SamplingParams(max_tokens=30, seed=4, ignore_eos=True))) as stream:  # type: ignore[type-var]
        chunks.append(await anext(stream))
        begun.set()
        await anyio.to_thread.run_sync(ending.wait, 120)
        chunks.append(await anext(stream))
        go_on.set()
        chunks += [chunk async for chunk in stream]
    final = chunks[-1].completion
    assert final is not None and len(final.token_ids) == 30
    assert final.token_ids == [token for chunk in chunks for token in chunk.token_ids]


async def test_cancelling_frees_rows_and_pages(engine: EmbeddedEngine) -> None:
    held = hold_at(engine, 12, lambda: engine.num_running == 8)
    async with anyio.create_task_group() as tasks:
        for i in range(12):  # four of them wait for a row
            tasks.start_soon(engine.generate, random_prompt(20, i), ENDLESS)
        await until(lambda: engine.num_running == 8 and engine.num_waiting == 4)
        started = time.monotonic()
        tasks.cancel_scope.cancel()
    await until(lambda: engine.num_running == engine.num_waiting == 0)
    assert time.monotonic() - started < 5
    held.let_go()
    assert engine.num_free_pages == engine.num_pages
    assert len((await engine.generate([5], GREEDY)).token_ids) == 24


async def test_a_request_is_aborted_by_its_id_whether_it_runs_waits_or_streams(engine: EmbeddedEngine) -> None:
    params = SamplingParams(max_tokens=3000, n=2, seed=3, ignore_eos=True)
    groups: dict[str, list[Completion]] = {}
    chunks: list[CompletionChunk] = []

    async def group(name: str) -> None:
        groups[name] = await engine.generate_group(random_prompt(20), params, request_id=name)

    async def stream() -> None:
        async for chunk in engine.stream([5, 6], ENDLESS, request_id="streamed"):
            chunks.append(chunk)

    held = hold_at(engine, 8, lambda: engine.num_running == 8 and engine.num_sampled_tokens > 60)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream)
        tasks.start_soon(group, "one")
        for i in range(5):
            tasks.start_soon(engine.generate, random_prompt(10, i), ENDLESS)
        await until(lambda: engine.num_running == 8 and engine.num_sampled_tokens > 60)
        tasks.start_soon(group, "two")
        await until(lambda: engine.num_waiting == 2)
        await engine.abort("nobody")
        assert engine.num_running == 8 and engine.num_waiting == 2
        await engine.abort("two")
        await until(lambda: "two" in groups)
        assert engine.num_waiting == 0 and engine.num_running == 8
        await engine.abort("one")
        await engine.abort("streamed")
        await until(lambda: "one" in groups and bool(chunks) and chunks[-1].completion is not None)
        tasks.cancel_scope.cancel()
    held.let_go()
    full = await engine.generate_group(random_prompt(20), SamplingParams(max_tokens=400, n=2, seed=3, ignore_eos=True))
    for got, whole in zip(groups["one"], full, strict=True):
        count = len(got.token_ids)
        assert count > 0 and got.token_ids[:400] == whole.token_ids[:count]
        assert len(got.log_probs) == count and got.weight_versions == [WeightSpan(0, 0, count)]
    assert [(c.token_ids, c.stop_reason) for c in groups["two"]] == [([], StopReason.ABORTED)] * 2
    assert groups["one"][0].stop_reason is StopReason.ABORTED
    assert chunks[-1].completion is not None
    assert chunks[-1].completion.token_ids == [token for chunk in chunks for token in chunk.token_ids]


async def test_preempted_samples_are_aborted_with_what_they_had(peaked_model: PreTrainedModel) -> None:
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    params = SamplingParams(max_tokens=1000, seed=1, ignore_eos=True)
    results: dict[int, Completion] = {}
    with EmbeddedEngine(peaked_model, max_length=1024, cache_bytes=page_bytes * 64) as engine:

        async def one(i: int) -> None:
            results[i] = await engine.generate(random_prompt(20, i), params)

        held = hold_at(engine, 6, lambda: engine.num_preemptions > 0 and engine.num_waiting > 0)
        async with anyio.create_task_group() as tasks:
            for i in range(6):
                tasks.start_soon(one, i)
            await until(lambda: engine.num_preemptions > 0 and engine.num_waiting > 0)
            held.wait()
            await engine.pause_generation()
            await engine.abort_all()
            await engine.continue_generation()
    assert min(len(c.token_ids) for c in results.values()) > 0
    for i, got in results.items():
        count = len(got.token_ids)
        assert got.stop_reason is StopReason.ABORTED and got.weight_versions == [WeightSpan(0, 0, count)]
        expected = plain_log_probs(peaked_model, random_prompt(20, i), got.token_ids)
        torch.testing.assert_close(got.log_probs, expected, atol=1e-4, rtol=0)


async def test_chunks_tell_what_completions_tell(engine: EmbeddedEngine) -> None:
    params = SamplingParams(max_tokens=12, seed=4, top_log_probs=2, ignore_eos=True)
    chunks = [chunk async for chunk in engine.stream([7, 8, 9], params)]
    final = chunks[-1].completion
    assert final is not None
    assert [top for chunk in chunks[:-1] for top in chunk.top_log_probs or []] == final.top_log_probs
    assert {chunk.weight_version for chunk in chunks[:-1]} == {0}


async def test_an_engine_lives_until_it_is_closed(peaked_model: PreTrainedModel) -> None:
    engine = EmbeddedEngine(peaked_model, max_length=64)
    assert engine.alive
    engine.close()
    assert not engine.alive
    with pytest.raises(RuntimeError, match="closed"):
        await engine.flush_cache()


async def test_leaving_a_stream_stops_its_sampling(engine: EmbeddedEngine) -> None:
    stream = engine.stream([5, 6], ENDLESS)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: engine.num_running == 0)


async def test_cancelled_company_does_not_change_a_sample(engine: EmbeddedEngine) -> None:
    params = SamplingParams(max_tokens=80, seed=2, ignore_eos=True)
    alone = await engine.generate([5, 6, 7], params)
    held = hold_at(engine, 6, lambda: engine.num_running == 6)
    async with anyio.create_task_group() as tasks:
        for i in range(6):
            tasks.start_soon(engine.generate, random_prompt(30, i), ENDLESS)
        await until(lambda: engine.num_running == 6)
        held.let_go()

        async def cancel_soon() -> None:
            await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()

        tasks.start_soon(cancel_soon)
        with anyio.CancelScope(shield=True):
            among = await engine.generate([5, 6, 7], params)
    assert among.token_ids == alone.token_ids


async def test_closing_wakes_everyone(peaked_model: PreTrainedModel) -> None:
    engine = EmbeddedEngine(peaked_model, max_length=4096)
    failures = []

    async def wait() -> None:
        try:
            await engine.generate([5], ENDLESS)
        except RuntimeError as error:
            failures.append(str(error))

    hold_at(engine, 2, lambda: engine.num_running == 2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await until(lambda: engine.num_running == 2)
        engine.close()
    assert failures == ["the engine was closed"] * 2
    with pytest.raises(RuntimeError, match="closed"):
        await engine.generate([5], GREEDY)


async def test_a_command_that_fails_leaves_nobody_waiting(peaked_model: PreTrainedModel) -> None:
    """Not those who were waiting, nor those whose command came after it or is the one that failed."""
    engine = EmbeddedEngine(peaked_model, max_length=4096)
    told: list[str] = []

    async def wait(work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except (RuntimeError, ZeroDivisionError) as error:
            told.append(str(error))

    hold_at(engine, 1, lambda: engine.num_running == 1)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, lambda: engine.generate([5], ENDLESS))
            await until(lambda: engine.num_running == 1)
            held = threading.Event()
            engine._thread.send(held.wait)  # what follows comes together
            failing = engine._between_steps("fail", lambda: 1 // 0)
            update = engine.update_weights()
            tasks.start_soon(wait, lambda: engine.generate([5], GREEDY))
            await until(lambda: len(engine._thread._inbox) == 3)
            tasks.start_soon(wait, lambda: failing.result())
            tasks.start_soon(wait, lambda: update.result())
            held.set()
    dead = "the engine's thread has failed"
    assert sorted(told) == sorted([dead, dead, dead, "integer division or modulo by zero"])


async def test_weight_updates_are_awaited(engine: EmbeddedEngine) -> None:
    assert await engine.update_weights() == 1
    got = await engine.generate([5], GREEDY)
    assert (got.weight_version, got.stop_reason) == (1, StopReason.LENGTH)
