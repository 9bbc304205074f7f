"""OpenAI's ``/v1/chat/completions``, which vLLM, SGLang and `rollouts serve` speak too."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rollouts.inference.sampling_params import SamplingParams
from rollouts.providers.endpoint import Endpoint
from rollouts.providers.errors import ProviderError
from rollouts.providers.http import request_json, stream_events
from rollouts.providers.log_probs import normalize
from rollouts.providers.messages import ChatCompletion, ChatStop, Message, StreamChunk, Tool, ToolCall, Usage
from rollouts.providers.token_dialects import spans
from rollouts.providers.tokens import log_prob_mode
from rollouts.types import WeightSpan

PATH = "/v1/chat/completions"
STOPS = {
    "stop": ChatStop.STOP,
    "length": ChatStop.LENGTH,
    "tool_calls": ChatStop.TOOL_CALLS,
    "function_call": ChatStop.TOOL_CALLS,
    "content_filter": ChatStop.REFUSED,
    "abort": ChatStop.ABORTED,
}


async def chat(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool], with_tokens: bool
) -> ChatCompletion:
    answer = await request_json(endpoint, "POST", PATH, body(endpoint, messages, tools, with_tokens))
    try:
        choice = answer["choices"][0]
        gathered = Gathered()
        gathered.add_choice({**choice, "delta": choice["message"]})
        gathered.add_head(answer)
    except (KeyError, TypeError, IndexError) as error:
        raise ProviderError(f"{endpoint.provider} at {endpoint.url}: the answer is no chat completion") from error
    return await gathered.completion(endpoint, with_tokens)


async def stream(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool], with_tokens: bool
) -> AsyncIterator[StreamChunk]:
    request = {**body(endpoint, messages, tools, with_tokens), "stream": True}
    request.setdefault("stream_options", {"include_usage": True})
    gathered = Gathered()
    async with aclosing(stream_events(endpoint, PATH, request)) as events:  # type: ignore[type-var]
        async for event in events:
            try:
                gathered.add_head(event)
                for choice in event.get("choices", ()):
                    for chunk in gathered.add_choice(choice):
                        yield chunk
            except (KeyError, TypeError, AttributeError) as error:
                raise ProviderError(f"{endpoint.provider} at {endpoint.url}: an event is no chat chunk") from error
    if gathered.stop_reason is None:
        raise ProviderError(f"{endpoint.provider} at {endpoint.url}: the stream ended before the answer did")
    for call in gathered.calls():
        yield StreamChunk("tool_error" if call.error else "tool_call", call)
    yield StreamChunk("done", await gathered.completion(endpoint, with_tokens))


def body(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool], with_tokens: bool = False
) -> dict[str, Any]:
    """The request; only what is set goes in, as servers refuse what they do not know."""
    request: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [message_body(message) for message in messages],
        "temperature": endpoint.temperature,
    }
    if endpoint.max_completion_tokens is not None:
        request["max_completion_tokens"] = endpoint.max_completion_tokens
    elif endpoint.sets_max_tokens:
        request["max_tokens"] = endpoint.max_tokens
    if tools:
        request["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
            }
            for t in tools
        ]
        if endpoint.tool_choice in (None, "auto", "none", "required"):
            choice: Any = endpoint.tool_choice
        else:
            choice = {"type": "function", "function": {"name": endpoint.tool_choice}}
        request |= {"tool_choice": choice, "parallel_tool_calls": endpoint.parallel_tool_calls}
    request["reasoning_effort"] = endpoint.reasoning_effort
    if with_tokens:
        request |= {"logprobs": True, "return_token_ids": True}
    request |= endpoint.extra_params or {}
    return {name: value for name, value in request.items() if value is not None}


def message_body(message: Message) -> dict[str, Any]:
    """A message in OpenAI's words."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        said["reasoning_content"] = message.reasoning_content
    return said


