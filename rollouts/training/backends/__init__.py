"""Where weights and optimizers live: one protocol, one device or many."""

from rollouts.training.backends.fsdp import FSDPConfig, FSDPTrainingBackend
from rollouts.training.backends.optimizers import OptimizerConfig, ScheduleConfig
from rollouts.training.backends.protocol import TrainingBackend
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.backends.pytorch_factory import (
    create_backend_with_scheduler,
    create_fsdp_backend,
    create_pytorch_backend,
)

__all__ = [
    "FSDPConfig",
    "FSDPTrainingBackend",
    "OptimizerConfig",
    "PyTorchTrainingBackend",
    "ScheduleConfig",
    "TrainingBackend",
    "create_backend_with_scheduler",
    "create_fsdp_backend",
    "create_pytorch_backend",
]
