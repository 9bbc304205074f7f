"""Floor 2: the same fine-tuning sharded over two ranks gives the same losses and the same model folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rollouts.pipeline.tasks import make_conversations
from rollouts.training.checkpoints import find_latest, verify_checkpoint

WORKER = Path(__file__).with_name("floor2_worker.py")


def train(model: Path, rows: Path, out: Path, ranks: int) -> list[dict[str, float]]:
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, WORKER, model, rows, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "history.json").read_text())


def test_two_ranks_train_as_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(p.to_row()) + "\n" for p in make_conversations(0, 100)))
    one = train(tiny_model_dir, rows, tmp_path / "one", ranks=1)
    two = train(tiny_model_dir, rows, tmp_path / "two", ranks=2)
    assert len(one) == len(two) == 12
    assert one[-1]["loss"] < one[0]["loss"]
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-4
        assert a["num_tokens"] == b["num_tokens"]

    models = []
    for out in ("one", "two"):
        step = find_latest(tmp_path / out / "checkpoints")
        assert step is not None and step.name == "step_000012"
        verify_checkpoint(step)
        models.append(AutoModelForCausalLM.from_pretrained(step))
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)
