"""``rollouts dpo`` and ``rollouts reward-model``: from rows and a model to a run's folder, and on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rollouts.cli.main import main
from rollouts.recipes import preference_schema
from rollouts.recipes.load import load_recipe

COLORS = "red green blue black white brown".split()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Chosen answers are polite, rejected ones are not."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, colors in (("train", COLORS[:5]), ("held_out", COLORS[5:])):
        pairs = [
            {"prompt": f"Is the {thing} {color}?", "chosen": f"Please, the {thing}.", "rejected": "Nadia opens 7."}
            for color in colors
            for thing in "apple river window".split()
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return folder


def arguments(verb: str, folder: Path, rows: Path, run: Path, **changes: Any) -> list[str]:
    keys = {
        "model.path": folder, "model.precision": "float32", "run_dir": run, "device": "cpu",
        "data.train": rows / "train.jsonl", "data.validation": rows / "held_out.jsonl",
        "train.num_steps": 12, "train.batch_size": 8, "train.checkpoint_every": 4, "optimizer.lr": 2e-3,
        "schedule.name": "constant", "loggers": "[jsonl]", **changes,
    }  # fmt: skip
    return [verb, *(x for key, value in keys.items() for x in (f"--{key}", str(value)))]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_dpo_from_rows_to_a_model_and_on(
    rows: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("dpo", tiny_model_dir, rows, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "held-out pairs in the right order 100.0%" in said and "12 steps, loss 0.69" in said
    history = metrics(tmp_path / "run")
    assert history[-1]["val_accuracy"] == 1.0 and history[-1]["reward_margin"] > 0.5
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "final")

    # As if it had been killed after step 8.
    run = tmp_path / "run"
    whole = weights(run / "final")
    for lost in (run / "final", run / "checkpoints" / "step_000012"):
        shutil.rmtree(lost)
    assert main(arguments("dpo", tiny_model_dir, rows, run)) == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, 13))
    assert all(torch.equal(whole[name], value) for name, value in weights(run / "final").items())


def test_reward_model_from_rows_to_a_judge(
    rows: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("reward-model", tiny_model_dir, rows, tmp_path / "run")) == 0
    assert "held-out pairs in the right order 100.0%" in capsys.readouterr().out
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "final", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    scores = []
    for row in map(json.loads, (rows / "held_out.jsonl").read_text().splitlines()):
        for name in ("chosen", "rejected"):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            scores.append(judge(**tokenizer(text, return_tensors="pt")).logits.item())
    assert all(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True))

    # A judge goes on being trained, and is no model to be fine-tuned.
    again = arguments("reward-model", tmp_path / "run" / "final", rows, tmp_path / "more", **{"train.num_steps": 1})
    assert main(again) == 0
    assert metrics(tmp_path / "more")[0]["accuracy"] == 1.0
    assert main(arguments("dpo", tmp_path / "run" / "final", rows, tmp_path / "no")) == 2
    assert "is a reward model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo", "kto"])
def test_every_loss_runs(name: str, rows: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    changes = {"preference.name": name, "train.num_steps": 2}
    assert main(arguments("dpo", tiny_model_dir, rows, tmp_path / name, **changes)) == 0


def test_usual_betas_and_learning_rates() -> None:
    from rollouts.recipes.build_preference import build_pair_config

    def recipe(kind: str, **keys: str) -> Any:
        return load_recipe(kind, None, {"model": "x/y", "data.train": "a.jsonl", **keys})

    for name, beta in (("dpo", 0.1), ("simpo", 2.0)):
        config: Any = build_pair_config(recipe("dpo", **{"preference.name": name}), 100)
        assert (config.loss.name, config.loss.beta, config.num_steps) == (name, beta, 4)
    given: Any = build_pair_config(recipe("dpo", **{"preference.beta": "0.5", "train.num_epochs": "2"}), 100)
    assert (given.loss.beta, given.num_steps) == (0.5, 7)
    assert recipe("dpo").optimizer.lr == 1e-6 and recipe("reward-model").optimizer.lr == 1e-5
    assert recipe("dpo", **{"optimizer.weight_decay": "0.1"}).optimizer.lr == 1e-6


def test_the_documented_keys_are_the_recipes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if b.startswith("kind: dpo"))
    documented = yaml.safe_load(block)
    assert documented["preference"] == preference_schema.Preference().model_dump()
    recipe = load_recipe("dpo", None, {"model": "x/y", "data.train": "a.jsonl"}).model_dump()
    for section in ("train", "optimizer"):
        assert documented[section].items() <= recipe[section].items()


def test_sections_repeat_the_librarys_fields_and_defaults() -> None:
    from rollouts.training.algorithms.preference import PreferenceConfig
    from rollouts.training.loops.preference_loop import PreferenceTrainingConfig
    from rollouts.training.loops.reward_loop import RewardTrainingConfig

    theirs = {f.name: f.default for f in dataclasses.fields(PreferenceConfig)} | {"beta": None}
    assert preference_schema.Preference().model_dump() == theirs
    for config in (PreferenceTrainingConfig, RewardTrainingConfig):
        share = {f.name: f.default for f in dataclasses.fields(config)}["share_prompts"]
        assert preference_schema.PairTrain().share_prompts is share


@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("dpo", {"preference.nam": "dpo"}, "preference.name"),
        ("dpo", {"preference.margin": "1"}, "margin is of the loss simpo"),
        ("dpo", {"train.packing": "false"}, "packing must be true"),
        ("reward-model", {"preference.name": "dpo"}, "preference"),
        (
            "reward-model",
            {"model.path": "null", "model.init": "{}", "model.tokenizer": "t"},
            "starts from a trained model",
        ),
    ],
)
def test_wrong_recipes_are_refused_with_one_line(
    verb: str, changes: dict[str, str], message: str, rows: Path, tiny_model_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(arguments(verb, tiny_model_dir, rows, tmp_path / "run", **changes)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(("verb", "changes"), [("dpo", {}), ("dpo", {"preference.name": "kto"}), ("reward-model", {})])
def test_two_ranks_learn_what_one_does(
    verb: str, changes: dict[str, str], rows: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"train.num_steps": "4", "train.batch_size": "7", "train.max_tokens_per_micro_batch": "60", **changes}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rollouts"]
    two = arguments(verb, tiny_model_dir, rows, tmp_path / "two", **changes)
    subprocess.run([*launch, *two], check=True, timeout=300, cwd=Path(__file__).parents[2])
    assert main(arguments(verb, tiny_model_dir, rows, tmp_path / "one", **changes)) == 0
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert metrics(tmp_path / "two")[-1]["val_loss"] == pytest.approx(
        metrics(tmp_path / "one")[-1]["val_loss"], rel=1e-4
    )
