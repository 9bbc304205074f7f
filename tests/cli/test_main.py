"""The command itself: quick help, one-line errors, verbs and overrides."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import rollouts
from rollouts.cli.main import VERBS, main, split_overrides
from rollouts.errors import UserError
from rollouts.providers.errors import BadRequestError, ProviderError
from rollouts.training.checkpoints import CheckpointError, UnwrittenCheckpointError

ROOT = Path(rollouts.__file__).parents[1]


def seconds_of(*args: str) -> float:
    """Of the processor, which a busy machine does not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *args], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("args", [("-m", "rollouts", "--help"), ("-c", "import rollouts")])
def test_help_and_import_answer_at_once(args: tuple[str, ...]) -> None:
    assert min(seconds_of(*args) for _ in range(5)) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, rollouts.cli.main as m; m.build_parser(); "
        "print([x for x in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'pydantic') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as done:
            main([verb, "--help"])
        assert done.value.code == 0
        assert f"rollouts {verb}" in capsys.readouterr().out


def test_no_verb_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stf"], "'stf' is not a verb of rollouts; did you mean sft?"),
        (["fly"], "'fly' is not a verb of rollouts; the verbs are "),
        (["sft", "a.yaml", "--train.batch_size"], "--train.batch_size has no value; write --train.batch_size VALUE"),
        (["sft", "a.yaml", "--train.batch_size", "--dry-run"], "--train.batch_size has no value"),
        (["sft", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml; see rollouts sft --help"),
        (["serve", "m", "--prot", "3"], "unrecognized arguments: --prot 3; did you mean --port?; see rollouts serve"),
        (["export", "a", "b", "--dtyp", "x"], "unrecognized arguments: --dtyp x; did you mean --dtype?"),
        (["data", "check", "f", "--max-lengths=3"], "unrecognized arguments: --max-lengths=3; did you mean --max-le"),
        (["--versoin"], "unrecognized arguments: --versoin; did you mean --version?; see rollouts --help"),
        (["sft", "none.yaml"], "none.yaml: no such recipe"),
    ],
)
def test_one_line_and_exit_code_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_overrides_may_stand_anywhere() -> None:
    argv = ["--train.batch-size", "4", "recipe.yaml", "--seed=-1", "--dry-run", "--model", "a=b", "--run_dir=x y"]
    assert split_overrides(argv, ["--dry-run", "--help"]) == (
        ["recipe.yaml", "--dry-run"],
        {"train.batch_size": "4", "seed": "-1", "model": "a=b", "run_dir": "x y"},
    )


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8})?", fullmatch=True), st.text(max_size=8)), st.booleans()
)
def test_split_overrides_loses_nothing(overrides: dict[str, str], glued: bool) -> None:
    argv = ["recipe.yaml"]
    for key, value in overrides.items():
        if value.startswith("--") and not glued:
            value = "v"
            overrides = overrides | {key: value}
        argv += [f"--{key}={value}"] if glued else [f"--{key}", value]
    assert split_overrides(argv, ["--dry-run"]) == (["recipe.yaml"], overrides)


def test_split_overrides_needs_values() -> None:
    with pytest.raises(UserError, match="--seed has no value"):
        split_overrides(["--seed"], [])


def test_dry_run_prints_the_resolved_recipe_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("model: org/model\ndata: {train: rows.jsonl}\n")
    assert main(["sft", "--train.batch_size", "5", "r.yaml", "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert (resolved["kind"], resolved["train"]["batch_size"]) == ("sft", 5)
    assert resolved["run_dir"] == str(tmp_path / "runs" / "r")
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_a_reader_that_leaves_a_pipe_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": 3}\n' * 20_000)  # more lines than a pipe holds
    command = f'"{sys.executable}" -m rollouts data check "{tmp_path / "rows.jsonl"}" | head -n 1'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path / "rows.jsonl:1: "))
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProviderError("sglang m at http://localhost:9/generate failed 5 times, at last: refused"), 1),
        (BadRequestError("sglang at http://localhost:9 refuses (status 401): no key", 401), 2),
        (UnwrittenCheckpointError("checkpoint step_000004 could not be written: No space left on device"), 1),
        (CheckpointError("checkpoint step_000004 cannot be read"), 2),
    ],
)
def test_what_fails_on_the_way_and_what_is_bad_input(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rollouts.cli.speedrun.run", lambda args: (_ for _ in ()).throw(error))
    assert main(["speedrun"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/metrics.jsonl")
    monkeypatch.setattr("rollouts.cli.speedrun.run", lambda args: (_ for _ in ()).throw(full))
    assert main(["speedrun"]) == 1
    assert capsys.readouterr().err.startswith("error: runs/x/metrics.jsonl: No space left on device; mend that")
    monkeypatch.setattr("rollouts.cli.speedrun.run", lambda args: Path("/no/such/file").read_text())
    with pytest.raises(FileNotFoundError):  # a mistake of the program keeps its traceback
        main(["speedrun"])
