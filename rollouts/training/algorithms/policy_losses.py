"""Policy-gradient losses by name, and the one loss function that joins them with KL, entropy and off-policy weights.

Symbols: ℓ log-prob of a sampled token now, ℓ_old at the start of the update, Δ = ℓ - ℓ_old, ρ = e^Δ, A advantage,
sg() stop-gradient. Shapes: N learned tokens, S sequences, B rows, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rollouts.errors import UserError
from rollouts.training.algorithms.aggregation import Sequences, aggregate, check_aggregation
from rollouts.training.algorithms.corrections import CorrectionConfig, correction_terms
from rollouts.training.algorithms.kl import bounded_exp, check_kl_kind, kl_penalty
from rollouts.training.algorithms.log_probs import ReferenceStates, learned_positions, token_statistics
from rollouts.training.sft_losses import DeferredLogits, LossFn, LossOutput, accepts_deferred_logits


@dataclass(frozen=True)
class PolicyLossConfig:
    """One policy loss, complete: what is minimized is agg(w L) + kl_coef agg(KL) - entropy_coef agg(H).

    Args:
        name: a key of ``POLICY_LOSSES``.
        eps_low, eps_high: how far the policy may move down and up; of ratios (1 - eps_low, 1 + eps_high), of log-ratios
            for ``gmpo``, of probabilities or KL for ``dppo_tv`` and ``dppo_kl``. None = the loss's own default, and
            eps_high follows a given eps_low. eps_high > eps_low is DAPO's clip-higher.
        dual_clip: for A < 0 a token's loss is at most this times |A|; above 1; None = off.
        aggregation: see ``aggregate``; None = the loss's own default.
        max_length: L_max of ``seq-mean-token-sum-norm``, in tokens: a constant of the run.
        kl: kind of the KL to the reference, see ``kl_penalty``.
        kl_coef: its weight β in the loss; at 0 it is only measured, if the batch has reference log-probs.
        entropy_coef: weight of the entropy bonus.
        temperature: the sampling temperature; all log-probs are at it.
        tau_positive, tau_negative: ``sapo``'s τ for A > 0 and otherwise.
        covariance_fraction: ``clip_cov`` and ``kl_cov``: the share of the step's tokens that is selected.
        covariance_low, covariance_high: ``clip_cov``: selected tokens have a covariance between them.
        covariance_coef: ``kl_cov``: weight of |Δ| on selected tokens.
        ratio_cap: ``dppo_tv`` and ``dppo_kl``: C, above which ratios are cut.
        drift_coef: ``dro``: β of the quadratic penalty.
        correction: weights for the gap between sampler and trainer, where the batch has ``rollout_log_probs``; a batch
            that brings ``token_weights`` has had it done.

    Raises:
        UserError: a value is unknown or out of range.
    """

    name: str = "ppo_clip"
    eps_low: float | None = None
    eps_high: float | None = None
    dual_clip: float | None = 3.0
    aggregation: str | None = None
    max_length: int | None = None
    kl: str = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    temperature: float = 1.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    covariance_fraction: float = 2e-4
    covariance_low: float = 1.0
    covariance_high: float = 5.0
    covariance_coef: float = 1.0
    ratio_cap: float = 20.0
    drift_coef: float = 0.1
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    def __post_init__(self) -> None:
        if self.name not in POLICY_LOSSES:
            raise UserError(f"policy loss {self.name!r} is unknown; use one of {', '.join(POLICY_LOSSES)}")
        check_aggregation(self.aggregate_by, self.max_length)
        check_kl_kind(self.kl)
        low, high = self.bounds
        if low < 0 or high < 0:
            raise UserError(f"eps_low and eps_high must be 0 or more, got {low} and {high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip must be above 1, got {self.dual_clip}; leave it empty to turn it off")
        for name in ("temperature", "tau_positive", "tau_negative", "ratio_cap"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.covariance_fraction <= 1:
            raise UserError(f"covariance_fraction must be above 0 and at most 1, got {self.covariance_fraction}")

    @property
    def bounds(self) -> tuple[float, float]:
        """(eps_low, eps_high) in force."""
        default_low, default_high = POLICY_LOSSES[self.name].bounds
        low = default_low if self.eps_low is None else self.eps_low
        follows = default_high if self.eps_low is None else self.eps_low
        return low, follows if self.eps_high is None else self.eps_high

    @property
    def aggregate_by(self) -> str:
        """The aggregation in force."""
        return self.aggregation or POLICY_LOSSES[self.name].aggregation


class PolicyTokens(NamedTuple):
    """What a policy loss sees: [N] each, and which sequence a token belongs to; ``log_probs`` is differentiable."""

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    sequences: Sequences
    selected: torch.Tensor | None = None

    @property
    def difference(self) -> torch.Tensor:
        return self.log_probs - self.old_log_probs


TokenLoss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Loss per token [N], and measurements per token [N] whose means are metrics."""


