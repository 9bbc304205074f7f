"""``rollouts sft`` on GSM8K from end to end: 11M parameters from scratch, and what is left, read by others."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts.cli.main import main
from rollouts.models.load import load_hf_model
from rollouts.training.backends import PyTorchTrainingBackend, create_pytorch_backend
from rollouts.training.loops.batches import prepare_sft_batch
from rollouts.training.sft_losses import LossOutput
from rollouts.training.types import Sample

STEPS = 80


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft_gsm8k")
    recipe = {
        "model": {
            "init": {
                "hidden_size": 320,
                "num_layers": 6,
                "num_heads": 10,
                "num_kv_heads": 5,
                "head_dim": 32,
                "intermediate_size": 1280,
            },
            "tokenizer": str(shared_data / "tokenizers" / "minimind"),
        },
        "data": {
            "train": str(shared_data / "gsm8k" / "train.jsonl.gz"),
            "validation": str(shared_data / "gsm8k" / "test.jsonl.gz"),
            "cache_dir": "cache",
        },
        "train": {"num_steps": STEPS, "batch_size": 8},
        "optimizer": {"name": "muon", "lr": 2e-3},
        "device": "cpu",
        "run_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sft", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def samples(shared_data: Path, run: Path) -> list[Sample]:
    """Every eighth test problem, cut by hand: what follows the template's opening of the answer learns."""
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    with gzip.open(shared_data / "gsm8k" / "test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][::8]
    samples = []
    for row in rows:
        question = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        answer = row["answer"] + tokenizer.eos_token
        start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + answer).input_ids
        samples.append(Sample(tokens=ids, loss_mask=[0.0] * start + [1.0] * (len(ids) - start)))
    return samples


@pytest.fixture(scope="module")
def plain(run: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32).eval()
    assert 10e6 < model.num_parameters() < 12e6
    return model


@pytest.mark.long
def test_loss_falls_and_the_test_file_is_reported(run: Path, plain: Any, samples: list[Sample]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert len(losses) == STEPS and losses[0] == pytest.approx(torch.tensor(6400.0).log().item(), abs=0.3)
    tenth = STEPS // 10
    means = [sum(losses[i : i + tenth]) / tenth for i in range(0, STEPS, tenth)]
    assert means[-1] < 0.6 * means[0] and all(b < a for a, b in itertools.pairwise(means[::3]))

    total, count = 0.0, 0.0
    for sample in samples:
        ids, mask = torch.tensor([sample.tokens]), torch.tensor(sample.loss_mask)
        with torch.no_grad():
            log_probs = plain(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        total, count = total - float(log_probs @ mask[1:]), count + float(mask.sum())
    reported = json.loads((run / "report.json").read_text())["metrics"]["val_loss"]["last"]
    assert reported == rows[-1]["val_loss"] == pytest.approx(total / count, abs=0.1)  # of an eighth, in float32


@pytest.mark.long
def test_final_gives_the_same_logits_in_plain_transformers(run: Path, plain: Any, samples: list[Sample]) -> None:
    chosen = samples[:16]
    backend = create_pytorch_backend(load_hf_model(str(run / "final"), dtype=torch.float32)[0], precision="float32")
    ours = all_logits(backend, chosen)
    for sample, found in zip(chosen, ours, strict=True):
        with torch.no_grad():
            expected = plain(torch.tensor([sample.tokens])).logits[0]
        assert (found - expected).abs().max() < 1e-4


def all_logits(backend: PyTorchTrainingBackend, samples: list[Sample]) -> list[torch.Tensor]:
    """What the trainer computes of the samples, packed into one row."""
    seen: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> LossOutput:
        seen.append(logits)
        return LossOutput(logits.sum(), loss_mask.sum(), {})

    backend.loss_fn = keep
    backend.evaluate(prepare_sft_batch(samples)).wait()
    return list(seen[0][0].split([len(s.tokens) for s in samples]))
