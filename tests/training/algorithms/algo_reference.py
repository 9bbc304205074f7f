"""The project's formulas in float64 NumPy, one sequence and one token at a time, over padded rows.

Written from the formulas alone; the package computes over unpadded tokens instead. ``sg`` arguments are the values
behind a stop-gradient: passed apart, so that finite differences of these functions are the gradients.
Shapes: S sequences, L width, mask [S, L] of 0 and 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def ragged_batch(seed: int, scale: float = 0.5) -> dict[str, Any]:
    """Eight responses of at most nine tokens: a usual group with tool tokens masked out, a group of one, a group whose
    rewards are all the same, a row without learned tokens, a response of one token."""
    rng = np.random.default_rng(seed)
    lengths = [9, 6, 4, 7, 1, 5, 3, 8]
    mask = np.zeros((8, 9))
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    mask[0, 3:5] = 0  # a tool's output between two turns
    mask[7, 2] = 0
    mask[6] = 0  # fully masked
    old = -rng.exponential(1.0, size=mask.shape) - 0.01
    return {
        "mask": mask,
        "log_probs": np.minimum(old + scale * rng.normal(size=mask.shape), -1e-3),
        "old": old,
        "rollout": np.minimum(old + 0.5 * rng.normal(size=mask.shape), -1e-4),
        "ref": np.minimum(old + 0.5 * rng.normal(size=mask.shape), -1e-4),
        "advantages": rng.normal(size=mask.shape) * mask,
        "entropy": rng.exponential(1.0, size=mask.shape),
        "values": rng.normal(size=mask.shape),
        "rewards": np.array([1.0, 0.0, 0.3, 0.7, 0.5, 0.5, 0.2, 1.0]),
        "groups": ["a", "b", "a", "single", "same", "same", "a", "b"],
        "rng": rng,
    }


def clamp(x: float) -> float:
    return min(max(x, -20.0), 20.0)


def policy_loss(name: str, lp: Array, sg: Array, old: Array, adv: Array, mask: Array, o: dict[str, Any]) -> Array:
    """Loss per token [S, L]; ``o`` has lo, hi, c, tau_pos, tau_neg, cap, beta, coef and selected [S, L]."""
    loss = np.zeros_like(lp)
    for i in range(lp.shape[0]):
        valid = [t for t in range(lp.shape[1]) if mask[i, t]]
        for t in valid:
            a, d, sgd = adv[i, t], lp[i, t] - old[i, t], sg[i, t] - old[i, t]
            rho, sg_rho = np.exp(clamp(d)), np.exp(clamp(sgd))
            if name == "reinforce":
                loss[i, t] = -a * lp[i, t]
            elif name in ("ppo_clip", "gspo", "clip_cov"):
                if name == "gspo":
                    s = np.exp(clamp(sum(sg[i, u] - old[i, u] for u in valid) / len(valid)))
                    rho = s * np.exp(lp[i, t] - sg[i, t])
                if name == "clip_cov" and o["selected"][i, t]:
                    rho = sg_rho
                value = max(-a * rho, -a * min(max(rho, 1 - o["lo"]), 1 + o["hi"]))
                if a < 0 and o["c"] is not None:
                    value = min(value, -o["c"] * a)
                loss[i, t] = value
            elif name == "cispo":
                loss[i, t] = -min(max(sg_rho, 1 - o["lo"]), 1 + o["hi"]) * a * lp[i, t]
            elif name == "gmpo":
                parts = []
                for u in valid:
                    s, du = np.sign(adv[i, u]), lp[i, u] - old[i, u]
                    parts.append(s * min(s * du, s * min(max(du, -o["lo"]), o["hi"])))
                loss[i, t] = -a * np.exp(clamp(sum(parts) / len(parts)))
            elif name == "sapo":
                tau = o["tau_pos"] if a > 0 else o["tau_neg"]
                loss[i, t] = -a * (4 / tau) / (1 + np.exp(-tau * (rho - 1)))
            elif name == "kl_cov":
                loss[i, t] = -a * rho + (o["coef"] * abs(d) if o["selected"][i, t] else 0.0)
            elif name in ("dppo_tv", "dppo_kl"):
                p, q = np.exp(sg[i, t]), np.exp(old[i, t])
                keep = True
                if name == "dppo_tv":
                    keep = p - q <= o["hi"] if a > 0 else p - q >= -o["lo"]
                else:
                    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
                    keep = (p <= q or kl <= o["hi"]) if a > 0 else (p >= q or kl <= o["lo"])
                loss[i, t] = -a * min(sg_rho, o["cap"]) * lp[i, t] * keep
            elif name == "dro":
                loss[i, t] = -(a * lp[i, t] - 0.5 * o["beta"] * d * d)
            else:
                raise KeyError(name)
    return loss


def covariance_candidates(lp: Array, adv: Array, mask: Array) -> Array:
    """(A - mean A)(ℓ - mean ℓ) [S, L]; NaN on masked tokens."""
    valid = mask > 0
    covariance = np.full(lp.shape, np.nan)
    covariance[valid] = (adv[valid] - adv[valid].mean()) * (lp[valid] - lp[valid].mean())
    return covariance


def aggregate(loss: Array, mask: Array, how: str, max_length: int | None = None) -> float:
    rows = [i for i in range(len(mask)) if mask[i].sum() > 0]
    if how == "token-mean":
        return float((loss * mask).sum() / mask.sum())
    if how == "seq-mean-token-sum":
        return float(sum((loss[i] * mask[i]).sum() for i in rows) / len(rows))
    if how == "seq-mean-token-mean":
        return float(sum((loss[i] * mask[i]).sum() / mask[i].sum() for i in rows) / len(rows))
    if how == "seq-mean-token-sum-norm":
        assert max_length
        return float(sum((loss[i] * mask[i]).sum() for i in rows) / (len(rows) * max_length))
    raise KeyError(how)


def kl(kind: str, lp: Array, sg: Array, ref: Array) -> Array:
    """Value and gradient of the estimator; a + suffix moves along k2 from the base's value."""
    base = kind.removesuffix("+")

    def value(x: Array) -> Array:
        d = x - ref
        return {"k1": d, "abs": abs(d), "k2": d * d / 2, "k3": np.exp(np.clip(-d, -20, 20)) + d - 1}[base]

    if kind.endswith("+"):
        return (lp - ref) ** 2 / 2 - (sg - ref) ** 2 / 2 + value(sg)
    return value(lp)


