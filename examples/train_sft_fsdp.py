#!/usr/bin/env python3
"""SFT sharded over several devices with FSDP2; on a machine without GPUs, processes that talk through gloo.

torchrun --nproc_per_node=4 examples/train_sft_fsdp.py [--model Qwen/Qwen2.5-0.5B-Instruct]
"""

from __future__ import annotations

import asyncio

import torch
import torch.distributed as dist
from common import learning_rate, load_or_make_model, parse_arguments
from data.load_tiny_dataset import load_tiny_sft

from rollouts.training.backends.fsdp import FSDPConfig, FSDPTrainingBackend
from rollouts.training.distributed_utils import cleanup, init_process_group
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.sft_losses import causal_lm_loss
from rollouts.training.types import SFTTrainingConfig


async def main() -> None:
    args = parse_arguments(__doc__, out="runs/example_fsdp")
    device = init_process_group(None if args.device == "auto" else args.device)
    model, tokenizer = load_or_make_model(args.model, str(device))
    samples = load_tiny_sft(tokenizer)

    def create_optimizer(sharded: torch.nn.Module) -> torch.optim.Optimizer:
        """Called once the model is sharded: an optimizer made earlier would hold tensors that are no longer used."""
        return torch.optim.AdamW(sharded.parameters(), lr=learning_rate(args.model), weight_decay=0.1)

    backend = FSDPTrainingBackend(
        model=model,
        optimizer=create_optimizer,
        loss_fn=causal_lm_loss,
        checkpoint_dir=args.out / "checkpoints",
        config=FSDPConfig(sharding_strategy="FULL_SHARD", mixed_precision=device.type != "cpu"),
        device=device,
        tokenizer=tokenizer,
    )
    config = SFTTrainingConfig(num_steps=args.steps, batch_size=4, log_every=10, checkpoint_every=25)

    metrics = await run_sft_training(backend, samples, config, resume=False)
    if dist.get_rank() == 0:
        print(f"Ranks: {dist.get_world_size()}, loss: {metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}")
    cleanup()


if __name__ == "__main__":
    asyncio.run(main())
