"""The supervised loss against NumPy in float64, autograd's log_softmax and finite differences; its memory promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rollouts.training import sft_losses
from rollouts.training.sft_losses import DeferredLogits, LossOutput, as_loss_output, causal_lm_loss


def numpy_loss(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> tuple[float, int, int]:
    """(weighted sum, tokens with a weight, hits) in float64, one token at a time."""
    total, count, hits = 0.0, 0, 0
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if mask[row, t] == 0:
                continue
            scores = logits[row, t - 1].astype(np.float64)
            log_z = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            total += float(mask[row, t]) * (log_z - scores[labels[row, t]])
            count += 1
            hits += int(scores.argmax() == labels[row, t])
    return total, count, hits


def ragged(seed: int, rows: int = 4, width: int = 9, vocab: int = 13) -> tuple[torch.Tensor, ...]:
    """Logits, labels and a mask with weights other than 0 and 1, a fully masked row and a response of one token."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, width, vocab)) * 3
    labels = rng.integers(0, vocab, size=(rows, width))
    mask = rng.choice([0.0, 1.0, 0.5, 2.5, -1.0], size=(rows, width))
    for row in range(rows):
        mask[row, rng.integers(2, width + 1) :] = 0.0
    mask[0] = 0.0
    mask[1] = 0.0
    mask[1, -1] = 1.5
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), torch.tensor(mask, dtype=torch.float32)


