"""`rollouts serve` as a person starts it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

import rollouts
from rollouts.cli.main import main
from rollouts.cli.serve import name_models
from rollouts.errors import UserError


def test_models_by_name(tiny_model_dir: Path) -> None:
    command = [sys.executable, "-m", "rollouts", "serve", f"one={tiny_model_dir}", str(tiny_model_dir), "--port", "0"]
    command += ["--precision", "float32", "--cache-mb", "16"]
    process = subprocess.Popen(command, cwd=Path(rollouts.__file__).parents[1], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("serving"))
        with openai.OpenAI(base_url=line.split()[-1] + "/v1", api_key="none", max_retries=0) as client:
            names = [model.id for model in client.models.list()]
            assert names == ["one", tiny_model_dir.name]
            answers = {
                client.completions.create(model=name, prompt="Anna", temperature=0).choices[0].text for name in names
            }
            assert len(answers) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()


def test_names(tmp_path: Path) -> None:
    final = tmp_path / "run7" / "final"
    final.mkdir(parents=True)
    assert name_models([str(final), "q=Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B"]) == {
        "run7": str(final),
        "q": "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    }
    for bad in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(UserError, match="NAME=MODEL"):
            name_models(bad)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLLOUTS_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["x=none", "--host", "0.0.0.0"], "--api-key"),
            (["x=none", "--port", port], f"port {port}"),
            (["x=none", "--port", "99999"], "99999"),
            (["x=none", "--max-rows", "0"], "--max-rows"),
            (["x=./none", "--port", "0"], "does not exist"),
        ):
            assert main(["serve", *arguments]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 and message in error
