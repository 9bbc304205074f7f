"""Rewards that raise, hang, exit or lie: the sample is left out, nobody else's is lost or late, no process stays."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import torch

import rollouts
from rollouts.errors import UserError
from rollouts.training.functions import load_function
from rollouts.training.rewards import RewardReport, RewardRunner, RewardSpec, score_samples
from rollouts.training.rewards.answers import gsm8k, regex
from rollouts.training.rewards.judge import llm_judge
from rollouts.training.rewards.runner import isolation_of
from rollouts.training.rewards.symbolic import symbolic_math
from rollouts.training.rewards.worker import NotAReward, checked
from rollouts.training.types import Sample, SampleStatus

BACKENDS = ["asyncio", "trio"]


def sample(does: Any = "well", **changes: Any) -> Sample:
    fields: dict[str, Any] = {"tokens": [5, 6, 7], "loss_mask": [0, 1, 1], "id": str(does), "metadata": {"does": does}}
    return Sample(**fields | changes)


def score(samples: list[Sample], reward: Any, backend: str = "asyncio", **options: Any) -> RewardReport:
    return anyio.run(lambda: score_samples(samples, reward, **options), backend=backend)


def misbehaving(sample: Sample) -> Any:
    """Does what the sample's metadata says."""
    match sample.metadata["does"]:
        case "loop":
            while True:
                pass
        case "hold the interpreter":
            re.match(r"(a+)+$", "a" * 60 + "b")  # minutes in C code that never lets go
        case "start another":
            subprocess.run(["sleep", sample.metadata["seconds"]])
        case "raise":
            raise ValueError("two\nlines")
        case "interrupt":
            raise KeyboardInterrupt
        case "exit":
            sys.exit(0)
        case "_exit":
            os._exit(0)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            return float("nan")
        case "inf":
            return float("inf")
        case "none":
            return None
        case "text":
            return "1.0"
        case "print":
            print('{"value": 1.0}', flush=True)  # what it prints must not pass for an answer
            return 0.25
        case "slow":
            time.sleep(0.3)
    return 0.5


FAULTS = {
    "loop": "timeout",
    "hold the interpreter": "timeout",
    "start another": "timeout",
    "raise": "raised",
    "interrupt": "raised",
    "exit": "exited",
    "_exit": "exited",
    "die": "exited",
    "nan": "not_a_number",
    "inf": "not_a_number",
    "none": "not_a_number",
    "text": "not_a_number",
}


def processes_with(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text in command and state != "Z" and folder.name != str(os.getpid()):
            found.append(command)
    return found


def workers_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[1]) == parent and b"rewards import worker" in command:
            found.append(int(folder.name))
    return found


def test_every_fault_leaves_out_its_own_sample_only() -> None:
    nobody_else_sleeps_so_long = f"{31_000 + os.getpid() % 1000}.25"
    samples = [sample(does) for does in FAULTS]
    samples += [sample("well", id=f"well {i}") for i in range(6)] + [sample("print")]
    for s in samples:
        s.metadata["seconds"] = nobody_else_sleeps_so_long
    report = score(samples, misbehaving, "trio", timeout=3.0, max_concurrent=4)

    for s in samples[: len(FAULTS)]:
        kind = FAULTS[s.metadata["does"]]
        assert s.status is SampleStatus.FAILED and s.reward is None and s.rewards == {}
        assert list(s.loss_mask) == [0, 0, 0] and s.num_loss_tokens == 0
        assert s.metadata["reward_error"].startswith(f"{kind}: misbehaving: "), s.metadata
        assert "\n" not in s.metadata["reward_error"]
    for s in samples[len(FAULTS) :]:
        assert s.reward == (0.25 if s.id == "print" else 0.5) and s.rewards == {"misbehaving": s.reward}
        assert s.status is SampleStatus.COMPLETED and list(s.loss_mask) == [0, 1, 1]
    assert (report.scored, report.failed, report.skipped) == (7, 12, 0)
    assert report.faults == {"timeout": 3, "raised": 2, "exited": 3, "not_a_number": 4}
    assert report.metrics()["reward_failed_timeout"] == 3
    assert not workers_of(os.getpid())
    assert not processes_with(nobody_else_sleeps_so_long)


