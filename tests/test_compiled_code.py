"""C++ compiled on the spot: once, for this machine, and never a reason to fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rollouts.native import native_library

PACKAGE = Path(__file__).parents[1] / "rollouts"

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('#include "vectors.h"\nextern "C" int answer() { return (int)sum(splat(2.625f)); }\n')
    return path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.cpp")), ids=lambda path: path.stem)
def test_every_source_compiles_here(path: Path) -> None:
    """Torch operators would stand in for it without a word in any other test."""
    assert native_library(path) is not None


def test_a_library_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process finds it in the cache: nothing but the question for the processor runs."""
    commands = []
    run = subprocess.run

    def record(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return run(command, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(subprocess, "run", record)
    for expected in (3, 1):  # the question, compiling, linking; then the question alone
        commands.clear()
        library = native_library.__wrapped__(source)
        assert library is not None and library.answer() == 42
        assert len(commands) == expected
    source.write_text('extern "C" int answer() { return 43; }\n')
    library = native_library.__wrapped__(source)
    assert library is not None and library.answer() == 43


def test_a_failing_compiler_is_a_warning(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match="no such flag"):
        assert native_library.__wrapped__(source) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="torch operators"):
        assert native_library.__wrapped__(source) is None


def test_it_can_be_forbidden(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUTS_NATIVE", "0")
    assert native_library.__wrapped__(source) is None
