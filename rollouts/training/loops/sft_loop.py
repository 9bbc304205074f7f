"""Supervised fine-tuning: a flat loop over data, gradient, step, validation and checkpoint.

``run_gradient_steps`` is the loop itself, which every kind of training on fixed data shares; what differs is how items
of the data become micro-batches (``collate``) and what the backend's loss makes of them.

cursor --indices--> collate --micro-batches--> forward_backward --> optim_step --> log
                                                               every so often: evaluate, save_checkpoint
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio.lowlevel
import numpy as np

from rollouts.errors import UserError
from rollouts.training.backends.loss_model import flops_per_token
from rollouts.training.backends.protocol import Batch
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.checkpoints import require_same
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.hardware import matmul_peak, peak_memory_mb
from rollouts.training.loops.batches import collate_batch, collate_step, prepare_sft_batch
from rollouts.training.metrics import MetricsLogger, logging_to
from rollouts.training.types import Sample, SFTTrainingConfig

log = logging.getLogger(__name__)

__all__ = ["collate_batch", "prepare_sft_batch", "run_gradient_steps", "run_sft_training"]

Item = TypeVar("Item")


async def run_sft_training(
    backend: PyTorchTrainingBackend,
    samples: Sequence[Sample],
    config: SFTTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    validation: Sequence[Sample] | None = None,
    resume: bool = True,
) -> list[dict[str, Any]]:
    """Train on ``samples`` for ``config.num_steps`` optimizer steps.

    The loss of a step is the mean over all its learned tokens, however they are split into micro-batches and ranks.
    With ``resume``, a committed step in ``backend.checkpoint_dir`` is loaded and the run goes on as if it had never
    stopped: same weights, moments, random numbers and batches, bit for bit.

    Args:
        backend: holds model, optimizer and checkpoint folder.
        samples: a list, or a tokenized data set; never changed.
        metrics_logger: gets every step's metrics on rank 0; None prints lines.
        validation: samples whose loss is measured every ``config.eval_every`` steps and at the end.

    Returns:
        The metrics of each step done by this call, ``step`` counting completed steps from 1; of the last step alone if
        the run was complete already.

    Raises:
        UserError: no samples, none that carries loss, or a checkpoint of another run.
        FloatingPointError: ``max_bad_steps`` gradients in a row were not finite.
    """
    _require_learnable(samples, "samples")
    if validation is not None:
        _require_learnable(validation, "validation samples")

    def collate(items: Sequence[Sample], indices: Sequence[int]) -> list[Batch]:
        return collate_step(
            items, indices, config.max_tokens_per_micro_batch, config.packing, backend.rank, backend.world_size
        )

    return await run_gradient_steps(
        backend, samples, config, metrics_logger, collate=collate, validation=validation, resume=resume
    )


async def run_gradient_steps(
    backend: PyTorchTrainingBackend,
    items: Sequence[Item],
    config: SFTTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    collate: Callable[[Sequence[Item], Sequence[int]], list[Batch]],
    validation: Sequence[Item] | None = None,
    resume: bool = True,
    title: str = "SFT",
) -> list[dict[str, Any]]:
    """As ``run_sft_training``, on items of any kind: ``config.batch_size`` of them a step.

    Args:
        items, validation: what is learned from and validated on; ``len`` of an item is its number of tokens.
        collate: ``(items, indices) -> this rank's micro-batches`` of a step that learns from those items.
        title: begins the console's lines.
    """
    lengths = item_lengths(items)
    cursor = DataBuffer(range(len(items)), seed=config.seed, shuffle=config.shuffle)
    stopper = EarlyStopping(config.early_stopping_patience)
    settings = {"num_samples": len(items), "num_tokens": int(lengths.sum()), "batch_size": config.batch_size}
    backend.max_bad_steps, backend.keep_checkpoints = config.max_bad_steps, config.keep_checkpoints
    step, metrics = 0, {}

    if resume and (checkpoint := backend.find_checkpoint()) is not None:
        state = await backend.load_checkpoint(checkpoint)
        require_same(state["settings"], settings, checkpoint)
        cursor.load_state_dict(state["cursor"])
        stopper = EarlyStopping(**state["early_stopping"] | {"patience": config.early_stopping_patience})
        step, metrics = state["step"], state["metrics"]
        log.info("going on after step %d, from %s", step, checkpoint)
        if step >= config.num_steps or stopper.should_stop:
            return [metrics]

    meter = Meter(backend)
    history = []
    with logging_to(metrics_logger, config.num_steps, config.log_every, title) as logger:
        while step < config.num_steps and not stopper.should_stop:
            # Lets Ctrl-C and other tasks in: the backend's futures are complete already.
            await anyio.lowlevel.checkpoint()
            meter.start()
            indices = cursor.get_prompts(config.batch_size)
            learned = await backend.forward_backward(collate(items, indices))
            updated = await backend.optim_step()
            step += 1
            metrics = {"step": step, "epoch": cursor.epoch_id, **learned, **_without_step(updated)}
            metrics |= meter.stop(num_samples=len(indices), num_tokens=int(lengths[indices].sum()))

            last = step == config.num_steps
            if validation is not None and (last or _is_due(step, config.eval_every)):
                measured = await backend.evaluate(collate(validation, range(len(validation))))
                metrics |= {f"val_{name}": value for name, value in measured.items() if name != "num_tokens"}
                stopper.update(metrics["val_loss"])
                last = last or stopper.should_stop
            history.append(metrics)
            if backend.rank == 0:
                logger.log(step, metrics)

            if backend.checkpoint_dir is not None and (last or _is_due(step, config.checkpoint_every)):
                state = {
                    "step": step,
                    "metrics": metrics,
                    "settings": settings,
                    "cursor": cursor.state_dict(),
                    "early_stopping": vars(stopper),
                }
                await backend.save_checkpoint(step, metrics, state)
    return history


@dataclass
class EarlyStopping:
    """Stops after ``patience`` validations in a row without a lower loss; 0 never stops."""

    patience: int
    best: float | None = None
    bad_in_a_row: int = 0

    def update(self, loss: float) -> None:
        improved = loss < (math.inf if self.best is None else self.best)  # never by a loss that is not a number
        self.best = loss if improved else self.best
        self.bad_in_a_row = 0 if improved else self.bad_in_a_row + 1

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.bad_in_a_row


class Meter:
    """Speed, utilization and memory of the step between ``start`` and ``stop``."""

    def __init__(self, backend: PyTorchTrainingBackend) -> None:
        self._device = backend.device
        self._model = backend.model
        self._peak = matmul_peak(backend.device, backend.compute_dtype) * backend.world_size
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, num_samples: int, num_tokens: int) -> dict[str, float]:
        """``num_tokens``: all tokens of the step that are not padding, over all ranks."""
        seconds = time.perf_counter() - self._started
        flops = flops_per_token(self._model, num_tokens / num_samples) * num_tokens
        return {
            "samples": num_samples,
            "tokens": num_tokens,
            "step_seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "mfu": flops / seconds / self._peak,
            "peak_memory_mb": peak_memory_mb(self._device),
        }


def item_lengths(items: Sequence[Any]) -> np.ndarray:
    """Tokens of each item, int64 [len]; a tokenized data set knows them without reading any."""
    lengths = getattr(items, "lengths", None)
    return np.asarray(lengths if lengths is not None else [len(item) for item in items], dtype=np.int64)


def _require_learnable(samples: Sequence[Sample], what: str) -> None:
    if len(samples) == 0:
        raise UserError(f"{what} cannot be empty: give at least one")
    counts = getattr(samples, "loss_counts", None)
    if not (counts.any() if counts is not None else any(s.num_loss_tokens for s in samples)):
        raise UserError(
            f"no token of the {what} carries loss: every loss_mask is 0; is there an assistant turn to learn?"
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _without_step(updated: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in updated.items() if name != "step"}
