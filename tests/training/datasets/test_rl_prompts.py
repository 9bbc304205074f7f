"""Prompt sets as people have them: verl's parquet, TRL's columns, GSM8K's rows; with ids that stay."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rollouts.errors import UserError
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.datasets.dataset_loaders import load_dataset_with_answers, load_rl_prompts
from rollouts.training.rewards.answers import gsm8k
from rollouts.training.types import Sample, SampleStatus


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def verl_row(i: int, **changes: Any) -> dict[str, Any]:
    """A row as verl's GSM8K script writes it."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f'What is {i} + {i}? Give the answer after "####".'}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"split": "train", "index": i, "answer": f"{i}+{i}\n#### {2 * i}", "question": f"{i}+{i}?"},
        **changes,
    }


def test_verl_parquet(tmp_path: Path) -> None:
    rows = [verl_row(i) for i in range(5)]
    file = write_parquet(tmp_path / "train.parquet", rows)
    samples = load_dataset_with_answers(file)
    assert [s.id for s in samples] == [f"train.parquet:{i + 1}" for i in range(5)]
    for sample, row in zip(samples, rows, strict=True):
        assert sample.status is SampleStatus.PENDING and sample.tokens == ()
        assert sample.prompt == row["prompt"]
        kept = {k: row[k] for k in ("data_source", "ability", "reward_model", "extra_info")}
        expected = {"answer": row["reward_model"]["ground_truth"], "file": str(file)} | kept
        assert {k: v for k, v in sample.metadata.items() if k != "line"} == expected
    answered = Sample(response="#### 6", metadata=samples[3].metadata)
    assert gsm8k(answered) == 1.0 and gsm8k(Sample(response="#### 6", metadata=samples[2].metadata)) == 0.0
    json.dumps([s.to_dict() for s in samples])  # a checkpoint can hold them


def test_verl_ground_truths_of_other_types(tmp_path: Path) -> None:
    def answers(truths: list[Any]) -> list[str]:
        rows = [verl_row(i, reward_model={"style": "rule", "ground_truth": t}) for i, t in enumerate(truths)]
        return [s.metadata["answer"] for s in load_rl_prompts(write_parquet(tmp_path / "t.parquet", rows))]

    assert answers([72, -3]) == ["72", "-3"]
    assert answers([0.5]) == ["0.5"]
    assert answers([["7", "seven"]]) == ['["7", "seven"]']
    assert answers([{"target": 98, "numbers": [44, 19, 35]}]) == ['{"target": 98, "numbers": [44, 19, 35]}']


def test_verl_rows_without_a_ground_truth(tmp_path: Path) -> None:
    rows = [verl_row(0), verl_row(1, reward_model={"style": "model", "ground_truth": None})]
    file = write_parquet(tmp_path / "train.parquet", rows)
    assert "answer" not in load_rl_prompts(file)[1].metadata
    with pytest.raises(UserError, match=r"1 bad of 2 rows, the first at .*train.parquet:2: has no answer"):
        load_dataset_with_answers(file)


def test_trl_columns(tmp_path: Path) -> None:
    text = write_parquet(
        tmp_path / "text.parquet", [{"prompt": "Two plus two?", "solution": "$4$", "level": 1, "tags": ["sum"]}]
    )
    chat = write_parquet(
        tmp_path / "chat.parquet",
        [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}], "target": "4"}],
    )
    first, second = load_rl_prompts([text, chat])
    assert first.prompt == [{"role": "user", "content": "Two plus two?"}]
    assert first.metadata["answer"] == "$4$"
    assert (first.metadata["level"], first.metadata["tags"], first.metadata["solution"]) == (1, ["sum"], "$4$")
    assert [m["role"] for m in second.prompt if isinstance(m, dict)] == ["system", "user"]
    assert second.metadata["target"] == "4" and "answer" not in second.metadata


