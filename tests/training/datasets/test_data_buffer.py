"""DataBuffer: every prompt once an epoch, the same order on every resume, and no state of another run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.errors import UserError
from rollouts.training.datasets.data_buffer import (
    DataBuffer,
    create_buffer_from_jsonl,
    load_prompts_from_jsonl,
    load_prompts_from_list,
)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 20),
    asks=st.lists(st.integers(0, 30), max_size=12),
    cut=st.integers(0, 12),
    seed=st.integers(0, 5),
)
def test_a_resumed_buffer_deals_what_an_uninterrupted_one_does(size: int, asks: list[int], cut: int, seed: int) -> None:
    whole, first = DataBuffer(range(size), seed), DataBuffer(range(size), seed)
    expected = [whole.get_prompts(n) for n in asks]
    dealt = [first.get_prompts(n) for n in asks[:cut]]
    second = DataBuffer(range(size), seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    dealt += [second.get_prompts(n) for n in asks[cut:]]
    assert dealt == expected
    assert second.state_dict() == whole.state_dict()
    total = [p for batch in dealt for p in batch]
    for start in range(0, len(total) - size + 1, size):
        assert sorted(total[start : start + size]) == list(range(size))
    if total:
        assert whole.epoch_id == (len(total) - 1) // size
        assert whole.sample_offset == (len(total) - 1) % size + 1


def test_epochs_differ_seeds_differ_and_the_order_is_the_same_on_every_machine() -> None:
    def order(seed: int, epochs: int) -> list[int]:
        return DataBuffer(range(8), seed).get_prompts(8 * epochs)[-8:]

    assert order(0, 1) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert order(0, 1) != order(0, 2) != order(1, 2)


def test_first_places_are_even() -> None:
    counts = Counter(DataBuffer(range(4), seed).get_prompts(1)[0] for seed in range(400))
    assert all(70 < counts[i] < 130 for i in range(4))


def test_without_shuffling_the_given_order_repeats_and_the_list_is_left_alone() -> None:
    prompts = ["a", "b", "c"]
    buffer = DataBuffer(prompts, shuffle=False)
    assert buffer.get_prompts(7) == ["a", "b", "c", "a", "b", "c", "a"]
    assert (buffer.epoch_id, buffer.sample_offset) == (2, 1)
    DataBuffer(prompts, seed=3).get_prompts(9)
    assert prompts == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (DataBuffer(range(4)), "num_prompts"),
        (DataBuffer(range(3), 1), "seed"),
        (DataBuffer(range(3), shuffle=False), "shuffle"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(other: DataBuffer[int], key: str) -> None:
    buffer = DataBuffer(range(3))
    with pytest.raises(UserError, match=f"{key} was"):
        buffer.load_state_dict(other.state_dict())
    assert buffer.state_dict() == DataBuffer(range(3)).state_dict()


@pytest.mark.parametrize("change", [{"sample_offset": 4}, {"epoch_id": -1}, {"epoch_id": "0"}, {"sample_offset": None}])
def test_an_impossible_position_is_refused(change: dict[str, object]) -> None:
    buffer = DataBuffer(range(3))
    with pytest.raises(UserError, match="is no place in 3 prompts"):
        buffer.load_state_dict({**buffer.state_dict(), **change})


def test_state_file(tmp_path: Path) -> None:
    buffer = DataBuffer(range(5), seed=2)
    buffer.get_prompts(7)
    buffer.save_state(tmp_path / "data.json")
    again = DataBuffer(range(5), seed=2)
    again.load_state(tmp_path / "data.json")
    assert again.get_prompts(5) == buffer.get_prompts(5)
    assert [f.name for f in tmp_path.iterdir()] == ["data.json"]
    for text in ("{", "[]", '{"epoch_id": 0}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError):
            again.load_state(tmp_path / "bad.json")
    with pytest.raises(UserError, match="no readable data position"):
        again.load_state(tmp_path / "missing.json")


def test_prompts_from_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n')
    prompts = load_prompts_from_jsonl(file)
    assert prompts == ["a", [{"role": "user", "content": "b"}]]
    assert create_buffer_from_jsonl(file, shuffle=False).get_prompts(2) == prompts
    assert load_prompts_from_list(prompts) == prompts
    file.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(UserError, match=r"p.jsonl:2: has no field 'prompt'"):
        load_prompts_from_jsonl(file)
    file.write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        load_prompts_from_jsonl(file)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        DataBuffer([])
    with pytest.raises(ValueError, match="seed"):
        DataBuffer([1], seed=-1)
    with pytest.raises(ValueError, match="-1"):
        DataBuffer([1]).get_prompts(-1)
    with pytest.raises(UserError, match="empty"):
        load_prompts_from_list([])
