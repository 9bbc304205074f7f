"""Packed attention against plain transformers: each sequence alone through sdpa, outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from rollouts.models import packed_attention
from rollouts.models.packed_attention import _compiled, packed_attention_cpu, packed_mask, use_packed_attention
from rollouts.training.loops.batches import prepare_sft_batch
from rollouts.training.types import Sample

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3 grouped": lambda: Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "qwen3 one kv head": lambda: Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=16),
    "qwen2": lambda: Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=4),
    "llama": lambda: LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2),
    "mistral, window 3": lambda: MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=3),
    "qwen2, window 3 in one layer": lambda: Qwen2Config(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=1,
    ),
}
LENGTHS = (7, 1, 12, 2, 5)


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa", dtype=dtype)
    for parameter in model.parameters():  # biases and norms away from their neutral starts
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (n,), generator=generator).tolist() for n in LENGTHS]


def packed_logits(model: PreTrainedModel, parts: list[list[int]]) -> torch.Tensor:
    batch = prepare_sft_batch([Sample(tokens=p, loss_mask=[1.0] * len(p)) for p in parts])
    return model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=packed_mask(),
        cu_seqlens=batch["cu_seqlens"],
        max_seqlen=batch["max_seqlen"],
        use_cache=False,
    ).logits[0]


def alone_logits(model: PreTrainedModel, parts: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([p]), use_cache=False).logits[0] for p in parts])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_equals_each_sequence_alone(name: str) -> None:
    reference = build(name)
    packed = copy.deepcopy(reference)
    use_packed_attention(packed)
    assert reference.config._attn_implementation == "sdpa"
    ours, theirs = packed_logits(packed, sequences()), alone_logits(reference, sequences())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    direction = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for (parameter, a), b in zip(packed.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_is_as_close_as_half_precision_gets(name: str) -> None:
    exact, reference = build(name), build(name, torch.bfloat16)
    packed = copy.deepcopy(reference)
    use_packed_attention(packed)
    with torch.no_grad():
        truth = alone_logits(exact, sequences())
        ours = (packed_logits(packed, sequences()).float() - truth).abs().mean()
        theirs = (alone_logits(reference, sequences()).float() - truth).abs().mean()
    assert ours < 1.5 * theirs


def test_sequences_do_not_see_one_another() -> None:
    model = build("qwen3 grouped")
    use_packed_attention(model)
    parts = sequences()
    changed = [parts[0], parts[1], [(t + 1) % 64 for t in parts[2]], parts[3], parts[4]]
    with torch.no_grad():
        a, b = packed_logits(model, parts), packed_logits(model, changed)
    third = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    assert not torch.equal(a[third], b[third])
    a[third] = b[third]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_prefix_equals_sequences_that_each_carry_it(name: str) -> None:
    """[prefix][a][b][c alone] against [prefix a][prefix b][c]: logits, and gradients of every weight."""
    prefix, a, b, c = sequences()[0], *sequences()[2:]
    whole, shared = build(name), build(name)
    use_packed_attention(whole)
    use_packed_attention(shared)
    expected = packed_logits(whole, [prefix + a, prefix + b, c])
    n = len(prefix)
    own_a, own_b = expected[n : n + len(a)], expected[2 * n + len(a) : 2 * n + len(a) + len(b)]

    parts = [prefix, a, b, c]
    starts = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0).to(torch.int32)
    logits = shared(
        input_ids=torch.tensor([prefix + a + b + c]),
        position_ids=torch.cat([torch.arange(len(p)) + (n if i in (1, 2) else 0) for i, p in enumerate(parts)])[None],
        attention_mask=packed_mask(),
        cu_seqlens=starts,
        max_seqlen=n + max(map(len, parts)),
        prefixes=torch.tensor([[0, 0], [0, n], [0, n], [0, 0]], dtype=torch.int32),
        use_cache=False,
    ).logits[0]
    torch.testing.assert_close(logits[:n], expected[:n], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[n:], torch.cat([own_a, own_b, expected[-len(c) :]]), atol=2e-5, rtol=1e-4)

    torch.cat([own_a, own_b, expected[-len(c) :]]).square().sum().backward()
    logits[n:].square().sum().backward()
    for (weight, x), y in zip(whole.named_parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, atol=1e-3, rtol=1e-3, msg=lambda m, w=weight: f"{w}: {m}")


def test_the_order_of_packing_does_not_matter() -> None:
    model = build("llama")
    use_packed_attention(model)
    parts = sequences()
    with torch.no_grad():
        a, b = packed_logits(model, parts).split(LENGTHS), packed_logits(model, parts[::-1]).split(LENGTHS[::-1])
    for x, y in zip(a, reversed(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_carries_it_still_generates_and_pads(name: str) -> None:
    reference = build(name)
    packed = copy.deepcopy(reference)
    use_packed_attention(packed)
    ids = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    for use_cache in (True, False):
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ours = packed.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        theirs = reference.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        assert ours.tolist() == theirs.tolist()
    alone = packed.generate(ids[:1, 3:], **options)
    assert alone[0, 4:].tolist() == ours[0, 7:].tolist()
    torch.testing.assert_close(packed(ids, attention_mask=mask).logits, reference(ids, attention_mask=mask).logits)


def test_a_saved_model_does_not_ask_for_it(tmp_path: Path) -> None:
    model = build("qwen3 grouped")
    use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert "rollouts_packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_operator_keeps_torchs_rules() -> None:
    """Shapes, strides, autograd registration and tracing agree with what runs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.library.opcheck(packed_attention_cpu, (q, k, v, bounds, 0.3))
    torch.library.opcheck(packed_attention_cpu, (q, k, v, bounds, 0.3, torch.tensor([[0, 0], [0, 4]])))