def correction(old: Array, rollout: Array, mask: Array, o: dict[str, Any]) -> tuple[Array, dict[str, float]]:
    """Weights [S, L] and metrics; ``o`` has weight, cap, mask, lo, hi, veto."""
    weights, shown = np.zeros_like(old), []
    truncated = masked = 0
    d = old - rollout
    for i in range(len(old)):
        valid = [t for t in range(old.shape[1]) if mask[i, t]]
        total = sum(d[i, t] for t in valid)
        vetoed = o["veto"] is not None and any(np.exp(d[i, t]) < o["veto"] for t in valid)
        for t in valid:
            ratio = {"none": 1.0, "token": np.exp(d[i, t]), "sequence": np.exp(clamp(total))}
            w = ratio[o["weight"]]
            if o["cap"] is not None and w > o["cap"]:
                w, truncated = o["cap"], truncated + 1
            judged = {**ratio, "geometric": np.exp(total / len(valid))}[o["mask"]]
            if vetoed or (o["mask"] != "none" and not o["lo"] <= judged <= o["hi"]):
                w, masked = 0.0, masked + 1
            weights[i, t] = w
            plain = o["weight"] == o["mask"] == "none" and o["veto"] is None
            shown.append(np.exp(d[i, t]) if plain else w)
    n, valid_d = mask.sum(), d[mask > 0]
    metrics = {
        "mismatch_kl": (np.exp(valid_d) - valid_d - 1).mean(),
        "mismatch_abs": abs(valid_d).mean(),
        "truncated_fraction": truncated / n,
        "masked_fraction": masked / n,
        "effective_sample_size": np.sum(shown) ** 2 / (n * np.sum(np.square(shown))),
    }
    return weights, metrics


