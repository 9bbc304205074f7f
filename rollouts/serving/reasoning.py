"""What a model thinks before it speaks: text between ``<think>`` and ``</think>`` at the beginning of its answer."""

from __future__ import annotations

from rollouts.serving.text import overlap

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Splits growing text into reasoning and content.

    One newline at either end of the reasoning, and those before the content, belong to the format and are dropped.

    Args:
        opened: the prompt has opened the block, as templates of models that always think do.
    """

    def __init__(self, opened: bool = False) -> None:
        self._text = ""  # not yet told apart
        self._inside = opened
        self._undecided = not opened  # no more than white space has come, or part of the tag
        self._strip = opened  # newlines go that come now

    def push(self, text: str) -> tuple[str, str]:
        """The reasoning and the content that are certain now."""
        self._text += text
        if self._undecided:
            start = self._text.lstrip()
            if len(start) < len(OPEN) and OPEN.startswith(start):
                return "", ""
            self._undecided = False
            if start.startswith(OPEN):
                self._text, self._inside, self._strip = start[len(OPEN) :], True, True
        reasoning = self._reasoning() if self._inside else ""
        return reasoning, "" if self._inside else self._content()

    def finish(self) -> tuple[str, str]:
        """What is left. Reasoning that was cut short stays reasoning."""
        rest, self._text = self._text, ""
        return (rest.removesuffix("\n"), "") if self._inside else ("", rest)

    def _reasoning(self) -> str:
        if self._strip and self._text:
            self._text, self._strip = self._text.removeprefix("\n"), False
        before, closed, after = self._text.partition(CLOSE)
        if closed:
            self._text, self._inside, self._strip = after, False, True
            return before.removesuffix("\n")
        hold = max(overlap(self._text, CLOSE), overlap(self._text, "\n" + CLOSE))
        before, self._text = self._text[: len(self._text) - hold], self._text[len(self._text) - hold :]
        return before

    def _content(self) -> str:
        content, self._text = self._text, ""
        if self._strip:
            content = content.lstrip("\n")
            self._strip = not content
        return content
