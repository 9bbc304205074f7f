"""Which groups of samples are worth learning from: small functions from a group to a verdict, which compose.

A filter is given one whole, scored group and says whether to keep it and, if not, why; the rollout manager replaces
what it drops and counts drops by reason. Samples without a reward (a reward function that failed) are never counted as
if they had scored 0: filters look at the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rollouts.training.types import Sample


@dataclass(frozen=True)
class FilterResult:
    """``keep``, or the reason why not: a short name under which drops are counted."""

    keep: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.keep


Filter = Callable[[list[Sample]], "FilterResult | bool"]
Judge = Callable[[list[Sample]], FilterResult]  # a filter that always says why

KEEP = FilterResult(True)


def judge(filter_fn: Filter, group: list[Sample]) -> FilterResult:
    """A filter's verdict as a ``FilterResult``; a plain False has the function's name for a reason."""
    verdict = filter_fn(group)
    if isinstance(verdict, FilterResult):
        return verdict
    return KEEP if verdict else FilterResult(False, getattr(filter_fn, "__name__", type(filter_fn).__name__))


def rewards_of(group: Sequence[Sample]) -> list[float]:
    """The finite rewards of a group."""
    return [s.reward for s in group if s.reward is not None and math.isfinite(s.reward)]


def check_any_success(group: list[Sample]) -> FilterResult:
    """At least one sample has a reward above 0."""
    return _verdict(any(reward > 0 for reward in rewards_of(group)), "no_success")


def check_reward_nonzero_std(group: list[Sample]) -> FilterResult:
    """The rewards differ: where they do not, group-relative advantages are all 0 (DAPO's dynamic sampling, SLIME).

    One sample alone differs from nothing and is dropped.
    """
    rewards = rewards_of(group)
    spread = max(rewards) - min(rewards) if rewards else 0.0
    # Rounding must not pass for a difference: rewards that are sums of parts may be unequal in their last bits.
    return _verdict(spread > 1e-6 * max(1.0, *map(abs, rewards or [0.0])), "zero_std")


def check_min_reward(group: list[Sample], min_reward: float = 0.0) -> FilterResult:
    """The mean reward is at least ``min_reward``."""
    rewards = rewards_of(group)
    return _verdict(bool(rewards) and sum(rewards) / len(rewards) >= min_reward, "low_reward")


def check_response_diversity(group: list[Sample], min_unique: float = 0.5) -> FilterResult:
    """At least this fraction of the responses are different texts; always true of one response."""
    unique = len({_response(s) for s in group})
    return _verdict(unique >= min(len(group), max(1.0, min_unique * len(group))), "low_diversity")


def check_reasonable_length(group: list[Sample], min_tokens: int = 1, max_tokens: int | None = None) -> FilterResult:
    """Every response has between ``min_tokens`` and ``max_tokens`` tokens (None: no upper limit)."""
    lengths = [_length(s) for s in group]
    if min(lengths, default=0) < min_tokens:
        return FilterResult(False, "too_short")
    return _verdict(max_tokens is None or max(lengths) <= max_tokens, "too_long")


def check_quality_and_diversity(group: list[Sample], min_reward: float = 0.0, min_unique: float = 0.5) -> FilterResult:
    """``check_min_reward`` and ``check_response_diversity``."""
    return all_of(make_threshold_filter(min_reward), lambda g: check_response_diversity(g, min_unique))(group)


def make_threshold_filter(min_reward: float, max_reward: float = math.inf) -> Judge:
    """Keep groups whose mean reward lies in ``[min_reward, max_reward]``: neither hopeless nor solved."""

    def threshold(group: list[Sample]) -> FilterResult:
        if not (verdict := check_min_reward(group, min_reward)):
            return verdict
        rewards = rewards_of(group)
        return _verdict(sum(rewards) / len(rewards) <= max_reward, "high_reward")

    return threshold


def make_length_filter(min_tokens: int = 1, max_tokens: int | None = None) -> Judge:
    """``check_reasonable_length`` with these limits."""
    return lambda group: check_reasonable_length(group, min_tokens, max_tokens)


def all_of(*filters: Filter) -> Judge:
    """Keep what every filter keeps; the reason is that of the first that does not."""

    def every(group: list[Sample]) -> FilterResult:
        return next((verdict for f in filters if not (verdict := judge(f, group))), KEEP)

    return every


def any_of(*filters: Filter) -> Judge:
    """Keep what some filter keeps; the reason names all that refused."""

    def some(group: list[Sample]) -> FilterResult:
        verdicts = [judge(f, group) for f in filters]
        return KEEP if any(verdicts) else FilterResult(False, "+".join(v.reason for v in verdicts))

    return some


FILTERS: dict[str, Filter] = {
    "any_success": check_any_success,
    "reward_nonzero_std": check_reward_nonzero_std,
    "min_reward": check_min_reward,
    "response_diversity": check_response_diversity,
    "reasonable_length": check_reasonable_length,
    "quality_and_diversity": check_quality_and_diversity,
}


def _verdict(keep: bool, reason: str) -> FilterResult:
    return KEEP if keep else FilterResult(False, reason)


def _response(sample: Sample) -> object:
    """What the model wrote: the text, or the tokens where there is none."""
    return sample.response or tuple(t for t, m in zip(sample.tokens, sample.loss_mask, strict=True) if m)


def _length(sample: Sample) -> int:
    return sum(1 for m in sample.loss_mask if m)
