"""The unmodified openai client against a real server."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import torch
from running_server import running
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.inference import SamplingParams

MESSAGES: Any = [{"role": "user", "content": "What is 2 + 3?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
    }
]


def greedy_ids(server: Any, prompt_ids: list[int], count: int, **params: Any) -> list[int]:
    """What the engine itself gives."""
    (completion,) = server.served.engine.generate_batch(
        [prompt_ids], SamplingParams(temperature=0, max_tokens=count, **params)
    )
    return completion.token_ids


def test_models(server: Any) -> None:
    assert [model.id for model in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.models.retrieve("../../etc/passwd")
    assert caught.value.code == "model_not_found"


def test_chat_is_the_template_and_the_engine(server: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt_ids = tiny_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    expected = greedy_ids(server, prompt_ids, 20, ignore_eos=True)
    answer = server.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=20,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.model_extra["token_ids"] == expected
    assert answer.model_extra["prompt_token_ids"] == prompt_ids
    assert choice.message.content == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_ids), 20)
    assert answer.usage.total_tokens == len(prompt_ids) + 20


def test_every_text_in_a_stream_joins_to_the_whole(server: Any) -> None:
    for seed in range(5):
        arguments: Any = {
            "model": "tiny", "messages": MESSAGES, "seed": seed, "n": 3, "max_tokens": 40, "stop": ["e", "th"]
        }  # fmt: skip
        whole = server.openai.chat.completions.create(**arguments)
        texts, reasons, usage = ["", "", ""], [None] * 3, None
        stream = server.openai.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert texts == [choice.message.content for choice in whole.choices]
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens
        assert not any("e" in text or "th" in text for text in texts)


def test_completions_take_ids_text_and_lists(server: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Anna sees the bridge"
    ids = tiny_tokenizer.encode(text)
    arguments: Any = {"model": "tiny", "temperature": 0, "max_tokens": 8, "extra_body": {"return_token_ids": True}}
    create = server.openai.completions.create
    by_text = create(prompt=text, **arguments).choices[0]
    by_ids = create(prompt=ids, **arguments).choices[0]
    both = create(prompt=[ids, ids[:3]], n=2, **arguments)
    assert by_text.model_extra["prompt_token_ids"] == ids
    assert by_text.model_extra["token_ids"] == by_ids.model_extra["token_ids"] == greedy_ids(server, ids, 8)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.model_extra["prompt_token_ids"] for choice in both.choices] == [ids, ids, ids[:3], ids[:3]]
    assert both.choices[1].model_extra["token_ids"] == greedy_ids(server, ids, 8)
    streamed = [c.choices[0] for c in create(prompt=ids, stream=True, **arguments)]
    assert "".join(choice.text for choice in streamed) == by_ids.text
    assert [t for c in streamed for t in c.model_extra["token_ids"]] == by_ids.model_extra["token_ids"]


def test_log_probs(server: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "seed": 1, "max_tokens": 12, "temperature": 0.5}
    create = server.openai.chat.completions.create
    whole = create(**arguments, logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True}).choices[0]
    content = whole.logprobs.content
    (reference,) = server.served.engine.generate_batch(
        [tiny_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)],
        SamplingParams(seed=1, max_tokens=12, temperature=0.5),
    )
    assert whole.model_extra["token_ids"] == reference.token_ids
    assert [entry.logprob for entry in content] == pytest.approx(reference.raw_log_probs, abs=1e-5)
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob >= entry.logprob for entry in content)
    spoken = b"".join(bytes(entry.bytes) for entry in content)
    assert spoken.decode(errors="replace") == tiny_tokenizer.decode(reference.token_ids)
    for top in (None, 3):
        stream = create(**arguments, logprobs=True, top_logprobs=top or openai.omit, stream=True)
        streamed = [e for c in stream for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
        assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in content], abs=1e-5)
        assert [e.token for e in streamed] == [e.token for e in content]
    old = server.openai.completions.create(model="tiny", prompt="Boris", max_tokens=5, logprobs=2).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == len(old.top_logprobs) == len(old.text_offset)
    assert all(math.isfinite(p) for p in old.token_logprobs)


def test_tools_reach_the_template(server: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Tools, a call and its response are rendered exactly as the model's own template has them."""
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": "ü"}'}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "5"}]},
    ]
    rendered = [
        *MESSAGES,
        {
            "role": "assistant", "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "ü"}}}],
        },
        {"role": "tool", "content": "5"},
    ]  # fmt: skip
    expected = tiny_tokenizer.apply_chat_template(rendered, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    answer = server.openai.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, max_tokens=1, extra_body={"return_token_ids": True}
    )
    assert answer.model_extra["prompt_token_ids"] == expected
    none = server.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=1,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    plain = tiny_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert none.model_extra["prompt_token_ids"] == plain


