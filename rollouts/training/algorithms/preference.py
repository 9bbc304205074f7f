"""Learning from preferences without rollouts: DPO, IPO, SimPO and ORPO over pairs, KTO over single answers.

A batch of pairs holds the chosen answer of pair p as sequence 2p and the rejected one as sequence 2p + 1, in the same
micro-batch. A pair with an answer that has no learned token teaches nothing and does not count.

Symbols: ℓ the sum of an answer's log-probs, ℓ̄ their mean, ref the frozen reference.
Shapes: N learned tokens, S sequences, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from rollouts.errors import UserError
from rollouts.training.algorithms.aggregation import Sequences
from rollouts.training.algorithms.log_probs import learned_positions, token_log_probs
from rollouts.training.sft_losses import DeferredLogits, LossFn, LossOutput, accepts_deferred_logits

PREFERENCE_LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")
_MEANS = ("simpo", "orpo")  # what these papers put between the signs is a mean over tokens, not a sum


@dataclass(frozen=True)
class PreferenceConfig:
    """Args:
        name: one of ``PREFERENCE_LOSSES``.
        beta: of dpo, ipo, kto (0.1 is usual), simpo (2.0); of orpo its λ, the weight of the odds ratio (0.1).
        label_smoothing: dpo: the probability that a label is wrong (conservative DPO).
        margin: simpo's γ, how much better the chosen answer must be.
        length_normalized: compare means over tokens in place of sums. None = as the paper of the loss has it; True with
            ipo or dpo are the length-normalized forms in use elsewhere.
        desirable_weight, undesirable_weight: kto's λ_D and λ_U.

    Raises:
        UserError: a value is unknown or out of range.
    """

    name: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    length_normalized: bool | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in PREFERENCE_LOSSES:
            raise UserError(f"preference loss {self.name!r} is unknown; use one of {', '.join(PREFERENCE_LOSSES)}")
        if self.beta <= 0:
            raise UserError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")

    @property
    def over_means(self) -> bool:
        return self.name in _MEANS if self.length_normalized is None else self.length_normalized

    @property
    def needs_reference(self) -> bool:
        return self.name in ("dpo", "ipo", "kto")


class Answers(NamedTuple):
    """Log-probs of answers [P] under the policy and, for losses that have one, the reference: sums or means."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor | float = 0.0
    ref_rejected: torch.Tensor | float = 0.0


def pair_loss(answers: Answers, config: PreferenceConfig) -> torch.Tensor:
    """The loss of each pair [P], from h = (ℓ_c - ℓ_c^ref) - (ℓ_r - ℓ_r^ref).

    - dpo: -log σ(βh), smoothed: -(1 - s) log σ(βh) - s log σ(-βh) (arXiv:2305.18290)
    - ipo: (h - 1/(2β))² (arXiv:2310.12036)
    - simpo: -log σ(β (ℓ̄_c - ℓ̄_r) - γ) (arXiv:2405.14734)
    - orpo: -ℓ̄_c - λ log σ(log odds_c - log odds_r), odds = p/(1 - p), p = e^ℓ̄ (arXiv:2403.07691)
    """
    h = (answers.chosen - answers.ref_chosen) - (answers.rejected - answers.ref_rejected)
    if config.name == "dpo":
        smooth = config.label_smoothing
        return -(1 - smooth) * F.logsigmoid(config.beta * h) - smooth * F.logsigmoid(-config.beta * h)
    if config.name == "ipo":
        return (h - 1.0 / (2.0 * config.beta)).square()
    if config.name == "simpo":
        return -F.logsigmoid(config.beta * h - config.margin)
    odds = h - (_log_rest(answers.chosen) - _log_rest(answers.rejected))
    return -answers.chosen - config.beta * F.logsigmoid(odds)


def kto_loss(
    log_ratios: torch.Tensor, desirable: torch.Tensor, reference_point: torch.Tensor, config: PreferenceConfig
) -> torch.Tensor:
    """λ_D (1 - σ(β (r - z))) of a desirable answer, λ_U (1 - σ(β (z - r))) of another (arXiv:2402.01306).

    Args:
        log_ratios: [S], r = ℓ - ℓ^ref; desirable: [S] bool; reference_point: [], z, see ``kto_reference_point``.
    """
    gains = config.beta * (log_ratios - reference_point)
    liked = config.desirable_weight * (1.0 - torch.sigmoid(gains))
    return torch.where(desirable, liked, config.undesirable_weight * (1.0 - torch.sigmoid(-gains)))


