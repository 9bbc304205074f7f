"""The supervised loss: next-token cross-entropy, shifted and masked, without a [tokens, vocabulary] float32 tensor.

Shapes: B rows, S positions, N tokens that carry loss, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rollouts.models.products import add_product, product
from rollouts.training.softmax_rows import RowColumns, softmax_rows_

# Logits of one chunk, in elements: 64 MB in bfloat16. Each chunk lays out the output layer's weights anew.
CHUNK_ELEMENTS = 1 << 25


class LossOutput(NamedTuple):
    """A loss before division: losses return sums, the backend divides once by the global count.

    Attributes:
        total: [] float32, the sum over everything that carries loss; differentiable.
        count: [] float32, what ``total`` is to be divided by (tokens here), summed over micro-batches and ranks.
        metrics: name -> (sum, count), averaged the same way.
    """

    total: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class DeferredLogits:
    """Logits not yet computed: ``hidden @ weight.T (+ bias)``.

    A loss that knows what it needs computes only that, in chunks; ``materialize`` gives the ordinary tensor.

    Attributes:
        hidden: [B, S, D], the decoder's last hidden states.
        weight: [V, D]; bias: [V] or None.
        loss_positions: [N] int64, flat positions ``b * S + t`` of the tokens to learn (t >= 1), if already known;
            saves a device synchronization.
        value_weight: [1, D], of the value head on the same hidden states, if the model has one.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    loss_positions: torch.Tensor | None = None
    value_weight: torch.Tensor | None = None

    def materialize(self) -> torch.Tensor:
        return F.linear(self.hidden, self.weight, self.bias)


LossFn = Callable[..., LossOutput | torch.Tensor]


def accepts_deferred_logits(loss_fn: LossFn) -> LossFn:
    """Mark a loss that can take ``DeferredLogits``; every other loss is handed the full logits [B, S, V]."""
    loss_fn.accepts_deferred_logits = True  # type: ignore[attr-defined]
    return loss_fn


@accepts_deferred_logits
def causal_lm_loss(logits: torch.Tensor | DeferredLogits, labels: torch.Tensor, loss_mask: torch.Tensor) -> LossOutput:
    """Cross-entropy of each token given those before it: ``sum_t mask[t] * -log p(labels[t] | labels[<t])``.

    Args:
        logits: [B, S, V], or ``DeferredLogits``; position t predicts token t + 1 (the shift happens here).
        labels: [B, S] int64, the tokens themselves.
        loss_mask: [B, S]; weight of ``labels[t]``, 0 = not learned. Nothing predicts position 0: it is ignored.

    Returns:
        LossOutput: the weighted sum, the number of tokens with a non-zero weight, and the token ``accuracy``, in which
        a tie for the highest logit is a hit (several times faster on a CPU than finding the first of the tied).
    """
    if isinstance(logits, DeferredLogits) and logits.loss_positions is not None:
        positions = logits.loss_positions
    else:
        learned = loss_mask != 0
        learned[:, 0] = False
        positions = learned.flatten().nonzero()[:, 0]
    targets = labels.flatten()[positions]
    weights = loss_mask.flatten()[positions].float()
    predictors = positions - 1  # the hidden state before a token predicts it; never crosses a row: t >= 1
    if isinstance(logits, DeferredLogits):
        source, weight, bias = logits.hidden.flatten(0, 1), logits.weight, logits.bias
    else:
        source, weight, bias = logits.flatten(0, 1), None, None
    total, correct = _CrossEntropy.apply(source, weight, bias, predictors, targets, weights)
    count = torch.tensor(float(len(targets)), dtype=torch.float32, device=total.device)
    return LossOutput(total, count, {"accuracy": (correct, count)})


def as_loss_output(value: LossOutput | torch.Tensor, loss_mask: torch.Tensor) -> LossOutput:
    """Take a plain scalar loss (a mean over the masked-in tokens) for the sum it stands for."""
    if isinstance(value, LossOutput):
        return value
    count = (loss_mask[:, 1:] != 0).sum().float()
    total = value.float() * count
    return LossOutput(torch.where(count > 0, total, torch.zeros_like(total)), count, {})  # a mean over nothing is nan


def _chunk_rows(vocab_size: int) -> int:
    return max(64, CHUNK_ELEMENTS // vocab_size)


def project(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits [n, V] of hidden states [n, D]; no gradient flows through it."""
    logits = product(hidden, weight.T)
    return logits if bias is None else logits.add_(bias)


class _CrossEntropy(torch.autograd.Function):
    """Output projection (when there is a weight) and cross-entropy in one, a chunk of rows at a time.

    The loss is a plain sum, so its gradient is known up to one scalar factor as soon as the logits are: it is computed
    in the forward pass, and no logits are kept or computed twice (idea: Liger kernel, arXiv:2410.10989). Weights of
    rows are applied to the narrow side, [n, D], never to [n, V].
    """

    @staticmethod
    def forward(ctx: Any, source, weight, bias, rows, targets, weights):  # type: ignore[no-untyped-def]
        need_source, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_grad = need_source or need_weight or need_bias
        log_probs, highest = torch.empty_like(weights), torch.empty_like(weights)
        grad_source = torch.zeros_like(source) if need_source else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        row_weights = weights[:, None].to(source.dtype)
        step = _chunk_rows((source if weight is None else weight).shape[1 if weight is None else 0])
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            inputs = source.index_select(0, rows[chunk])
            logits = inputs if weight is None else project(inputs, weight, bias)
            columns = RowColumns(log_probs[chunk], highest[chunk])
            gradient: Any = softmax_rows_(logits, targets[chunk], 1.0, need_grad, columns)
            if grad_source is not None:
                narrow = gradient if weight is None else product(gradient, weight)
                grad_source.index_copy_(0, rows[chunk], narrow.mul_(row_weights[chunk]))
            if grad_weight is not None:
                add_product(grad_weight, gradient.T, inputs.mul_(row_weights[chunk]))
            if grad_bias is not None:
                grad_bias += weights[chunk] @ gradient.float()
        ctx.save_for_backward(grad_source, grad_weight, grad_bias)
        ctx.weight_dtype = None if weight is None else weight.dtype
        correct = (log_probs == highest).sum(dtype=torch.float32)
        ctx.mark_non_differentiable(correct)
        return -(log_probs * weights).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total, _):  # type: ignore[no-untyped-def]
        grad_source, grad_weight, grad_bias = ctx.saved_tensors

        def scaled(grad: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if grad is None else (grad * grad_total).to(dtype)

        dtype = ctx.weight_dtype
        source = None if grad_source is None else scaled(grad_source, grad_source.dtype)
        return source, scaled(grad_weight, dtype), scaled(grad_bias, dtype), None, None, None
