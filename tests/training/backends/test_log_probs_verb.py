"""Log-probs and values read from a backend, against plain transformers on each sequence alone."""

from __future__ import annotations

import pytest
import torch

from rollouts.errors import UserError
from rollouts.models.lora import LoRAConfig, add_lora
from rollouts.training import Sample, create_pytorch_backend
from rollouts.training.loops.batches import prepare_sft_batch
from rollouts.training.loops.rl_batches import prepare_rl_batch


def make_samples() -> list[Sample]:
    """Ragged: several turns, a single learned token, a learned first token (which nothing predicts), none learned."""
    g = torch.Generator().manual_seed(0)
    masks = [[0, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1], [0, 0, 0, 0, 0]]
    return [Sample(tokens=torch.randint(0, 512, (len(m),), generator=g).tolist(), loss_mask=m) for m in masks]


def expected(model: torch.nn.Module, sample: Sample, temperature: float) -> torch.Tensor:
    tokens = torch.tensor([sample.tokens])
    with torch.no_grad():
        logits = model(tokens).logits[0].double() / temperature
    of_next = logits.log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    return of_next[torch.tensor(sample.loss_mask[1:]) != 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_log_probs_are_those_of_each_sequence_alone(make_tiny_model, temperature: float) -> None:
    samples = make_samples()
    reference = make_tiny_model().eval()
    backend = create_pytorch_backend(make_tiny_model())
    packs = [samples[:2], samples[2:], []]
    found = backend.compute_log_probs([prepare_rl_batch(p) for p in packs], temperature).wait()
    for pack, log_probs in zip(packs, found, strict=True):
        assert log_probs.dtype == torch.float32 and not log_probs.requires_grad
        wanted = torch.cat([torch.zeros(0, dtype=torch.float64), *(expected(reference, s, temperature) for s in pack)])
        torch.testing.assert_close(log_probs.double(), wanted, atol=2e-5, rtol=0)


def test_reading_changes_nothing_that_training_sees(make_tiny_model) -> None:
    histories = []
    for reads in (False, True):
        backend = create_pytorch_backend(make_tiny_model())
        batch = prepare_sft_batch(make_samples())
        history = []
        for _ in range(3):
            if reads:
                backend.compute_log_probs(batch).wait()
            history.append((backend.forward_backward(batch).wait(), backend.optim_step().wait()))
        histories.append(history)
    assert histories[0] == histories[1]


def test_the_base_of_an_adapter_stays_what_it_was(make_tiny_model) -> None:
    batch = prepare_sft_batch(make_samples())
    plain = create_pytorch_backend(make_tiny_model()).compute_log_probs(batch).wait()[0]
    backend = create_pytorch_backend(add_lora(make_tiny_model(), LoRAConfig(r=4)))
    for _ in range(3):
        backend.forward_backward(batch).wait()
        backend.optim_step(lr=1e-2).wait()
    torch.testing.assert_close(backend.compute_log_probs(batch, adapter=False).wait()[0], plain)
    assert (backend.compute_log_probs(batch).wait()[0] - plain).abs().max() > 1e-2
    with pytest.raises(UserError, match="adapter"):
        create_pytorch_backend(make_tiny_model()).compute_log_probs(batch, adapter=False)


def test_collisions_are_sums_of_squared_probabilities(make_tiny_model) -> None:
    samples = make_samples()[:2]
    model = make_tiny_model().eval()
    [found] = create_pytorch_backend(make_tiny_model()).compute_collisions(prepare_rl_batch(samples), 0.7).wait()
    wanted = []
    for sample in samples:
        with torch.no_grad():
            probs = (model(torch.tensor([sample.tokens])).logits[0].double() / 0.7).softmax(-1)
        wanted += [float(probs[t - 1].square().sum()) for t, m in enumerate(sample.loss_mask) if m and t]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
