"""Softmax of logits row by row: what a loss needs of it and the gradient of -log p(target), one visit to each row.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rollouts.native import native_library

# Stands in for the log-probability of what cannot be sampled, so that 0 * log 0 is 0.
IMPOSSIBLE = -1e30


class RowColumns(NamedTuple):
    """Results to be filled in, each [n] float32; None = not asked for.

    Attributes:
        log_probs: log p(target).
        highest: the highest log-probability of the row; equal to ``log_probs`` where no word beats the target.
        log_z: log sum_v exp(scale * logit_v).
        entropy: ``-sum_v p(v) log p(v)``, in nats.
        collision: ``sum_v p(v)²``.
    """

    log_probs: torch.Tensor | None = None
    highest: torch.Tensor | None = None
    log_z: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    collision: torch.Tensor | None = None


def softmax_rows_(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, with_gradient: bool, columns: RowColumns
) -> torch.Tensor | None:
    """Fill ``columns`` from ``softmax(scale * logits)``, everything in between in float32.

    Args:
        logits: [n, V]; overwritten by the gradient where compiled code computes it.
        targets: [n] int64.
        with_gradient: also give the gradient of -log p(target) in the scaled logits, softmax minus one-hot [n, V], in
            the dtype of the logits.
    """
    if _softmax_rows_compiled(logits, targets, scale, with_gradient, columns):
        return logits if with_gradient else None
    scores = torch.log_softmax(scaled_logits(logits, scale), dim=1)  # [n, V]
    if columns.log_probs is not None:
        columns.log_probs.copy_(scores.gather(1, targets[:, None])[:, 0]).clamp_(min=IMPOSSIBLE)
    if columns.highest is not None:
        columns.highest.copy_(scores.amax(dim=1)).clamp_(min=IMPOSSIBLE)
    if columns.log_z is not None:
        columns.log_z.copy_(scaled_logits(logits, scale).logsumexp(1))
    if columns.entropy is not None:
        columns.entropy.copy_(-row_products(scores.exp(), scores.clamp(min=IMPOSSIBLE)))
    if columns.collision is not None:
        probs = scores.exp()
        columns.collision.copy_(row_products(probs, probs))
    if not with_gradient:
        return None
    return scores.exp_().scatter_add_(1, targets[:, None], scores.new_full((len(targets), 1), -1.0)).to(logits.dtype)


def scaled_logits(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """A float32 copy of ``logits``, times ``scale``."""
    wide = logits.to(torch.float32, copy=True)
    return wide if scale == 1.0 else wide.mul_(scale)


def row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``sum_v a[i, v] b[i, v]`` [n], with no [n, V] product in between."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


_COMPILED = {torch.float32: "softmax_rows_float32", torch.bfloat16: "softmax_rows_bfloat16"}


def _softmax_rows_compiled(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, with_gradient: bool, columns: RowColumns
) -> bool:
    """Compute in C++, rows on the CPU only; False: not here."""
    if logits.device.type != "cpu" or logits.dtype not in _COMPILED or not logits.is_contiguous():
        return False
    library = native_library(Path(__file__).with_suffix(".cpp"))
    if library is None:
        return False
    (n, vocab), threads = logits.shape, torch.get_num_threads()
    if n and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise IndexError(f"targets must be words of the vocabulary, 0 to {vocab - 1}")
    scratch = torch.empty(threads * (vocab + 16), dtype=torch.float32)  # whatever the default is meanwhile
    targets = targets.contiguous()

    def address(x: torch.Tensor | None) -> Any:
        return ctypes.c_void_p(None if x is None else x.data_ptr())

    assert all(x is None or (x.is_contiguous() and x.dtype == torch.float32) for x in columns)
    getattr(library, _COMPILED[logits.dtype])(
        address(logits), ctypes.c_int64(n), ctypes.c_int64(vocab), ctypes.c_float(scale), address(targets),
        *map(address, columns), address(logits if with_gradient else None), address(scratch), ctypes.c_int64(threads),
    )  # fmt: skip
    return True
