"""Where a run's metrics go: a JSON line a step, the console, trackers; a logger that fails never stops training."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from rollouts.errors import UserError
from rollouts.progress import ProgressLine

log = logging.getLogger(__name__)

Metrics = Mapping[str, float | int | str | None]


class MetricsLogger(Protocol):
    """Takes the metrics of one step at a time, in rising order of steps."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JSONLLogger:
    """Appends one JSON object a step to a file: ``{"step": 7, "loss": 2.31, ...}``.

    A resumed run repeats the steps after its checkpoint, so the first step logged drops the lines at and after it,
    and a last line that a killed process left unfinished: no step stands in the file twice. Values that JSON cannot
    express (NaN, infinity) become null.

    Args:
        path: the file; its folder is made when the first line is written.
        max_lines: after so many lines the rest is dropped, with one warning: a bound on the disk a run may fill.
    """

    def __init__(self, path: str | Path, max_lines: int = 10_000_000) -> None:
        self.path, self.max_lines = Path(path), max_lines
        self._file: TextIO | None = None
        self._lines = 0

    def log(self, step: int, metrics: Metrics) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = drop_lines_from(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")
        self._lines += 1
        if self._lines <= self.max_lines:
            row = {"step": step, **{k: _json_number(v) for k, v in metrics.items() if k != "step"}}
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        elif self._lines == self.max_lines + 1:
            log.warning("warning: %s has reached %d lines; later steps are not written", self.path, self.max_lines)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _json_number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_lines_from(path: Path, step: int) -> int:
    """Remove the lines of ``step`` and later, and an unfinished last line. Returns the lines kept.

    The kept lines go to a temporary file that is renamed over the old one, so a kill in between loses nothing.
    """
    if not path.exists():
        return 0
    kept = [line for line, row in _read_lines(path) if row["step"] < step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return len(kept)


def _read_lines(path: Path) -> Iterable[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line, row


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The steps of a ``metrics.jsonl``, oldest first, without a last line cut off by a kill."""
    return [row for _, row in _read_lines(Path(path))]


def compute_stats(rows: Iterable[Metrics], keys: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """First, last, lowest, highest, mean and count of each numeric metric over the steps of a run.

    Args:
        rows: the metrics of each step, oldest first.
        keys: the metrics wanted; None takes every numeric one except ``step``.

    Returns:
        For example ``{"loss": {"count": 200, "first": 6.2, "last": 2.1, "min": 2.0, "max": 6.2, "mean": 3.0}}``;
        a metric that never had a finite value is absent.
    """
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
                and key != "step"
            ):
                columns.setdefault(key, []).append(value)
    return {
        key: {
            "count": len(column),
            "first": column[0],
            "last": column[-1],
            "min": min(column),
            "max": max(column),
            "mean": math.fsum(column) / len(column),
        }
        for key, column in columns.items()
        if keys is None or key in keys
    }


def compute_stats_from_jsonl(path: str | Path, keys: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """``compute_stats`` of a ``metrics.jsonl``."""
    return compute_stats(read_metrics(path), keys)


def format_metrics(metrics: Metrics) -> str:
    """The metrics worth a console line, those that are there, as ``loss=2.3145, lr=1.00e-05, 14,045 tokens/s``."""
    parts = []
    named = ("loss", "accuracy", "reward_mean", "eval_reward", "mismatch_kl", "grad_norm", "val_loss", "val_accuracy")
    for key in named:
        if metrics.get(key) is not None:
            parts.append(f"{key}={metrics[key]:.4f}" if key != "mismatch_kl" else f"{key}={metrics[key]:.1e}")
    if metrics.get("lr") is not None:
        parts.append(f"lr={metrics['lr']:.2e}")
    if metrics.get("tokens_per_second") is not None:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if metrics.get("mfu") is not None:
        parts.append(f"mfu={metrics['mfu']:.1%}")
    if metrics.get("skipped_steps"):
        parts.append(f"skipped_steps={metrics['skipped_steps']}")
    return ", ".join(parts)


class ConsoleLogger:
    """A line every ``every`` steps and at each validation, and a live progress line on a terminal.

    Args:
        total: steps of the whole run, for the time left.
        every: steps between lines; 0 prints validations and the last step only.
    """

    def __init__(self, total: int, every: int = 10, title: str = "train", file: TextIO | None = None) -> None:
        self.total, self.every, self.title, self._output = total, every, title, file
        self._progress: ProgressLine | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        if self._progress is None:  # the clock starts after the first step, which may compile and is no measure
            self._progress = ProgressLine(
                self.title, self.total, initial=step, file=self._output, every_seconds=math.inf
            )
        self._progress.update(
            step, note=format_metrics({k: metrics.get(k) for k in ("loss", "reward_mean", "val_loss")})
        )
        validated = metrics.get("val_loss") is not None or metrics.get("eval_reward") is not None
        if step == self.total or validated or (self.every and step % self.every == 0):
            place = f"Step {step}/{self.total}: {format_metrics(metrics)}"
            left = self._progress.time_left()
            self._progress.print(f"{place}, {left} left" if left and step < self.total else place)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


@contextmanager
def logging_to(logger: MetricsLogger | None, total: int, every: int, title: str) -> Iterator[MetricsLogger]:
    """The caller's logger, which stays open; or where there is none one for the console, as long as the block lasts."""
    if logger is not None:
        yield logger
        return
    with closing(ConsoleLogger(total, every, title)) as own:
        yield own


def require_extra(name: str) -> None:
    """Raise UserError unless the package of an optional logger is installed; package and extra have the same name."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"the {name} logger needs a package that is not installed; run: pip install 'rollouts-rl[{name}]'"
        )


class WandbLogger:
    """Weights & Biases. Its own environment variables apply (WANDB_MODE=offline, WANDB_PROJECT, ...).

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any] | None = None, project: str = "rollouts") -> None:
        require_extra("wandb")
        import wandb

        folder = Path(run_dir)
        project = os.environ.get("WANDB_PROJECT", project)
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(config or {}))

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardLogger:
    """TensorBoard event files under ``run_dir/tensorboard``; numbers only.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, run_dir: str | Path) -> None:
        require_extra("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"))

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackioLogger:
    """Trackio: a local tracker with wandb's interface (``trackio show`` opens its page).

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any] | None = None, project: str = "rollouts") -> None:
        require_extra("trackio")
        import trackio

        self._run = trackio.init(project=project, name=Path(run_dir).name, config=dict(config or {}), resume="allow")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class CompositeLogger:
    """Passes every step to several loggers; one that raises is warned about once and left out from then on.

    A full disk or a tracker that is down must not end a training run.
    """

    def __init__(self, loggers: Iterable[MetricsLogger]) -> None:
        self.loggers = list(loggers)

    def log(self, step: int, metrics: Metrics) -> None:
        self._each(lambda logger: logger.log(step, metrics))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[MetricsLogger], None]) -> None:
        for logger in list(self.loggers):
            try:
                call(logger)
            except Exception as error:
                self.loggers.remove(logger)
                name = type(logger).__name__
                log.warning(
                    "warning: %s failed and is off for the rest of the run: %s: %s", name, type(error).__name__, error
                )
