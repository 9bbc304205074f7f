"""Verdicts on groups, by hand-made groups; the corners are rewards that are missing, equal or not finite."""

from __future__ import annotations

import math

import pytest

from rollouts.training.filters import (
    FILTERS,
    FilterResult,
    all_of,
    any_of,
    check_any_success,
    check_min_reward,
    check_quality_and_diversity,
    check_reasonable_length,
    check_response_diversity,
    check_reward_nonzero_std,
    judge,
    make_length_filter,
    make_threshold_filter,
)
from rollouts.training.types import Sample


def group(*rewards: float | None, texts: str = "abcdefgh", lengths: tuple[int, ...] = ()) -> list[Sample]:
    samples = []
    for i, reward in enumerate(rewards):
        n = lengths[i] if lengths else 3
        samples.append(Sample(tokens=[1] + [5] * n, loss_mask=[0] + [1] * n, response=texts[i], reward=reward))
    return samples


def test_any_success() -> None:
    assert check_any_success(group(0, 0, 0.1))
    assert check_any_success(group(0, -1)) == FilterResult(False, "no_success")
    assert not check_any_success(group(None, 0))


@pytest.mark.parametrize(
    ("rewards", "keep"),
    [
        ((0, 1), True),
        ((1, 1, 1), False),
        ((0.1 + 0.2, 0.3), False),  # unequal in the last bit only
        ((1e6, 1e6 + 0.1), False),
        ((1e6, 1e6 + 10), True),
        ((1e-5, 2e-5), True),
        ((1,), False),
        ((None, None), False),
        ((None, 1), False),
        ((None, 1, 0), True),
        ((math.nan, 1, 1), False),
        ((), False),
    ],
)
def test_reward_nonzero_std(rewards: tuple, keep: bool) -> None:
    verdict = check_reward_nonzero_std(group(*rewards))
    assert verdict == (FilterResult(True) if keep else FilterResult(False, "zero_std"))


def test_min_reward_and_thresholds() -> None:
    assert check_min_reward(group(0.2, 0.4), 0.3 - 1e-9)
    assert check_min_reward(group(0.2, 0.3), 0.3) == FilterResult(False, "low_reward")
    assert check_min_reward(group(None, 0.5), 0.5)  # the failed one does not count as 0
    assert not check_min_reward(group(None, None), -10)
    middle = make_threshold_filter(0.1, 0.9)
    assert [judge(middle, group(r, r)).reason for r in (0.0, 0.5, 1.0)] == ["low_reward", "", "high_reward"]


def test_diversity() -> None:
    assert check_response_diversity(group(0, 0, 0, 0, texts="aabb"))
    assert check_response_diversity(group(0, 0, 0, 0, texts="aaab"), 0.75) == FilterResult(False, "low_diversity")
    assert check_response_diversity(group(0, texts="a"), 1.0)
    without_text = [Sample(tokens=[1, t], loss_mask=[0, 1]) for t in (5, 6, 6)]
    assert check_response_diversity(without_text, 0.6) and not check_response_diversity(without_text, 0.7)


def test_length() -> None:
    assert check_reasonable_length(group(0, 0, lengths=(1, 9)))
    assert check_reasonable_length(group(0, 0, lengths=(0, 9))) == FilterResult(False, "too_short")
    assert make_length_filter(2, 8)(group(0, 0, lengths=(2, 9))) == FilterResult(False, "too_long")
    assert make_length_filter(2, 9)(group(0, 0, lengths=(2, 9)))


def test_composition_and_reasons() -> None:
    def odd(samples: list[Sample]) -> bool:
        return len(samples) % 2 == 1

    assert judge(odd, group(1, 2)) == FilterResult(False, "odd")
    both = all_of(check_any_success, odd)
    assert [both(g).reason for g in (group(1), group(1, 1), group(0))] == ["", "odd", "no_success"]
    either = any_of(check_any_success, odd)
    assert either(group(0)) and either(group(1, 1))
    assert either(group(0, 0)) == FilterResult(False, "no_success+odd")
    assert check_quality_and_diversity(group(1, 1, texts="ab"), min_reward=1)
    assert check_quality_and_diversity(group(1, 1, texts="aa"), 1, 0.9).reason == "low_diversity"
    assert check_quality_and_diversity(group(1, 0, texts="aa"), 1, 0.9).reason == "low_reward"


def test_every_filter_has_a_name_and_takes_one_group() -> None:
    good = group(0.0, 1.0, 1.0)
    assert {name: bool(judge(function, good)) for name, function in FILTERS.items()} == dict.fromkeys(FILTERS, True)
