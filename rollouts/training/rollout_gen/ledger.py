"""The book of dealt prompts: each is consumed once or dropped for a reason, and never lost, whatever is killed when.

    dealt ──► waiting ──► in flight ──► ready ──► consumed(step)
                 ▲            │ ├──────────┼────► rejected(reason) ──► dropped(reason)
                 │            │ └──────────┼───────────┼─────────────► dropped(refused)
                 └─ requeued ─┘            │           │
                 └─ stale ─────────────────┴───────────┘

A rejected group is dropped once it is certain to stand before the end of the next batch. One behind that end stays
open, as a ready one does, for the next weights to answer: else whether it was judged in time would decide what is
learned.

A checkpoint holds how many prompts were dealt, the frontier (all dealt before it are closed: consumed or dropped) and
every open group from there on. A group that was in flight is waiting again when it is loaded, under the same attempt
and so with the same sampling seeds. What is consumed after a checkpoint was taken is consumed again by the run that
resumes from it: the steps between never happened.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rollouts.errors import UserError
from rollouts.training.rollout_gen.seeds import sampling_seed
from rollouts.training.types import Sample, SampleStatus

FINISHED = (SampleStatus.COMPLETED, SampleStatus.TRUNCATED, SampleStatus.FAILED)


class GroupState(StrEnum):
    WAITING = "waiting"
    IN_FLIGHT = "in_flight"
    READY = "ready"
    REJECTED = "rejected"


@dataclass(eq=False)
class Group:
    """One dealt prompt and its samples.

    Args:
        number: its place among all prompts dealt, from 0.
        prompt: what was dealt, as a pending sample.
        epoch_id: the pass over the data in which it was dealt.
        samples: all of its samples, as far as they got.
        attempt: counts failures; part of the sampling seeds.
        weight_version: of the weights when its first token was asked for.
        batch: the number of the batch that was being filled when it was first begun; None before.
        finished: its place in the order in which groups became ready.
        rejected: why it is rejected; empty otherwise.
    """

    number: int
    prompt: Sample
    epoch_id: int
    samples: list[Sample]
    state: GroupState = GroupState.WAITING
    attempt: int = 0
    weight_version: int = 0
    batch: int | None = None
    finished: int = 0
    rejected: str = ""

    @property
    def id(self) -> str:
        return self.samples[0].group_id

    @property
    def untouched(self) -> bool:
        """Nothing has been sampled yet."""
        return all(s.status is SampleStatus.PENDING and not s.weight_versions for s in self.samples)

    @property
    def oldest_version(self) -> int:
        """The weights that sampled its oldest token, or those that served when it began if its samples do not say."""
        return min((span.version for s in self.samples for span in s.weight_versions), default=self.weight_version)


def pending_samples(prompt: Sample, number: int, count: int) -> list[Sample]:
    """The ``count`` samples of a group before anything is sampled; nothing mutable is shared with ``prompt``."""
    samples = [copy_sample(prompt) for _ in range(count)]
    for index, sample in enumerate(samples):
        sample.id, sample.group_id, sample.status = f"{number}/{index}", f"{number}", SampleStatus.PENDING
        sample.metadata["prompt_id"] = prompt.id
    return samples


def as_prompt(dealt: Any) -> Sample:
    """What a data buffer dealt (a ``Sample``, a text, messages, or a mapping of a sample's fields) as a pending sample.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(dealt, Sample):
        sample = copy_sample(dealt)
    elif isinstance(dealt, Mapping):
        sample = Sample.from_dict(dealt)
    elif isinstance(dealt, str) or (isinstance(dealt, list) and all(isinstance(m, Mapping) for m in dealt)):
        sample = Sample(prompt=dealt)
    else:
        raise UserError(f"a prompt is a text, a list of messages, a mapping or a Sample, not {type(dealt).__name__}")
    sample.status = SampleStatus.PENDING
    if not sample.id:
        content = repr((sample.prompt, list(sample.tokens)))
        sample.id = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return sample


def copy_sample(sample: Sample) -> Sample:
    """A sample that may be changed without the other noticing; token lists are shared, for nobody changes them."""
    twin = object.__new__(type(sample))  # `replace` takes six times as long, and a group is copied several times
    twin.__dict__.update(sample.__dict__)
    twin.rewards, twin.metadata = dict(sample.rewards), dict(sample.metadata)
    twin.weight_versions = list(sample.weight_versions)
    return twin


@dataclass
class Ledger:
    """Keeps the book. A transition that the drawing does not have is an AssertionError.

    Attributes:
        open: groups that are neither consumed nor dropped, by number, in the order they were dealt.
        num_dealt: prompts dealt so far.
        frontier: the number of the oldest open group, or of the next to be dealt.
        num_batches: batches consumed so far.
        dropped, requeued: counts by reason, since the start of the run.
    """

    n_samples: int
    open: dict[int, Group] = field(default_factory=dict)
    num_dealt: int = 0
    num_consumed: int = 0
    num_batches: int = 0
    num_ready: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    requeued: Counter[str] = field(default_factory=Counter)

    @property
    def frontier(self) -> int:
        return min(self.open, default=self.num_dealt)

    def groups(self, *states: GroupState) -> list[Group]:
        """Open groups in one of ``states``, in the order they were dealt."""
        return [group for group in self.open.values() if group.state in states]

    def deal(self, dealt: Any, epoch_id: int) -> Group:
        prompt = as_prompt(dealt)
        samples = pending_samples(prompt, self.num_dealt, self.n_samples)
        group = Group(self.num_dealt, prompt, epoch_id, samples)
        self.open[group.number] = group
        self.num_dealt += 1
        return group

    def start(self, group: Group, weight_version: int) -> None:
        self._move(group, GroupState.WAITING, GroupState.IN_FLIGHT)
        if group.untouched:
            group.weight_version = weight_version
        if group.batch is None:
            group.batch = self.num_batches

    def restart(self, group: Group, reason: str = "", failed: bool = False) -> None:
        """Forget what was sampled; after a failure other seeds are used."""
        self._check_open(group)
        if reason:
            self.requeued[reason] += 1
        group.samples = pending_samples(group.prompt, group.number, self.n_samples)
        group.attempt += failed
        group.finished, group.rejected = 0, ""

    def wait(self, group: Group) -> None:
        """The group is no longer in flight, or was judged and cannot be used; it keeps what it has."""
        self._check_open(group)
        group.state = GroupState.WAITING

    def ready(self, group: Group) -> None:
        self._move(group, GroupState.IN_FLIGHT, GroupState.READY)
        self.num_ready += 1
        group.finished = self.num_ready

    def reject(self, group: Group, reason: str) -> None:
        self._move(group, GroupState.IN_FLIGHT, GroupState.REJECTED)
        group.rejected = reason

    def drop(self, group: Group, reason: str) -> None:
        self._check_open(group)
        self.dropped[reason] += 1
        del self.open[group.number]

    def consume(self, groups: Sequence[Group]) -> int:
        """Close the groups of one batch. Returns the batch's number."""
        for group in groups:
            self._check_open(group)
            assert group.state is GroupState.READY, f"group {group.id} is {group.state}, not ready"
            del self.open[group.number]
        self.num_consumed += len(groups)
        self.num_batches += 1
        return self.num_batches - 1

    def seeds(self, run_seed: int, group: Group) -> list[int]:
        """The sampling seed of each sample."""
        key = (run_seed, group.number, group.prompt.id)
        return [sampling_seed(*key, index, group.attempt) for index in range(self.n_samples)]

    def _move(self, group: Group, before: GroupState, after: GroupState) -> None:
        self._check_open(group)
        assert group.state is before, f"group {group.id} is {group.state}, not {before}"
        group.state = after

    def _check_open(self, group: Group) -> None:
        assert self.open.get(group.number) is group, f"group {group.id} is closed"

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON-ready values."""
        frontier = self.frontier
        return {
            "n_samples": self.n_samples,
            "frontier": frontier,
            "num_dealt": self.num_dealt,
            "num_consumed": self.num_consumed,
            "num_batches": self.num_batches,
            "dropped": dict(self.dropped),
            "requeued": dict(self.requeued),
            "groups": [_group_state(group) for group in self.open.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            UserError: it is no such state, it does not add up, or the size of groups has changed.
        """
        try:
            if state["n_samples"] != self.n_samples:
                raise UserError(
                    f"rollout state: n_samples_per_prompt was {state['n_samples']} when it was saved and is "
                    f"{self.n_samples} now; resume with the same, or start a new run"
                )
            groups = [_load_group(entry, self.n_samples) for entry in state["groups"]]
            counts = {name: int(state[name]) for name in ("num_dealt", "num_consumed", "num_batches")}
            dropped, requeued = (Counter(state[name]) for name in ("dropped", "requeued"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"rollout state: cannot be read ({error!r}); was it saved by a rollout manager?") from error
        if counts["num_dealt"] != counts["num_consumed"] + dropped.total() + len(groups):
            raise UserError("rollout state: does not account for every prompt dealt; use another checkpoint")
        self.open = {group.number: group for group in groups}
        self.num_dealt, self.num_consumed, self.num_batches = counts.values()
        self.num_ready = max((group.finished for group in groups), default=0)
        self.dropped, self.requeued = dropped, requeued


def _group_state(group: Group) -> dict[str, Any]:
    return {
        "number": group.number,
        "prompt": group.prompt.to_dict(),
        "epoch_id": group.epoch_id,
        "samples": None if group.untouched else [s.to_dict() for s in group.samples],
        "state": group.state.value,
        "attempt": group.attempt,
        "weight_version": group.weight_version,
        "batch": group.batch,
        "finished": group.finished,
        "rejected": group.rejected,
    }


def _load_group(entry: Mapping[str, Any], n_samples: int) -> Group:
    prompt = Sample.from_dict(entry["prompt"])
    samples = [Sample.from_dict(s) for s in entry["samples"] or ()] or pending_samples(
        prompt, entry["number"], n_samples
    )
    state = GroupState(entry["state"])
    return Group(
        **{
            **entry,
            "prompt": prompt,
            "samples": samples,
            "state": GroupState.WAITING if state is GroupState.IN_FLIGHT else state,
        }
    )