def deferred(seed: int, bias: bool = True, width: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    logits, labels, mask = ragged(seed)
    torch.manual_seed(seed)
    hidden = torch.randn(*labels.shape, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(logits.shape[-1], width, dtype=dtype, requires_grad=True)
    offset = torch.randn(logits.shape[-1], dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, offset, labels, mask


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same sum through autograd, with nothing clever in it."""
    log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return -(log_probs.gather(-1, labels[:, 1:, None])[..., 0] * mask[:, 1:]).sum()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 5), width=st.integers(2, 12), vocab=st.integers(2, 40))
def test_sum_count_and_accuracy_are_numpys(seed: int, rows: int, width: int, vocab: int) -> None:
    logits, labels, mask = ragged(seed, rows, width, vocab)
    expected, count, hits = numpy_loss(logits.numpy(), labels.numpy(), mask.numpy())
    out = causal_lm_loss(logits, labels, mask)
    assert out.total.item() == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert out.count.item() == count
    assert [x.item() for x in out.metrics["accuracy"]] == [hits, count]


def test_a_row_without_loss_adds_nothing() -> None:
    logits, labels, mask = ragged(3)
    whole, without = causal_lm_loss(logits, labels, mask), causal_lm_loss(logits[1:], labels[1:], mask[1:])
    assert whole.total == without.total and whole.count == without.count


def test_a_response_of_one_token() -> None:
    logits, labels, mask = ragged(5)
    out = causal_lm_loss(logits[1:2], labels[1:2], mask[1:2])
    expected = F.cross_entropy(logits[1, -2:-1], labels[1, -1:]) * 1.5
    torch.testing.assert_close(out.total, expected)
    assert out.count == 1


def test_nothing_to_learn_is_zero_with_zero_gradients() -> None:
    hidden, weight, bias, labels, mask = deferred(0)
    out = causal_lm_loss(DeferredLogits(hidden, weight, bias), labels, torch.zeros_like(mask))
    assert out.total == 0 and out.count == 0
    out.total.backward()
    assert all(not x.grad.any() for x in (hidden, weight, bias))


def test_the_first_token_of_a_row_is_never_learned() -> None:
    logits, labels, _ = ragged(1)
    mask = torch.zeros(labels.shape)
    mask[:, 0] = 1.0
    assert causal_lm_loss(logits, labels, mask).count == 0
    assert mask[:, 0].all()  # and the caller's mask is as it was


def test_a_model_that_copies_its_input_is_not_rewarded() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    copies, predicts = 50.0 * F.one_hot(labels, 7), 50.0 * F.one_hot(labels.roll(-1, dims=1), 7)
    ones = torch.ones(labels.shape)
    assert causal_lm_loss(copies, labels, ones).total > 100
    assert causal_lm_loss(copies, labels, ones).metrics["accuracy"][0] == 0
    assert causal_lm_loss(predicts, labels, ones).total < 1e-3
    assert causal_lm_loss(predicts, labels, ones).metrics["accuracy"][0] == 4


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_autograd(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_losses, "_chunk_rows", lambda vocab: 3)
    hidden, weight, offset, labels, mask = deferred(2, bias)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    ours = causal_lm_loss(DeferredLogits(hidden, weight, offset), labels, mask).total
    plain = plain_loss(F.linear(hidden, weight, offset), labels, mask)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(0.37 * ours, leaves), torch.autograd.grad(0.37 * plain, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    logits = ragged(2)[0].requires_grad_(True)
    (a,) = torch.autograd.grad(0.37 * causal_lm_loss(logits, labels, mask).total, logits)
    (b,) = torch.autograd.grad(0.37 * plain_loss(logits, labels, mask), logits)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_finite_differences_of_the_numpy_loss() -> None:
    hidden, weight, bias, labels, mask = deferred(4)
    causal_lm_loss(DeferredLogits(hidden, weight, bias), labels, mask).total.backward()
    arrays = [x.detach().double().numpy() for x in (hidden, weight, bias)]

    def loss() -> float:
        return numpy_loss(arrays[0] @ arrays[1].T + arrays[2], labels.numpy(), mask.numpy())[0]

    rng = np.random.default_rng(0)
    for array, leaf in zip(arrays, (hidden, weight, bias), strict=True):
        for _ in range(12):
            place = tuple(rng.integers(0, n) for n in array.shape)
            value = array[place]
            array[place] = value + 1e-5
            above = loss()
            array[place] = value - 1e-5
            below = loss()
            array[place] = value
            assert leaf.grad[place].item() == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("given_positions", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_deferred_logits_are_materialized_logits(bias: bool, given_positions: bool) -> None:
    hidden, weight, offset, labels, mask = deferred(6, bias)
    positions = None
    if given_positions:
        learned = mask.clone()
        learned[:, 0] = 0
        positions = learned.flatten().nonzero()[:, 0]
    late = DeferredLogits(hidden, weight, offset, positions)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    a, b = causal_lm_loss(late, labels, mask), causal_lm_loss(late.materialize(), labels, mask)
    torch.testing.assert_close(a.total, b.total)
    assert a.count == b.count and a.metrics["accuracy"][0] == b.metrics["accuracy"][0]
    for x, y in zip(torch.autograd.grad(a.total, leaves), torch.autograd.grad(b.total, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 1000])
def test_chunks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels, mask = deferred(7)

    def run() -> list[torch.Tensor]:
        out = causal_lm_loss(DeferredLogits(hidden, weight, bias), labels, mask)
        return [out.total, out.metrics["accuracy"][0], *torch.autograd.grad(out.total, (hidden, weight, bias))]

    whole = run()
    monkeypatch.setattr(sft_losses, "_chunk_rows", lambda vocab: rows)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_micro_batches_add_up() -> None:
    hidden, weight, bias, labels, mask = deferred(8)

    def gradient(parts: list[slice]) -> torch.Tensor:
        total, count = 0.0, 0.0
        for rows in parts:
            out = causal_lm_loss(DeferredLogits(hidden[rows], weight, bias), labels[rows], mask[rows])
            total, count = total + out.total, count + out.count
        return torch.autograd.grad(total / count, weight)[0]

    whole = gradient([slice(None)])
    for parts in ([slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers every result's shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.seen.append((x.shape, x.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_tokens_by_the_vocabulary_exists(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab, width = 1024, 512, 8
    monkeypatch.setattr(sft_losses, "CHUNK_ELEMENTS", 64 * vocab)
    hidden = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens))
    with LargestTensor() as recorder:
        causal_lm_loss(DeferredLogits(hidden, weight), labels, torch.ones(1, tokens)).total.backward()
    with_vocab = [shape for shape, _ in recorder.seen if vocab in shape and shape != weight.shape]
    assert with_vocab, "the recorder saw no logits at all"
    assert max(shape.numel() for shape in with_vocab) <= 64 * vocab
    assert hidden.grad is not None and weight.grad is not None


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    hidden, weight, _, labels, mask = deferred(9)
    frozen = weight.detach()
    causal_lm_loss(DeferredLogits(hidden, frozen, None), labels, mask).total.backward()
    (expected,) = torch.autograd.grad(plain_loss(hidden @ frozen.T, labels, mask), hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-5)
    assert frozen.grad is None


def test_bfloat16_is_summed_in_float32() -> None:
    """4,096 losses of about 6 are exact to 1e-3 in float32 and off by tens in bfloat16."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4097, 300, dtype=torch.bfloat16)
    labels = torch.randint(0, 300, (1, 4097))
    out = causal_lm_loss(logits, labels, torch.ones(labels.shape))
    expected, _, _ = numpy_loss(logits.float().numpy(), labels.numpy(), np.ones(labels.shape))
    assert out.total.dtype == torch.float32
    assert out.total.item() == pytest.approx(expected, rel=1e-5)


def test_a_plain_mean_is_taken_for_the_sum_it_stands_for() -> None:
    logits, labels, _ = ragged(10)
    mask = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    ours = causal_lm_loss(logits, labels, mask)
    mean = F.cross_entropy(logits[:, :-1][mask[:, 1:] > 0], labels[:, 1:][mask[:, 1:] > 0])
    wrapped = as_loss_output(mean, mask)
    torch.testing.assert_close(wrapped.total, ours.total)
    assert wrapped.count == ours.count
    assert isinstance(ours, LossOutput) and as_loss_output(ours, mask) is ours
