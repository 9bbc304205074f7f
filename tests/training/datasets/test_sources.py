"""Every kind of source gives the same rows with the right lines; damage is a row with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rollouts.errors import UserError
from rollouts.training.datasets.sources import DatasetSpec, Row, content_hash, read_rows, source_names

ROWS = [
    {"question": "1 + 1?", "answer": "2"},
    {"question": 'a, "b"\n c?', "answer": "é 日本 🙂"},
    {"question": "q", "answer": "a"},
]


def as_bytes(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind in ("jsonl", "ndjson"):
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=2).encode()
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out)
        return out.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


LINES = {
    "jsonl": [1, 2, 3],
    "ndjson": [1, 2, 3],
    "json": [2, 6, 10],
    "parquet": [1, 2, 3],
    "csv": [2, 3, 5],
    "tsv": [2, 3, 5],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LINES)
def test_every_kind_and_its_gzip(kind: str, packed: bool, tmp_path: Path) -> None:
    file = tmp_path / (f"data.{kind}.gz" if packed else f"data.{kind}")
    raw = as_bytes(kind, ROWS)
    file.write_bytes(gzip.compress(raw) if packed else raw)
    assert list(read_rows(file)) == [Row(str(file), n, r) for n, r in zip(LINES[kind], ROWS, strict=True)]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [r.data for r in read_rows(tmp_path / "a.txt")] == [{"text": "one\n\ntwo\n"}]


def test_folder_is_read_in_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "sub/c.json.gz", ".hidden.jsonl", ".cache/d.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        raw = as_bytes(name.split(".")[1] if name[0] != "." else "jsonl", ROWS[:1]) if "md" not in name else b"# no"
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    names = [str(tmp_path / n) for n in ("a.csv", "b.jsonl", "sub/c.json.gz")]
    assert [r.file for r in read_rows(tmp_path)] == names == source_names(DatasetSpec(str(tmp_path)))


def test_byte_order_mark_windows_lines_blank_lines_and_unicode_separators(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\xe2\x80\xa8c"}')
    assert [(r.line, r.data) for r in read_rows(file)] == [(1, {"text": "a"}), (4, {"text": "b\u2028c"})]


def test_json_file_may_hold_one_object_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('\n{"text":\n "a"}')
    assert [(r.line, r.data) for r in read_rows(file)] == [(2, {"text": "a"})]
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": }\n')
    assert [(r.line, r.error is None) for r in read_rows(file)] == [(1, True), (2, True), (3, False)]


@pytest.mark.parametrize(
    ("text", "rows", "reason"),
    [
        ("[]", 0, None),
        (" [ {} , {} ] ", 2, None),
        ("[{}\n{}]", 1, "expected ',' or ']'"),
        ("[{},\n{]", 1, "Expecting property name"),
        ("[{},", 1, "Expecting value"),
        ("[{}", 1, "expected ',' or ']'"),
        ("[{}, NaN]", 1, "NaN is not JSON"),
        ("[{}, " + "[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_json_lists(text: str, rows: int, reason: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    found = list(read_rows(file))
    assert [r.data for r in found if r.error is None] == [{}] * rows
    errors = [r.error for r in found if r.error is not None]
    assert len(errors) == (reason is not None)
    assert reason is None or reason in str(errors[0])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at column 8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer with thousands of digits"),
        (b'{"a": "\x01"}', "Invalid control character"),
        (b"\x00\x00", "not JSON"),
    ],
)
def test_a_damaged_line_does_not_hide_its_neighbors(line: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read_rows(file)
    assert (before.data, after.data) == ({"text": "before"}, {"text": "after"})
    assert bad.line == 2
    assert reason in str(bad.error)
    assert str(bad.error).isprintable()


def test_damaged_csv_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'question,answer\nq,a\nonly\nq,a,b\n\nq,\xff\n"x"y,a\nq,a\n"open,a\n')
    found = [(r.line, r.error) for r in read_rows(file)]
    assert found[0] == (2, None)
    assert found[1] == (3, "has 1 columns where the header has 2")
    assert found[2] == (4, "has 3 columns where the header has 2")
    assert found[3] == (6, None)  # a byte that is no UTF-8 is found when the row is used
    assert found[4][0] == 7
    assert str(found[4][1]).startswith("not CSV")
    assert found[5] == (8, None)
    assert str(found[6][1]).startswith("not CSV")


def test_a_csv_field_may_be_large(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 1_000_000 + "\n")
    assert [len(r.data["text"]) for r in read_rows(file)] == [1_000_000]


def test_damaged_gzip_and_parquet_say_where_reading_stopped(tmp_path: Path) -> None:
    rows = [{"text": f"row {i} {i * 2654435761 % 2**32}"} for i in range(20_000)]
    whole = gzip.compress(as_bytes("jsonl", rows))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.jsonl.gz").write_bytes(b"this is no gzip")
    (tmp_path / "no.parquet").write_bytes(b"this is no parquet")
    *good, last = read_rows(tmp_path / "cut.jsonl.gz")
    assert [r.data for r in good] == rows[: len(good)]
    assert len(good) > 1000
    assert "gzip stream is damaged" in str(last.error)
    assert last.line == len(good) + 1
    for name in ("no.jsonl.gz", "no.parquet"):
        (only,) = read_rows(tmp_path / name)
        assert only.error


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("missing/folder/x", "no such file or folder"),
        ("data.docx", "unknown kind of data file"),
        ("empty_folder", "holds no data files"),
    ],
)
def test_unreadable_sources_are_one_clear_line(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "data.docx").write_text("x")
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match=reason) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_hub_name_without_a_network_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="no such file or folder, and no data set that the hub gives") as caught:
        list(read_rows("some-org/some-data-set-that-is-not-cached"))
    assert "\n" not in str(caught.value)


def test_content_hash_follows_bytes_and_not_names(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "{}"), ("b.jsonl", "{}"), ("c.jsonl", "{} ")):
        (tmp_path / name).write_text(text)
    a, b, c = (content_hash(DatasetSpec(str(tmp_path / n))) for n in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert a == b != c


@pytest.mark.parametrize(
    "bad", [{"repeat": 0}, {"weight": -1}, {"weight": "x"}, {"max_samples": 0}, {"repeat": float("nan")}]
)
def test_specs_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        DatasetSpec("x", **bad)


def test_specs_from_mappings_refuse_unknown_keys() -> None:
    assert DatasetSpec.of({"path": "x", "repeat": 2}) == DatasetSpec("x", repeat=2)
    with pytest.raises(UserError, match="unknown key 'repeats'"):
        DatasetSpec.of({"path": "x", "repeats": 2})
    with pytest.raises(UserError, match="no path"):
        DatasetSpec.of({"repeat": 2})
