"""Fixtures for tests of whole command lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rollouts.cli.main import main


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """``refusal(arguments)``: the one line that a command writes when it refuses them with exit code 2."""

    def refuse(arguments: list[str]) -> str:
        assert main(arguments) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        return line

    return refuse
