"""An assistant's message told from its text: what it thinks, what it says, and which tools it calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollouts.serving.reasoning import ReasoningSplitter
from rollouts.serving.tool_calls import CallPart, ToolCallSplitter


@dataclass
class MessagePart:
    """What a piece of text has added to a message."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)


@dataclass(frozen=True)
class MessageForm:
    """What to look for in an answer.

    Args:
        reasoning: a block of reasoning at its beginning.
        opened: the prompt has opened that block.
        tools: tool calls.
    """

    reasoning: bool = True
    opened: bool = False
    tools: bool = False


class MessageReader:
    """One message as its text grows; nothing that it gives is taken back."""

    def __init__(self, form: MessageForm) -> None:
        self._reasoning = ReasoningSplitter(form.opened) if form.reasoning else None
        self._tools = ToolCallSplitter() if form.tools else None

    def push(self, text: str, last: bool = False) -> MessagePart:
        """What is certain now; of the ``last`` piece of text all that is left."""
        part = MessagePart(content=text)
        if self._reasoning is not None:
            part.reasoning, part.content = self._reasoning.push(text)
            if last:
                reasoning, content = self._reasoning.finish()
                part.reasoning, part.content = part.reasoning + reasoning, part.content + content
        if self._tools is not None:
            part.content, part.calls = self._tools.push(part.content)
            if last:
                content, calls = self._tools.finish()
                part.content, part.calls = part.content + content, part.calls + calls
        return part


def read_message(form: MessageForm, text: str) -> MessagePart:
    """A whole message."""
    return MessageReader(form).push(text, last=True)
