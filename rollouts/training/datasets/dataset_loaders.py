"""From sources of rows to samples: tokenized once, cached on disk by content, read through memory maps."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rollouts.errors import UserError
from rollouts.training.datasets.rows import BadRow, Message, canonical_row, prompt_and_answer
from rollouts.training.datasets.sft import (
    Rendering,
    TurnFormat,
    encode_renderings,
    encode_texts,
    render_conversation,
    turn_format,
)
from rollouts.training.datasets.sources import DatasetSpec, Row, content_hash, read_rows, source_names
from rollouts.training.types import Sample, SampleStatus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Source = str | Path | DatasetSpec | Mapping[str, Any]

CACHE_FORMAT = 1  # raise it whenever the same rows would give other tokens or masks
_BATCH_CHARACTERS = 4_000_000  # text tokenized in one call: enough to use every core, little enough to hold
_SECONDS_BETWEEN_LINES = 10.0  # of the progress of a long tokenization
_UNFINISHED = re.compile(r"[0-9a-f]{32}\.\w+\.tmp")  # a folder of tokenized data that is being written
_SECONDS_TO_LOCK = 60.0  # a folder that is older and held by nobody was left by a killed process
_NAMED = 10  # too-long samples named in the log; all of them stand in the report


@dataclass(frozen=True)
class Problem:
    """A row that gave no sample: where it is and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class LoadReport:
    """What became of the rows of a source: ``rows == samples + len(bad_rows) + len(too_long)``."""

    rows: int = 0
    samples: int = 0
    bad_rows: list[Problem] = field(default_factory=list)
    too_long: list[Problem] = field(default_factory=list)

    def __add__(self, other: LoadReport) -> LoadReport:
        return LoadReport(
            self.rows + other.rows,
            self.samples + other.samples,
            self.bad_rows + other.bad_rows,
            self.too_long + other.too_long,
        )


@dataclass(frozen=True)
class EncodedRow:
    """A tokenized row: ``tokens`` int32 [len], ``mask`` uint8 [len]."""

    row: Row
    tokens: np.ndarray
    mask: np.ndarray