def finite_differences(function: Any, x: Array, mask: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function at the unmasked entries of x."""
    grad = np.zeros_like(x)
    for place in zip(*np.nonzero(mask), strict=True):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        grad[place] = (function(up) - function(down)) / (2 * step)
    return grad


# Advantages: rewards [S], groups S ids, mask [S, L], r [S, L] rewards per token -> [S, L] -----------------------


def group_mean_std(values: Array, groups: list[str], i: int) -> tuple[float, float, int]:
    """(mean, standard deviation with ddof 1, size) of row i's group; a group of one has mean 0 and deviation 1."""
    members = [values[j] for j in range(len(values)) if groups[j] == groups[i]]
    if len(members) == 1:
        return 0.0, 1.0, 1
    return float(np.mean(members)), float(np.std(members, ddof=1)), len(members)


def whiten(x: Array, mask: Array) -> Array:
    valid = x[mask > 0]
    if len(valid) < 2:
        return x * mask
    return (x - valid.mean()) / np.sqrt(valid.var(ddof=1) + 1e-8) * mask


def to_go(r: Array, mask: Array, gamma: float) -> Array:
    out = np.zeros_like(r)
    for i in range(len(r)):
        valid = [t for t in range(r.shape[1]) if mask[i, t]]
        for k, t in enumerate(valid):
            out[i, t] = sum(gamma**j * r[i, u] for j, u in enumerate(valid[k:]))
    return out


def outcome_at_end(rewards: Array, mask: Array) -> Array:
    r = np.zeros_like(mask)
    for i in range(len(mask)):
        if mask[i].any():
            r[i, np.nonzero(mask[i])[0][-1]] = rewards[i]
    return r


def advantages(name: str, b: dict[str, Any], o: dict[str, Any]) -> Array:
    """``o`` has norm, gamma, lam, greedy [S], many [S, K], weights [K], token_rewards, collision, process."""
    mask, groups = b["mask"], b["groups"]
    n = len(mask)
    rewards = b["rewards"] + (o["token_rewards"] * mask).sum(1)
    r = o["token_rewards"] * mask + outcome_at_end(b["rewards"], mask)

    def grpo(values: Array) -> Array:
        out = []
        for i in range(n):
            mean, std, size = group_mean_std(values, groups, i)
            out.append((values[i] - mean) / ((std + 1e-6 if size > 1 else 1.0) if o["norm"] else 1.0))
        return np.array(out)

    def rloo(values: Array) -> Array:
        out = []
        for i in range(n):
            others = [values[j] for j in range(n) if groups[j] == groups[i] and j != i]
            out.append(values[i] - (np.mean(others) if others else 0.0))
        return np.array(out)

    def rows(values: Array) -> Array:
        return values[:, None] * mask

    if name == "grpo":
        return rows(grpo(rewards))
    if name == "rloo":
        return rows(rloo(rewards))
    if name == "reinforce_plus_plus":
        return whiten(to_go(r, mask, o["gamma"]), mask)
    if name == "reinforce_plus_plus_baseline":
        return whiten(rows(np.array([rewards[i] - group_mean_std(rewards, groups, i)[0] for i in range(n)])), mask)
    if name == "remax":
        return (to_go(r, mask, o["gamma"]) - o["greedy"][:, None]) * mask
    if name == "gae":
        return whiten(gae(r, b["values"], mask, o["gamma"], o["lam"]), mask)
    if name == "opo":
        out = np.zeros(n)
        for i in range(n):
            members = [j for j in range(n) if groups[j] == groups[i]]
            weighed = sum(mask[j].sum() * rewards[j] for j in members) / sum(mask[j].sum() for j in members)
            out[i] = rewards[i] - (weighed if len(members) > 1 else 0.0)
        return rows(out)
    if name == "gpg":
        centered = np.array([rewards[i] - group_mean_std(rewards, groups, i)[0] for i in range(n)])
        return rows(centered * n / np.sum(abs(centered) > 1e-9))
    if name == "grpo_passk":
        out = np.zeros(n)
        for g in set(groups):
            members = sorted((j for j in range(n) if groups[j] == g), key=lambda j: -rewards[j])
            if len(members) == 1:
                out[members[0]] = rewards[members[0]]
            else:
                std = np.std([rewards[j] for j in members], ddof=1)
                gap = rewards[members[0]] - rewards[members[1]]
                out[members[0]] = gap / (std + 1e-6 if o["norm"] else 1.0)
        return rows(out)
    if name == "gdpo":
        return whiten(rows(sum(w * grpo(o["many"][:, k]) for k, w in enumerate(o["weights"]))), mask)
    if name == "optimal_token_baseline":
        returns, weight = to_go(r, mask, o["gamma"]), np.zeros_like(mask)
        for i in range(n):
            total = 0.0
            for t in range(mask.shape[1]):
                total += (1 - 2 * np.exp(b["old"][i, t]) + o["collision"][i, t]) * mask[i, t]
                weight[i, t] = total
        out = np.zeros_like(mask)
        for i in range(n):
            members = [j for j in range(n) if groups[j] == groups[i]]
            for t in range(mask.shape[1]):
                if mask[i, t]:
                    here = [j for j in members if mask[j, t]]
                    base = sum(returns[j, t] * weight[j, t] for j in here) / sum(weight[j, t] for j in here)
                    out[i, t] = returns[i, t] - (base if len(members) > 1 else 0.0)
        return out
    if name == "prime":
        outcome, sums = rloo(rewards), (o["process"] * mask).sum(1)
        process = rloo(sums)
        token = outcome_at_end(outcome, mask)
        for i in range(n):
            for t in range(mask.shape[1]):
                if mask[i, t]:
                    token[i, t] += o["process"][i, t] - (sums[i] - process[i]) / mask[i].sum()
        return whiten(to_go(token, mask, o["gamma"]), mask)
    raise KeyError(name)


def gae(r: Array, values: Array, mask: Array, gamma: float, lam: float) -> Array:
    """As the sum Σ_l (γλ)^l δ_{t+l} over learned tokens alone."""
    out = np.zeros_like(r)
    for i in range(len(r)):
        valid = [t for t in range(r.shape[1]) if mask[i, t]]
        v = [*(values[i, t] for t in valid), 0.0]
        delta = [r[i, t] + gamma * v[k + 1] - v[k] for k, t in enumerate(valid)]
        for k, t in enumerate(valid):
            out[i, t] = sum((gamma * lam) ** j * d for j, d in enumerate(delta[k:]))
    return out


# Preferences and judges, one pair at a time --------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def pair_loss(name: str, c: Array, r: Array, ref_c: Array, ref_r: Array, o: dict[str, Any]) -> float:
    """Loss of one pair from the log-probs [tokens] of its answers; ``o`` has beta, smoothing, margin, means."""

    def size(x: Array) -> float:
        return len(x) if o["means"] else 1.0

    h = (c.sum() - ref_c.sum()) / size(c) - (r.sum() - ref_r.sum()) / size(r)
    if name == "dpo":
        s = o["smoothing"]
        return -(1 - s) * np.log(sigmoid(o["beta"] * h)) - s * np.log(sigmoid(-o["beta"] * h))
    if name == "ipo":
        return (h - 1 / (2 * o["beta"])) ** 2
    if name == "simpo":
        return -np.log(sigmoid(o["beta"] * (c.mean() - r.mean()) - o["margin"]))
    if name == "orpo":
        odds = [np.exp(x.mean()) / (1 - np.exp(x.mean())) for x in (c, r)]
        return -c.mean() - o["beta"] * np.log(sigmoid(np.log(odds[0]) - np.log(odds[1])))
    raise KeyError(name)


def kto_loss(log_ratio: float, desirable: bool, point: float, beta: float, liked: float, disliked: float) -> float:
    if desirable:
        return liked * (1 - sigmoid(beta * (log_ratio - point)))
    return disliked * (1 - sigmoid(beta * (point - log_ratio)))


def value_loss(values: Array, old: Array, returns: Array, clip: float | None) -> Array:
    loss = (values - returns) ** 2
    if clip is not None:
        loss = np.maximum(loss, (np.clip(values, old - clip, old + clip) - returns) ** 2)
    return loss / 2
