#!/usr/bin/env python3
"""SFT on conversations written in Python: tokenize, mask, train, all with functions and one backend.

python examples/run_sft.py [--model Qwen/Qwen2.5-0.5B-Instruct]
"""

from __future__ import annotations

import asyncio

from common import learning_rate, load_or_make_model, parse_arguments

from rollouts.training.backends.optimizers import OptimizerConfig
from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.datasets.sft import compute_loss_mask, tokenize_conversation
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.types import Sample, SFTTrainingConfig

CONVERSATIONS = [
    [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "2+2 equals 4."}],
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": "The capital of Italy is Rome."},
    ],
]


async def main() -> None:
    args = parse_arguments(__doc__, out="runs/example_sft")
    model, tokenizer = load_or_make_model(args.model, args.device)

    samples = []
    for conversation in CONVERSATIONS:
        tokens, user_spans = tokenize_conversation(conversation, tokenizer)
        samples.append(Sample(tokens=tokens, loss_mask=compute_loss_mask(tokens, user_spans)))
    first = samples[0]
    learned = [token for token, mask in zip(first.tokens, first.loss_mask) if mask]
    print(f"The first conversation teaches: {tokenizer.decode(learned)!r}")

    backend = create_pytorch_backend(
        model,
        tokenizer,
        checkpoint_dir=args.out / "checkpoints",
        optimizer=OptimizerConfig(lr=learning_rate(args.model)),
    )
    config = SFTTrainingConfig(num_steps=args.steps, batch_size=2, log_every=10)

    metrics = await run_sft_training(backend, samples, config, resume=False)
    print(f"Training complete. Steps: {len(metrics)}, final loss: {metrics[-1]['loss']:.4f}")


if __name__ == "__main__":
    asyncio.run(main())
