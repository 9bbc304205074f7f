"""Scoring samples with functions that may fail in every way: at once, on time, and nobody pays for another's fault.

score ──► for each sample, up to max_concurrent at once:
            for each reward: inline | a thread | a worker process ──value──► sample.rewards, sample.reward
                                         └──fault──► the sample is left out (mask 0, FAILED), counted, never scored 0

Where a reward runs (``isolation``):

- "process" stops anything: an endless loop, C code that never lets go of the interpreter, ``os._exit``, running out of
  memory. The function gets a copy of the sample. It must be importable, or a closure over plain values.
- "thread" bounds the wait but cannot stop the function: what hangs goes on in its thread. For what lives in this
  process: a reward model, a client that many calls share.
- "inline" runs async functions in the caller's event loop, where they are stopped at their next await, and cheap
  synchronous ones at once, without a limit.
- "auto" (default): async functions and the shipped rewards that cannot hang run inline, a function with an attribute
  ``isolation`` runs as that says, and everything else, so every user's function, runs in a process.

A function with an attribute ``prepare`` has it called with its options where it runs (in every worker process), before
the first sample and without its time limit: for what takes long to load.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread

from rollouts.errors import UserError
from rollouts.training.rewards.process_pool import ProcessPool, Unsendable, WorkerDied
from rollouts.training.rewards.registry import CHEAP, NamedReward, Reward, RewardLike, load_rewards
from rollouts.training.rewards.worker import NotAReward, call, checked, describe, prepare, unwrapped
from rollouts.training.types import Sample, SampleStatus

log = logging.getLogger(__name__)

ISOLATIONS = ("auto", "inline", "thread", "process")
_AT_ONCE = 64


class RewardFault(StrEnum):
    """Why a sample got no reward."""

    RAISED = "raised"
    TIMEOUT = "timeout"
    EXITED = "exited"
    NOT_A_NUMBER = "not_a_number"
    UNSENDABLE = "unsendable"


@dataclass
class RewardReport:
    """What became of the samples of one ``score``.

    Attributes:
        scored, failed: samples with a reward, and samples left out by a fault.
        skipped: samples without a whole response (pending, aborted, failed before), which were not looked at.
        faults: how often each ``RewardFault`` left a sample out.
    """

    scored: int = 0
    failed: int = 0
    skipped: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: RewardReport) -> RewardReport:
        return RewardReport(
            self.scored + other.scored,
            self.failed + other.failed,
            self.skipped + other.skipped,
            self.faults + other.faults,
        )

    def metrics(self) -> dict[str, float]:
        """``reward_failed`` and, where there are some, ``reward_failed_<fault>``."""
        return {"reward_failed": self.failed, **{f"reward_failed_{k}": n for k, n in sorted(self.faults.items())}}


class _Fault(Exception):
    def __init__(self, kind: RewardFault, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class RewardRunner:
    """Scores samples with one reward or several, keeping its worker processes between calls.

    ``async with RewardRunner("gsm8k") as runner: report = await runner.score(samples)``. Several tasks may call
    ``score`` at the same time; ``max_concurrent`` holds for all of them together. Leaving the block kills the workers.

    Args:
        reward: a function ``(sample) -> float | dict[str, float]``, sync or async; a name of ``REWARDS``, a path to a
            function, a ``RewardSpec`` or a mapping of its fields; or a sequence of these.
        timeout: seconds for one reward of one sample, from the moment it starts.
        max_concurrent: samples scored at the same time; by default 64, of which one a core in worker processes.
        isolation: "auto", "inline", "thread" or "process"; see the module.

    Raises:
        UserError: no such reward, a wrong option, or a function that cannot be sent to a worker process.
    """

    def __init__(
        self,
        reward: RewardLike | Sequence[RewardLike],
        *,
        timeout: float = 30.0,
        max_concurrent: int | None = None,
        isolation: str = "auto",
    ) -> None:
        if isolation not in ISOLATIONS:
            raise UserError(f"reward isolation must be one of {', '.join(ISOLATIONS)}, got {isolation!r}")
        if not timeout > 0:
            raise UserError(f"reward timeout must be more than 0 seconds, got {timeout!r}")
        if max_concurrent is not None and max_concurrent < 1:
            raise UserError(f"reward max_concurrent must be at least 1, got {max_concurrent!r}")
        self.rewards = load_rewards(reward)
        self.timeout = timeout
        self._isolations = [isolation_of(r.function) if isolation == "auto" else isolation for r in self.rewards]
        in_processes = [r.function for r, where in zip(self.rewards, self._isolations) if where == "process"]
        self._pool = ProcessPool(in_processes) if in_processes else None
        self._immediate = all(
            where == "inline" and not _is_async(r.function) for r, where in zip(self.rewards, self._isolations)
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._limits = (max_concurrent or _AT_ONCE, max_concurrent or cores)
        self._faults: Counter[str] = Counter()
        self._slots: anyio.CapacityLimiter | None = None
        self._process_slots: anyio.CapacityLimiter | None = None

    async def __aenter__(self) -> RewardRunner:
        for reward, where in zip(self.rewards, self._isolations):
            if where != "process" and hasattr(unwrapped(reward.function), "prepare"):
                await anyio.to_thread.run_sync(prepare, reward.function)
        self._slots, self._process_slots = (anyio.CapacityLimiter(n) for n in self._limits)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the worker processes."""
        if self._pool is not None:
            self._pool.close()

    async def score(self, samples: Sequence[Sample]) -> RewardReport:
        """Give every finished sample its ``reward`` and ``rewards``, in place.

        ``rewards`` holds each reward by name (of a single reward that gives a dict: the dict), ``reward`` their
        weighted sum; a dict counts with its entry "reward", or the sum of its entries. A sample one of whose rewards
        fails is left out: ``loss_mask`` 0, status FAILED, no reward, and ``metadata["reward_error"]`` says why.

        Returns:
            How many were scored, left out and skipped.

        Raises:
            UserError: a worker process cannot load the functions.
        """
        if self._slots is None:
            raise RuntimeError("use `async with RewardRunner(...) as runner`, then runner.score(samples)")
        report = RewardReport()
        unfinished = _Fault(RewardFault.RAISED, "the reward ended without a result")
        outcomes: dict[int, list[Reward] | _Fault] = {}
        unusable: list[UserError] = []

        async def score_one(i: int) -> None:
            async with self._slots:  # type: ignore[union-attr]
                try:
                    outcomes[i] = [await self._reward(number, samples[i]) for number in range(len(self.rewards))]
                except _Fault as fault:
                    outcomes[i] = fault
                except UserError as error:  # no sample's fault; raised below, for the group would wrap it
                    unusable.append(error)
                    tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for i, sample in enumerate(samples):
                if sample.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED):
                    judged = self._score_now(sample) if self._immediate else None
                    outcomes[i] = judged or unfinished
                    if judged is None:
                        tasks.start_soon(score_one, i)
        if unusable:
            raise unusable[0]
        for i, outcome in outcomes.items():
            if isinstance(outcome, _Fault):
                self._leave_out(samples[i], outcome)
                report.faults[outcome.kind.value] += 1
            else:
                _assign(samples[i], self.rewards, outcome)
        report.failed = sum(report.faults.values())
        report.scored = len(outcomes) - report.failed
        report.skipped = len(samples) - len(outcomes)
        return report

    def _score_now(self, sample: Sample) -> list[Reward] | _Fault | None:
        """Where every reward is a cheap function that waits for nothing, a sample needs no task of its own."""
        values: list[Reward] = []
        for number, reward in enumerate(self.rewards):
            try:
                value = reward.function(sample)
                if isinstance(value, Awaitable):  # asynchronous, though it did not look so
                    getattr(value, "close", bool)()
                    self._immediate = False
                    return None
                values.append(checked(value))
            except NotAReward as e:
                return self._fault(number, RewardFault.NOT_A_NUMBER, f"gave {e}")
            except KeyboardInterrupt:
                raise
            except BaseException as e:
                return self._fault(number, _kind(e), describe(e))
        return values

    async def _reward(self, number: int, sample: Sample) -> Reward:
        """What reward ``number`` says of a sample. Raises _Fault."""
        where = self._isolations[number]
        try:
            if where == "process":
                return await self._in_process(number, sample)
            value = await (self._in_thread if where == "thread" else self._inline)(number, sample)
            return checked(value)
        except NotAReward as e:
            raise self._fault(number, RewardFault.NOT_A_NUMBER, f"gave {e}") from None
        except TimeoutError:
            raise self._fault(number, RewardFault.TIMEOUT, f"took more than {self.timeout:g} s") from None

    def _leave_out(self, sample: Sample, fault: _Fault) -> None:
        sample.status = SampleStatus.FAILED
        sample.loss_mask = [0] * len(sample.tokens)
        sample.reward, sample.rewards = None, {}
        sample.metadata["reward_error"] = f"{fault.kind}: {fault}"
        self._faults[fault.kind.value] += 1
        count = self._faults[fault.kind.value]
        if count & (count - 1) == 0:  # the first, second, fourth, eighth, ... of a kind
            so_far = f" ({count} times so far)" if count > 1 else ""
            log.warning("sample %s has no reward and is left out: %s%s", sample.id, fault, so_far)

    def _fault(self, number: int, kind: RewardFault, text: str) -> _Fault:
        return _Fault(kind, f"{self.rewards[number].name}: {text}")

    async def _in_process(self, number: int, sample: Sample) -> Reward:
        assert self._pool is not None and self._process_slots is not None
        place = self._isolations[:number].count("process")  # its number among those of the pool
        try:
            async with self._process_slots:
                answer = await self._pool.ask(place, sample, self.timeout)
        except WorkerDied as e:
            raise self._fault(number, RewardFault.EXITED, str(e)) from None
        except Unsendable as e:
            raise self._fault(
                number, RewardFault.UNSENDABLE, f"the sample cannot be copied to a worker process ({e})"
            ) from None
        if "value" in answer:
            return answer["value"]
        for key, kind in (("raised", RewardFault.RAISED), ("exited", RewardFault.EXITED)):
            if key in answer:
                raise self._fault(number, kind, answer[key])
        raise NotAReward(answer.get("invalid"))

    async def _inline(self, number: int, sample: Sample) -> Any:
        with anyio.fail_after(self.timeout) as scope:
            try:
                value = self.rewards[number].function(sample)
                return await value if isinstance(value, Awaitable) else value
            except (KeyboardInterrupt, anyio.get_cancelled_exc_class()):
                raise
            except BaseException as e:
                if isinstance(e, TimeoutError) and scope.cancel_called:
                    raise
                raise self._fault(number, _kind(e), describe(e)) from None

    async def _in_thread(self, number: int, sample: Sample) -> Any:
        """Run the function in a thread that nothing waits for: one that hangs stops neither the loop nor the exit."""
        finished = anyio.Event()
        token = anyio.lowlevel.current_token()
        outcome: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                outcome.append((call(self.rewards[number].function, sample), None))
            except BaseException as e:
                outcome.append((None, e))
            with contextlib.suppress(RuntimeError):  # the loop has ended since: nobody waits
                anyio.from_thread.run_sync(finished.set, token=token)

        threading.Thread(target=run, daemon=True, name=f"reward {self.rewards[number].name}").start()
        with anyio.fail_after(self.timeout):
            await finished.wait()
        value, error = outcome[0]
        if error is not None:
            raise self._fault(number, _kind(error), describe(error)) from None
        return value


