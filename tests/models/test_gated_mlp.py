"""Gated layers as one operator against float64, and inside transformers' models against the modules they replace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from rollouts.models.gated_mlp import BFloat16GatedMLP, use_gated_products
from rollouts.models.products import compiled_products

needs_compiled = pytest.mark.skipif(compiled_products() is None, reason="needs avx512_bf16, no AMX and a compiler")


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def tensors(tokens: int, width: int, inner: int) -> list[torch.Tensor]:
    """x, the three weights, and the gradient of what comes out."""
    torch.manual_seed(tokens + width + inner)
    scales = [((tokens, width), 1.0), *[((inner, width), width**-0.5)] * 2, ((width, inner), inner**-0.5)]
    return [(torch.randn(shape) * scale).bfloat16() for shape, scale in (*scales, ((tokens, width), 1.0))]


def run(values: list[torch.Tensor], one_operator: bool) -> list[torch.Tensor]:
    """What comes out, and the gradients of x and of the weights."""
    leaves = [value.detach().clone().requires_grad_(True) for value in values[:4]]
    out = torch.ops.rollouts.gated_mlp(*leaves, True)[0] if one_operator else gated(*leaves)
    out.backward(values[4])
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@needs_compiled
@pytest.mark.parametrize(
    ("tokens", "width", "inner"),
    [
        (1, 16, 32),  # one row of a tile, half a word, a panel that both narrow ones share
        (47, 48, 96),  # tokens left over, the last panel half as wide
        (96, 64, 64),
        (333, 80, 160),  # an odd number; blocks of 96 lines, one of them begun
        (2304, 32, 224),  # more words along the tokens than are summed at a time
        (40, 32, 2112),  # and more between the layers
    ],
)
def test_the_operator_computes_what_float64_does(tokens: int, width: int, inner: int) -> None:
    values = tensors(tokens, width, inner)
    exact = run([value.double() for value in values], one_operator=False)
    for ours, truth in zip(run(values, one_operator=True), exact, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == truth.shape
        # What is rounded on the way is random: no line of any result may be further off than a few roundings.
        for dim in range(2):
            error = torch.linalg.vector_norm(ours.double() - truth, dim=dim)
            assert (error < 0.02 * torch.linalg.vector_norm(truth, dim=dim) + 1e-3).all()
        assert torch.linalg.vector_norm(ours.double() - truth) < 0.005 * torch.linalg.vector_norm(truth)


@needs_compiled
def test_large_gates_neither_overflow_nor_vanish() -> None:
    """Where e^-x would be infinite, or 0, SiLU and its slope are those of float64."""
    x = torch.eye(16).bfloat16() * torch.tensor([-500, -95, -88, -30, -3, -0.5, 0, 0.5, 3, 30, 88, 95, 500] + [1] * 3)
    same, ones = torch.eye(16).repeat(2, 1).bfloat16(), torch.ones(32, 16).bfloat16()
    values = [x.bfloat16(), same, ones, torch.ones(16, 32).bfloat16(), torch.ones(16, 16).bfloat16()]
    exact = run([value.double() for value in values], one_operator=False)
    for ours, truth in zip(run(values, one_operator=True), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0.02, atol=1e-4)


@needs_compiled
def test_it_does_not_depend_on_threads(same_on_any_threads: Callable[..., Any]) -> None:
    values = tensors(500, 64, 160)
    same_on_any_threads(lambda: run(values, one_operator=True))


@needs_compiled
def test_what_is_not_a_number_stays_visible() -> None:
    values = tensors(64, 32, 64)
    values[0][5, 7], values[0][9, 3] = torch.nan, torch.inf
    out, to_x, *_ = run(values, one_operator=True)
    assert (~out.isfinite().all(dim=1)).nonzero().flatten().tolist() == [5, 9]
    assert (~to_x.isfinite().all(dim=1)).nonzero().flatten().tolist() == [5, 9]


@needs_compiled
def test_the_operator_keeps_torchs_rules() -> None:
    """Shapes, autograd registration and tracing agree with what runs, also where no gradient is to come."""
    x, gate, up, down, _ = (value.requires_grad_(True) for value in tensors(20, 16, 32))
    torch.library.opcheck(torch.ops.rollouts.gated_mlp.default, (x, gate, up, down, True))
    with torch.no_grad():
        out, kept = torch.ops.rollouts.gated_mlp(x, gate, up, down, False)
    assert kept.numel() == 0 and torch.equal(out, torch.ops.rollouts.gated_mlp(x, gate, up, down, True)[0])


@needs_compiled
@pytest.mark.parametrize("frozen", ["x", "weights", "some weights"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    values = tensors(50, 32, 64)
    everything = run(values, one_operator=True)[1:]
    leaves = [value.clone() for value in values[:4]]
    learns = {"x": [1, 2, 3], "weights": [0], "some weights": [0, 2]}[frozen]
    for i in learns:
        leaves[i].requires_grad_(True)
    torch.ops.rollouts.gated_mlp(*leaves, True)[0].backward(values[4])
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, everything[i]) if i in learns else leaf.grad is None


@needs_compiled
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled graph", "eager"])
def test_models_keep_values_gradients_and_names(compiled: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 16}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ours = copy.deepcopy(plain)
    use_gated_products(ours)
    assert all(type(layer.mlp) is BFloat16GatedMLP for layer in ours.model.layers)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    exact = copy.deepcopy(plain).float()
    if compiled:
        for layer in ours.model.layers:
            layer.compile(dynamic=True)
    for length in (33, 20):
        ids = torch.randint(0, 50, (2, length))
        grads = {}
        for name, model in (("exact", exact), ("plain", plain), ("ours", ours)):
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            grads[name] = [loss.detach()[None], *(p.grad for p in model.parameters())]
        for truth, theirs, mine in zip(grads["exact"], grads["plain"], grads["ours"], strict=True):
            far = [torch.linalg.vector_norm(g.float() - truth).item() for g in (theirs, mine)]
            assert far[1] < 1.3 * far[0] + 2e-3 * torch.linalg.vector_norm(truth).item()


@needs_compiled
def test_float32_is_computed_as_before() -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))
    x = torch.randn(5, 32)
    expected = mlp(x)
    use_gated_products(mlp)
    assert type(mlp) is BFloat16GatedMLP and torch.equal(mlp(x), expected)


@needs_compiled
def test_an_adapter_that_comes_later_is_heard() -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64)).bfloat16()
    use_gated_products(mlp)
    x = torch.randn(5, 32).bfloat16()
    assert mlp(x).abs().max() > 0
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Threshold(torch.inf, 0.0))  # type: ignore[assignment]
    assert mlp(x).abs().max() == 0


def test_other_layers_stay_what_they_are() -> None:
    biased = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64, mlp_bias=True))
    narrow = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=64, num_attention_heads=2))
    uneven = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=80))
    relu = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64, hidden_act="relu"))
    adapted = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))
    adapted.up_proj = nn.Sequential(adapted.up_proj)  # type: ignore[assignment]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    gemma = AutoModelForCausalLM.from_config(GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    for module in (biased, narrow, uneven, relu, adapted, gemma):
        use_gated_products(module)
        assert not any(isinstance(part, BFloat16GatedMLP) for part in module.modules())
