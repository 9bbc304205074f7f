"""Advantage estimators by name, computed once over the whole batch of a step, before it is cut into micro-batches.

Groups are formed by explicit ids. A group of one has baseline 0 and scale 1: its advantage is its reward. Advantages
of tokens that are not learned are 0.

Shapes: S sequences, M response tokens of all sequences back to back, K rewards, L longest response. Tensors are padded
to [S, L] inside, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch

from rollouts.errors import UserError

STD_EPS = 1e-6  # added to a group's standard deviation
WHITEN_EPS = 1e-8  # added to a variance


@dataclass(frozen=True)
class AdvantageConfig:
    """Which estimator, and its constants.

    Args:
        name: a key of ``ESTIMATORS``.
        norm_by_std: ``grpo``, ``grpo_passk`` and ``gdpo``: divide by the group's standard deviation; False is Dr. GRPO.
        gamma: discount of later rewards.
        lam: λ of ``gae``.
        reward_weights: ``gdpo``: weight of each reward, in the order of the columns; empty = 1 each.
    """

    name: str = "grpo"
    norm_by_std: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    reward_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ESTIMATORS:
            raise UserError(f"advantage estimator {self.name!r} is unknown; use one of {', '.join(ESTIMATORS)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True)
class AdvantageBatch:
    """What estimators compute from: all samples of a step.

    Attributes:
        rewards: [S], outcome of each sequence; [S, K] for ``gdpo``. NaN = the sequence has none and is no member of its
            group, which only a sequence without learned tokens may be.
        group_ids: S ids; samples of one prompt share one.
        sequence_ids: [M] int64 in 0..S-1, in the order of the tokens.
        mask: [M], 0 for tokens that are not learned; None = all are.
        token_rewards: [M], added to the outcome, which counts at the sequence's last learned token; 0 where masked.
        values: [M], the critic's (``gae``).
        greedy_rewards: [S], reward of a greedy rollout of the same prompt (``remax``).
        log_probs, collision: [M], log π(token) and sum_v π(v)², see ``token_statistics`` (``optimal_token_baseline``).
        process_rewards: [M], β (log π_RM - log π_ref) of each token (``prime``).
    """

    rewards: torch.Tensor
    group_ids: Sequence[Hashable]
    sequence_ids: torch.Tensor
    mask: torch.Tensor | None = None
    token_rewards: torch.Tensor | None = None
    values: torch.Tensor | None = None
    greedy_rewards: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    collision: torch.Tensor | None = None
    process_rewards: torch.Tensor | None = None


class Advantages(NamedTuple):
    """Of each response token [M] float32, 0 where masked; ``returns`` is the critic's target (``gae`` only).

    ``metrics``: ``groups``, ``singleton_groups`` and ``zero_variance_groups`` (of two or more, all rewards the same).
    """

    advantages: torch.Tensor
    returns: torch.Tensor | None
    metrics: dict[str, float]


@overload
def compute_advantages(config: AdvantageConfig | str, batch: AdvantageBatch, /) -> Advantages: ...
@overload
def compute_advantages(rewards: Sequence[float], baseline: float = 0.0) -> list[float]: ...
def compute_advantages(*args: Any, **kwargs: Any) -> Advantages | list[float]:
    """Advantages of a batch by an estimator; ``compute_advantages(rewards, baseline)`` is plain subtraction.

    Args:
        config: an ``AdvantageConfig``, or an estimator's name for its default constants.
        batch: an ``AdvantageBatch``.

    Raises:
        UserError: the estimator needs what the batch lacks, a reward lies on a token that is not learned, or a sequence
            to learn from has no reward.
    """
    if args and isinstance(args[0], (str, AdvantageConfig)):
        return _estimate(*args, **kwargs)
    return _subtract(*args, **kwargs)


def _subtract(rewards: Sequence[float], baseline: float = 0.0) -> list[float]:
    return [reward - baseline for reward in rewards]


@torch.no_grad()
def _estimate(config: AdvantageConfig | str, batch: AdvantageBatch) -> Advantages:
    config = AdvantageConfig(config) if isinstance(config, str) else config
    if batch.rewards.ndim == 2 and config.name != "gdpo":
        raise UserError(
            f"{config.name} takes one reward a sample, got {batch.rewards.shape[1]}: add them up, or use gdpo"
        )
    rows = _Padded.of(batch)
    groups = _Groups.of(rows.outcomes if rows.outcomes.ndim == 1 else rows.outcomes.sum(1), batch.group_ids)
    found = ESTIMATORS[config.name](rows, groups, config)
    advantages, returns = found if isinstance(found, tuple) else (found, None)
    if advantages.ndim == 1:  # one a sequence
        advantages = advantages[:, None].expand_as(rows.mask)

    def flat(padded: torch.Tensor) -> torch.Tensor:
        return torch.where(rows.mask, padded, 0.0)[rows.index].float()  # also hides the NaN of a row without reward

    return Advantages(flat(advantages), None if returns is None else flat(returns), groups.counts)


# Estimators: (rows, groups, config) -> one number a sequence [S] or a token [S, L], or (advantages, returns) ----------


def grpo(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """(R - μ_g) / (σ_g + 1e-6), σ with ddof = 1 (arXiv:2402.03300); undivided it is Dr. GRPO (arXiv:2503.20783)."""
    return _grpo(rows.outcomes, groups, config)


def rloo(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """N/(N-1) (R - μ_g): the mean of the others as baseline (arXiv:2402.14740)."""
    return groups.leave_one_out(rows.outcomes)


def reinforce_plus_plus(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """Return-to-go, whitened over the batch's tokens (arXiv:2501.03262)."""
    return whiten(return_to_go(rows.rewards, rows.mask, config.gamma), rows.mask)


