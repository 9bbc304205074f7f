"""Chatting with tools: messages in, the assistant's next one out, whole or in pieces, whoever answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from rollouts.providers import anthropic_chat, embedded_chat, openai_chat
from rollouts.providers.endpoint import Endpoint
from rollouts.providers.messages import ChatCompletion, Message, StreamChunk, Tool

_CHAT = {
    "embedded": (embedded_chat.chat, embedded_chat.stream),
    "anthropic": (anthropic_chat.chat, anthropic_chat.stream),
    **dict.fromkeys(("openai", "vllm", "sglang"), (openai_chat.chat, openai_chat.stream)),
}


async def chat(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool] = (), *, with_tokens: bool = False
) -> ChatCompletion:
    """The assistant's next message, with its reasoning, tool calls, usage and stop reason.

    Args:
        tools: functions that the model may call.
        with_tokens: also give the sampled ids and log-probs, from servers that can.

    Raises:
        UserError: the endpoint cannot do what is asked, or refuses it (then a BadRequestError).
        ProviderError: the server failed, and so did every retry.
    """
    return await _CHAT[endpoint.provider][0](endpoint, messages, tools, with_tokens)


async def stream_chat(
    endpoint: Endpoint, messages: Sequence[Message], tools: Sequence[Tool] = (), *, with_tokens: bool = False
) -> AsyncIterator[StreamChunk]:
    """The same as it grows; the last chunk, ``done``, holds it whole. Tool calls come whole.

    Close the iterator to stop the answer. Raises as ``chat`` does; an answer that breaks off is asked for again only
    if nothing of it was handed on.
    """
    async with aclosing(_CHAT[endpoint.provider][1](endpoint, messages, tools, with_tokens)) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            yield chunk
