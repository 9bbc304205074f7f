#!/usr/bin/env python3
"""RL from a reward in Python: an engine over the trainer's own weights, groups of answers, GRPO.

python examples/run_rl.py [--model Qwen/Qwen2.5-0.5B-Instruct]
"""

from __future__ import annotations

import asyncio

from common import learning_rate, load_or_make_model, parse_arguments

from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.training.backends.optimizers import OptimizerConfig
from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops.rl_loop import run_rl_training
from rollouts.training.rollout_gen import AsyncRolloutManager, EngineGenerate, RolloutConfig
from rollouts.training.types import RLTrainingConfig, Sample

PROMPTS = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in ("trees", "rain", "bread", "boats")]


async def plain_letters(sample: Sample) -> float:
    """The share of the answer's characters that are lower-case letters and spaces."""
    text = sample.response
    return sum(c == " " or (c.isascii() and c.islower()) for c in text) / max(len(text), 1)


async def main() -> None:
    args = parse_arguments(__doc__, out="runs/example_rl", steps=30)
    model, tokenizer = load_or_make_model(args.model, args.device)
    backend = create_pytorch_backend(
        model,
        tokenizer,
        checkpoint_dir=args.out / "checkpoints",
        optimizer=OptimizerConfig(lr=learning_rate(args.model)),
    )
    data_buffer = DataBuffer(PROMPTS)
    with EmbeddedEngine(backend.model, tokenizer, max_length=512) as engine:
        rollouts = RolloutConfig(
            batch_size=4,
            n_samples_per_prompt=8,
            generate_fn=EngineGenerate(engine, tokenizer, SamplingParams(max_tokens=16)),
            reward_fn=plain_letters,
        )
        manager = AsyncRolloutManager(data_buffer, rollouts)
        config = RLTrainingConfig(num_steps=args.steps, log_every=10)
        metrics = await run_rl_training(backend, data_buffer, manager, [engine], config, resume=False)
    rewards = [row["reward_mean"] for row in metrics]
    few = max(len(rewards) // 6, 1)
    print(f"reward: {sum(rewards[:few]) / few:.3f} -> {sum(rewards[-few:]) / few:.3f}")


if __name__ == "__main__":
    asyncio.run(main())
