"""Reading rows out of files, folders and the Hugging Face hub, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, NoReturn

from rollouts.errors import UserError

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class DatasetSpec:
    """One source of a data set.

    Args:
        path: a file (JSONL, JSON, parquet, CSV, TSV or plain text, each also gzipped), a folder of such files (read in
            sorted order, subfolders included), or the name of a data set on the Hugging Face hub.
        repeat: how often each sample appears; 2.5 is twice everything and once a seeded half.
        weight: this source's share of a mixture, relative to the other sources' weights (give it for all or for none).
            The mixture is the largest one with these shares in which no source is used more than ``repeat`` times.
        max_samples: keep the first so many samples.
        subset, split: configuration and split of a hub data set.
        text_field: read this field of every row as plain text, whatever else the row holds.

    Raises:
        UserError: a value of the wrong type or out of range.
    """

    path: str
    repeat: float = 1.0
    weight: float | None = None
    max_samples: int | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        for name in ("repeat", "weight"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise UserError(f"data set {self.path}: {name} must be a number above 0, got {value!r}")
        if self.max_samples is not None and not (isinstance(self.max_samples, int) and self.max_samples > 0):
            raise UserError(f"data set {self.path}: max_samples must be an integer above 0, got {self.max_samples!r}")

    @classmethod
    def of(cls, source: str | Path | DatasetSpec | Mapping[str, Any]) -> DatasetSpec:
        """A spec from whatever names a source: a path, a mapping of this class's fields, or a spec."""
        if isinstance(source, DatasetSpec):
            return source
        if isinstance(source, str | Path):
            return cls(str(source))
        unknown = sorted(set(source) - {f.name for f in fields(cls)})
        if unknown or "path" not in source:
            problem = f"unknown key {unknown[0]!r}" if unknown else "no path"
            raise UserError(f"data set {dict(source)!r}: {problem}; keys are {', '.join(f.name for f in fields(cls))}")
        return cls(**source)


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its place: ``data`` is what the file holds, or None with the reason in ``error``.

    ``line`` counts from 1: the line a row starts on in text files, the number of the row in parquet and on the hub.
    """

    file: str
    line: int
    data: Any
    error: str | None = None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(spec: str | Path | DatasetSpec) -> Iterator[Row]:
    """Every row of a source in order. A row that cannot be read is a ``Row`` with ``error`` set, never an exception.

    Raises:
        UserError: the source does not exist, or is of a kind that cannot be read.
    """
    spec = DatasetSpec.of(spec)
    if not Path(spec.path).exists():
        yield from _hub_rows(spec)
        return
    for file in list_files(spec):
        yield from _file_rows(file)


def source_names(spec: DatasetSpec) -> list[str]:
    """The names that rows of this source carry in ``Row.file``, in reading order.

    Raises:
        UserError: the source is neither a file or folder that can be read nor the name of a hub data set.
    """
    return [str(f) for f in list_files(spec)] if Path(spec.path).exists() else [_hub_label(spec)]


def content_hash(spec: DatasetSpec) -> str:
    """SHA-256 over the bytes of all files of a source (of a hub data set: its fingerprint) and how they are read.

    Not over their names: a renamed file is the same data.
    """
    digest = hashlib.sha256()
    if not Path(spec.path).exists():
        digest.update(_load_hub(spec)._fingerprint.encode())
        return digest.hexdigest()
    for file in list_files(spec):
        with open(file, "rb") as f:
            kind = f"{_kind(file)}{'.gz' if file.suffix == '.gz' else ''}"
            digest.update(f"{kind} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def list_files(spec: DatasetSpec) -> list[Path]:
    """The files of a local source; hidden ones and unknown kinds in a folder are left out."""
    path = Path(spec.path)
    if path.is_file():
        if _kind(path) is None:
            raise UserError(f"{path}: unknown kind of data file; use one of {', '.join(KINDS)} (each may end in .gz)")
        return [path]
    found = sorted(
        f
        for f in path.rglob("*")
        if f.is_file() and _kind(f) and not any(part.startswith(".") for part in f.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"{path}: the folder holds no data files; expected {', '.join(KINDS)} (each may end in .gz)")
    return found


def _kind(file: Path) -> str | None:
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in KINDS else None


def _file_rows(file: Path) -> Iterator[Row]:
    readers: dict[str, Callable[[Path, IO[bytes]], Iterator[Row]]] = {
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".txt": _text_rows,
    }
    reader = readers[_kind(file) or ""]
    line = 0
    try:
        with _open(file) as stream:
            for row in reader(file, stream):
                line = row.line
                yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        yield Row(str(file), line + 1, None, f"the gzip stream is damaged here ({e}); nothing after it can be read")
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); check that it is a file you may read") from e


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def _json_problem(error: Exception) -> str:
    """Why a text is not JSON, on one line."""
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    if "digits" in str(error):
        return "not JSON that can be read: an integer with thousands of digits"
    return f"not JSON: {error}"


def parse_json(text: str) -> Any:
    """Strict JSON (no NaN, no Infinity). Raises ValueError with a one-line reason."""
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(_json_problem(e)) from None


def _jsonl_rows(file: Path, stream: IO[bytes]) -> Iterator[Row]:
    for number, raw in enumerate(stream, 1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        try:
            yield Row(str(file), number, parse_json(raw.decode()))
        except UnicodeDecodeError as e:
            yield Row(str(file), number, None, _bad_utf8(e))
        except ValueError as e:
            yield Row(str(file), number, None, str(e))


def _bad_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1}"


def _json_rows(file: Path, stream: IO[bytes]) -> Iterator[Row]:
    """Rows of a JSON file: the elements of its list, its one object, or (a common misnomer) its lines."""
    raw = stream.read().removeprefix(b"\xef\xbb\xbf")
    head = raw.lstrip()[:1]
    if head != b"[":
        try:
            yield Row(str(file), 1 + raw[: len(raw) - len(raw.lstrip())].count(b"\n"), parse_json(raw.decode()))
        except ValueError:  # UnicodeDecodeError is one
            yield from _jsonl_rows(file, io.BytesIO(raw))
        return
    # Bad bytes become lone surrogates, so that one bad string does not hide the rows after it.
    yield from _list_rows(file, raw.decode(errors="surrogateescape"))


_BLANK = re.compile(r"[ \t\n\r]*")


def _list_rows(file: Path, text: str) -> Iterator[Row]:
    """The elements of a JSON list one by one, so that each has its line; stops at the first that cannot be parsed."""
    position, line, counted = text.index("[") + 1, 1, 0
    first = True
    while True:
        position = _BLANK.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        found = text[position : position + 1]
        if found == "]":
            return
        if not first:
            if found != ",":
                break
            position = _BLANK.match(text, position + 1).end()  # type: ignore[union-attr]
            line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as e:
            reason = e.msg if isinstance(e, json.JSONDecodeError) else _json_problem(e).removeprefix("not JSON: ")
            yield Row(str(file), line, None, f"not JSON: {reason}; nothing after it can be read")
            return
        yield Row(str(file), line, value)
        first = False
    yield Row(str(file), line, None, "not JSON: expected ',' or ']' in the list; nothing after it can be read")


def _csv_rows(file: Path, stream: IO[bytes]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 131,072 characters
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if _kind(file) == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield Row(str(file), line, None, f"not CSV: {e}")
            continue
        if header is None:
            header = cells
        elif cells and len(cells) != len(header):
            yield Row(str(file), line, None, f"has {len(cells)} columns where the header has {len(header)}")
        elif cells:
            yield Row(str(file), line, dict(zip(header, cells, strict=True)))


def _text_rows(file: Path, stream: IO[bytes]) -> Iterator[Row]:
    """A plain text file is one document."""
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        yield Row(str(file), line, None, f"not UTF-8: byte 0x{e.object[e.start]:02x}")
        return
    if text.strip():
        yield Row(str(file), 1, {"text": text})


def _parquet_rows(file: Path, stream: IO[bytes]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(pyarrow.BufferReader(stream.read())).iter_batches(batch_size=1024):
            for data in batch.to_pylist():
                number += 1
                yield Row(str(file), number, data)
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        yield Row(str(file), number + 1, None, f"not parquet that can be read: {' '.join(str(e).split())[:200]}")


def _hub_label(spec: DatasetSpec) -> str:
    """The name of a hub data set in messages. Raises UserError for what cannot be one, such as a file's path."""
    if _kind(Path(spec.path)) or not _HUB_NAME.fullmatch(spec.path):
        raise UserError(f"{spec.path}: no such file or folder; check data path")
    return f"{spec.path}[{spec.split}]" if spec.subset is None else f"{spec.path}/{spec.subset}[{spec.split}]"


def _load_hub(spec: DatasetSpec) -> Any:
    label = _hub_label(spec)
    import datasets

    try:
        return datasets.load_dataset(spec.path, spec.subset, split=spec.split)
    except Exception as e:  # the hub client raises dozens of kinds, network ones included
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"{label}: no such file or folder, and no data set that the hub gives ({reason})") from e


def _hub_rows(spec: DatasetSpec) -> Iterator[Row]:
    label = _hub_label(spec)
    for number, data in enumerate(_load_hub(spec), 1):
        yield Row(label, number, data)


def has_lone_surrogate(text: str) -> bool:
    """True when a text cannot be written as UTF-8 (a half of a surrogate pair, or a byte that was no UTF-8)."""
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None
