"""Functions by name, by dotted path and by file; one clear line when there is none."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.errors import UserError
from rollouts.training.functions import MADE_MODULES, load_function

REGISTRY: dict[str, Callable[..., object]] = {"gsm8k": math.sqrt, "exact_match": len}


def problem(spec: object) -> str:
    with pytest.raises(UserError) as caught:
        load_function(spec, REGISTRY)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_callable_is_given_back_as_it_is() -> None:
    def mine(sample: object) -> float:
        return 1.0

    assert load_function(mine, REGISTRY) is mine


def test_registered_names_come_first() -> None:
    assert load_function("gsm8k", REGISTRY) is math.sqrt


@pytest.mark.parametrize("spec", ["os.path:join", "os.path.join"])
def test_dotted_paths(spec: str) -> None:
    assert load_function(spec, REGISTRY) is os.path.join


def test_an_attribute_may_be_dotted() -> None:
    assert load_function("json:JSONDecoder.decode") is json.JSONDecoder.decode


def test_functions_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\ndef fn(s): return A(3).x\n"
    )
    monkeypatch.chdir(tmp_path)
    fn = load_function("mine.py:fn")
    assert fn(None) == 3
    assert load_function(f"{tmp_path}/mine.py:fn") is fn  # the same file is the same module
    assert pickle.loads(pickle.dumps(fn)) is fn
    assert MADE_MODULES[fn.__module__] == (str(tmp_path / "mine.py"), (tmp_path / "mine.py").read_bytes())
    (tmp_path / "mine.py").write_text("def fn(s): return 4\n")
    assert load_function("mine.py:fn")(None) == 4  # a changed file is another module


def test_two_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(f"def fn(s): return {name!r}\n")
    assert [load_function(f"{tmp_path}/{n}/reward.py:fn")(None) for n in "ab"] == ["a", "b"]


def test_the_nearest_name_is_named() -> None:
    assert "did you mean 'gsm8k'" in problem("gsm8")
    assert "did you mean 'exact_match'" in problem("exact-match")
    assert "exact_match, gsm8k" in problem("nothing_like_it")
    assert "did you mean 'join'" in problem("os.path:joim")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no module 'no_such_pkg'" in problem("no_such_pkg.mod:fn")
    assert "no module 'os.nothing'" in problem("os.nothing:fn")
    assert "os.path has no 'nothing'" in problem("os.path:nothing")
    assert "sep is a str, not a function" in problem("os:sep")
    assert "no file" in problem(f"{tmp_path}/absent.py:fn")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_another.py").write_text("import module_that_is_absent\n")
    assert "no module 'module_that_is_absent' imported by it" in problem("needs_another:fn")


@pytest.mark.parametrize(
    ("text", "reason"), [("def f(:", "SyntaxError"), ("1/0", "ZeroDivisionError"), ("exit(3)", "SystemExit")]
)
def test_a_file_that_fails_to_load(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(text)
    before = set(sys.modules)
    assert reason in problem(f"{tmp_path}/broken.py:fn")
    assert not [m for m in set(sys.modules) - before if "broken" in m]


@pytest.mark.parametrize("spec", [None, 3, "", "  ", "file.py", ":fn", "mod:", "."])
def test_odd_specs(spec: object) -> None:
    problem(spec)
