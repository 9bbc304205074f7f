"""Conversations as files: what `rollouts chat` saves, and what the chat page exports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollouts.errors import UserError
from rollouts.providers import Message, Tool, ToolCall
from rollouts.providers.openai_chat import message_body

FORMAT = "rollouts-chat"
ROLES = ("system", "user", "assistant", "tool")


def save_conversation(path: Path, model: str, messages: Sequence[Message], settings: Mapping[str, Any]) -> None:
    """Write messages as OpenAI has them, under the model's name. Raises UserError when the file cannot be written."""
    told = {
        "format": FORMAT,
        "version": 1,
        "settings": dict(settings),
        "messages": {model: [message_body(message) for message in messages]},
    }
    try:
        path.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def load_conversation(path: Path, model: str) -> tuple[list[Message], dict[str, Any]]:
    """The messages with ``model``, or else with the file's first one, and the settings.

    Raises:
        UserError: no such file, or not a saved conversation.
    """
    told = _read_json(path)
    if not isinstance(told, dict) or told.get("format") != FORMAT or not isinstance(told.get("messages"), dict):
        raise UserError(f"{path} is no conversation; load what /save wrote or the chat page exported")
    by_model = told["messages"]
    found = by_model.get(model, next(iter(by_model.values()), []))
    try:
        messages = [_message(message) for message in found]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a message is not as OpenAI's API has it ({error})") from error
    settings = told.get("settings")
    return messages, settings if isinstance(settings, dict) else {}


def load_tools(path: Path) -> list[Tool]:
    """Tools from a JSON list of OpenAI's function tools. Raises UserError."""
    listed = _read_json(path)
    try:
        if not isinstance(listed, list):
            raise TypeError("not a list")
        functions = [one["function"] for one in listed]
        return [Tool(str(f["name"]), str(f.get("description", "")), dict(f.get("parameters", {}))) for f in functions]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{path} is no list of tools like {{"type": "function", "function": {{...}}}}') from error


def _message(body: Mapping[str, Any]) -> Message:
    calls = [
        ToolCall.parse(str(call.get("id", "")), str(call["function"]["name"]), str(call["function"]["arguments"]))
        for call in body.get("tool_calls") or ()
    ]
    if body["role"] not in ROLES:
        raise ValueError(f"role {body['role']!r}")
    content = body.get("content")
    if content is not None and not isinstance(content, str):
        raise ValueError("content that is not text")
    return Message(
        body["role"],
        content,
        reasoning_content=body.get("reasoning_content"),
        tool_calls=tuple(calls),
        tool_call_id=body.get("tool_call_id"),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # of decoding or of JSON
        raise UserError(f"{path} is not JSON: {error}") from error
