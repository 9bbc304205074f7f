"""Off-policy correction: the sampler's log-probs are not quite the trainer's, so tokens are weighted or left out.

With d = ℓ_old - ℓ_rollout, the ratio of a token is e^d and that of a sequence e^(sum of its d). Truncated importance
sampling (TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"), IcePop
(Ling team 2025, arXiv:2510.18855), masked importance sampling and geometric masking (Liu et al. 2025, "When speed kills
stability").

Shapes: N learned tokens, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from rollouts.errors import UserError
from rollouts.training.algorithms.aggregation import Sequences
from rollouts.training.algorithms.kl import bounded_exp


@dataclass(frozen=True)
class CorrectionConfig:
    """What to do about the gap between sampler and trainer. Left-out tokens have weight 0 and still count in means.

    Args:
        weight: weigh each token's policy loss by the ratio of the ``token`` or of its ``sequence``; ``none`` = by 1.
        cap: weights above it are cut to it (truncation); None = as they are.
        mask: leave out tokens by the ratio of the ``token``, of the ``sequence``, or of the sequence's ``geometric``
            mean e^(mean of its d); ``none`` = leave out nothing.
        mask_low, mask_high: ratios that stay.
        veto_below: leave out a sequence that has any token with a ratio below this (1e-4 is usual); None = never.

    Raises:
        UserError: a value is unknown or out of range.
    """

    weight: str = "none"
    cap: float | None = None
    mask: str = "none"
    mask_low: float = 0.5
    mask_high: float = 2.0
    veto_below: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("weight", _WEIGHTS), ("mask", _MASKS)):
            if getattr(self, name) not in known:
                raise UserError(f"correction.{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        if self.cap is not None and self.cap <= 0:
            raise UserError(f"correction.cap must be above 0, got {self.cap}")
        if not 0 <= self.mask_low <= self.mask_high:
            raise UserError(f"correction.mask_low {self.mask_low} must be 0 or more, and at most {self.mask_high}")

    @property
    def active(self) -> bool:
        return self.weight != "none" or self.mask != "none" or self.veto_below is not None


_WEIGHTS = ("none", "token", "sequence")
_MASKS = ("none", "token", "sequence", "geometric")

CORRECTIONS = {
    "none": CorrectionConfig(),
    "tis": CorrectionConfig(weight="token", cap=2.0),
    "sequence_tis": CorrectionConfig(weight="sequence", cap=2.0),
    "icepop": CorrectionConfig(weight="token", mask="token", mask_low=0.5, mask_high=5.0),
    "mis": CorrectionConfig(weight="sequence", mask="sequence", mask_low=0.0, mask_high=2.0),
    "geometric": CorrectionConfig(mask="geometric", mask_low=0.99, mask_high=1.01),
}


def named_correction(name: str, **changes: Any) -> CorrectionConfig:
    """A correction by its name in the field, with some of its fields changed."""
    if name not in CORRECTIONS:
        raise UserError(f"correction {name!r} is unknown; use one of {', '.join(CORRECTIONS)}")
    return replace(CORRECTIONS[name], **changes)


class Correction(NamedTuple):
    """Weights of tokens, and what was done to get them; none of it carries a gradient.

    Attributes:
        weights: [N] float32, to multiply each token's policy loss with.
        per_token: name -> [N] float32; their means over the step's tokens are the metrics.
    """

    weights: torch.Tensor
    per_token: dict[str, torch.Tensor]


@torch.no_grad()
def correction_terms(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, sequences: Sequences, config: CorrectionConfig
) -> Correction:
    """The correction of whole sequences, in a micro-batch or a step.

    Args:
        old_log_probs: [N] of the trainer's policy at the start of the update.
        rollout_log_probs: [N] that the sampler reported.

    Returns:
        weights (all 1 without correction), and per token: ``mismatch_kl``, the k3 estimate e^d - d - 1 of
        KL(sampler || trainer), ``mismatch_abs`` |d|, ``truncated_fraction``, ``masked_fraction``, and ``ratio_weight``
        and ``ratio_weight_squared``, of whose means ``effective_sample_size`` makes the share of samples that count:
        of the weights, or of the plain token ratios where nothing is corrected.
    """
    difference = old_log_probs - rollout_log_probs
    token_ratio = bounded_exp(difference)
    ratios = {
        "token": lambda: token_ratio,
        "sequence": lambda: sequences.spread(bounded_exp(sequences.sums(difference))),
        "geometric": lambda: sequences.spread(bounded_exp(sequences.means(difference))),
    }
    weights = torch.ones_like(difference) if config.weight == "none" else ratios[config.weight]()
    truncated = torch.zeros_like(difference)
    if config.cap is not None and config.weight != "none":
        truncated = (weights > config.cap).float()
        weights = weights.clamp(max=config.cap)
    stays = torch.ones_like(difference)
    if config.mask != "none":
        ratio = ratios[config.mask]()
        stays = ((ratio >= config.mask_low) & (ratio <= config.mask_high)).float()
    if config.veto_below is not None:
        vetoed = sequences.sums((token_ratio < config.veto_below).float()) > 0
        stays = stays * (~sequences.spread(vetoed)).float()
    weights = weights * stays
    shown = weights if config.active else token_ratio
    per_token = {
        "mismatch_kl": token_ratio - difference - 1.0,
        "mismatch_abs": difference.abs(),
        "truncated_fraction": truncated,
        "masked_fraction": 1.0 - stays,
        "ratio_weight": shown,
        "ratio_weight_squared": shown.square(),
    }
    return Correction(weights, per_token)


def effective_sample_size(mean: float, mean_of_squares: float) -> float:
    """(sum w)² / (n sum w²) in 0..1: the share of the samples that the weights leave effective (Kish 1965)."""
    return mean * mean / mean_of_squares if mean_of_squares > 0 else 0.0


def correction_weights(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, sequence_ids: torch.Tensor, config: CorrectionConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """For a whole optimizer step at once: ``token_weights`` [N] for the batch, and the step's metrics with
    ``effective_sample_size``."""
    weights, per_token = correction_terms(old_log_probs, rollout_log_probs, Sequences.of(sequence_ids), config)
    metrics = {name: values.mean().item() if len(values) else 0.0 for name, values in per_token.items()}
    metrics["effective_sample_size"] = effective_sample_size(metrics["ratio_weight"], metrics["ratio_weight_squared"])
    return weights, metrics
