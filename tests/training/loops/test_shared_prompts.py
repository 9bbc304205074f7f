"""Prompts computed once against prompts that every sample carries: the same losses, log-probs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.loops.batches import prepare_sft_batch
from rollouts.training.loops.shared_prompts import (
    plan_shared_micro_batches,
    prepare_shared_batch,
    shared_prompt_length,
)
from rollouts.training.types import Sample

MakeModel = Callable[..., PreTrainedModel]


def sample(tokens: list[int], prompt: int, group: str = "g") -> Sample:
    return Sample(tokens=tokens, loss_mask=[0.0] * prompt + [1.0] * (len(tokens) - prompt), group_id=group)


def groups(seed: int = 0, sizes: tuple[int, ...] = (3, 1, 4)) -> list[Sample]:
    """Ragged groups; the replies of a group may begin alike, and a later turn of a reply is masked again."""
    rng = np.random.default_rng(seed)
    samples = []
    for g, size in enumerate(sizes):
        prompt = rng.integers(3, 500, int(rng.integers(1, 9))).tolist()
        for _ in range(size):
            made = sample(prompt + rng.integers(3, 6, int(rng.integers(1, 12))).tolist(), len(prompt), f"group {g}")
            if len(made.tokens) > len(prompt) + 5:
                made.loss_mask[len(prompt) + 2 : len(prompt) + 4] = [0.0, 0.0]  # type: ignore[index]
            samples.append(made)
    return samples


def test_the_worked_example() -> None:
    batch = prepare_shared_batch([sample([10, 11, 12, 13, 14], 3), sample([10, 11, 12, 15], 3)])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 12, 15]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 7]
    assert batch["prefixes"].tolist() == [[0, 0], [0, 2], [0, 2]]
    assert batch["loss_positions"].tolist() == [3, 4, 6]
    assert batch["max_seqlen"] == 5


@pytest.mark.parametrize(
    ("samples", "length"),
    [
        ([sample([1, 2, 3, 4], 2)], 0),  # alone: nothing to share
        ([sample([1, 2, 3, 4], 2), sample([1, 2, 9], 2)], 1),  # the last prompt token predicts: each has its own
        ([sample([1, 2, 3], 1), sample([1, 2, 4], 1)], 0),  # a prompt of one token
        ([sample([1, 2, 3, 4, 5], 4), sample([1, 7, 3, 4, 6], 4)], 1),  # prompts that differ early
        ([sample([1, 2, 3, 4], 3), sample([1, 2, 3, 4], 4)], 2),  # one that learns nothing
    ],
)
def test_what_can_be_shared(samples: list[Sample], length: int) -> None:
    assert shared_prompt_length(samples) == length


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_gradients_are_those_of_whole_samples(make_tiny_model: MakeModel, seed: int) -> None:
    samples = groups(seed)
    results: list[dict[str, Any]] = []
    for prepare in (prepare_sft_batch, prepare_shared_batch):
        backend = create_pytorch_backend(make_tiny_model(), device="cpu", precision="float32")
        metrics = backend.forward_backward(prepare(samples)).wait()
        grads = {name: p.grad.clone() for name, p in backend.model.named_parameters() if p.grad is not None}
        results.append({"metrics": metrics, "grads": grads})
    whole, shared = results
    assert shared["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-5)
    assert shared["metrics"]["num_tokens"] == whole["metrics"]["num_tokens"]
    assert whole["grads"].keys() == shared["grads"].keys()
    for name, grad in whole["grads"].items():
        torch.testing.assert_close(shared["grads"][name], grad, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_holds_every_sample_once_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = groups(seed, tuple(int(n) for n in rng.integers(1, 9, 6)))
    max_tokens, world_size = int(rng.integers(8, 60)), int(rng.integers(1, 4))
    plan = plan_shared_micro_batches(samples, max_tokens, world_size)
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    assert sorted(i for rank in plan for micro in rank for i in micro) == list(range(len(samples)))
    for micro in (m for rank in plan for m in rank if m):
        batch = prepare_shared_batch([samples[i] for i in micro])
        assert batch["input_ids"].shape[1] <= max_tokens or len(micro) == 1
        learned = [t for i in micro for t, m in zip(samples[i].tokens, samples[i].loss_mask) if m]
        assert batch["labels"].flatten()[batch["loss_positions"]].tolist() == learned
