"""Engines and rewards that fail in every way: groups complete or are tried again whole; every prompt is consumed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import httpx
import pytest
from arithmetic import Writer, dealt, numbered, prompt_ids
from exiting_reward import exits_for_the_first
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rollout_gen import AsyncRolloutManager, EngineGenerate, RolloutConfig, RolloutError
from rollouts.training.rollout_gen.concurrency import backoff, is_permanent
from rollouts.training.types import Sample, SampleStatus
from rollouts.training.weight_sync import WeightSyncError


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def config(generate_fn: Any, **changes: Any) -> RolloutConfig:
    plain = {"batch_size": 4, "n_samples_per_prompt": 3, "retry_seconds": 0.001, "max_retries": 50}
    return RolloutConfig(**{**plain, "generate_fn": generate_fn, "reward_isolation": "inline", **changes})


def check_whole(samples: list[Sample]) -> None:
    """No sample is cut, mixed from two attempts, or without a log-prob for each token."""
    for sample in samples:
        assert sample.status is SampleStatus.COMPLETED
        assert sample.response == f"{sample.prompt} {sample.metadata['seed']}"
        seed = sample.metadata["seed"]
        expected = [10 + random.Random(f"{seed} {i}").randrange(90) for i in range(sum(sample.loss_mask))]
        assert list(sample.tokens) == [1, 2, *expected]
        assert len(sample.rollout_log_probs) == len(sample.tokens)


# An engine that fails ------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("order", ["dealt", "finished"])
async def test_a_storm_of_503s_loses_and_doubles_nothing(order: str) -> None:
    rng = random.Random(1)

    async def storm(call: int, sample: Sample) -> None:
        if rng.random() < 0.15:
            raise ConnectionError("503 Service Unavailable")

    running = config(Writer(tick=0.0003, trouble=storm), order=order, over_sampling_factor=1.5, max_staleness=2)
    async with AsyncRolloutManager(numbered(12), running) as manager:
        batches = await manager.generate_batches(6)
    consumed = [p for batch in batches for p in prompt_ids(batch.samples, 3)]
    left = [group.prompt.id for group in manager.ledger.open.values()]
    assert Counter(consumed) + Counter(left) == Counter(dealt(12, manager.ledger.num_dealt))
    if order == "dealt":
        assert consumed == dealt(12, 24)
    assert sum(batch.metadata["requeued"].get("ConnectionError", 0) for batch in batches) > 5
    check_whole([s for batch in batches for s in batch.samples])


@pytest.mark.anyio
async def test_a_hung_group_is_timed_out_and_tried_again_whole() -> None:
    hung = set()

    async def hang_once(call: int, sample: Sample) -> None:
        if sample.prompt in ("q2", "q5") and sample.prompt not in hung:
            hung.add(sample.prompt)
            await anyio.sleep(1000)

    writer = Writer(trouble=hang_once)
    async with AsyncRolloutManager(numbered(8), config(writer, generate_timeout_s=0.1)) as manager:
        batches = await manager.generate_batches(2)
    assert hung == {"q2", "q5"}
    requeued = manager.ledger.requeued
    assert (
        set(requeued) == {"TimeoutError"} and requeued["TimeoutError"] >= 2
    )  # a busy machine times out others as well
    assert [p for batch in batches for p in prompt_ids(batch.samples, 3)] == dealt(8, 8)
    check_whole([s for batch in batches for s in batch.samples])
    seeds = [seed for prompt, seed in writer.asked if prompt == "q2"]
    assert len(seeds) == len(set(seeds)) >= 6  # another attempt has other seeds


@pytest.mark.anyio
async def test_a_sync_function_that_hangs_holds_up_nobody() -> None:
    calls, released = Counter(), threading.Event()

    def generate(samples: list[Sample]) -> list[Sample]:
        calls[samples[0].prompt] += 1
        if calls["q3"] == 1 and samples[0].prompt == "q3":
            released.wait()
        return samples

    try:
        with anyio.fail_after(120):
            batch = await AsyncRolloutManager(numbered(4), config(generate, generate_timeout_s=0.2)).generate_batch()
    finally:
        released.set()
    assert calls["q3"] >= 2 and prompt_ids(batch.samples, 3) == dealt(4, 4)


@pytest.mark.anyio
async def test_a_dead_engine_is_an_error_after_bounded_retries_and_then_the_run_goes_on() -> None:
    dead = True

    async def fail(call: int, sample: Sample) -> None:
        if dead:
            raise ConnectionError("connection refused")

    writer = Writer(trouble=fail)
    async with AsyncRolloutManager(numbered(8), config(writer, max_retries=3)) as manager:
        for _ in range(2):
            with pytest.raises(
                RolloutError, match=r"failed 4 times, at last by ConnectionError\('connection refused'\)"
            ):
                await manager.generate_batch()
        assert writer.calls <= 2 * 4 * 4
        dead = False
        assert prompt_ids((await manager.generate_batch()).samples, 3) == dealt(8, 4)


class ServerSaid(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code


@pytest.mark.anyio
async def test_what_is_refused_is_dropped_counted_and_never_tried_again() -> None:
    calls = Counter()

    async def generate(samples: list[Sample]) -> list[Sample]:
        calls[samples[0].prompt] += 1
        if samples[0].prompt in ("q1", "q4"):
            raise UserError("the prompt is too long") if samples[0].prompt == "q1" else ServerSaid(422)
        return samples

    async with AsyncRolloutManager(numbered(8), config(generate)) as manager:
        batches = await manager.generate_batches(3)
    assert all(count <= 2 for count in calls.values())  # once an epoch
    consumed = [p for batch in batches for p in prompt_ids(batch.samples, 3)]
    assert consumed == [p for p in dealt(8, 16) if p not in ("q1", "q4")]
    assert sum(batch.metadata["dropped"]["refused"] for batch in batches if batch.metadata["dropped"]) == 4

    async def refuse(samples: list[Sample]) -> list[Sample]:
        raise ServerSaid(401)

    with pytest.raises(RolloutError, match=r"5 rollout groups in a row were refused.*HTTP 401"):
        await AsyncRolloutManager(numbered(8), config(refuse, max_failed_groups=5)).generate_batch()


@pytest.mark.anyio
async def test_when_no_engine_is_left_nothing_is_tried_again() -> None:
    calls = Counter[str]()

    async def none_left(samples: list[Sample]) -> list[Sample]:
        calls[samples[0].prompt] += 1
        raise WeightSyncError("no engine is left")

    manager = AsyncRolloutManager(numbered(8), config(none_left))
    with pytest.raises(WeightSyncError, match="no engine is left"):
        await manager.generate_batch()
    assert set(calls.values()) == {1} and len(manager.ledger.open) == 4  # no prompt is lost


@pytest.mark.anyio
async def test_a_reward_that_always_fails_ends_the_run_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    judged = Counter[bool]()

    async def fails(sample: Sample) -> float:
        judged[healthy] += 1
        if healthy and judged[healthy] % 2:
            return 1.0
        raise KeyError("no such answer")

    async def answer(samples: list[Sample]) -> list[Sample]:
        return samples

    healthy = True  # half of the samples: nothing that ends a run
    async with AsyncRolloutManager(numbered(40), config(answer, reward_fn=fails)) as manager:
        await manager.generate_batches(12)
    assert judged[True] > 100
    healthy = False
    caplog.clear()
    with pytest.raises(RolloutError, match=r"6\d samples in a row got no reward.*fails: KeyError: 'no such answer'"):
        await AsyncRolloutManager(numbered(40), config(answer, reward_fn=fails)).generate_batch()
    lines = [line for line in caplog.messages if "has no reward" in line]
    assert len(lines) <= 7 and "(32 times so far)" in lines[5]  # not one a sample


def test_which_errors_are_permanent() -> None:
    def http_error(status: int) -> httpx.HTTPStatusError:
        request = httpx.Request("POST", "http://engine")
        return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))

    permanent = [UserError("x"), ServerSaid(400), http_error(404), http_error(422)]
    passing = [ServerSaid(408), ServerSaid(429), http_error(500), http_error(503), httpx.ConnectError("x"), OSError()]
    assert [is_permanent(e) for e in permanent + passing] == [True] * 4 + [False] * 6
    waits = [backoff(i, 0.5) for i in range(20)]
    assert all(0.25 * 2**i <= wait <= 0.75 * 2**i for i, wait in enumerate(waits[:6]))
    assert max(backoff(i, 0.5) for i in range(200)) <= 90
    assert len(set(waits)) == 20


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: samples[:2], "in their order"),
        (lambda samples: samples[::-1], "in their order"),
        (lambda samples: None, "list of Samples"),
        (lambda samples: [setattr(samples[0], "group_id", "7"), samples][1], "another group_id"),
        (lambda samples: [setattr(samples[0], "tokens", [1]), samples][1], "as long as its tokens"),
    ],
)
async def test_a_mistaken_generate_fn_is_named_at_once(change: Callable[..., Any], message: str) -> None:
    calls = 0

    async def generate(samples: list[Sample]) -> list[Sample]:
        nonlocal calls
        calls += 1
        return change(samples)

    with pytest.raises(UserError, match=message):
        await AsyncRolloutManager(numbered(8), config(generate, batch_size=1)).generate_batch()
    assert calls == 1


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_mix_of_failures_and_restarts_consumes_every_prompt_once(data: st.DataObject) -> None:
    """Failures, aborts and restarts from an earlier state at random: the committed history is the clean run's."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    options: dict[str, Any] = {
        "batch_size": data.draw(st.integers(1, 4)),
        "n_samples_per_prompt": data.draw(st.integers(1, 3)),
        "over_sampling_factor": data.draw(st.sampled_from([1.0, 1.5, 3.0])),
        "max_staleness": data.draw(st.integers(0, 2)),
        "order": data.draw(st.sampled_from(["dealt", "finished"])),
    }
    options["overlap"] = options["max_staleness"] > 0 and data.draw(st.booleans())
    restarts = data.draw(st.lists(st.integers(0, 5), max_size=3))

    async def trouble(call: int, sample: Sample) -> None:
        if rng.random() < 0.1:
            raise ConnectionError
        await anyio.sleep(0 if rng.random() < 0.7 else 0.001)

    async def run() -> None:
        committed: list[tuple[list[str], dict[str, Any]]] = []
        first = AsyncRolloutManager(numbered(7), config(Writer(trouble=trouble), **options)).state_dict()
        for crash_after in [*restarts, None]:
            writer = Writer(trouble=trouble)
            manager = AsyncRolloutManager(numbered(7), config(writer, **options))
            manager.load_state_dict(committed[-1][1] if committed else first)
            writer.version = manager.weight_version
            async with manager:
                while len(committed) < 8:
                    batch = await manager.generate_batch()
                    if crash_after is not None and batch.step_id % 6 == crash_after and rng.random() < 0.7:
                        break  # consumed and not committed: it never happened
                    assert max(batch.metadata["staleness"]) <= options["max_staleness"]
                    writer.version = manager.weight_version = batch.step_id + 1
                    committed.append((prompt_ids(batch.samples, options["n_samples_per_prompt"]), manager.state_dict()))
        consumed = [p for prompts, _ in committed for p in prompts]
        left = [entry["prompt"]["id"] for entry in committed[-1][1]["ledger"]["groups"]]
        assert len(consumed) == 8 * options["batch_size"]
        assert Counter(consumed) + Counter(left) == Counter(dealt(7, len(consumed) + len(left)))
        if options["order"] == "dealt":
            assert consumed == dealt(7, len(consumed))

    async def run_in_time() -> None:
        with anyio.fail_after(300):
            await run()

    anyio.run(run_in_time)


