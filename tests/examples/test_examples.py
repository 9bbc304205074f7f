"""Every example runs as a newcomer would run it, and what it prints shows that it learned."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run an example's file as a script (in this process: importing torch afresh takes longer than the example)."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(output: str) -> tuple[float, float]:
    first, last = re.search(r"loss: ([\d.]+) -> ([\d.]+)", output).groups()
    return float(first), float(last)


def test_train_sft_single_gpu(run_example, tmp_path: Path) -> None:
    output = run_example("train_sft_single_gpu.py", "--device", "cpu", "--steps", 30, "--out", tmp_path)
    assert "Loaded 5 samples" in output
    first, last = losses(output)
    assert last < 0.5 * first
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_000025", "step_000030"]


def test_run_sft(run_example, tmp_path: Path) -> None:
    output = run_example("run_sft.py", "--device", "cpu", "--steps", 30, "--out", tmp_path)
    assert "'2+2 equals 4.<|im_end|>'" in output
    assert float(re.search(r"final loss: ([\d.]+)", output).group(1)) < 2.0


def test_sft_pipeline_learns_its_five_rows(run_example, tmp_path: Path) -> None:
    output = run_example("sft_pipeline_example.py", "--device", "cpu", "--out", tmp_path)
    assert "What is the capital of France? -> Paris\n" in output
    assert "Who wrote Romeo and Juliet? -> William Shakespeare\n" in output
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_an_example_takes_a_model_folder(run_example, tmp_path: Path, tiny_model_dir: Path) -> None:
    output = run_example(
        "train_sft_single_gpu.py", "--model", tiny_model_dir, "--device", "cpu", "--steps", 2, "--out", tmp_path
    )
    assert "Steps: 2" in output
    assert load_file(tmp_path / "checkpoints" / "step_000002" / "model.safetensors")


def test_run_sft_fsdp_with_two_ranks(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RANKS": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    command = ["bash", EXAMPLES / "run_sft_fsdp.sh", "--device", "cpu", "--steps", "20", "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Ranks: 2" in done.stdout
    first, last = losses(done.stdout)
    assert last < 0.7 * first


def test_tiny_sft_masks_the_question_and_learns_the_whole_answer(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from data.load_tiny_dataset import load_tiny_sft

    samples = load_tiny_sft(tiny_tokenizer)
    answers = ["4", "Paris", "William Shakespeare", "50", "blue"]
    for sample, answer in zip(samples, answers, strict=True):
        learned = [t for t, m in zip(sample.tokens, sample.loss_mask) if m]
        rest = [t for t, m in zip(sample.tokens, sample.loss_mask) if not m]
        assert tiny_tokenizer.decode(learned) == f" {answer}<|im_end|>"
        assert tiny_tokenizer.decode(rest) == f"Q: {sample.prompt}\nA:"
        assert sample.response == answer
