"""The state of one chat in the terminal, and how a reply is asked for."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from rollouts.cli.chat_display import Display
from rollouts.errors import UserError
from rollouts.providers import ChatCompletion, Endpoint, Message, Tool, ToolCall, close_clients, stream_chat

# What /set and the flags know, and how each is read; `none` leaves the choice to the engine.
SETTINGS: dict[str, type] = {
    "temperature": float,
    "max_tokens": int,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
}
DEFAULTS: dict[str, Any] = {"temperature": 0.7, "max_tokens": 1024}


@dataclass
class Session:
    """Who is asked, what was said, and how to sample."""

    endpoint: Endpoint
    system: str = ""
    messages: list[Message] = field(default_factory=list)  # without the system prompt
    settings: dict[str, Any] = field(default_factory=lambda: dict(DEFAULTS))
    tools: list[Tool] = field(default_factory=list)
    attempts: int = 0  # replies given to the last message: with a seed, each adds one

    def set(self, name: str, text: str) -> None:
        """Change a setting. Raises UserError when it is unknown or its value is not a number in range."""
        if name not in SETTINGS:
            raise UserError(f"{name!r} is no setting; use one of {', '.join(SETTINGS)}")
        changed = dict(self.settings)
        if text.lower() in ("none", "auto", ""):
            changed.pop(name, None)
            if name in DEFAULTS:
                changed[name] = DEFAULTS[name]
        else:
            try:
                changed[name] = SETTINGS[name](text)
            except ValueError:
                kind = "a whole number" if SETTINGS[name] is int else "a number"
                raise UserError(f"{name} is {kind}, not {text!r}") from None
            check_settings(changed)
        self.settings = changed

    def history(self) -> list[Message]:
        system = [Message("system", self.system)] if self.system.strip() else []
        return system + self.messages

    def drop_reply(self) -> None:
        """Take back what followed the last message of the user."""
        while self.messages and self.messages[-1].role != "user":
            self.messages.pop()

    def open_calls(self) -> list[ToolCall]:
        """Calls of the last reply that have no result yet."""
        return list(self.messages[-1].tool_calls) if self.messages else []

    def reply(self, display: Display) -> ChatCompletion | None:
        """Ask for the next message and show it as it comes; Ctrl-C keeps what has come and gives None."""
        said: list[str] = []
        try:
            done = asyncio.run(self._stream(display, said))
        except KeyboardInterrupt:
            display.end()
            display.note("stopped")
            if "".join(said).strip():
                self.messages.append(Message("assistant", "".join(said)))
            return None
        display.end()
        self.attempts += 1
        self.messages.append(done.message)
        return done

    async def _stream(self, display: Display, said: list[str]) -> ChatCompletion:
        from rollouts.serving.reasoning import ReasoningSplitter

        done: ChatCompletion | None = None
        thoughts = ReasoningSplitter()  # for those who do not tell them apart themselves

        def show(reasoning: str, content: str) -> None:
            if reasoning:
                display.think(reasoning)
            if content:
                display.say(content)

        try:
            async with aclosing(stream_chat(self._asked(), self.history(), self.tools)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    if isinstance(chunk.data, ChatCompletion):
                        done = chunk.data
                        show(*thoughts.finish())
                    elif isinstance(chunk.data, ToolCall):
                        display.call(chunk.data)
                    elif chunk.kind == "reasoning":
                        display.think(chunk.data)
                    else:
                        said.append(chunk.data)
                        show(*thoughts.push(chunk.data))
        finally:
            await close_clients()  # they belong to this event loop
        assert done is not None, "a stream ends with its completion"
        return done

    def _asked(self) -> Endpoint:
        extra = {name: value for name, value in self.settings.items() if name not in DEFAULTS}
        if "seed" in extra:
            extra["seed"] += self.attempts
        temperature, max_tokens = self.settings["temperature"], self.settings["max_tokens"]
        return replace(self.endpoint, temperature=temperature, max_tokens=max_tokens, extra_params=extra)


def check_settings(settings: dict[str, Any]) -> None:
    """Raises UserError when one is out of range."""
    from rollouts.inference.sampling_params import SamplingParams

    SamplingParams(**settings)
