"""Rollout generation: prompts become groups of finished, scored samples, and groups become training batches."""

from rollouts.training.rollout_gen.config import RolloutConfig
from rollouts.training.rollout_gen.engine_generate import EngineGenerate
from rollouts.training.rollout_gen.generate import RolloutManager, generate_rollout_batches
from rollouts.training.rollout_gen.manager import AsyncRolloutManager, RolloutAborted, RolloutError
from rollouts.training.rollout_gen.transforms import apply_sample_transforms, convert_to_batch

__all__ = [
    "AsyncRolloutManager",
    "EngineGenerate",
    "RolloutAborted",
    "RolloutConfig",
    "RolloutError",
    "RolloutManager",
    "apply_sample_transforms",
    "convert_to_batch",
    "generate_rollout_batches",
]
