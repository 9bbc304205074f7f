"""The checksum of weights, computed from a file's tensors by the rule that the engine documents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def model_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
    return digest.hexdigest()
