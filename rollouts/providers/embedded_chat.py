"""Chat with an engine of this process: the tokenizer's own template in, text and tool calls out, ids kept."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from rollouts.errors import UserError
from rollouts.inference.completion import Completion, StopReason
from rollouts.inference.sampling_params import SamplingParams
from rollouts.providers.embedded import find_engine
from rollouts.providers.endpoint import Endpoint
from rollouts.providers.messages import ChatCompletion, ChatStop, Message, StreamChunk, Tool, ToolCall, Usage
from rollouts.providers.openai_chat import message_body

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


async def chat(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool], with_tokens: bool
) -> ChatCompletion:
    tokenizer, prompt_ids, params = _prepare(endpoint, messages, tools)
    (sample,) = await find_engine(endpoint.model).engine.generate_group(prompt_ids, params)
    return _completion(endpoint, tokenizer, prompt_ids, sample, bool(tools), with_tokens)


async def stream(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool], with_tokens: bool
) -> AsyncIterator[StreamChunk]:
    from rollouts.serving.text import TextStream, TokenNames
    from rollouts.serving.tool_calls import ToolCallSplitter

    tokenizer, prompt_ids, params = _prepare(endpoint, messages, tools)
    text = TextStream(TokenNames(tokenizer), params.stop)
    splitter = ToolCallSplitter() if tools else None
    engine = find_engine(endpoint.model).engine
    async with aclosing(engine.stream(prompt_ids, params)) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            sample = chunk.completion
            piece = text.push(chunk.token_ids) if sample is None else text.finish(sample)
            if splitter is not None:
                piece, _ = splitter.push(piece)
            if piece:
                yield StreamChunk("content", piece)
            if sample is not None:
                whole = _completion(endpoint, tokenizer, prompt_ids, sample, bool(tools), with_tokens)
                for call in whole.message.tool_calls:
                    yield StreamChunk("tool_error" if call.error else "tool_call", call)
                yield StreamChunk("done", whole)


def _prepare(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[PreTrainedTokenizerBase, list[int], SamplingParams]:
    found = find_engine(endpoint.model)
    tokenizer = found.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise UserError(f"the engine {endpoint.model!r} is registered without a tokenizer that has a chat template")
    if endpoint.tool_choice not in (None, "auto", "none"):
        raise UserError(f"tool_choice {endpoint.tool_choice!r}: the embedded engine knows auto and none")
    extra: dict[str, Any] = dict(endpoint.extra_params or {})
    options = extra.pop("chat_template_kwargs", {})
    shown = [] if endpoint.tool_choice == "none" else tools
    prompt_ids = tokenizer.apply_chat_template(
        [_template_message(message) for message in messages],  # type: ignore[arg-type]
        tools=[_template_tool(tool) for tool in shown] or None,  # type: ignore[arg-type]
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **options,
    )
    room = found.engine.max_length - len(prompt_ids)
    if room < 1:
        raise UserError(
            f"the conversation has {len(prompt_ids)} tokens, but the engine holds {found.engine.max_length} with the "
            "answer; shorten it or raise max_length"
        )
    max_tokens = min(endpoint.max_completion_tokens or endpoint.max_tokens, room)
    try:
        params = SamplingParams(max_tokens=max_tokens, temperature=endpoint.temperature, **extra)
    except TypeError as error:
        raise UserError(f"endpoint.extra_params: {error}; an embedded engine takes fields of SamplingParams") from error
    return tokenizer, list(prompt_ids), params  # type: ignore[arg-type]


def _template_message(message: Message) -> dict[str, Any]:
    """As templates expect it: text as one string, arguments as objects."""
    said = {**message_body(message), "content": message.text}
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.args)}}
            for call in message.tool_calls
        ]
    return said


def _template_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _completion(
    endpoint: Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    sample: Completion,
    with_tools: bool,
    with_tokens: bool,
) -> ChatCompletion:
    from rollouts.serving.text import completion_text

    text = completion_text(tokenizer, sample)
    calls: tuple[ToolCall, ...] = ()
    if with_tools:
        text, calls = split_calls(text)
    stop = {StopReason.LENGTH: ChatStop.LENGTH, StopReason.ABORTED: ChatStop.ABORTED}.get(
        sample.stop_reason, ChatStop.TOOL_CALLS if calls else ChatStop.STOP
    )
    return ChatCompletion(
        message=Message("assistant", text or None, tool_calls=calls),
        stop_reason=stop,
        usage=Usage(sample.num_prompt_tokens, len(sample.token_ids), sample.num_cached_tokens),
        model=endpoint.model,
        prompt_token_ids=prompt_ids if with_tokens else None,
        token_ids=sample.token_ids if with_tokens else None,
        log_probs=sample.log_probs if with_tokens else None,
        weight_versions=sample.weight_versions,
    )


def split_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The content and the calls of a whole text; what stands where a call should and is none becomes an error."""
    from rollouts.serving.tool_calls import ToolCallSplitter, whole_calls

    splitter = ToolCallSplitter()
    content, found = splitter.push(text)
    rest, last = splitter.finish()
    content += rest
    calls = [ToolCall.parse(call.id, call.name, call.arguments) for call in whole_calls([*found, *last])]
    for i, broken in enumerate(BROKEN_CALL.findall(content)):
        reason = 'a tool call is {"name": ..., "arguments": {...}} in valid JSON'
        calls.append(ToolCall(f"call_broken_{i}", "", {}, broken.strip(), reason))
    return BROKEN_CALL.sub("", content).rstrip() if calls else content, tuple(calls)
