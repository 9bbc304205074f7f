"""Whole groups, in order, scored before they are filtered, refilled until the batch is full."""

from __future__ import annotations

import json
import random
from typing import Any

import anyio
import pytest
from arithmetic import Writer, answer_length, dealt, numbered, prompt_ids

from rollouts.errors import UserError
from rollouts.training.filters import FilterResult, check_reward_nonzero_std
from rollouts.training.rollout_gen import AsyncRolloutManager, RolloutAborted, RolloutConfig, RolloutError
from rollouts.training.types import Sample, SampleStatus

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def config(generate_fn: Any, **changes: Any) -> RolloutConfig:
    plain = {"batch_size": 4, "n_samples_per_prompt": 3, "retry_seconds": 0.001, "reward_isolation": "inline"}
    return RolloutConfig(**{**plain, "generate_fn": generate_fn, **changes})


async def test_batches_hold_whole_groups_in_the_order_dealt() -> None:
    manager = AsyncRolloutManager(numbered(10), config(Writer(tick=0.0005)))
    async with manager:
        batches = await manager.generate_batches(5)
    assert [p for batch in batches for p in prompt_ids(batch.samples, 3)] == dealt(10, 20)
    assert [batch.step_id for batch in batches] == [0, 1, 2, 3, 4]
    assert [batch.epoch_id for batch in batches] == [0, 0, 1, 1, 1]
    assert len({s.group_id for batch in batches for s in batch.samples}) == 20
    assert all(s.status is SampleStatus.COMPLETED for batch in batches for s in batch.samples)


async def test_without_a_block_and_with_the_other_signature() -> None:
    data = numbered(6)
    manager = AsyncRolloutManager(data, rollout_config=config(Writer()), over_sampling_factor=1.5)
    first, second = await manager.generate_batch(), await manager.generate_batch()
    assert prompt_ids(first.samples + second.samples, 3) == dealt(6, 8)
    assert manager.config.over_sampling_factor == 1.5
    with pytest.raises(UserError, match="generate_fn is missing"):
        AsyncRolloutManager(data, RolloutConfig(batch_size=1))
    with pytest.raises(UserError, match="needs a RolloutConfig"):
        AsyncRolloutManager(data)


