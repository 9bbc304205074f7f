"""The state of every random number generator in use, as plain JSON, so that a resumed run draws the same numbers."""

from __future__ import annotations

import base64
import logging
import random
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def capture_rng() -> dict[str, Any]:
    """State of this process's generators: Python's, NumPy's, torch's on the CPU and on the current accelerator.

    In a distributed run every rank captures and restores its own. The result is JSON-ready and round-trips exactly.
    """
    version, words, next_gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached_gauss = numpy_state
    state: dict[str, Any] = {
        "python": [version, _to_text(np.array(words, np.uint32).tobytes()), next_gauss],
        "numpy": [kind, _to_text(keys.tobytes()), int(position), int(has_gauss), float(cached_gauss)],
        "torch": _to_text(torch.get_rng_state().numpy().tobytes()),
    }
    device = _accelerator()
    if device is not None:
        generator_state = torch.get_device_module(device).get_rng_state()
        state["accelerator"] = [device.type, _to_text(generator_state.numpy().tobytes())]
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what ``capture_rng`` returned.

    A state captured on another kind of accelerator cannot be put back; a warning says that the run is then not a
    bitwise continuation.
    """
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(np.frombuffer(_to_bytes(words), np.uint32).tolist()), next_gauss))
    kind, keys, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state((kind, np.frombuffer(_to_bytes(keys), np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(_to_tensor(state["torch"]))

    saved_type, saved = state.get("accelerator", (None, None))
    device = _accelerator()
    if saved_type != (device.type if device else None):
        logger.warning(
            "the checkpoint's random state is of %s and this process has %s: the run continues, but not bitwise",
            saved_type or "no accelerator",
            device.type if device else "none",
        )
    elif device is not None:
        torch.get_device_module(device).set_rng_state(_to_tensor(saved))


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _to_bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_to_bytes(text)), dtype=torch.uint8)
