"""What an engine should report about the weights that it was given: SHA-256 of each tensor's bytes.

vLLM and SGLang join some tensors of a checkpoint into one; SGLang shows the first 16 digits of a digest. Tensors that
an engine keeps in a layout of its own (shards; vLLM's packed layers on a CPU) cannot be told this way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EMPTY = hashlib.sha256(b"").hexdigest()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAST_LAYER = re.compile(r"^(.*\.)?(\w+)\.(weight|bias)$")


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def compare_digests(reported: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> tuple[float, list[str]]:
    """Compare an engine's digests with those that ``weights`` should have there.

    Args:
        reported: by the engine's names, whole or cut short.
        weights: by the checkpoint's names.

    Returns:
        The share of parameters that could be compared, and the names that differ.
    """
    compared, differing, dtype = 0, [], None
    for name, found in reported.items():
        tensor = None if found == EMPTY else _engine_tensor(name, weights)
        if tensor is None:
            continue
        if dtype is None:  # the engine's own: that in which its first tensor is what we sent
            dtype = next((d for d in (tensor.dtype, *DTYPES) if digest(tensor.to(d)).startswith(found)), tensor.dtype)
        compared += tensor.numel()
        if not digest(tensor.to(dtype)).startswith(found):
            differing.append(name)
    total = sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values())  # tied ones are there once
    return compared / max(total, 1), differing


def _engine_tensor(name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The tensor that an engine should hold under ``name``; None where the checkpoint does not tell."""
    if name in weights:
        return weights[name]
    match = _LAST_LAYER.match(name)
    if match is None or match[2] not in FUSED:
        return None
    parts = [f"{match[1] or ''}{part}.{match[3]}" for part in FUSED[match[2]]]
    if not all(part in weights for part in parts):
        return None
    return torch.cat([weights[part] for part in parts])


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder's safetensors files, mapped rather than read; tied ones are there once."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