async def test_groups_are_scored_before_they_are_filtered_and_replaced_until_the_batch_is_full() -> None:
    seen = []

    async def reward(sample: Sample) -> float:
        return float(sample.metadata["seed"] % 2 if sample.prompt not in ("q1", "q4") else 1)

    def only_mixed(group: list[Sample]) -> FilterResult:
        assert len(group) == 3 and all(s.reward is not None for s in group)
        seen.append(group[0].prompt)
        return check_reward_nonzero_std(group)

    settings = config(Writer(tick=0.0005), reward_fn=reward, filter_fn=only_mixed, over_sampling_factor=1.5)
    async with AsyncRolloutManager(numbered(10), settings) as manager:
        batches = await manager.generate_batches(3)
    for batch in batches:
        assert len(batch) == 12
        prompts = prompt_ids(batch.samples, 3)
        assert not {"q1", "q4"} & set(prompts)
        for i in range(0, 12, 3):
            assert len({s.reward for s in batch.samples[i : i + 3]}) == 2
    consumed = [p for batch in batches for p in prompt_ids(batch.samples, 3)]
    dropped = sum(batch.metadata["dropped"].get("zero_std", 0) for batch in batches)
    assert dropped == manager.ledger.dropped["zero_std"] > 0
    order = dealt(10, 100)
    places = [order.index(p, 10 * (i // 10)) for i, p in enumerate(consumed)]
    assert places == sorted(places) or len(places) > 10  # nothing overtakes
    assert manager.ledger.num_dealt == len(consumed) + dropped + len(manager.ledger.open)


@pytest.mark.parametrize("over_sampling", [1.0, 2.0])
async def test_what_the_order_of_finishing_is_does_not_matter(over_sampling: float) -> None:
    async def run(pace: int) -> list[list[Any]]:
        rng = random.Random(pace)

        async def wait(call: int, sample: Sample) -> None:
            await anyio.sleep(rng.uniform(0, 0.004))

        async def reward(sample: Sample) -> float:
            return random.Random(f"{sample.metadata['seed']} {sample.weight_versions[0].version}").randrange(2)

        writer = Writer(trouble=wait, longest=4)
        settings = config(
            writer, reward_fn=reward, filter_fn=check_reward_nonzero_std, seed=5, over_sampling_factor=over_sampling,
            n_samples_per_prompt=2,
        )  # fmt: skip
        batches = []
        async with AsyncRolloutManager(numbered(10), settings) as manager:
            for step in range(8):
                writer.version = step // 2
                batches.append([s.to_dict() for s in (await manager.generate_batch()).samples])
        return batches

    assert await run(1) == await run(2) == await run(3)


async def test_a_group_behind_the_batch_is_judged_by_what_the_next_weights_say() -> None:
    """Whether it was rejected before the batch was full or never got so far must not show."""

    async def run(last_first: bool) -> list[str]:
        rejected = anyio.Event()
        writer = Writer()

        async def hold(sample: Sample, done: int) -> None:
            if writer.version == 0 and (sample.group_id == "4") != last_first:
                await (anyio.sleep_forever() if sample.group_id == "4" else rejected.wait())

        def newest(group: list[Sample]) -> bool:
            if group[0].group_id == "4":
                rejected.set()
            return group[0].group_id != "4" or writer.version > 0

        writer.hold = hold
        settings = config(writer, filter_fn=newest, over_sampling_factor=1.25)
        async with AsyncRolloutManager(numbered(10), settings) as manager:
            first = await manager.generate_batch()
            assert rejected.is_set() == last_first
            state = json.loads(json.dumps(manager.state_dict()))
            writer.version = 1
            second = await manager.generate_batch()
        resumed = AsyncRolloutManager(numbered(10), settings)
        resumed.load_state_dict(state)
        assert json.loads(json.dumps(resumed.state_dict())) == state
        again = await resumed.generate_batch()
        assert [s.to_dict() for s in again.samples] == [s.to_dict() for s in second.samples]
        assert second.metadata["dropped"] == {}
        return prompt_ids(first.samples + second.samples, 3)

    assert await run(last_first=True) == await run(last_first=False) == dealt(10, 8)


async def test_a_seed_for_every_sample_of_every_attempt() -> None:
    writer = Writer()
    async with AsyncRolloutManager(numbered(5), config(writer, batch_size=5)) as manager:
        await manager.generate_batches(3)  # three epochs
    assert len(set(writer.asked)) == len(writer.asked) == 3 * 5 * 3
    again = Writer()
    async with AsyncRolloutManager(numbered(5), config(again, batch_size=3)) as manager:  # other company
        await manager.generate_batches(5)
    assert sorted(again.asked) == sorted(writer.asked)
    other = Writer()
    await AsyncRolloutManager(numbered(5), config(other, batch_size=5, seed=1)).generate_batch()
    assert not set(other.asked) & set(writer.asked)


async def test_a_sync_generate_fn_and_its_keywords() -> None:
    got: list[dict] = []

    def generate(samples: list[Sample], **kwargs: Any) -> list[Sample]:
        got.append(kwargs)
        for sample in samples:
            sample.response = "yes"
        return samples

    settings = config(generate, endpoint="here", environment=["calculator"])
    batch = await AsyncRolloutManager(numbered(4), settings, max_turns=3).generate_batch()
    assert [s.response for s in batch.samples] == ["yes"] * 12
    assert got == [{"endpoint": "here", "environment": ["calculator"], "max_turns": 3}] * 4


@pytest.mark.parametrize("staleness", [0, 1])
async def test_the_surplus_is_aborted_and_comes_first_next_time(staleness: int) -> None:
    released = anyio.Event()

    async def hold(sample: Sample, done: int) -> None:
        if sample.group_id in ("5", "7", "8", "9") and done == 38:
            await released.wait()  # in the middle of its answer when the batch is full

    writer = Writer(tick=0.002, longest=60, hold=hold)
    # With this seed the longest answers of the ten groups have 28, 38, 34, 32, then 26, 54, 13, 60, 58, 44 tokens.
    settings = config(writer, over_sampling_factor=2.5, max_staleness=staleness, seed=98)
    async with AsyncRolloutManager(numbered(40), settings) as manager:
        first = await manager.generate_batch()
        assert writer.running == 0
        partial = {s.id: s for s in manager.partial_samples}
        assert bool(partial) == (staleness > 0)
        assert {g.number for g in manager.ledger.open.values() if g.state == "ready"} == {4, 6}
        writer.version = 1
        released.set()
        second = await manager.generate_batch()
    assert prompt_ids(first.samples + second.samples, 3) == dealt(40, 8)
    assert second.metadata["carried"] == 4
    continued = [s for s in second.samples if s.id in partial]
    assert bool(continued) == (staleness > 0)
    for sample in continued:
        before = partial[sample.id]
        assert sample.tokens[: len(before.tokens)] == before.tokens
        assert sample.rollout_log_probs[: len(before.tokens)] == before.rollout_log_probs
        assert sample.rollout_log_probs[len(before.tokens) :] == [-1.5] * (len(sample.tokens) - len(before.tokens))
        assert len(sample.tokens) - 2 == answer_length(sample.metadata["seed"], 60)
    versions = {w.version for s in second.samples for w in s.weight_versions}
    assert versions == ({0, 1} if staleness else {1})
    assert second.metadata["staleness"] == [staleness] * 4
    assert second.metadata["requeued"] == ({} if staleness else {"stale": 6})


async def test_request_abort_loses_nothing() -> None:
    reached, released = anyio.Event(), anyio.Event()

    async def hold(sample: Sample, done: int) -> None:
        if done == 2:
            reached.set()
            await released.wait()

    manager = AsyncRolloutManager(numbered(10), config(Writer(hold=hold), max_staleness=1))
    async with manager:
        async with anyio.create_task_group() as tasks:

            async def stop() -> None:
                await reached.wait()
                manager.request_abort()

            tasks.start_soon(stop)
            with pytest.raises(RolloutAborted):
                await manager.generate_batch()
        assert manager.partial_samples
        released.set()
        batch = await manager.generate_batch()
        assert prompt_ids(batch.samples, 3) == dealt(10, 4)
        manager.request_abort()
        with pytest.raises(RolloutAborted):
            await manager.generate_batch()
        assert prompt_ids((await manager.generate_batch()).samples, 3) == dealt(10, 8)[4:]


async def test_cancelling_generate_batch_loses_nothing() -> None:
    writer = Writer(tick=0.01)
    async with AsyncRolloutManager(numbered(10), config(writer)) as manager:
        for _ in range(3):
            with anyio.move_on_after(0.02):
                await manager.generate_batch()
            assert writer.running == 0
        assert prompt_ids((await manager.generate_batch()).samples, 3) == dealt(10, 4)


async def test_a_filter_that_keeps_nothing_is_an_error_that_counts_why() -> None:
    settings = config(Writer(), filter_fn=lambda group: FilterResult(False, "never"), max_dropped_groups=20)
    with pytest.raises(RolloutError, match=r"20 rollout groups were dropped for one batch \(\{'never': 20\}\)"):
        await AsyncRolloutManager(numbered(10), settings).generate_batch()


async def test_groups_that_are_dropped_without_end_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    settings = config(Writer(), filter_fn=lambda group: FilterResult(False, "never"), max_dropped_groups=130)
    with pytest.raises(RolloutError):
        await AsyncRolloutManager(numbered(10), settings).generate_batch()
    told = [line for line in caplog.messages if "were dropped for this batch so far ({'never'" in line]
    assert [int(line.split()[0]) for line in told] == [32, 64, 128]


async def test_a_state_goes_through_json_and_carries_on() -> None:
    settings = config(Writer(tick=0.001), over_sampling_factor=2, max_staleness=1)
    manager = AsyncRolloutManager(numbered(10), settings)
    first = await manager.generate_batch()
    state = json.loads(json.dumps(manager.state_dict()))
    other = AsyncRolloutManager(numbered(10), config(Writer(), over_sampling_factor=2, max_staleness=1))
    other.load_state_dict(state)
    assert json.loads(json.dumps(other.state_dict())) == state
    rest = [await other.generate_batch() for _ in range(3)]
    assert [p for b in [first, *rest] for p in prompt_ids(b.samples, 3)] == dealt(10, 16)
    assert [b.step_id for b in rest] == [1, 2, 3]

    with pytest.raises(UserError, match="n_samples_per_prompt was 3"):
        AsyncRolloutManager(numbered(10), config(Writer(), n_samples_per_prompt=2)).load_state_dict(state)
    with pytest.raises(UserError, match="seed was 0"):
        AsyncRolloutManager(numbered(10), config(Writer(), seed=2)).load_state_dict(state)
    with pytest.raises(UserError, match="num_prompts was 10"):
        AsyncRolloutManager(numbered(11), settings).load_state_dict(state)
    with pytest.raises(UserError, match="ledger is missing"):
        AsyncRolloutManager(numbered(10), settings).load_state_dict({})
    state["ledger"]["groups"].pop()
    with pytest.raises(UserError, match="does not account for every prompt"):
        AsyncRolloutManager(numbered(10), settings).load_state_dict(state)