def test_dropout_in_attention_is_refused() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config).train()
    use_packed_attention(model)
    with pytest.raises(ValueError, match="attention_dropout"):
        packed_logits(model, sequences())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 20])  # 20: not a width the C++ knows
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_compiled_attention_equals_torch_in_float64(head_dim: int, num_kv_heads: int, shared: bool) -> None:
    """float32 runs in C++ where it can, float64 never does: two implementations of one operator."""
    generator = torch.Generator().manual_seed(head_dim + num_kv_heads)
    lengths = [1, 2, 7, 8, 9, 31, 32, 33, 100]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    families = [0, 0, 2, 2, 2, 5, 6, 6, 8]  # the sequence that each goes on from; a first one from nothing
    prefixes = torch.tensor([(bounds[f], bounds[f + 1]) if f != i else (0, 0) for i, f in enumerate(families)])
    prefixes = prefixes.to(torch.int32) if shared else None
    shapes = [(sum(lengths), heads, head_dim) for heads in (4, num_kv_heads, num_kv_heads, 4)]
    exact = [torch.randn(s, generator=generator, dtype=torch.float64)[None].transpose(1, 2) for s in shapes]
    results = {}
    for dtype in (torch.float32, torch.float64):
        query, key, value = (x.to(dtype).requires_grad_() for x in exact[:3])
        out, lse = packed_attention_cpu(query, key, value, bounds, head_dim**-0.5, prefixes)
        out.backward(exact[3].to(dtype))
        results[dtype] = [out.detach(), lse.detach(), query.grad, key.grad, value.grad]
    for fast, reference in zip(results[torch.float32], results[torch.float64], strict=True):
        assert fast.shape == reference.shape
        assert (fast.double() - reference).abs().max() < 2e-5


needs_half = pytest.mark.skipif(
    _compiled("packed_attention_forward", torch.bfloat16) is None, reason="needs avx512_bf16, no AMX and a compiler"
)