def reinforce(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """-A ℓ (Williams 1992)."""
    return -tokens.advantages * tokens.log_probs, {}


def ppo_clip(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """max(-Aρ, -A clip(ρ, 1 - ε_lo, 1 + ε_hi)); for A < 0 at most -cA (PPO, arXiv:1707.06347; dual clip,
    arXiv:1912.09729; clip-higher, arXiv:2503.14476)."""
    return _clipped(bounded_exp(tokens.difference), tokens.advantages, config)


def gspo(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """``ppo_clip`` with the sequence's ratio s = exp(mean Δ); ρ_t = sg(s) exp(ℓ_t - sg ℓ_t) passes the gradient to each
    token (GSPO-token, arXiv:2507.18071)."""
    ratio = tokens.sequences.spread(bounded_exp(tokens.sequences.means(tokens.difference))).detach()
    return _clipped(ratio * (tokens.log_probs - tokens.log_probs.detach()).exp(), tokens.advantages, config)


def cispo(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """-sg(clip(ρ, 1 - ε_lo, 1 + ε_hi)) A ℓ: no token loses its gradient (MiniMax-M1, arXiv:2506.13585)."""
    low, high = config.bounds
    ratio = bounded_exp(tokens.difference).detach()
    loss = -ratio.clamp(1.0 - low, 1.0 + high) * tokens.advantages * tokens.log_probs
    return loss, {"clip_fraction_low": ratio < 1.0 - low, "clip_fraction_high": ratio > 1.0 + high}


def gmpo(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """-A r with one ratio a sequence, r = exp(mean_t of sign(A) min(sign(A) Δ, sign(A) clip(Δ, -ε_lo, ε_hi))): the
    geometric mean of the clipped ratios (arXiv:2507.20673)."""
    low, high = config.bounds
    difference, sign = tokens.difference, tokens.advantages.sign()
    clipped = sign * torch.minimum(sign * difference, sign * difference.clamp(-low, high))
    ratio = tokens.sequences.spread(bounded_exp(tokens.sequences.means(clipped)))
    return -tokens.advantages * ratio, {
        "clip_fraction_low": (sign < 0) & (difference < -low),
        "clip_fraction_high": (sign > 0) & (difference > high),
    }


def sapo(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """-A (4/τ) σ(τ (ρ - 1)): a soft gate in place of clipping, τ by the sign of A (arXiv:2511.20347)."""
    tau = torch.where(tokens.advantages > 0, config.tau_positive, config.tau_negative)
    gate = torch.sigmoid(tau * (bounded_exp(tokens.difference) - 1.0)) * (4.0 / tau)
    return -tokens.advantages * gate, {}


def clip_cov(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """``ppo_clip`` with the gradient removed on the selected tokens (arXiv:2505.22617); see ``step_fields``."""
    loss, measured = ppo_clip(tokens, config)
    selected = _selected(tokens)
    return torch.where(selected, loss.detach(), loss), {**measured, "selected_fraction": selected}


def kl_cov(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """-Aρ, plus covariance_coef |Δ| on the selected tokens (arXiv:2505.22617); see ``step_fields``."""
    difference, selected = tokens.difference, _selected(tokens)
    penalty = torch.where(selected, config.covariance_coef * difference.abs(), 0.0)
    return -tokens.advantages * bounded_exp(difference) + penalty, {"selected_fraction": selected}


def dppo_tv(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """-A sg(min(ρ, C)) ℓ M, where M leaves out tokens whose probability has moved too far the way A pushes:
    π - π_old > ε_hi (A > 0) or < -ε_lo (A < 0) (arXiv:2602.04879)."""
    low, high = config.bounds
    moved = tokens.log_probs.detach().exp() - tokens.old_log_probs.exp()
    return _masked_by_divergence(tokens, config, too_high=moved > high, too_low=moved < -low)


def dppo_kl(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """As ``dppo_tv``, with the KL of (π_old, 1 - π_old) to (π, 1 - π) as the distance (arXiv:2602.04879)."""
    low, high = config.bounds
    now, old = tokens.log_probs.detach(), tokens.old_log_probs
    # log(1 - e^ℓ) by expm1, guarded where a probability is 1 to float32's last digit.
    rest_now, rest_old = ((-torch.expm1(x)).clamp(min=1e-8) for x in (now, old))
    distance = old.exp() * (old - now) + rest_old * (rest_old.log() - rest_now.log())
    return _masked_by_divergence(
        tokens, config, too_high=(now > old) & (distance > high), too_low=(now < old) & (distance > low)
    )


def dro(tokens: PolicyTokens, config: PolicyLossConfig) -> TokenLoss:
    """-(A ℓ - ½ β Δ²): a quadratic pull towards the old policy (arXiv:2405.19107)."""
    return -(tokens.advantages * tokens.log_probs - 0.5 * config.drift_coef * tokens.difference.square()), {}


class _Registered(NamedTuple):
    loss: Callable[[PolicyTokens, PolicyLossConfig], TokenLoss]
    bounds: tuple[float, float] = (0.2, 0.2)
    aggregation: str = "token-mean"


# name -> loss, default (eps_low, eps_high), default aggregation
POLICY_LOSSES = {
    "reinforce": _Registered(reinforce),
    "ppo_clip": _Registered(ppo_clip),
    "gspo": _Registered(gspo, (3e-4, 4e-4), "seq-mean-token-mean"),
    "cispo": _Registered(cispo, (1.0, 0.2)),
    "gmpo": _Registered(gmpo, (0.4, 0.4), "seq-mean-token-mean"),
    "sapo": _Registered(sapo),
    "clip_cov": _Registered(clip_cov),
    "kl_cov": _Registered(kl_cov),
    "dppo_tv": _Registered(dppo_tv),
    "dppo_kl": _Registered(dppo_kl, (0.05, 0.05)),
    "dro": _Registered(dro),
}


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, config: PolicyLossConfig) -> TokenLoss:
    low, high = config.bounds
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
    gains, loses = advantages > 0, advantages < 0
    measured = {"clip_fraction_low": loses & (ratio < 1.0 - low), "clip_fraction_high": gains & (ratio > 1.0 + high)}
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        measured["dual_clip_fraction"] = loses & (loss > ceiling)
        loss = torch.where(loses, torch.minimum(loss, ceiling), loss)
    return loss, measured


def _masked_by_divergence(
    tokens: PolicyTokens, config: PolicyLossConfig, too_high: torch.Tensor, too_low: torch.Tensor
) -> TokenLoss:
    high, low = (tokens.advantages > 0) & too_high, (tokens.advantages < 0) & too_low
    ratio = bounded_exp(tokens.difference).clamp(max=config.ratio_cap).detach()
    loss = -tokens.advantages * ratio * tokens.log_probs * ~(high | low)
    return loss, {"clip_fraction_low": low, "clip_fraction_high": high}


def _selected(tokens: PolicyTokens) -> torch.Tensor:
    if tokens.selected is None:
        raise UserError(
            "clip_cov and kl_cov select tokens over the whole optimizer step: add what step_fields gives to the batch"
        )
    return tokens.selected


@torch.no_grad()
def step_fields(
    config: PolicyLossConfig, advantages: torch.Tensor, log_probs: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """What a loss needs to know of the whole optimizer step, as fields of its tokens to divide into micro-batches.

    ``clip_cov`` and ``kl_cov`` select tokens by their covariance (A - mean A)(ℓ - mean ℓ) among all tokens of the step:
    ``clip_cov`` a random ``covariance_fraction`` of all tokens from those between ``covariance_low`` and
    ``covariance_high``, ``kl_cov`` the ``covariance_fraction`` with the highest; at least one either way
    (arXiv:2505.22617).

    Args:
        advantages: [N] of all micro-batches and ranks, learned tokens only.
        log_probs: [N] of the policy about to be updated; ``old_log_probs`` are that for the first update of a batch.
        seed: of the random choice.

    Returns:
        {"selected": [N] bool}, or nothing for every other loss.
    """
    if config.name not in ("clip_cov", "kl_cov"):
        return {}
    advantages, log_probs = advantages.double(), log_probs.double()
    covariance = (advantages - advantages.mean()) * (log_probs - log_probs.mean())
    selected = torch.zeros(len(covariance), dtype=torch.bool, device=covariance.device)
    if len(covariance) == 0:
        return {"selected": selected}
    wanted = max(1, int(config.covariance_fraction * len(covariance)))
    if config.name == "kl_cov":
        selected[covariance.topk(wanted).indices] = True
    else:
        between = (covariance > config.covariance_low) & (covariance < config.covariance_high)
        candidates = between.nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:wanted]
        selected[candidates[order.to(candidates.device)]] = True
    return {"selected": selected}


def make_policy_loss(config: PolicyLossConfig) -> LossFn:
    """The loss function of an RL step, for a backend.

    It is called as ``loss_fn(logits, labels, loss_mask, **fields)`` with logits [B, P, V] or ``DeferredLogits``. Fields
    of the N learned tokens, in the order of their positions: ``advantages`` and ``sequence_ids`` (int64); optional
    ``old_log_probs`` (without them the step is taken for on-policy: ρ = 1), ``rollout_log_probs`` (mismatch is measured
    and corrected), ``ref_log_probs`` (KL to the reference) and, for KL ``full``, the reference's ``ref_logits`` ([N, V]
    or ``ReferenceStates``), ``token_weights`` (multiply the policy loss, in place of ``config.correction``) and
    ``selected`` (see ``step_fields``). Other fields are not looked at. Every micro-batch of a step has the same fields.

    Returns of it:
        LossOutput: the sum of the loss under ``config.aggregate_by`` with the count to divide it by, and as metrics
        ``policy_loss``, ``entropy``, ``ratio``, ``approx_kl_k1`` and ``approx_kl_k3`` (to the old policy), clipped and
        selected fractions, ``kl_ref``, and those of ``correction_terms``.
    """
    with_entropy_gradient = config.entropy_coef != 0.0

    @accepts_deferred_logits
    def policy_loss(
        logits: torch.Tensor | DeferredLogits,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        advantages: torch.Tensor,
        sequence_ids: torch.Tensor,
        old_log_probs: torch.Tensor | None = None,
        rollout_log_probs: torch.Tensor | None = None,
        ref_log_probs: torch.Tensor | None = None,
        ref_logits: torch.Tensor | ReferenceStates | None = None,
        token_weights: torch.Tensor | None = None,
        selected: torch.Tensor | None = None,
        **unused: Any,
    ) -> LossOutput:
        positions = learned_positions(logits, loss_mask)
        if advantages.shape != positions.shape or sequence_ids.shape != positions.shape:
            raise UserError(
                f"the batch has {len(positions)} learned tokens, but advantages {list(advantages.shape)} and "
                f"sequence_ids {list(sequence_ids.shape)}: give one of each a learned token"
            )
        found = token_statistics(
            logits, labels, positions, config.temperature,
            entropy=True, entropy_gradient=with_entropy_gradient,
            ref_logits=ref_logits if config.kl.startswith("full") else None,
        )  # fmt: skip
        # Positions bound the number of sequences, and are known without asking the device.
        sequences = Sequences.of(sequence_ids, size=labels.numel())
        old = found.log_probs.detach() if old_log_probs is None else old_log_probs
        return policy_loss_terms(
            config, PolicyTokens(found.log_probs, old, advantages, sequences, selected), found.entropy, found.full_kl,
            rollout_log_probs, ref_log_probs, token_weights,
        )  # fmt: skip

    return policy_loss


def policy_loss_terms(
    config: PolicyLossConfig,
    tokens: PolicyTokens,
    entropy: torch.Tensor | None = None,
    full_kl: torch.Tensor | None = None,
    rollout_log_probs: torch.Tensor | None = None,
    ref_log_probs: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
) -> LossOutput:
    """What ``make_policy_loss`` computes, from log-probs [N] on; ``entropy`` and ``full_kl`` are [N]."""
    per_token, measured = POLICY_LOSSES[config.name].loss(tokens, config)
    if rollout_log_probs is not None:
        correction = correction_terms(tokens.old_log_probs, rollout_log_probs, tokens.sequences, config.correction)
        measured = {**measured, **correction.per_token}
        token_weights = correction.weights if token_weights is None and config.correction.active else token_weights
    elif config.correction.active and token_weights is None:
        raise UserError("an off-policy correction needs the sampler's log-probs: the batch has no rollout_log_probs")
    if token_weights is not None:
        per_token = per_token * token_weights

    def summed(x: torch.Tensor) -> torch.Tensor:
        return aggregate(x, tokens.sequences, config.aggregate_by, config.max_length)[0]

    total, count = aggregate(per_token, tokens.sequences, config.aggregate_by, config.max_length)
    metrics = {"policy_loss": (total.detach(), count)}
    if ref_log_probs is not None or full_kl is not None:
        kl = kl_penalty(tokens.log_probs, ref_log_probs, config.kl, full_kl)
        measured["kl_ref"] = kl
        if config.kl_coef != 0.0:
            total = total + config.kl_coef * summed(kl)
    elif config.kl_coef != 0.0:
        raise UserError(f"kl_coef is {config.kl_coef}, but the batch has no ref_log_probs: compute a reference's first")
    if entropy is not None:
        measured["entropy"] = entropy
        if config.entropy_coef != 0.0:
            total = total - config.entropy_coef * summed(entropy)
    difference = tokens.difference.detach()
    measured["ratio"] = bounded_exp(difference)
    measured["approx_kl_k1"] = -difference
    measured["approx_kl_k3"] = measured["ratio"] - difference - 1.0
    num_tokens = torch.tensor(float(len(difference)), dtype=torch.float32, device=difference.device)
    metrics |= {name: (values.detach().float().sum(), num_tokens) for name, values in measured.items()}
    return LossOutput(total, count, metrics)
