"""The progress line: rate and time left from a clock, plain on a pipe, redrawn on a terminal."""

from __future__ import annotations

import io

import pytest

from rollouts.progress import ProgressLine, format_duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (185, "3:05 min"), (7385, "2:03:05 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_rate_and_time_left_count_only_this_process() -> None:
    clock = Clock()
    line = ProgressLine("train", 300, initial=100, file=io.StringIO(), clock=clock)
    assert line.describe() == "train 100/300 steps"
    clock.now += 10
    line.update(120)
    assert line.describe("loss 1.5") == "train 120/300 steps, 2 steps/s, 1:30 min left, loss 1.5"


def test_plain_lines_are_few_and_whole() -> None:
    clock, out = Clock(), io.StringIO()
    with ProgressLine("read", 100, unit="rows", file=out, every_seconds=10, clock=clock) as line:
        for done in range(1, 101):
            clock.now += 1
            line.update(done)
    lines = out.getvalue().splitlines()
    assert len(lines) == 9  # at 10, 20, ... 90 seconds
    assert lines[0] == "read 10/100 rows, 1 rows/s, 1:30 min left"
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_live_line_and_keeps_what_is_printed() -> None:
    out = Terminal()
    with ProgressLine("train", 10, file=out) as line:
        line.update(5, "loss 2.0")
        line.print("Step 5/10: loss=2.0 [x] " + "long " * 40)
    assert "Step 5/10: loss=2.0 [x] " + "long " * 40 in out.getvalue()
    assert "\x1b[" in out.getvalue()
