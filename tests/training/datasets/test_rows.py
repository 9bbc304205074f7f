"""Row formats: each becomes the same conversation, and whatever cannot is a bad row with a reason, never a crash."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.training.datasets.rows import BadRow, canonical_row, prompt_and_answer

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QA},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, QA[1]],
            "tools": None,
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": QA},
        {"prompt": "q", "completion": "a"},
        {"prompt": QA[:1], "completion": QA[1:]},
        {"prompt": QA[:1], "completion": "a", "text": "ignored"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "system": ""},
        {"question": "q", "answer": "a"},
    ],
)
def test_every_format_gives_the_same_conversation(row: dict[str, Any]) -> None:
    assert canonical_row(row) == {"messages": QA, "tools": None}


def test_alpaca_joins_input_and_keeps_system_and_history() -> None:
    row = {"instruction": "Sort.", "input": "3 1", "output": "1 3", "system": "Be brief.", "history": [["hi", "hello"]]}
    assert [(m["role"], m["content"]) for m in canonical_row(row)["messages"]] == [
        ("system", "Be brief."), ("user", "hi"), ("assistant", "hello"), ("user", "Sort.\n\n3 1"), ("assistant", "1 3"),
    ]  # fmt: skip


def test_sharegpt_tool_calls_and_tools_come_out_in_openai_form() -> None:
    row = {
        "system": "Use tools.",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f", "parameters": {"type": "object"}}]',
    }
    conversation = canonical_row(row)
    assert conversation["tools"] == [TOOL]
    assert conversation["messages"] == [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "a"},
    ]


def test_openai_tool_calls_keep_ids_reasoning_and_text() -> None:
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": "f"},
    ]
    out = canonical_row({"messages": messages, "tools": [TOOL]})["messages"]
    assert out[0]["role"] == "system"
    assert out[2] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "1", **CALL}],
    }
    assert out[3] == {"role": "tool", "content": "7", "tool_call_id": "1", "name": "f"}


def test_text_and_text_field() -> None:
    assert canonical_row({"text": "hello", "id": 3}) == {"text": "hello"}
    assert canonical_row({"body": "hello", "messages": QA}, text_field="body") == {"text": "hello"}


DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [QA[0], {"role": "assistant", **message}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "must be an object with named fields, got null"),
        ([1], "got a list"),
        ({}, "in no known format.*found nothing"),
        ({"mesages": QA}, "in no known format.*found mesages"),
        ({"messages": []}, "at least one message"),
        ({"messages": "[1,"}, "messages is not JSON"),
        ({"messages": [QA[0]]}, "no assistant message"),
        ({"messages": ["hi"]}, "message 1 must be an object, got a string"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no role; found content"),
        ({"messages": [{"role": "usr", "content": "hi"}]}, "unknown role 'usr'"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "unknown role a list"),
        ({"messages": [{"role": "user"}, QA[1]]}, r"message 1 \(user\) has no content"),
        (said(content=7), r"message 2 \(assistant\) content must be a string, got a number"),
        (said(content=math.nan), "must be a string, got a number"),
        (said(content=""), "is empty: neither content nor tool_calls"),
        (said(content="\ud800"), "not valid Unicode"),
        (said(content="a", weight=0), "weights are not supported"),
        (said(content=[{"type": "image_url"}]), "content part of type 'image_url'"),
        (said(tool_calls=[{}]), "tool call without a function name"),
        (said(tool_calls=[DEEP]), "tool call without a function name"),
        (said(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "arguments of f is not JSON"),
        (said(tool_calls=[{"function": {"name": "f", "arguments": "NaN"}}]), "NaN is not JSON"),
        (said(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]), "must be an object, got a list"),
        (said(tool_calls=[{"function": {"name": "f", "arguments": {"x": math.inf}}}]), "the number inf"),
        (said(tool_calls=[{"function": {"name": "f", "arguments": {"x": DEEP}}}]), "nested deeper than 64"),
        (said(tool_calls=[{"function": {"name": "f", "arguments": {"\udc80": 1}}}]), "not valid Unicode"),
        ({"conversations": [{"from": "function_call", "value": "call f"}]}, "is not JSON"),
        ({"messages": QA, "tools": "nope"}, "tools is not JSON"),
        ({"messages": QA, "tools": {"name": "f"}}, "tools must be a list"),
        ({"messages": QA, "tools": [{"function": 3}]}, "without a function name"),
        ({"messages": QA, "tools": [{"name": "f", "when": datetime.date(2020, 1, 1)}]}, "holds a date"),
        ({"prompt": "q"}, "has prompt but no completion or response"),
        ({"question": "q"}, "has question but no answer"),
        ({"question": "q", "answer": 4}, "answer must be a string, got a number"),
        ({"instruction": " ", "output": "a"}, "instruction is empty"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history must be a list of"),
        ({"text": ""}, "text is empty"),
        ({"text": b"bytes"}, "text must be a string, got a bytes"),
    ],
)
def test_bad_rows_say_why_on_one_line(row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as caught:
        canonical_row(row)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # printable anywhere


KEYS = st.sampled_from(
    "messages conversations role from content value tool_calls function name arguments tools text prompt completion "
    "instruction input output history question answer system type weight reasoning_content id".split()
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "gpt", "tool", "function_call", "\ud800", "[]", "{", '{"name": "f"}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(row=st.dictionaries(KEYS, ANYTHING, max_size=4))
def test_anything_is_a_conversation_or_a_bad_row(row: dict[str, Any]) -> None:
    for read in (canonical_row, prompt_and_answer):
        try:
            read(row)
        except BadRow as e:
            assert str(e).isprintable()


def test_prompt_and_answer() -> None:
    assert prompt_and_answer({"question": "q", "answer": "a", "level": 3}) == (QA[:1], "a", {"level": 3})
    assert prompt_and_answer({"messages": QA, "ground_truth": 42}) == (QA[:1], "42", {"ground_truth": 42})
    assert prompt_and_answer({"prompt": "q"}) == (QA[:1], None, {})
    with pytest.raises(BadRow, match="nothing to answer"):
        prompt_and_answer({"messages": [QA[1]]})
    with pytest.raises(BadRow, match="no prompt"):
        prompt_and_answer({"text": "x"})