@torch.no_grad()
def kto_reference_point(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, sequence_ids: torch.Tensor
) -> torch.Tensor:
    """KTO's z []: max(0, mean of ℓ - ℓ^ref) over answers to *other* prompts, an estimate of KL(policy || reference).

    To be computed once over the whole optimizer step, so that the loss does not depend on how the step is divided.

    Args:
        log_probs, ref_log_probs: [N] of mismatched answers (each prompt with its neighbor's answer).
        sequence_ids: [N] int64, 0..S-1; a sequence without tokens does not count.
    """
    sequences = Sequences.of(sequence_ids)
    return (sequences.sums(log_probs - ref_log_probs).sum() / sequences.count.clamp(min=1.0)).clamp(min=0.0)


def make_preference_loss(config: PreferenceConfig) -> LossFn:
    """The loss function of preference training.

    It is called as ``loss_fn(logits, labels, loss_mask, *, sequence_ids, ref_log_probs, **_)``, both [N] of the learned
    tokens; SimPO and ORPO have no reference. KTO also takes ``desirable`` [S] bool and ``reference_point`` [].

    Returns of it:
        LossOutput: the sum over pairs (KTO: answers) and their number; as metrics the implicit ``reward_chosen``,
        ``reward_rejected``, ``reward_margin``, the ``accuracy`` with which the chosen one is ahead, and the mean
        ``log_prob_chosen`` and ``log_prob_rejected`` of tokens.
    """

    @accepts_deferred_logits
    def loss_fn(
        logits: torch.Tensor | DeferredLogits,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        sequence_ids: torch.Tensor,
        ref_log_probs: torch.Tensor | None = None,
        desirable: torch.Tensor | None = None,
        reference_point: torch.Tensor | None = None,
        **unused: Any,
    ) -> LossOutput:
        log_probs, _ = token_log_probs(logits, labels, learned_positions(logits, loss_mask))
        if not config.needs_reference:
            return _pairs_output(log_probs, None, pair_sequences(sequence_ids), config)
        if ref_log_probs is None:
            raise UserError(f"{config.name} needs ref_log_probs: compute the reference's log-probs first")
        if config.name == "kto":
            if desirable is None or reference_point is None:
                raise UserError("kto needs desirable [S] and reference_point [] (see kto_reference_point)")
            sequences = Sequences.of(sequence_ids, size=len(desirable))
            ratios = sequences.sums(log_probs - ref_log_probs)
            return _kto_output(ratios, desirable.bool(), reference_point, sequences, config)
        return _pairs_output(log_probs, ref_log_probs, pair_sequences(sequence_ids), config)

    return loss_fn


def pair_sequences(sequence_ids: torch.Tensor) -> Sequences:
    """Sequences 0..2P-1 of P pairs, from the ids [N] of their learned tokens."""
    size = int(sequence_ids.max()) + 1 if len(sequence_ids) else 0
    return Sequences.of(sequence_ids, size=size + size % 2)


def _pairs_output(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor | None, sequences: Sequences, config: PreferenceConfig
) -> LossOutput:
    reduce = sequences.means if config.over_means else sequences.sums
    learned = (sequences.lengths[0::2] > 0) & (sequences.lengths[1::2] > 0)  # [P]

    def split(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        per_answer = reduce(per_token)
        return per_answer[0::2][learned], per_answer[1::2][learned]

    answers = Answers(*split(log_probs), *(split(ref_log_probs) if ref_log_probs is not None else (0.0, 0.0)))
    total = pair_loss(answers, config).sum()
    count = learned.sum().float()
    scale = 1.0 if config.name == "orpo" else config.beta
    chosen = scale * (answers.chosen - answers.ref_chosen).detach()
    rejected = scale * (answers.rejected - answers.ref_rejected).detach()
    means = sequences.means(log_probs.detach())
    measured = {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "accuracy": chosen > rejected,
        "log_prob_chosen": means[0::2][learned],
        "log_prob_rejected": means[1::2][learned],
    }
    return LossOutput(total, count, {name: (x.float().sum(), count) for name, x in measured.items()})


def _kto_output(
    ratios: torch.Tensor, desirable: torch.Tensor, point: torch.Tensor, sequences: Sequences, config: PreferenceConfig
) -> LossOutput:
    learned = sequences.lengths > 0
    total = torch.where(learned, kto_loss(ratios, desirable, point, config), 0.0).sum()
    rewards = config.beta * ratios.detach()
    metrics = {"reference_point": (point * sequences.count, sequences.count)}
    for name, of in (("reward_chosen", learned & desirable), ("reward_rejected", learned & ~desirable)):
        metrics[name] = (torch.where(of, rewards, 0.0).sum(), of.sum().float())
    return LossOutput(total, sequences.count, metrics)


def _log_rest(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x <= 0; x is kept below -1e-6, where 1 - e^x is not yet 0 in float32."""
    x = log_p.clamp(max=-1e-6)
    return torch.log(-torch.expm1(x))
