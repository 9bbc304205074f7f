"""Products of bfloat16 matrices against float64, and linear layers that use them against ``nn.Linear``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rollouts.models import products
from rollouts.models.products import BFloat16Linear, add_product, compiled_products, product, use_fast_products

needs_compiled = pytest.mark.skipif(compiled_products() is None, reason="needs avx512_bf16, no AMX and a compiler")


def matrix(rows: int, columns: int, transposed: bool, gap: int = 0) -> torch.Tensor:
    """[rows, columns], stored with ``gap`` unused numbers after each line that must not be read into the sums."""
    lines, width = (columns, rows) if transposed else (rows, columns)
    stored = torch.full((lines, width + gap), torch.nan, dtype=torch.bfloat16)
    stored[:, :width] = torch.randn(lines, width)
    return stored[:, :width].T if transposed else stored[:, :width]


@pytest.mark.parametrize("left", [False, True], ids=["", "left transposed"])
@pytest.mark.parametrize("right", [False, True], ids=["", "right transposed"])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (64, 64, 64),
        (16, 16, 16),  # fewer rows than a tile's multiple, fewer columns than a panel
        (97, 320, 160),  # rows left over, a narrow last panel
        (208, 50, 112),  # words left over in a block of sixteen
        (96, 4500, 80),  # deeper than one block of the sums
        (192, 2049, 48),  # and an odd number of rows to be paired
        (3, 40, 32),  # too small: torch's way
        (33, 24, 7),
    ],
)
def test_products_are_those_of_float64(m: int, k: int, n: int, left: bool, right: bool) -> None:
    torch.manual_seed(m + k + n)
    a, b = matrix(m, k, left, gap=2), matrix(k, n, right, gap=6)
    out = product(a, b)
    exact = a.double() @ b.double()
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    # One rounding to 8 bits at the end, and float32 sums on the way.
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-8, atol=1e-5 * k)

    total = torch.randn(m, n)
    exact += total.double()
    add_product(total, a, b)
    rounded = not products._compute(a, b, None, torch.zeros(m, n))  # torch's product is, before it is added
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5 * k + rounded * 2.0**-5 * k**0.5)


@needs_compiled
def test_the_compiled_way_is_taken_and_does_not_depend_on_threads(
    monkeypatch: pytest.MonkeyPatch, same_on_any_threads: Callable[..., Any]
) -> None:
    a, b = matrix(300, 128, False), matrix(128, 96, True)
    [out] = same_on_any_threads(lambda: [product(a, b)])
    monkeypatch.setattr(torch.Tensor, "__matmul__", None)
    assert torch.equal(product(a, b), out)  # without torch's product


@needs_compiled
def test_what_would_be_read_past_its_end_is_left_to_torch() -> None:
    """Sixteen rows of a transposed matrix are read at a time, and pairs of numbers along K."""
    right = matrix(32, 32, False)
    for left, fits in ((matrix(48, 32, True), True), (matrix(40, 32, True), False), (matrix(40, 32, False), True)):
        out = torch.empty(left.shape[0], 32, dtype=torch.bfloat16)
        assert products._compute(left, right, out, None) == fits
    assert not products._compute(matrix(48, 31, False), matrix(31, 32, False), torch.empty(48, 32).bfloat16(), None)


@needs_compiled
def test_what_is_not_a_number_stays_visible() -> None:
    a, b = matrix(64, 64, False), matrix(64, 64, False)
    a[5, 7] = torch.nan
    a[9, 8] = torch.inf
    bad = ~product(a, b).isfinite().all(dim=1)
    assert bad.nonzero().flatten().tolist() == [5, 9]


@needs_compiled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled graph", "eager"])
def test_a_linear_layer_keeps_values_gradients_and_names(bias: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96, bias), nn.SiLU(), nn.Linear(96, 32, bias)).bfloat16()
    fast = copy.deepcopy(plain)
    use_fast_products(fast)
    assert all(type(fast[i]) is BFloat16Linear and isinstance(fast[i], nn.Linear) for i in (0, 2))
    assert fast.state_dict().keys() == plain.state_dict().keys() and "BFloat16" not in str(list(fast.state_dict()))
    run = torch.compile(fast, dynamic=True) if compiled else fast
    for rows in (40, 55):
        x = torch.randn(2, rows, 64).bfloat16()
        grads = []
        for model, call in ((plain, plain), (fast, run)):
            model.zero_grad()
            inputs = x.clone().requires_grad_(True)
            out = call(inputs)
            out.float().square().sum().backward()
            grads.append([out.detach(), inputs.grad, *(p.grad for p in model.parameters())])
        for theirs, ours in zip(*grads, strict=True):
            assert torch.linalg.vector_norm((theirs - ours).float()) < 0.01 * torch.linalg.vector_norm(theirs.float())


@needs_compiled
def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer = nn.Linear(32, 48).bfloat16()
    use_fast_products(layer)
    layer.weight.requires_grad_(False)
    x = torch.randn(20, 32).bfloat16().requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(20, 32), rtol=2e-2, atol=2e-2)
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], x.detach().sum(0), rtol=2e-2, atol=2e-2)


def test_float32_is_left_to_torch() -> None:
    layer, x = nn.Linear(32, 48), torch.randn(20, 32)
    expected = layer(x)
    use_fast_products(layer)
    assert torch.equal(layer(x), expected)
