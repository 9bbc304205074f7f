"""Samples round-trip and refuse lengths that disagree; a TrainFuture behaves the same however it is waited for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollouts.training.types import (
    ImmediateTrainFuture,
    Sample,
    SampleStatus,
    SFTTrainingConfig,
    TrainFuture,
    WeightSpan,
)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    n = draw(st.integers(0, 6))
    numbers = st.lists(st.floats(-5, 5), min_size=n, max_size=n)
    return Sample(
        tokens=draw(st.lists(st.integers(0, 500), min_size=n, max_size=n)),
        loss_mask=draw(numbers),
        prompt=draw(st.one_of(st.text(), st.just([{"role": "user", "content": "hi"}]))),
        rollout_log_probs=draw(st.one_of(st.none(), numbers)),
        advantages=draw(st.one_of(st.none(), numbers)),
        reward=draw(st.one_of(st.none(), st.floats(-1, 1))),
        rewards=draw(st.dictionaries(st.text(), st.floats(-1, 1), max_size=2)),
        status=draw(st.sampled_from(SampleStatus)),
        weight_versions=[WeightSpan(3, 0, n)],
        metadata=draw(st.dictionaries(st.text(), st.integers(), max_size=2)),
    )


@given(sample=samples())
def test_a_sample_survives_json(sample: Sample) -> None:
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample


def test_arrays_become_plain_numbers() -> None:
    sample = Sample(tokens=np.array([1, 2], np.int32), loss_mask=np.array([0, 1], np.uint8))
    assert json.loads(json.dumps(sample.to_dict()))["tokens"] == [1, 2]


def test_unknown_keys_are_kept_as_metadata_and_the_source_is_left_alone() -> None:
    source = {"tokens": [1], "loss_mask": [1], "metadata": {"a": 1}, "source": "web"}
    before = json.dumps(source)
    assert Sample.from_dict(source).metadata == {"a": 1, "source": "web"}
    assert json.dumps(source) == before


@pytest.mark.parametrize("field", ["loss_mask", "rollout_log_probs", "advantages"])
def test_lengths_must_agree(field: str) -> None:
    values: dict[str, Any] = {"tokens": [1, 2, 3], "loss_mask": [0, 1, 1], field: [0.0, 1.0]}
    with pytest.raises(ValueError, match=rf"'q7': {field} has 2 entries for 3 tokens"):
        Sample(id="q7", **values)


def test_the_first_token_carries_no_loss() -> None:
    assert Sample(tokens=[5, 6, 7], loss_mask=[1, 0, 1]).num_loss_tokens == 1
    assert Sample(tokens=[5], loss_mask=[1]).num_loss_tokens == 0
    for kind in (list, tuple, np.array, lambda mask: np.array(mask) != 0):
        assert Sample(tokens=[5, 6, 7, 8], loss_mask=kind([0.5, 0.0, 0.5, 1.0])).num_loss_tokens == 2


def test_labels_are_the_tokens() -> None:
    sample = Sample(tokens=[5, 6, 7], loss_mask=[0, 1, 1])
    assert sample.input_ids.dtype == torch.int64 and sample.labels.tolist() == sample.input_ids.tolist() == [5, 6, 7]


@pytest.mark.parametrize("name", ["num_steps", "batch_size", "max_tokens_per_micro_batch", "max_bad_steps"])
def test_a_configuration_refuses_nonsense(name: str) -> None:
    good = SFTTrainingConfig(num_steps=1, batch_size=1)
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(good, **{name: 0})
    with pytest.raises(ValueError, match="eval_every"):
        dataclasses.replace(good, eval_every=-1)


# TrainFuture --------------------------------------------------------------------------------------------------------


def wait_in_every_way(future: TrainFuture[Any]) -> list[Any]:
    async def plainly() -> Any:
        return await future

    async def as_result() -> Any:
        return await future.result()

    return [future.wait(), *(anyio.run(way, backend=b) for way in (plainly, as_result) for b in ("asyncio", "trio"))]


@pytest.mark.parametrize("value", [None, 0, {"loss": 1.5}])
def test_any_value_is_a_value(value: Any) -> None:
    future: TrainFuture[Any] = TrainFuture("x")
    assert not future.done()
    future.set_result(value)
    assert future.done()
    assert wait_in_every_way(future) == [value] * 5
    assert wait_in_every_way(ImmediateTrainFuture(value)) == [value] * 5


def test_an_exception_reaches_everyone_who_waits() -> None:
    future: TrainFuture[None] = TrainFuture("x")
    future.set_exception(KeyError("lost"))

    async def wait() -> None:
        await future

    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            future.wait()
        for backend in ("asyncio", "trio"):
            with pytest.raises(KeyError, match="lost"):
                anyio.run(wait, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_awaiting_a_pending_future_lets_others_run(backend: str) -> None:
    future: TrainFuture[str] = TrainFuture("slow")
    seen: list[str] = []

    async def waiter() -> None:
        seen.append(await future)

    async def other() -> None:
        for _ in range(3):
            await anyio.sleep(0.005)
            seen.append("tick")
        future.set_result("done")

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(waiter)
            group.start_soon(other)

    anyio.run(main, backend=backend)
    assert seen == ["tick"] * 3 + ["done"]


def test_completion_from_another_thread() -> None:
    future: TrainFuture[int] = TrainFuture("x")
    threading.Timer(0.02, future.set_result, [7]).start()
    assert asyncio.run(asyncio.wait_for(_awaited(future), 10)) == 7


async def _awaited(future: TrainFuture[int]) -> int:
    return await future


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whoever_awaits_can_be_cancelled(backend: str) -> None:
    future: TrainFuture[int] = TrainFuture("x")

    async def main() -> int:
        with anyio.move_on_after(0.01) as scope:
            await future
        assert scope.cancelled_caught and not future.done()
        future.set_result(7)
        return await future

    assert anyio.run(main, backend=backend) == 7


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_many_await_and_a_thread_completes_what_they_await(backend: str) -> None:
    """More than there are threads to run things in: none is taken by waiting."""
    future: TrainFuture[int] = TrainFuture("x")
    found: list[int] = []

    async def wait() -> None:
        found.append(await future)

    async def main() -> None:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                await anyio.to_thread.run_sync(future.set_result, 7)

    anyio.run(main, backend=backend)
    assert found == [7] * 100


def test_futures_may_be_awaited_in_any_order() -> None:
    first, second = TrainFuture[int]("a"), TrainFuture[int]("b")
    first.set_result(1)
    second.set_result(2)

    async def backwards() -> list[int]:
        return [await second, await first]

    assert asyncio.run(backwards()) == [2, 1]


def test_a_lazy_result_is_read_once_and_not_before_it_is_asked_for() -> None:
    reads: list[int] = []
    future: TrainFuture[int] = TrainFuture("x")
    future.set_lazy_result(lambda: reads.append(1) or len(reads))  # type: ignore[func-returns-value]
    assert future.done() and not reads
    assert wait_in_every_way(future) == [1] * 5
    assert reads == [1]


def test_a_lazy_result_is_read_once_by_two_threads() -> None:
    both_wait, reads = threading.Barrier(2, timeout=60), []

    def read() -> int:
        reads.append(1)
        time.sleep(0.1)  # the other thread comes to wait meanwhile
        return 7

    future: TrainFuture[int] = TrainFuture("x")
    future.set_lazy_result(read)

    def wait() -> int:
        both_wait.wait()
        return future.wait()

    with ThreadPoolExecutor(2) as pool:
        assert [each.result() for each in [pool.submit(wait), pool.submit(wait)]] == [7, 7]
    assert reads == [1]


def test_a_future_completes_once() -> None:
    future: TrainFuture[int] = TrainFuture("step")
    future.set_result(1)
    for complete in (future.set_result, future.set_lazy_result, future.set_exception):
        with pytest.raises(RuntimeError, match=r"'step'.*already complete"):
            complete(None)  # type: ignore[arg-type]
    assert future.wait() == 1


def test_waiting_has_a_time_limit_and_says_for_what() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="save_checkpoint did not complete"):
        TrainFuture("save_checkpoint").wait(timeout=0.01)
    assert time.monotonic() - started < 5
