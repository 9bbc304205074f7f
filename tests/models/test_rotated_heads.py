"""Norm and rotation of heads as one operator against float64, and inside Qwen3 against the module it replaces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from rollouts.models.packed_attention import packed_mask, use_packed_attention
from rollouts.models.products import compiled_products
from rollouts.models.rotated_heads import BFloat16Qwen3Attention, rotated_heads, use_rotated_heads

needs_compiled = pytest.mark.skipif(compiled_products() is None, reason="needs avx512_bf16, no AMX and a compiler")
EPS = 1e-6


def reference(x: torch.Tensor, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    normed = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm
    first, second = normed.chunk(2, dim=-1)
    return normed * cos[..., None, :] + torch.cat([-second, first], dim=-1) * sin[..., None, :]


def tensors(tokens: int, heads: int, width: int, rows: int = 1) -> list[torch.Tensor]:
    """x, norm, cos, sin of one row of positions, and the gradient of what comes out."""
    torch.manual_seed(tokens + heads + width)
    angles = torch.rand(1, tokens, width) * 6  # unlike transformers' the two halves differ
    x, grad = torch.randn(2, rows, tokens, heads, width)
    return [t.bfloat16() for t in (x, torch.rand(width) + 0.5, angles.cos(), angles.sin(), grad)]


def run(values: list[torch.Tensor], one_operator: bool) -> list[torch.Tensor]:
    """What comes out, and the gradients of x and of the norm."""
    x, norm = (value.detach().requires_grad_(True) for value in values[:2])
    out = rotated_heads(x, norm, *values[2:4], EPS) if one_operator else reference(x, norm, *values[2:4])
    return [out.detach(), *torch.autograd.grad(out, [x, norm], values[4])]


@needs_compiled
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "rows"),
    [(1, 1, 32, 1), (33, 3, 64, 1), (100, 5, 96, 1), (65, 2, 128, 1), (40, 2, 32, 3)],
)
def test_the_operator_computes_what_float64_does(tokens: int, heads: int, width: int, rows: int) -> None:
    values = tensors(tokens, heads, width, rows)
    exact = run([value.double() for value in values], one_operator=False)
    for ours, truth in zip(run(values, one_operator=True), exact, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == truth.shape
        error = torch.linalg.vector_norm(ours.double() - truth, dim=-1)
        assert (error < 0.004 * torch.linalg.vector_norm(truth, dim=-1) + 1e-3).all()


@needs_compiled
def test_memory_may_lie_otherwise() -> None:
    x, norm, cos, sin, grad = tensors(30, 4, 32)
    apart = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, cos, sin, grad)]
    assert not any(t.is_contiguous() for t in apart)
    elsewhere = run([apart[0], norm, *apart[1:]], one_operator=True)
    for ours, truth in zip(elsewhere, run([x, norm, cos, sin, grad], one_operator=True), strict=True):
        assert torch.equal(ours, truth)


@needs_compiled
def test_it_does_not_depend_on_threads_and_nan_stays_in_its_head(same_on_any_threads: Callable[..., Any]) -> None:
    values = tensors(100, 4, 64)
    same_on_any_threads(lambda: run(values, one_operator=True))
    values[0][0, 7, 2, 5] = torch.nan
    out, to_x, to_norm = run(values, one_operator=True)
    for result in (out, to_x):
        assert (~result.isfinite()).any(dim=-1).nonzero().tolist() == [[0, 7, 2]]
    assert not to_norm.isfinite().any()


@needs_compiled
def test_the_operator_keeps_torchs_rules() -> None:
    x, norm, cos, sin, grad = tensors(20, 2, 32)
    torch.library.opcheck(
        torch.ops.rollouts.rotated_heads.default, (x.requires_grad_(True), norm.requires_grad_(True), cos, sin, EPS)
    )
    everything = run([x, norm, cos, sin, grad], one_operator=True)
    frozen = rotated_heads(x, norm.detach(), cos, sin, EPS)
    assert torch.equal(torch.autograd.grad(frozen, x, grad)[0], everything[1])
    frozen = rotated_heads(x.detach(), norm, cos, sin, EPS)
    assert torch.equal(torch.autograd.grad(frozen, norm, grad)[0], everything[2])
    with pytest.raises(MemoryError, match="heads of 48 numbers"):
        rotated_heads(*tensors(3, 1, 48)[:4], EPS)


def qwen(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 32}
    config = Qwen3Config(**sizes | changes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in model.model.layers:
        nn.init.uniform_(layer.self_attn.q_norm.weight, 0.5, 1.5)
        nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 1.5)
    use_packed_attention(model)
    return model


def packed(model: nn.Module, lengths: list[int]) -> torch.Tensor:
    """Logits of sequences packed into one row."""
    torch.manual_seed(1)
    return model(
        input_ids=torch.randint(0, 50, (1, sum(lengths))),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        attention_mask=packed_mask(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        use_cache=False,
    ).logits


@needs_compiled
@pytest.mark.parametrize("way", ["eager", "compiled graph", "checkpointed"])
def test_models_keep_values_gradients_and_names(way: str) -> None:
    plain = qwen(attention_bias=True)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).float()
    use_rotated_heads(ours)
    assert all(type(layer.self_attn) is BFloat16Qwen3Attention for layer in ours.model.layers)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for layer in ours.model.layers:
        if way == "compiled graph":
            layer.compile(dynamic=True)
        if way == "checkpointed":
            whole = layer.forward
            layer.forward = lambda *args, whole=whole, **kwargs: checkpoint(whole, *args, use_reentrant=False, **kwargs)
    for lengths in ([20, 1, 13], [9, 30]):
        grads = {}
        for name, model in (("exact", exact), ("plain", plain), ("ours", ours)):
            model.zero_grad()
            logits = packed(model, lengths)
            (logits.float() * torch.linspace(-1, 1, 50)).mean().backward()
            grads[name] = [logits.detach(), *(p.grad for p in model.parameters())]
        for truth, theirs, mine in zip(grads["exact"], grads["plain"], grads["ours"], strict=True):
            far = [torch.linalg.vector_norm(g.float() - truth).item() for g in (theirs, mine)]
            assert far[1] < 1.3 * far[0] + 2e-3 * torch.linalg.vector_norm(truth).item()


@needs_compiled
def test_all_else_is_computed_as_before() -> None:
    """Float32, padded rows, and generation with a cache go the way they went."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = qwen().to(dtype)
        ours = copy.deepcopy(plain)
        use_rotated_heads(ours)
        ids = torch.randint(1, 50, (2, 9))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        with torch.no_grad():
            assert torch.equal(ours(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
            if dtype == torch.float32:
                assert torch.equal(packed(ours, [5, 6]), packed(plain, [5, 6]))
        settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(ids, **settings), plain.generate(ids, **settings))


@needs_compiled
def test_an_adapter_is_heard() -> None:
    model = qwen()
    use_rotated_heads(model)
    before = packed(model, [8, 5])
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj, nn.Threshold(0.0, 0.0))
    assert not torch.equal(packed(model, [8, 5]), before)


def test_other_layers_stay_what_they_are() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 50}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2))
    for model in (llama, qwen(head_dim=16)):
        use_rotated_heads(model)
        assert not any(isinstance(module, BFloat16Qwen3Attention) for module in model.modules())
