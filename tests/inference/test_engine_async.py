"""Generating, streaming and cancelling under asyncio and trio."""

from __future__ import annotations

import time
from collections.abc import Iterator

import anyio
import pytest
from plain import plain_greedy, random_prompt
from transformers import PreTrainedModel

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine, SamplingParams, StopReason

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


async def until(condition, seconds: float = 20) -> None:  # type: ignore[no-untyped-def]
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


async def test_cancelling_frees_rows_and_pages(engine: EmbeddedEngine) -> None:
    async with anyio.create_task_group() as tasks:
        for i in range(12):  # four of them wait for a row
            tasks.start_soon(engine.generate, random_prompt(20, i), ENDLESS)
        await until(lambda: engine.num_running == 8 and engine.num_waiting == 4)
        started = time.monotonic()
        tasks.cancel_scope.cancel()
    await until(lambda: engine.num_running == engine.num_waiting == 0)
    assert time.monotonic() - started < 5
    assert engine.num_free_pages == engine.num_pages
    assert len((await engine.generate([5], GREEDY)).token_ids) == 24


async def test_leaving_a_stream_stops_its_sampling(engine: EmbeddedEngine) -> None:
    stream = engine.stream([5, 6], ENDLESS)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: engine.num_running == 0)


async def test_cancelled_company_does_not_change_a_sample(engine: EmbeddedEngine) -> None:
    params = SamplingParams(max_tokens=80, seed=2, ignore_eos=True)
    alone = await engine.generate([5, 6, 7], params)
    async with anyio.create_task_group() as tasks:
        for i in range(6):
            tasks.start_soon(engine.generate, random_prompt(30, i), ENDLESS)
        await until(lambda: engine.num_running == 6)

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

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await until(lambda: engine.num_running == 2)
        engine.close()
    assert failures == ["the engine was closed"] * 2
    with pytest.raises(RuntimeError, match="closed"):
        await engine.generate([5], GREEDY)


async def test_weight_updates_are_awaited(engine: EmbeddedEngine) -> None:
    assert await engine.update_weights() == 1
    got = await engine.generate([5], GREEDY)
    assert (got.weight_version, got.stop_reason) == (1, StopReason.LENGTH)
