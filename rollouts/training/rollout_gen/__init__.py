"""Rollout generation: prompts become groups of finished, scored samples."""

from rollouts.training.rollout_gen.config import RolloutConfig
from rollouts.training.rollout_gen.engine_generate import EngineGenerate

__all__ = ["EngineGenerate", "RolloutConfig"]