@dataclass
class Gathered:
    """An answer as far as it has arrived, in one piece or many."""

    content: str = ""
    reasoning: str = ""
    call_parts: dict[int, dict[str, str]] = field(default_factory=dict)
    stop_reason: ChatStop | None = None
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    id: str = ""
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    given_log_probs: list[float] = field(default_factory=list)
    weight_versions: list[WeightSpan] = field(default_factory=list)

    def add_head(self, event: Mapping[str, Any]) -> None:
        self.id, self.model = event.get("id") or self.id, event.get("model") or self.model
        if event.get("usage"):
            self.usage = usage(event["usage"])
        self.prompt_token_ids = event.get("prompt_token_ids") or self.prompt_token_ids
        versions = (event.get("metadata") or {}).get("weight_versions") or event.get("weight_versions")
        self.weight_versions = spans(versions) or self.weight_versions

    def add_choice(self, choice: Mapping[str, Any]) -> list[StreamChunk]:
        """Take what a choice adds; gives its text as chunks. Tool calls are whole at the end only."""
        delta = choice.get("delta") or {}
        chunks = []
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            self.reasoning += thought
            chunks.append(StreamChunk("reasoning", thought))
        if text := delta.get("content"):
            self.content += text
            chunks.append(StreamChunk("content", text))
        for position, part in enumerate(delta.get("tool_calls") or ()):
            index = part.get("index")
            call = self.call_parts.setdefault(position if index is None else index, {"id": "", "name": "", "raw": ""})
            function = part.get("function") or {}
            call["id"] = part.get("id") or call["id"]
            call["name"] += function.get("name") or ""
            call["raw"] += function.get("arguments") or ""
        if reason := choice.get("finish_reason"):
            self.stop_reason = STOPS.get(reason, ChatStop.STOP)
        self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
        self.token_ids += choice.get("token_ids") or choice.get("response_token_ids") or ()
        self.given_log_probs += [entry["logprob"] for entry in (choice.get("logprobs") or {}).get("content") or ()]
        self.weight_versions = spans(choice.get("weight_versions")) or self.weight_versions
        return chunks

    def calls(self) -> list[ToolCall]:
        return [
            ToolCall.parse(part["id"] or f"call_{index}", part["name"], part["raw"])
            for index, part in sorted(self.call_parts.items())
        ]

    async def completion(self, endpoint: Endpoint, with_tokens: bool) -> ChatCompletion:
        calls = tuple(self.calls())
        stop = self.stop_reason or ChatStop.STOP
        log_probs: list[float] | None = None
        if with_tokens and len(self.given_log_probs) == len(self.token_ids):
            params = SamplingParams(temperature=endpoint.temperature)
            tempered = endpoint.temperature not in (0, 1)
            log_probs, _ = normalize(self.given_log_probs, params, await log_prob_mode(endpoint) if tempered else None)
            if endpoint.extra_params and {"top_p", "top_k", "min_p"} & set(endpoint.extra_params):
                log_probs = [math.nan] * len(log_probs)  # whether dropped tokens count is the server's own affair
        return ChatCompletion(
            message=Message("assistant", self.content or None, self.reasoning or None, tool_calls=calls),
            stop_reason=ChatStop.TOOL_CALLS if calls and stop is ChatStop.STOP else stop,
            usage=self.usage,
            model=self.model,
            id=self.id,
            prompt_token_ids=self.prompt_token_ids if with_tokens else None,
            token_ids=self.token_ids if with_tokens and self.token_ids else None,
            log_probs=log_probs or None,
            weight_versions=self.weight_versions,
        )


def usage(given: Mapping[str, Any]) -> Usage:
    prompt, completion = given.get("prompt_tokens_details") or {}, given.get("completion_tokens_details") or {}
    return Usage(
        given.get("prompt_tokens") or 0,
        given.get("completion_tokens") or 0,
        prompt.get("cached_tokens") or 0,
        completion.get("reasoning_tokens") or given.get("reasoning_tokens") or 0,
    )
