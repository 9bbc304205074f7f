"""OpenAI's messages and tools as chat templates expect them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rollouts.serving.errors import RequestError
from rollouts.serving.openai_schema import ChatRequest, Function, Message, MessageToolCall, NamedToolChoice
from rollouts.serving.strict_json import parse_json

RESERVED = {
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "tokenize",
    "return_dict",
    "continue_final_message",
}


def template_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Messages with text as one string and tool arguments as objects, which every family's template can render.

    Raises:
        RequestError: a message that needs content has none.
    """
    return [_message(message, f"messages.{i}") for i, message in enumerate(request.messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    content = message.content
    if content is None and not message.tool_calls:
        raise RequestError(f"{where}.content: a message without tool calls needs content", f"{where}.content")
    text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    rendered: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.tool_calls:
        rendered["tool_calls"] = [_call(call) for call in message.tool_calls]
    for field in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, field) is not None:
            rendered[field] = getattr(message, field)
    return rendered


def _call(call: MessageToolCall) -> dict[str, Any]:
    """With its arguments as an object, or as they stand if they are none: models write such, or are cut short."""
    arguments: Any = call.function.arguments
    with suppress(RequestError):
        arguments = parse_json(arguments.encode())
    if not isinstance(arguments, dict):
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def template_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the model is told of; None when there are none or ``tool_choice`` is none.

    Raises:
        RequestError: a choice without tools to choose from.
    """
    if request.tool_choice not in (None, "none") and not request.tools:
        raise RequestError("tool_choice: there are no tools to choose from; send tools", "tool_choice")
    if not request.tools or request.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in request.tools]


def forced_functions(request: ChatRequest) -> list[Function]:
    """The functions of which ``tool_choice`` wants one called; none if the model is free. Raises RequestError."""
    functions = [tool.function for tool in request.tools or []]
    if request.tool_choice == "required":
        return functions
    if not isinstance(request.tool_choice, NamedToolChoice):
        return []
    name = request.tool_choice.function.name
    named = [function for function in functions if function.name == name]
    if not named:
        field = "tool_choice.function.name"
        raise RequestError(f"{field}: no tool is called {name[:80]!r}", field)
    return named[:1]


def template_options(request: ChatRequest) -> dict[str, Any]:
    """The request's own variables for the template, such as Qwen3's ``enable_thinking``. Raises RequestError."""
    options = request.chat_template_kwargs or {}
    refused = RESERVED.intersection(options)
    if refused:
        name = f"chat_template_kwargs.{min(refused)}"
        raise RequestError(f"{name} cannot be set: templates come from the model's folder only", name)
    return options
