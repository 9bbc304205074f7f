"""Anthropic's ``/v1/messages``, which vLLM speaks too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from rollouts.errors import UserError
from rollouts.providers.endpoint import Endpoint
from rollouts.providers.errors import ProviderError
from rollouts.providers.http import request_json, stream_events
from rollouts.providers.messages import ChatCompletion, ChatStop, Message, StreamChunk, Tool, ToolCall, Usage

PATH = "/v1/messages"
VERSION = "2023-06-01"
STOPS = {
    "end_turn": ChatStop.STOP,
    "stop_sequence": ChatStop.STOP,
    "pause_turn": ChatStop.STOP,
    "max_tokens": ChatStop.LENGTH,
    "tool_use": ChatStop.TOOL_CALLS,
    "refusal": ChatStop.REFUSED,
}
CACHED = {"cache_control": {"type": "ephemeral"}}  # everything up to such a mark is cached


async def chat(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool], with_tokens: bool
) -> ChatCompletion:
    _check(with_tokens)
    answer = await request_json(endpoint, "POST", PATH, body(endpoint, messages, tools), headers=_headers(endpoint))
    try:
        gathered = _Gathered()
        gathered.start(answer)
        for block in answer["content"]:
            gathered.blocks.append(dict(block))
        gathered.stop_reason = answer.get("stop_reason")
        return gathered.completion()
    except (KeyError, TypeError, AttributeError) as error:
        raise ProviderError(f"{endpoint.provider} at {endpoint.url}: the answer is no message") from error


async def stream(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool], with_tokens: bool
) -> AsyncIterator[StreamChunk]:
    _check(with_tokens)
    request = {**body(endpoint, messages, tools), "stream": True}
    gathered = _Gathered()
    ended = False
    async with aclosing(stream_events(endpoint, PATH, request, headers=_headers(endpoint))) as events:  # type: ignore[type-var]
        async for event in events:
            try:
                for chunk in gathered.add(event):
                    yield chunk
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise ProviderError(f"{endpoint.provider} at {endpoint.url}: an event makes no sense") from error
            ended = ended or event.get("type") == "message_stop"
    if not ended:
        raise ProviderError(f"{endpoint.provider} at {endpoint.url}: the stream ended before the answer did")
    yield StreamChunk("done", gathered.completion())


def body(endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool]) -> dict[str, Any]:
    """The request: system texts apart, tool results as the user's, consecutive messages of one role joined."""
    system = [message.text for message in messages if message.role == "system"]
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "system":
            continue
        role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += _blocks(message)
        else:
            turns.append({"role": role, "content": _blocks(message)})
    if turns and turns[-1]["content"]:
        turns[-1]["content"][-1] |= CACHED
    request: dict[str, Any] = {
        "model": endpoint.model,
        "messages": turns,
        "max_tokens": endpoint.max_completion_tokens or endpoint.max_tokens,
        "temperature": endpoint.temperature,
    }
    if system:
        request["system"] = [{"type": "text", "text": "\n\n".join(system), **CACHED}]
    if tools:
        request["tools"] = [
            {"name": t.name, "description": t.description, "input_schema": dict(t.parameters)} for t in tools
        ]
        choice = _tool_choice(endpoint)
        if choice:
            request["tool_choice"] = choice
    if endpoint.thinking:
        request["thinking"] = dict(endpoint.thinking)
    return {**request, **(endpoint.extra_params or {})}


def _check(with_tokens: bool) -> None:
    if with_tokens:
        raise UserError("provider anthropic gives no token ids; use sglang, vllm, openai or embedded")


def _headers(endpoint: Endpoint) -> dict[str, str]:
    key = {"x-api-key": endpoint.key} if endpoint.key else {}
    return {"anthropic-version": VERSION, **key}


