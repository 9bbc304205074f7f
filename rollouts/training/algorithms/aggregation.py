"""From a loss per token to the sum and count of an optimizer step, and sums over sequences.

Shapes: N learned tokens, S sequences. A sequence's tokens share one of ``sequence_ids`` [N].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollouts.errors import UserError

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class Sequences:
    """Which sequence each token belongs to.

    Attributes:
        ids: [N] int64 in 0..S-1.
        lengths: [S] float32, learned tokens of each sequence; 0 for one that has none here.
    """

    ids: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, size: int | None = None) -> Sequences:
        """From ids [N]; ``size`` is S or anything above (given, it saves a GPU a synchronization)."""
        if size is None:
            size = int(ids.max()) + 1 if len(ids) else 0
        ones = torch.ones(len(ids), dtype=torch.float32, device=ids.device)
        return cls(ids, ones.new_zeros(size).index_add_(0, ids, ones))

    @property
    def count(self) -> torch.Tensor:
        """[] float32: sequences that have at least one learned token."""
        return (self.lengths > 0).sum().float()

    def sums(self, per_token: torch.Tensor) -> torch.Tensor:
        """[N] -> [S]"""
        return per_token.new_zeros(len(self.lengths)).index_add(0, self.ids, per_token)

    def means(self, per_token: torch.Tensor) -> torch.Tensor:
        """[N] -> [S]; 0 for a sequence without tokens."""
        return self.sums(per_token) / self.lengths.clamp(min=1.0)

    def spread(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """[S] -> [N]: every token gets its sequence's value."""
        return per_sequence[self.ids]


def aggregate(
    per_token: torch.Tensor, sequences: Sequences, aggregation: str, max_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum [], count []): summed over micro-batches and ranks, then divided once, they are the scalar loss.

    With L the loss of a token, l_i the learned tokens of sequence i, and T and S the tokens and sequences of the whole
    optimizer step (sequences without learned tokens do not count):

    - ``token-mean``: sum L / T (DAPO, arXiv:2503.14476)
    - ``seq-mean-token-sum``: sum_i sum_t L / S
    - ``seq-mean-token-mean``: sum_i (sum_t L / l_i) / S (GRPO, arXiv:2402.03300)
    - ``seq-mean-token-sum-norm``: sum_i sum_t L / (S max_length) (Dr. GRPO, arXiv:2503.20783)

    Args:
        per_token: [N].
        max_length: tokens, a constant of the run; for ``seq-mean-token-sum-norm`` only.

    Raises:
        UserError: the aggregation is unknown, or ``max_length`` is missing.
    """
    check_aggregation(aggregation, max_length)
    if aggregation == "token-mean":
        return per_token.sum(), torch.tensor(float(len(per_token)), dtype=torch.float32, device=per_token.device)
    if aggregation == "seq-mean-token-mean":
        return (per_token / sequences.spread(sequences.lengths)).sum(), sequences.count  # l_i >= 1: it has this token
    divisor = max_length if aggregation == "seq-mean-token-sum-norm" and max_length else 1
    return per_token.sum() / divisor, sequences.count


def check_aggregation(aggregation: str, max_length: int | None) -> None:
    if aggregation not in AGGREGATIONS:
        raise UserError(f"aggregation {aggregation!r} is unknown; use one of {', '.join(AGGREGATIONS)}")
    if aggregation == "seq-mean-token-sum-norm" and not (max_length and max_length > 0):
        raise UserError(
            "aggregation seq-mean-token-sum-norm divides by a constant length: give max_length, the longest response"
        )