def test_a_hanging_reward_delays_nobody_beyond_its_limit() -> None:
    hanging, well = [sample("loop"), sample("loop")], [sample("well", id=str(i)) for i in range(20)]

    async def beside() -> None:
        runner = RewardRunner(misbehaving, timeout=600, max_concurrent=3)
        async with runner, anyio.create_task_group() as tasks:
            for s in hanging:
                tasks.start_soon(runner.score, [s])
            async with anyio.create_task_group() as others:  # through the third worker, while two hang
                for s in well:
                    others.start_soon(runner.score, [s])
            tasks.cancel_scope.cancel()

    async def limited() -> float:
        async with RewardRunner(misbehaving, timeout=1.0, max_concurrent=2) as runner:
            begun = time.monotonic()
            await runner.score(hanging)
            return time.monotonic() - begun

    anyio.run(beside)
    assert [s.reward for s in hanging + well] == [None, None] + [0.5] * 20
    assert 1.0 <= anyio.run(limited) < 60  # workers have to start first
    assert all(s.metadata["reward_error"].startswith("timeout") for s in hanging)


def test_workers_are_kept_and_the_dead_ones_replaced() -> None:
    async def main() -> tuple[set[int], set[int], set[int], list[int]]:
        async with RewardRunner(misbehaving, timeout=60.0, max_concurrent=2) as runner:
            await runner.score([sample("slow"), sample("slow")])
            first = set(workers_of(os.getpid()))
            await runner.score([sample() for _ in range(8)])
            second = set(workers_of(os.getpid()))
            os.kill(min(second), signal.SIGKILL)  # from outside, between two calls: no sample is to blame
            os.waitid(os.P_PID, min(second), os.WEXITED | os.WNOWAIT)
            samples = [sample("slow") for _ in range(4)]
            report = await runner.score(samples)
            assert report.scored == 4
            third = set(workers_of(os.getpid()))
        return first, second, third, workers_of(os.getpid())

    first, second, third, after = anyio.run(main)
    assert len(first) == 2 and second == first
    assert len(third) == 2 and len(third & second) == 1
    assert after == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancelling_stops_at_once_and_leaves_no_process(backend: str) -> None:
    samples = [sample("loop"), sample("loop"), sample("well")]

    async def main() -> float:
        async with RewardRunner(misbehaving, timeout=60.0, max_concurrent=3) as runner:
            with anyio.move_on_after(1.5) as scope:
                await runner.score(samples)
            assert scope.cancelled_caught
            begun = time.monotonic()
            again = [sample("well")]
            assert (await runner.score(again)).scored == 1  # the runner is as good as new
            return time.monotonic() - begun

    assert anyio.run(main, backend=backend) < 20
    assert workers_of(os.getpid()) == []
    assert [s.reward for s in samples] == [None] * 3  # nothing was half-assigned


