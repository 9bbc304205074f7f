"""Log-probs, entropy, full KL and collision probability against NumPy in float64, autograd and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rollouts.training.algorithms import log_probs as module
from rollouts.training.algorithms.log_probs import (
    ReferenceStates,
    learned_positions,
    token_log_probs,
    token_statistics,
)
from rollouts.training.sft_losses import DeferredLogits

pytestmark = pytest.mark.usefixtures("either_softmax")


def numpy_statistics(logits: np.ndarray, targets: np.ndarray, ref: np.ndarray, temperature: float) -> list[np.ndarray]:
    """Log-prob, entropy, KL to the reference and collision probability of each row, one at a time."""
    rows = []
    for z, y, r in zip(logits.astype(np.float64), targets, ref.astype(np.float64), strict=True):
        z, r = z / temperature, r / temperature
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        q = np.exp(r - r.max()) / np.exp(r - r.max()).sum()
        rows.append((np.log(p[y]), -(p * np.log(p)).sum(), (p * np.log(p / q)).sum(), (p**2).sum()))
    return list(np.array(rows).T)


def case(seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32, tokens: int = 40) -> tuple[Any, ...]:
    """(hidden, weight, bias, labels, positions, reference logits): two rows, a quarter of the tokens not learned."""
    torch.manual_seed(seed)
    width, vocab = 6, 13
    hidden = torch.randn(2, tokens // 2, width).to(dtype).requires_grad_(True)
    weight = torch.randn(vocab, width).to(dtype).requires_grad_(True)
    offset = torch.randn(vocab).to(dtype).requires_grad_(True) if bias else None
    labels = torch.randint(0, vocab, (2, tokens // 2))
    mask = (torch.rand(labels.shape) < 0.75).float()
    positions = learned_positions(hidden, mask)
    return hidden, weight, offset, labels, positions, torch.randn(len(positions), vocab)


def plain(logits: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of every word [N, V] at the learned tokens, through autograd alone."""
    return torch.log_softmax(logits.flatten(0, 1)[positions - 1].float() / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("deferred", [True, False])
def test_values_are_numpys(temperature: float, deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)  # the smallest chunks there are: 64 rows
    hidden, weight, bias, labels, positions, ref = case(tokens=300)
    late = DeferredLogits(hidden, weight, bias)
    logits = late.materialize().detach()
    found = token_statistics(
        late if deferred else logits, labels, positions, temperature, entropy=True, collision=True, ref_logits=ref
    )
    rows = logits.flatten(0, 1)[positions - 1].numpy()
    expected = numpy_statistics(rows, labels.flatten()[positions].numpy(), ref.numpy(), temperature)
    assert len(positions) > 64 * 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=1e-5)


