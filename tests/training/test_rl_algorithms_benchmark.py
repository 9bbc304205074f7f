"""The task of ``benchmarks.rl_algorithms`` is honest: nothing held out is trained on, only the exact answer counts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from benchmarks.rl_algorithms import ARMS, HELD_OUT, Problem, report, take
from rollouts.pipeline.world import Split
from rollouts.recipes.rl_schema import ALGORITHMS
from rollouts.training.rewards.answers import exact_match
from rollouts.training.types import Sample


def test_no_held_out_list_is_ever_trained_on() -> None:
    held_out = {p.letters for p in take(HELD_OUT, 1, Split.HELD_OUT)}
    assert len(held_out) == HELD_OUT
    for seed, number in ((0, 24_000), (100, 1500), (200, 16_000), (202, 16_000)):
        train = {p.letters for p in take(number, seed, Split.TRAIN)}
        assert len(train) == number and not train & held_out


@pytest.mark.parametrize("letters", ["abcd", "hpgsm", "rdaegj"])
def test_of_all_orders_only_the_list_backwards_is_rewarded(letters: str) -> None:
    problem = Problem(letters)
    rewarded = []
    for order in itertools.permutations(letters):
        sample = Sample(response=" ".join(order), metadata={"answer": problem.answer})
        if exact_match(sample):
            rewarded.append("".join(order))
    assert rewarded == [letters[::-1]]
    right, wrong = problem.answer.split(), problem.mistake.split()
    assert right[:-2] == wrong[:-2] and right[-2:] == wrong[:-3:-1]  # the last two swapped


def test_every_algorithm_is_measured() -> None:
    assert set(ARMS) == {*ALGORITHMS, "ppo_shared", "dpo"}


def test_a_seed_is_up_only_where_the_intervals_are_apart() -> None:
    def run(correct: int) -> dict[str, Any]:
        return {"arm": "grpo", "correct": correct, "steps": 40, "seconds": 20.0, "cpu_seconds": 19.0}

    assert "| 2 of 3 |" in report(450, [run(900), run(520), run(460)])
