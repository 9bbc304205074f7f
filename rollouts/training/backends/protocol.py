"""What a training loop may ask of a backend: a handful of verbs, each answered by one awaitable future."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from rollouts.training.types import TrainFuture

Batch = Mapping[str, Any]
"""One micro-batch: ``input_ids``, ``labels`` int64 and ``loss_mask`` float32, each [B, S]; when packed (B = 1) also
``position_ids`` [1, S], ``cu_seqlens`` [n+1] int32 and ``max_seqlen`` int; optionally ``loss_positions`` [N] int64."""

Metrics = dict[str, float]


@runtime_checkable
class TrainingBackend(Protocol):
    """Holds the weights, the optimizer and their versions; knows nothing of data, schedules of work or logging.

    Operations take effect in the order of the calls. After an operation failed, the backend refuses every other one
    until ``load_checkpoint`` has put it into a known state again.
    """

    rank: int
    world_size: int
    weight_version: int

    def forward_backward(self, batch: Batch | Sequence[Batch]) -> TrainFuture[Metrics]:
        """Add the gradient of this batch's loss sum to what is accumulated.

        Args:
            batch: one micro-batch or several; ranks communicate once a call, after the last micro-batch.

        Returns:
            ``loss`` and every metric of the loss function averaged over the global count of this call, ``num_tokens``
            (that count) and ``grad_norm`` of all that is accumulated so far, divided by its count, before clipping.
        """
        ...

    def optim_step(self, lr: float | None = None, max_grad_norm: float | None = None) -> TrainFuture[Metrics]:
        """Divide the gradient by the global count, clip it, step, and clear it.

        A non-finite gradient changes nothing but ``skipped_steps``; too many in a row raise.

        Args:
            lr: learning rate of this step for every group, instead of the schedule's.
            max_grad_norm: clipping norm of this step, instead of the backend's.

        Returns:
            ``lr`` (of the first group), ``step`` (steps applied so far), ``grad_norm``, ``skipped`` (0 or 1) and
            ``skipped_steps`` (so far).
        """
        ...

    def evaluate(self, batch: Batch | Sequence[Batch]) -> TrainFuture[Metrics]:
        """Loss and metrics as in ``forward_backward``, with no gradient and the model in evaluation mode."""
        ...

    def compute_log_probs(
        self, batch: Batch | Sequence[Batch], temperature: float = 1.0, adapter: bool = True
    ) -> TrainFuture[list[torch.Tensor]]:
        """Log-probs of the learned tokens, without gradient and in evaluation mode.

        Args:
            batch: one micro-batch or several.
            temperature: at which they were sampled.
            adapter: False takes the base model of a LoRA model, which is what it was before training.

        Returns:
            A float32 tensor [N] for each micro-batch, on the backend's device.
        """
        ...

    def compute_collisions(
        self, batch: Batch | Sequence[Batch], temperature: float = 1.0
    ) -> TrainFuture[list[torch.Tensor]]:
        """As ``compute_log_probs``, with the sum over the vocabulary of p² (for ``optimal_token_baseline``)."""
        ...

    def compute_values(self, batch: Batch | Sequence[Batch]) -> TrainFuture[list[torch.Tensor]]:
        """As ``compute_log_probs``, with the values of a critic (``make_critic``, ``add_value_head``)."""
        ...

    def save_checkpoint(
        self, step: int, metrics: Metrics | None = None, state: dict[str, Any] | None = None
    ) -> TrainFuture[Path]:
        """Commit everything a resumed run needs as one atomic act; ``state`` is the loop's own (JSON)."""
        ...

    def load_checkpoint(self, path: str | Path) -> TrainFuture[dict[str, Any]]:
        """Restore weights, moments, counters and random state; returns what the loop gave as ``state``."""
        ...

    def get_weights(self) -> TrainFuture[dict[str, torch.Tensor]]:
        """The model's full state dict, in its working precision, a value head left out. On one device these are the
        live tensors: clone what must outlast the next step."""
        ...

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> TrainFuture[None]:
        """Overwrite the model's weights (all of them) and leave the optimizer as it is."""
        ...
