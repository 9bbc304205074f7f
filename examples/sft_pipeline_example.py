#!/usr/bin/env python3
"""The whole way in one file: a JSONL file, tokenized data, training with schedule and metrics, a model folder, answers.

python examples/sft_pipeline_example.py [--model Qwen/Qwen2.5-0.5B-Instruct]
"""

from __future__ import annotations

import asyncio
import json

from common import learning_rate, load_or_make_model, parse_arguments
from data.load_tiny_dataset import TINY_SFT

from rollouts.models.export import export_model
from rollouts.models.load import load_hf_model
from rollouts.pipeline.generation import generate, render_prompt
from rollouts.training.backends.optimizers import OptimizerConfig, ScheduleConfig
from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.datasets.dataset_loaders import load_sft_dataset
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.metrics import JSONLLogger
from rollouts.training.types import SFTTrainingConfig


async def main() -> None:
    args = parse_arguments(__doc__, out="runs/example_pipeline", steps=80)
    model, tokenizer = load_or_make_model(args.model, args.device)

    # Rows become samples: each is rendered by the model's chat template, and only the assistant's turn is learned.
    samples = load_sft_dataset(TINY_SFT, tokenizer, cache_dir=args.out / "cache")
    print(f"{len(samples)} samples, {samples.lengths.sum()} tokens, {samples.loss_counts.sum()} of them learned")

    backend = create_pytorch_backend(
        model,
        tokenizer,
        checkpoint_dir=args.out / "checkpoints",
        optimizer=OptimizerConfig(lr=learning_rate(args.model)),
        schedule=ScheduleConfig("cosine", warmup_ratio=0.1),
        num_steps=args.steps,
    )
    config = SFTTrainingConfig(num_steps=args.steps, batch_size=5, log_every=20)
    logger = JSONLLogger(args.out / "metrics.jsonl")
    await run_sft_training(backend, samples, config, logger, resume=False)
    logger.close()

    # The result is an ordinary model folder; what answers below was read back from it.
    final = export_model(model, tokenizer, args.out / "final", overwrite=True)
    model, tokenizer = load_hf_model(final, args.device, "float32")
    rows = [json.loads(line) for line in TINY_SFT.read_text(encoding="utf-8").splitlines()]
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}], ()) for row in rows]
    for row, answer in zip(rows, generate(model, tokenizer, prompts, max_new_tokens=16)):
        print(f"{row['prompt']} -> {answer}")
    print(f"The model is in {final}")


if __name__ == "__main__":
    asyncio.run(main())
