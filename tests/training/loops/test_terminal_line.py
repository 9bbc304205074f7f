"""A loop that draws its own line on a terminal takes it away again, however it ends."""

from __future__ import annotations

import os
import pty
import sys
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from transformers import PreTrainedModel

from rollouts.training import Sample, SFTTrainingConfig, create_pytorch_backend, run_sft_training
from rollouts.training.sft_losses import causal_lm_loss

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


@pytest.mark.parametrize("failing", [False, True])
def test_the_cursor_is_back(
    make_tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    steps: list[int] = []

    def loss(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if failing and len(steps) == 2:
            raise ZeroDivisionError
        return causal_lm_loss(*args, **kwargs)

    backend = create_pytorch_backend(make_tiny_model(), loss_fn=loss)
    samples = [Sample(tokens=[5, 6, 7, 8], loss_mask=[0, 1, 1, 1])]
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(master, 1 << 16):
                shown.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        try:
            anyio.run(run_sft_training, backend, samples, SFTTrainingConfig(num_steps=3, batch_size=1))
            assert not failing
        except ZeroDivisionError:
            assert failing
        monkeypatch.undo()
    reader.join(60)
    os.close(master)
    text = b"".join(shown).decode()
    assert text.rfind(SHOW) > text.rfind(HIDE) >= 0, text
