"""Data sets from files to samples: what is reported and cached, what a mixture holds, what survives a round trip."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.errors import UserError
from rollouts.training.datasets.dataset_loaders import (
    SampleDataset,
    export_samples_to_huggingface_format,
    export_samples_to_jsonl,
    load_dataset_with_answers,
    load_rl_prompts,
    load_samples_from_jsonl,
    load_sft_dataset,
    load_sft_samples,
)
from rollouts.training.datasets.sft import prepare_sft_sample
from rollouts.training.datasets.sources import DatasetSpec
from rollouts.training.types import Sample, SampleStatus, WeightSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def qa(i: int, words: int = 3) -> dict[str, Any]:
    return {"question": f"What is {i}?", "answer": " ".join(["number"] * words) + f" {i}"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "rollouts" / "datasets"


# --- samples ---


def test_every_row_is_the_sample_it_would_be_alone(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = []
    for i in range(40):
        rows.append(qa(i, i % 7 + 1) if i % 3 else {"text": f"A plain text about {i}."})
    data = load_sft_dataset(write(tmp_path / "a.jsonl", rows), tiny_tokenizer)
    assert len(data) == 40
    for i, row in enumerate(rows):
        alone = prepare_sft_sample(row, tiny_tokenizer)
        tokens, mask = data.arrays(i)
        assert data[i].tokens == alone.tokens == tokens.tolist()
        assert data[i].loss_mask == alone.loss_mask == mask.tolist()
        assert data[i].id == f"{tmp_path}/a.jsonl:{i + 1}"
        assert data.lengths[i] == len(alone)
        assert data.loss_counts[i] == alone.num_loss_tokens
    assert tokens.dtype == np.int32
    assert mask.dtype == np.uint8
    assert not tokens.flags.writeable
    assert data[-1].tokens == data[39].tokens
    assert [s.id for s in data[3:5]] == [data[3].id, data[4].id]
    with pytest.raises(IndexError):
        data[40]


def test_gsm8k_loads_in_seconds_and_again_from_the_cache_at_once(
    shared_data: Path, minimind: PreTrainedTokenizerFast
) -> None:
    file = shared_data / "gsm8k" / "train.jsonl.gz"
    start = time.perf_counter()
    first = load_sft_dataset(file, minimind)
    fresh = time.perf_counter() - start
    cached = fresh
    for _ in range(3):  # a moment in which the machine does something else hits one of them
        start = time.perf_counter()
        again = load_sft_dataset(file, minimind)
        cached = min(cached, time.perf_counter() - start)
    assert len(first) == len(again) == 7473
    assert fresh < 60  # 3 to 6 s on two idle cores; the bound only catches work per token in Python
    assert cached < fresh / 4
    with gzip.open(file, "rt") as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    for i in (0, 4000, 7472):
        tokens, mask = again.arrays(i)
        assert minimind.decode(tokens[mask == 1]) == answers[i] + "<|im_end|>"


# --- bad rows ---


def malformed_line(rng: random.Random) -> bytes:
    """One of the many ways in which a line of a data file is wrong."""
    good = json.dumps(qa(rng.randrange(100))).encode()
    return rng.choice(
        [
            lambda: good[: rng.randrange(1, len(good))],
            lambda: good + rng.choice([b"}", b"]", b",", b'"']),
            lambda: good.replace(
                b"What", rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\udfff x", b"\\x"])
            ),
            lambda: good.replace(b'"answer"', b'"answr"'),
            lambda: json.dumps(rng.choice([None, 1, 2.5, "text", [], [qa(1)], True, {}])).encode(),
            lambda: json.dumps({"question": "q", "answer": rng.choice([1, [], {}, None, True, "", "  \n"])}).encode(),
            lambda: b'{"question": "q", "answer": ' + rng.choice([b"NaN", b"Infinity", b"1e999", b"9" * 5000]) + b"}",
            lambda: b"[" * rng.choice([10, 500, 100_000]),
            lambda: b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
            lambda: json.dumps({"messages": rng.choice([[], {}, "x", [1], [{}], [{"role": "user"}]])}).encode(),
            lambda: json.dumps({"messages": [{"role": "user", "content": "no answer"}]}).encode(),
            lambda: json.dumps({"messages": [{"role": "ghost", "content": "boo"}]}).encode(),
            lambda: json.dumps({"conversations": [{"from": "function_call", "value": "f(x)"}]}).encode(),
            lambda: json.dumps({**qa(1), "answer": "cut<|im_end|>here"}).encode(),
            lambda: json.dumps({**qa(1), "tools": rng.choice([3, "{", ["f"], [{}]])}).encode(),
            lambda: bytes(rng.randrange(128, 256) for _ in range(rng.randrange(1, 40))),
        ]
    )()


def test_1000_malformed_rows_are_each_reported_and_every_good_row_loads(
    tmp_path: Path, unmarked_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(0)
    bad = sorted(rng.sample(range(1, 1301), 1000))
    lines = [malformed_line(rng) if i in set(bad) else json.dumps(qa(i)).encode() for i in range(1, 1301)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")

    with caplog.at_level(logging.WARNING):
        data = load_sft_dataset(file, unmarked_tokenizer, on_bad_row="skip")
    assert [p.line for p in data.report.bad_rows] == bad
    assert all(p.reason and p.reason.isprintable() and len(p.reason) < 300 for p in data.report.bad_rows)
    assert {f"{file}:{p.line}: {p.reason}" for p in data.report.bad_rows} <= {r.getMessage() for r in caplog.records}
    assert caplog.records[-1].getMessage() == "1000 bad of 1300 rows"
    assert data.report.rows == 1300
    assert data.report.samples == len(data) == 300
    good = [i for i in range(1, 1301) if i not in set(bad)]
    assert [s.metadata["line"] for s in data] == good
    assert all(unmarked_tokenizer.decode(s.tokens).count(f"What is {i}?") == 1 for s, i in zip(data, good, strict=True))

    caplog.clear()
    with pytest.raises(UserError, match=r"1,000 bad of 1,300 rows, the first at .*a.jsonl:\d+: ") as caught:
        load_sft_dataset(file, unmarked_tokenizer)
    assert "\n" not in str(caught.value)
    assert len(caplog.records) == 1001


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "holds no usable rows \\(empty\\)"),
        ("blank.jsonl", b"\n \n", "holds no usable rows \\(empty\\)"),
        ("empty.json", b"[]", "holds no usable rows \\(empty\\)"),
        ("header.csv", b"question,answer\n", "holds no usable rows \\(empty\\)"),
        ("bad.jsonl", b"x\n", "holds no usable rows \\(1 bad, 0 too long, 0 usable\\)"),
    ],
)
def test_a_source_without_usable_rows_is_one_clear_line(
    name: str, content: bytes, message: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_sft_dataset(tmp_path / name, tiny_tokenizer, on_bad_row="skip")


def test_too_long_samples_are_left_out_whole_counted_and_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl", [qa(i, 200 if i % 4 == 0 else 2) for i in range(40)])
    data = load_sft_dataset(file, tiny_tokenizer, max_length=100)
    assert [p.line for p in data.report.too_long] == list(range(1, 41, 4))
    assert all("more than max_length 100" in p.reason for p in data.report.too_long)
    assert len(data) == 30
    assert data.lengths.max() <= 100
    assert f"left out 10 samples longer than 100 tokens: {file}:1, {file}:5" in caplog.text


def test_options_are_checked(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "a.jsonl", [qa(1)])
    for options, message in (({"on_bad_row": "ignore"}, "on_bad_row"), ({"max_length": 1}, "max_length")):
        with pytest.raises(UserError, match=message):
            load_sft_dataset(file, tiny_tokenizer, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no data sources"):
        load_sft_dataset([], tiny_tokenizer)


# --- the cache ---


def test_cache_is_found_by_content(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    a = write(tmp_path / "a.jsonl", [qa(i) for i in range(5)])

    def folders_after(file: Path, tokenizer: PreTrainedTokenizerFast = tiny_tokenizer, **options: Any) -> int:
        load_sft_dataset(file, tokenizer, **options)
        return len(list(cache.iterdir()))

    assert folders_after(a) == 1
    assert folders_after(a, on_bad_row="skip", seed=9) == 1
    moved = a.rename(tmp_path / "b.jsonl")
    assert folders_after(moved) == 1
    assert load_sft_dataset(moved, tiny_tokenizer)[0].id == f"{moved}:1"
    assert folders_after(moved, max_length=500) == 2
    other_template, other_vocabulary = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    other_template.chat_template += "{# changed #}"
    other_vocabulary.add_tokens(["What is"])
    assert folders_after(moved, other_template) == 3
    assert folders_after(moved, other_vocabulary) == 4
    changed = write(tmp_path / "b.jsonl", [qa(i) for i in range(1, 6)])
    assert folders_after(changed) == 5
    assert "What is 1?" in tiny_tokenizer.decode(load_sft_dataset(changed, tiny_tokenizer)[0].tokens)


def test_cache_tells_apart_how_a_file_is_read(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, cache: Path
) -> None:
    """The same bytes under three names: no gzip stream, lines of plain text, and rows."""
    rows = write(tmp_path / "a.jsonl", [qa(i) for i in range(5)])
    with pytest.raises(UserError, match="gzip stream is damaged"):
        load_sft_dataset(shutil.copy(rows, tmp_path / "a.jsonl.gz"), tiny_tokenizer)
    load_sft_dataset(shutil.copy(rows, tmp_path / "a.txt"), tiny_tokenizer)
    assert "What is 4?" in tiny_tokenizer.decode(load_sft_dataset(rows, tiny_tokenizer)[4].tokens)


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "offsets.bin", "lines.bin", "info.json"])
def test_damaged_cache_is_made_again(
    name: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, cache: Path
) -> None:
    file = write(tmp_path / "a.jsonl", [qa(i) for i in range(5)])
    before = list(load_sft_dataset(file, tiny_tokenizer))
    (folder,) = cache.iterdir()
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-8]), lambda p: p.unlink()):
        damage(folder / name)
        assert list(load_sft_dataset(file, tiny_tokenizer)) == before
        assert [f.name for f in cache.iterdir()] == [folder.name]


def _load(file: Path, tokenizer_folder: Path, start: Any, out: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    start.wait()
    out.put([s.tokens for s in load_sft_dataset(file, tokenizer)])


@pytest.mark.long
def test_two_processes_may_make_the_same_cache_at_once(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, cache: Path
) -> None:
    file = write(tmp_path / "a.jsonl", [qa(i) for i in range(200)])
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    context = multiprocessing.get_context("spawn")
    start, out = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_load, args=(file, tmp_path / "tokenizer", start, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert out.get(timeout=120) == out.get(timeout=120)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(list(cache.iterdir())) == 1


def test_unusable_cache_folder_is_one_clear_line(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep tokenized data here"):
        load_sft_dataset(write(tmp_path / "a.jsonl", [qa(1)]), tiny_tokenizer, cache_dir=tmp_path / "file" / "cache")


# --- mixtures ---


def counts(data: SampleDataset) -> list[Counter[int]]:
    """How often each line of a.jsonl and of b.jsonl appears."""
    return [
        Counter(s.metadata["line"] for s in data if s.metadata["file"].endswith(name))
        for name in ("a.jsonl", "b.jsonl")
    ]


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return (
        str(write(tmp_path / "a.jsonl", [qa(i) for i in range(10)])),
        str(write(tmp_path / "b.jsonl", [qa(i, 5) for i in range(40)])),
    )


def test_repeats(two: tuple[str, str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = load_sft_dataset([DatasetSpec(two[0], repeat=2.5), {"path": two[1], "max_samples": 20}], tiny_tokenizer)
    a, b = counts(data)
    assert Counter(a.values()) == {2: 5, 3: 5}
    assert b == dict.fromkeys(range(1, 21), 1)
    assert data.report.samples == 30
    assert data.lengths.tolist() == [len(s) for s in data]


def test_weights_are_shares_of_the_largest_possible_mixture(
    two: tuple[str, str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def mixed(weight_a: float, weight_b: float, seed: int = 0, **options: Any) -> list[Counter[int]]:
        specs = [DatasetSpec(two[0], weight=weight_a, **options), DatasetSpec(two[1], weight=weight_b)]
        return counts(load_sft_dataset(specs, tiny_tokenizer, seed=seed))

    a, b = mixed(1, 1)
    assert (a.total(), b.total()) == (10, 10)
    assert set(b.values()) == {1}
    assert mixed(1, 1) == [a, b] != mixed(1, 1, seed=1)
    a, b = mixed(1, 9)
    assert (a.total(), b.total()) == (4, 40)
    a, b = mixed(0.5, 0.5, repeat=3)
    assert (a.total(), b.total()) == (30, 30)


def test_weights_for_some_only_are_refused(two: tuple[str, str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"b\.jsonl: has no weight while others do"):
        load_sft_dataset([DatasetSpec(two[0], weight=1), two[1]], tiny_tokenizer)


# --- prompts ---


def test_rl_prompts_keep_the_answer_apart(tmp_path: Path) -> None:
    rows = [
        {"question": "1 + 1?", "answer": "#### 2", "level": "easy"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "ground_truth": "g"},
        {"prompt": "no answer"},
    ]
    file = write(tmp_path / "p.jsonl", rows)
    first, second, third = load_rl_prompts(file)
    assert first.prompt == [{"role": "user", "content": "1 + 1?"}]
    assert first.metadata == {"level": "easy", "answer": "#### 2", "file": str(file), "line": 1}
    assert (first.status, first.tokens, first.id) == (SampleStatus.PENDING, (), "p.jsonl:1")
    assert second.metadata["answer"] == "g"
    assert "answer" not in third.metadata
    with pytest.raises(UserError, match=r"1 bad of 3 rows, the first at .*p.jsonl:3: has no answer"):
        load_dataset_with_answers(file)
    assert [s.id for s in load_dataset_with_answers(file, on_bad_row="skip")] == [first.id, second.id]
    with pytest.raises(UserError, match="no usable prompts"):
        load_rl_prompts(write(tmp_path / "e.jsonl", []))


# --- export and import ---

PER_TOKEN = st.floats(allow_nan=False, allow_infinity=False)
SAMPLES = st.integers(0, 6).flatmap(
    lambda n: st.builds(
        Sample,
        tokens=st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n),
        loss_mask=st.lists(st.sampled_from([0, 1, 0.5]), min_size=n, max_size=n),
        rollout_log_probs=st.none() | st.lists(PER_TOKEN, min_size=n, max_size=n),
        prompt=st.text(st.characters(codec="utf-8")) | st.just([{"role": "user", "content": "é\u2028\n"}]),
        response=st.text(st.characters(codec="utf-8")),
        reward=st.none() | PER_TOKEN,
        rewards=st.dictionaries(st.text(st.characters(codec="utf-8")), PER_TOKEN, max_size=2),
        status=st.sampled_from(SampleStatus),
        weight_versions=st.lists(st.builds(WeightSpan, st.integers(0, 9), st.just(0), st.just(n)), max_size=2),
        metadata=st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers() | st.none(), max_size=2),
    )
)


@settings(max_examples=100, deadline=None)
@given(samples=st.lists(SAMPLES, max_size=4))
def test_exported_samples_come_back_equal(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("export") / "samples.jsonl"
    assert export_samples_to_jsonl(samples, file) == len(samples)
    assert load_samples_from_jsonl(file) == samples
    assert [f.name for f in file.parent.iterdir()] == ["samples.jsonl"]


def test_load_sft_samples(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "a.jsonl", [qa(i) for i in range(3)])
    samples = load_sft_samples(file, tiny_tokenizer)
    assert [s.tokens for s in samples] == [prepare_sft_sample(qa(i), tiny_tokenizer).tokens for i in range(3)]
    export_samples_to_jsonl(samples, tmp_path / "tokens.jsonl")
    assert load_sft_samples(tmp_path / "tokens.jsonl") == samples
    with pytest.raises(UserError, match=r"a.jsonl:1: not an exported sample \(has no tokens\)"):
        load_sft_samples(file)


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        export_samples_to_jsonl([Sample(reward=1.0), Sample(reward=float("nan"))], tmp_path / "s.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_huggingface_format_loads_with_datasets(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    import datasets

    samples = [prepare_sft_sample(qa(i), tiny_tokenizer) for i in range(3)]
    file = tmp_path / "hf.jsonl"
    assert export_samples_to_huggingface_format(samples, file, tiny_tokenizer) == 3
    loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "hf"))
    for row, sample in zip(loaded, samples, strict=True):
        assert row["input_ids"] == sample.tokens
        assert row["labels"] == [t if m else -100 for t, m in zip(sample.tokens, sample.loss_mask, strict=True)]
        assert row["text"] == tiny_tokenizer.decode(sample.tokens)


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path, tiny_tokenizer: Any) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    script = (
        "import sys, time; from pathlib import Path; from rollouts.training.datasets.dataset_loaders import _locked\n"
        "with _locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    names = {name: cache / f"{c * 32}.x_1.tmp" for name, c in (("killed", "a"), ("working", "b"), ("young", "c"))}
    names["foreign"] = cache / "notes.tmp"
    for folder in names.values():
        folder.mkdir()
        (folder / "tokens.bin").write_bytes(b"1234")
        made = time.time() + 3600 if folder == names["young"] else 1  # never old, however slow this test is
        os.utime(folder, (made, made))
    holders = [
        subprocess.Popen([sys.executable, "-c", script, str(names[name])], stdout=subprocess.PIPE, text=True)
        for name in ("killed", "working")
    ]
    try:
        for holder in holders:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holders[0].kill()
        holders[0].wait()
        samples = load_sft_dataset(write(tmp_path / "a.jsonl", [qa(1)]), tiny_tokenizer, cache_dir=cache)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
    assert len(samples) == 1
    assert {name for name, folder in names.items() if folder.exists()} == {"working", "young", "foreign"}
    assert not [path for path in cache.glob("*.tmp") if path not in names.values()]
