"""What the README shows runs as written, on the tiny model instead of a downloaded one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import rollouts
from rollouts.cli.main import main

README = (Path(rollouts.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[0]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'
    for name in ("conversations.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(row * 20)
    return tmp_path


def test_python_example(workplace: Path, tiny_model_dir: Path) -> None:
    code = block("python").replace(MODEL, str(tiny_model_dir)).replace("num_steps=200", "num_steps=3")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert [row["step"] for row in names["history"]] == [1, 2, 3]
    assert (workplace / "runs/first/checkpoints/latest/model.safetensors").is_file()


def test_recipe_and_commands(workplace: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "recipe.yaml").write_text(block("yaml").replace(MODEL, str(tiny_model_dir)))
    commands = [line.split("#")[0].split() for line in README.splitlines() if line.startswith("rollouts ")]
    assert len(commands) == 4
    for command in commands:
        assert main(command[1:]) == 0, command
    assert (workplace / "runs/first/final/config.json").is_file()
    assert (workplace / "model/model.safetensors").is_file()