def test_problem_and_solution(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").write_text(
        json.dumps({"problem": "1+1?", "solution": "We add: \\boxed{2}", "answer": "2", "subject": "Algebra"})
        + "\n"
        + json.dumps({"problem": "1+2?", "solution": "\\boxed{3}"})
        + "\n"
    )
    first, second = load_dataset_with_answers(tmp_path / "math.jsonl")
    assert first.prompt == [{"role": "user", "content": "1+1?"}]
    assert (first.metadata["answer"], first.metadata["solution"]) == ("2", "We add: \\boxed{2}")
    assert second.metadata["answer"] == "\\boxed{3}"


def test_columns_that_json_has_no_word_for(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 2, 29, 12, 30)
    row = {"prompt": "Hi", "answer": decimal.Decimal("1.50"), "made": when, "day": when.date(), "pair": {"at": when}}
    sample = load_rl_prompts(write_parquet(tmp_path / "a.parquet", [row]))[0]
    assert sample.metadata["answer"] == "1.50"
    assert sample.metadata["made"] == "2024-02-29T12:30:00" and sample.metadata["day"] == "2024-02-29"
    assert sample.metadata["pair"] == {"at": "2024-02-29T12:30:00"}
    nested: Any = "deep"
    for _ in range(200):
        nested = [nested]
    (tmp_path / "deep.jsonl").write_text(json.dumps({"prompt": "Hi", "extra": nested}))
    with pytest.raises(UserError, match="nested deeper than 64"):
        load_rl_prompts(tmp_path / "deep.jsonl")
    with pytest.raises(UserError, match="not JSON"):
        load_rl_prompts(write_parquet(tmp_path / "b.parquet", [{"prompt": "Hi", "image": b"\x89PNG"}]))


def test_gsm8k(shared_data: Path) -> None:
    file = shared_data / "gsm8k" / "test.jsonl.gz"
    samples = load_dataset_with_answers(file)
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert len(samples) == len(rows) == 1319 == len({s.id for s in samples})
    for sample, row in zip(samples, rows, strict=True):
        assert sample.prompt == [{"role": "user", "content": row["question"]}]
        assert sample.metadata["answer"] == row["answer"]
        assert gsm8k(Sample(response=row["answer"], metadata=sample.metadata)) == 1.0


# --- ids ---


def test_ids_do_not_depend_on_where_the_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "deep" / "there"
    write_parquet(here / "a.parquet", [verl_row(i) for i in range(3)])
    write_parquet(here / "sub" / "a.parquet", [verl_row(i) for i in range(3, 5)])
    shutil.copytree(here, there)
    expected = ["a.parquet:1", "a.parquet:2", "a.parquet:3", "sub/a.parquet:1", "sub/a.parquet:2"]
    assert [s.id for s in load_rl_prompts(here)] == expected
    assert [s.id for s in load_rl_prompts(there)] == expected
    monkeypatch.chdir(tmp_path)
    assert [s.id for s in load_rl_prompts("here")] == expected
    assert [s.id for s in load_rl_prompts("here/a.parquet")] == expected[:3]


def test_ids_are_unique_whatever_is_mixed(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_parquet(tmp_path / folder / "train.parquet", [verl_row(i) for i in range(4)])
    sources = [{"path": tmp_path / "x", "repeat": 2.5}, {"path": tmp_path / "y" / "train.parquet"}, tmp_path / "x"]
    samples = load_rl_prompts(sources)
    assert len(samples) == 10 + 4 + 4 == len({s.id for s in samples})
    assert samples[4].id == f"{samples[0].id}#2" and samples[4].prompt == samples[0].prompt
    assert [s.id for s in load_rl_prompts(sources)] == [s.id for s in samples]
    samples[0].metadata["seed"] = 3
    assert "seed" not in samples[4].metadata  # a repeat is a sample of its own
    assert sorted(s.id for s in DataBuffer(samples, seed=1).get_prompts(18)) == sorted(s.id for s in samples)
