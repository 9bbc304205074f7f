"""``rollouts sft`` and ``pretrain`` from end to end: results, resuming, forking, adapters, several ranks, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import rollouts
from rollouts.cli.main import main
from rollouts.models.load import load_tokenizer
from rollouts.models.tokenizer import save_tokenizer

ROOT = Path(rollouts.__file__).parents[1]
NUM_ROWS = 24


def write_rows(path: Path, count: int = NUM_ROWS) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": f"The answer is {2 * i}."},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., str]:
    """Writes recipe.yaml for a run of six float32 steps in tmp_path/run, sections updated by the arguments."""

    def make(**sections: Any) -> str:
        values: dict[str, Any] = {
            "run_dir": "run",
            "device": "cpu",
            "model": {"path": str(tiny_model_dir), "precision": "float32"},
            "data": {"train": str(write_rows(tmp_path / "rows.jsonl")), "cache_dir": "cache"},
            "train": {"num_steps": 6, "batch_size": 4, "checkpoint_every": 2},
            "optimizer": {"lr": 0.01},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return make


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    import torch

    left, right = weights_of(a), weights_of(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_sft_learns_and_its_model_loads_anywhere(
    tmp_path: Path, recipe: Callable[..., str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = str(write_rows(tmp_path / "held_out.jsonl", 8))
    assert main(["sft", recipe(data={"validation": held_out}), "--train.num_steps", "20"]) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; the model is in {run / 'final'}")
    reports = {"report.json", "report.md", "report.html"}
    assert {p.name for p in run.iterdir()} == {"recipe.yaml", "metrics.jsonl", "checkpoints", "final"} | reports
    assert steps_of(run) == list(range(1, 21))
    stats = json.loads((run / "report.json").read_text())["metrics"]
    assert stats["loss"]["last"] < stats["loss"]["first"] - 1
    assert stats["val_loss"]["last"] < stats["loss"]["first"] - 1

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 3 + 3?"}], tokenize=False)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    step = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_000020")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(final(ids).logits, step(ids).logits)
        assert (final(ids).logits - base(ids).logits).abs().max() > 0.1


def test_killed_and_run_again_it_ends_as_if_never_killed(tmp_path: Path, recipe: Callable[..., str]) -> None:
    path = recipe()
    assert main(["sft", path, "--run_dir", str(tmp_path / "unbroken")]) == 0
    killed = subprocess.run(
        [sys.executable, "-m", "rollouts", "sft", path],
        env=os.environ | {"ROLLOUTS_FAILPOINT": "checkpoint.before_rename@2=kill", "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert killed.returncode == -9
    run = tmp_path / "run"
    assert [p.name for p in sorted(run.glob("checkpoints/step_*")) if p.suffix != ".tmp"] == ["step_000002"]
    assert steps_of(run) == [1, 2, 3, 4]
    assert main(["sft", path]) == 0
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert same_weights(run / "final", tmp_path / "unbroken" / "final")


def test_ctrl_c_ends_the_run_at_once_and_the_same_command_resumes_it(
    tmp_path: Path, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rollouts.training.metrics import JSONLLogger

    log = JSONLLogger.log

    def press_ctrl_c_after_step_3(self: JSONLLogger, step: int, metrics: Any) -> None:
        log(self, step, metrics)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    path, run = recipe(), tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with monkeypatch.context() as patch:
        patch.setattr(JSONLLogger, "log", press_ctrl_c_after_step_3)
        assert main(["sft", path]) == 130
    signal.signal(signal.SIGINT, before)
    assert f"the same command resumes {run}" in capsys.readouterr().err
    assert steps_of(run) == [1, 2, 3]
    assert main(["sft", path]) == 0
    assert f"going on after step 2, from {run / 'checkpoints' / 'step_000002'}" in capsys.readouterr().err
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_says_so(tmp_path: Path, recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe()
    assert main(["sft", path]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert main(["sft", path]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_fork_starts_a_new_run_from_a_step(tmp_path: Path, recipe: Callable[..., str]) -> None:
    path = recipe()
    assert main(["sft", path]) == 0
    run, fork = tmp_path / "run", tmp_path / "fork"
    again = ["sft", path, "--run_dir", str(fork), "--fork-from", str(run / "checkpoints" / "step_000002")]
    assert main(again) == 0
    assert steps_of(fork) == [3, 4, 5, 6]
    assert same_weights(fork / "final", run / "final")  # nothing was changed, so it took the same way
    longer = ["sft", path, "--run_dir", str(tmp_path / "longer"), "--fork-from", str(run / "checkpoints/latest")]
    assert main([*longer, "--train.num_steps", "8"]) == 0
    assert steps_of(tmp_path / "longer") == [7, 8]
    assert sorted(p.name for p in run.glob("checkpoints/step_*")) == ["step_000002", "step_000004", "step_000006"]


def test_lora_keeps_the_adapter_and_merges_it(tmp_path: Path, recipe: Callable[..., str], tiny_model_dir: Path) -> None:
    assert main(["sft", recipe(model={"lora": {"r": 4}})]) == 0
    run = tmp_path / "run"

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(run / "adapter"))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)(ids).logits
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def test_pretrain_makes_a_model_and_learns_blocks(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "text.txt").write_text("The lantern is near the river. " * 400)
    values = {
        "run_dir": "run",
        "model": {
            "tokenizer": str(tiny_model_dir),
            "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
            "precision": "float32",
        },
        "data": {"train": "text.txt", "cache_dir": "cache"},
        "train": {"num_epochs": 2, "batch_size": 4, "block_length": 64},
        "optimizer": {"name": "muon", "lr": 0.003},
        "loggers": ["jsonl"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["pretrain", str(tmp_path / "recipe.yaml")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    learned = sum(row["num_tokens"] for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[0]["samples"] == 4
    total = json.loads((tmp_path / "run" / "report.json").read_text())["steps"]
    assert len(rows) == total and learned > 0


def test_torchrun_trains_on_two_ranks(tmp_path: Path, recipe: Callable[..., str]) -> None:
    path = recipe()
    assert main(["sft", path, "--run_dir", str(tmp_path / "one")]) == 0
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "rollouts",
            "sft",
            path,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    two = tmp_path / "run"
    assert steps_of(two) == [1, 2, 3, 4, 5, 6]

    import torch

    one = weights_of(tmp_path / "one" / "final")
    for name, tensor in weights_of(two / "final").items():
        torch.testing.assert_close(tensor, one[name], atol=1e-4, rtol=1e-3)


# Bad input: one clear line, exit code 2, no run folder ----------------------------------------------------------------


def malformed_row(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    with write_rows(tmp_path / "bad.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user"')
    return {"data": {"train": "bad.jsonl"}}


def empty_file(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    (tmp_path / "empty.jsonl").touch()
    return {"data": {"train": "empty.jsonl"}}


def missing_file(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {"data": {"train": "missing.jsonl"}}


def folder_without_tokenizer(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    shutil.copytree(tiny_model_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    return {"model": {"path": "./bare"}}


def tokenizer_of_a_larger_model(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.add_tokens(["<one>", "<more>"])
    save_tokenizer(tokenizer, tmp_path / "larger")
    return {"model": {"path": str(tiny_model_dir), "tokenizer": "./larger"}}


def template_without_an_assistant_turn(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    folder = tmp_path / "mute"
    shutil.copytree(tiny_model_dir, folder)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return {"model": {"path": "./mute"}}


def conversation_without_an_assistant_turn(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    (tmp_path / "ask.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    return {"data": {"train": "ask.jsonl"}}


def missing_file_and_missing_model(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return missing_file(tmp_path, tiny_model_dir) | missing_model(tmp_path, tiny_model_dir)  # the cheap look first


def a_run_in_place_of_its_model(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    shutil.copytree(tiny_model_dir, tmp_path / "before" / "final")
    return {"model": {"path": "./before"}}


def folder_in_a_file(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    (tmp_path / "file").touch()
    return {"run_dir": str(tmp_path / "file" / "run")}


def betas_that_are_none(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {"optimizer": {"betas": [2, 3]}}


def unknown_key(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {"train": {"bach_size": 4}}


def missing_device(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {"device": "cuda:99"}


def missing_model(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {"model": {"path": "./nowhere"}}


def shape_that_does_not_fit(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    init = {"hidden_size": 33, "num_heads": 4}
    return {"model": {"path": None, "tokenizer": str(tiny_model_dir), "init": init}}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (malformed_row, [f"bad.jsonl:{NUM_ROWS + 1}: ", "skip"]),
        (empty_file, ["empty.jsonl", "empty"]),
        (missing_file, ["missing.jsonl", "no such file"]),
        (missing_file_and_missing_model, ["missing.jsonl", "no such file"]),
        (a_run_in_place_of_its_model, ["before/config.json does not exist", "that is a run: give", "before/final"]),
        (folder_in_a_file, ["file/run cannot be made"]),
        (betas_that_are_none, ["optimizer.betas.0 is 2", "less than 1"]),
        (folder_without_tokenizer, ["bare", "no tokenizer"]),
        (tokenizer_of_a_larger_model, ["larger has 514 tokens", "512 rows"]),
        (template_without_an_assistant_turn, ["chat template", "assistant"]),
        (conversation_without_an_assistant_turn, ["ask.jsonl:1: ", "assistant"]),
        (unknown_key, ["recipe.yaml: train.bach_size is not a known key; did you mean train.batch_size?"]),
        (missing_device, ["device 'cuda:99' does not exist"]),
        (missing_model, ["nowhere"]),
        (shape_that_does_not_fit, ["hidden_size 33", "num_heads 4"]),
    ],
)
def test_bad_input(
    tmp_path: Path,
    tiny_model_dir: Path,
    recipe: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path, Path], dict[str, Any]],
    words: list[str],
) -> None:
    path = recipe(**make(tmp_path, tiny_model_dir))
    before = {p.name for p in tmp_path.iterdir()}
    assert main(["sft", path]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors[0]
    assert {p.name for p in tmp_path.iterdir()} - before <= {"cache"}


def test_bad_input_of_the_real_command(tmp_path: Path, tiny_model_dir: Path, recipe: Callable[..., str]) -> None:
    path = recipe(**malformed_row(tmp_path, tiny_model_dir))
    done = subprocess.run(
        [sys.executable, "-m", "rollouts", "sft", path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 bad of 25 rows")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_ends_with_one_line(
    tmp_path: Path, recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(optimizer={"lr": 1e30}, train={"max_bad_steps": 2, "max_grad_norm": 1e30})
    assert main(["sft", path]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 2 gradients in a row were not finite")
    assert not (tmp_path / "run" / "final").exists()


def test_bad_rows_can_be_skipped(tmp_path: Path, tiny_model_dir: Path, recipe: Callable[..., str]) -> None:
    path = recipe(**malformed_row(tmp_path, tiny_model_dir))
    assert main(["sft", path, "--on-bad-row", "skip", "--train.num_steps", "1"]) == 0
    assert (tmp_path / "run" / "final").is_dir()


def test_a_logger_that_is_not_installed(
    tmp_path: Path, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # makes it look as if it were not installed
    assert main(["sft", recipe(), "--loggers", "[jsonl, trackio]"]) == 2
    assert "pip install 'rollouts-rl[trackio]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fork_from_nothing(tmp_path: Path, recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", recipe(), "--fork-from", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_strategies_that_do_not_fit_the_launch(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sft", recipe(distributed={"strategy": "fsdp"})]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sft", recipe(distributed={"strategy": "none"})]) == 2
    assert "torchrun started several processes" in capsys.readouterr().err
