"""The critic's loss: values regress on returns, and move no further than a clip from the values of the rollout.

Shapes: B rows, P positions, N learned tokens, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from rollouts.errors import UserError
from rollouts.training.algorithms.aggregation import Sequences, aggregate, check_aggregation
from rollouts.training.algorithms.log_probs import learned_positions
from rollouts.training.sft_losses import DeferredLogits, LossFn, LossOutput, accepts_deferred_logits


@dataclass(frozen=True)
class ValueLossConfig:
    """Args:
    clip: how far a value may move from the rollout's before it stops learning; None = any distance.
    aggregation, max_length: see ``aggregate``.
    """

    clip: float | None = 0.5
    aggregation: str = "token-mean"
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.max_length)
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"the value clip must be above 0, got {self.clip}; leave it empty to turn it off")


def scalar_outputs(logits: torch.Tensor | DeferredLogits, rows: torch.Tensor) -> torch.Tensor:
    """[n] float32 of a model's value head, or of one whose only logit [B, P, 1] it is, at flat positions ``rows``."""
    if isinstance(logits, DeferredLogits):
        hidden, weight, bias = logits.hidden.flatten(0, 1)[rows], logits.weight, logits.bias
        if logits.value_weight is not None:
            weight, bias = logits.value_weight, None
        outputs = hidden.float() @ weight[0].float()
        return outputs if bias is None else outputs + bias[0].float()
    return logits.flatten(0, 1)[rows, 0].float()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None = 0.5
) -> torch.Tensor:
    """½ max((V - G)², (clip(V, V_old ± c) - G)²) of each token [N] (PPO, arXiv:1707.06347; as in its first code)."""
    loss = (values - returns).square()
    if clip is not None:
        near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
        loss = torch.maximum(loss, (near - returns).square())
    return 0.5 * loss


def make_value_loss(config: ValueLossConfig | None = None) -> LossFn:
    """The loss function of a critic, whose values are read at the position before each learned token.

    It is called as ``loss_fn(logits, labels, loss_mask, *, values, returns, sequence_ids, **_)`` with [N] each; values
    are those of the rollout. Metrics: ``value_loss``, ``value_mean``, ``return_mean``, ``value_error`` (mean |V - G|),
    ``value_error_squared`` and ``value_clip_fraction`` (tokens whose gradient the clip removed).
    """
    config = config or ValueLossConfig()

    @accepts_deferred_logits
    def loss_fn(
        logits: torch.Tensor | DeferredLogits,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        values: torch.Tensor,
        returns: torch.Tensor,
        sequence_ids: torch.Tensor,
        **unused: Any,
    ) -> LossOutput:
        now = scalar_outputs(logits, learned_positions(logits, loss_mask) - 1)
        per_token = value_loss(now, values, returns, config.clip)
        sequences = Sequences.of(sequence_ids, size=labels.numel())
        total, count = aggregate(per_token, sequences, config.aggregation, config.max_length)
        error = now.detach() - returns
        measured = {
            "value_mean": now,
            "return_mean": returns,
            "value_error": error.abs(),
            "value_error_squared": error.square(),
            "value_clip_fraction": per_token > 0.5 * error.square(),
        }
        tokens = torch.tensor(float(len(now)), dtype=torch.float32, device=now.device)
        metrics = {name: (x.detach().float().sum(), tokens) for name, x in measured.items()}
        return LossOutput(total, count, {"value_loss": (total.detach(), count), **metrics})

    return loss_fn


def make_shared_loss(policy_loss: LossFn, value_loss: LossFn, value_coef: float) -> LossFn:
    """The loss of a policy and of the critic on its trunk: L_policy + c L_value (PPO, arXiv:1707.06347, eq. 9).

    Both must aggregate alike, for there is one count to divide by. With ``values_alone`` among the batch's fields the
    head learns and the trunk rests. Metrics are the policy's, and the value loss's as ``critic/...``.
    """

    @accepts_deferred_logits
    def loss_fn(
        logits: DeferredLogits,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        values_alone: bool = False,
        **fields: Any,
    ) -> LossOutput:
        seen = replace(logits, hidden=logits.hidden.detach()) if values_alone else logits
        value: Any = value_loss(seen, labels, loss_mask, **fields)
        total, metrics = value_coef * value.total, {f"critic/{name}": found for name, found in value.metrics.items()}
        if values_alone:
            return LossOutput(total, value.count, metrics)
        policy: Any = policy_loss(logits, labels, loss_mask, **fields)
        return LossOutput(policy.total + total, policy.count, {**policy.metrics, **metrics})

    return loss_fn
