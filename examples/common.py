"""What the examples share: their arguments, and a tiny model made on the spot when none is named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rollouts.models.load import load_hf_model, parse_device
from rollouts.models.make import ModelConfig, make_model
from rollouts.models.tokenizer import train_tokenizer
from rollouts.pipeline.documents import make_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def parse_arguments(description: str | None, out: str, steps: int = 50) -> argparse.Namespace:
    """--model, --device, --steps and --out, the same for every example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", help="folder or hub name, e.g. Qwen/Qwen2.5-0.5B-Instruct (default: a tiny new model)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda:0, ... (default: an accelerator if there is one)"
    )
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where checkpoints go (default: {out})")
    return parser.parse_args()


def load_or_make_model(name: str | None, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The named model, in bfloat16 on an accelerator and float32 on the CPU; without a name, a tiny new Qwen3."""
    where = parse_device(device)
    if name is not None:
        return load_hf_model(name, where, torch.float32 if where.type == "cpu" else torch.bfloat16)
    tokenizer = train_tokenizer(make_documents(seed=0, number=500), vocab_size=512)
    shape = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
    model = make_model(shape, tokenizer, seed=0)
    print(f"Made a model with {model.num_parameters():,} parameters on {where}")
    return model.to(where), tokenizer


def learning_rate(name: str | None) -> float:
    """A new model learns fast; a pre-trained one is only nudged."""
    return 3e-3 if name is None else 1e-5