async def score_samples(
    samples: Sequence[Sample],
    reward_fn: RewardLike | Sequence[RewardLike],
    *,
    timeout: float = 30.0,
    max_concurrent: int | None = None,
    isolation: str = "auto",
) -> RewardReport:
    """``RewardRunner(reward_fn, ...).score(samples)`` for one call; a loop keeps a ``RewardRunner`` and its workers."""
    async with RewardRunner(reward_fn, timeout=timeout, max_concurrent=max_concurrent, isolation=isolation) as runner:
        return await runner.score(samples)


def isolation_of(function: Callable[..., Any]) -> str:
    """Where "auto" runs a reward function."""
    inner = unwrapped(function)
    if (wanted := getattr(inner, "isolation", None)) in ISOLATIONS[1:]:
        return wanted
    try:
        return "inline" if _is_async(function) or inner in CHEAP else "process"
    except TypeError:  # a callable that cannot be hashed is none of ours
        return "process"


def _is_async(function: Callable[..., Any]) -> bool:
    inner = unwrapped(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def _kind(error: BaseException) -> RewardFault:
    return RewardFault.EXITED if isinstance(error, SystemExit) else RewardFault.RAISED


def _assign(sample: Sample, rewards: Sequence[NamedReward], values: Sequence[Reward]) -> None:
    sample.rewards = {}
    total = 0.0
    for reward, value in zip(rewards, values):
        if isinstance(value, dict):
            prefix = f"{reward.name}/" if len(rewards) > 1 else ""
            sample.rewards |= {prefix + name: part for name, part in value.items()}
            value = value["reward"] if "reward" in value else sum(value.values())
        else:
            sample.rewards[reward.name] = value
        total += reward.weight * value
    sample.reward = total
