"""Response formats, structured outputs and tools that must be called, by the unmodified openai client."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from pydantic import BaseModel

MESSAGES: Any = [{"role": "user", "content": "What is 2 + 3?"}]
COLORS = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "grün"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {
        "type": "object", "properties": properties, "required": [*properties], "additionalProperties": False
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS: Any = [tool("add", {"a": {"type": "integer", "maximum": 9}, "b": {"type": "boolean"}}), tool("get-time", {})]


def ask(server: Any, **arguments: Any) -> Any:
    """The model is random: whatever form its answers have comes from what binds them."""
    return server.openai.chat.completions.create(
        **{"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "seed": 0, **arguments}
    )


def test_a_json_schema_binds_every_answer(server: Any) -> None:
    schema = {"name": "colors", "schema": COLORS, "strict": True}
    answer = ask(server, n=8, response_format={"type": "json_schema", "json_schema": schema})
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"color", "count"}
        assert value["color"] in ("red", "grün") and 0 <= value["count"] <= 99
        assert choice.finish_reason == "stop"


def test_the_client_parses_into_its_own_classes(server: Any) -> None:
    class Point(BaseModel):
        x: bool
        y: bool

    answer = server.openai.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Point, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_json_objects_are_whole_or_cut_by_the_limit(server: Any) -> None:
    answer = ask(server, n=8, response_format={"type": "json_object"}, max_tokens=60, temperature=0.7)
    for choice in answer.choices:
        assert choice.message.content.lstrip()[:1] == "{"
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]"}, "[ab]{3}-[0-9]"),
        ({"choice": ["yes", 'no "x"\n', "ü"]}, '(yes|no "x"\n|ü)'),
        ({"grammar": 'start: "x" ("+" "x")~2'}, r"x\+x\+x"),
        ({"json": {"const": 5}}, "5"),
    ],
)
def test_other_structured_outputs(server: Any, outputs: dict[str, Any], pattern: str) -> None:
    answer = ask(server, n=4, extra_body={"structured_outputs": outputs})
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.message.content), choice
    old = server.openai.completions.create(
        model="tiny", prompt="Anna", max_tokens=50, extra_body={"structured_outputs": outputs}
    )
    assert re.fullmatch(pattern, old.choices[0].text)


def test_generate_takes_sglangs_fields(server: Any) -> None:
    for sampling, good in (
        ({"regex": "a{2,3}"}, lambda text: text in ("aa", "aaa")),
        ({"json_schema": json.dumps(COLORS)}, lambda text: set(json.loads(text)) == {"color", "count"}),
    ):
        answer = server.post("/generate", text="x", sampling_params={**sampling, "max_new_tokens": 99}).json()
        assert good(answer["text"]) and answer["meta_info"]["finish_reason"]["type"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_forced_tools_are_called(server: Any, choice: Any, stream: bool) -> None:
    called = set()
    for seed in range(4):
        answer = ask(server, tools=TOOLS, tool_choice=choice, seed=seed, stream=stream, parallel_tool_calls=False)
        if stream:
            pieces = [c for chunk in answer for c in chunk.choices]
            assert not any(piece.delta.content for piece in pieces)
            call, *parts = [call for piece in pieces for call in piece.delta.tool_calls or []]
            assert call.id and {part.index for part in (call, *parts)} == {0}
            call.function.arguments += "".join(part.function.arguments for part in parts)
            reason = pieces[-1].finish_reason
        else:
            assert not answer.choices[0].message.content
            (call,) = answer.choices[0].message.tool_calls
            reason = answer.choices[0].finish_reason
        assert reason == "tool_calls"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "add":
            assert set(arguments) == {"a", "b"} and arguments["a"] <= 9 and isinstance(arguments["b"], bool)
        else:
            assert call.function.name == "get-time" and arguments == {}
        called.add(call.function.name)
    assert called <= {"add", "get-time"} if choice == "required" else called == {"add"}


def test_several_calls_at_once(server: Any) -> None:
    """Random weights go on or stop by chance: among many answers some have more than one call."""
    counts = set()
    for choice in ask(server, tools=TOOLS[1:], tool_choice="required", n=64, temperature=2).choices:
        calls = choice.message.tool_calls
        counts.add(len(calls))
        assert {call.function.name for call in calls} == {"get-time"}
        assert len({call.id for call in calls}) == len(calls)
    assert max(counts) > 1


def test_an_answer_of_a_given_form_may_be_a_call_instead(server: Any) -> None:
    schema = {"name": "n", "schema": {"const": 1}}
    arguments: Any = {"tools": TOOLS[1:], "response_format": {"type": "json_schema", "json_schema": schema}}
    kinds = set()
    for choice in ask(server, n=64, temperature=3, parallel_tool_calls=False, **arguments).choices:
        if choice.message.tool_calls:
            assert json.loads(choice.message.tool_calls[0].function.arguments) == {}
        else:
            assert choice.message.content == "1"
        kinds.add(choice.finish_reason)
    assert kinds == {"stop", "tool_calls"}


def test_what_cannot_be_honored_is_refused_before_a_stream_begins(server: Any) -> None:
    schema = {"name": "x", "schema": {"type": "object", "$ref": "https://example.com/schema.json"}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(server, response_format={"type": "json_schema", "json_schema": schema}, stream=stream)
        assert caught.value.param == "response_format"
