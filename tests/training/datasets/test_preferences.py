"""Preference data in the formats of the field: which prompt, which answers, and what of them learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rollouts.errors import UserError
from rollouts.training.datasets.preferences import load_preference_dataset, preference_row
from rollouts.training.datasets.rows import BadRow
from rollouts.training.datasets.sources import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Q = {"role": "user", "content": "Two plus two?"}
GOOD, BAD = {"role": "assistant", "content": "Four."}, {"role": "assistant", "content": "Five."}
PARTS = {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}


def parts(row: dict[str, Any]) -> dict[str, Any]:
    found = preference_row(row)
    return {name: found[name] for name in PARTS}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [Q], "chosen": GOOD, "rejected": BAD},
        {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"prompt": "Two plus two?", "chosen": [Q, GOOD], "rejected": [Q, BAD], "score_chosen": 9.0},  # UltraFeedback
        {"question": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        {"instruction": "Two plus two?", "input": "", "output": "Four!", "chosen": "Four.", "rejected": "Five."},
        {"chosen": "\n\nHuman: Two plus two?\n\nAssistant: Four.",
         "rejected": "\n\nHuman: Two plus two?\n\nAssistant: Five."},
        {"prompt": "\n\nHuman: Two plus two?\n\nAssistant:", "chosen": " Four.", "rejected": " Five."},
        {"conversations": [{"from": "human", "value": "Two plus two?"}],
         "chosen": {"from": "gpt", "value": "Four."}, "rejected": {"from": "gpt", "value": "Five."}},
    ],
)  # fmt: skip
def test_formats(row: dict[str, Any]) -> None:
    found = parts(row)
    for name, messages in PARTS.items():
        assert [(m["role"], m["content"].strip()) for m in found[name]] == [(m["role"], m["content"]) for m in messages]


def test_long_dialogues_and_system_messages() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Two plus two?"
    found = parts({"chosen": start + "\n\nAssistant: Four.", "rejected": start + "\n\nAssistant: Five."})
    assert [m["role"] for m in found["prompt"]] == ["user", "assistant", "user"]
    assert found["chosen"] == [GOOD] and found["rejected"] == [BAD]

    row = {"system": "Be brief.", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."}
    system = {"role": "system", "content": "Be brief."}
    row_of_conversations = {"system": "Be brief.", "chosen": [Q, GOOD], "rejected": [Q, BAD]}
    assert parts(row_of_conversations)["prompt"] == [system, Q]
    assert preference_row(row | {"source": "x"})["rest"] == {"source": "x"}


def test_labels() -> None:
    for row, chosen, rejected in (
        ({"prompt": "Two plus two?", "completion": "Four.", "label": True}, [GOOD], None),
        ({"prompt": [Q], "completion": [BAD], "label": False}, None, [BAD]),
        ({"messages": [Q, BAD], "label": 0}, None, [BAD]),
    ):
        assert parts(row) == {"prompt": [Q], "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "b", "rejected": "c"}, "prompt"),
        ({"chosen": [Q, GOOD], "rejected": [BAD]}, "one of chosen and rejected is a whole conversation"),
        ({"chosen": [Q, GOOD], "rejected": [{**Q, "content": "?"}, BAD]}, "different prompts"),
        ({"prompt": "a", "chosen": [Q, GOOD, Q], "rejected": [Q, BAD]}, "ends with a message of the user"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen: .* is empty"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen: "),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "turn 2 .* is empty"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label must be true or false"),
        ({"prompt": "a", "label": True}, "no "),
        (["a"], "must be an object"),
    ],
)
def test_bad_rows(row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as caught:
        preference_row(row)
    assert "\n" not in str(caught.value)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_only_the_answer_learns(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    row = {"prompt": [*history, Q], "chosen": [GOOD], "rejected": "Five, I believe.", "level": 3}
    pair = load_preference_dataset(write(tmp_path / "a.jsonl", [row]), tiny_tokenizer)[0]
    end = tiny_tokenizer.decode([tiny_tokenizer.eos_token_id])
    for sample, text in ((pair.chosen, "Four."), (pair.rejected, "Five, I believe.")):
        whole = tiny_tokenizer.decode(sample.tokens)
        assert whole.startswith(tiny_tokenizer.apply_chat_template([*history, Q], tokenize=False))
        learned = tiny_tokenizer.decode([t for t, m in zip(sample.tokens, sample.loss_mask, strict=True) if m])
        assert learned.removesuffix(end).strip() == text and learned != text
        assert sample.group_id == pair.id == f"{tmp_path}/a.jsonl:1"
    assert pair.metadata == {"level": 3} and len(pair) == len(pair.chosen) + len(pair.rejected)


def test_bad_and_long_pairs_are_reported(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [good, {**good, "rejected": "b"}, {**good, "chosen": "long " * 200}, {**good, "label": True}, "x", good]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"2 bad of 6 rows, the first at .*a.jsonl:2: chosen and rejected are the same"):
        load_preference_dataset(file, tiny_tokenizer)
    data = load_preference_dataset(file, tiny_tokenizer, max_length=100, on_bad_row="skip")
    assert [p.id.rpartition(":")[2] for p in data] == ["1", "4", "6"]
    assert (data.report.rows, data.report.samples, len(data.report.bad_rows), len(data.report.too_long)) == (6, 3, 2, 1)
    assert len(load_preference_dataset({"path": file, "max_samples": 1}, tiny_tokenizer, on_bad_row="skip")) == 1
    with pytest.raises(UserError, match="no usable preference pairs"):
        load_preference_dataset(write(tmp_path / "b.jsonl", ["x"]), tiny_tokenizer, on_bad_row="skip")


def test_real_preferences(shared_data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = shared_data / "instruct" / "instruction-data-with-preference.json.gz"
    rows = {row.line: row.data for row in read_rows(file)}
    data = load_preference_dataset(file, tiny_tokenizer, on_bad_row="skip")
    useless = {line for line, row in rows.items() if row["chosen"].strip() == row["rejected"].strip()}
    useless |= {line for line, row in rows.items() if not row["chosen"].strip() or not row["rejected"].strip()}
    assert len(rows) == 1100 == len(data) + len(data.report.bad_rows)
    assert {p.line for p in data.report.bad_rows} == useless
    for pair in data[:100]:
        row = rows[int(pair.id.rpartition(":")[2])]
        for sample, name in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            text = tiny_tokenizer.decode(sample.tokens)
            assert row["instruction"] in text and row["input"] in text and row[name].strip() in text
