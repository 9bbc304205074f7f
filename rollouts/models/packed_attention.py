"""Causal attention over sequences packed back to back, each blind to the others, for any transformers model.

The model computes one row ``[1, T]`` that holds n sequences; ``cu_seqlens`` [n+1] says where each begins. Importing
this module registers the attention as ``"rollouts_packed"``; it behaves like transformers' ``sdpa`` whenever no
``cu_seqlens`` comes with the call, so a model that carries it still generates, pads and caches as before.

Sequences may share a prefix that is computed once: ``prefixes[i]`` is the range of tokens, an earlier sequence of the
row, that sequence i goes on from (its positions too go on), or (0, 0).

Shapes: H query heads, K key/value heads, T tokens, d head width, n sequences.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rollouts.native import native_library

PACKED_ATTENTION = "rollouts_packed"

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Without a matrix unit torch's attention on the CPU is slower in bfloat16 than in float32 (backward by up to 3x); ours
# is faster, where the processor multiplies bfloat16.
_TORCH_IN_HALF = torch.cpu._is_amx_tile_supported()
_OURS_IN_HALF = torch.cpu._is_avx512_bf16_supported() and not _TORCH_IN_HALF


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make ``model`` isolate packed sequences; call it with ``cu_seqlens`` and ``attention_mask=packed_mask()``."""
    model.set_attn_implementation(PACKED_ATTENTION)


def packed_mask(device: torch.device | str = "cpu") -> torch.Tensor:
    """A 4-D stand-in mask [1, 1, 1, 1]: transformers takes it as ready-made and builds no [T, T] mask of its own."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    prefixes: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query [1, H, T, d], key and value [1, K, T, d] -> ([1, T, H, d], None)."""
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError("packed attention has no dropout: set attention_dropout to 0 in the model's config")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None and (max_seqlen or 0) > sliding_window else None
    if query.device.type == "cpu" and window is None:
        # Gradients of a prefix are summed over all that share it, and stay in float32 meanwhile. Casts stand outside
        # the operator, where torch.compile fuses them into their neighbors.
        half = _TORCH_IN_HALF or (_OURS_IN_HALF and prefixes is None)
        dtype = torch.float32 if query.dtype == torch.bfloat16 and not half else query.dtype
        out, _ = packed_attention_cpu(query.to(dtype), key.to(dtype), value.to(dtype), cu_seqlens, scale, prefixes)
        return out.transpose(1, 2).to(query.dtype), None
    if query.is_cuda and query.dtype != torch.float32 and prefixes is None:
        return _varlen_cuda(query, key, value, cu_seqlens, max_seqlen, scale, window), None
    return _one_by_one(query, key, value, cu_seqlens, scale, window, prefixes), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def _varlen_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max_seqlen if max_seqlen is not None else query.shape[2]
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    prefixes: torch.Tensor | None,
) -> torch.Tensor:
    """SDPA per sequence: the slow way that works for every device, precision, window and prefix."""
    outputs = []
    for start, end, before, before_end in _spans(cu_seqlens, prefixes):
        q = query[:, :, start:end]
        k, v = (_with_prefix(x, start, end, before, before_end) for x in (key, value))
        mask = None
        if window is not None or before != before_end:
            at = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
            distance = at[:, None] - torch.arange(k.shape[2], device=q.device)
            mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _spans(cu_seqlens: torch.Tensor, prefixes: torch.Tensor | None) -> list[tuple[int, int, int, int]]:
    """(start, end) of each sequence and of its prefix, which is empty without ``prefixes``."""
    bounds = cu_seqlens.tolist()
    before = prefixes.tolist() if prefixes is not None else [(0, 0)] * (len(bounds) - 1)
    return [(start, end, *prefix) for start, end, prefix in zip(bounds[:-1], bounds[1:], before, strict=True)]


def _with_prefix(x: torch.Tensor, start: int, end: int, before: int, before_end: int) -> torch.Tensor:
    own = x[:, :, start:end]
    return own if before == before_end else torch.cat([x[:, :, before:before_end], own], dim=2)


