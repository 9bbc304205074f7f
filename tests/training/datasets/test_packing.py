"""Best-fit packing against a plain quadratic version of itself and the bound no packing can beat."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.training.datasets.packing import best_fit_bins


def loads_of_plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Best fit decreasing as its definition reads: look at every bin for the fullest that still has room."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=lambda i: loads[i])] += length
        else:
            loads.append(length)
    return sorted(loads)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=60), capacity=st.integers(1, 50))
def test_bins_are_those_of_best_fit(lengths: list[int], capacity: int) -> None:
    bins = best_fit_bins(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert sorted(loads) == loads_of_plain_best_fit(lengths, capacity)
    assert all(load <= capacity or len(b) == 1 for load, b in zip(loads, bins, strict=True))
    assert best_fit_bins(lengths, capacity) == bins


def test_long_tail_fills_bins_to_the_brim_quickly() -> None:
    rng = random.Random(0)
    lengths = [min(2048, int(rng.lognormvariate(5, 1)) + 1) for _ in range(50_000)]
    start = time.perf_counter()
    bins = best_fit_bins(lengths, 2048)
    assert time.perf_counter() - start < 5
    assert len(bins) * 2048 <= sum(lengths) * 1.001 + 2048


def test_items_longer_than_a_bin_stand_alone() -> None:
    assert best_fit_bins([5, 20, 5, 10], 10) == [[1], [3], [0, 2]]
    assert best_fit_bins([], 10) == []


@pytest.mark.parametrize(("lengths", "capacity"), [([0], 10), ([-1], 10), ([1], 0)])
def test_nonsense_is_refused(lengths: list[int], capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_fit_bins(lengths, capacity)
