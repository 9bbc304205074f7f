"""Reference policies: what KL is measured against. A frozen copy of a model, or the base beneath an adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.models.load import cast_parameters
from rollouts.training.backends.loss_model import LossModel
from rollouts.training.backends.protocol import Batch
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.backends.readers import log_prob_reader, reference_reader
from rollouts.training.types import ImmediateTrainFuture, TrainFuture


class FrozenModel:
    """A model that is only read, whole on its device, under any number of ranks.

    Args:
        model: copied, unless ``share``; never changed by training the original.
        device: None = where the model is.
        precision: to compute in; None = as the parameters are. Give the policy's, or the two differ by rounding.
        share: take ``model`` itself, which must then be nobody else's.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        precision: torch.dtype | None = None,
        *,
        share: bool = False,
    ) -> None:
        self.model = model if share else copy.deepcopy(model)
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.model.requires_grad_(False).eval().to(self.device)
        if precision is not None:
            cast_parameters(self.model, precision)
        self._loss_model = LossModel(self.model)

    @torch.no_grad()
    def compute_log_probs(
        self, batch: Batch | Sequence[Batch], temperature: float = 1.0
    ) -> TrainFuture[list[torch.Tensor]]:
        """As ``TrainingBackend.compute_log_probs``."""
        batches: list[Any] = [batch] if isinstance(batch, dict) else list(batch)
        read = log_prob_reader(temperature)
        return ImmediateTrainFuture([self._loss_model(_on(self.device, b), read) for b in batches], "compute_log_probs")

    @torch.no_grad()
    def compute_states(self, batches: Sequence[Batch]) -> TrainFuture[list[Any]]:
        """``ref_logits`` of each micro-batch, for a policy loss with KL ``full``."""
        read = reference_reader()
        return ImmediateTrainFuture([self._loss_model(_on(self.device, b), read) for b in batches], "compute_states")


class BaseModel:
    """The base beneath a backend's adapter: the policy before training, at no cost in memory.

    Raises:
        UserError: the backend's model has no adapter.
    """

    def __init__(self, backend: PyTorchTrainingBackend) -> None:
        if not hasattr(backend.model, "peft_config"):
            raise UserError("the model has no adapter to switch off; take a FrozenModel as the reference")
        self._backend = backend

    def compute_log_probs(
        self, batch: Batch | Sequence[Batch], temperature: float = 1.0
    ) -> TrainFuture[list[torch.Tensor]]:
        """As ``TrainingBackend.compute_log_probs``."""
        return self._backend.compute_log_probs(batch, temperature, adapter=False)

    def compute_states(self, batches: Sequence[Batch]) -> TrainFuture[list[Any]]:
        """As ``FrozenModel.compute_states``."""
        return self._backend.compute_base_states(batches)


def _on(device: torch.device, batch: Batch) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
