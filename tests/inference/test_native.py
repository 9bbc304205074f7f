"""The compiled step against torch operators, and against itself in other company."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from rollouts.inference.forward import make_forward
from rollouts.inference.kv_cache import KVCache
from rollouts.inference.model_runner import ModelShape, NativeForward, StructuredForward
from rollouts.inference.scheduler import Plan
from rollouts.inference.sequences import Rows
from rollouts.inference.step_inputs import make_step
from rollouts.training.backends.pytorch import PyTorchTrainingBackend

MAX_LENGTH = 112

pytestmark = pytest.mark.usefixtures("compiler")


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
        step = make_step(plan, rows, cache, torch.device("cpu"), with_reads=True)
        return forward(step, cache).clone()  # type: ignore[operator]  # the next step overwrites them


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
    rows, cache = random_state(model, 70)
    forward = make_forward(model, MAX_LENGTH)
    together = decode(forward, rows, cache, list(range(70)))
    # Up to eight tokens are computed in one way, more of them in another, by groups of 16 and of 64.
    for which in ([3], [10, 3], [3, 0, 1, 2, 4], list(range(8)), list(range(60, 69)), list(reversed(range(20))),
                  list(range(35)), list(range(5, 55))):  # fmt: skip
        got = decode(forward, rows, cache, which)
        assert torch.equal(got, together[which])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(decode(forward, rows, cache, list(range(70))), together)
        assert torch.equal(decode(forward, rows, cache, [4, 5]), together[[4, 5]])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{"num_heads": 4, "num_kv_heads": 4}, {"num_heads": 6, "num_kv_heads": 2},
                                   {"num_heads": 9, "num_kv_heads": 1}])  # fmt: skip
def test_a_prompts_logits_are_bitwise_the_same_however_it_is_cut(
    make_peaked_model: Callable[..., PreTrainedModel], dtype: torch.dtype, shape: dict[str, int]
) -> None:
    """In one chunk or several, beside other prompts and decoding rows or token by token; and near to torch's."""
    model = make_peaked_model(dtype=dtype, **shape)
    rows, cache = random_state(model, 5)
    rows.num_computed[:3] = (17, 80, 3)
    forward = make_forward(model, MAX_LENGTH)

    def last_logits(*steps: tuple[list[int], list[tuple[int, int, int]]]) -> torch.Tensor:
        """Of row 3's token 70, by steps of (rows that decode, chunks), of which the last one gives it."""
        for decoding, chunks in steps:
            ends = np.cumsum([len(decoding), *(end - start for _, start, end in chunks)])[1:] - 1
            plan = Plan(np.array(decoding, np.int64), chunks, np.array([], np.int64), ends, [])
            with torch.inference_mode():
                step = make_step(plan, rows, cache, torch.device("cpu"), with_reads=True)
                logits = forward(step, cache).clone()
        return logits[[row for row, _, _ in chunks].index(3)]

    whole = last_logits(([], [(3, 0, 71)]))
    for steps in (
        [([], [(3, i, i + 1)]) for i in range(71)],
        [([], [(3, 0, 40)]), ([], [(3, 40, 69)]), ([], [(3, 69, 71)])],
        [([0, 1, 2], [(4, 0, 50), (3, 0, 33)]), ([0], [(3, 33, 71), (4, 50, 60)])],
    ):
        assert torch.equal(last_logits(*steps), whole)
    forward = StructuredForward(model, MAX_LENGTH)  # type: ignore[assignment]
    expected = last_logits(([], [(3, 0, 71)])).float()
    assert (whole - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.15) * expected.std().clamp(min=1)


def test_prompts_may_be_computed_apart_from_decoding_rows(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    """As they are in bfloat16 where the processor has a matrix unit."""
    model = make_peaked_model(dtype=torch.bfloat16)
    rows, cache = random_state(model, 4)
    forward = make_forward(model, MAX_LENGTH)
    assert isinstance(forward, NativeForward)
    plan = Plan(np.array([0, 1]), [(2, 10, 60), (3, 0, 20)], np.array([0, 1, 3]), np.array([0, 1, 71, 30]), [])
    with torch.inference_mode():
        step = make_step(plan, rows, cache, torch.device("cpu"), with_reads=True)
        together = forward(step, cache).clone()
        forward._chunks_apart = True
        apart = forward(step, cache)
    assert torch.equal(apart[:2], together[:2])
    assert (apart - together).abs().mean() < 0.05 * together.std()


def test_a_busy_machine_makes_steps_slower_not_wrong(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    """More threads than cores: those that wait sleep, and after a few long waits one thread does the rest."""
    model = make_peaked_model()
    rows, cache = random_state(model, 30)
    forward = make_forward(model, MAX_LENGTH)
    threads = torch.get_num_threads()
    alone = decode(forward, rows, cache, list(range(30)))
    try:
        torch.set_num_threads(24)
        started = time.monotonic()
        for _ in range(20):
            assert torch.equal(decode(forward, rows, cache, list(range(30))), alone)
        assert time.monotonic() - started < 20
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


def test_a_model_in_training_is_served_by_the_compiled_step(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    """Whatever a backend puts in the place of its linear layers."""
    model = make_peaked_model(dtype=torch.bfloat16)
    PyTorchTrainingBackend(model, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(make_forward(model, MAX_LENGTH), NativeForward)
