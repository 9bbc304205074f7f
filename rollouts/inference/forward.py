"""Which forward pass serves a model: the fastest that fits it and the device it is on."""

from __future__ import annotations

from typing import Any

from rollouts.errors import UserError
from rollouts.inference.decode_graphs import GraphedForward
from rollouts.inference.model_runner import Forward, GenericForward, NativeForward, StructuredForward
from rollouts.inference.native import native_library

# Architectures whose layers are exactly: norm, attention with rotary positions, norm, gated feed-forward.
_STRUCTURED = ("llama", "mistral", "qwen2", "qwen3")


def make_forward(model: Any, max_length: int, native: bool = True) -> Forward:
    """The fastest forward pass that fits the model; ``native=False`` keeps to torch operators, one by one.

    Raises:
        UserError: the model's rotary positions depend on the length of the sequence.
    """
    rope_type = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise UserError(f"the engine cannot serve rope type {rope_type!r}: its frequencies change with the length")
    if model.config.model_type not in _STRUCTURED:
        return GenericForward(model)
    structured = StructuredForward(model, max_length)
    if native and structured.cos.device.type == "cuda":
        return GraphedForward(structured)
    if native and structured.fits_native() and (library := native_library()) is not None:
        return NativeForward(structured, library)
    return structured
