"""``rollouts sft+rl``: two runs from one recipe, the second from the first's model; going on; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from rollouts.cli.main import main
from rollouts.recipes.load import load_recipe, to_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    rows = [{"question": f"What is {a} and 1?", "answer": str(a + 1)} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "length.py").write_text("async def of(sample):\n    return float(sample.num_loss_tokens)\n")
    values = {
        "kind": "sft+rl",
        "run_dir": str(tmp_path / "run"),
        "seed": 3,
        "device": "cpu",
        "sft": {
            "model": {"path": str(tiny_model_dir), "precision": "float32"},
            "data": {"train": "rows.jsonl", "cache_dir": "cache"},
            "train": {"num_steps": 3, "batch_size": 4},
            "optimizer": {"lr": 1e-2},
        },
        "rl": {
            "model": {"precision": "float32"},
            "data": {"train": "rows.jsonl"},
            "reward": "length.py:of",
            "rollout": {"batch_size": 2, "n_samples_per_prompt": 2, "max_tokens": 4},
            "train": {"num_steps": 2},
        },
    }
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_rl_starts_from_the_model_that_sft_leaves(
    recipe: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent / "run"
    assert main(["sft+rl", str(recipe), "--rl.optimizer.lr", "1.0e-12"]) == 0
    out = capsys.readouterr().out
    assert "run/sft: 3 steps" in out and "run/rl: 2 steps" in out
    sft, rl = (load_file(run / name / "final" / "model.safetensors") for name in ("sft", "rl"))
    start = load_file(tiny_model_dir / "model.safetensors")
    assert max((rl[n] - sft[n]).abs().max() for n in sft) < 1e-6 < max((sft[n] - start[n]).abs().max() for n in sft)
    assert {load_recipe(kind, run / kind / "recipe.yaml").seed for kind in ("sft", "rl")} == {3}

    assert main(["sft+rl", str(recipe), "--rl.optimizer.lr", "1.0e-12", "--sft.train.log_every", "1"]) == 0
    assert capsys.readouterr().out.count("this run is finished") == 2

    # Stopped between the two: the same command does what is left, on the same model.
    before = weights_of(run / "sft" / "final")
    shutil.rmtree(run / "rl")
    assert main(["sft+rl", str(recipe), "--rl.optimizer.lr", "1.0e-12"]) == 0
    assert weights_of(run / "sft" / "final") == before and (run / "rl" / "final").is_dir()

    assert main(["sft+rl", str(recipe), "--sft.train.num_steps", "4"]) == 2
    assert "holds a run with sft.train.num_steps 3, now it is 4" in capsys.readouterr().err
    assert main(["export", str(run), str(recipe.parent / "out")]) == 2
    assert f"holds several runs; give one of them: {run / 'rl'}, {run / 'sft'}" in capsys.readouterr().err


def test_the_resolved_recipe_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    resolved = load_recipe("sft+rl", recipe, {"seed": "5"})
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(resolved))
    assert load_recipe("sft+rl", copy) == resolved
    moved: Any = load_recipe("sft+rl", copy, {"run_dir": str(tmp_path / "moved"), "seed": "6"})
    assert (moved.sft.run_dir, moved.rl.model.path) == (f"{tmp_path}/moved/sft", f"{tmp_path}/moved/sft/final")
    assert (moved.sft.seed, moved.rl.seed, moved.rl.device) == (6, 6, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rl.reward", "gsm9k"], "did you mean 'gsm8k'?"),
        (["--rl.data.train", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--rl.data.validation", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--sft.data.train", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--rl.model", "org/model"], "rl.model is the one that sft leaves"),
        (["--rl.model.path", "org/model"], "rl.model is the one that sft leaves"),
        (["--sft.seed", "4"], "sft.seed is that of the whole recipe"),
        (["--rl.run_dir", "x"], "rl.run_dir is that of the whole recipe"),
        (["--rl.rollout.batchsize", "4"], "did you mean --rl.rollout.batch_size?"),
        (["--sft", "null"], "--sft is null"),
        (["--rl.loggers", "[wandb]"], "wandb"),
        (["--device", "cuda:9"], "device 'cuda:9' does not exist"),
    ],
)
def test_mistakes_of_either_stage_cost_one_line_and_no_folder(
    recipe: Path, refusal: Callable[[list[str]], str], arguments: list[str], message: str
) -> None:
    assert message in refusal(["sft+rl", str(recipe), *arguments])
    assert not (recipe.parent / "run").exists()


@pytest.mark.long
def test_two_ranks(recipe: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rollouts", "sft+rl"]
    done = subprocess.run(
        [sys.executable, *command, str(recipe)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (recipe.parent / "run" / "rl" / "final" / "model.safetensors").is_file()
