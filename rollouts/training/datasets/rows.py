"""Row formats of the field, turned into one: a conversation of messages, or a plain text."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

from rollouts.training.datasets.sources import has_lone_surrogate, parse_json

Message = dict[str, Any]
Conversation = dict[str, Any]  # {"messages": [Message, ...], "tools": [tool, ...] | None} or {"text": str}

FORMATS = "messages, conversations, prompt/completion, instruction/output, question/answer, problem/solution or text"
MAX_DEPTH = 64
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot"),
    "tool": ("tool", "function", "observation"),
    "function_call": ("function_call", "tool_call"),  # ShareGPT's name for an assistant turn that is a tool call
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_PAIRS = {
    "prompt": ("completion", "response"),
    "instruction": ("output", "response"),
    "question": ("answer",),
    "problem": ("solution", "answer"),
}


class BadRow(Exception):
    """A row that cannot be used; the message is the reason, on one line."""


def canonical_row(data: Any, text_field: str | None = None) -> Conversation:
    """The conversation (or text) to learn from, whichever of the known formats the row is in.

    Returns:
        ``{"messages": [...], "tools": [...] or None}``: roles are system, user, assistant and tool; content is a
        string; tool calls and tools are in OpenAI's form with ``arguments`` parsed into objects. Or ``{"text": ...}``.

    Raises:
        BadRow: the row is in no known format, holds nothing to learn, or holds a value that no model can read
            (a wrong type, NaN, a lone surrogate, nesting deeper than 64).
    """
    fields = _fields(data)
    if text_field is not None or not _is_conversation(fields):
        return {"text": _text(fields, text_field or "text")}
    messages = _messages(fields, need_answer=True)
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("has no assistant message: nothing to learn")
    return {"messages": messages, "tools": _tools(fields.get("tools"))}


def prompt_and_answer(data: Any) -> tuple[list[Message], str | None, dict[str, Any]]:
    """Split a row for RL: the messages to answer, the reference answer if there is one, and the row's other fields.

    The answer is verl's ``reward_model.ground_truth``, else the field ``answer``, ``ground_truth`` or ``solution``,
    else the text of a final assistant message. An answer that is no text is written as JSON.

    Raises:
        BadRow: as ``canonical_row``, or the row has no user message.
    """
    fields = _fields(data)
    if not _is_conversation(fields):
        raise BadRow(f"no prompt: expected {FORMATS}; found {_listed(fields)}")
    messages = _messages(fields, need_answer=False)
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    grading = fields.get("reward_model")
    named = fields | ({"verl's": grading.get("ground_truth")} if isinstance(grading, Mapping) else {})
    for name in ("solution", "ground_truth", "answer", "verl's"):
        if named.get(name) is not None:
            answer = _answer_text(plain_json(named[name]))
    if answer is not None:
        _check_string(answer, "answer")
    if not any(m["role"] == "user" for m in messages):
        raise BadRow("has no user message: nothing to answer")
    used = {"messages", "conversations", "prompt", "completion", "instruction", "input", "output", "question", "answer",
            "problem"}  # fmt: skip
    rest = {k: plain_json(v) for k, v in fields.items() if k not in used}
    check_json(rest, "row")
    return messages, answer, rest


def _answer_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    check_json(value, "answer")
    return json.dumps(value, ensure_ascii=False)


def plain_json(value: Any, depth: int = 0) -> Any:
    """What tables hold beside JSON, as JSON: dates in ISO form, exact decimals as text."""
    if depth > MAX_DEPTH:
        return value  # which check_json refuses
    if isinstance(value, Mapping):
        return {k: plain_json(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(v, depth + 1) for v in value]
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


def _fields(data: Any) -> dict[str, Any]:
    """The row's fields that hold something: a table's empty cell (None) is no field."""
    if not isinstance(data, Mapping):
        raise BadRow(f"a row must be an object with named fields, got {_type(data)}")
    return {k: v for k, v in data.items() if v is not None}


def _is_conversation(fields: Mapping[str, Any]) -> bool:
    if any(name in fields for name in ("messages", "conversations", *_PAIRS)):
        return True
    if "text" not in fields:
        raise BadRow(f"in no known format: expected {FORMATS}; found {_listed(fields)}")
    return False


def _messages(fields: Mapping[str, Any], need_answer: bool) -> list[Message]:
    for name in ("messages", "conversations"):
        if name in fields:
            messages = _message_list(fields[name], name)
            if "system" in fields and fields["system"] != "" and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": _text(fields, "system")})
            return messages
    question = next(name for name in _PAIRS if name in fields)
    messages = _instruction(fields) if question == "instruction" else _turns(fields, question, "user")
    answer = next((name for name in _PAIRS[question] if name in fields), None)
    if answer is None and need_answer:
        raise BadRow(f"has {question} but no {' or '.join(_PAIRS[question])}")
    return messages + (_turns(fields, answer, "assistant") if answer else [])


def _turns(fields: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """A field as messages: a string is one message of ``role``, a list is messages already."""
    if isinstance(fields[name], list):
        return _message_list(fields[name], name)
    return [{"role": role, "content": _text(fields, name)}]


def _instruction(fields: Mapping[str, Any]) -> list[Message]:
    """Alpaca's fields: instruction, then a blank line and the input where there is one; optional system and history."""
    messages: list[Message] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": _text(fields, "system")})
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(h, list | tuple) and len(h) == 2 for h in history):
        raise BadRow("history must be a list of [question, answer] pairs")
    for i, (question, answer) in enumerate(history):
        pair = {"question": question, "answer": answer}
        messages.append({"role": "user", "content": _text(pair, "question", f"history[{i}] question")})
        messages.append({"role": "assistant", "content": _text(pair, "answer", f"history[{i}] answer")})
    content = _text(fields, "instruction")
    if fields.get("input", "") != "":
        content += "\n\n" + _text(fields, "input")
    return [*messages, {"role": "user", "content": content}]


