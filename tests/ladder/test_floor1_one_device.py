"""Floor 1: supervised fine-tuning on one device, from rows in a file to a folder that plain transformers loads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts.models import export_checkpoint, load_hf_model
from rollouts.pipeline.tasks import make_conversations
from rollouts.training import (
    JSONLLogger,
    OptimizerConfig,
    ScheduleConfig,
    SFTTrainingConfig,
    create_pytorch_backend,
    load_sft_dataset,
    run_sft_training,
)
from rollouts.training.checkpoints import find_latest


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sft_from_a_file_to_a_model_folder(tmp_path: Path, tiny_model_dir: Path, precision: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(p.to_row()) + "\n" for p in make_conversations(0, 200)))
    model, tokenizer = load_hf_model(tiny_model_dir, "cpu", "float32")
    samples = load_sft_dataset(rows, tokenizer, cache_dir=tmp_path / "cache")
    backend = create_pytorch_backend(
        model,
        tokenizer,
        checkpoint_dir=tmp_path / "checkpoints",
        precision=precision,
        optimizer=OptimizerConfig("muon", lr=3e-3),
        schedule=ScheduleConfig("cosine"),
        num_steps=40,
    )
    config = SFTTrainingConfig(num_steps=40, batch_size=16, eval_every=20, checkpoint_every=20)
    logger = JSONLLogger(tmp_path / "metrics.jsonl")
    history = asyncio.run(run_sft_training(backend, samples, config, logger, validation=samples[:32]))
    logger.close()

    # It learned, on the data and by its own account.
    losses = [row["loss"] for row in history]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert history[-1]["val_loss"] < history[19]["val_loss"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == list(range(1, 41))

    # What it leaves loads in plain transformers and computes what the trained model computes.
    final = export_checkpoint(find_latest(tmp_path / "checkpoints"), tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).get_vocab() == tokenizer.get_vocab()
    tokens = torch.tensor([samples[0].tokens])
    with torch.no_grad():
        difference = (loaded(tokens).logits - model.eval()(tokens).logits.float()).abs().max()
    # In bfloat16 the folder holds the float32 master weights, the model their rounded copies.
    assert difference < (1e-4 if precision == "float32" else 0.2)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
