"""``rollouts rl`` from a recipe to a model folder: a run, a resumed run, a fork, two ranks, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rollouts.cli.main import main
from rollouts.training import AsyncRolloutManager, PyTorchTrainingBackend
from rollouts.training.rollout_gen.ledger import GroupState


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, rl_task: dict[str, Any]) -> Path:
    """A recipe whose run takes seconds."""
    values = {
        **rl_task,
        "model": {"path": str(tiny_model_dir), "precision": "float32"},
        "rollout": {"batch_size": 4, "n_samples_per_prompt": 4, "max_tokens": 6},
        "train": {"num_steps": 4, "eval_every": 2, "checkpoint_every": 2},
        "optimizer": {"lr": 1e-3},
        "device": "cpu",
        "run_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rollouts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_a_run_leaves_all_that_a_run_leaves(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent / "run"
    assert main(["rl", str(recipe)]) == 0
    assert "4 steps, reward" in capsys.readouterr().out
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "eval_reward" in rows[1] and "eval_reward" not in rows[2]
    samples = rollouts_of(folder)
    assert len(samples) == 4 * 16 and all(len(s["advantages"]) == len(s["tokens"]) for s in samples)
    assert json.loads((folder / "report.json").read_text())["algorithm"] == "grpo"
    assert "reward\\_mean" in (folder / "report.md").read_text() and "<svg" in (folder / "report.html").read_text()
    assert sorted(p.name for p in (folder / "checkpoints").glob("step_*")) == ["step_000002", "step_000004"]
    final = AutoModelForCausalLM.from_pretrained(folder / "final")
    start = AutoModelForCausalLM.from_pretrained(yaml.safe_load(recipe.read_text())["model"]["path"])
    assert any(not torch.equal(a, b) for a, b in zip(final.parameters(), start.parameters()))

    assert main(["rl", str(recipe)]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.usefixtures("compiled_step")
def test_a_run_that_was_stopped_goes_on_and_another_forks_from_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole, fork = (recipe.parent / name for name in ("run", "whole", "fork"))
    assert main(["rl", str(recipe), "--run_dir", str(whole)]) == 0
    # Stopped after its checkpoint of step 2: what a kill leaves is the folder without what came later.
    assert main(["rl", str(recipe), "--train.num_steps", "2"]) == 0
    (folder / "recipe.yaml").write_text((whole / "recipe.yaml").read_text().replace(str(whole), str(folder)))
    subprocess.run(["rm", "-r", str(folder / "final")], check=True)
    assert main(["rl", str(recipe)]) == 0
    assert "going on after step 2" in capsys.readouterr().err
    assert [row["step"] for row in metrics_of(folder)] == [1, 2, 3, 4]
    assert rollouts_of(folder) == rollouts_of(whole)
    a, b = (AutoModelForCausalLM.from_pretrained(run / "final") for run in (folder, whole))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))

    assert main(["rl", str(recipe), "--run_dir", str(fork), "--fork-from", f"{whole}/checkpoints/step_000002"]) == 0
    assert rollouts_of(fork) == [sample for sample in rollouts_of(whole) if sample["step"] > 2]
    capsys.readouterr()
    assert main(["rl", str(recipe), "--rollout.temperature", "0.5"]) == 2
    assert "rollout.temperature" in capsys.readouterr().err


@pytest.mark.usefixtures("compiled_step")
def test_a_critic_on_the_policys_trunk(
    recipe: Path, refusal: Callable[[list[str]], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, fork = recipe.parent / "whole", recipe.parent / "fork"
    values = yaml.safe_load(recipe.read_text()) | {"algorithm": "ppo", "critic": {"shared": True, "lr": 1e-3}}
    values["train"] |= {"mini_batches": 2, "value_steps": 1}
    recipe.write_text(yaml.safe_dump(values))
    arguments = ["rl", str(recipe), "--rollout.filter", "null"]
    assert main([*arguments, "--run_dir", str(whole)]) == 0
    rows = metrics_of(whole)
    assert all(row["critic/value_error"] > 0 for row in rows)
    assert ["policy_loss" in row for row in rows] == [False, True, True, True]
    assert not list(whole.glob("critic_checkpoints"))
    _, info = AutoModelForCausalLM.from_pretrained(whole / "final", output_loading_info=True)
    assert not info["unexpected_keys"] and not list((whole / "final").glob("value_head*"))

    from_step = ["--run_dir", str(fork), "--fork-from", f"{whole}/checkpoints/step_000002"]
    assert main([*arguments, *from_step]) == 0
    assert rollouts_of(fork) == [sample for sample in rollouts_of(whole) if sample["step"] > 2]

    (tmp_path / "own.py").write_text("def loss(logits, labels, loss_mask, **fields):\n    return logits.sum() * 0\n")
    other = ["--run_dir", str(tmp_path / "other"), "--loss.name", f"{tmp_path}/own.py:loss"]
    capsys.readouterr()
    assert "critic.shared needs a policy loss by name" in refusal([*arguments, *other])
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("compiled_step")
@pytest.mark.parametrize("algorithm", ["ppo", "prime"])
def test_a_fork_takes_along_what_learns_beside_the_policy(
    recipe: Path, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, fork = recipe.parent / "whole", recipe.parent / "fork"
    values = yaml.safe_load(recipe.read_text()) | {"algorithm": algorithm}
    values["train"] |= {"mini_batches": 1, "value_steps": 0, "eval_every": 0}
    recipe.write_text(yaml.safe_dump(values))
    arguments = ["rl", str(recipe), "--rollout.filter", "null"]
    assert main([*arguments, "--run_dir", str(whole)]) == 0
    from_step = ["--run_dir", str(fork), "--fork-from", f"{whole}/checkpoints/step_000002"]
    assert main([*arguments, *from_step]) == 0
    assert rollouts_of(fork) == [sample for sample in rollouts_of(whole) if sample["step"] > 2]

    subprocess.run(["rm", "-r", str(fork)], check=True)
    for beside in whole.glob("*_checkpoints"):
        subprocess.run(["rm", "-r", str(beside)], check=True)
    capsys.readouterr()
    assert main([*arguments, *from_step]) == 2
    assert "_checkpoints/step_000002/manifest.json cannot be read" in capsys.readouterr().err
    assert not fork.exists()


@pytest.mark.long
@pytest.mark.usefixtures("compiled_step")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_run_is_the_same_again(recipe: Path, threads: str, precision: str) -> None:
    """In processes of their own, and to the last bit: what is sampled, its log-probs, and the weights at the end."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    found = []
    for i in range(4):
        folder = recipe.parent / f"run_{i}"
        command = [sys.executable, "-m", "rollouts", "rl", recipe, "--run_dir", folder, "--model.precision", precision]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([(folder / name).read_bytes() for name in ("rollouts.jsonl", "final/model.safetensors")])
    assert all(again == found[0] for again in found[1:])


