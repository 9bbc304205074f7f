"""How a long job says where it stands: one live line with rate and time left on a terminal, plain lines on a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def format_duration(seconds: float) -> str:
    """``42 s``, ``3:05 min`` or ``2:03:05 h``."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60}:{s % 60:02d} min"
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d} h"


class ProgressLine:
    """Shows how far a job of ``total`` units is; state: the units done and when the job (re)started.

    On a terminal the line is redrawn in place. Elsewhere a plain line is printed when ``every_seconds`` have passed
    since the last one, and at the end, so that a log file stays short.

    Args:
        title: what is being done, shown first.
        total: units in the whole job.
        initial: units already done before this process began; the rate counts only what is done here.
        unit: what is counted, in the plural.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        initial: int = 0,
        unit: str = "steps",
        file: TextIO | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.done, self.unit = title, total, initial, unit
        self._initial, self._clock, self._every = initial, clock, every_seconds
        self._started = self._printed = clock()
        self._file = file or sys.stderr
        self._live: Progress | None = None
        if self._file.isatty():
            console = Console(file=self._file)
            self._live = Progress(
                BarColumn(bar_width=24), TextColumn("{task.description}"), console=console, transient=True
            )
            self._task = self._live.add_task(title, total=total, completed=initial)
            self._live.start()

    def update(self, done: int, note: str = "") -> None:
        """Move to ``done`` units in total; ``note`` is appended, for example the current loss."""
        self.done = done
        now = self._clock()
        if self._live:
            self._live.update(self._task, completed=done, description=self.describe(note))
        elif now - self._printed >= self._every and done < self.total:
            self._printed = now
            print(self.describe(note), file=self._file, flush=True)

    def describe(self, note: str = "") -> str:
        """The line's text: place, rate and time left (both unknown before the first unit is done)."""
        parts = [f"{self.title} {self.done}/{self.total} {self.unit}"]
        rate = self.rate()
        if rate:
            parts += [f"{rate:.3g} {self.unit}/s", f"{self.time_left()} left"]
        return ", ".join([*parts, note] if note else parts)

    def rate(self) -> float | None:
        """Units per second since this process began; None before the first is done."""
        done, seconds = self.done - self._initial, self._clock() - self._started
        return done / seconds if done > 0 and seconds > 0 else None

    def time_left(self) -> str | None:
        """Time until the last unit at the rate so far, as text; None before the first is done."""
        rate = self.rate()
        return format_duration((self.total - self.done) / rate) if rate else None

    def print(self, line: str) -> None:
        """Print a line that stays, above the live one where there is one."""
        if self._live:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """Take the live line away; safe to call twice."""
        if self._live:
            self._live.stop()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