class SampleDataset(Sequence[Sample]):
    """Samples in memory-mapped files, with their lengths known without reading a token.

    Attributes:
        lengths: tokens per sample, int64 [samples].
        loss_counts: tokens per sample that carry loss (the first never does), int64 [samples].
        report: what became of the rows they were read from (before repeats and mixture weights).
    """

    def __init__(self, stores: Sequence[_Store], index: np.ndarray, report: LoadReport) -> None:
        """``index``: for each sample, its number when the stores' samples are counted through; int64 [samples]."""
        self._stores = stores
        self._firsts = np.cumsum([0, *(len(s) for s in stores)])  # number of each store's first sample
        self._index = index
        self.report = report
        self.lengths: np.ndarray = np.concatenate([np.diff(s.offsets) for s in stores])[index]
        self.loss_counts: np.ndarray = np.concatenate([s.loss_counts for s in stores])[index]

    def __len__(self) -> int:
        return len(self._index)

    def _locate(self, i: int) -> tuple[_Store, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = int(self._index[i])
        store = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self._stores[store], number - int(self._firsts[store])

    def arrays(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32 [len]) and loss mask (uint8 [len]) of sample ``i``: read-only views, nothing is copied."""
        store, row = self._locate(i)
        span = slice(int(store.offsets[row]), int(store.offsets[row + 1]))
        return store.tokens[span], store.mask[span]

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        store, row = self._locate(i)
        tokens, mask = self.arrays(i)
        file, line = store.files[store.file_ids[row]], int(store.lines[row])
        return Sample(
            tokens=tokens.tolist(),
            loss_mask=mask.tolist(),
            id=f"{file}:{line}",
            metadata={"file": file, "line": line},
        )


_ARRAYS = {
    "tokens": np.int32,
    "mask": np.uint8,
    "offsets": np.int64,
    "loss_counts": np.int64,
    "lines": np.int64,
    "file_ids": np.int32,
}


class _Store:
    """One source's samples on disk: flat arrays back to back, and where each sample begins.

    A folder of tokens.bin (int32), mask.bin (uint8), offsets.bin (int64 [samples + 1]), loss_counts.bin, lines.bin
    (int64), file_ids.bin (int32) and info.json (the report). File names are not in it: the same content gives the same
    cache wherever it lies.
    """

    def __init__(self, folder: Path, files: list[str]) -> None:
        """Raises OSError, ValueError or LookupError when the folder does not hold a whole store."""
        self.files = files
        for name, dtype in _ARRAYS.items():
            file = folder / f"{name}.bin"
            # A source without usable rows has empty files, which cannot be mapped.
            array = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
            setattr(self, name, array)
        rows = [len(x) for x in (self.loss_counts, self.lines, self.file_ids)]
        if not len(self.tokens) == len(self.mask) == self.offsets[-1] or rows != [len(self)] * 3:
            raise ValueError("its sizes do not agree")
        info = json.loads((folder / "info.json").read_text())
        bad, long = ([Problem(files[f], line, why) for f, line, why in info[key]] for key in ("bad_rows", "too_long"))
        self.report = LoadReport(info["rows"], info["samples"], bad, long)

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    loss_counts: np.ndarray
    lines: np.ndarray
    file_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def load_sft_dataset(
    sources: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    on_bad_row: str = "fail",
    cache_dir: str | Path | None = None,
    seed: int = 0,
) -> SampleDataset:
    """Samples to fine-tune on, from one source or a mixture of several.

    Conversations are rendered by the tokenizer's chat template and learn the assistant's turns; plain texts learn every
    token. Tokens are kept in ``cache_dir``, found again by the content of the files, the tokenizer and the options.

    Args:
        sources: paths, hub names, ``DatasetSpec``s or mappings of its fields; one or a sequence.
        max_length: samples with more tokens are left out whole, counted and named in ``report.too_long``; never cut.
        on_bad_row: "fail" reports every bad row and raises; "skip" reports and leaves them out.
        cache_dir: where tokenized data is kept; by default ``$XDG_CACHE_HOME/rollouts/datasets`` (``~/.cache/...``).
        seed: picks which samples a fractional ``repeat`` or a mixture ``weight`` takes.

    Raises:
        UserError: a source that is missing, empty or of an unknown kind; bad rows with "fail"; an unusable tokenizer.
    """
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length must be at least 2, got {max_length}")
    specs = source_specs(sources)
    root = Path(cache_dir) if cache_dir is not None else _default_cache()
    stores = [_cached_store(spec, tokenizer, max_length, root) for spec in specs]
    report = functools.reduce(LoadReport.__add__, (s.report for s in stores))
    judge(report, on_bad_row, max_length)
    for spec, store in zip(specs, stores, strict=True):
        if len(store) == 0:
            why = f"{len(store.report.bad_rows):,} bad, {len(store.report.too_long):,} too long, 0 usable"
            raise UserError(
                f"{spec.path}: holds no usable rows ({why if store.report.rows else 'empty'}); check the file"
            )
    return SampleDataset(stores, mixture(specs, [len(s) for s in stores], seed), report)


def load_sft_samples(
    path: Source | Sequence[Source], tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> list[Sample]:
    """All samples of a data set in memory: exported samples as they are, any other rows tokenized.

    Without a tokenizer ``path`` must be a file that ``export_samples_to_jsonl`` wrote. ``options`` are those of
    ``load_sft_dataset``.
    """
    if tokenizer is None:
        if not isinstance(path, str | Path):
            raise UserError("load_sft_samples: a tokenizer is needed to read anything but one file of exported samples")
        return load_samples_from_jsonl(path)
    return list(load_sft_dataset(path, tokenizer, **options))


def source_specs(sources: Source | Sequence[Source]) -> list[DatasetSpec]:
    if isinstance(sources, str | Path | DatasetSpec | Mapping):
        return [DatasetSpec.of(sources)]
    specs = [DatasetSpec.of(s) for s in sources]
    if not specs:
        raise UserError("no data sources given; name at least one file, folder or hub data set")
    return specs


def judge(report: LoadReport, on_bad_row: str, max_length: int | None = None) -> None:
    """Log every bad row, and how many samples are too long with the first of them; raise UserError on "fail"."""
    if on_bad_row not in ("fail", "skip"):
        raise UserError(f"on_bad_row must be 'fail' or 'skip', got {on_bad_row!r}")
    for problem in report.bad_rows:
        log.warning("%s", problem)
    if report.bad_rows:
        log.warning("%d bad of %d rows", len(report.bad_rows), report.rows)
    if report.too_long:
        named = ", ".join(f"{p.file}:{p.line}" for p in report.too_long[:_NAMED])
        more = f" and {len(report.too_long) - _NAMED:,} more" if len(report.too_long) > _NAMED else ""
        log.warning("left out %d samples longer than %s tokens: %s%s", len(report.too_long), max_length, named, more)
    if report.bad_rows and on_bad_row == "fail":
        raise UserError(
            f"{len(report.bad_rows):,} bad of {report.rows:,} rows, the first at {report.bad_rows[0]}; "
            "fix them, or leave them out with on_bad_row: skip"
        )


def mixture(specs: Sequence[DatasetSpec], sizes: Sequence[int], seed: int) -> np.ndarray:
    """Which samples a mixture holds, source after source; int64 numbers into the sources counted through."""
    weights = [s.weight for s in specs]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        without = next(s.path for s in specs if s.weight is None)
        raise UserError(f"data set {without}: has no weight while others do; give a weight to all or to none")
    wanted = [size * spec.repeat for size, spec in zip(sizes, specs, strict=True)]
    if weights[0] is not None:
        largest = min(have / w for have, w in zip(wanted, weights, strict=True) if w)
        wanted = [largest * w for w in weights if w]
    parts, first = [], 0
    for number, (want, size) in enumerate(zip(wanted, sizes, strict=True)):
        whole, rest = divmod(max(1, round(want)), size)
        order = np.random.PCG64(np.random.SeedSequence([seed, number])).random_raw(size).argsort(kind="stable")
        parts.append(first + np.concatenate([np.tile(np.arange(size), whole), np.sort(order[:rest])]))
        first += size
    return np.concatenate(parts)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rollouts" / "datasets"


def _cache_key(spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> str:
    """A name for tokenized data: everything that could change a token or a mask goes into it, file names do not."""
    import transformers

    parts = {
        "format": CACHE_FORMAT,
        "transformers": transformers.__version__,
        "content": content_hash(spec),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
        "max_length": max_length,
        "max_samples": spec.max_samples,
        "text_field": spec.text_field,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _cached_store(spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, max_length: int | None, root: Path) -> _Store:
    """The tokenized source, from the cache or made now. Two processes may do it at once: the first to finish wins."""
    files = source_names(spec)
    folder = root / _cache_key(spec, tokenizer, max_length)
    if folder.exists():
        try:
            return _Store(folder, files)
        except (OSError, ValueError, LookupError) as e:
            log.warning("%s: the cached data is damaged (%s) and is made again", folder, e)
            shutil.rmtree(folder, ignore_errors=True)
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep_abandoned(root)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=root))
        with _locked(temporary):
            _write_store(temporary, spec, files, tokenizer, max_length)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        return _Store(folder, files)
    except OSError as e:
        raise UserError(
            f"{root}: cannot keep tokenized data here ({e.strerror or e}); set cache_dir to another folder"
        ) from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder until the end, or that of the process; gives False when somebody does, or locks are not known."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _sweep_abandoned(root: Path) -> None:
    """Remove what killed processes left half-written: folders that nobody holds, a while after they were made."""
    for folder in root.glob("*.tmp"):
        with suppress(OSError):  # another process swept it
            # A folder is made a moment before it is locked.
            if _UNFINISHED.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > _SECONDS_TO_LOCK:
                with _locked(folder) as abandoned:
                    if abandoned:
                        shutil.rmtree(folder)
                        log.info("swept %s, which a killed process left unfinished", folder)


def _write_store(
    folder: Path, spec: DatasetSpec, files: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> None:
    """Tokenize a source into the files of a ``_Store``, a batch at a time."""
    file_ids = {name: i for i, name in enumerate(files)}
    report = LoadReport()
    offsets, loss_counts, lines, ids = [0], [], [], []
    started = told = time.monotonic()
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "mask.bin", "wb") as mask_file:
        for found in encode_rows(read_rows(spec), tokenizer, text_field=spec.text_field, limit=spec.max_samples):
            report.rows += 1
            if isinstance(found, Problem):
                report.bad_rows.append(found)
            elif max_length is not None and len(found.tokens) > max_length:
                reason = f"has {len(found.tokens):,} tokens, more than max_length {max_length:,}"
                report.too_long.append(Problem(found.row.file, found.row.line, reason))
            else:
                tokens_file.write(found.tokens.tobytes())
                mask_file.write(found.mask.tobytes())
                offsets.append(offsets[-1] + len(found.tokens))
                loss_counts.append(int(np.count_nonzero(found.mask[1:])))
                lines.append(found.row.line)
                ids.append(file_ids[found.row.file])
            if (now := time.monotonic()) - told > _SECONDS_BETWEEN_LINES:
                told = now
                log.info("%s: %d rows tokenized, %.0f a second", spec.path, report.rows, report.rows / (now - started))
    report.samples = len(lines)
    for name, values in (("offsets", offsets), ("loss_counts", loss_counts), ("lines", lines), ("file_ids", ids)):
        np.array(values, _ARRAYS[name]).tofile(folder / f"{name}.bin")
    info = asdict(report)
    for key in ("bad_rows", "too_long"):
        info[key] = [[file_ids[p["file"]], p["line"], p["reason"]] for p in info[key]]
    (folder / "info.json").write_text(json.dumps(info))
    for file in folder.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())


def encode_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, text_field: str | None = None, limit: int | None = None
) -> Iterator[EncodedRow | Problem]:
    """Tokenize rows in order and in batches; a row that cannot be used comes out as a ``Problem``.

    Args:
        limit: stop after so many usable rows.

    Raises:
        UserError: the tokenizer cannot be used for the rows there are.
    """
    turns: TurnFormat | None = None
    batch: list[tuple[Row, Rendering | str | None, str]] = []
    characters = usable = 0
    for row in rows:
        ready: Rendering | str | None = None
        reason = row.error or ""
        if not reason:
            try:
                conversation = canonical_row(row.data, text_field)
                if "text" in conversation:
                    ready = conversation["text"]
                else:
                    turns = turns or turn_format(tokenizer)
                    ready = render_conversation(conversation, tokenizer, turns)
            except BadRow as e:
                reason = str(e)
        batch.append((row, ready, reason))
        usable += not reason
        characters += len(ready.text if isinstance(ready, Rendering) else ready or "")
        if characters >= _BATCH_CHARACTERS:
            yield from _encode_batch(batch, tokenizer)
            batch, characters = [], 0
        if usable == limit:
            break
    yield from _encode_batch(batch, tokenizer)


def _encode_batch(
    batch: Sequence[tuple[Row, Rendering | str | None, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[EncodedRow | Problem]:
    renderings = [r for _, r, _ in batch if isinstance(r, Rendering)]
    texts = [t for _, t, _ in batch if isinstance(t, str)]
    conversations = iter(encode_renderings(renderings, tokenizer) if renderings else ())
    documents = iter(encode_texts(texts, tokenizer) if texts else ())
    for row, ready, reason in batch:
        if ready is None:
            yield Problem(row.file, row.line, reason)
            continue
        tokens, mask = next(conversations if isinstance(ready, Rendering) else documents)
        if mask[1:].any():
            yield EncodedRow(row, tokens, mask)
        else:
            yield Problem(row.file, row.line, "holds no token that could be learned")


def load_rl_prompts(source: Source | Sequence[Source], *, on_bad_row: str = "fail") -> list[Sample]:
    """Prompts to roll out: ``Sample``s with status PENDING whose ``prompt`` is a list of messages.

    Rows may be in any conversation format, TRL's (``prompt`` and further columns) and verl's (``data_source, prompt,
    ability, reward_model, extra_info``) among them; a final assistant message is taken off and kept as the reference
    answer. ``metadata`` holds the row's other fields, ``answer`` where there is one and ``tools`` where there are some.

    Ids are the file's name (in a folder: its path from there) and the line, ``train.parquet:7``: unique, and the same
    wherever the files lie. Repeated prompts are samples of their own, ``train.parquet:7#2``.

    Raises:
        UserError: a source that is missing or empty, or bad rows with "fail".
    """
    return _load_prompts(source, on_bad_row, lambda row, sample: None)


def load_dataset_with_answers(source: Source | Sequence[Source], *, on_bad_row: str = "fail") -> list[Sample]:
    """``load_rl_prompts`` for tasks with a known answer: a row without one is a bad row."""

    def need_answer(row: Row, sample: Sample) -> None:
        if "answer" not in sample.metadata:
            raise BadRow("has no answer: expected a field answer or ground_truth, or a final assistant message")

    return _load_prompts(source, on_bad_row, need_answer)


def _load_prompts(
    source: Source | Sequence[Source], on_bad_row: str, check: Callable[[Row, Sample], None]
) -> list[Sample]:
    specs = source_specs(source)
    report = LoadReport()
    samples: list[list[Sample]] = []
    names: dict[str, str] = {}  # file -> what the ids of its rows begin with
    for spec in specs:
        samples.append([])
        root = Path(spec.path) if Path(spec.path).is_dir() else Path(spec.path).parent
        for row in read_rows(spec):
            report.rows += 1
            try:
                if row.error:
                    raise BadRow(row.error)
                if row.file not in names:
                    name = os.path.relpath(row.file, root) if Path(row.file).exists() else row.file
                    names[row.file] = row.file if name in names.values() else name  # two files of one name
                sample = _prompt_sample(row, names[row.file])
                check(row, sample)
                samples[-1].append(sample)
            except BadRow as e:
                report.bad_rows.append(Problem(row.file, row.line, str(e)))
            if len(samples[-1]) == spec.max_samples:
                break
    judge(report, on_bad_row)
    for spec, found in zip(specs, samples, strict=True):
        if not found:
            raise UserError(f"{spec.path}: holds no usable prompts; check the file")
    flat = [s for found in samples for s in found]
    uses: Counter[str] = Counter()
    prompts = []
    for i in mixture(specs, [len(found) for found in samples], seed=0):
        sample = flat[i]
        uses[sample.id] += 1
        again = f"{sample.id}#{uses[sample.id]}"
        prompts.append(sample if uses[sample.id] == 1 else replace(sample, id=again, metadata=dict(sample.metadata)))
    return prompts


def _prompt_sample(row: Row, file: str) -> Sample:
    messages, answer, metadata = prompt_and_answer(row.data)
    if answer is not None:
        metadata["answer"] = answer
    metadata |= {"file": row.file, "line": row.line}
    return Sample(prompt=messages, id=f"{file}:{row.line}", status=SampleStatus.PENDING, metadata=metadata)


def export_samples_to_jsonl(samples: Iterable[Sample], path: str | Path) -> int:
    """Write samples, tokens and masks included, one JSON object a line; ``load_samples_from_jsonl`` gives them back.

    Returns:
        How many were written. The file appears whole or not at all.
    """
    return _write_jsonl((s.to_dict() for s in samples), path)


def load_samples_from_jsonl(path: str | Path) -> list[Sample]:
    """Samples that ``export_samples_to_jsonl`` wrote, equal to what was exported.

    Raises:
        UserError: the file is missing, or a line is not an exported sample; naming ``file:line``.
    """
    samples = []
    for row in read_rows(path):
        try:
            if row.error:
                raise ValueError(row.error)
            if not isinstance(row.data, dict) or "tokens" not in row.data:
                raise ValueError("has no tokens")
            samples.append(Sample.from_dict(row.data))
        except (ValueError, TypeError) as e:
            raise UserError(f"{row.where}: not an exported sample ({e}); export it with export_samples_to_jsonl") from e
    return samples


def export_samples_to_huggingface_format(
    samples: Iterable[Sample], path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """Write samples as rows that other trainers read: ``input_ids``, ``labels`` (-100 where nothing learns) and text.

    Args:
        path: a ``.jsonl`` file, which ``datasets.load_dataset("json", data_files=...)`` loads as is.
        tokenizer: adds the decoded ``text`` of each sample.

    Returns:
        How many were written. The file appears whole or not at all.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for s in samples:
            tokens = [int(t) for t in s.tokens]
            row: dict[str, Any] = {
                "input_ids": tokens,
                "attention_mask": [1] * len(tokens),
                "labels": [t if m else -100 for t, m in zip(tokens, s.loss_mask, strict=True)],
            }
            if isinstance(s.prompt, list):
                answer: list[Message] = [{"role": "assistant", "content": s.response}] if s.response else []
                row["messages"] = [*s.prompt, *answer]
            if tokenizer is not None:
                row["text"] = tokenizer.decode(tokens)
            yield row

    return _write_jsonl(rows(), path)


def _write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w") as f:
            for row in rows:
                f.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count
