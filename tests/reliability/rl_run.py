"""A small RL run (PPO, so that two models are committed) that a test can start in a process of its own and kill."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.models.critic import make_critic
from rollouts.models.load import load_hf_model
from rollouts.training.algorithms.value import make_value_loss
from rollouts.training.backends.optimizers import OptimizerConfig
from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.checkpoints import write_tensors
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops.rl_loop import run_rl_training
from rollouts.training.loops.rl_metrics import RolloutLog
from rollouts.training.metrics import JSONLLogger
from rollouts.training.rollout_gen import AsyncRolloutManager, EngineGenerate, RolloutConfig
from rollouts.training.types import RLTrainingConfig, Sample

NUM_STEPS = 6


async def reward(sample: Sample) -> float:
    return sum(token % 2 for token, learned in zip(sample.tokens, sample.loss_mask) if learned) / 6


def keep(group: list[Sample]) -> bool:
    """Drops some groups, so that prompts are consumed out of step with being dealt."""
    return sum(group[0].tokens) % 3 > 0


def train(folder: Path, model_folder: Path) -> None:
    """Train, or go on; leaves metrics.jsonl, rollouts.jsonl, checkpoints and end.safetensors."""
    model, tokenizer = load_hf_model(model_folder, "cpu", "float32")
    critic = create_pytorch_backend(
        make_critic(model),
        checkpoint_dir=folder / "critic",
        optimizer=OptimizerConfig(lr=1e-3),
        loss_fn=make_value_loss(),
    )
    backend = create_pytorch_backend(
        model, tokenizer, checkpoint_dir=folder / "checkpoints", optimizer=OptimizerConfig(lr=1e-3)
    )
    buffer = DataBuffer([f"What is {i} + {i}?" for i in range(7)], seed=1)
    with EmbeddedEngine(backend.model, tokenizer, max_length=64) as engine:
        config = RolloutConfig(
            batch_size=3,
            n_samples_per_prompt=2,
            generate_fn=EngineGenerate(engine, tokenizer, SamplingParams(max_tokens=6)),
            reward_fn=reward,
            filter_fn=keep,
            over_sampling_factor=1.5,
        )
        manager = AsyncRolloutManager(buffer, config)
        logger, log = JSONLLogger(folder / "metrics.jsonl"), RolloutLog(folder / "rollouts.jsonl")
        training = RLTrainingConfig(
            num_steps=NUM_STEPS, mini_batches=2, advantage="gae", checkpoint_every=2, keep_checkpoints=1
        )
        asyncio.run(
            run_rl_training(backend, buffer, manager, [engine], training, logger, critic=critic, rollout_log=log)
        )
    ends = {"policy": backend, "critic": critic}
    weights = {f"{name}.{n}": w for name, b in ends.items() for n, w in b.get_weights().wait().items()}
    write_tensors(folder / "end.safetensors", {n: w.clone() for n, w in weights.items()})
