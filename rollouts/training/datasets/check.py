"""Looking at a data set before training on it: its bad rows, its lengths, and what would be learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rollouts.errors import UserError
from rollouts.training.datasets.dataset_loaders import LoadReport, Problem, Source, encode_rows
from rollouts.training.datasets.rows import BadRow, Conversation, canonical_row
from rollouts.training.datasets.sources import DatasetSpec, Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segment = tuple[str, bool]  # a piece of text, and whether it learns

_PERCENTILES = (0, 10, 50, 90, 95, 99, 100)
_SHOWN_CHARACTERS = 4000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class CheckResult:
    """What a check found.

    Attributes:
        report: rows read, usable samples, bad rows and rows that are too long.
        lengths, learned: per usable sample, its length and how much of it learns, in ``unit``; int64 [samples].
        unit: "tokens", or "characters" when no tokenizer was given.
        example: the first usable sample, in pieces.
    """

    report: LoadReport
    lengths: np.ndarray
    learned: np.ndarray
    unit: str
    example: list[Segment] = field(default_factory=list)


def check_file(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int | None = None,
    on_problem: Callable[[Problem], None] | None = None,
) -> CheckResult:
    """Read every row of a source as training would, and say what became of each.

    Args:
        tokenizer: renders and tokenizes as training would; without one, rows are only read and counted in characters.
        max_length: rows with more tokens are reported as too long.
        on_problem: called for each bad or too long row as soon as it is found.

    Raises:
        UserError: the source is missing, of an unknown kind, or holds no rows at all; or the tokenizer cannot be used.
    """
    if max_length is not None and tokenizer is None:
        raise UserError("max_length counts tokens: give a tokenizer too (--tokenizer DIR)")
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length must be at least 2, got {max_length}")
    spec = DatasetSpec.of(source)
    report = LoadReport()
    lengths: list[int] = []
    learned: list[int] = []
    example: list[Segment] = []

    def problem(found: Problem, kind: list[Problem]) -> None:
        kind.append(found)
        if on_problem is not None:
            on_problem(found)

    if tokenizer is None:
        for row in read_rows(spec):
            report.rows += 1
            try:
                segments = _segments(_conversation(row, spec))
            except BadRow as e:
                problem(Problem(row.file, row.line, str(e)), report.bad_rows)
                continue
            lengths.append(sum(len(text) for text, _ in segments))
            learned.append(sum(len(text) for text, learns in segments if learns))
            example = example or segments
            if len(lengths) == spec.max_samples:
                break
    else:
        for found in encode_rows(read_rows(spec), tokenizer, text_field=spec.text_field, limit=spec.max_samples):
            report.rows += 1
            if isinstance(found, Problem):
                problem(found, report.bad_rows)
            elif max_length is not None and len(found.tokens) > max_length:
                reason = f"too long: {len(found.tokens):,} tokens, more than {max_length:,}"
                problem(Problem(found.row.file, found.row.line, reason), report.too_long)
            else:
                lengths.append(len(found.tokens))
                learned.append(int(np.count_nonzero(found.mask[1:])))
                example = example or _decode_segments(found.tokens, found.mask, tokenizer)
    if report.rows == 0:
        raise UserError(f"{spec.path}: holds no rows; check the file")
    report.samples = len(lengths)
    unit = "characters" if tokenizer is None else "tokens"
    return CheckResult(report, np.array(lengths, np.int64), np.array(learned, np.int64), unit, example)


def _conversation(row: Row, spec: DatasetSpec) -> Conversation:
    if row.error:
        raise BadRow(row.error)
    return canonical_row(row.data, spec.text_field)


def _segments(conversation: Conversation) -> list[Segment]:
    """A conversation in pieces when no template says how it is rendered."""
    if "text" in conversation:
        return [(conversation["text"], True)]
    pieces = []
    for message in conversation["messages"]:
        calls = "".join(f"\n{call['function']}" for call in message.get("tool_calls", ()))
        said = message["content"] + calls
        pieces += [(f"{message['role']}: ", False), (said, message["role"] == "assistant"), ("\n", False)]
    return pieces


def _decode_segments(tokens: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return [(tokenizer.decode(tokens[a:b].tolist()), bool(mask[a])) for a, b in zip(edges, edges[1:], strict=False)]


def summary_lines(result: CheckResult, color: bool) -> Iterator[str]:
    """The summary as a person reads it: counts, length percentiles, one sample with what learns colored or in [[ ]]."""
    report = result.report
    bad, too_long = len(report.bad_rows), len(report.too_long)
    yield f"{report.rows:,} rows: {report.samples:,} usable, {bad:,} bad, {too_long:,} too long"
    if report.samples == 0:
        return
    names = ["min", *(f"p{p}" for p in _PERCENTILES[1:-1]), "max"]
    yield f"{result.unit + ' per sample':<24}" + "".join(f"{name:>9}" for name in ("mean", *names)) + f"{'total':>13}"
    for label, values in (("whole", result.lengths), ("learned", result.learned)):
        numbers = [values.mean(), *np.percentile(values, _PERCENTILES)]
        yield f"{label:<24}" + "".join(f"{round(n):>9,}" for n in numbers) + f"{values.sum():>13,}"
    yield ""
    yield "The first usable sample; what learns is " + ("\x1b[32mgreen\x1b[0m:" if color else "in [[ ]]:")
    yield render_segments(result.example, color)


def render_segments(segments: list[Segment], color: bool) -> str:
    """Text with its learned pieces marked; control characters become escapes, so that data cannot drive a terminal."""
    before, after = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    out, left = [], _SHOWN_CHARACTERS
    for text, learns in segments:
        shown = _CONTROL.sub(lambda m: f"\\x{ord(m.group()):02x}", text[:left])
        out.append(before + shown + after if learns else shown)
        left -= len(text)
        if left <= 0:
            break
    hidden = sum(len(text) for text, _ in segments) - _SHOWN_CHARACTERS
    return "".join(out).rstrip("\n") + (f"\n... and {hidden:,} more characters" if hidden > 0 else "")
