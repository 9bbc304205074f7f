#!/usr/bin/env python3
"""SFT on one device, from its parts: model, optimizer, loss, backend, samples, loop.

python examples/train_sft_single_gpu.py [--model Qwen/Qwen2.5-0.5B-Instruct] [--device cuda:0]
"""

from __future__ import annotations

import asyncio

import torch
from common import learning_rate, load_or_make_model, parse_arguments
from data.load_tiny_dataset import load_tiny_sft

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.sft_losses import causal_lm_loss
from rollouts.training.types import SFTTrainingConfig


async def main() -> None:
    args = parse_arguments(__doc__, out="runs/example_single")
    model, tokenizer = load_or_make_model(args.model, args.device)
    samples = load_tiny_sft(tokenizer)

    backend = PyTorchTrainingBackend(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=learning_rate(args.model), weight_decay=0.1),
        loss_fn=causal_lm_loss,
        checkpoint_dir=args.out / "checkpoints",
        tokenizer=tokenizer,
    )
    config = SFTTrainingConfig(num_steps=args.steps, batch_size=2, log_every=10, checkpoint_every=25)

    metrics = await run_sft_training(backend, samples, config, resume=False)
    print(f"Steps: {len(metrics)}, loss: {metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}")


if __name__ == "__main__":
    asyncio.run(main())
