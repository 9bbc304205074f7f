"""Products of bfloat16 matrices on CPUs with avx512_bf16, somewhat faster than torch's at the shapes of small models.

``python -m benchmarks.products`` measures both. Processors with a matrix unit (AMX) and all other devices stay with
torch.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollouts.native import native_library


class _Matrix(ctypes.Structure):
    """``Matrix`` of products.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("transposed", ctypes.c_bool))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of matrices [M, K] and [K, N], which may be transposed views; no gradient flows through it."""
    if not (a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu"):
        return a @ b
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    return out if _compute(a, b, out, None) else a @ b


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``, total [M, N] float32 and contiguous: without a product in between where ours is at hand."""
    if not (a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and _compute(a, b, None, total)):
        total += a @ b


def _compute(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None, total: torch.Tensor | None) -> bool:
    """By products.cpp, into ``out`` or onto ``total``. False: not here, and nothing was written."""
    library = compiled_products()
    (m, k), n = a.shape, b.shape[1]
    left, right = _matrix(a), _matrix(b)
    if library is None or left is None or right is None or min(m, k) < 16 or n % 16 or n == 0:
        return False
    if (k % 2 and not (left.transposed and not right.transposed)) or (left.transposed and m % 16):
        return False
    assert total is None or (total.is_contiguous() and total.dtype == torch.float32 and total.shape == (m, n))
    into = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (out, total)]
    return bool(library.product(left, right, *into, *map(ctypes.c_int64, (m, n, k, torch.get_num_threads()))))


def _matrix(x: torch.Tensor) -> _Matrix | None:
    """How ``x`` is stored; None when neither of its dimensions is contiguous."""
    if x.stride(1) == 1:
        return _Matrix(x.data_ptr(), x.stride(0), False)
    if x.stride(0) == 1:
        return _Matrix(x.data_ptr(), x.stride(1), True)
    return None


@functools.cache
def compiled_products() -> Any:
    """The functions of products.cpp; None where there is no compiler, or torch's own products are as fast or faster."""
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        return None
    library = native_library(Path(__file__).with_suffix(".cpp"))
    return library if library is not None and library.products_are_here() else None


# torch.compile takes the operators below as they are and goes on around them.
_LIBRARY = torch.library.Library("rollouts", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.define("linear_backward(Tensor grad, Tensor x, Tensor weight, bool[2] needs) -> (Tensor, Tensor)")


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return product(x.reshape(-1, x.shape[-1]), weight.T).unflatten(0, x.shape[:-1])


def _linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = product(rows, weight).view(x.shape) if needs[0] else x.new_empty(0)
    return grad_x, product(rows.T, inputs) if needs[1] else weight.new_empty(0)


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear_backward", _linear_backward, "CPU")


@torch.library.register_fake("rollouts::linear", lib=_LIBRARY)
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("rollouts::linear_backward", lib=_LIBRARY)
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's protocol
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: torch.Tensor):  # type: ignore[no-untyped-def]  # torch's protocol
    needs = list(ctx.needs_input_grad[:2])
    grads = torch.ops.rollouts.linear_backward(grad, *ctx.saved_tensors, needs)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


torch.library.register_autograd("rollouts::linear", _backward, setup_context=_setup_context, lib=_LIBRARY)


class BFloat16Linear(nn.Linear):
    """``nn.Linear`` that computes bfloat16 by ``product``; everything else about it is the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        out = torch.ops.rollouts.linear(x, self.weight)
        return out if self.bias is None else out + self.bias


# Layers that are one matrix product and a bias, and nothing else: what others may compute in their place.
PLAIN_LINEARS = (nn.Linear, BFloat16Linear)


def use_fast_products(model: nn.Module) -> None:
    """Turn the linear layers of ``model`` into ``BFloat16Linear`` where that is faster; weights stay what they are."""
    if compiled_products() is None:
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = BFloat16Linear
