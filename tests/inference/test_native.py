"""The compiled decoding step against torch operators, and against itself in other company."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from rollouts.inference import native
from rollouts.inference.kv_cache import KVCache
from rollouts.inference.model_runner import ModelShape, NativeForward, StructuredForward, make_forward
from rollouts.inference.scheduler import Plan
from rollouts.inference.sequences import Rows
from rollouts.inference.step_inputs import make_step

MAX_LENGTH = 112

pytestmark = pytest.mark.skipif(native.native_library() is None, reason="no compiler here")


def random_state(model: PreTrainedModel, num_rows: int, seed: int = 0) -> tuple[Rows, KVCache]:
    """Rows of different lengths over a cache full of random keys and values."""
    shape = ModelShape.of(model)
    generator = torch.Generator().manual_seed(seed)
    pages = MAX_LENGTH // 16
    cache = KVCache(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, num_rows * pages, num_rows, MAX_LENGTH,
        model.dtype, torch.device("cpu"),
    )  # fmt: skip
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    cache.page_table[:] = torch.randperm(num_rows * pages, generator=generator).view(num_rows, pages).numpy()
    rows = Rows(num_rows, MAX_LENGTH, shape.vocab_size)
    rows.num_computed[:] = torch.randint(0, MAX_LENGTH, (num_rows,), generator=generator).numpy()
    rows.tokens[:] = torch.randint(0, shape.vocab_size, rows.tokens.shape, generator=generator).numpy()
    return rows, cache


def decode(forward: object, rows: Rows, cache: KVCache, which: list[int]) -> torch.Tensor:
    """Logits of one step of some rows; the cache is left as it was but for their own new keys and values."""
    chosen = np.array(which)
    plan = Plan(chosen, [], chosen, np.arange(len(chosen)), [])
    with torch.inference_mode():
        return forward(make_step(plan, rows, cache, torch.device("cpu"), with_reads=True), cache)  # type: ignore[operator]


SHAPES = {
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "one head each": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "many to one": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
    "odd vocabulary": {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 251},
    "biases": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 33])
def test_compiled_step_equals_torch_operators(name: str, num_rows: int) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 256, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **SHAPES[name]}, initializer_range=0.2)).eval()
    for parameter in model.parameters():  # biases begin at zero
        parameter.data += 0.01 * torch.randn_like(parameter)
    compiled = make_forward(model, MAX_LENGTH)
    assert isinstance(compiled, NativeForward)
    rows, cache = random_state(model, num_rows)
    which = list(range(num_rows))
    expected = decode(StructuredForward(model, MAX_LENGTH), rows, cache, which)
    written = [x.clone() for x in (*cache.keys, *cache.values)]
    got = decode(compiled, rows, cache, which)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    for a, b in zip(written, (*cache.keys, *cache.values), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_and_precision(
    make_peaked_model: Callable[..., PreTrainedModel], architecture: str, dtype: torch.dtype
) -> None:
    model = make_peaked_model(architecture=architecture, dtype=dtype)
    rows, cache = random_state(model, 9)
    which = list(range(9))
    got = decode(make_forward(model, MAX_LENGTH), rows, cache, which)
    expected = decode(StructuredForward(model, MAX_LENGTH), rows, cache, which).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.std())
    assert (got - expected).abs().max() < tolerance * (1 if dtype == torch.float32 else 3)
    assert (got - expected).abs().mean() < tolerance / 2


def test_sliding_windows() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, sliding_window=21, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    rows, cache = random_state(model, 12)
    which = list(range(12))
    got = decode(make_forward(model, MAX_LENGTH), rows, cache, which)
    torch.testing.assert_close(
        got, decode(StructuredForward(model, MAX_LENGTH), rows, cache, which), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_logits_are_bitwise_the_same_in_any_company_and_on_any_number_of_threads(
    make_peaked_model: Callable[..., PreTrainedModel], dtype: torch.dtype
) -> None:
    model = make_peaked_model(dtype=dtype)
    rows, cache = random_state(model, 11)
    forward = make_forward(model, MAX_LENGTH)
    together = decode(forward, rows, cache, list(range(11)))
    for which in ([3], [10, 3], [3, 0, 1, 2, 4], list(reversed(range(11)))):
        got = decode(forward, rows, cache, which)
        assert torch.equal(got, together[which])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(decode(forward, rows, cache, list(range(11))), together)
    finally:
        torch.set_num_threads(threads)


def test_moved_and_replaced_weights_are_found(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    model = make_peaked_model()
    rows, cache = random_state(model, 3)
    forward = make_forward(model, MAX_LENGTH)
    before = decode(forward, rows, cache, [0, 1, 2])
    up = model.model.layers[0].mlp.up_proj
    up.weight.data = up.weight.data * 2  # new storage, the same parameter
    moved = decode(forward, rows, cache, [0, 1, 2])
    assert not torch.equal(moved, before)
    up.weight = torch.nn.Parameter(up.weight.data / 2)  # another parameter: seen after a refresh
    forward.refresh()
    assert torch.equal(decode(forward, rows, cache, [0, 1, 2]), before)
    up.weight.data = up.weight.data[:3].clone()
    with pytest.raises(RuntimeError, match="changed shape"):
        decode(forward, rows, cache, [0, 1, 2])


def test_models_that_the_compiled_step_cannot_read_use_torch_operators(
    make_peaked_model: Callable[..., PreTrainedModel],
) -> None:
    assert isinstance(make_forward(make_peaked_model(dtype=torch.float16), MAX_LENGTH), StructuredForward)
    assert isinstance(make_forward(make_peaked_model(hidden_size=72, num_heads=4), MAX_LENGTH), StructuredForward)
    assert isinstance(make_forward(make_peaked_model(), MAX_LENGTH, native=False), StructuredForward)
