"""Text in pieces is the whole text, and tool calls do not depend on where the pieces end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rollouts.inference import Completion, StopReason
from rollouts.serving.text import TextStream, TokenNames, completion_text, overlap
from rollouts.serving.tool_calls import ToolCallSplitter, whole_calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "ü \\" <tool_call>"}}\n</tool_call>'


@pytest.fixture(scope="module")
def examples(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    import random

    rng = random.Random(0)
    texts = ["Größe 🙂🙂 naïve", "a\n\nb  c", "日本語のテキスト", "<|im_end|>x<|im_end|>"]
    noise = [[rng.randrange(512) for _ in range(30)] for _ in range(20)]
    return [tiny_tokenizer.encode(text) for text in texts] + noise


@pytest.mark.parametrize("by_bytes", [True, False])
def test_pieces_join_to_the_whole(
    tiny_tokenizer: PreTrainedTokenizerFast, examples: list[list[int]], by_bytes: bool
) -> None:
    """By the bytes of tokens, and by the tokenizer itself, which other kinds of vocabularies need."""
    names = TokenNames(tiny_tokenizer)
    assert names.are_bytes
    names.are_bytes = by_bytes
    for ids in examples:
        stream = TextStream(names, ["zz", "b  cd"])
        pieces = [stream.push([token]) for token in ids]
        whole = Completion(ids, [0.0] * len(ids), [0.0] * len(ids), StopReason.LENGTH)
        assert "".join(pieces) + stream.finish(whole) == tiny_tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_strings_and_tokens_are_left_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer.encode("Anna sees the end here")
    zeros = [0.0] * len(ids)
    by_string = Completion(ids, zeros, zeros, StopReason.STOP_STRING, "end")
    assert completion_text(tiny_tokenizer, by_string) == "Anna sees the "
    assert completion_text(tiny_tokenizer, by_string, trim=False) == "Anna sees the end here"
    by_token = Completion(ids, zeros, zeros, StopReason.STOP_TOKEN, ids[-1])
    assert completion_text(tiny_tokenizer, by_token) == tiny_tokenizer.decode(ids[:-1])
    stream = TextStream(TokenNames(tiny_tokenizer), ["end"])
    pieces = [stream.push([token]) for token in ids]
    assert not any("e" in piece[-1:] and "the e" in "".join(pieces[: i + 1]) for i, piece in enumerate(pieces))


def test_token_bytes_join_to_the_text(tiny_tokenizer: PreTrainedTokenizerFast, examples: list[list[int]]) -> None:
    names = TokenNames(tiny_tokenizer)
    for ids in examples:
        joined = bytes(byte for token in ids for byte in names.utf8(token))
        assert joined.decode(errors="replace") == tiny_tokenizer.decode(ids)


def test_overlap() -> None:
    assert [overlap(text, "<tool>") for text in ("a <to", "a <tool> b", "ab", "<", "", "<<")] == [3, 8, 0, 1, 0, 1]


def split(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    splitter = ToolCallSplitter()
    content, parts = "", []
    for text, found in [*map(splitter.push, pieces), splitter.finish()]:
        content, parts = content + text, parts + found
    calls = whole_calls(parts)
    assert [part.index for part in parts if part.name is not None] == [*range(len(calls))]
    assert len({call.id for call in calls}) == len(calls) == splitter.num_calls
    return content, [(call.name, call.arguments) for call in calls]


ARGUMENTS = '{"x": "ü \\" <tool_call>"}'
ONE = ("f", ARGUMENTS)


def called(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "f", "arguments": {arguments}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text\n", ("just text\n", [])),
        (CALL, ("", [ONE])),
        (f"I think.\n{CALL}\n{CALL}\n", ("I think.", [ONE, ONE])),
        (f"{CALL}\n then {CALL}", ("then", [ONE, ONE])),
        (CALL.removesuffix("\n</tool_call>"), ("", [ONE])),
        (called('{"x": [{}, "]}"], "y": {"z": 1}}} \n'), ("", [("f", '{"x": [{}, "]}"], "y": {"z": 1}}')])),
        (called(' {"a":1 , "b" : 2 } , "id": 3}</tool_call>!'), ("!", [("f", '{"a":1 , "b" : 2 }')])),
        # Cut short, or no JSON: the arguments are what is there.
        (called('{"x": "a b'), ("", [("f", '{"x": "a b')])),
        (called('{"x": 1 \n</tool_call> so'), ("so", [("f", '{"x": 1')])),
        (called('{"x": "y</tool_call> so'), ("so", [("f", '{"x": "y')])),
        (called('{"x": NaN}}</tool_call>'), ("", [("f", '{"x": NaN}')])),
        # In another order, or without arguments.
        ('<tool_call>{"arguments":{"x":1},"name":"f"}</tool_call>', ("", [("f", '{"x": 1}')])),
        ('<tool_call>{"name": "g"}</tool_call>', ("", [("g", "{}")])),
        ('<tool_call>{"name": "\\u00fc\\n", "arguments": {}}</tool_call>', ("", [("ü\n", "{}")])),
        # No calls at all.
        ("<tool_call>not json</tool_call> then", None),
        ('<tool_call>{"name": 5}</tool_call>', None),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments"', None),
        ("a <tool_call> b", None),
        ("a < b and <tool", None),
    ],
)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_tool_calls_wherever_the_pieces_end(text: str, expected: Any, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    assert split(pieces) == (expected or (text, []))


def test_arguments_come_as_they_are_written() -> None:
    """All that is certain, and nothing more: a closing tag may be on its way."""
    splitter = ToolCallSplitter()
    assert splitter.push('So. <tool_call>{"name": "f", "arguments": ')[1] == []
    given = [splitter.push(text)[1] for text in ("{", '"a"', ": ", '"1', "] <", "/tool", '"}', "}", "</tool_call>")]
    head, first = given[0]
    assert (head.index, head.name, head.arguments, bool(head.id)) == (0, "f", "", True)
    assert (first.index, first.name, first.arguments) == (0, None, "{")
    assert [[part.arguments for part in parts] for parts in given[1:]] == [
        ['"a"'], [":"], [' "1'], ["]"], [], [' </tool"}'], [], []
    ]  # fmt: skip
