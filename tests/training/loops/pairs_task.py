"""Pairs of answers for the loops that learn preferences, and a logger that says nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rollouts.training.datasets.preferences import PreferencePair
from rollouts.training.types import Sample


class Quiet:
    def log(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def draw_pairs(
    answer: Callable[[np.random.Generator, int], list[int]], count: int = 12, seed: int = 0
) -> list[PreferencePair]:
    """Random prompts, each with ``answer(rng, 100)`` chosen and ``answer(rng, 150)`` rejected."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        prompt = rng.integers(10, 100, int(rng.integers(2, 6))).tolist()
        answers = {}
        for name, low in (("chosen", 100), ("rejected", 150)):
            tokens = answer(rng, low)
            mask = [0] * len(prompt) + [1] * len(tokens)
            answers[name] = Sample(tokens=prompt + tokens, loss_mask=mask, id=f"{i} {name}", group_id=str(i))
        pairs.append(PreferencePair(str(i), **answers))
    return pairs
