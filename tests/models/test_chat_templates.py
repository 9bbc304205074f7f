"""The project's chat template: loss marks, prefixes, tools, against transformers' own rendering and masks."""

from __future__ import annotations

import json
import re

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers & returns 'é'",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]
# Text that does not begin with whitespace, so that tokens (not only characters) are cut at the end of a header.
TEXT = st.text(min_size=1, max_size=20).filter(lambda s: not s[0].isspace() and "<|" not in s)
ARGUMENTS = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), max_size=3)
CALLS = st.lists(
    st.builds(lambda name, args: {"type": "function", "function": {"name": name, "arguments": args}}, TEXT, ARGUMENTS),
    max_size=2,
)
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT | st.none()},
    optional={"reasoning_content": TEXT, "tool_calls": CALLS},
)
CONVERSATIONS = st.tuples(
    st.lists(st.builds(lambda c: {"role": "system", "content": c}, TEXT), max_size=1),
    st.lists(
        st.builds(lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "tool", "system"]), TEXT)
        | ASSISTANT,
        min_size=1,
        max_size=6,
    ),
).map(lambda parts: parts[0] + parts[1])


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def assistant_text(message):
    """What the assistant has to produce, written down independently of the template."""
    text = message.get("content") or ""
    calls = []
    for call in message.get("tool_calls") or []:
        name, arguments = (json.dumps(call["function"][key], ensure_ascii=False) for key in ("name", "arguments"))
        calls.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    reasoning = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if message.get("reasoning_content") else ""
    return reasoning + "\n".join(([text] if text else []) + calls) + "<|im_end|>"


@given(messages=CONVERSATIONS)
@settings(max_examples=100, deadline=None)
def test_the_mask_holds_exactly_what_assistants_say_and_their_end_token(tiny_tokenizer, messages):
    out = tiny_tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    learned = [token for token, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    expected = "".join(assistant_text(m) for m in messages if m["role"] == "assistant")
    assert tiny_tokenizer.decode(learned) == expected


@given(messages=CONVERSATIONS, tools=st.sampled_from([None, TOOLS]))
@settings(max_examples=100, deadline=None)
def test_a_history_only_grows(tiny_tokenizer, messages, tools):
    whole = render(tiny_tokenizer, messages, tools=tools)
    whole_ids = tiny_tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    for k in range(1, len(messages) + 1):
        speaks_next = k < len(messages) and messages[k]["role"] == "assistant"
        assert whole.startswith(render(tiny_tokenizer, messages[:k], tools=tools, add_generation_prompt=speaks_next))
        ids = tiny_tokenizer.apply_chat_template(
            messages[:k], tools=tools, add_generation_prompt=speaks_next, return_dict=False
        )
        assert whole_ids[: len(ids)] == ids


def test_new_messages_can_be_rendered_alone(tiny_tokenizer):
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rest = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert render(tiny_tokenizer, first + rest) == render(tiny_tokenizer, first) + render(tiny_tokenizer, rest)


def test_the_whole_form_is_as_documented(tiny_tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "1 and 2"}]},
        {
            "role": "assistant",
            "content": "Sure.",
            "reasoning_content": "Use the tool",
            "tool_calls": [{"name": "add", "arguments": '{"a": 1, "b": 2}'}],
        },
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert render(tiny_tokenizer, messages, add_generation_prompt=True) == (
        "<|im_start|>user\nAdd 1 and 2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nUse the tool\n</think>\n\nSure.\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_can_be_read_back(tiny_tokenizer, system):
    text = render(tiny_tokenizer, [*system, {"role": "user", "content": "hi"}], tools=TOOLS)
    assert text.count("<|im_start|>system") == 1
    assert ("Be brief." in text) == bool(system)
    listed = re.findall(r"<tools>\n(.*?)\n</tools>", text, re.DOTALL)[-1]
    assert [json.loads(line) for line in listed.splitlines()] == TOOLS


@given(arguments=ARGUMENTS, name=TEXT)
@settings(max_examples=50, deadline=None)
def test_tool_calls_can_be_read_back(tiny_tokenizer, arguments, name):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    text = render(tiny_tokenizer, [{"role": "assistant", "content": "", "tool_calls": [call, call]}])
    parsed = [json.loads(body) for body in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text)]
    assert parsed == [{"name": name, "arguments": arguments}] * 2


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "robot", "content": "x"}, "unknown role robot"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "text only"),
    ],
)
def test_what_cannot_be_rendered_is_refused(tiny_tokenizer, message, reason):
    with pytest.raises(jinja2.exceptions.TemplateError, match=reason):
        render(tiny_tokenizer, [message])
