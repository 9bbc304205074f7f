"""The training loops: flat functions that take all that they use."""

from rollouts.training.loops.batches import collate_batch, collate_step, plan_micro_batches, prepare_sft_batch
from rollouts.training.loops.pretrain_loop import PretrainingConfig, TokenBlocks, run_pretraining
from rollouts.training.loops.sft_loop import run_sft_training

__all__ = [
    "PretrainingConfig",
    "TokenBlocks",
    "collate_batch",
    "collate_step",
    "plan_micro_batches",
    "prepare_sft_batch",
    "run_pretraining",
    "run_sft_training",
]
