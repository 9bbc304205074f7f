"""Tool calls in a model's text, as Hermes and Qwen write them: JSON between ``<tool_call>`` and ``</tool_call>``.

A call is certain once its name has come and its arguments begin. From there on the arguments are what the model writes,
piece by piece, to the end of the object or to the closing tag, whatever comes first; they may be cut short.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rollouts.serving.errors import RequestError
from rollouts.serving.strict_json import parse_json
from rollouts.serving.text import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is a JSON object as text, as OpenAI has it."""

    name: str
    arguments: str
    id: str

    def to_openai(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class CallPart:
    """What a piece of text adds to the call at ``index``: first its name and id, then its arguments, part by part."""

    index: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None

    def to_openai(self) -> dict[str, Any]:
        """An entry of a delta's ``tool_calls``."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


def whole_calls(parts: Iterable[CallPart]) -> list[ToolCall]:
    """The calls that parts make, in order."""
    heads: list[CallPart] = []
    arguments: list[str] = []
    for part in parts:
        if part.name is not None:
            heads.append(part)
            arguments.append("")
        arguments[-1] += part.arguments
    return [ToolCall(str(head.name), text, str(head.id)) for head, text in zip(heads, arguments, strict=True)]


class _Place(Enum):
    CONTENT = "content"  # or a call that is not certain yet
    ARGUMENTS = "arguments"
    AFTER = "after"  # between the end of the arguments and the closing tag


class ToolCallSplitter:
    """Splits growing text into content and tool calls; text that only looks like a call stays content.

    White space around calls belongs to their format and is dropped.
    """

    def __init__(self) -> None:
        self._text = ""  # not yet told apart
        self._place = _Place.CONTENT
        self._strip = False  # white space goes that comes now
        self._object = _ObjectEnd()
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """The content and the parts of calls that are certain now."""
        self._text += text
        content, parts = "", list[CallPart]()
        while True:
            before = self._place, len(self._text)
            if self._place is _Place.CONTENT:
                content += self._content(parts)
            elif self._place is _Place.ARGUMENTS:
                self._arguments(parts)
            else:
                self._after()
            if (self._place, len(self._text)) == before:
                return content, parts

    def finish(self) -> tuple[str, list[CallPart]]:
        """What is left: a call whose closing tag is missing counts."""
        text, self._text = self._text, ""
        if self._place is _Place.ARGUMENTS:
            rest = text.rstrip()
            return "", [CallPart(self.num_calls - 1, rest)] if rest else []
        if self._place is _Place.AFTER:
            return "", []
        content, opened, inside = text.partition(OPEN)
        if opened and (call := parse_tool_call(inside)) is not None:
            return content.rstrip(), [self._begin(call[0]), CallPart(self.num_calls - 1, call[1])]
        return (text if text.strip() or not self.num_calls else ""), []

    def _content(self, parts: list[CallPart]) -> str:
        if self._strip:
            self._text = self._text.lstrip()
            self._strip = not self._text
        start = self._text.find(OPEN)
        if start < 0:
            return self._take_certain(len(self._text) - overlap(self._text, OPEN))
        inside = start + len(OPEN)
        end = self._text.find(CLOSE, inside)
        head = HEAD.match(self._text, inside, end if end >= 0 else len(self._text))
        name = _string(head[1]) if head else None
        if head and name is not None:
            content = self._text[:start].rstrip()
            self._text, self._place, self._object = self._text[head.end() :], _Place.ARGUMENTS, _ObjectEnd()
            parts.append(self._begin(name))
            return content
        if end < 0:
            return self._take_certain(start)
        call = parse_tool_call(self._text[inside:end])
        if call is None:
            return self._take(end + len(CLOSE))
        content = self._text[:start].rstrip()
        parts += [self._begin(call[0]), CallPart(self.num_calls - 1, call[1])]
        self._close(end)
        return content

    def _arguments(self, parts: list[CallPart]) -> None:
        end = self._text.find(CLOSE)
        known = self._text[: end if end >= 0 else len(self._text) - overlap(self._text, CLOSE)]
        size = self._object.find(known)
        fragment = known.rstrip() if size is None else known[:size]  # white space may be all that is left
        if size is not None:
            self._text, self._place = self._text[size:], _Place.AFTER
        elif end >= 0:
            self._close(end)
        else:
            self._text = self._text[len(fragment) :]
            self._object.read(fragment)
        if fragment:
            parts.append(CallPart(self.num_calls - 1, fragment))

    def _after(self) -> None:
        end = self._text.find(CLOSE)
        if end >= 0:
            self._close(end)
        else:
            self._text = self._text[len(self._text) - overlap(self._text, CLOSE) :]

    def _close(self, end: int) -> None:
        """The closing tag stands at ``end``."""
        self._text, self._place, self._strip = self._text[end + len(CLOSE) :], _Place.CONTENT, True

    def _begin(self, name: str) -> CallPart:
        self.num_calls += 1
        return CallPart(self.num_calls - 1, name=name, id=f"call_{uuid.uuid4().hex[:24]}")

    def _take_certain(self, count: int) -> str:
        """White space before a call goes with it."""
        return self._take(len(self._text[:count].rstrip()))

    def _take(self, count: int) -> str:
        text, self._text = self._text[:count], self._text[count:]
        return text


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """The length of ``text`` up to the object's end, if that is in it; notes nothing."""
        return self._scan(text)[0]

    def read(self, text: str) -> None:
        """Note that ``text`` has been passed."""
        _, self._depth, self._in_string, self._escaped = self._scan(text)

    def _scan(self, text: str) -> tuple[int | None, int, bool, bool]:
        depth, in_string, escaped = self._depth, self._in_string, self._escaped
        for i, char in enumerate(text):
            if escaped:
                escaped = False
            elif in_string:
                escaped, in_string = char == "\\", char != '"'
            elif char == '"':
                in_string = True
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
                if depth == 0:
                    return i + 1, depth, False, False
        return None, depth, in_string, escaped


def _string(text: str) -> str | None:
    """What a JSON string says; None if it is none."""
    try:
        return str(parse_json(text.encode()))
    except RequestError:
        return None


def parse_tool_call(text: str) -> tuple[str, str] | None:
    """The name and the arguments, a JSON object as text, of a whole call in any order; None if it is none."""
    try:
        call = parse_json(text.encode())
    except RequestError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)
