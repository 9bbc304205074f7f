"""Queries and keys of Qwen3 in bfloat16 on CPUs with avx512_bf16: RMSNorm of each head and rotation as one operator.

torch.compile takes several passes over memory for either direction, and its loops over rotated halves are slow. Where
products are left to torch, so are these.

Shapes: T tokens (of all rows), H heads, D numbers of a head, P positions.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from rollouts.models.packed_attention import packed_attention_forward
from rollouts.models.products import compiled_products
from rollouts.native import native_library

WIDTHS = (32, 64, 96, 128)  # of heads, that rotated_heads.cpp takes

_LIBRARY = torch.library.Library("rollouts", "FRAGMENT")
_LIBRARY.define("rotated_heads(Tensor x, Tensor norm, Tensor cos, Tensor sin, float eps) -> Tensor")
_LIBRARY.define(
    "rotated_heads_backward(Tensor grad, Tensor x, Tensor norm, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)"
)


@functools.cache
def _compiled() -> Any:
    """The functions of rotated_heads.cpp; None where products are left to torch."""
    return None if compiled_products() is None else native_library(Path(__file__).with_suffix(".cpp"))


def _forward(x: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    out = _fake_forward(x, norm, cos, sin, eps)
    _call("rotated_forward", (x, norm, cos, sin), (out,), eps)
    return out


def _fake_forward(
    x: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    to_x, to_norm = x.new_empty(x.shape), norm.new_empty(norm.shape, dtype=torch.float32)
    _call("rotated_backward", (grad, x, norm, cos, sin), (to_x, to_norm), eps)
    return to_x, to_norm.to(norm.dtype)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), norm.new_empty(norm.shape)


def _call(function: str, read: tuple[torch.Tensor, ...], written: tuple[torch.Tensor, ...], eps: float) -> None:
    """By rotated_heads.cpp, from tensors [..., H, D], the norm [D], and angles [..., D]."""
    read = tuple(t.contiguous() for t in read)
    heads, width = read[0].shape[-2:]
    sizes = (read[0].numel() // (heads * width), heads, width, read[-1].numel() // width, torch.get_num_threads())
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (*read, *written)]
    if not getattr(_compiled(), function)(*addresses, *map(ctypes.c_int64, sizes), ctypes.c_double(eps)):
        raise MemoryError(f"no memory for {sizes[0]} tokens, or heads of {width} numbers: {WIDTHS} are known")


_LIBRARY.impl("rotated_heads", _forward, "CPU")
_LIBRARY.impl("rotated_heads_backward", _backward, "CPU")
torch.library.register_fake("rollouts::rotated_heads", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("rollouts::rotated_heads_backward", _fake_backward, lib=_LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.rollouts.rotated_heads_backward(grad, *ctx.saved_tensors, ctx.eps)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None


torch.library.register_autograd("rollouts::rotated_heads", _differentiate, setup_context=_setup_context, lib=_LIBRARY)


def rotated_heads(
    x: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """Each head [D] of ``x`` [..., H, D] over its root mean square, times ``norm`` [D], rotated: bfloat16, on the CPU.

    Args:
        cos, sin: [1, P, D] or [B, P, D]: one row of angles a token of x, or of each of its rows alike.

    Returns:
        Tensor: like ``x``. The angles get no gradient.
    """
    return torch.ops.rollouts.rotated_heads(x, norm, cos, sin, eps)


class BFloat16Qwen3Attention(Qwen3Attention):
    """``Qwen3Attention`` that norms and rotates by ``rotated_heads`` over packed sequences in bfloat16."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        read = (hidden_states, self.q_norm.weight, self.k_norm.weight, *position_embeddings)
        ours = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in read)
        if not ours or past_key_values is not None or kwargs.get("cu_seqlens") is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)

        def rotated(states: torch.Tensor, norm: Any) -> torch.Tensor:
            return rotated_heads(states.view(heads), norm.weight, *position_embeddings, norm.variance_epsilon)

        out, _ = packed_attention_forward(
            self,
            rotated(self.q_proj(hidden_states), self.q_norm).transpose(1, 2),
            rotated(self.k_proj(hidden_states), self.k_norm).transpose(1, 2),
            self.v_proj(hidden_states).view(heads).transpose(1, 2),
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def use_rotated_heads(model: nn.Module) -> None:
    """Turn the attention of ``model`` into ``BFloat16Qwen3Attention`` where that is faster; weights stay the same."""
    if _compiled() is None:
        return
    for module in model.modules():
        if type(module) is Qwen3Attention and module.head_dim in WIDTHS:
            module.__class__ = BFloat16Qwen3Attention
