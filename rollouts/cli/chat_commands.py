"""What a line means in `rollouts chat`: a message, or a command that begins with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from rollouts.cli.chat_display import Display
from rollouts.cli.chat_file import load_conversation, load_tools, save_conversation
from rollouts.cli.chat_session import SETTINGS, Session
from rollouts.errors import UserError
from rollouts.providers import Message

MAX_ROUNDS = 16  # of tool calls that follow one message

HELP = """\
/help                 this list
/system [TEXT]        show or change the system prompt
/set [NAME VALUE]     show or change how replies are sampled; none is the default
/temperature T        the same as /set temperature T
/tools [FILE | none]  show or change the tools: a JSON list of OpenAI's functions
/retry                another reply to the last message
/edit [TEXT]          change the last message and ask again
/undo                 take the last message and its reply back
/show                 the conversation so far
/save FILE            write the conversation; the chat page can import it
/load FILE            go on with a saved conversation, or one exported by the chat page
/clear                begin anew
/quit                 leave (also Ctrl-D)
A line that ends with \\ goes on in the next. Ctrl-C stops a reply."""


class Chat:
    """Takes lines; state: the session and the lines of a message that is not complete."""

    def __init__(self, session: Session, display: Display, terminal: bool) -> None:
        self.session, self.display, self.terminal = session, display, terminal
        self._lines: list[str] = []
        self._commands: dict[str, Callable[[str], object]] = {
            "help": lambda _: display.note(HELP),
            "system": self._system,
            "set": self._set,
            "temperature": lambda text: self._set(f"temperature {text}"),
            "tools": self._tools,
            "retry": self._retry,
            "edit": self._edit,
            "undo": self._undo,
            "show": self._show,
            "save": self._save,
            "load": self.load,
            "clear": self._clear,
        }

    def take(self, line: str) -> bool:
        """Answer one line; True when it asks to leave. Raises UserError and ProviderError."""
        if line.endswith("\\"):
            self._lines.append(line[:-1])
            return False
        text = "\n".join([*self._lines, line]).strip()
        self._lines = []
        if text in ("/quit", "/exit", "/q"):
            return True
        if text.startswith("/") and not text.startswith("//"):
            self._command(text[1:])
        elif text:
            self._ask(text.removeprefix("/") if text.startswith("//") else text)
        return False

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            raise UserError(
                f"/{name} is no command; {f'did you mean /{near[0]}?' if near else '/help lists them'} "
                "(begin a message with // to send a slash)"
            )
        self._commands[name](rest.strip())

    # -- messages -----------------------------------------------------------------------------------------------------

    def _ask(self, text: str) -> None:
        """Send a message. If it cannot be answered it is not part of the conversation."""
        before = list(self.session.messages)
        self.session.messages.append(Message("user", text))
        self.session.attempts = 0
        self._reply_or(before)

    def _reply_or(self, before: list[Message]) -> None:
        try:
            self._reply()
        except Exception:
            self.session.messages = before
            raise

    def _reply(self) -> None:
        """The reply, and further ones as long as tools are called and their results are given."""
        for _ in range(MAX_ROUNDS):
            done = self.session.reply(self.display)
            if done is None:
                return
            if done.stop_reason == "length":
                limit = self.session.settings["max_tokens"]
                self.display.note(f"cut at the limit of {limit} tokens: /set max_tokens N")
            calls = self.session.open_calls()
            if not calls:
                return
            for call in calls:
                result = call.error or self._result_of(call.name)
                self.session.messages.append(Message("tool", result, tool_call_id=call.id))

    def _result_of(self, name: str) -> str:
        try:
            return input(f"result of {name}: " if self.terminal else "")
        except EOFError:
            raise UserError(f"the model calls {name}, and the input ends: give its result on the next line") from None

    def _retry(self, _: str) -> None:
        if not self.session.messages:
            raise UserError("there is no message yet to answer again")
        before = list(self.session.messages)
        self.session.drop_reply()
        self._reply_or(before)

    def _edit(self, text: str) -> None:
        last = max((i for i, m in enumerate(self.session.messages) if m.role == "user"), default=None)
        if last is None:
            raise UserError("there is no message yet to change")
        text = text or self._prefilled(self.session.messages[last].text)
        before, self.session.messages = self.session.messages, self.session.messages[:last]
        self.session.messages.append(Message("user", text))
        self.session.attempts = 0
        self._reply_or(before)

    def _prefilled(self, text: str) -> str:
        """The text as a person changes it on a line that holds it already."""
        if not self.terminal:
            raise UserError("/edit needs the new text: /edit TEXT")
        import readline

        readline.set_startup_hook(lambda: readline.insert_text(text.replace("\n", " ")))
        try:
            return input("edit › ")
        finally:
            readline.set_startup_hook(None)

    def _undo(self, _: str) -> None:
        self.session.drop_reply()
        if not self.session.messages:
            raise UserError("there is nothing to take back")
        self.session.messages.pop()

    def _clear(self, _: str) -> None:
        self.session.messages = []

    # -- settings -----------------------------------------------------------------------------------------------------

    def _system(self, text: str) -> None:
        if text:
            self.session.system = "" if text == "none" else text
        self.display.note(f"system: {self.session.system or 'none'}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            if not value.strip():
                raise UserError(f"/set {name} needs a value")
            self.session.set(name, value.strip())
        self.display.note(", ".join(f"{name} {self.session.settings.get(name, 'none')}" for name in SETTINGS))

    def _tools(self, text: str) -> None:
        if text:
            self.session.tools = [] if text == "none" else load_tools(Path(text).expanduser())
        self.display.note(", ".join(tool.name for tool in self.session.tools) or "no tools")

    # -- files --------------------------------------------------------------------------------------------------------

    def _show(self, _: str) -> None:
        for message in self.session.history():
            calls = "".join(f"\n{call.name}({call.arguments})" for call in message.tool_calls)
            self.display.note(f"{message.role}: {message.text}{calls}")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save needs a file")
        save_conversation(
            Path(text).expanduser(), self.session.endpoint.model, self.session.history(), self.session.settings
        )
        self.display.note(f"saved {text}")

    def load(self, text: str) -> None:
        """Go on with the conversation in a file. Raises UserError."""
        if not text:
            raise UserError("/load needs a file")
        messages, settings = load_conversation(Path(text).expanduser(), self.session.endpoint.model)
        for name, value in settings.items():
            if name in SETTINGS and value is not None:
                self.session.set(name, str(value))
        system = [message.text for message in messages if message.role == "system"]
        self.session.system = "\n".join(system)
        self.session.messages = [message for message in messages if message.role != "system"]
        count = len(self.session.messages)
        self.display.note(f"loaded {text}: {count} message{'s' * (count != 1)}")