def gradients(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(run(), leaves)


@pytest.mark.parametrize("keep", [1 << 28, 4000, 0])
@pytest.mark.parametrize("what", ["log_probs", "entropy", "kl", "all"])
@pytest.mark.parametrize("deferred", [True, False])
def test_gradients_are_autograds(deferred: bool, what: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all, some (4,000 bytes) or none of the chunks are kept for the backward pass."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "KEEP_BYTES", keep)
    hidden, weight, bias, labels, positions, ref = case(1, tokens=300)
    torch.manual_seed(7)
    a, b, c = torch.randn(3, len(positions))
    a, b, c = a * (what in ("log_probs", "all")), b * (what in ("entropy", "all")), c * (what in ("kl", "all"))
    late = DeferredLogits(hidden, weight, bias)

    def ours() -> torch.Tensor:
        found = token_statistics(
            late if deferred else late.materialize(), labels, positions, 0.8,
            entropy=what in ("entropy", "all"), ref_logits=ref if what in ("kl", "all") else None,
        )  # fmt: skip
        total = (found.log_probs * a).sum() if what in ("log_probs", "all") else torch.zeros(())
        if found.entropy is not None:
            total = total + (found.entropy * b).sum()
        return total if found.full_kl is None else total + (found.full_kl * c).sum()

    def autograds() -> torch.Tensor:
        scores = plain(late.materialize(), labels, positions, 0.8)
        probs, q = scores.exp(), torch.log_softmax(ref / 0.8, dim=-1)
        log_probs = scores.gather(1, labels.flatten()[positions][:, None])[:, 0]
        return (log_probs * a).sum() - ((probs * scores).sum(1) * b).sum() + ((probs * (scores - q)).sum(1) * c).sum()

    leaves = [hidden, weight, bias]
    for x, y in zip(gradients(ours, leaves), gradients(autograds, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_differences() -> None:
    hidden, weight, bias, labels, positions, ref = case(2, tokens=12)
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, len(positions)))
    found = token_statistics(DeferredLogits(hidden, weight, bias), labels, positions, 1.3, entropy=True, ref_logits=ref)
    sum((torch.tensor(m, dtype=torch.float32) * x).sum() for m, x in zip(mix, found[:3])).backward()
    arrays = [x.detach().double().numpy() for x in (hidden, weight, bias)]
    targets, at = labels.flatten()[positions].numpy(), positions.numpy() - 1

    def value() -> float:
        logits = (arrays[0] @ arrays[1].T + arrays[2]).reshape(-1, arrays[1].shape[0])[at]
        return float((np.array(numpy_statistics(logits, targets, ref.numpy(), 1.3)[:3]) * mix).sum())

    for array, leaf in zip(arrays, (hidden, weight, bias), strict=True):
        for _ in range(10):
            place = tuple(rng.integers(0, n) for n in array.shape)
            before = array[place]
            array[place] = before + 1e-5
            above = value()
            array[place] = before - 1e-5
            below = value()
            array[place] = before
            assert leaf.grad[place].item() == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("shares_head", [True, False])
def test_a_references_states_do_as_well_as_its_logits(shares_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an output layer of its own, of another width, or with the policy's; neither gets a gradient from it."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    hidden, weight, bias, labels, positions, _ = case(6, tokens=300)
    head = (weight.detach(), bias.detach()) if shares_head else (torch.randn(13, 4), torch.randn(13))
    states = torch.randn(len(positions), head[0].shape[1])
    late = DeferredLogits(hidden, weight, bias)

    def full_kl(reference: Any) -> torch.Tensor:
        found = token_statistics(late, labels, positions, 0.8, ref_logits=reference).full_kl
        assert found is not None and len(found) > 64 * 3
        return found

    given = ReferenceStates(states, None) if shares_head else ReferenceStates(states, *head)
    expected = full_kl(F.linear(states, *head))
    torch.testing.assert_close(full_kl(given), expected)
    leaves = [hidden, weight, bias]
    for x, y in zip(gradients(lambda: full_kl(given).sum(), leaves), gradients(expected.sum, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("keep", [1 << 28, 0])
def test_bfloat16_gradients_are_near_those_of_float32(
    entropy_gradient: bool, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_BYTES", keep)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        hidden, weight, bias, labels, positions, _ = case(3, dtype=torch.bfloat16)
        leaves = [x.detach().to(dtype).requires_grad_(True) for x in (hidden, weight, bias)]
        found = token_statistics(
            DeferredLogits(*leaves), labels, positions, entropy=True, entropy_gradient=entropy_gradient
        )
        factors = torch.linspace(-1, 1, len(positions))
        total = (found.log_probs * factors).sum()
        if entropy_gradient:
            total = total + 0.3 * found.entropy.sum()
        else:
            assert not found.entropy.requires_grad
        return [found.log_probs, found.entropy, *torch.autograd.grad(total, leaves)]

    for half, full in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert torch.linalg.vector_norm(half.float() - full) < 0.02 * torch.linalg.vector_norm(full)


def test_a_frozen_head_gets_no_gradient_and_its_inputs_the_right_one() -> None:
    """As with an adapter: only the hidden states are differentiated."""
    hidden, weight, bias, labels, positions, _ = case(4)
    factors = torch.linspace(-1, 1, len(positions))
    frozen = (weight.detach(), bias.detach())
    log_probs, _ = token_log_probs(DeferredLogits(hidden, *frozen), labels, positions, 0.9)
    (log_probs * factors).sum().backward()
    scores = plain(F.linear(hidden, *frozen), labels, positions, 0.9)
    expected = (scores.gather(1, labels.flatten()[positions][:, None])[:, 0] * factors).sum()
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-5)


def test_nothing_to_learn_is_empty_with_zero_gradients() -> None:
    hidden, weight, bias, labels, _, _ = case(5)
    nothing = torch.zeros(0, dtype=torch.int64)
    log_probs, entropy = token_log_probs(DeferredLogits(hidden, weight, bias), labels, nothing, with_entropy=True)
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert all(not x.grad.any() for x in (hidden, weight, bias))


def test_what_cannot_be_sampled_makes_nothing_infinite() -> None:
    logits = torch.randn(1, 4, 5)
    logits[..., 2] = -torch.inf
    logits.requires_grad_(True)
    labels = torch.tensor([[0, 1, 3, 4]])
    log_probs, entropy = token_log_probs(logits, labels, torch.tensor([1, 2, 3]), with_entropy=True)
    without = token_log_probs(
        logits[..., [0, 1, 3, 4]], torch.tensor([[0, 1, 2, 3]]), torch.tensor([1, 2, 3]), 1.0, True
    )
    torch.testing.assert_close((log_probs, entropy), without)
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all() and not logits.grad[..., 2].any()


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        token_log_probs(torch.randn(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64), torch.tensor([1]), 0.0)


class Recorder(TorchDispatchMode):
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
    tokens, vocab = 1024, 512
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 64 * vocab)
    hidden = torch.randn(1, tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=dtype, requires_grad=True)
    labels, positions = torch.randint(0, vocab, (1, tokens)), torch.arange(1, tokens)
    with Recorder() as recorder:
        log_probs, entropy = token_log_probs(DeferredLogits(hidden, weight), labels, positions, with_entropy=True)
        (log_probs.sum() + entropy.sum()).backward()
    with_vocab = [shape for shape, _ in recorder.seen if vocab in shape and shape not in (weight.shape, weight.T.shape)]
    assert with_vocab, "the recorder saw no logits at all"
    assert max(shape.numel() for shape in with_vocab) <= 64 * vocab
