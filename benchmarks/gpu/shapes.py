"""The model of the GPU benchmarks: the shape of Qwen2.5-0.5B, with random weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

QWEN2_5_0_5B: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}


def cuda_device() -> torch.device:
    """The CUDA device; without one the program ends with exit code 2."""
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device here; the benchmarks beside this folder run on a CPU", file=sys.stderr)
        sys.exit(2)
    return torch.device("cuda")


def make_model(shape: dict[str, Any], device: torch.device) -> Any:
    """A bfloat16 Qwen2 model made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=torch.bfloat16)
