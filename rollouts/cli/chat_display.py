"""How a chat looks: finished blocks of markdown and a live last one on a terminal, plain text on a pipe."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.text import Text

    from rollouts.providers import ToolCall

# A model's text must not move the cursor or change the terminal: of control characters only newline and tab pass.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    return CONTROL.sub("", text)


class Display(Protocol):
    """What shows a reply as it grows."""

    def say(self, text: str) -> None: ...
    def think(self, text: str) -> None: ...
    def call(self, call: ToolCall) -> None: ...
    def end(self) -> None: ...
    def note(self, text: str) -> None: ...


class PlainDisplay:
    """The reply's text alone, as it comes; all else goes to stderr."""

    def __init__(self) -> None:
        self._open = False  # a line without its end

    def say(self, text: str) -> None:
        text = printable(text)
        if text:
            print(text, end="", flush=True)
            self._open = not text.endswith("\n")

    def think(self, text: str) -> None:
        pass

    def call(self, call: ToolCall) -> None:
        self.end()
        print(printable(f"{call.name}({call.raw or call.arguments})"), flush=True)

    def end(self) -> None:
        if self._open:
            print(flush=True)
        self._open = False

    def note(self, text: str) -> None:
        import sys

        print(printable(text), file=sys.stderr, flush=True)


class RichDisplay:
    """Markdown: a block is printed for good when the next begins, the last is drawn again as it grows."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console, self._text, self._kind = console, "", ""
        self._live_class = Live
        self._live: Live | None = None

    def say(self, text: str) -> None:
        self._grow("text", text)

    def think(self, text: str) -> None:
        self._grow("thought", text)

    def call(self, call: ToolCall) -> None:
        from rich.panel import Panel
        from rich.syntax import Syntax

        self.end()
        arguments = Syntax(printable(call.raw or call.arguments), "json", word_wrap=True, background_color="default")
        title = printable(call.name).replace("[", r"\[") or "a call that cannot be read"
        self._console.print(Panel(arguments, title=title, title_align="left", border_style="dim", expand=False))

    def end(self) -> None:
        """Print what is left."""
        self._stop()
        self._print(self._text)
        self._text = ""

    def note(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False, highlight=False)

    def _grow(self, kind: str, text: str) -> None:
        if kind != self._kind:
            self.end()
            self._kind = kind
        whole, self._text = split_blocks(self._text + printable(text))
        if whole:
            self._stop()
            self._print(whole)
        if self._text.strip():
            if self._live is None:
                self._live = self._live_class(console=self._console, transient=True, refresh_per_second=12)
                self._live.start()
            self._live.update(self._render(self._text))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.update("")
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(self._render(text))
            self._console.print()

    def _render(self, text: str) -> Markdown | Text:
        from rich.markdown import Markdown
        from rich.text import Text

        return Text(text.strip(), style="dim italic") if self._kind == "thought" else Markdown(text.strip())


def split_blocks(text: str) -> tuple[str, str]:
    """The blocks of markdown that are complete, and the rest: blocks end at empty lines outside of fences.

    >>> split_blocks("a b\\n\\nc")
    ('a b\\n\\n', 'c')
    >>> split_blocks("```\\na\\n\\nb")
    ('', '```\\na\\n\\nb')
    """
    end, fence, position = 0, "", 0
    for line in text.splitlines(keepends=True):
        position += len(line)
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not line.strip() and not fence and line.endswith("\n"):
            end = position
    return text[:end], text[end:]
