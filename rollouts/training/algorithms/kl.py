"""KL divergence to a reference policy, estimated from the sampled tokens; KL in the reward; its coefficient over time.

Shapes: N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollouts.errors import UserError

# Exponents are those of a difference of log-probs clamped to this; e^20 is 5e8.
MAX_EXPONENT = 20.0

KL_KINDS = ("k1", "abs", "k2", "k3", "full")


def bounded_exp(x: torch.Tensor) -> torch.Tensor:
    """e^x with x clamped to ±20."""
    return x.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def check_kl_kind(kind: str) -> None:
    if kind.removesuffix("+") not in KL_KINDS:
        raise UserError(
            f"KL kind {kind!r} is unknown; use one of {', '.join(KL_KINDS)}, or one of them with a + suffix"
        )


def kl_penalty(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor | None, kind: str, full_kl: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(policy || reference) at each token [N], from d = log_probs - ref_log_probs (Schulman, "Approximating KL
    divergence", 2020).

    k1: d · abs: |d| · k2: d²/2 · k3: e^-d + d - 1, never negative · full: the exact sum over the vocabulary, given as
    ``full_kl``. A ``+`` suffix keeps the value and takes the gradient of k2, the one of the true KL in expectation:
    k2 - sg(k2) + sg(value).

    Args:
        log_probs, ref_log_probs: [N] of the sampled tokens; the reference's may be None for ``full``.
        full_kl: [N], see ``token_statistics``.

    Raises:
        UserError: the kind is unknown, or what it needs is missing.
    """
    check_kl_kind(kind)
    base = kind.removesuffix("+")
    if base == "full" and full_kl is None:
        raise UserError("KL kind full needs the reference's logits (ref_logits); k3 needs its log-probs only")
    if (base != "full" or kind.endswith("+")) and ref_log_probs is None:
        raise UserError(f"KL kind {kind} needs the reference's log-probs (ref_log_probs)")
    difference = log_probs - ref_log_probs if ref_log_probs is not None else None
    if base == "full":
        value = full_kl
    else:
        value = {
            "k1": lambda d: d,
            "abs": lambda d: d.abs(),
            "k2": lambda d: 0.5 * d.square(),
            "k3": lambda d: bounded_exp(-d) + d - 1.0,
        }[base](difference)
    if kind.endswith("+"):
        k2 = 0.5 * difference.square()  # type: ignore[union-attr]
        return k2 - k2.detach() + value.detach()  # type: ignore[union-attr]
    return value  # type: ignore[return-value]


def kl_in_reward(
    token_rewards: torch.Tensor, log_probs: torch.Tensor, ref_log_probs: torch.Tensor, coef: float, kind: str = "k1"
) -> torch.Tensor:
    """Rewards per token [N] with the KL taken off: r_t - coef * kl_t (Ziegler et al. 2019, arXiv:1909.08593)."""
    return token_rewards - coef * kl_penalty(log_probs, ref_log_probs, kind).detach()


@dataclass
class FixedKLController:
    """A KL coefficient that stays."""

    coef: float

    def update(self, kl: float, num_steps: int) -> float:
        """Returns the coefficient; the measured KL changes nothing."""
        return self.coef


@dataclass
class AdaptiveKLController:
    """A KL coefficient that follows a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Attributes:
        coef: now; the whole state, for a checkpoint.
        target: KL wanted, in nats.
        horizon: samples over which a constant error of 20% or more changes the coefficient by 20%.
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        if self.target <= 0 or self.horizon <= 0:
            raise UserError(f"KL target and horizon must be above 0, got {self.target} and {self.horizon}")

    def update(self, kl: float, num_steps: int) -> float:
        """coef <- coef (1 + clip(kl / target - 1, ±0.2) num_steps / horizon); returns it."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_steps / self.horizon
        return self.coef


KLController = FixedKLController | AdaptiveKLController