def _tool_choice(endpoint: Endpoint) -> dict[str, Any] | None:
    one_call = endpoint.parallel_tool_calls is False
    if endpoint.tool_choice is None and not one_call:
        return None
    named = {"required": {"type": "any"}, "auto": {"type": "auto"}, "none": {"type": "none"}, None: {"type": "auto"}}
    choice: dict[str, Any] = dict(named.get(endpoint.tool_choice, {"type": "tool", "name": endpoint.tool_choice}))
    return choice | ({"disable_parallel_tool_use": True} if one_call and choice["type"] != "none" else {})


def _blocks(message: Message) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.text}]
    blocks: list[dict[str, Any]] = []
    if message.reasoning_content and message.thinking_signature:  # unsigned thoughts would be refused
        blocks.append(
            {
                "type": "thinking",
                "thinking": message.reasoning_content,
                "signature": message.thinking_signature,
            }
        )
    if isinstance(message.content, list):
        blocks += [dict(part) for part in message.content]
    elif message.content:
        blocks.append({"type": "text", "text": message.content})
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": dict(call.args)} for call in message.tool_calls
    ]
    return blocks


class _Gathered:
    """A message as far as it has arrived."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.stop_reason: str | None = None
        self._model = self._id = ""
        self._usage: dict[str, int] = {}

    def start(self, message: Mapping[str, Any]) -> None:
        self._id, self._model = message.get("id") or "", message.get("model") or ""
        self._count(message.get("usage"))

    def _count(self, usage: Mapping[str, Any] | None) -> None:
        self._usage |= {name: value for name, value in (usage or {}).items() if isinstance(value, int)}

    def add(self, event: Mapping[str, Any]) -> list[StreamChunk]:
        """Take an event; gives what it adds."""
        kind = event["type"]
        if kind == "message_start":
            self.start(event["message"])
        elif kind == "content_block_start":
            self.blocks.append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            return self._add_delta(self.blocks[event["index"]], event["delta"])
        elif kind == "content_block_stop":
            block = self.blocks[event["index"]]
            if block["type"] == "tool_use":
                call = _call(block)
                return [StreamChunk("tool_error" if call.error else "tool_call", call)]
        elif kind == "message_delta":
            self.stop_reason = event["delta"].get("stop_reason") or self.stop_reason
            self._count(event.get("usage"))
        return []

    def _add_delta(self, block: dict[str, Any], delta: Mapping[str, Any]) -> list[StreamChunk]:
        for kind, name in (("text", "content"), ("thinking", "reasoning")):
            if delta["type"] == f"{kind}_delta":
                block[kind] = block.get(kind, "") + delta[kind]
                return [StreamChunk(name, delta[kind])] if delta[kind] else []  # type: ignore[arg-type]
        if delta["type"] == "input_json_delta":
            block["raw"] = block.get("raw", "") + delta["partial_json"]
        elif delta["type"] == "signature_delta":
            block["signature"] = block.get("signature", "") + delta["signature"]
        return []

    def completion(self) -> ChatCompletion:
        def texts(kind: str, name: str) -> str | None:
            return "".join(block.get(name) or "" for block in self.blocks if block["type"] == kind) or None

        calls = tuple(_call(block) for block in self.blocks if block["type"] == "tool_use")
        cached = self._usage.get("cache_read_input_tokens", 0)
        written = self._usage.get("cache_creation_input_tokens", 0)
        return ChatCompletion(
            message=Message(
                "assistant",
                texts("text", "text"),
                texts("thinking", "thinking"),
                texts("thinking", "signature"),
                calls,
            ),
            stop_reason=STOPS.get(self.stop_reason or "", ChatStop.STOP),
            usage=Usage(
                self._usage.get("input_tokens", 0) + cached + written, self._usage.get("output_tokens", 0), cached
            ),
            model=self._model,
            id=self._id,
        )


def _call(block: Mapping[str, Any]) -> ToolCall:
    if "raw" in block:
        return ToolCall.parse(block["id"], block["name"], block["raw"])
    return ToolCall(block["id"], block["name"], dict(block.get("input") or {}))