# Real engines --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_an_engine_closed_in_the_middle_and_replaced_five_times(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_tiny_model()
    prompts = [[{"role": "user", "content": f"What is {i} + 1?"}] for i in range(10)]
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    generate = EngineGenerate(EmbeddedEngine(model, max_length=512), tiny_tokenizer, params)
    running = config(generate, batch_size=5, max_staleness=1, over_sampling_factor=1.4)
    rng = random.Random(0)
    kills = 0

    async def killer() -> None:
        nonlocal kills
        while kills < 5:
            start = generate.engine.num_sampled_tokens
            while generate.engine.num_sampled_tokens < start + rng.randrange(50, 600):
                await anyio.sleep(0.002)
            await anyio.to_thread.run_sync(generate.engine.close)
            kills += 1
            await anyio.sleep(0.01)
            generate.engine = EmbeddedEngine(model, max_length=512)

    batches = []
    try:
        async with (
            AsyncRolloutManager(DataBuffer(prompts, shuffle=False), running) as manager,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(killer)
            while kills < 5 or len(batches) < 4:
                batches.append(await manager.generate_batch())
    finally:
        generate.engine.close()
    consumed = [batch.samples[i].prompt for batch in batches for i in range(0, 15, 3)]
    assert consumed == (prompts * 100)[: len(consumed)]
    assert manager.ledger.requeued["RuntimeError"] >= 1
    for sample in (s for batch in batches for s in batch.samples):
        assert sum(sample.loss_mask) == 150 and sample.status is SampleStatus.TRUNCATED
        assert sample.weight_versions[-1].end == len(sample.tokens) == len(sample.rollout_log_probs)
        assert all(p < 0 for p, m in zip(sample.rollout_log_probs, sample.loss_mask, strict=True) if m)


class TwoEngines:
    """Groups 0 and 1 have an engine of their own, which starts when the other is held in the middle of the rest."""

    def __init__(self, first: EngineGenerate, rest: EngineGenerate) -> None:
        self.first, self.rest = first, rest
        self.get_weight_version, self.abort = rest.get_weight_version, rest.abort

    async def __call__(self, samples: list[Sample]) -> list[Sample]:
        if samples[0].group_id not in ("0", "1"):
            return await self.rest(samples)
        engine = self.rest.engine
        while not engine.num_sampled_tokens:
            await anyio.sleep(0.001)
        await engine.pause_generation()
        return await self.first(samples)


@pytest.mark.anyio
async def test_partial_rollouts_of_a_real_engine_keep_their_log_probs(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_tiny_model()
    with EmbeddedEngine(model, max_length=2048) as first, EmbeddedEngine(model, max_length=2048, max_rows=4) as engine:
        # Endless, as far as a test goes: 22 s for all of them on the machine that this was written on.
        endless = EngineGenerate(engine, tiny_tokenizer, SamplingParams(max_tokens=1900, ignore_eos=True))
        short = EngineGenerate(first, tiny_tokenizer, SamplingParams(max_tokens=8, ignore_eos=True))
        prompts = [[{"role": "user", "content": f"Tell me about {i}."}] for i in range(12)]
        generate = TwoEngines(short, endless)
        running = config(generate, batch_size=2, n_samples_per_prompt=4, over_sampling_factor=4, max_staleness=1)
        async with AsyncRolloutManager(DataBuffer(prompts, shuffle=False), running) as manager:
            await manager.generate_batch()
            assert engine.num_running == engine.num_waiting == 0
            assert manager.partial_samples
            partial = {s.id: (list(s.tokens), list(s.rollout_log_probs)) for s in manager.partial_samples}
            await engine.continue_generation()
            await engine.update_weights()
            longest = max(sum(s.loss_mask) for s in manager.partial_samples)
            endless.params = SamplingParams(max_tokens=longest + 20, ignore_eos=True)
            later = {s.id: s for batch in await manager.generate_batches(4) for s in batch.samples}
        assert partial.keys() <= later.keys() and manager.weight_version == 1
        for name, (tokens, log_probs) in partial.items():
            sample = later[name]
            assert sample.tokens[: len(tokens)] == tokens and sample.rollout_log_probs[: len(tokens)] == log_probs
            assert [w.version for w in sample.weight_versions] == [0, 1]
            assert sample.weight_versions[0].end == sample.weight_versions[1].start == len(tokens)
            assert sample.weight_versions[1].end == len(sample.tokens) == len(sample.rollout_log_probs)


# Rewards that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_rewards_that_fail_mask_their_sample_and_no_other() -> None:
    async def reward(sample: Sample) -> float:
        index = int(sample.id.split("/")[1])
        if sample.prompt == "q0" and index == 0:
            raise ZeroDivisionError
        if sample.prompt == "q1" and index == 1:
            await anyio.sleep(1000)
        if sample.prompt == "q2" and index == 2:
            return float("nan")
        if sample.prompt == "q3":
            raise SystemExit(1)
        return float(index)

    settings = config(Writer(), reward_fn=reward, reward_timeout_s=1, batch_size=3)
    async with AsyncRolloutManager(numbered(4), settings) as manager:
        batch = await manager.generate_batch()
    assert len(batch.samples) == 9
    failed = {f"{s.prompt} {s.id.split('/')[1]}" for s in batch.samples if s.status is SampleStatus.FAILED}
    assert failed == {"q0 0", "q1 1", "q2 2"}
    for sample in batch.samples:
        masked = f"{sample.prompt} {sample.id.split('/')[1]}" in failed
        assert (sample.reward is None) == (not any(sample.loss_mask)) == masked
    faults = batch.metadata["faults"]
    assert faults["raised"] == faults["timeout"] == faults["not_a_number"] == 1
    order = dealt(4, 4)
    if order[-1] != "q3":  # dealt before the last prompt was
        assert batch.metadata["dropped"] == {"no_reward": 1} and faults["exited"] == 3


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_reward_that_ends_its_process_masks_its_sample_alone() -> None:
    settings = config(Writer(), reward_fn=exits_for_the_first, reward_isolation="process", batch_size=1)
    async with AsyncRolloutManager(numbered(4), settings) as manager:
        batch = await manager.generate_batch()
    assert [s.reward for s in batch.samples] == [None, 1.0, 1.0]
    assert [any(s.loss_mask) for s in batch.samples] == [False, True, True]
