"""Logits to tokens and log-probs, a whole batch at a time and one random number a row.

Shapes: B rows that sample, V vocabulary, F rows that truncate, P rows with penalties, S longest history, M rows that a
grammar binds.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from rollouts.inference.native import sample_rows


@dataclass(frozen=True)
class BatchParams:
    """The sampling parameters of B rows as tensors; made anew only when the rows change.

    ``temperature`` is None when every row has 1. Greedy rows have temperature 1 here and are named by ``greedy``.
    """

    temperature: torch.Tensor | None  # [B, 1] float32
    greedy: torch.Tensor | None  # [B] bool, None when no row is greedy
    all_greedy: bool
    truncating: torch.Tensor | None  # [F] rows
    top_k: torch.Tensor  # [F, 1], V where off
    top_p: torch.Tensor  # [F, 1]
    min_p: torch.Tensor  # [F, 1]
    penalized: torch.Tensor | None  # [P] rows
    penalties: torch.Tensor  # [P, 3]: repetition, presence, frequency
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # rows, ids, values
    num_top: int
    constrained: torch.Tensor | None  # [M] rows

    @property
    def plain(self) -> bool:
        """Whether nothing but temperatures changes the model's distributions, and nothing more is reported."""
        unchanged = self.penalized is None and self.bias is None and self.constrained is None
        return unchanged and self.truncating is None and self.num_top == 0


@dataclass(frozen=True)
class Sampled:
    """What one step sampled, on the model's device."""

    token_ids: torch.Tensor  # [B] int64
    log_probs: torch.Tensor  # [B] float32, at the sampling temperature
    raw_log_probs: torch.Tensor  # [B] float32, at temperature 1
    top: tuple[torch.Tensor, torch.Tensor] | None  # raw log-probs and ids [B, num_top]


def sample(
    logits: torch.Tensor,
    params: BatchParams,
    uniforms: torch.Tensor,
    history: torch.Tensor | None = None,
    is_output: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    library: ctypes.CDLL | None = None,
) -> Sampled:
    """One token a row.

    Args:
        logits: [B, V], of any floating dtype.
        uniforms: [B] float32 in [0, 1); the token is where the cumulative distribution passes it.
        history: [P, S] int64, tokens of the penalized rows so far, prompt first, filled up with -1.
        is_output: [P, S] bool, which of them were sampled.
        allowed: [M, V] bool, the tokens that a grammar leaves to the constrained rows, at least one in each.
        library: the compiled functions, used on the CPU for batches whose rows all sample from full distributions.
    """
    raw = logits.float()
    if library is not None and params.plain and raw.device.type == "cpu":
        return Sampled(*sample_rows(library, raw.contiguous(), params.temperature, params.greedy, uniforms), None)
    raw_lse = raw.logsumexp(-1, keepdim=True)  # [B, 1]
    changed = raw
    if params.penalized is not None or params.bias is not None or params.constrained is not None:
        changed = raw.clone()
    if params.penalized is not None:
        assert history is not None and is_output is not None
        changed[params.penalized] = penalize(changed[params.penalized], history, is_output, params.penalties)
    if params.bias is not None:
        rows, ids, values = params.bias
        changed.index_put_((rows, ids), values, accumulate=True)
    if params.constrained is not None:
        assert allowed is not None
        changed[params.constrained] = changed[params.constrained].masked_fill(~allowed, float("-inf"))

    if params.all_greedy:
        token_ids = changed.argmax(-1)
    else:
        scaled = changed if params.temperature is None else changed / params.temperature
        probs = scaled.softmax(-1)
        token_ids = inverse_cdf(probs, uniforms)
        if params.truncating is not None:
            f = params.truncating
            token_ids[f] = sample_truncated(probs[f], uniforms[f], params.top_k, params.top_p, params.min_p)
        if params.greedy is not None:
            token_ids = torch.where(params.greedy, changed.argmax(-1), token_ids)

    chosen = raw.gather(-1, token_ids[:, None])  # [B, 1]
    raw_log_probs = chosen - raw_lse
    log_probs = raw_log_probs
    if params.temperature is not None:
        log_probs = chosen / params.temperature - (raw / params.temperature).logsumexp(-1, keepdim=True)
    top = None
    if params.num_top:
        values, ids = raw.topk(min(params.num_top, raw.shape[-1]), dim=-1)
        top = (values - raw_lse, ids)
    return Sampled(token_ids, log_probs[:, 0], raw_log_probs[:, 0], top)


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first column whose cumulative weight exceeds ``uniform * total``; a weight of 0 is never chosen.

    weights [B, V] float32, not negative, with a positive sum; uniforms [B] -> column indices [B] int64.
    """
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    # u * total may round up to the total itself, where no column exceeds it.
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    columns = torch.searchsorted(cdf, threshold, right=True)[:, 0]
    return columns.clamp(max=weights.shape[1] - 1)  # a row of NaN has none


def sample_truncated(
    probs: torch.Tensor, uniforms: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Sample among the tokens that top-k, then top-p, then min-p keep; of equally likely ones lower ids come first.

    probs [F, V], uniforms [F], the rest [F, 1] -> token ids [F].
    """
    ordered, ids = probs.sort(stable=True, dim=-1, descending=True)
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    ordered = ordered.where(ranks < top_k, 0)
    before = ordered.cumsum(-1) - ordered  # of the likelier ones; top-p keeps the token that reaches the sum
    ordered = ordered.where((before < top_p * ordered.sum(-1, keepdim=True)) & (ordered >= min_p * ordered[:, :1]), 0)
    return ids.gather(-1, inverse_cdf(ordered, uniforms)[:, None])[:, 0]


def penalize(
    logits: torch.Tensor, history: torch.Tensor, is_output: torch.Tensor, penalties: torch.Tensor
) -> torch.Tensor:
    """Repetition penalty on every token of the history, presence and frequency penalties on its sampled ones.

    logits [P, V], history and is_output [P, S], penalties [P, 3] -> [P, V].
    """
    repetition, presence, frequency = penalties.split(1, dim=-1)
    real = history >= 0
    ids = history.clamp(min=0)
    seen = torch.zeros_like(logits).scatter_add_(1, ids, real.to(logits.dtype)) > 0
    counts = torch.zeros_like(logits).scatter_add_(1, ids, (real & is_output).to(logits.dtype))
    shrunk = torch.where(logits > 0, logits / repetition, logits * repetition)
    return logits.where(~seen, shrunk) - presence * (counts > 0) - frequency * counts


def history_of(tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """``history`` and ``is_output`` for ``sample``: tokens [P, >=S] with outputs at [start, end) of each row."""
    columns = np.arange(int(ends.max()))
    history = np.where(columns < ends[:, None], tokens[:, : len(columns)], -1).astype(np.int64)
    return torch.from_numpy(history), torch.from_numpy(columns >= starts[:, None])