@torch.library.custom_op("rollouts::packed_attention_cpu", mutates_args=())
def packed_attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    prefixes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sequence and its prefix; one opaque operator: torch.compile never splits it.

    query [1, H, T, d], key, value [1, K, T, d], cu_seqlens [n+1] int32, prefixes [n, 2] int32 -> output [1, H, T, d]
    and the log-sum-exp of the scores [1, H, T].
    """
    out = _empty_like_heads(query)
    lse = query.new_empty(query.shape[:3], dtype=_lse_dtype(query))
    if _run_native("packed_attention_forward", query, key, value, cu_seqlens, scale, prefixes, out, lse):
        return out, lse
    if query.dtype == torch.bfloat16 and not _TORCH_IN_HALF:  # no compiler
        exact, lse = packed_attention_cpu(query.float(), key.float(), value.float(), cu_seqlens, scale, prefixes)
        return out.copy_(exact), lse
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    for start, end, before, before_end in _spans(cu_seqlens, prefixes):
        q = query[:, :, start:end]
        k, v = (_with_prefix(x, start, end, before, before_end) for x in (key, value))
        out[:, :, start:end], lse[:, :, start:end] = _flash_forward(
            q, k, v, 0.0, before == before_end, attn_mask=_prefix_mask(q, k), scale=scale
        )
    return out, lse


def _prefix_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """What queries level with the last keys must not see, as -inf [L, W]; None when there is no prefix."""
    length, width = query.shape[2], key.shape[2]
    if length == width:
        return None
    return query.new_full((length, width), -torch.inf).triu(width - length + 1)


@packed_attention_cpu.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    prefixes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like_heads(query), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))


@torch.library.custom_op("rollouts::packed_attention_cpu_backward", mutates_args=())
def _packed_attention_cpu_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    prefixes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_query, grad_key, grad_value = (_empty_like_heads(x) for x in (query, key, value))
    grads = {"grad": grad, "grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
    if _run_native("packed_attention_backward", query, key, value, cu_seqlens, scale, prefixes, out, lse, **grads):
        return grad_query, grad_key, grad_value
    if query.dtype == torch.bfloat16 and not _TORCH_IN_HALF:
        wide = (x.float() for x in (grad, query, key, value, out))
        exact = _packed_attention_cpu_backward(*wide, lse, cu_seqlens, scale, prefixes)
        return grad_query.copy_(exact[0]), grad_key.copy_(exact[1]), grad_value.copy_(exact[2])
    num_kv_heads, num_heads = key.shape[1], query.shape[1]
    key, value = _repeat_heads(key, num_heads), _repeat_heads(value, num_heads)
    grad_key.zero_()
    grad_value.zero_()
    for start, end, before, before_end in _spans(cu_seqlens, prefixes):
        g, q, o = (x[:, :, start:end] for x in (grad, query, out))
        k, v = (_with_prefix(x, start, end, before, before_end) for x in (key, value))
        grad_query[:, :, start:end], gk, gv = _flash_backward(
            g, q, k, v, o, lse[:, :, start:end], 0.0, before == before_end, attn_mask=_prefix_mask(q, k), scale=scale
        )
        prefix = before_end - before
        for whole, part in ((grad_key, gk), (grad_value, gv)):
            part = _sum_repeated(part, num_kv_heads)
            whole[:, :, before:before_end] += part[:, :, :prefix]
            whole[:, :, start:end] += part[:, :, prefix:]
    return grad_query, grad_key, grad_value


@_packed_attention_cpu_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    prefixes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_like_heads(query), _empty_like_heads(key), _empty_like_heads(value)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's protocol
    query, key, value, cu_seqlens, scale, prefixes = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, prefixes)
    ctx.scale = scale


def _backward(ctx, grad: torch.Tensor, _grad_lse: torch.Tensor):  # type: ignore[no-untyped-def]  # torch's protocol
    *tensors, prefixes = ctx.saved_tensors
    return *_packed_attention_cpu_backward(grad, *tensors, ctx.scale, prefixes), None, None, None


packed_attention_cpu.register_autograd(_backward, setup_context=_setup_context)


def _repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    repeats = num_heads // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def _sum_repeated(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The gradient of ``_repeat_heads``: [1, H, T, d] -> [1, K, T, d]."""
    return x if x.shape[1] == num_kv_heads else x.unflatten(1, (num_kv_heads, -1)).sum(dim=2)


def _lse_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_like_heads(x: torch.Tensor) -> torch.Tensor:
    """An uninitialized [1, H, T, d] laid out as [1, T, H, d], the layout that the output projection reads."""
    b, h, t, d = x.shape
    return x.new_empty((b, t, h, d)).transpose(1, 2)


class _Heads(ctypes.Structure):
    """``Tensor`` of packed_attention.cpp: an address and the strides of tokens and heads."""

    _fields_ = (("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _Call(ctypes.Structure):
    """``Call`` of packed_attention.cpp."""

    _fields_ = (
        *((name, _Heads) for name in ("query", "key", "value", "out", "grad", "grad_query", "grad_key", "grad_value")),
        *((name, ctypes.c_void_p) for name in ("lse", "bounds", "prefixes")),
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "heads", "kv_heads", "head_dim", "threads")),
        ("scale", ctypes.c_double),
    )


@functools.cache
def _compiled(function: str, dtype: torch.dtype) -> Any:
    """The function of packed_attention.cpp for numbers of this kind; None = not here."""
    names = {torch.float32: "float32"} | ({torch.bfloat16: "bfloat16"} if _OURS_IN_HALF else {})
    library = native_library(Path(__file__).with_suffix(".cpp")) if dtype in names else None
    return getattr(library, f"{function}_{names[dtype]}", None) if library is not None else None


def _run_native(
    function: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    prefixes: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    **grads: torch.Tensor,
) -> bool:
    """Compute in C++, about twice as fast as torch: nothing above the diagonal, no call a sequence. False: not here."""
    run = _compiled(function, query.dtype)
    if run is None:
        return False
    tensors = {"query": query, "key": key, "value": value, "out": out, **grads}
    tensors = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in tensors.items()}
    bounds = cu_seqlens.contiguous()
    prefixes = prefixes.contiguous() if prefixes is not None else None
    call = _Call(
        **{name: _Heads(x.data_ptr(), x.stride(2), x.stride(1)) for name, x in tensors.items()},
        lse=lse.data_ptr(),
        bounds=bounds.data_ptr(),
        prefixes=prefixes.data_ptr() if prefixes is not None else None,
        sequences=len(bounds) - 1,
        tokens=query.shape[2],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        threads=torch.get_num_threads(),
        scale=scale,
    )
    return bool(run(ctypes.byref(call)))
