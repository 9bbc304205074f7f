"""Models with peaked distributions, so that a wrong key, value or position changes what is sampled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def make_peaked_model(make_tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """``make_peaked_model(seed=0, **changes)``: large random weights; entropies of a few bits instead of nearly all."""

    def make(seed: int = 0, **changes: object) -> PreTrainedModel:
        return make_tiny_model(seed=seed, **{"initializer_range": 0.2, **changes})

    return make


@pytest.fixture(scope="session")
def peaked_model(make_peaked_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Shared by tests that leave its weights alone."""
    return make_peaked_model()