def test_workers_die_with_a_killed_parent_even_in_c_code(tmp_path: Path) -> None:
    mark = f"{32_000 + os.getpid() % 1000}.5"
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(f"""
        import anyio, re, subprocess
        from rollouts.training.rewards import score_samples
        from rollouts.training.types import Sample
        def hang(sample):
            subprocess.Popen(["sleep", "{mark}"])
            open(r"{tmp_path}/hangs" + sample.id, "w").close()
            re.match(r"(a+)+$", "a" * 60 + "b")
        anyio.run(lambda: score_samples([Sample(id="1"), Sample(id="2")], hang, timeout=600, max_concurrent=2))
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rollouts.__file__).parents[1])}
    driver = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        wait_for(lambda: all((tmp_path / f"hangs{i}").exists() for i in "12"))
        workers = workers_of(driver.pid)
        assert len(workers) == 2 and len(processes_with(mark)) == 2
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers) and not processes_with(mark), 5.0)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("isolation", ["inline", "thread", "process"])
def test_async_rewards(backend: str, isolation: str) -> None:
    async def reward(sample: Sample) -> float:
        await anyio.sleep(0.01 if sample.metadata["does"] == "well" else 600)
        return 0.75

    samples = [sample(), sample("sleep"), sample()]
    report = score(samples, reward, backend, timeout=1.5, isolation=isolation)
    assert [s.reward for s in samples] == [0.75, None, 0.75]
    assert report.faults == {"timeout": 1}


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_faults_in_this_process(isolation: str) -> None:
    def reward(sample: Sample) -> Any:
        does = sample.metadata["does"]
        if does == "exit":
            sys.exit(1)
        if does == "raise":
            raise TimeoutError("its own, not ours")
        return does

    samples = [sample(does) for does in ("exit", "raise", math.nan, None, 2)]
    report = score(samples, reward, isolation=isolation)
    assert [s.reward for s in samples] == [None] * 4 + [2.0]
    assert report.faults == {"exited": 1, "raised": 1, "not_a_number": 2}


def test_a_function_that_gives_something_to_wait_for_is_waited_for() -> None:
    met: list[str] = []

    async def judge(sample: Sample) -> float:
        met.append(sample.metadata["does"])
        while len(met) < 2:  # side by side, or never
            await anyio.sleep(0.001)
        return 0.5

    samples = [sample("one"), sample("two")]
    report = score(samples, lambda s: judge(s), isolation="inline")
    assert [s.reward for s in samples] == [0.5, 0.5] and report.scored == 2


def test_a_thread_that_hangs_stops_neither_the_run_nor_the_exit(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent("""
        import anyio, threading, time
        from rollouts.training.rewards import score_samples
        from rollouts.training.types import Sample
        ended, threads = threading.Event(), {}
        def reward(sample):
            threads[sample.id] = threading.current_thread()
            if sample.id == "0":
                time.sleep(600)
            if sample.id == "1":
                ended.wait()
            return 1.0
        samples = [Sample(id=str(i)) for i in range(4)]
        report = anyio.run(lambda: score_samples(samples, reward, timeout=2.0, isolation="thread"))
        ended.set()  # the second ends after its event loop
        threads["1"].join()
        print([s.reward for s in samples])
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rollouts.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[None, None, 1.0, 1.0]"
    assert "Traceback" not in done.stderr


def test_an_async_reward_that_cancels_itself_is_a_fault() -> None:
    import asyncio

    async def reward(sample: Sample) -> float:
        if sample.metadata["does"] == "cancel":
            raise asyncio.CancelledError
        return 1.0

    samples = [sample("cancel"), sample()]
    report = score(samples, reward)
    assert [s.reward for s in samples] == [None, 1.0]
    assert samples[0].status is SampleStatus.FAILED and report.failed == 1


def test_unfinished_samples_are_not_scored() -> None:
    samples = [sample(status=status) for status in SampleStatus]
    report = score(samples, lambda s: 1.0, isolation="inline")
    scored = {s.status for s in samples if s.reward is not None}
    assert scored == {SampleStatus.COMPLETED, SampleStatus.TRUNCATED}
    assert (report.scored, report.skipped) == (2, 3)
    assert report + report == RewardReport(4, 0, 6)


def test_several_rewards_with_weights() -> None:
    samples = [sample(response="#### 72", metadata={"answer": "72", "does": "well"})]
    rewards = [
        RewardSpec("gsm8k", weight=1.0),
        {"function": "length", "weight": 0.25, "options": {"max_tokens": 2}},
        RewardSpec(lambda s: {"a": 2.0, "b": 3.0}, weight=0.1, name="mine"),
        RewardSpec(lambda s: {"reward": 7.0, "detail": 1.0}, weight=-1.0, name="total"),
    ]
    score(samples, rewards)
    s = samples[0]
    expected = {"gsm8k": 1.0, "length": 1.0, "mine/a": 2.0, "mine/b": 3.0, "total/reward": 7.0, "total/detail": 1.0}
    assert s.rewards == expected
    assert s.reward == pytest.approx(1.0 + 0.25 + 0.1 * 5.0 - 7.0)


def test_one_failing_reward_of_several_leaves_the_sample_out() -> None:
    samples = [sample("well"), sample("raise")]
    score(samples, [RewardSpec(lambda s: 1.0, name="first"), misbehaving])
    assert samples[0].rewards == {"first": 1.0, "misbehaving": 0.5}
    assert samples[1].rewards == {} and samples[1].status is SampleStatus.FAILED


def test_functions_reach_a_worker_however_they_were_made(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("SCALE = 3\ndef fn(sample, times=1): return SCALE * times\n")
    bonus = 2.0
    for reward, value in (
        (RewardSpec(f"{tmp_path}/mine.py:fn", options={"times": 2}), 6.0),
        (lambda s: bonus + len(s.tokens), 5.0),
        (load_function("builtins:len"), 3.0),
    ):
        samples = [sample(tokens=torch.tensor([5, 6, 7]), loss_mask=np.array([0.0, 1.0, 1.0]))]
        (tmp_path / "mine.py").write_text("SCALE = 3\ndef fn(sample, times=1): return SCALE * times\n")
        score(samples, reward, isolation="process")
        assert samples[0].reward == value


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_what_takes_long_to_load_is_loaded_where_the_reward_runs(tmp_path: Path, isolation: str) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        loaded = []
        def fn(sample, scale=1):
            return 10 * len(loaded) + sum(loaded)
        fn.prepare = lambda scale=1: loaded.append(scale)
        """)
    )
    samples = [sample(), sample()]
    score(samples, RewardSpec(f"{tmp_path}/mine.py:fn", options={"scale": 3}), isolation=isolation, max_concurrent=1)
    assert [s.reward for s in samples] == [13.0, 13.0]


def test_a_reward_file_may_change_during_a_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def fn(sample): return 1.0\n")

    async def main() -> list[float | None]:
        async with RewardRunner(f"{file}:fn") as runner:
            file.write_text("def fn(sample): return 2.0\n")  # before the first worker has started
            samples = [sample()]
            await runner.score(samples)
            return [s.reward for s in samples]

    assert anyio.run(main) == [1.0]


def test_what_cannot_reach_a_worker_is_said() -> None:
    running = (i for i in range(3))
    with pytest.raises(UserError, match='isolation="thread"'):
        score([sample()], lambda s: float(next(running)))
    samples = [sample(), sample(metadata={"does": running})]
    report = score(samples, misbehaving)
    assert samples[0].reward == 0.5 and report.faults == {"unsendable": 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_that_no_worker_can_load_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """In one line, as every other error of the user's: not in a group of exceptions."""
    name = f"reward_for_{backend}"
    file = tmp_path / f"{name}.py"
    file.write_text("def fn(sample): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_function(f"{name}:fn")
    file.write_text("raise ImportError('no such library on this machine')\n")
    with pytest.raises(UserError, match=r"cannot load it .*no such library"):
        score([sample(), sample()], reward, backend)


def test_large_samples() -> None:
    samples = [sample(response="x" * 5_000_000)]
    score(samples, lambda s: len(s.response))
    assert samples[0].reward == 5_000_000


def test_where_auto_runs_a_reward() -> None:
    class Model:
        isolation = "thread"

        def __call__(self, sample: Sample) -> float:
            return 1.0

    assert isolation_of(gsm8k) == "inline"
    assert isolation_of(llm_judge) == "inline"
    assert isolation_of(regex) == isolation_of(symbolic_math) == "process"  # a pattern or an expression may hang
    assert isolation_of(misbehaving) == isolation_of(lambda s: 1.0) == "process"
    assert isolation_of(Model()) == "thread"


@pytest.mark.parametrize(
    ("value", "reward"),
    [(1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), (torch.tensor(0.25), 0.25), ({"a": np.int64(2)}, {"a": 2.0})],
)
def test_what_passes_for_a_reward(value: Any, reward: Any) -> None:
    assert checked(value) == reward


@pytest.mark.parametrize(
    "value", [None, "1", [], {}, {"a": None}, {1: 1.0}, float("-inf"), 1j, torch.ones(1), 10**400, {"a": math.nan}]
)
def test_what_does_not(value: Any) -> None:
    with pytest.raises(NotAReward):
        checked(value)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"max_concurrent": 0}, {"isolation": "docker"}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        RewardRunner(misbehaving, **options)


def test_waiting_for_a_judge_does_not_wait_for_a_core() -> None:
    """Async rewards beside one in a process: many wait at once, though there are few workers."""
    waiting = 0

    async def judge(sample: Sample) -> float:
        nonlocal waiting
        waiting += 1
        while waiting < 40:  # all side by side, or never
            await anyio.sleep(0.001)
        return 1.0

    samples = [sample(id=str(i)) for i in range(40)]
    report = score(samples, [judge, misbehaving])
    assert report.scored == 40 and samples[0].rewards == {"judge": 1.0, "misbehaving": 0.5}
