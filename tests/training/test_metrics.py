"""Metrics: one line a step whatever kills the run, statistics, and loggers that fail without stopping training."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rollouts
from rollouts.errors import UserError
from rollouts.training import metrics as m


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_one_json_object_a_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    logger = m.JSONLLogger(path)
    logger.log(1, {"loss": 2.5, "num_tokens": 100})
    logger.log(2, {"loss": float("nan"), "grad_norm": float("inf"), "note": "skipped", "val_loss": None})
    logger.close()
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5, "num_tokens": 100},
        {"step": 2, "loss": None, "grad_norm": None, "note": "skipped", "val_loss": None},
    ]


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    logger = m.JSONLLogger(tmp_path / "metrics.jsonl")
    logger.log(1, {"loss": 1.0})
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 40)), min_size=1, max_size=6))
def test_no_step_twice_after_any_kills(tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int]]) -> None:
    """Each life resumes from some step already reached, logs some more, and dies in the middle of a line."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    reached = 0
    for life, (back, torn) in enumerate(lives):
        resumed = max(0, reached - back)
        logger = m.JSONLLogger(path)
        for step in range(resumed + 1, resumed + 6):
            logger.log(step, {"life": life})
        logger.close()
        reached = resumed + 5
        if torn:
            with path.open("a") as file:
                file.write(json.dumps({"step": reached + 1, "loss": 1.25, "padding": "x" * 40})[:torn])
    assert [row["step"] for row in m.read_metrics(path)] == list(range(1, reached + 1))
    assert m.read_metrics(path)[-1]["life"] == len(lives) - 1


def test_max_lines_bounds_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = m.JSONLLogger(tmp_path / "metrics.jsonl", max_lines=3)
    with caplog.at_level("WARNING", logger="rollouts"):
        for step in range(1, 10):
            logger.log(step, {})
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert len(caplog.records) == 1


def test_stats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = m.JSONLLogger(path)
    for step, loss in enumerate([4.0, 1.0, float("nan"), 2.0], start=1):
        logger.log(step, {"loss": loss, "kind": "text", "flag": True})
    stats = m.compute_stats_from_jsonl(path)
    assert stats == {"loss": {"count": 3, "first": 4.0, "last": 2.0, "min": 1.0, "max": 4.0, "mean": 7 / 3}}
    assert m.compute_stats_from_jsonl(path, keys=["val_loss"]) == {}


class Broken:
    """A tracker that is down."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, metrics: m.Metrics) -> None:
        self.calls += 1
        raise ConnectionError("tracker unreachable")

    def close(self) -> None:
        raise AssertionError("a logger that failed is left alone")


def test_a_tracker_that_is_down_never_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, good = Broken(), m.JSONLLogger(tmp_path / "metrics.jsonl")
    logger = m.CompositeLogger([broken, good])
    with caplog.at_level("WARNING", logger="rollouts"):
        for step in range(1, 4):
            logger.log(step, {"loss": 1.0})
        logger.close()
    assert steps_in(good.path) == [1, 2, 3]
    assert broken.calls == 1
    assert [r.getMessage() for r in caplog.records] == [
        "warning: Broken failed and is off for the rest of the run: ConnectionError: tracker unreachable"
    ]


def test_console_lines() -> None:
    out = io.StringIO()
    logger = m.ConsoleLogger(total=25, every=10, file=out)
    for step in range(1, 26):
        values: dict[str, Any] = {"loss": 2.0 / step, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 14045.4}
        logger.log(step, values | ({"val_loss": 1.5} if step == 12 else {}))
    logger.close()
    lines = out.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["Step 10/25", "Step 12/25", "Step 20/25", "Step 25/25"]
    assert lines[0].startswith("Step 10/25: loss=0.2000, grad_norm=0.5000, lr=1.00e-03, 14,045 tokens/s, ")
    assert lines[0].endswith(" left")
    assert "val_loss=1.5000" in lines[1]
    assert not lines[-1].endswith("left")


def test_tensorboard_writes_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = m.TensorBoardLogger(tmp_path)
    logger.log(1, {"loss": 2.0, "note": "text"})
    logger.log(2, {"loss": 1.0})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def run_elsewhere(code: str, **environment: str) -> str:
    """Run code in a process of its own: trackers keep threads and global state."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": str(Path(rollouts.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trackio_keeps_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = f"""
from rollouts.training.metrics import TrackioLogger
logger = TrackioLogger({str(tmp_path / "a_run")!r}, {{"seed": 1}})
logger.log(1, {{"loss": 2.0}})
logger.log(2, {{"loss": 1.0}})
logger.close()
from trackio.sqlite_storage import SQLiteStorage
print([(row["step"], row["loss"]) for row in SQLiteStorage.get_logs("rollouts", "a_run")])
"""
    assert "[(1, 2.0), (2, 1.0)]" in run_elsewhere(code, TRACKIO_DIR=str(tmp_path))


def test_wandb_writes_its_files_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = f"""
from rollouts.training.metrics import WandbLogger
logger = WandbLogger({str(tmp_path)!r}, {{"seed": 1}})
logger.log(1, {{"loss": 2.0}})
logger.close()
"""
    run_elsewhere(code, WANDB_MODE="offline", WANDB_SILENT="true")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("logger", "extra"), [(m.WandbLogger, "wandb"), (m.TrackioLogger, "trackio"), (m.TensorBoardLogger, "tensorboard")]
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: type, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)  # makes the import fail as if it were not installed
    with pytest.raises(UserError, match=rf"pip install 'rollouts-rl\[{extra}\]'"):
        logger(tmp_path)


def test_format_leaves_out_what_is_absent() -> None:
    assert (
        m.format_metrics({"loss": 1.0, "val_loss": None, "mfu": 0.314, "skipped_steps": 0}) == "loss=1.0000, mfu=31.4%"
    )
