"""The speedrun in miniature, by its command: it runs to the end, goes on where it stopped, refuses bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts.cli.main import main
from rollouts.pipeline import stages

MINIATURE = {
    "documents": 60, "conversations": 80, "validation": 8, "held_out": 2, "vocab_size": 400, "max_new_tokens": 8,
    "model.hidden_size": 32, "model.num_layers": 1, "model.head_dim": 8, "base.batch_size": 4, "base.block_length": 128,
    "sft.batch_size": 8, "sft.checkpoint_every": 4, "rl.num_steps": 4, "rl.prompts": 2, "rl.samples": 4,
    "rl.max_tokens": 8, "rl.checkpoint_every": 2, "device": "cpu", "precision": "float32",
}  # fmt: skip


def speedrun(run_dir: Path, **changes: object) -> int:
    settings = {**MINIATURE, "run_dir": run_dir, **changes}
    return main(["speedrun", *(f"--{key}={value}" for key, value in settings.items())])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished miniature speedrun; copy it to change it."""
    run_dir = tmp_path_factory.mktemp("speedrun") / "run"
    assert speedrun(run_dir) == 0
    return run_dir


def test_it_leaves_models_data_and_reports(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == [
        "start-up",
        "data",
        "tokenizer",
        "base",
        "sft",
        "rl",
        "evaluation",
    ]
    assert report["seconds"] == pytest.approx(sum(stage["seconds"] for stage in report["stages"]))
    assert report["accuracy"]["sft"]["all"]["number"] == 20
    for name in ("base", "sft"):
        curve = report["curves"][name]["train"]
        assert curve[-1][1] < curve[0][1]
    assert [step for step, _ in report["curves"]["rl"]["train"]] == [1, 2, 3, 4]
    assert len((finished / "rl" / "rollouts.jsonl").read_text().splitlines()) == 4 * 2 * 4
    for name in ("base", "sft", "rl"):
        model = AutoModelForCausalLM.from_pretrained(finished / name / "final")
        tokenizer = AutoTokenizer.from_pretrained(finished / name / "final")
        assert model.config.vocab_size == len(tokenizer) == 400
        assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
    assert (finished / "report.html").read_text().startswith("<!doctype html>")
    assert (finished / "report.md").read_text().startswith("# Speedrun")
    assert not list(finished.rglob("*.tmp"))


def test_held_out_problems_do_not_occur_in_its_files(finished: Path) -> None:
    held_out = stages.read_jsonl(finished / "data" / "held_out.jsonl")
    trained = stages.read_jsonl(finished / "data" / "conversations.jsonl")
    trained += [{"messages": [*row["prompt"], {}]} for row in stages.read_jsonl(finished / "rl" / "rollouts.jsonl")]
    questions = {json.dumps(row["messages"][: len(row["messages"]) - 1]) for row in trained}
    assert held_out and not any(json.dumps(problem["prompt"]) in questions for problem in held_out)
    documents = (finished / "data" / "documents.jsonl").read_text() + json.dumps(trained)
    for problem in held_out:
        if problem["family"] in ("one step", "two steps"):
            for line in problem["reply"][0]["content"].split(". ")[:-1]:
                assert line not in documents
        if problem["family"] == "calculator":
            assert problem["key"].replace(" ", " * ") not in documents


def test_a_second_run_skips_everything_and_reports_the_same(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((finished / "report.json").read_text())
    assert speedrun(finished) == 0
    assert capsys.readouterr().out.count("complete, skipped") == 6
    after = json.loads((finished / "report.json").read_text())
    assert after["accuracy"] == before["accuracy"] and after["curves"] == before["curves"]


@pytest.mark.parametrize(("stage", "step", "last"), [("sft", 6, 11), ("rl", 3, 4)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    step: int,
    last: int,
) -> None:
    """Interrupted after a checkpoint, then run again: the same weights, and every step once in the metrics."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for name in (stage, "evaluation"):
        shutil.rmtree(run_dir / name)
    log = stages.JSONLLogger.log

    def interrupt(self: stages.JSONLLogger, now: int, metrics: dict[str, float]) -> None:
        log(self, now, metrics)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages.JSONLLogger, "log", interrupt)
    assert speedrun(run_dir) == 130
    assert "goes on" in capsys.readouterr().err
    assert not (run_dir / stage / "final").exists()
    monkeypatch.setattr(stages.JSONLLogger, "log", log)
    assert speedrun(run_dir) == 0
    steps = [row["step"] for row in stages.read_jsonl(run_dir / stage / "metrics.jsonl")]
    assert steps == list(range(1, last + 1))
    resumed, straight = (load_file(folder / stage / "final" / "model.safetensors") for folder in (run_dir, finished))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documets": 5}, "did you mean --documents?"),
        ({"conversations": 0}, "conversations"),
        ({"device": "cuda:7"}, "cuda:7"),
        ({"vocab_size": 20}, "vocab_size"),
        ({"model.num_kv_heads": 3}, "num_kv_heads"),
        ({"rl.families": "[compare, srot]"}, "no family of problems 'srot' (did you mean 'sort'?)"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert speedrun(tmp_path / "run", **changes) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_other_settings_in_the_same_folder_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speedrun(finished, seed=1) == 2
    assert "seed" in capsys.readouterr().err


def test_dry_run_prints_the_recipe_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speedrun", "--dry-run", "--run_dir", str(tmp_path / "run"), "--seed", "3"]) == 0
    output = capsys.readouterr().out
    assert "kind: speedrun" in output and "seed: 3" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx2": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_precision_is_bfloat16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert stages.native_precision(torch.device("cpu")) == precision


def test_sft_rehearses_a_share_of_the_documents(finished: Path) -> None:
    summary = json.loads((finished / "sft" / "stage.json").read_text())
    assert summary["steps"] == 11  # 80 conversations and 6 of 60 documents, 8 a step
