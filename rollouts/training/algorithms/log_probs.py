"""Log-probabilities of given tokens, and what else of the distribution a loss needs, a chunk of rows at a time.

Shapes: B rows, S positions, T = B * S flat positions, N learned tokens, D hidden width, V vocabulary, n rows a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from rollouts.models.products import add_product, product
from rollouts.training.sft_losses import DeferredLogits, project
from rollouts.training.softmax_rows import IMPOSSIBLE, RowColumns, row_products, scaled_logits, softmax_rows_

# Logits of one chunk, in elements: 4 Mi bfloat16 values are 8 MB.
CHUNK_ELEMENTS = 1 << 22

# What a forward pass may keep of its logits for the backward pass, in bytes. Chunks beyond it are computed again: one
# more matrix product where three are needed otherwise.
KEEP_BYTES = 1 << 28


class TokenStatistics(NamedTuple):
    """What is known of N sampled tokens and of the distributions they came from; None = not asked for.

    Attributes:
        log_probs: [N] float32, log p(token).
        entropy: [N] float32, ``-sum_v p(v) log p(v)``, in nats.
        full_kl: [N] float32, ``sum_v p(v) (log p(v) - log q(v))`` to the reference distribution q.
        collision: [N] float32, ``sum_v p(v)²``; never differentiable.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    full_kl: torch.Tensor | None = None
    collision: torch.Tensor | None = None


class ReferenceStates(NamedTuple):
    """A reference model's logits at N learned tokens, not yet computed: ``hidden @ weight.T (+ bias)``.

    Attributes:
        hidden: [N, D'], its last hidden states before the tokens.
        weight: [V, D']; None = the policy's own output layer is the reference's too (a base beneath an adapter).
        bias: [V] or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None = None


def learned_positions(logits: torch.Tensor | DeferredLogits, loss_mask: torch.Tensor) -> torch.Tensor:
    """Flat positions [N] int64 of the tokens to learn: mask [B, S] not 0, and not the first of a row."""
    if isinstance(logits, DeferredLogits) and logits.loss_positions is not None:
        return logits.loss_positions
    learned = loss_mask != 0
    learned[:, 0] = False  # a fresh tensor: the caller's mask is as it was
    return learned.flatten().nonzero()[:, 0]


def token_log_probs(
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    loss_positions: torch.Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``log softmax(logits / temperature)[token]`` of the learned tokens, over the full vocabulary.

    Args:
        logits: [B, S, V] or ``DeferredLogits``; position t - 1 predicts token t (the shift happens here).
        labels: [B, S] int64, the tokens themselves.
        loss_positions: [N] int64, distinct flat positions ``b * S + t``, t >= 1.
        temperature: the sampling temperature, above 0.
        with_entropy: also give the entropy of the distribution at that temperature.

    Returns:
        log-probs [N] float32 and entropy [N] float32 or None; both differentiable.
    """
    found = token_statistics(logits, labels, loss_positions, temperature, entropy=with_entropy)
    return found.log_probs, found.entropy