@needs_half
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_attention_in_bfloat16_is_that_of_float64_rounded(head_dim: int, num_kv_heads: int) -> None:
    """Also for lengths that leave a word of two keys, or of two queries, half empty: nothing there may be read."""
    generator = torch.Generator().manual_seed(head_dim + num_kv_heads)
    lengths = [1, 2, 7, 8, 9, 31, 32, 33, 100]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    shapes = [(sum(lengths), heads, head_dim) for heads in (4, num_kv_heads, num_kv_heads, 4)]
    values = [torch.randn(s, generator=generator).bfloat16()[None].transpose(1, 2) for s in shapes]
    results = {}
    for dtype in (torch.bfloat16, torch.float64):
        query, key, value = (x.to(dtype, copy=True).requires_grad_() for x in values[:3])
        out, lse = packed_attention_cpu(query, key, value, bounds, head_dim**-0.5)
        out.backward(values[3].to(dtype))
        results[dtype] = [out.detach(), lse.detach(), query.grad, key.grad, value.grad]
    assert (results[torch.bfloat16][1].double() - results[torch.float64][1]).abs().max() < 1e-5
    for ours, truth in zip(results[torch.bfloat16], results[torch.float64], strict=True):
        error, size = ours.double() - truth, truth.norm()
        assert error.norm() < 0.004 * size  # about one rounding to 8 bits
        for mine, exact in zip(error.split(lengths, dim=2), truth.split(lengths, dim=2), strict=True):
            assert mine.norm() < 0.02 * exact.norm() + 0.02  # gradients cancel where keys are few


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_half)])
def test_what_is_not_a_number_stays_in_its_sequence(dtype: torch.dtype) -> None:
    """Its neighbors have odd lengths: half a word of theirs is empty."""
    torch.manual_seed(0)
    lengths = [33, 7, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    query, key, value = (torch.randn(1, 2, 45, 16, dtype=dtype) for _ in range(3))
    for x in (query, key, value):
        x[:, :, 33:40] = torch.nan
        x.requires_grad_(True)
    out, _ = packed_attention_cpu(query, key, value, bounds, 0.25)
    out.backward(torch.where(out.isnan(), torch.nan, torch.ones_like(out)))
    for x in (out, query.grad, key.grad, value.grad):
        assert x is not None
        before, within, after = x.split(lengths, dim=2)
        assert before.isfinite().all() and after.isfinite().all() and within.isnan().all()


@needs_half
@pytest.mark.parametrize("shared", [False, True])
def test_a_model_in_bfloat16_computes_attention_in_it_unless_prefixes_are_shared(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    seen = []
    compute = packed_attention.packed_attention_cpu
    monkeypatch.setattr(
        packed_attention, "packed_attention_cpu", lambda q, *rest: seen.append(q.dtype) or compute(q, *rest)
    )
    model = build("qwen3 one kv head", torch.bfloat16)
    use_packed_attention(model)
    batch = prepare_sft_batch([Sample(tokens=p, loss_mask=[1.0] * len(p)) for p in sequences()])
    prefixes = torch.zeros(len(LENGTHS), 2, dtype=torch.int32) if shared else None
    model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=packed_mask(),
        cu_seqlens=batch["cu_seqlens"],
        max_seqlen=batch["max_seqlen"],
        prefixes=prefixes,
        use_cache=False,
    )
    assert seen == [torch.float32 if shared else torch.bfloat16] * 2


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_half)])
def test_attention_does_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, same_on_any_threads: Callable[..., Any]
) -> None:
    """Several sequences go on from one prefix, whose gradients they all add to."""
    torch.manual_seed(0)
    lengths = [300, *[20] * 7] * 12
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    prefixes = torch.tensor([(0, 0) if i % 8 == 0 else bounds[i // 8 * 8 :][:2].tolist() for i in range(96)])
    shapes = [(sum(lengths), heads, 16) for heads in (4, 1, 1, 4)]
    tensors = [torch.randn(shape, dtype=dtype)[None].transpose(1, 2) for shape in shapes]

    def compute() -> list[torch.Tensor]:
        query, key, value = (x.clone().requires_grad_() for x in tensors[:3])
        out, lse = packed_attention_cpu(query, key, value, bounds, 0.25, prefixes.to(torch.int32))
        out.backward(tensors[3])
        return [out.detach(), lse.detach(), query.grad, key.grad, value.grad]

    same_on_any_threads(compute)
