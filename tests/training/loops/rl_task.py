"""A verifiable task that a tiny model learns in seconds, for the tests of reinforcement learning: short words, please.

The reward of a response is the share of its tokens with an id below 256 (single bytes): checked from the ids alone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.training import (
    AsyncRolloutManager,
    DataBuffer,
    EngineGenerate,
    OptimizerConfig,
    PyTorchTrainingBackend,
    RLTrainingConfig,
    RolloutConfig,
    Sample,
    create_pytorch_backend,
    run_offline_rl_training,
    run_rl_training,
)

WORDS = "apple bridge candle dragon engine forest garden harbor island journal".split()
PROMPTS = [f"Please tell me about the {word}" for word in WORDS]


def response_ids(sample: Sample) -> list[int]:
    return [token for token, learned in zip(sample.tokens, sample.loss_mask) if learned]


async def share_of_bytes(sample: Sample) -> float:
    ids = response_ids(sample)
    return sum(token < 256 for token in ids) / len(ids)


class Run:
    """Policy, engine over its live weights, prompts and manager of one small run."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        folder: Path | None = None,
        *,
        precision: str | None = None,
        engine_model: torch.nn.Module | None = None,
        rollouts: dict[str, Any] | None = None,
        lr: float = 3e-3,
        backend: PyTorchTrainingBackend | None = None,
    ) -> None:
        self.backend = backend or create_pytorch_backend(
            model, tokenizer, checkpoint_dir=folder, precision=precision, optimizer=OptimizerConfig(lr=lr)
        )
        self.engine = EmbeddedEngine(engine_model or self.backend.model, tokenizer, max_length=64)
        self.buffer = DataBuffer(PROMPTS, seed=3)
        generate = EngineGenerate(self.engine, tokenizer, SamplingParams(max_tokens=8))
        settings = {"batch_size": 4, "n_samples_per_prompt": 4, "reward_fn": share_of_bytes, "generate_fn": generate}
        self.manager = AsyncRolloutManager(self.buffer, RolloutConfig(**{**settings, **(rollouts or {})}))

    def train(self, config: RLTrainingConfig, **more: Any) -> list[dict[str, Any]]:
        with self.engine:
            return asyncio.run(
                run_rl_training(self.backend, self.buffer, self.manager, [self.engine], config, Silent(), **more)
            )

    def train_offline(self, samples: list[Sample], config: RLTrainingConfig) -> list[dict[str, Any]]:
        return asyncio.run(run_offline_rl_training(self.backend, samples, config, Silent()))

    def sample(self) -> list[Sample]:
        """The rollouts of one batch, and nothing learned from them."""

        async def collect() -> list[Sample]:
            async with self.manager as manager:
                return (await manager.generate_batch()).samples

        with self.engine:
            return asyncio.run(collect())


class Silent:
    """Logs nothing."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def same_update(a: PyTorchTrainingBackend, b: PyTorchTrainingBackend) -> bool:
    """Weights equal up to rounding. Adam's first steps have the size of the learning rate whatever the gradient, so
    where a gradient is nearly 0 its rounding shows."""
    before, after = weights_of(a), weights_of(b)
    differ = torch.cat([(before[name] - after[name]).abs().flatten() for name in before])
    return differ.mean().item() < 3e-5 and differ.quantile(0.99).item() < 1e-4


def weights_of(backend: PyTorchTrainingBackend) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backend.get_weights().wait().items()}
