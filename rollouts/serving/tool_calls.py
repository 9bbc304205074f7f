"""Tool calls in a model's text, as Hermes and Qwen write them: JSON between ``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from rollouts.serving.errors import RequestError
from rollouts.serving.strict_json import parse_json
from rollouts.serving.text import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is a JSON object as text, as OpenAI has it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_openai(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallSplitter:
    """Splits growing text into content and tool calls; text that only looks like a call stays content.

    White space around calls belongs to their format and is dropped.
    """

    def __init__(self) -> None:
        self._text = ""  # not yet told apart
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content and the calls that are certain now."""
        self._text += text
        content, calls = "", []
        while (start := self._text.find(OPEN)) >= 0:
            end = self._text.find(CLOSE, start)
            if end < 0:
                break
            call = parse_tool_call(self._text[start + len(OPEN) : end])
            end += len(CLOSE)
            if call is None:
                content += self._take(end)
            else:
                content += self._take(start).rstrip()
                self._text = self._text[end - start :].lstrip()
                calls.append(call)
                self.num_calls += 1
        hold = overlap(self._text, OPEN)
        certain = self._text[: len(self._text) - hold].rstrip()
        return content + self._take(len(certain)), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What is left: a call whose closing tag is missing counts if it is whole otherwise."""
        before, opened, inside = self._text.partition(OPEN)
        call = parse_tool_call(inside) if opened else None
        if call is None:
            content = self._text if self._text.strip() or not self.num_calls else ""
            return content, []
        self.num_calls += 1
        return before.rstrip(), [call]

    def _take(self, count: int) -> str:
        text, self._text = self._text[:count], self._text[count:]
        return text


def parse_tool_call(text: str) -> ToolCall | None:
    """The call that JSON text makes; None if it is none."""
    try:
        call = parse_json(text.encode())
    except RequestError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))
