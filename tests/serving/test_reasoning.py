"""Reasoning is told from content wherever the pieces of the text end, and in a real answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.serving.message_reader import MessageForm, MessageReader, read_message
from rollouts.serving.reasoning import ReasoningSplitter
from rollouts.serving.tool_calls import whole_calls

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def split(pieces: list[str], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("just text", False, ("", "just text")),
        ("", False, ("", "")),
        (" \n", False, ("", " \n")),
        ("<think>\nwhy\n</think>\n\nso", False, ("why", "so")),
        ("\n<think>why</think>so\n", False, ("why", "so\n")),
        ("<think>\n\n</think>\n\nso", False, ("", "so")),
        ("<think>\na\n\n<think> b </thin\n</think>\n\n\nso </think>", False, ("a\n\n<think> b </thin", "so </think>")),
        ("<think>\ncut shor", False, ("cut shor", "")),
        ("<think>\ncut</thi", False, ("cut</thi", "")),
        ("<thin is no tag", False, ("", "<thin is no tag")),
        ("<thin", False, ("", "<thin")),
        ("text <think>later</think>", False, ("", "text <think>later</think>")),
        ("why\n</think>\n\nso", True, ("why", "so")),
        ("cut", True, ("cut", "")),
    ],
)
@given(cuts=st.lists(st.integers(0, 60), max_size=12))
def test_wherever_the_pieces_end(text: str, opened: bool, expected: tuple[str, str], cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert split([text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], opened) == expected


def test_a_message_has_reasoning_content_and_calls() -> None:
    text = f"<think>\nCall {CALL}?\n</think>\n\nI ask.\n{CALL}"
    form = MessageForm(tools=True)
    part = read_message(form, text)
    assert (part.reasoning, part.content) == (f"Call {CALL}?", "I ask.")
    assert [call.name for call in whole_calls(part.calls)] == ["f"]
    reader = MessageReader(form)
    pieces = [reader.push(char) for char in text] + [reader.push("", last=True)]
    assert "".join(piece.reasoning for piece in pieces) == part.reasoning
    assert "".join(piece.content for piece in pieces) == part.content
    (call,) = whole_calls(call for piece in pieces for call in piece.calls)
    assert (call.name, call.arguments) == ("f", "{}")
    plain = read_message(MessageForm(reasoning=False), "<think>a</think>b")
    assert (plain.reasoning, plain.content) == ("", "<think>a</think>b")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_shows_its_reasoning(server: Any, stream: bool) -> None:
    grammar = 'start: <think> "\\nwhy\\n" </think> "\\n\\nso"'
    arguments: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "stream": stream}
    for separate, expected in ((True, ("why", "so")), (False, ("", "<think>\nwhy\n</think>\n\nso"))):
        body = {"structured_outputs": {"grammar": grammar}, "separate_reasoning": separate}
        answer = server.openai.chat.completions.create(**arguments, extra_body=body)
        messages = [c.choices[0].delta for c in answer] if stream else [answer.choices[0].message]
        reasoning = "".join(getattr(message, "reasoning_content", None) or "" for message in messages)
        assert (reasoning, "".join(message.content or "" for message in messages)) == expected


def test_a_template_may_open_the_block(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of models that always think end with the tag; what comes before its end is reasoning."""
    tokenizer = server.served.tokenizer
    template = tokenizer.chat_template
    assert template.count("'<|im_start|>assistant\\n' -}}\n{%- endif -%}") == 1
    opening = template.replace(
        "'<|im_start|>assistant\\n' -}}\n{%- endif -%}", "'<|im_start|>assistant\\n<think>\\n' -}}\n{%- endif -%}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", opening)
    message = server.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Why?"}], seed=0, max_tokens=20
    ).choices[0].message  # fmt: skip
    assert message.reasoning_content and not message.content
