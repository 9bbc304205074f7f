"""Reward models on a tiny model: the loss, what they learn, their files, and their use as a reward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from pairs_task import Quiet, draw_pairs
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rollouts.errors import UserError
from rollouts.models import (
    LoRAConfig,
    add_lora,
    export_checkpoint,
    export_model,
    load_hf_model,
    load_reward_model,
    make_reward_model,
)
from rollouts.training.backends import OptimizerConfig, PyTorchTrainingBackend, create_pytorch_backend
from rollouts.training.checkpoints import find_latest
from rollouts.training.datasets.preferences import PreferencePair, load_preference_dataset
from rollouts.training.loops.reward_loop import RewardTrainingConfig, run_reward_training, scored_position
from rollouts.training.rewards import RewardSpec, score_samples
from rollouts.training.rewards.reward_model import RewardModel
from rollouts.training.types import Sample

MakeModel = Callable[..., PreTrainedModel]


def make_pairs(count: int = 12, seed: int = 0) -> list[PreferencePair]:
    """The chosen answer ends with a token of some, the rejected one with one of others."""

    def answer(rng: np.random.Generator, low: int) -> list[int]:
        return [*rng.integers(10, 100, int(rng.integers(1, 5))).tolist(), int(rng.integers(low, low + 8))]

    return draw_pairs(answer, count, seed)


def make_backend(make_tiny_model: MakeModel, folder: Path | None = None, **options: Any) -> PyTorchTrainingBackend:
    lora = options.pop("lora", None)
    model: Any = make_reward_model(make_tiny_model(seed=0), seed=1)
    if lora is not None:
        model = add_lora(model, lora)
    optimizer = options.pop("optimizer", OptimizerConfig(lr=3e-3))
    return create_pytorch_backend(model, checkpoint_dir=folder, optimizer=optimizer, device="cpu", **options)


def run(backend: PyTorchTrainingBackend, pairs: Any, **changes: Any) -> list[dict[str, Any]]:
    options = {"num_steps": 4, "batch_size": 4, "max_tokens_per_micro_batch": 40}
    validation, resume = changes.pop("validation", None), changes.pop("resume", True)
    config = RewardTrainingConfig(**options | changes)
    return anyio.run(lambda: run_reward_training(backend, pairs, config, Quiet(), validation=validation, resume=resume))


def score(model: Any, sample: Sample) -> torch.Tensor:
    """As transformers scores a sequence, alone in its batch."""
    return model(torch.tensor([list(sample.tokens)]), use_cache=False).logits[0, 0]


def test_the_loss_is_bradley_terry_on_transformers_scores(make_tiny_model: MakeModel) -> None:
    pairs = make_pairs(6)
    plain = make_reward_model(make_tiny_model(seed=0), seed=1)
    backend = make_backend(make_tiny_model)
    for changes in ({"max_tokens_per_micro_batch": 1}, {"max_tokens_per_micro_batch": 500}, {"share_prompts": False}):
        row = run(backend, pairs, num_steps=1, batch_size=6, **changes)[0]
        scores = [(score(plain, p.chosen), score(plain, p.rejected)) for p in pairs if p.chosen and p.rejected]
        loss = torch.stack([torch.log1p(torch.exp(r - c)) for c, r in scores]).mean()
        plain.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert row["accuracy"] == pytest.approx(np.mean([(c > r).item() for c, r in scores]))
        assert row["score_chosen"] == pytest.approx(np.mean([c.item() for c, _ in scores]), abs=1e-5)
        assert row["num_tokens"] == 6
        plain.load_state_dict(backend.get_weights().wait())


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=8, alpha=32)])
def test_it_learns_and_others_can_load_it(
    make_tiny_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    held_out = make_pairs(40, seed=1)
    base = tmp_path / "base"
    export_model(make_tiny_model(seed=0), tiny_tokenizer, base)
    model, tokenizer = load_reward_model(base, "cpu", "float32", seed=1)
    backend = create_pytorch_backend(
        add_lora(model, lora) if lora else model,
        tokenizer,
        checkpoint_dir=tmp_path / "steps",
        optimizer=OptimizerConfig(lr=5e-3),
        device="cpu",
    )
    sizes = {"num_steps": 40, "batch_size": 16, "max_tokens_per_micro_batch": 512}
    history = run(backend, make_pairs(64), validation=held_out, **sizes)
    assert history[-1]["val_accuracy"] > 0.9 > 0.8 > history[0]["accuracy"]

    step = find_latest(tmp_path / "steps")
    assert step is not None
    export_checkpoint(step, tmp_path / "final", merge_lora=lora is not None)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", num_labels=1)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    right = [(score(theirs, p.chosen) > score(theirs, p.rejected)).item() for p in held_out if p.chosen and p.rejected]
    assert np.mean(right) == pytest.approx(history[-1]["val_accuracy"], abs=0.026)

    ours, _ = load_reward_model(tmp_path / "final", "cpu", "float32")
    sample = held_out[0].samples[0]
    assert score(ours, sample).item() == pytest.approx(score(theirs, sample).item(), abs=1e-5)
    assert score(backend.model.eval(), sample).item() == pytest.approx(score(theirs, sample).item(), abs=1e-4)
    with pytest.raises(UserError, match="is a reward model"):
        load_hf_model(tmp_path / "final", "cpu")


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4, dropout=0.1)])
def test_resume_is_bitwise(make_tiny_model: MakeModel, tmp_path: Path, lora: LoRAConfig | None) -> None:
    torch.manual_seed(7)
    whole = make_backend(make_tiny_model, tmp_path / "whole", lora=lora)
    expected = run(whole, make_pairs(), num_steps=6, checkpoint_every=2)
    torch.manual_seed(7)
    run(make_backend(make_tiny_model, tmp_path / "parts", lora=lora), make_pairs(), num_steps=4, checkpoint_every=2)
    torch.manual_seed(8)
    resumed = make_backend(make_tiny_model, tmp_path / "parts", lora=lora)
    got = run(resumed, make_pairs(), num_steps=6, checkpoint_every=2)
    assert [(r["step"], r["loss"]) for r in got] == [(r["step"], r["loss"]) for r in expected[4:]]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_padding_at_the_end_is_not_scored(make_tiny_model: MakeModel) -> None:
    assert scored_position([5, 6, 7], 0) == 2
    assert scored_position([5, 6, 0, 0], 0) == 1
    assert scored_position([5, 0, 7, 0], 0) == 2
    assert scored_position([5, 6, 7], None) == 2
    model = make_reward_model(make_tiny_model(seed=0))
    model.config.pad_token_id = 0
    padded = Sample(tokens=[5, 6, 7, 0, 0], loss_mask=[0, 1, 1, 1, 1])
    assert score(model, padded).item() == pytest.approx(score(model, Sample([5, 6, 7], [0, 1, 1])).item(), abs=1e-6)


def test_a_reward_model_is_a_reward(make_tiny_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """What it is trained on and what it scores as a reward are the same tokens: the trained order comes back."""
    rows = [
        {"prompt": f"What is {i} + {i}?", "chosen": f"The answer is {2 * i}.", "rejected": "Please tell me about it."}
        for i in range(24)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = load_preference_dataset(tmp_path / "p.jsonl", tiny_tokenizer)
    backend = make_backend(make_tiny_model)
    run(backend, pairs, num_steps=20, batch_size=12, max_tokens_per_micro_batch=1024)
    model: Any = backend.model.eval()
    export_model(model, tiny_tokenizer, tmp_path / "rm")

    samples, expected = [], []
    for row, pair in zip(rows, pairs, strict=True):
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            prompt = [{"role": "user", "content": row["prompt"]}]
            samples.append(Sample(list(answer.tokens), list(answer.loss_mask), prompt=prompt, response=row[name]))
            end = scored_position(answer.tokens, model.config.pad_token_id) + 1
            expected.append(model(torch.tensor([answer.tokens[:end]]), use_cache=False).logits[0, 0].item())
    for reward in (
        RewardModel(tmp_path / "rm", device="cpu", dtype="float32"),
        RewardModel(model, tokenizer=tiny_tokenizer, same_tokens=True),
        RewardSpec("reward_model", options={"path": str(tmp_path / "rm"), "device": "cpu", "dtype": "float32"}),
    ):
        report = anyio.run(lambda reward=reward: score_samples(samples, reward))
        assert report.failed == 0
        np.testing.assert_allclose([s.reward for s in samples], expected, atol=1e-4)
        assert all(a.reward > b.reward for a, b in zip(samples[::2], samples[1::2], strict=True))  # type: ignore[operator]
        assert set(samples[0].rewards) == {"reward_model"}


def test_bad_input_is_the_users_error(make_tiny_model: MakeModel, tmp_path: Path, tiny_tokenizer: Any) -> None:
    pairs = make_pairs(2)
    for bad, message in (
        ([], "cannot be empty"),
        ([PreferencePair("row 7", pairs[0].chosen, None)], "row 7 has 1 answer"),
    ):
        with pytest.raises(UserError, match=message):
            run(make_backend(make_tiny_model), bad)
    language_model = create_pytorch_backend(make_tiny_model(), device="cpu")
    with pytest.raises(UserError, match="no score head"):
        run(language_model, pairs)
    classifier = make_reward_model(make_tiny_model())
    classifier.score = torch.nn.Linear(64, 3, bias=False)
    classifier.num_labels = classifier.config.num_labels = 3
    export_model(classifier, tiny_tokenizer, tmp_path / "three")
    with pytest.raises(UserError, match="sorts into 3 labels"):
        load_reward_model(tmp_path / "three", "cpu")
