"""GRPO and PPO losses under their plain names, for padded or packed rows, made of ``rollouts.training.algorithms``.

Shapes: B rows, P positions, N learned tokens, S samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from rollouts.errors import UserError
from rollouts.training.algorithms.advantages import AdvantageBatch, AdvantageConfig, compute_advantages
from rollouts.training.algorithms.aggregation import Sequences
from rollouts.training.algorithms.log_probs import learned_positions
from rollouts.training.algorithms.policy_losses import (
    PolicyLossConfig,
    PolicyTokens,
    make_policy_loss,
    policy_loss_terms,
)
from rollouts.training.sft_losses import DeferredLogits, LossOutput, accepts_deferred_logits
from rollouts.training.types import RLTrainingConfig, Sample

GRPO = PolicyLossConfig("ppo_clip", aggregation="seq-mean-token-mean")
_PLAIN = PolicyLossConfig("reinforce", aggregation="seq-mean-token-mean")


@accepts_deferred_logits
def grpo_loss(
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    advantages: torch.Tensor,
    sequence_ids: torch.Tensor | None = None,
    **fields: Any,
) -> LossOutput:
    """The policy gradient in its plainest form: ``-sum_i A_i mean_t log p(token)`` over sequences.

    Args:
        logits: [B, P, V] or ``DeferredLogits``; position t - 1 predicts token t (the shift happens here).
        labels: [B, P] int64, the tokens; loss_mask: [B, P], not 0 on those to learn.
        advantages: [B], one a row; or [N], one a learned token.
        sequence_ids: [N] int64, for packed rows; None = a row is a sequence.

    Returns:
        LossOutput: the sum, and as its count the sequences that have learned tokens.
    """
    return _on_tokens(_PLAIN, logits, labels, loss_mask, advantages, sequence_ids, fields)


@accepts_deferred_logits
def ppo_loss(
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor,
    clip_range: float = 0.2,
    sequence_ids: torch.Tensor | None = None,
    **fields: Any,
) -> LossOutput:
    """The clipped objective, ``sum max(-A r, -A clip(r, 1 ± clip_range))`` over learned tokens (arXiv:1707.06347).

    Arguments as in ``grpo_loss``, and:
        old_log_probs: [N] of the learned tokens, or [B, P] of all.

    Returns:
        LossOutput: the sum, and as its count the learned tokens.
    """
    if old_log_probs.ndim == 2:
        old_log_probs = old_log_probs.flatten()[learned_positions(logits, loss_mask)]
    config = PolicyLossConfig("ppo_clip", eps_low=clip_range, dual_clip=None)
    fields = {**fields, "old_log_probs": old_log_probs}
    return _on_tokens(config, logits, labels, loss_mask, advantages, sequence_ids, fields)


def compute_grpo_loss(
    samples: Sequence[Sample],
    config: PolicyLossConfig | RLTrainingConfig | None = None,
    log_probs: torch.Tensor | None = None,
) -> LossOutput:
    """The GRPO loss of judged samples: advantages from their rewards in their groups, clipped ratios to the rollout.

    Args:
        samples: with ``reward``, ``group_id`` and ``rollout_log_probs``.
        config: of the loss; a training configuration gives its ``advantage`` estimator, where that is a name.
        log_probs: [N] of the learned tokens, sample after sample, differentiable; None = those of the rollout, which
            gives the loss (not the gradient) at the moment of sampling.

    Raises:
        UserError: a sample has no reward or no log-probs.
    """
    for sample in samples:
        for name in ("reward", "rollout_log_probs"):
            if getattr(sample, name) is None:
                raise UserError(f"sample {sample.id!r} has no {name}: score and sample it before the loss")
    estimator: Any = AdvantageConfig("grpo")
    if isinstance(config, RLTrainingConfig):
        if not isinstance(config.advantage, str):
            raise UserError(
                "compute_grpo_loss takes an estimator by name; call your own function and policy_loss_terms"
            )
        estimator = AdvantageConfig(config.advantage, **config.advantage_options)
    places = [[t for t in range(1, len(s)) if s.loss_mask[t]] for s in samples]
    ids = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(p) for p in places], dtype=torch.int64))
    rewards = torch.tensor([float(s.reward or 0.0) for s in samples], dtype=torch.float64)
    groups = [s.group_id or f"\0{i}" for i, s in enumerate(samples)]
    advantages = compute_advantages(estimator, AdvantageBatch(rewards, groups, ids)).advantages
    sampled = [float(s.rollout_log_probs[t]) for s, p in zip(samples, places) for t in p]  # type: ignore[index]
    old = torch.tensor(sampled, dtype=torch.float32)
    tokens = PolicyTokens(old if log_probs is None else log_probs, old, advantages, Sequences.of(ids, len(samples)))
    return policy_loss_terms(config if isinstance(config, PolicyLossConfig) else GRPO, tokens)


def compute_group_advantages(
    rewards: Sequence[float] | torch.Tensor, group_ids: Sequence[Hashable] | None = None, normalize_std: bool = True
) -> torch.Tensor:
    """(R - μ_g) / (σ_g + 1e-6) [S] float32, without the division when ``normalize_std`` is False (Dr. GRPO).

    ``group_ids`` [S] tell the groups; None = all are one. A group of one has its reward.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    config = AdvantageConfig("grpo", norm_by_std=normalize_std)
    batch = AdvantageBatch(rewards, group_ids or [0] * len(rewards), torch.arange(len(rewards)))
    return compute_advantages(config, batch).advantages


def _on_tokens(
    config: PolicyLossConfig,
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    advantages: torch.Tensor,
    sequence_ids: torch.Tensor | None,
    fields: dict[str, Any],
) -> LossOutput:
    """Spread what is given a row over its learned tokens, and compute the loss."""
    if sequence_ids is None:
        rows = learned_positions(logits, loss_mask) // labels.shape[1]
        sequence_ids = rows
        if len(advantages) == len(labels):
            advantages = advantages[rows]
    return make_policy_loss(config)(
        logits, labels, loss_mask, advantages=advantages, sequence_ids=sequence_ids, **fields
    )  # type: ignore[return-value]
