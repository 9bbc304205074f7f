"""How prompts become samples: who generates, who scores, what is kept, how long to wait."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from rollouts.errors import UserError
from rollouts.training.types import Sample

GenerateFn = Callable[..., "list[Sample] | Awaitable[list[Sample]]"]
RewardFn = Any  # Callable[[Sample], float | dict[str, float]], sync or async; a name; several
FilterFn = Callable[[list[Sample]], Any]  # bool or FilterResult
Transform = Callable[[list[Sample]], list[Sample]]

_FUNCTIONS = ("generate_fn", "reward_fn", "filter_fn", "transforms", "endpoint", "environment")


@dataclass(frozen=True)
class RolloutConfig:
    """How ``AsyncRolloutManager`` and ``generate_rollout_batches`` make training batches out of prompts.

    A group is one dealt prompt with its ``n_samples_per_prompt`` samples; it is generated, scored, kept or dropped,
    tried again and consumed as a whole. The defaults are strictly on-policy and repeatable: every batch is sampled
    with the newest weights while nothing trains, and holds the first groups dealt that pass the filter.

    Args:
        batch_size: prompts (groups) of a training batch, which holds ``batch_size * n_samples_per_prompt`` samples.
        n_samples_per_prompt: samples of one prompt, the group that advantages are computed over.
        generate_fn: ``generate_fn(samples, **kwargs)``, sync or async, is given the unfinished samples of one group
            and gives them back finished, in the same order. ``EngineGenerate`` is one over an inference engine.
        reward_fn: ``reward_fn(sample)``, sync or async, gives a float or named parts of a reward; or whatever else
            ``RewardRunner`` takes. A sample whose reward fails is left out of learning, never scored 0. None if
            ``generate_fn`` scores, or the loop does.
        filter_fn: ``filter_fn(group)`` gives a bool or a ``FilterResult``; groups it refuses are counted by reason and
            replaced. None keeps all. See ``rollouts.training.filters``.
        transforms: functions from the samples of a group to the samples of that group, applied in turn before
            scoring.
        endpoint, environment: passed on to ``generate_fn`` as keywords where they are set.
        over_sampling_factor: groups begun for a batch, over ``batch_size``: with 1.5, 48 are begun to keep 32. What is
            left over is aborted when the batch is full.
        order: which groups a batch takes. ``dealt``: the first that pass the filter in the order they were dealt,
            whatever finishes first. ``finished``: those that finish first, but groups left over from an earlier batch
            before any other, so that a long answer is late by one batch at most and never lost. Neither prefers
            short answers; ``dealt`` is repeatable, ``finished`` waits less.
        max_staleness: weight versions that the oldest token of a group may be behind the trainer's when the group is
            consumed. At 0 what is left over from a batch begins anew with the next weights; above it, finished groups
            are spared whole and unfinished samples go on from where they were, with their old log-probs.
        overlap: go on generating between batches, up to ``max_staleness`` batches ahead; needs ``async with``.
        max_retries: how often a group is tried again, as a whole, after an error or a time-out.
        retry_seconds: wait before the first retry; doubled each time, up to 60 s, and jittered.
        generate_timeout_s: for one group's generation; None waits for ever.
        reward_timeout_s, reward_isolation: of one sample's score; see ``rollouts.training.rewards.RewardRunner``.
        abort_timeout_s: how long aborted samples may take to hand over what they have.
        max_failed_groups: stop after this many groups in a row that cannot be generated (refused prompts, for one).
        max_dropped_groups: stop when this many groups were dropped for one batch; 0 = never.
        seed: sampling seeds are made from this, the prompt's place in the data, the sample's index and the attempt.

    Raises:
        UserError: a value is out of range.
    """

    batch_size: int
    generate_fn: GenerateFn | None = None
    n_samples_per_prompt: int = 1
    reward_fn: RewardFn = None
    filter_fn: FilterFn | None = None
    transforms: Sequence[Transform] = ()
    endpoint: Any = None
    environment: Any = None
    over_sampling_factor: float = 1.0
    order: Literal["dealt", "finished"] = "dealt"
    max_staleness: int = 0
    overlap: bool = False
    max_retries: int = 5
    retry_seconds: float = 0.5
    generate_timeout_s: float | None = 600.0
    reward_timeout_s: float = 30.0
    reward_isolation: str = "auto"
    abort_timeout_s: float = 10.0
    max_failed_groups: int = 8
    max_dropped_groups: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        in_range = {
            "batch_size": self.batch_size >= 1,
            "n_samples_per_prompt": self.n_samples_per_prompt >= 1,
            "over_sampling_factor": 1 <= self.over_sampling_factor < 1000,
            "order": self.order in ("dealt", "finished"),
            "max_staleness": self.max_staleness >= 0,
            "overlap": not self.overlap or self.max_staleness >= 1,
            "max_retries": self.max_retries >= 0,
            "retry_seconds": self.retry_seconds >= 0,
            "generate_timeout_s": self.generate_timeout_s is None or self.generate_timeout_s > 0,
            "reward_timeout_s": self.reward_timeout_s > 0,
            "abort_timeout_s": self.abort_timeout_s >= 0,
            "max_failed_groups": self.max_failed_groups >= 1,
            "max_dropped_groups": self.max_dropped_groups >= 0,
            "seed": self.seed >= 0,
        }
        hints = {"overlap": "; with max_staleness 0 nothing may be generated while the weights change"}
        for name, good in in_range.items():
            if not good:
                raise UserError(f"rollout setting {name} is out of range: {getattr(self, name)!r}{hints.get(name, '')}")

    def to_dict(self) -> dict[str, Any]:
        """All settings but the functions and objects, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FUNCTIONS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **functions: Any) -> RolloutConfig:
        """Inverse of ``to_dict``; functions and objects are given as keywords.

        Raises:
            UserError: a key is no setting, or a value is out of range.
        """
        known = {f.name for f in fields(cls)}
        for key in (*data, *functions):
            if key not in known:
                raise UserError(f"rollout setting {key!r} is unknown; the settings are {', '.join(sorted(known))}")
        return cls(**{**data, **functions})