def token_statistics(
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    loss_positions: torch.Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    entropy_gradient: bool = True,
    collision: bool = False,
    ref_logits: torch.Tensor | ReferenceStates | None = None,
) -> TokenStatistics:
    """As ``token_log_probs``, with more to ask for.

    Args:
        entropy_gradient: False gives an entropy to look at: cheaper, for only log-probs are then differentiated.
        collision: also give ``sum_v p(v)²``, which the optimal token baseline needs.
        ref_logits: [N, V] of a reference model at the same tokens, any floating dtype, or the states to compute them
            from, chunk by chunk: also give the full KL to it, both distributions at ``temperature``.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: greedy sampling has no log-probabilities")
    targets = labels.flatten()[loss_positions]
    rows = loss_positions - 1  # the state before a token predicts it
    if isinstance(logits, DeferredLogits):
        source, weight, bias = logits.hidden.flatten(0, 1), logits.weight, logits.bias
    else:
        source, weight, bias = logits.flatten(0, 1), None, None
    wants = _Wants(1.0 / temperature, entropy, entropy and entropy_gradient, collision)
    ref: tuple[torch.Tensor | None, ...] = ref_logits, None, None  # type: ignore[assignment]
    if isinstance(ref_logits, ReferenceStates):
        ref = ref_logits if ref_logits.weight is not None else (ref_logits.hidden, weight, bias)
    found = _TokenStatistics.apply(source, weight, bias, rows, targets, *ref, wants)
    return TokenStatistics(*found)


class _Wants(NamedTuple):
    """What one call asks for; ``scale`` is 1 / temperature."""

    scale: float
    entropy: bool
    entropy_gradient: bool
    collision: bool


class _TokenStatistics(torch.autograd.Function):
    """Output projection and the statistics of its softmax in one, a chunk of rows at a time.

    With z the scaled logits and p their softmax, the gradients are
    ``d log p(y) / dz_v = [v = y] - p_v``, ``dH / dz_v = -p_v (log p_v + H)`` and
    ``dKL / dz_v = p_v (log p_v - log q_v - KL)``.

    When only log-probs are differentiated, the gradient of a row is its upstream factor times ``[v = y] - p_v``. That
    matrix, kept in the precision of the logits, makes the backward pass two matrix products and nothing else; factors
    go to the narrow side, [n, D]. When the output layer is frozen, even the first product is done in the forward pass.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, source, weight, bias, rows, targets, ref, ref_weight, ref_bias, wants
    ):
        n_rows, vocab = len(rows), (source if weight is None else weight).shape[1 if weight is None else 0]
        ctx.wants, ctx.step = wants, max(64, CHUNK_ELEMENTS // vocab)
        ctx.general = wants.entropy_gradient or ref is not None
        need_source, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_any = need_source or need_weight or need_bias
        keep_products = weight is not None and not ctx.general and not need_weight and not need_bias
        budget = KEEP_BYTES if weight is not None else 0  # given logits are there anyway

        def column(wanted: bool) -> Any:
            return source.new_empty(n_rows, dtype=torch.float32) if wanted else None

        log_probs, log_z, full_kl = column(True), column(True), column(ref is not None)
        entropy, collision = column(wants.entropy), column(wants.collision)
        kept: list[torch.Tensor | None] = []
        for start in range(0, n_rows, ctx.step):
            chunk = slice(start, start + ctx.step)
            logits = _chunk_logits(source, weight, bias, rows[chunk])
            given = {"log_probs": log_probs, "log_z": log_z, "entropy": entropy, "collision": collision}
            columns = RowColumns(**{name: x[chunk] for name, x in given.items() if x is not None})
            if full_kl is not None:
                scores = torch.log_softmax(scaled_logits(logits, wants.scale), dim=1).clamp_(min=IMPOSSIBLE)
                others = _reference(ref, ref_weight, ref_bias, chunk, wants.scale)
                full_kl[chunk] = row_products(scores.exp(), scores - others)
            gradient = softmax_rows_(logits, targets[chunk], wants.scale, need_any and not ctx.general, columns)
            if not need_any:
                continue
            keeps: Any = logits if ctx.general else gradient
            if keep_products:
                kept.append(product(keeps, weight))
            else:
                size = keeps.numel() * keeps.element_size()
                kept.append(keeps if size <= budget else None)
                budget -= size if size <= budget else 0
        ctx.keep_products = keep_products
        ctx.has = [x is not None for x in kept]
        ctx.save_for_backward(
            source,
            weight,
            bias,
            rows,
            targets,
            ref,
            ref_weight,
            ref_bias,
            log_z,
            entropy,
            full_kl,
            *(x for x in kept if x is not None),
        )
        ctx.set_materialize_grads(False)
        fixed = [x for x in (collision, None if wants.entropy_gradient else entropy) if x is not None]
        ctx.mark_non_differentiable(*fixed)
        return log_probs, entropy, full_kl, collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs, grad_entropy, grad_kl, _):  # type: ignore[no-untyped-def]
        source, weight, bias, rows, targets, ref, ref_weight, ref_bias, *more = ctx.saved_tensors
        log_z, entropy, full_kl, *saved = more
        scale = ctx.wants.scale
        if grad_log_probs is None:
            grad_log_probs = source.new_zeros(len(rows), dtype=torch.float32)
        need_source, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_source: Any = torch.zeros_like(source) if need_source else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        kept = iter(saved)
        for i, start in enumerate(range(0, len(rows), ctx.step)):
            chunk = slice(start, start + ctx.step)
            at = rows[chunk]
            mine: Any = next(kept) if ctx.has[i] else None
            factors = (grad_log_probs[chunk] * -scale)[:, None]  # [n, 1]
            if ctx.keep_products:
                grad_source.index_copy_(0, at, mine * factors.to(mine.dtype))
                continue
            if ctx.general:
                logits = mine if mine is not None else _chunk_logits(source, weight, bias, at)
                scores = scaled_logits(logits, scale).sub_(log_z[chunk, None]).clamp_(min=IMPOSSIBLE)  # [n, V]
                wide = grad_log_probs.new_zeros(scores.shape) if grad_entropy is None else scores + entropy[chunk, None]
                if grad_entropy is not None:
                    wide *= -grad_entropy[chunk, None]
                if grad_kl is not None:
                    gap = scores - _reference(ref, ref_weight, ref_bias, chunk, scale) - full_kl[chunk, None]
                    wide.addcmul_(gap, grad_kl[chunk, None])
                wide -= grad_log_probs[chunk, None]
                wide *= scores.exp_()
                wide.scatter_add_(1, targets[chunk, None], grad_log_probs[chunk, None])
                gradient, factors = wide.mul_(scale).to(source.dtype), None
            elif mine is not None:
                gradient = mine
            else:
                gradient = softmax_rows_(
                    _chunk_logits(source, weight, bias, at), targets[chunk], scale, True, RowColumns()
                )
            narrow = factors.to(source.dtype) if factors is not None else None
            if weight is None:
                grad_source.index_copy_(0, at, gradient if narrow is None else gradient * narrow)
                continue
            if grad_source is not None:
                passed = product(gradient, weight)
                grad_source.index_copy_(0, at, passed if narrow is None else passed.mul_(narrow))
            if grad_weight is not None:
                inputs = source.index_select(0, at)
                add_product(grad_weight, gradient.T, inputs if narrow is None else inputs.mul_(narrow))
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32) if narrow is None else (gradient.T @ narrow)[:, 0]
        dtype = None if weight is None else weight.dtype
        return (
            grad_source,
            None if grad_weight is None else grad_weight.to(dtype),
            None if grad_bias is None else grad_bias.to(dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


def _chunk_logits(
    source: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, rows: torch.Tensor
) -> torch.Tensor:
    """Logits [n, V] of some rows of hidden states [T, D], or of logits [T, V] when there is no weight."""
    picked = source.index_select(0, rows)
    return picked if weight is None else project(picked, weight, bias)


def _reference(
    ref: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, chunk: slice, scale: float
) -> torch.Tensor:
    """Log-probs [n, V] of some rows of a reference's logits [N, V], or of its hidden states where there is a weight."""
    logits = ref[chunk] if weight is None else project(ref[chunk], weight, bias)
    return torch.log_softmax(scaled_logits(logits, scale), dim=1).clamp_(min=IMPOSSIBLE)
