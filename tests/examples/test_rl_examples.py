"""The examples of reinforcement learning run as they stand, and what they print shows that the reward rose."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["run_rl.py", "grpo_from_scratch.py"])
def test_the_reward_rises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    found = re.search(r"reward: ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)
    assert found is not None
    assert float(found[2]) > float(found[1]) + 0.1
    assert (tmp_path / "checkpoints" / "step_000030" / "model.safetensors").is_file()


def test_grpo_from_scratch_is_short() -> None:
    assert len((EXAMPLES / "grpo_from_scratch.py").read_text().splitlines()) < 300