def reinforce_plus_plus_baseline(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """R - μ_g, whitened over the batch's tokens (arXiv:2501.03262)."""
    centered = groups.centered(rows.outcomes)
    return whiten(centered[:, None].expand_as(rows.mask), rows.mask)


def remax(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """Return-to-go, less the reward of the prompt's greedy rollout (arXiv:2310.10505)."""
    if rows.batch.greedy_rewards is None:
        raise UserError("remax needs greedy_rewards: the reward of one greedy rollout of each sample's prompt")
    return return_to_go(rows.rewards, rows.mask, config.gamma) - rows.batch.greedy_rewards.double()[:, None]


def gae(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γλ A_{t+1}, whitened; returns are A + V before that (arXiv:1506.02438).

    Masked tokens are skipped: the next token of t is the next learned one.
    """
    values = rows.padded("values", "gae")
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        learned = rows.mask[:, t]
        delta = rows.rewards[:, t] + config.gamma * next_value - values[:, t]
        advantage = delta + config.gamma * config.lam * next_advantage
        next_value = torch.where(learned, values[:, t], next_value)
        next_advantage = torch.where(learned, advantage, next_advantage)
        advantages[:, t] = next_advantage
    return whiten(advantages, rows.mask), advantages + values


def opo(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """R minus the group's mean reward weighted by response length (arXiv:2505.23585)."""
    lengths = rows.mask.sum(1).double() * groups.has_reward
    rewards = rows.outcomes
    mean = groups.sums(lengths * rewards.nan_to_num()) / groups.sums(lengths).clamp(min=1.0)  # no token, no advantage
    return rewards - torch.where(groups.single, 0.0, mean[groups.of_row])


def gpg(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """α (R - μ_g), α = B / #{R ≠ μ_g}: as if samples that teach nothing were not there (arXiv:2504.02546)."""
    centered = groups.centered(rows.outcomes)
    teaches = (centered.abs() > 1e-9) & groups.has_reward  # NaN compares false
    return centered * (groups.has_reward.sum() / teaches.sum().clamp(min=1))


def grpo_passk(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """(R_1st - R_2nd) / (σ_g + 1e-6) for the best sample of a group, 0 for the rest (arXiv:2503.19595)."""
    rewards = rows.outcomes
    advantages = torch.zeros_like(rewards)
    scale = groups.scale(rewards, config.norm_by_std)
    for members in groups.members:
        if len(members) == 1:
            advantages[members] = rewards[members]
        elif len(members) > 1:
            (best, second), order = rewards[members].topk(2)
            winner = members[int(order[0])]
            advantages[winner] = (best - second) / scale[winner]
    return advantages


def gdpo(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """Several rewards, each normalized in its group by itself: whiten(Σ_k w_k grpo(R^k)) (arXiv:2601.05242)."""
    rewards = rows.outcomes if rows.outcomes.ndim == 2 else rows.outcomes[:, None]
    weights = config.reward_weights or (1.0,) * rewards.shape[1]
    if len(weights) != rewards.shape[1]:
        raise UserError(f"gdpo has {len(weights)} reward_weights for {rewards.shape[1]} rewards: give one each")
    total = sum(w * _grpo(rewards[:, k], groups, config) for k, w in enumerate(weights))
    assert isinstance(total, torch.Tensor)
    return whiten(total[:, None].expand_as(rows.mask), rows.mask)


def optimal_token_baseline(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """G_t - b_t with b_t = Σ_i G_it W_it / Σ_i W_it over the group's samples that learn a token at t, and
    W_t = Σ_{s≤t} (1 - 2π_s + Σ_v π_s(v)²), the squared length of the score function's gradient in the logits."""
    log_probs = rows.padded("log_probs", "optimal_token_baseline")
    collision = rows.padded("collision", "optimal_token_baseline")
    returns = return_to_go(rows.rewards, rows.mask, config.gamma)
    weights = ((1.0 - 2.0 * log_probs.exp() + collision) * rows.mask).cumsum(1) * rows.mask
    numerator, denominator = groups.sums(returns * weights), groups.sums(weights)
    # A weight of 0 is a distribution without choice: nothing to subtract from, nothing to learn.
    baseline = torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), 0.0)
    return returns - torch.where(groups.single[:, None], 0.0, baseline[groups.of_row])


def prime(rows: _Padded, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    """RLOO of the outcome plus RLOO of the process rewards' sums, as return-to-go, whitened (arXiv:2502.01456).

    The outcome's share lies on the last learned token. The process rewards' baseline, the mean sum of the other
    samples, is spread evenly over the sample's tokens, so that at its first token the return is RLOO of the sums.
    """
    process = rows.padded("process_rewards", "prime") * rows.mask
    sums = process.sum(1)
    baseline = (sums - groups.leave_one_out(sums)) / rows.mask.sum(1).clamp(min=1)
    token_rewards = process - baseline[:, None] + rows.at_last_token(groups.leave_one_out(rows.outcomes))
    return whiten(return_to_go(token_rewards, rows.mask, config.gamma), rows.mask)


_Estimator = Callable[["_Padded", "_Groups", AdvantageConfig], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]

ESTIMATORS: dict[str, _Estimator] = {
    function.__name__: function
    for function in (
        grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, remax, gae, opo, gpg, grpo_passk, gdpo,
        optimal_token_baseline, prime,
    )
}  # fmt: skip


# Their parts ----------------------------------------------------------------------------------------------------------


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) rsqrt(var + 1e-8) over the entries with mask 1, var with ddof = 1; masked entries are 0.

    Fewer than two valid entries are left as they are.
    """
    valid = x[mask > 0]
    if len(valid) >= 2:
        x = (x - valid.mean()) * torch.rsqrt(valid.var() + WHITEN_EPS)
    return torch.where(mask > 0, x, 0.0)


def return_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """Σ_{s≥t} γ^(s-t) r_s of each token [S, L]; masked tokens have no reward and take no time."""
    returns = torch.zeros_like(rewards)
    following = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(mask[:, t] > 0, rewards[:, t] + gamma * following, following)
        returns[:, t] = following
    return returns * (mask > 0)


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int, factor: float = 1.0) -> torch.Tensor:
    """min(0, (L_max - buffer - length) / buffer) · factor, to add to rewards [S] (DAPO, arXiv:2503.14476)."""
    if not 0 < buffer <= max_length:
        raise UserError(f"the overlong buffer must be in 1..{max_length} (the longest response), got {buffer}")
    return ((max_length - buffer - lengths.double()) / buffer).clamp(max=0.0) * factor


def _grpo(rewards: torch.Tensor, groups: _Groups, config: AdvantageConfig) -> torch.Tensor:
    return groups.centered(rewards) / groups.scale(rewards, config.norm_by_std)


@dataclass(frozen=True)
class _Groups:
    """Rows that share a group id; rows without a reward are in no group's statistics.

    Attributes:
        of_row: [S] int64, the group of each row; single: [S] bool, whether it is a group of one.
        has_reward: [S] bool; sizes: [G], rows with a reward; members: their indices, group by group.
    """

    of_row: torch.Tensor
    single: torch.Tensor
    has_reward: torch.Tensor
    sizes: torch.Tensor
    members: list[list[int]]
    counts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rewards: torch.Tensor, ids: Sequence[Hashable]) -> _Groups:
        if len(ids) != len(rewards):
            raise UserError(f"{len(rewards)} rewards and {len(ids)} group ids: give one of each a sample")
        number = {group: i for i, group in enumerate(dict.fromkeys(ids))}
        of_row = torch.tensor([number[group] for group in ids], dtype=torch.int64, device=rewards.device)
        has_reward = ~rewards.isnan()
        members: list[list[int]] = [[] for _ in number]
        for row, (group, known) in enumerate(zip(of_row.tolist(), has_reward.tolist(), strict=True)):
            if known:
                members[group].append(row)
        sizes = torch.tensor([float(len(m)) for m in members], dtype=torch.float64, device=rewards.device)
        flat = [m for m in members if len(m) > 1 and bool((rewards[m] == rewards[m[0]]).all())]
        counts = {
            "groups": float(len(members)),
            "singleton_groups": float((sizes == 1).sum()),
            "zero_variance_groups": float(len(flat)),
        }
        return cls(of_row, sizes[of_row] == 1, has_reward, sizes, members, counts)

    def sums(self, per_row: torch.Tensor) -> torch.Tensor:
        """[S, ...] -> [G, ...]"""
        return per_row.new_zeros(len(self.sizes), *per_row.shape[1:]).index_add_(0, self.of_row, per_row)

    def means(self, per_row: torch.Tensor) -> torch.Tensor:
        """[S] -> [S], each row's group mean over the rows that have a reward."""
        known = torch.where(self.has_reward, per_row, 0.0)
        return (self.sums(known) / self.sizes.clamp(min=1.0))[self.of_row]

    def centered(self, per_row: torch.Tensor) -> torch.Tensor:
        """x - μ_g [S]; x in a group of one."""
        return per_row - torch.where(self.single, 0.0, self.means(per_row))

    def scale(self, per_row: torch.Tensor, by_std: bool) -> torch.Tensor:
        """σ_g + 1e-6 [S], ddof = 1; 1 in a group of one, or everywhere unless ``by_std``."""
        if not by_std:
            return torch.ones_like(per_row)
        squares = (per_row - self.means(per_row)).square()
        variance = self.means(squares) * (self.sizes / (self.sizes - 1.0).clamp(min=1.0))[self.of_row]
        return torch.where(self.single, 1.0, variance.sqrt() + STD_EPS)

    def leave_one_out(self, per_row: torch.Tensor) -> torch.Tensor:
        """x minus the mean of the group's others [S]: N/(N-1) (x - μ_g); x in a group of one."""
        sizes = self.sizes[self.of_row]
        return self.centered(per_row) * (sizes / (sizes - 1.0).clamp(min=1.0))


@dataclass(frozen=True)
class _Padded:
    """A batch as rows: what is flat [M] becomes [S, L].

    Attributes:
        index: (row [M], column [M]) of each token; mask: [S, L] bool.
        outcomes: [S] or [S, K] float64, rewards with the sums of token rewards in them.
        rewards: [S, L] float64, token rewards with the outcome at the last learned token.
    """

    batch: AdvantageBatch
    index: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor
    outcomes: torch.Tensor
    rewards: torch.Tensor

    @classmethod
    def of(cls, batch: AdvantageBatch) -> _Padded:
        ids = batch.sequence_ids
        count, size = len(batch.rewards), len(ids)
        if size and int(ids.max()) >= count:
            raise UserError(f"sequence id {int(ids.max())} has no reward: there are {count} rewards")
        order = torch.argsort(ids, stable=True)
        lengths = torch.bincount(ids, minlength=count)
        starts = lengths.cumsum(0) - lengths
        column = torch.empty_like(ids)
        column[order] = torch.arange(size, device=ids.device) - starts[ids[order]]
        index = (ids, column)
        mask = torch.zeros(count, int(lengths.max()) if count else 0, dtype=torch.bool, device=ids.device)
        mask[index] = True if batch.mask is None else batch.mask > 0
        outcomes = batch.rewards.double()
        missing = (outcomes.isnan() if outcomes.ndim == 1 else outcomes.isnan().any(1)) & mask.any(1)
        if missing.any():
            raise UserError(
                f"sample {int(missing.nonzero()[0])} of the batch has no reward (NaN) but tokens to learn: mask them"
            )
        token_rewards = torch.zeros(mask.shape, dtype=torch.float64, device=ids.device)
        if batch.token_rewards is not None:
            token_rewards[index] = batch.token_rewards.double()
            if (token_rewards[~mask] != 0).any():
                raise UserError("a token reward lies on a token that is not learned; move it to a learned one")
            if outcomes.ndim == 1:
                outcomes = outcomes + token_rewards.sum(1)
        rows = cls(batch, index, mask, outcomes, token_rewards)
        if outcomes.ndim == 1:
            token_rewards += rows.at_last_token(batch.rewards.double())
        return rows

    @property
    def single_reward(self) -> torch.Tensor:
        if self.outcomes.ndim != 1:
            raise UserError(
                f"this estimator takes one reward a sample, got {self.outcomes.shape[1]}: sum them, or gdpo"
            )
        return self.outcomes

    def at_last_token(self, per_row: torch.Tensor) -> torch.Tensor:
        """[S] -> [S, L], at each row's last learned token; a row without any has none."""
        placed = torch.zeros(self.mask.shape, dtype=torch.float64, device=self.mask.device)
        rows = self.mask.any(1).nonzero()[:, 0]
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        last = torch.where(self.mask[rows], columns, -1).amax(1) if len(rows) else rows
        placed[rows, last] = per_row[rows]
        return placed

    def padded(self, name: str, estimator: str) -> torch.Tensor:
        """A field of the batch [M] as [S, L]."""
        flat = getattr(self.batch, name)
        if flat is None:
            raise UserError(f"{estimator} needs {name} of each token: add them to the batch")
        rows = torch.zeros(self.mask.shape, dtype=torch.float64, device=self.mask.device)
        rows[self.index] = flat.double()
        return rows
