"""Training the judges: a reward model on pairs (Bradley-Terry), and an implicit process reward model (PRIME).

Shapes: B rows, P positions, N learned tokens, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rollouts.training.algorithms.aggregation import Sequences
from rollouts.training.algorithms.log_probs import learned_positions, token_log_probs
from rollouts.training.algorithms.preference import pair_sequences
from rollouts.training.algorithms.value import scalar_outputs
from rollouts.training.sft_losses import DeferredLogits, LossFn, LossOutput, accepts_deferred_logits


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log σ(r_chosen - r_rejected) of each pair (Bradley and Terry 1952; arXiv:2203.02155)."""
    return -F.logsigmoid(chosen - rejected)


def sequence_scores(
    logits: torch.Tensor | DeferredLogits, loss_mask: torch.Tensor, sequence_ids: torch.Tensor, size: int
) -> torch.Tensor:
    """Scores [size] float32 of a model with one logit: at the last learned token of each sequence, which has seen all
    of it. A sequence without learned tokens gets the score of position 0, which says nothing."""
    positions = learned_positions(logits, loss_mask)
    last = positions.new_zeros(size).scatter_reduce(0, sequence_ids, positions, "amax")
    return scalar_outputs(logits, last)


@accepts_deferred_logits
def reward_model_loss(
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    sequence_ids: torch.Tensor,
    **unused: Any,
) -> LossOutput:
    """Bradley-Terry over pairs laid out as in ``preference``: chosen answers are even sequences, rejected ones odd.

    Args:
        logits: [B, P, 1] or ``DeferredLogits`` of a model with one output.
        loss_mask: [B, P], not 0 on the answers; the score is read at the last such token of each.
        sequence_ids: [N] int64.

    Returns:
        LossOutput: the sum over pairs and their number; metrics ``accuracy``, ``score_chosen``, ``score_rejected`` and
        ``score_margin``.
    """
    sequences = pair_sequences(sequence_ids)
    scores = sequence_scores(logits, loss_mask, sequence_ids, len(sequences.lengths))
    learned = (sequences.lengths[0::2] > 0) & (sequences.lengths[1::2] > 0)
    chosen, rejected = scores[0::2][learned], scores[1::2][learned]
    count = learned.sum().float()
    measured = {
        "accuracy": chosen > rejected,
        "score_chosen": chosen,
        "score_rejected": rejected,
        "score_margin": chosen - rejected,
    }
    metrics = {name: (x.detach().float().sum(), count) for name, x in measured.items()}
    return LossOutput(bradley_terry_loss(chosen, rejected).sum(), count, metrics)


def process_rewards(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """β (log π_RM - log π_ref) of each token [N]: what PRIME takes for the value of a step (arXiv:2502.01456)."""
    return beta * (log_probs - ref_log_probs)


def make_prime_loss(beta: float = 0.05) -> LossFn:
    """Cross-entropy of σ(β Σ_t (ℓ^RM - ℓ^ref)) against correctness (implicit PRM, arXiv:2412.01981).

    It is called as ``loss_fn(logits, labels, loss_mask, *, sequence_ids, ref_log_probs, correct, **_)`` with
    ``ref_log_probs`` [N] and ``correct`` [S] in 0..1. The sum is over sequences with learned tokens; metrics
    ``accuracy`` and ``process_reward`` (mean sum of a sequence).
    """

    @accepts_deferred_logits
    def prime_loss(
        logits: torch.Tensor | DeferredLogits,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        sequence_ids: torch.Tensor,
        ref_log_probs: torch.Tensor,
        correct: torch.Tensor,
        **unused: Any,
    ) -> LossOutput:
        log_probs, _ = token_log_probs(logits, labels, learned_positions(logits, loss_mask))
        sequences = Sequences.of(sequence_ids, size=len(correct))
        rewards = sequences.sums(process_rewards(log_probs, ref_log_probs, beta))
        learned = sequences.lengths > 0
        per_sequence = F.binary_cross_entropy_with_logits(rewards, correct.to(rewards.dtype), reduction="none")
        measured = {"accuracy": (rewards > 0) == (correct > 0.5), "process_reward": rewards.detach()}
        metrics = {name: ((x * learned).float().sum(), sequences.count) for name, x in measured.items()}
        return LossOutput(torch.where(learned, per_sequence, 0.0).sum(), sequences.count, metrics)

    return prime_loss
