"""Generation of training batches: who waits for whom.

    generate_batch (the training loop)          one task for each group in flight
    ----------------------------------          ------------------------------------------------------------
    admit: begin waiting groups, oldest   --->  generate_fn(samples of the group)   <--->  engine
      first, or deal new ones, up to              fails, times out: forget the samples, back off, try again
      the number allowed                          refused for good: drop the group, counted
    wait for the event `changed`                reward_fn on each of its samples (RewardRunner)
      ...                                 <---  filter_fn: ready or rejected; set `changed`
    not enough groups ready: admit again
    enough: take them, close their books
    abort what is left, unless `overlap`  --->  generate_fn.abort() or cancellation; each task puts back what it has
    return the batch                            and sets `changed`

Everything runs in one event loop, so state changes only between two awaits and there is no lock. A group task never
raises: an error that ends the run is kept and raised by ``generate_batch``, the only one who waits. Leaving the
``async with`` block ends all tasks.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import anyio
from anyio.abc import TaskGroup

from rollouts.errors import RunError, UserError
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.filters import judge
from rollouts.training.rewards.runner import RewardReport, RewardRunner
from rollouts.training.rollout_gen.concurrency import backoff, call, is_permanent
from rollouts.training.rollout_gen.config import RolloutConfig
from rollouts.training.rollout_gen.ledger import FINISHED, Group, GroupState, Ledger, copy_sample
from rollouts.training.rollout_gen.transforms import convert_to_batch, transform
from rollouts.training.types import RolloutBatch, Sample, SampleStatus

logger = logging.getLogger(__name__)

MOST_UNJUDGED = 64  # samples in a row; a reward that fails on every other one never fails on so many


class RolloutError(UserError):
    """Rollouts cannot go on: the engine is gone, every prompt is refused, or a filter keeps nothing."""


class RolloutAborted(Exception):
    """``request_abort`` was called. Nothing is lost: the next ``generate_batch`` goes on with what there is."""


class AsyncRolloutManager:
    """Makes batches of whole, scored, filtered groups out of the prompts that a buffer deals, each prompt once.

    ``async with AsyncRolloutManager(data_buffer, config) as manager: batch = await manager.generate_batch()``, under
    asyncio or trio. Without the block each call does what the block does at its beginning and end, which a reward with
    worker processes pays for. Groups, their order and what is kept are ``RolloutConfig``'s.

    Args:
        data_buffer: deals prompts: ``Sample``s, texts, lists of messages or mappings of a sample's fields.
        config: also accepted as ``rollout_config``; ``over_sampling_factor`` and ``filter_fn`` take the place of its.
        kwargs: passed on to ``config.generate_fn``.

    Attributes:
        weight_version: of the trainer's weights. A loop sets it after each update of the engine; until then it is the
            newest version that a sample was sampled with.
        ledger: where every dealt prompt stands.

    Raises:
        UserError: there is no ``generate_fn``, or a setting is out of range.
    """

    def __init__(
        self,
        data_buffer: DataBuffer[Any],
        config: RolloutConfig | None = None,
        *,
        rollout_config: RolloutConfig | None = None,
        over_sampling_factor: float | None = None,
        filter_fn: Any = None,
        **kwargs: Any,
    ) -> None:
        config = config or rollout_config
        if config is None:
            raise UserError("a rollout manager needs a RolloutConfig; give config")
        if over_sampling_factor is not None:
            config = replace(config, over_sampling_factor=over_sampling_factor)
        if filter_fn is not None:
            config = replace(config, filter_fn=filter_fn)
        if config.generate_fn is None:
            raise UserError("rollout setting generate_fn is missing; EngineGenerate(engine, tokenizer) is one")
        self.data_buffer = data_buffer
        self.config = config
        self.ledger = Ledger(config.n_samples_per_prompt)
        self.weight_version = 0
        passed_on = {"endpoint": config.endpoint, "environment": config.environment}
        self._kwargs = {**{name: value for name, value in passed_on.items() if value is not None}, **kwargs}
        self._abort_requested = False
        self._resources: AsyncExitStack | None = None
        self._tasks: TaskGroup
        self._rewards: RewardRunner | None = None
        self._changed: anyio.Event
        self._scopes: dict[Group, anyio.CancelScope] = {}
        self._generating: set[Group] = set()
        self._filling = False
        self._stopping = False
        self._error: Exception | None = None
        self._failed_in_a_row = 0
        self._unjudged_in_a_row = 0
        self._reward_report = RewardReport()
        self._before = (Counter(self.ledger.dropped), Counter(self.ledger.requeued))

    # -- the training loop's side -------------------------------------------------------------------------------------

    async def __aenter__(self) -> AsyncRolloutManager:
        if self._resources is not None:
            raise RuntimeError("this rollout manager is entered already")
        async with AsyncExitStack() as stack:
            if self.config.reward_fn is not None:
                self._rewards = await stack.enter_async_context(
                    RewardRunner(
                        self.config.reward_fn,
                        timeout=self.config.reward_timeout_s,
                        isolation=self.config.reward_isolation,
                    )
                )
            self._changed = anyio.Event()
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            self._resources = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._resources is not None
        try:
            await self._abort_in_flight()
        finally:
            resources, self._resources = self._resources, None
            # No task is left, so the group need not know of an error in the block, which it would wrap in a group.
            await resources.aclose()

    async def generate_batch(self) -> RolloutBatch:
        """The next batch: ``config.batch_size`` whole groups, in the order they were dealt.

        ``metadata`` tells how it came about: ``dropped`` and ``requeued`` groups by reason and reward ``faults`` since
        the batch before, ``staleness`` of each group in versions, how many groups were ``carried`` over from an earlier
        batch, ``seconds`` waited.

        Raises:
            RolloutError: generation cannot go on. The manager's state stays whole, and a later call tries again.
            RunError: ``generate_fn`` raised it, which no retry mends: no engine is left.
            RolloutAborted: ``request_abort`` was called.
        """
        if self._resources is None:
            async with self:
                return await self.generate_batch()
        if self._filling:
            raise RuntimeError("generate_batch is running already; one batch is filled at a time")
        self._filling = True
        self._error = None  # of a group that failed after the last call; it is tried again
        started = time.monotonic()
        groups: list[Group] | None = None
        try:
            await self._ask_version()
            while not (groups := self._full_batch()):
                self._raise_if_told()
                changed = self._changed  # what admission itself brings to light counts as well
                self._admit()
                await changed.wait()
        finally:
            self._filling = False
            if not (self.config.overlap and groups):
                await self._abort_in_flight()
        batch = self._consume(groups, time.monotonic() - started)
        if self.config.overlap:
            self._admit()
        return batch

    async def generate_batches(self, count: int = 1) -> list[RolloutBatch]:
        """``count`` batches, one after the other."""
        return [await self.generate_batch() for _ in range(count)]

    def request_abort(self) -> None:
        """Stop generating: the ``generate_batch`` that runs, or the next one, raises ``RolloutAborted``."""
        self._abort_requested = True
        if self._resources is not None:
            self._notify()

    @property
    def partial_samples(self) -> list[Sample]:
        """Samples of waiting groups that were aborted with a part of their response."""
        samples = [sample for group in self.ledger.groups(GroupState.WAITING) for sample in group.samples]
        return [s for s in samples if s.status is SampleStatus.ABORTED and any(s.loss_mask)]

    def state_dict(self) -> dict[str, Any]:
        """Where every prompt stands, as JSON-ready values, the data buffer's position included.

        Taken between two batches, it makes a run that resumes from it consume every prompt once.
        """
        return {
            "ledger": self.ledger.state_dict(),
            "data_buffer": self.data_buffer.state_dict(),
            "weight_version": self.weight_version,
            "seed": self.config.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, data buffer included.

        Raises:
            UserError: the state is not one, or was taken with other data, seed or group size.
            RuntimeError: groups are in flight.
        """
        if self._scopes:
            raise RuntimeError("cannot load a state while groups are in flight")
        missing = [key for key in ("ledger", "data_buffer", "weight_version", "seed") if key not in state]
        if missing:
            raise UserError(f"rollout state: {missing[0]} is missing; was it saved by a rollout manager?")
        if state["seed"] != self.config.seed:
            raise UserError(
                f"rollout state: seed was {state['seed']} when it was saved and is {self.config.seed} now; "
                "resume with the same seed, or start a new run"
            )
        self.data_buffer.load_state_dict(state["data_buffer"])
        self.ledger.load_state_dict(state["ledger"])
        self.weight_version = state["weight_version"]
        self._before = (Counter(self.ledger.dropped), Counter(self.ledger.requeued))

    # -- admission and consumption ------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin groups, the oldest first, until as many are begun (in flight or ready) as may be."""
        if self._stopping or self._error is not None:
            return
        begun = len(self.ledger.groups(GroupState.IN_FLIGHT, GroupState.READY))
        needed = self._in_order()[: self.config.batch_size] if self._filling else []
        for group in self.ledger.groups(GroupState.WAITING):
            if begun < self._most_begun() or group in needed:
                self._begin(group)
                begun += 1
        try:
            while begun < self._most_begun():
                self._begin(self._deal())
                begun += 1
        except Exception as error:  # no prompt, or what is none
            self._error = error
            self._notify()

    def _begin(self, group: Group) -> None:
        if self._staleness(group) > self.config.max_staleness:
            self.ledger.restart(group, "stale")
        self.ledger.start(group, self.weight_version)
        self._scopes[group] = anyio.CancelScope()
        self._tasks.start_soon(self._run_group, group, self._scopes[group])

    async def _ask_version(self) -> None:
        """Learn of weight updates that nobody told of, before groups are judged by their age."""
        ask = getattr(self.config.generate_fn, "get_weight_version", None)
        for failures in range(self.config.max_retries + 1):
            if ask is None:
                return
            try:
                self.weight_version = max(self.weight_version, await call(ask))
                return
            except Exception as error:
                logger.warning("the engine does not tell its weight version: %r", error)
                await anyio.sleep(backoff(failures, self.config.retry_seconds))

    def _most_begun(self) -> int:
        """How many groups may be in flight or ready.

        With ``overlap`` this is where staleness is kept within bounds: of the groups begun, the one in place p is
        consumed p // batch_size batches from now at the latest, and so as many versions later at most.
        """
        config = self.config
        if config.overlap:
            return config.batch_size * (config.max_staleness + self._filling)
        return int(config.batch_size * config.over_sampling_factor) if self._filling else 0

    def _deal(self) -> Group:
        [prompt] = self.data_buffer.get_prompts(1)
        return self.ledger.deal(prompt, self.data_buffer.epoch_id)

    def _staleness(self, group: Group) -> int:
        return 0 if group.untouched else self.weight_version - group.oldest_version

    def _full_batch(self) -> list[Group] | None:
        """The groups of the next batch in the order they were dealt, or None while it is not certain which they are."""
        for group in self.ledger.groups(GroupState.READY, GroupState.REJECTED):
            if self._staleness(group) > self.config.max_staleness:
                if group.weight_version == self.weight_version:  # begun when the engine should have had the newest
                    raise RolloutError(
                        f"the engine samples with weights of version {group.oldest_version} while the trainer's are "
                        f"version {self.weight_version} and max_staleness is {self.config.max_staleness}; update the "
                        "engine's weights more often, or raise max_staleness"
                    )
                self.ledger.wait(group)
                self.ledger.restart(group, "stale")
        self._drop_rejected()
        chosen = self._in_order()[: self.config.batch_size]
        if len(chosen) < self.config.batch_size or any(group.state is not GroupState.READY for group in chosen):
            return None
        return sorted(chosen, key=lambda group: group.number)

    def _drop_rejected(self) -> None:
        """Drop the rejected groups that stand before the end of the batch, whatever comes of those in flight."""
        ahead = 0
        for group in list(self.ledger.open.values()):
            if group.state is GroupState.REJECTED:
                self._drop(group)
            elif (ahead := ahead + 1) == self.config.batch_size and self.config.order == "dealt":
                return

    def _drop(self, group: Group) -> None:
        self.ledger.drop(group, group.rejected)
        dropped = self.ledger.dropped - self._before[0]
        total = dropped.total()
        if 0 < self.config.max_dropped_groups <= total:
            raise RolloutError(
                f"{total} rollout groups were dropped for one batch ({dict(dropped)}); "
                "loosen filter_fn or raise max_dropped_groups"
            )
        if total >= 32 and total & (total - 1) == 0:  # at 32, 64, 128, ...
            logger.warning(
                "%d rollout groups were dropped for this batch so far (%s), and others take their place; "
                "max_dropped_groups would end that",
                total,
                dict(dropped),
            )

    def _in_order(self) -> list[Group]:
        """Open groups in the order in which they are consumed, as far as it is known."""
        groups = self.ledger.groups(GroupState.WAITING, GroupState.IN_FLIGHT, GroupState.READY)
        if self.config.order == "dealt":
            return groups
        batch = self.ledger.num_batches
        carried = [group for group in groups if group.batch not in (None, batch)]
        fresh = [group for group in groups if group.batch in (None, batch)]
        return carried + sorted(fresh, key=lambda group: group.finished or math.inf)

    def _consume(self, groups: list[Group], seconds: float) -> RolloutBatch:
        ledger = self.ledger
        staleness = [self._staleness(group) for group in groups]
        carried = sum(group.batch != ledger.num_batches for group in groups)
        step = ledger.consume(groups)
        dropped, requeued = ledger.dropped - self._before[0], ledger.requeued - self._before[1]
        self._before = (Counter(ledger.dropped), Counter(ledger.requeued))
        report, self._reward_report = self._reward_report, RewardReport()
        return convert_to_batch(
            [sample for group in groups for sample in group.samples],
            epoch_id=max(group.epoch_id for group in groups),
            step_id=step,
            dropped=dict(dropped),
            requeued=dict(requeued),
            faults=dict(report.faults),
            staleness=staleness,
            carried=carried,
            seconds=seconds,
        )

    def _raise_if_told(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._abort_requested:
            self._abort_requested = False
            raise RolloutAborted("the rollout manager was asked to abort")

    async def _abort_in_flight(self) -> None:
        """End all group tasks; what their samples have is kept if it may be used later (``max_staleness`` > 0)."""
        if not self._scopes:
            return
        self._stopping = True
        abort = getattr(self.config.generate_fn, "abort", None)
        with anyio.CancelScope(shield=True):
            if abort is not None and self.config.max_staleness > 0:
                with anyio.move_on_after(self.config.abort_timeout_s):
                    try:
                        await call(abort)
                        while self._generating:
                            await self._changed.wait()
                    except Exception as error:
                        logger.warning("samples in flight could not be aborted and are cancelled: %s", error)
            for scope in self._scopes.values():
                scope.cancel()
            while self._scopes:
                await self._changed.wait()
        self._stopping = False

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    # -- a group's task -----------------------------------------------------------------------------------------------

    async def _run_group(self, group: Group, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                if await self._generate(group):
                    await self._score(group)
                    self._decide(group)
        except Exception as error:
            self._error = self._error or error
        finally:
            if group.state is GroupState.IN_FLIGHT and group.number in self.ledger.open:
                self.ledger.wait(group)
            del self._scopes[group]
            self._admit()
            self._notify()

    async def _generate(self, group: Group) -> bool:
        """Finish the group's samples, in as many calls as it takes. False when it is dropped or has to wait."""
        failures = 0
        self._generating.add(group)
        try:
            while unfinished := [i for i, s in enumerate(group.samples) if s.status not in FINISHED]:
                if self._stopping:
                    return False
                num_tokens = sum(len(s.tokens) for s in group.samples)
                try:
                    await self._ask(group, unfinished)
                    finished = all(s.status in FINISHED for s in group.samples)
                    if not finished and not self._stopping and sum(len(s.tokens) for s in group.samples) == num_tokens:
                        raise RuntimeError("its samples were aborted without a new token")
                except (BadGeneration, RunError):  # the latter: no engine is left, say
                    raise
                except Exception as error:
                    if is_permanent(error):
                        self._refuse(group, error)
                        return False
                    failures += 1
                    await self._back_off(group, failures, error)
        finally:
            self._generating.discard(group)
            self._notify()
        self._failed_in_a_row = 0
        return not self._stopping

    async def _back_off(self, group: Group, failures: int, error: Exception) -> None:
        """Forget the group's samples, wait, and use other seeds from here on. Raises RolloutError after too many."""
        self.ledger.restart(group, type(error).__name__, failed=True)
        logger.warning("rollout group %s (prompt %s) failed: %r", group.id, group.prompt.id, error)
        if failures > self.config.max_retries:
            raise RolloutError(
                f"rollout group {group.id} (prompt {group.prompt.id}) failed {failures} times, at last by {error!r}; "
                "see that the engine is up, then go on: no prompt is lost"
            ) from error
        await anyio.sleep(backoff(failures - 1, self.config.retry_seconds))

    async def _ask(self, group: Group, unfinished: list[int]) -> None:
        """One call of ``generate_fn`` with copies of the unfinished samples; the group gets what came of them."""
        seeds = self.ledger.seeds(self.config.seed, group)
        asked = [copy_sample(group.samples[i]) for i in unfinished]
        for i, sample in zip(unfinished, asked, strict=True):
            sample.metadata["seed"] = seeds[i]
        assert self.config.generate_fn is not None
        done = asked
        try:
            with anyio.fail_after(self.config.generate_timeout_s):
                done = await call(self.config.generate_fn, asked, **self._kwargs)
            _check_generated(done, [group.samples[i].id for i in unfinished], group.id)
        except anyio.get_cancelled_exc_class():
            self._keep(group, unfinished, asked)
            raise
        self._keep(group, unfinished, done)

    def _keep(self, group: Group, places: list[int], samples: list[Sample]) -> None:
        """Put samples back into their group; unfinished ones only if they may be used with later weights."""
        for place, sample in zip(places, samples, strict=True):
            if sample.status is SampleStatus.FAILED:
                sample.loss_mask = [0] * len(sample.tokens)
            if sample.status in FINISHED or (self.config.max_staleness > 0 and _is_whole(sample)):
                group.samples[place] = sample
                newest = max((span.version for span in sample.weight_versions), default=0)
                self.weight_version = max(self.weight_version, newest)

    def _refuse(self, group: Group, error: Exception) -> None:
        logger.warning("rollout group %s (%s) is dropped: %s", group.id, group.prompt.id, error)
        self.ledger.drop(group, "refused")
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.config.max_failed_groups:
            raise RolloutError(
                f"{self._failed_in_a_row} rollout groups in a row were refused, the last (prompt {group.prompt.id}) "
                f"with: {error}"
            ) from error

    async def _score(self, group: Group) -> None:
        samples = transform([copy_sample(s) for s in group.samples], self.config)
        if self._rewards is not None:
            report = await self._rewards.score(samples)
            self._reward_report += report
        group.samples = samples  # not before: a group put back while it is scored is transformed and scored again

    def _reject_unjudged(self, group: Group) -> None:
        """Raises RolloutError when it is no accident any more that no sample gets a reward."""
        self.ledger.reject(group, "no_reward")
        self._unjudged_in_a_row += len(group.samples)
        if self._unjudged_in_a_row >= MOST_UNJUDGED:
            why = group.samples[-1].metadata.get("reward_error", "it has no whole response")
            raise RolloutError(
                f"{self._unjudged_in_a_row} samples in a row got no reward, the last (of prompt {group.prompt.id}) "
                f"because: {why}; mend the reward and start the run again to resume it"
            )

    def _decide(self, group: Group) -> None:
        if any(s.reward is not None for s in group.samples):
            self._unjudged_in_a_row = 0
        if self._rewards is not None and all(s.reward is None for s in group.samples):
            self._reject_unjudged(group)
        elif self.config.filter_fn is not None and not (verdict := judge(self.config.filter_fn, group.samples)):
            self.ledger.reject(group, verdict.reason)
        else:
            self.ledger.ready(group)


class BadGeneration(UserError):
    """``generate_fn`` gave back what it may not: a mistake in it, which no retry mends."""


def _check_generated(done: Any, ids: list[str], group_id: str) -> None:
    if not isinstance(done, list) or not all(isinstance(s, Sample) for s in done):
        raise BadGeneration(f"generate_fn must give back a list of Samples, not {type(done).__name__}")
    if [s.id for s in done] != ids:
        raise BadGeneration(
            f"generate_fn must give back the samples it was given, in their order: it got {ids[:4]} "
            f"and gave {[s.id for s in done][:4]}"
        )
    for sample in done:
        if sample.status is SampleStatus.PENDING:
            sample.status = SampleStatus.COMPLETED
        if sample.group_id != group_id or not _is_whole(sample):
            raise BadGeneration(
                f"generate_fn gave sample {sample.id} another group_id, or a loss_mask or rollout_log_probs that is "
                "not as long as its tokens"
            )


def _is_whole(sample: Sample) -> bool:
    """Its per-token fields agree: a sample that was being changed when its call was cancelled may be torn."""
    per_token = (sample.loss_mask, sample.rollout_log_probs, sample.advantages)
    return all(values is None or len(values) == len(sample.tokens) for values in per_token)