def _message_list(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        value = _parse(value, name)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list of at least one message, got {_type(value)}")
    return [_message(m, i) for i, m in enumerate(value, 1)]


def _message(value: Any, number: int) -> Message:
    """One message in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    place = f"message {number}"
    if not isinstance(value, Mapping):
        raise BadRow(f"{place} must be an object, got {_type(value)}")
    given = {k: v for k, v in value.items() if v is not None}
    if "role" not in given and "from" not in given:
        raise BadRow(f"{place} has no role; found {_listed(given)}")
    said = given.get("role", given.get("from"))
    role = _ROLE_OF.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"{place} has the unknown role {_short(said)}; roles are system, user, assistant and tool")
    place = f"{place} ({said})"
    content = _content(given.get("content", given.get("value")), place)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(_parse(content or "", place), place)}
    message: Message = {"role": role, "content": content or ""}
    for name in ("name", "tool_call_id"):
        if name in given:
            message[name] = _check_string(given[name], f"{place} {name}")
    if role == "assistant":
        _assistant_fields(message, given, place)
    elif content is None:
        raise BadRow(f"{place} has no content")
    return message


def _assistant_fields(message: Message, given: Mapping[str, Any], place: str) -> None:
    """Add reasoning and tool calls; an assistant message must say something."""
    if given.get("weight", 1) != 1:
        raise BadRow(f"{place} has weight {_short(given['weight'])}; per-message weights are not supported, remove it")
    reasoning = next((given[k] for k in ("reasoning_content", "reasoning", "thinking") if given.get(k)), None)
    if reasoning is not None:
        message["reasoning_content"] = _check_string(reasoning, f"{place} reasoning_content")
    if given.get("tool_calls"):
        message["tool_calls"] = _tool_calls(given["tool_calls"], place)
    elif not message["content"].strip():
        raise BadRow(f"{place} is empty: neither content nor tool_calls")


def _content(value: Any, place: str) -> str | None:
    """Content as a string; OpenAI's list of text parts is joined."""
    if not isinstance(value, list):
        return None if value is None else _check_string(value, f"{place} content")
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise BadRow(f"{place} has a content part of type {_short(kind)}; only text can be learned")
        parts.append(_check_string(part.get("text"), f"{place} text part"))
    return "".join(parts)


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form with ``arguments`` as an object, which is what chat templates render."""
    if isinstance(value, str):
        value = _parse(value, f"{place} tool_calls")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise BadRow(f"{place} has an empty list of tool calls")
    out = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"{place} has a tool call without a function name: {_short(call)}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _parse(arguments or "{}", f"{place} arguments of {function['name']}")
        if not isinstance(arguments, Mapping):
            raise BadRow(f"{place} arguments of {_short(function['name'])} must be an object, got {_type(arguments)}")
        check_json(arguments, f"{place} arguments")
        _check_string(function["name"], f"{place} function name")
        kept = {"id": _check_string(call["id"], f"{place} tool call id")} if call.get("id") is not None else {}
        out.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}})
    return out


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form ``{"type": "function", "function": {...}}``; a bare function is wrapped."""
    if isinstance(value, str):
        value = _parse(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise BadRow(f"tools must be a list, got {_type(value)}")
    out = []
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"tools holds an entry without a function name: {_short(tool)}")
        check_json(tool, "tools")
        out.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return out


def check_json(value: Any, place: str, depth: int = 0) -> None:
    """Refuse what JSON cannot carry to a model: NaN, infinities, lone surrogates, odd types, nesting beyond 64."""
    if depth > MAX_DEPTH:
        raise BadRow(f"{place} is nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        _check_string(value, place)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_string(key, f"{place} key")
            check_json(item, place, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_json(item, place, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"{place} holds the number {value}, which is not JSON")
    elif not (value is None or isinstance(value, bool | int)):
        raise BadRow(f"{place} holds {_type(value)}, which is not JSON")


def _text(fields: Mapping[str, Any], name: str, place: str | None = None) -> str:
    """A field that must hold a text with something in it."""
    if name not in fields:
        raise BadRow(f"has no field {name!r}; found {_listed(fields)}")
    text = _check_string(fields[name], place or name)
    if not text.strip():
        raise BadRow(f"{place or name} is empty")
    return text


def _check_string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{place} must be a string, got {_type(value)}")
    if has_lone_surrogate(value):
        raise BadRow(f"{place} is not valid Unicode: it holds a lone surrogate or bytes that are not UTF-8")
    return value


def _parse(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as e:
        raise BadRow(f"{place} is {e}") from None


def _type(value: Any) -> str:
    """A value's type in the words of the file formats."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _listed(fields: Mapping[str, Any]) -> str:
    names = [str(k) for k in fields]
    return _short(", ".join(names), quote=False) if names else "nothing"


def _short(value: Any, quote: bool = True) -> str:
    """A value for a message: one line, ASCII escapes for what cannot be printed, at most 60 characters."""
    if isinstance(value, Mapping | list):
        return _type(value)
    text = ascii(value) if quote else ascii(value)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."
