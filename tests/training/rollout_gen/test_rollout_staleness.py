"""One staleness knob, kept at admission when generation overlaps training and checked at consumption; fairness."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from arithmetic import Writer, answer_length, dealt, numbered, prompt_ids

from rollouts.errors import UserError
from rollouts.training.rollout_gen import AsyncRolloutManager, RolloutConfig, RolloutError
from rollouts.training.rollout_gen.ledger import GroupState

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def config(generate_fn: Any, **changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"batch_size": 3, "n_samples_per_prompt": 2, "generate_fn": generate_fn, **changes})


@pytest.mark.parametrize("staleness", [1, 3])
async def test_overlapped_generation_stays_within_the_bound(staleness: int) -> None:
    writer = Writer(tick=0.001)
    ages: list[int] = []
    consumed: list[str] = []
    wrote_while_training = 0
    async with AsyncRolloutManager(
        numbered(10), config(writer, max_staleness=staleness, overlap=True, order="dealt")
    ) as manager:
        for step in range(8):
            batch = await manager.generate_batch()
            ages += batch.metadata["staleness"]
            consumed += prompt_ids(batch.samples, 2)
            oldest = min(w.version for s in batch.samples for w in s.weight_versions)
            assert step - oldest == max(batch.metadata["staleness"]) <= staleness
            calls = writer.calls
            with anyio.fail_after(120):  # training, which takes as long as what is begun needs
                await anyio.sleep(0.002)
                while any(g.state is GroupState.IN_FLIGHT for g in manager.ledger.open.values()):
                    await anyio.sleep(0.002)
            wrote_while_training += writer.calls - calls
            begun = [g for g in manager.ledger.open.values() if g.state is not GroupState.WAITING]
            assert len(begun) <= 3 * staleness
            writer.version = manager.weight_version = step + 1
        assert manager.ledger.requeued == {}  # admission kept the bound: nothing had to be thrown away
    assert max(ages) == staleness
    assert wrote_while_training > 0
    assert consumed == dealt(10, 24)
    assert writer.running == 0


async def test_without_overlap_nothing_is_generated_while_training() -> None:
    writer = Writer(tick=0.001)
    async with AsyncRolloutManager(numbered(10), config(writer, max_staleness=1, over_sampling_factor=3)) as manager:
        await manager.generate_batch()
        calls = writer.calls
        await anyio.sleep(0.02)
        assert (writer.calls, writer.running) == (calls, 0)


async def test_what_is_too_old_is_begun_anew() -> None:
    writer = Writer(tick=0.001, longest=40)
    running = config(writer, max_staleness=1, over_sampling_factor=3)
    async with AsyncRolloutManager(numbered(20), running) as manager:
        await manager.generate_batch()
        touched = [g.number for g in manager.ledger.open.values() if not g.untouched]
        assert len(touched) == 6
        writer.version = manager.weight_version = 2  # two versions on
        batch = await manager.generate_batch()
        assert manager.ledger.requeued == {"stale": 6}
        assert {w.version for s in batch.samples for w in s.weight_versions} == {2}
        assert prompt_ids(batch.samples, 2) == dealt(20, 6)[3:]


async def test_an_engine_that_lags_behind_the_trainer_is_an_error_not_an_endless_loop() -> None:
    manager = AsyncRolloutManager(numbered(10), config(Writer()))
    manager.weight_version = 4
    with anyio.fail_after(240), pytest.raises(RolloutError, match="version 0 while the trainer's are version 4"):
        await manager.generate_batch()


async def test_overlap_needs_a_bound_above_zero() -> None:
    with pytest.raises(UserError, match="overlap is out of range: True; with max_staleness 0"):
        config(Writer(), overlap=True)


@pytest.mark.parametrize(("order", "staleness", "overlap"), [
    ("dealt", 0, False), ("dealt", 2, False), ("finished", 0, False), ("finished", 2, False), ("finished", 2, True),
])  # fmt: skip
async def test_long_answers_are_consumed_as_often_as_they_are_asked_for(
    order: Any, staleness: int, overlap: bool
) -> None:
    longest, steps = 40, 20
    writer = Writer(tick=0.0005, longest=longest)
    running = config(
        writer, batch_size=4, n_samples_per_prompt=1, over_sampling_factor=1.5, order=order,
        max_staleness=staleness, overlap=overlap, max_retries=0,
    )  # fmt: skip
    lateness, consumed = [], []
    async with AsyncRolloutManager(numbered(30), running) as manager:
        for step in range(steps):
            batch = await manager.generate_batch()
            for sample in batch.samples:
                consumed.append(sample)
                lateness.append(step - int(sample.group_id) // 4)
            writer.version = manager.weight_version = step + 1
        seeds = {group.number: manager.ledger.seeds(0, group)[0] for group in manager.ledger.open.values()}
    lengths = [sum(s.loss_mask) for s in consumed]
    assert lengths == [answer_length(s.metadata["seed"], longest) for s in consumed]
    # Every prompt dealt was consumed with its first seed, or is still open: none was replaced by a shorter answer.
    numbers = sorted([int(s.group_id) for s in consumed] + list(seeds))
    assert numbers == list(range(len(numbers)))
    asked_for = [answer_length(seed, longest) for seed in seeds.values()] + lengths
    assert abs(sum(lengths) / len(lengths) - sum(asked_for) / len(asked_for)) < 1.0
    assert max(lateness) <= 1

    # The test would notice: taking the four fastest of every six and forgetting the others.
    population = [answer_length(s.metadata["seed"], longest) for s in consumed]
    fastest = [x for i in range(0, len(population) - 5, 6) for x in sorted(population[i : i + 6])[:4]]
    assert sum(asked_for) / len(asked_for) - sum(fastest) / len(fastest) > 3.0
