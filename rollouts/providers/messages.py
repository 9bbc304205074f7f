"""What is said in a chat, the same for every provider; frozen, and JSON there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from rollouts.types import WeightSpan


class ChatStop(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORTED = "aborted"
    REFUSED = "refused"  # the provider's content filter


@dataclass(frozen=True)
class ToolCall:
    """A call that a model makes.

    Args:
        args: the arguments; empty where ``error`` says why they could not be read.
        raw: the arguments as the model wrote them.
    """

    id: str
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    raw: str = ""
    error: str | None = None

    @classmethod
    def parse(cls, id: str, name: str, raw: str) -> ToolCall:
        """A call from arguments as text: bad JSON makes a call with an error, not an exception."""
        try:
            args = json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError) as error:
            return cls(id, name, {}, raw, f"the arguments are not valid JSON: {error}")
        if not isinstance(args, dict):
            return cls(id, name, {}, raw, f"the arguments are a JSON {type(args).__name__}, not an object")
        return cls(id, name, args, raw)

    @property
    def arguments(self) -> str:
        """The arguments as JSON text that every server can parse again."""
        return json.dumps(dict(self.args), ensure_ascii=False)


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        content: text, or content parts as the provider has them.
        reasoning_content: what a model thought before it spoke.
        thinking_signature: Anthropic's seal on it, which must come back with it.
        tool_calls: of an assistant.
        tool_call_id: which call a ``tool`` message answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    thinking_signature: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tool_calls", tuple(self.tool_calls))

    def __repr__(self) -> str:
        text = self.text
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        calls = f", calls {', '.join(call.name for call in self.tool_calls)}" if self.tool_calls else ""
        return f"Message({self.role}: {shown!r}{calls})"

    @property
    def text(self) -> str:
        """The content's text parts as one string."""
        if isinstance(self.content, list):
            return "".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of what is set."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Message:
        calls = tuple(ToolCall(**call) for call in values.get("tool_calls", ()))
        return cls(**{**values, "tool_calls": calls})


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; ``parameters`` is a JSON schema of type object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and its answer; reasoning is part of the answer, cached ones are part of the prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class ChatCompletion:
    """A model's answer.

    Args:
        prompt_token_ids, token_ids, log_probs, weight_versions: what was sampled, from servers that tell when asked
            (``with_tokens``); log-probs as ``Completion.log_probs``, NaN where the server cannot tell them.
    """

    message: Message
    stop_reason: ChatStop
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    id: str = ""
    prompt_token_ids: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None
    log_probs: Sequence[float] | None = None
    weight_versions: Sequence[WeightSpan] = ()


@dataclass(frozen=True)
class StreamChunk:
    """A piece of an answer: text of ``content`` or ``reasoning``, a whole ``tool_call``, a call whose arguments could
    not be read (``tool_error``), and last ``done`` with the ChatCompletion."""

    kind: Literal["content", "reasoning", "tool_call", "tool_error", "done"]
    data: str | ToolCall | ChatCompletion
