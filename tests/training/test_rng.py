"""Random state: what follows a restore is what followed the capture, in every library."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch

from rollouts.training.rng import capture_rng, restore_rng


def draw() -> list[float]:
    """Numbers from each generator; the Gaussians leave a cached second value behind in Python and NumPy."""
    numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    numbers += torch.rand(3).tolist() + torch.randn(5).tolist()
    if torch.accelerator.is_available():
        numbers += torch.rand(3, device=torch.accelerator.current_accelerator()).tolist()
    return numbers


@pytest.mark.parametrize("drawn_before", [0, 1, 7, 700])
def test_a_restored_state_draws_the_same_numbers(drawn_before: int) -> None:
    for _ in range(drawn_before):
        draw()
    state = json.loads(json.dumps(capture_rng()))
    expected = [draw() for _ in range(5)]
    assert [draw() for _ in range(5)] != expected
    restore_rng(state)
    assert [draw() for _ in range(5)] == expected


def test_each_library_is_held() -> None:
    state = capture_rng()
    expected = draw()
    for library in ("python", "numpy", "torch"):
        draw()
        restore_rng({**state, library: capture_rng()[library]})
        assert draw() != expected, f"{library} is not part of the state"


def test_another_kind_of_device_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    restore_rng({**capture_rng(), "accelerator": ["abacus", ""]})
    assert caplog.records[-1].levelno == logging.WARNING
    assert "abacus" in caplog.text
