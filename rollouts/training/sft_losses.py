"""The supervised loss: next-token cross-entropy, shifted and masked, without a [tokens, vocabulary] float32 tensor.

Shapes: B rows, S positions, N tokens that carry loss, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# Logits of one chunk, in elements: 4 Mi float32 values are 16 MB, small enough to stay near the processor's cache.
CHUNK_ELEMENTS = 1 << 22


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
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    loss_positions: torch.Tensor | None = None

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
        hidden = logits.hidden.flatten(0, 1)[predictors]
        total, correct = _LinearCrossEntropy.apply(hidden, logits.weight, logits.bias, targets, weights)
    else:
        total, correct = _CrossEntropy.apply(logits.flatten(0, 1)[predictors], targets, weights)
    count = torch.tensor(float(len(targets)), device=total.device)
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


def _softmax_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss sum, hits, and the log-probabilities [n, V] float32 of one chunk of logits [n, V]."""
    log_probs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    of_targets = log_probs.gather(1, targets[:, None])[:, 0]
    correct = (of_targets == log_probs.amax(dim=1)).sum()
    return -(of_targets * weights).sum(), correct, log_probs


def _softmax_gradient_(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """d loss / d logits at weight 1: softmax minus one-hot. Overwrites ``log_probs`` [n, V]."""
    return log_probs.exp_().scatter_add_(1, targets[:, None], log_probs.new_full((len(targets), 1), -1.0))


class _LinearCrossEntropy(torch.autograd.Function):
    """Output projection and cross-entropy in one, a chunk of rows at a time.

    The loss is a plain sum, so its gradient is known up to one scalar factor as soon as the logits are: it is computed
    in the forward pass, and no logits are kept or computed twice (idea: Liger kernel, arXiv:2410.10989). Weights of
    rows are applied to the narrow side, [n, D], never to [n, V].
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, weights):  # type: ignore[no-untyped-def]
        need_grad = any(ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        row_weights = weights[:, None].to(hidden.dtype)
        step = _chunk_rows(weight.shape[0])
        for start in range(0, len(hidden), step):
            chunk = slice(start, start + step)
            loss, hits, log_probs = _softmax_loss(F.linear(hidden[chunk], weight, bias), targets[chunk], weights[chunk])
            total += loss
            correct += hits
            if grad_hidden is None:
                continue
            grad_logits = _softmax_gradient_(log_probs, targets[chunk])
            if grad_bias is not None:
                grad_bias += weights[chunk] @ grad_logits
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mul(grad_logits @ weight, row_weights[chunk], out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ (hidden[chunk] * row_weights[chunk])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad_total, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors

        def scaled(grad: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if grad is None else (grad * grad_total).to(dtype)

        dtype = ctx.weight_dtype
        return scaled(grad_hidden, grad_hidden.dtype), scaled(grad_weight, dtype), scaled(grad_bias, dtype), None, None


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over given logits [N, V], in float32 a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits, targets, weights):  # type: ignore[no-untyped-def]
        need_grad = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        correct = torch.zeros((), dtype=torch.float32, device=logits.device)
        grad = torch.empty_like(logits) if need_grad else None
        step = _chunk_rows(logits.shape[1])
        for start in range(0, len(logits), step):
            chunk = slice(start, start + step)
            loss, hits, log_probs = _softmax_loss(logits[chunk], targets[chunk], weights[chunk])
            total += loss
            correct += hits
            if grad is not None:
                grad[chunk] = _softmax_gradient_(log_probs, targets[chunk]).mul_(weights[chunk, None])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad_total, _):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None
