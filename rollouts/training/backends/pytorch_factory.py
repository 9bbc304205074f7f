"""Backends from a few plain values: the pieces one by one, and the usual combination of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollouts.models.load import load_hf_model, parse_device, parse_dtype
from rollouts.training import distributed_utils as ranks
from rollouts.training.backends.fsdp import FSDPConfig, FSDPTrainingBackend
from rollouts.training.backends.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    create_adamw_optimizer,
    create_optimizer,
    create_warmup_cosine_scheduler,
    make_schedule,
)
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.sft_losses import LossFn, causal_lm_loss

__all__ = [
    "compute_device_map_single_gpu",
    "create_adamw_optimizer",
    "create_backend_with_scheduler",
    "create_cross_entropy_loss",
    "create_fsdp_backend",
    "create_pytorch_backend",
    "create_warmup_cosine_scheduler",
    "load_hf_model",
    "parse_dtype",
]


def compute_device_map_single_gpu(device: torch.device | str) -> dict[str, str]:
    """transformers' ``device_map`` that puts the whole model on one device."""
    return {"": str(parse_device(str(device)))}


def create_cross_entropy_loss() -> LossFn:
    """The supervised loss: shifted, masked, summed, and chunked over the vocabulary."""
    return causal_lm_loss


def create_pytorch_backend(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    *,
    checkpoint_dir: str | Path | None = None,
    precision: str | torch.dtype | None = None,
    optimizer: OptimizerConfig | None = None,
    value_head_lr: float | None = None,
    schedule: ScheduleConfig | None = None,
    num_steps: int | None = None,
    device: torch.device | str | None = None,
    loss_fn: LossFn = causal_lm_loss,
    **kwargs: Any,
) -> PyTorchTrainingBackend:
    """A backend on one device.

    Args:
        model: a loaded model, or the folder or hub name to load (its tokenizer comes with it).
        precision: of computing; ``"bfloat16"`` keeps float32 master weights beside it. None = as the model is.
        optimizer: None = AdamW with its defaults.
        value_head_lr: of the value head, if the model has one; None = the optimizer's.
        schedule: needs ``num_steps``; None = constant learning rate.
        num_steps: optimizer steps of the whole run.
        kwargs: passed on to ``PyTorchTrainingBackend`` (max_grad_norm, compile, ...).
    """
    if isinstance(model, (str, Path)):
        # In float32, whatever the precision: the master weights start from the exact values.
        model, loaded_tokenizer = load_hf_model(str(model), device=device, dtype=torch.float32)
        precision = precision or "bfloat16"
        tokenizer = tokenizer if tokenizer is not None else loaded_tokenizer
    optimizer_config = optimizer or OptimizerConfig()
    return PyTorchTrainingBackend(
        model,
        lambda m: create_optimizer(m, optimizer_config, value_head_lr),
        loss_fn,
        checkpoint_dir,
        None if device is None else parse_device(str(device)),
        precision=None if precision is None else parse_dtype(precision),
        tokenizer=tokenizer,
        schedule=_schedule(schedule, num_steps),
        **kwargs,
    )


def create_fsdp_backend(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    checkpoint_dir: str | Path | None = None,
    precision: str | torch.dtype = "bfloat16",
    optimizer: OptimizerConfig | None = None,
    value_head_lr: float | None = None,
    schedule: ScheduleConfig | None = None,
    num_steps: int | None = None,
    device: torch.device | str | None = None,
    config: FSDPConfig | None = None,
    loss_fn: LossFn = causal_lm_loss,
    **kwargs: Any,
) -> FSDPTrainingBackend:
    """A backend over the ranks of torchrun; arguments as ``create_pytorch_backend``.

    Args:
        config: None = full sharding, with mixed precision when ``precision`` is bfloat16.
    """
    local = ranks.init_process_group(device)
    optimizer_config = optimizer or OptimizerConfig()
    return FSDPTrainingBackend(
        model,
        lambda m: create_optimizer(m, optimizer_config, value_head_lr),
        loss_fn,
        checkpoint_dir,
        config or FSDPConfig(mixed_precision=parse_dtype(precision) == torch.bfloat16),
        local,
        tokenizer=tokenizer,
        schedule=_schedule(schedule, num_steps),
        **kwargs,
    )


def create_backend_with_scheduler(
    model: nn.Module | str | Path,
    num_steps: int,
    *,
    lr: float = 1e-5,
    warmup_ratio: float = 0.03,
    min_lr_ratio: float = 0.1,
    **kwargs: Any,
) -> PyTorchTrainingBackend:
    """AdamW with warm-up and cosine decay over ``num_steps`` steps; ``kwargs`` as ``create_pytorch_backend``."""
    schedule = ScheduleConfig("cosine", warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
    return create_pytorch_backend(
        model, optimizer=OptimizerConfig(lr=lr), schedule=schedule, num_steps=num_steps, **kwargs
    )


def _schedule(config: ScheduleConfig | None, num_steps: int | None) -> Any:
    if config is None:
        return None
    if num_steps is None:
        raise ValueError("a schedule needs num_steps, the length of the whole run")
    return make_schedule(config, num_steps)