CALLING = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def calling_server(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Iterator[Any]:
    """A model that has learned by heart to answer MESSAGES and TOOLS with CALLING."""
    prompt = tiny_tokenizer.apply_chat_template(MESSAGES, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([prompt + tiny_tokenizer.encode(CALLING)])
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    model = make_tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loss = torch.tensor(1.0)
    while loss > 0.01:
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("calling")
    model.save_pretrained(folder)
    with running(folder, tiny_tokenizer) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_a_sampled_tool_call_is_told_apart(calling_server: Any, stream: bool) -> None:
    answer = calling_server.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, temperature=0, stream=stream
    )
    if not stream:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        content, calls = message.content, message.tool_calls
    else:
        chunks = [choice for chunk in answer for choice in chunk.choices]
        content = "".join(choice.delta.content or "" for choice in chunks)
        calls = joined_calls(chunks)
        reason = chunks[-1].finish_reason
    assert content == "Let me see."
    assert [(call.function.name, call.function.arguments) for call in calls] == [("add", '{"a": 2}')]
    assert reason == "tool_calls"


def joined_calls(chunks: list[Any]) -> list[Any]:
    """The calls of a stream: each begins with its id and name and no arguments, which come after it in pieces."""
    calls: list[Any] = []
    for part in (part for chunk in chunks for part in chunk.delta.tool_calls or []):
        if part.index == len(calls):
            assert part.id and part.type == "function" and part.function.name and part.function.arguments == ""
            calls.append(part)
        else:
            assert part.index == len(calls) - 1 and part.id is part.function.name is None
            assert part.function.arguments
            calls[-1].function.arguments += part.function.arguments
    return calls


def test_arguments_are_streamed_while_they_are_sampled(calling_server: Any) -> None:
    """The engine stands still amid them: what has been sampled so far has come, and the rest comes when it goes on."""
    engine = calling_server.served.engine
    before = engine.num_sampled_tokens
    count = len(calling_server.served.tokenizer.encode(CALLING[: CALLING.index("2") + 1]))
    with calling_server.held(lambda: engine.num_sampled_tokens - before >= count) as reached:
        chunks = []
        stream = calling_server.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=TOOLS, temperature=0, stream=True
        )
        for chunk in stream:
            chunks += chunk.choices
            if (calls := joined_calls([*map(copy.deepcopy, chunks)])) and "2" in calls[0].function.arguments:
                break
        assert reached.wait(60) and chunks[-1].finish_reason is None
    chunks += [choice for chunk in stream for choice in chunk.choices]
    (call,) = joined_calls(chunks)
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 2}')
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_clients_own_accumulation(calling_server: Any) -> None:
    with calling_server.openai.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=TOOLS, temperature=0
    ) as events:
        kinds = [event.type for event in events]
        message = events.get_final_completion().choices[0].message
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert kinds.count("tool_calls.function.arguments.done") == 1
    (call,) = message.tool_calls
    assert (message.content, call.function.name, call.function.arguments) == ("Let me see.", "add", '{"a": 2}')


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_limit_cuts(calling_server: Any, stream: bool) -> None:
    """It keeps the arguments that it has; and a conversation with such a call goes on."""
    tokens = calling_server.served.tokenizer.encode(CALLING[: CALLING.index(": 2}")])
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
    answer = calling_server.openai.chat.completions.create(**arguments, max_tokens=len(tokens), stream=stream)
    if stream:
        chunks = [choice for chunk in answer for choice in chunk.choices]
        (call,), reason = joined_calls(chunks), chunks[-1].finish_reason
    else:
        (call,), reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    assert (call.function.name, call.function.arguments, reason) == ("add", '{"a"', "length")
    said = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": call.function}]}
    arguments["messages"] = [*MESSAGES, said, {"role": "tool", "tool_call_id": call.id, "content": "no JSON"}]
    assert calling_server.openai.chat.completions.create(**arguments, max_tokens=1).choices


BAD_SCHEMA = {"properties": {"a": {"type": "no such type"}}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": "x" * 1000}, "stop"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "always", "tools": TOOLS}, "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "sub"}}, "tools": TOOLS},
        "tool_choice.function.name",
    ),
    (
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": BAD_SCHEMA}}],
        },
        "tools",
    ),
    ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools.0.function.name"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"Frob-nicate": 1}, "Frob-nicate"),
    ({"model": "/etc"}, "model"),
]


@pytest.mark.parametrize(("change", "param"), BAD)
def test_errors_name_the_field(server: Any, change: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1, **change}
    if "max_completion_tokens" in change:
        del body["max_tokens"]
    response = server.post("/v1/chat/completions", **body)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param, error
    assert param.split(".")[0] in error["message"] or param in ("model",)
    assert error["type"]


def test_the_client_raises_its_own_errors(server: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        server.openai.chat.completions.create(model="tiny", messages=MESSAGES, temperature=1e3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        server.openai.chat.completions.create(model="gpt-4o", messages=MESSAGES)