def test_stored_rollouts_alone_are_learned_from(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = recipe.parent / "run", recipe.parent / "second"
    assert main(["rl", str(recipe)]) == 0
    stored = ["--data.train", str(first / "rollouts.jsonl"), "--engine.kind", "stored", "--run_dir", str(second)]
    offline = ["rl", str(recipe), *stored, "--train.eval_every", "0", "--train.num_steps", "6"]
    assert main([*offline, "--reward", "[]"]) == 0
    learned, sampled = ({tuple(s["tokens"]): s["reward"] for s in rollouts_of(run)} for run in (second, first))
    assert learned == sampled  # 16 groups in 6 steps of 4: each at least once, and nothing else
    rows = metrics_of(second)
    assert len(rows) == 6 and all(row["grad_norm"] > 0 for row in rows)
    start, end = (AutoModelForCausalLM.from_pretrained(run / "final") for run in (first, second))
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters()))

    capsys.readouterr()
    (recipe.parent / "empty.jsonl").touch()
    for arguments, message in (
        (["--train.eval_every", "2"], "samples nothing: leave out train.eval_every"),
        (["--data.train", str(recipe.parent / "empty.jsonl")], "holds no rollouts"),
        (["--data.train", str(recipe.parent / "prompts.jsonl")], "prompts.jsonl:1: not an exported sample"),
        (["--data.train.0.repeat", "2"], "reads whole files"),
        (["--engine.kind", "embedded", "--reward", "[]"], "reward is missing"),
    ):
        assert main([*offline, *arguments, "--run_dir", str(recipe.parent / "third")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (recipe.parent / "third").exists()


def test_two_ranks_sample_and_learn_as_one(recipe: Path) -> None:
    """Sharded over two ranks: the first samples with a copy of the weights, both learn; the run is the same."""
    one, two = recipe.parent / "one", recipe.parent / "two"
    overrides = ["--train.mini_batches", "2", "--loss.kl", "full"]
    assert main(["rl", str(recipe), "--run_dir", str(one), *overrides]) == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "rollouts", "rl", recipe, "--run_dir", two, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of its weights" not in done.stderr  # every one of the sampling copy's was compared
    assert [s["tokens"] for s in rollouts_of(one)[:16]] == [s["tokens"] for s in rollouts_of(two)[:16]]
    for a, b in zip(metrics_of(one)[:1], metrics_of(two)[:1], strict=True):
        for name in ("reward_mean", "loss", "grad_norm", "entropy", "mismatch_kl", "kl_ref"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    assert max(row["mismatch_kl"] for row in metrics_of(two)) < 1e-5  # the copy that samples is the one that learns
    AutoModelForCausalLM.from_pretrained(two / "final")


@pytest.mark.parametrize("algorithm", ["ppo", "prime", "remax", "dapo"])
def test_algorithms_of_other_shapes_run(recipe: Path, algorithm: str) -> None:
    overrides = ["--algorithm", algorithm, "--train.num_steps", "2", "--train.eval_every", "0"]
    assert main(["rl", str(recipe), *overrides, "--train.value_steps", "0"]) == 0
    assert all(row["grad_norm"] > 0 for row in metrics_of(recipe.parent / "run"))


def test_overlap_and_lora(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning waits until what is sampled beside it is there, as it would not have to on a faster engine."""
    managers: list[AsyncRolloutManager] = []
    make, learn = AsyncRolloutManager.__init__, PyTorchTrainingBackend.forward_backward

    def noted(self: AsyncRolloutManager, *args: Any, **kwargs: Any) -> None:
        managers.append(self)
        make(self, *args, **kwargs)

    def held(self: PyTorchTrainingBackend, batch: Any) -> Any:
        deadline = time.monotonic() + 240
        while any(g.state is GroupState.IN_FLIGHT for g in list(managers[0].ledger.open.values())):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return learn(self, batch)

    monkeypatch.setattr(AsyncRolloutManager, "__init__", noted)
    monkeypatch.setattr(PyTorchTrainingBackend, "forward_backward", held)
    overrides = ["--rollout.max_staleness", "2", "--model.lora.r", "4", "--train.eval_every", "0"]
    assert main(["rl", str(recipe), *overrides]) == 0
    rows = metrics_of(recipe.parent / "run")
    assert 0 < max(row["staleness_max"] for row in rows) <= 2
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-6)
    assert (recipe.parent / "run" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "nothing.py:score"], "no file"),
        (["--rollout.batchsize", "4"], "did you mean --rollout.batch_size?"),
        (["--data.train", "missing.jsonl"], "missing.jsonl"),
        (["--algorithm", "grpoo"], "algorithm"),
        (["--engine.max_length", "8"], "none of the 8 prompts is shorter than the engine's 8 tokens"),
    ],
)
def test_mistakes_cost_one_line_and_no_folder(
    recipe: Path, refusal: Callable[[list[str]], str], arguments: list[str], message: str
) -> None:
    assert message in refusal(["rl", str(recipe), *arguments])
    assert not (recipe.parent / "run").exists()


def test_dry_run_prints_the_resolved_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", str(recipe), "--algorithm", "dapo", "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["loss"]["eps_high"] == 0.28 and resolved["algorithm"] == "dapo"
    assert not (recipe.parent / "run").exists()
