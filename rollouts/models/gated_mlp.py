"""The gated layers of transformers in bfloat16 on CPUs with avx512_bf16: both passes as one operator each.

``down(silu(gate(x)) * up(x))`` needs three products and, going back, six more. Computed together, what one product
gives goes through the activation and into the next while it is in the cache, and is laid out once for those that read
it. Where products are left to torch, so are these.

Shapes: T tokens, D numbers of a token, I numbers between the layers.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from rollouts.models.products import PLAIN_LINEARS, compiled_products
from rollouts.native import native_library

# Modules that are known to compute down(act(gate(x)) * up(x)) and nothing else.
GATED_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)

_LIBRARY = torch.library.Library("rollouts", "FRAGMENT")
_LIBRARY.define("gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, bool keep) -> (Tensor, Tensor)")
_LIBRARY.define(
    "gated_mlp_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor gate, Tensor up, Tensor down, bool[2] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@functools.cache
def _compiled() -> Any:
    """The functions of gated_mlp.cpp; None where products are left to torch."""
    return None if compiled_products() is None else native_library(Path(__file__).with_suffix(".cpp"))


def _forward(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, gate_up = _fake_forward(x, gate, up, down, keep)
    read = (t.contiguous() for t in (x, gate, up, down))
    _call("gated_forward", (*read, out, gate_up if keep else None), gate.shape)
    return out, gate_up


def _fake_forward(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 2 * gate.shape[0]) if keep else (0,))


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    grads = _fake_backward(grad, x, gate_up, gate, up, down, needs)
    read = (t.contiguous() for t in (grad, x, gate_up, gate, up, down))
    _call("gated_backward", (*read, *(g if g.numel() else None for g in grads)), gate.shape)
    return grads


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """Gradients of x and of the three weights; empty where they are not needed."""
    to_x = x.new_empty(x.shape if needs[0] else (0,))
    return to_x, *(w.new_empty(w.shape if needs[1] else (0,)) for w in (gate, up, down))


def _call(function: str, tensors: tuple[torch.Tensor | None, ...], shape: torch.Size) -> None:
    """By gated_mlp.cpp; ``shape``: [I, D]."""
    assert tensors[0] is not None
    sizes = (tensors[0].numel() // shape[1], shape[1], shape[0], torch.get_num_threads())
    addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    if not getattr(_compiled(), function)(*addresses, *map(ctypes.c_int64, sizes)):
        raise MemoryError(f"no memory for a gated layer of {sizes[0]} tokens by {shape[0]}")


_LIBRARY.impl("gated_mlp", _forward, "CPU")
_LIBRARY.impl("gated_mlp_backward", _backward, "CPU")
torch.library.register_fake("rollouts::gated_mlp", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("rollouts::gated_mlp_backward", _fake_backward, lib=_LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, gate, up, down, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], gate, up, down)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x_needs, *weights_need = ctx.needs_input_grad[:4]
    grads = torch.ops.rollouts.gated_mlp_backward(grad, *ctx.saved_tensors, [x_needs, any(weights_need)])
    return *(g if needed else None for g, needed in zip(grads, (x_needs, *weights_need), strict=True)), None


torch.library.register_autograd("rollouts::gated_mlp", _differentiate, setup_context=_setup_context, lib=_LIBRARY)


class BFloat16GatedMLP(nn.Module):
    """What the module was, computed by one operator where it is in bfloat16; weights and their names are the same."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _is_plain(self):  # an adapter may have come since
            tensors = (x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            if all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors):
                return torch.ops.rollouts.gated_mlp(*tensors, torch.is_grad_enabled())[0]
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def use_gated_products(model: nn.Module) -> None:
    """Turn the gated layers of ``model`` into ``BFloat16GatedMLP`` where that is faster."""
    if _compiled() is None:
        return
    for module in model.modules():
        if type(module) in GATED_MLPS and _is_plain(module):
            module.__class__ = BFloat16GatedMLP


def _is_plain(mlp: nn.Module) -> bool:
    """SiLU between layers without biases or adapters, of sizes that gated_mlp.cpp takes."""
    linears = [getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
    if not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
        return False
    if any(type(linear) not in PLAIN_LINEARS or linear.bias is not None for linear in linears):
        return False
    return linears[0].in_features % 16 == 0 and linears[0].out_features % 32 == 0
