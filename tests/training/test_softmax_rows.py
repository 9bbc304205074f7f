"""Softmax of rows, compiled and in torch operators, against float64; what it does with numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rollouts.training.softmax_rows import IMPOSSIBLE, RowColumns, softmax_rows_

pytestmark = pytest.mark.usefixtures("either_softmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 47, 512])
def test_rows_of_any_width_and_scale(vocab: int, dtype: torch.dtype) -> None:
    """Values, and the gradient written over the logits, against float64; logits as large as 60 and as far as 200."""
    torch.manual_seed(vocab)
    logits = (torch.randn(70, vocab) * torch.linspace(0.01, 50, 70)[:, None]).to(dtype)
    targets = torch.randint(0, vocab, (70,))
    columns = RowColumns(*torch.empty(5, 70))
    exact = torch.log_softmax(logits.double() * 0.7, dim=1)
    log_z = (logits.double() * 0.7).logsumexp(1)
    gradient = softmax_rows_(logits.clone(), targets, 0.7, True, columns)
    assert gradient.dtype == dtype
    assert gradient is not None
    log_probs, highest, got_log_z, entropy, collision = columns
    torch.testing.assert_close(log_probs.double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(highest.double(), exact.amax(1), rtol=1e-5, atol=2e-5)
    assert ((log_probs == highest) == (logits.gather(1, targets[:, None])[:, 0] == logits.amax(1))).all()
    torch.testing.assert_close(got_log_z.double(), log_z, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(collision.double(), exact.exp().square().sum(1), rtol=1e-5, atol=1e-6)
    expected = exact.exp() - F.one_hot(targets, vocab)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("word", [3, 16, 18])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_broken_logit_breaks_its_row_and_no_other(value: float, word: int, dtype: torch.dtype) -> None:
    """A loss or gradient that hid it would let a broken step through."""
    torch.manual_seed(0)
    logits = torch.randn(6, 19).to(dtype)
    logits[2, word] = value
    logits[4] = -torch.inf
    columns = RowColumns(*torch.empty(5, 6))
    gradient = softmax_rows_(logits, torch.arange(6), 1.0, True, columns)
    assert gradient is not None
    assert gradient.isfinite().all(1).tolist() == [True, True, False, True, False, True]
    assert columns.log_probs is not None
    assert columns.log_probs.isnan().tolist() == [False, False, True, False, True, False]


def test_a_word_that_cannot_be_sampled_is_impossible_not_infinite() -> None:
    logits = torch.randn(3, 40)
    logits[:, 7] = -torch.inf
    columns = RowColumns(*torch.empty(5, 3))
    softmax_rows_(logits, torch.tensor([7, 0, 7]), 1.0, False, columns)
    log_probs, *others = columns
    assert log_probs.tolist()[::2] == [torch.tensor(IMPOSSIBLE).item()] * 2 and log_probs[1] > -30
    assert all(x.isfinite().all() for x in others)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    for target in (-1, 5):
        with pytest.raises((IndexError, RuntimeError), match=r"vocabulary|out of bounds"):
            softmax_rows_(torch.randn(2, 5), torch.tensor([0, target]), 1.0, False, RowColumns(torch.empty(2)))


def test_rows_do_not_depend_on_the_number_of_threads(same_on_any_threads: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(400, 70).bfloat16(), torch.randint(0, 70, (400,))

    def compute() -> list[torch.Tensor]:
        columns = RowColumns(*torch.empty(5, 400))
        return [softmax_rows_(logits.clone(), targets, 0.7, True, columns), *columns]

    same_on_any_threads(compute)
