"""`rollouts data check`: bad rows by line, right statistics, and the right text marked as learned."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rollouts.errors import UserError
from rollouts.training.datasets.check import check_file, render_segments, summary_lines
from rollouts.training.datasets.sft import prepare_sft_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS: list[dict[str, Any]] = [
    {"question": "What is the river?", "answer": "Near the mountain."},
    {"question": "What?"},
    {"question": "Who?", "answer": "Anna sees the bridge near the river. " * 20},
    {"text": "A plain text."},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + "{broken\n")
    return path


def test_counts_lengths_and_problems(file: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    printed: list[str] = []
    result = check_file(file, tiny_tokenizer, max_length=100, on_problem=lambda p: printed.append(str(p)))
    assert [line.split(": ")[0] for line in printed] == [f"{file}:{n}" for n in (2, 3, 5)]
    assert [p.line for p in result.report.bad_rows] == [2, 5]
    assert [p.line for p in result.report.too_long] == [3]
    good = [prepare_sft_sample(ROWS[i], tiny_tokenizer) for i in (0, 3)]
    assert result.lengths.tolist() == [len(s) for s in good]
    assert result.learned.tolist() == [s.num_loss_tokens for s in good]
    assert [text for text, learns in result.example if learns] == ["Near the mountain.<|im_end|>"]
    assert "".join(text for text, _ in result.example) == tiny_tokenizer.decode(good[0].tokens)


def test_summary_shows_percentiles_and_marks_what_learns(file: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    result = check_file(file, tiny_tokenizer)
    lines = list(summary_lines(result, color=False))
    assert lines[0] == "5 rows: 3 usable, 2 bad, 0 too long"
    numbers = [int(n.replace(",", "")) for n in lines[2].split()[1:]]
    expected = [
        result.lengths.mean(),
        *np.percentile(result.lengths, [0, 10, 50, 90, 95, 99, 100]),
        result.lengths.sum(),
    ]
    assert numbers == [round(n) for n in expected]
    assert "<|im_start|>assistant\n[[Near the mountain.<|im_end|>]]" in lines[-1]
    assert "\x1b" not in "".join(lines)
    assert "\x1b[32mNear the mountain.<|im_end|>\x1b[0m" in list(summary_lines(result, color=True))[-1]


def test_data_cannot_drive_the_terminal_nor_flood_it() -> None:
    shown = render_segments([("a\x1b[2Jb\x07\n", False), ("x" * 10_000, True)], color=False)
    assert shown.startswith("a\\x1b[2Jb\\x07\n[[xxx")
    assert shown.endswith("]]\n... and 6,008 more characters")


def test_without_a_tokenizer_rows_are_counted_in_characters(file: Path, tiny_tokenizer) -> None:
    result = check_file(file)
    assert result.unit == "characters"
    assert result.report.samples == 3
    assert result.learned[0] == len("Near the mountain.")
    with pytest.raises(UserError, match="--tokenizer"):
        check_file(file, max_length=10)
    with pytest.raises(UserError, match="max_length must be at least 2"):
        check_file(file, tiny_tokenizer, max_length=-1)


def test_a_file_without_rows_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        check_file(tmp_path / "a.jsonl")


def command(*args: str | Path) -> list[str]:
    start = "import sys; from rollouts.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", start, "data", "check", *map(str, args)]


def run_check(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120)


def test_command_reports_on_a_pipe_and_exits_2(file: Path, tiny_model_dir: Path) -> None:
    done = run_check(file, "--tokenizer", tiny_model_dir, "--max-length", "100")
    assert done.returncode == 2
    assert done.stdout.splitlines()[0] == f"{file}:2: has question but no answer"
    assert f"{file}:5: not JSON" in done.stdout
    assert "5 rows: 2 usable, 2 bad, 1 too long" in done.stdout
    assert "[[Near the mountain.<|im_end|>]]" in done.stdout
    assert done.stderr.splitlines() == [
        f"error: 2 bad rows in {file}; fix them, or leave them out with on_bad_row: skip (--on-bad-row skip)"
    ]


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        (["--on-bad-row", "skip"], 0, ""),
        (["--max-length", "5"], 2, "give a tokenizer too"),
        (["--tokenizer", "/no/such/folder"], 2, "/no/such/folder"),
    ],
)
def test_command_exit_codes(args: list[str], code: int, error: str, file: Path) -> None:
    done = run_check(file, *args)
    assert done.returncode == code
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == (code != 0)


def test_command_colors_on_a_terminal(file: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(file, "--on-bad-row", "skip"), stdout=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux reports the end of a terminal so
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait() == 0
    assert "\x1b[32mNear the mountain.\x1b[0m" in shown.decode()
