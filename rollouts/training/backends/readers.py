"""What is read from a model beside its loss: log-probs of tokens and what goes with them, and the values of a critic.

Shapes: B rows, S positions, N learned tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from rollouts.training.algorithms.log_probs import (
    ReferenceStates,
    learned_positions,
    token_log_probs,
    token_statistics,
)
from rollouts.training.algorithms.value import scalar_outputs
from rollouts.training.sft_losses import DeferredLogits, LossFn, accepts_deferred_logits

Logits = torch.Tensor | DeferredLogits


def log_prob_reader(temperature: float) -> LossFn:
    """A function with a loss's arguments that gives the log-probs [N] float32 of the learned tokens."""

    @accepts_deferred_logits
    def read(logits: Logits, labels: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        return token_log_probs(logits, labels, learned_positions(logits, loss_mask), temperature)[0]

    return read


def log_prob_and_value_reader(temperature: float) -> LossFn:
    """A function with a loss's arguments that gives log-probs and values [N, 2] float32 of the learned tokens."""
    read_log_probs: Any = log_prob_reader(temperature)

    @accepts_deferred_logits
    def read(logits: Logits, labels: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        log_probs = read_log_probs(logits, labels, loss_mask)
        values: Any = read_values(logits, labels, loss_mask)
        return torch.stack((log_probs, values), dim=-1)

    return read


def reference_reader(is_base: bool = False) -> LossFn:
    """A function with a loss's arguments that gives what a reference's logits at the learned tokens are made of: the
    states before them, or the logits [N, V] of a model that computes them itself.

    Args:
        is_base: the reference is the policy without its adapter, so that they have one output layer.
    """

    @accepts_deferred_logits
    def read(logits: Logits, labels: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> Any:
        rows = learned_positions(logits, loss_mask) - 1
        if not isinstance(logits, DeferredLogits):
            return logits.flatten(0, 1)[rows]
        states = logits.hidden.flatten(0, 1)[rows]
        return ReferenceStates(states, None) if is_base else ReferenceStates(states, logits.weight, logits.bias)

    return read


def collision_reader(temperature: float) -> LossFn:
    """A function with a loss's arguments that gives the sum over v of p(v)² [N] float32 at the learned tokens."""

    @accepts_deferred_logits
    def read(logits: Logits, labels: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        positions = learned_positions(logits, loss_mask)
        collision = token_statistics(logits, labels, positions, temperature, collision=True).collision
        assert collision is not None
        return collision

    return read


@accepts_deferred_logits
def read_values(logits: Logits, labels: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    """[N] float32 from a critic, whose only logit is a value: what it expects before each learned token is written."""
    return scalar_outputs(logits, learned_positions(logits, loss_mask) - 1)
