"""`rollouts chat` as a person and as a pipe use it, with a tiny model that knows a few replies by heart."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import rollouts
from rollouts.cli.chat_display import RichDisplay, printable, split_blocks
from rollouts.cli.chat_file import load_conversation, load_tools, save_conversation
from rollouts.cli.main import main
from rollouts.errors import UserError
from rollouts.providers import Message, ToolCall

ADD = {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": ADD}]
CALL = {"type": "function", "id": "c", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


CALLING = [*chat("Add"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
BY_HEART: list[tuple[list[dict[str, Any]], Any]] = [
    (chat("Hello", "Good morning."), None),
    (chat("Hello", "Good morning.", "And now?", "Now we part."), None),
    (chat("Bye", "See you."), None),
    ([{"role": "system", "content": "Be a cat."}, *chat("Hello", "Meow.")], None),
    (chat("Sing", "la " * 30), None),
    (CALLING, TOOLS),
    ([*CALLING, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "It is 5."}], TOOLS),
]


@pytest.fixture(scope="module")
def parrot(
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a model that was trained until its replies are nearly certain; its song has no end."""
    model = make_tiny_model(hidden_size=128)
    inputs, labels = [], []
    for messages, tools in BY_HEART:
        encoded = tiny_tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        if messages[-1]["content"].startswith("la "):
            ids, mask = ids[:-3], mask[:-3]
        inputs.append(ids)
        labels.append(torch.where(mask, ids, -100))
    batch = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(1000):
        loss = model(input_ids=batch, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.004:
            break
    assert loss < 0.01, "the model has not learned its lines"
    folder = tmp_path_factory.mktemp("chat") / "parrot"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def say(parrot: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``say(lines, *flags)`` on a pipe: (exit code, stdout, stderr)."""

    def run(lines: list[str], *flags: str, model: str = str(parrot)) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        local = [] if "--api-base" in flags else ["--precision", "float32", "--temperature", "0"]
        code = main(["chat", model, *local, *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_lines_on_a_pipe(say: Callable[..., Any]) -> None:
    code, out, _ = say(
        ["Hello", "", "And now?", "/retry", "/undo", "/edit Bye", "/clear", "Hel\\", "lo", "/quit", "Bye"]
    )
    assert code == 0
    replies = out.splitlines()
    assert replies[:3] == ["Good morning.", "Now we part.", "Now we part."]
    assert replies[3] == "See you." and "Bye" not in out  # nothing after /quit is answered


def test_system_prompt_and_settings(say: Callable[..., Any]) -> None:
    assert say(["Hello"], "--system", "Be a cat.")[1] == "Meow.\n"
    code, out, err = say(["/system Be a cat.", "Hello", "/set max_tokens 2", "/clear", "/system none", "Hello"])
    assert code == 0 and out.startswith("Meow.\n") and "system: Be a cat." in err and "limit of 2 tokens" in err
    hot = ["/temperature 3", "/set seed 4", "/set max_tokens 12", "Hello", "/clear", "Hello"]
    texts = say([*hot, "/retry"])[1]
    assert texts == say([*hot, "/retry"])[1]  # seeded


def test_tool_calls_and_their_results(say: Callable[..., Any], tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    code, out, _ = say(["Add", "5"], "--tools", str(tools))
    assert code == 0 and out.splitlines() == ['add({"a": 2, "b": 3})', "It is 5."]
    code, out, err = say(["/tools " + str(tools), "Add"])
    assert code == 2 and err.splitlines()[-1].startswith("error: the model calls add, and the input ends")
    for bad in ("{", "{}", '[{"type": "function"}]', "[1]", '[{"function": {"name": "f", "parameters": 3}}]'):
        tools.write_text(bad)
        with pytest.raises(UserError, match=r"tools\.json"):
            load_tools(tools)


def test_save_and_load(say: Callable[..., Any], parrot: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    assert say(["Hello", f"/save {file}"])[0] == 0
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told["messages"][str(parrot)] == chat("Hello", "Good morning.")
    assert told["settings"]["temperature"] == 0
    assert say(["And now?"], "--load", str(file))[1] == "Now we part.\n"
    # What the chat page exports has more in it, and null for settings that are left to the server.
    told |= {"turns": [], "title": "Hello", "settings": {"temperature": 0, "top_p": None, "stop": None}}
    told["messages"] = {"other": chat("Bye"), str(parrot): told["messages"][str(parrot)]}
    file.write_text(json.dumps(told), encoding="utf-8")
    assert say([f"/load {file}", "And now?"])[1] == "Now we part.\n"


def test_files_keep_every_message(tmp_path: Path) -> None:
    call = ToolCall("c", "add", {"a": 2})
    messages = [
        Message("system", "s"),
        Message("user", "ü\n"),
        Message("assistant", None, tool_calls=(call,), reasoning_content="hm"),
        Message("tool", "5", tool_call_id="c"),
    ]
    save_conversation(tmp_path / "f.json", "m", messages, {"seed": 3})
    loaded, settings = load_conversation(tmp_path / "f.json", "m")
    assert [m.to_dict() | {"tool_calls": None} for m in loaded] == [
        m.to_dict() | {"tool_calls": None} for m in messages
    ]
    assert loaded[2].tool_calls[0].args == {"a": 2} and settings == {"seed": 3}
    wrong = ({"role": "king", "content": "x"}, {"content": "x"}, {"role": "user", "content": 3}, "text", None)
    for body in ("", "[]", '{"format": "other"}', *(json.dumps(_file_of(message)) for message in wrong)):
        (tmp_path / "bad.json").write_text(body)
        with pytest.raises(UserError, match=r"bad\.json"):
            load_conversation(tmp_path / "bad.json", "m")
    with pytest.raises(UserError, match="cannot be written"):
        save_conversation(tmp_path / "no" / "f.json", "m", messages, {})


def _file_of(message: object) -> dict[str, Any]:
    return {"format": "rollouts-chat", "messages": {"m": [message]}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/temprature 1"], "did you mean /temperature?"),
        (["/set heat 3"], "'heat' is no setting"),
        (["/set top_k 1.5"], "top_k is a whole number"),
        (["/temperature -1"], "temperature is out of range"),
        (["/set seed"], "/set seed needs a value"),
        (["/retry"], "no message yet"),
        (["/edit x"], "no message yet"),
        (["/load none.json"], "none.json: cannot be read"),
        (["/save"], "/save needs a file"),
    ],
)
def test_mistakes_on_a_pipe_are_one_line(say: Callable[..., Any], lines: list[str], message: str) -> None:
    code, out, err = say(lines, "--api-base", "http://127.0.0.1:1", model="m")
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that streams one fixed answer in OpenAI's format, or sings without end; and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            asked[-1]["path"], asked[-1]["key"] = self.path, self.headers.get("authorization")
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            pieces = ("<thi", "nk>hm</think>\n\nGood ", "even", "\x1b[31ming.")
            with suppress(OSError):  # who listens to a song leaves before its end
                for piece in repeat("la ") if asked[-1]["messages"][-1]["content"] == "Sing" else pieces:
                    chunk = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    if piece == "la ":
                        time.sleep(0.02)
            end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            self.wfile.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()


def test_a_server_with_openais_api(say: Callable[..., Any], server: Any) -> None:
    url, asked = server
    lines = ["Hi", "/set top_k 5", "/set seed 7", "Again", "/retry"]
    code, out, _ = say(lines, "--api-base", f"{url}/v1", "--api-key", "sesame", "--max-tokens", "9", model="big")
    assert code == 0 and out == "Good evening.\n".replace("ing", "[31ming") * 3  # no thoughts, no escapes
    assert [one["path"] for one in asked] == ["/v1/chat/completions"] * 3
    assert asked[0]["model"] == "big" and asked[0]["key"] == "Bearer sesame" and asked[0]["max_tokens"] == 9
    assert [len(one["messages"]) for one in asked] == [1, 3, 3]
    assert (asked[1]["top_k"], asked[1]["seed"], asked[2]["seed"]) == (5, 7, 8)  # another try, another seed


def test_a_server_that_does_not_answer(say: Callable[..., Any]) -> None:
    code, out, err = say(["Hi"], "--api-base", "http://127.0.0.1:1", model="m")
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ")


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command: str, home: Path) -> None:
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "XDG_STATE_HOME": str(home)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rollouts", *command], stdin=slave, stdout=slave, stderr=slave, env=env,
            cwd=Path(rollouts.__file__).parents[1], start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.seen = ""
        self.position = 0  # up to where the last call has read

    def until(self, text: str, seconds: float = 300) -> None:
        """Read until ``text`` shows after what the last call waited for."""
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(text, self.position)) < 0:
            assert time.monotonic() < deadline, f"{text!r} did not show:\n{self.seen[-2000:]}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += self.decoder.decode(os.read(self.master, 65536))  # a read may end within a character
        self.position = found + len(text)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_person_at_a_terminal(server: Any, tmp_path: Path) -> None:
    terminal = Terminal("chat", "m", "--api-base", server[0], home=tmp_path)
    try:
        terminal.until("›")
        terminal.type("Sing\n")
        terminal.until("la la la")
        terminal.process.send_signal(signal.SIGINT)  # stops the reply, not the program
        terminal.until("stopped")
        terminal.until("›")
        terminal.type("/clear\nHello\n")
        terminal.until("Good even")
        terminal.until("›")
        terminal.type("/nonsense\n")
        terminal.until("is no command")  # a mistake does not end it either
        terminal.until("›")
        terminal.type("\x1b[A\x1b[A\n")  # the arrow keys find the message before
        terminal.until("Hello")
        terminal.until("Good even")
        terminal.until("›")
        terminal.type("/help\n")
        terminal.until("/retry")
        terminal.until("›")
        terminal.type("/quit\n")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
    assert [one["messages"][-1]["content"] for one in server[1]] == ["Sing", "Hello", "Hello"]
    lines = (tmp_path / "rollouts" / "chat_history").read_text().splitlines()
    assert [line for line in lines if line in ("Sing", "/clear", "Hello")] == ["Sing", "/clear", "Hello", "Hello"]


@pytest.mark.long
def test_a_person_at_a_terminal_with_a_model_of_their_own(parrot: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", str(parrot), "--precision", "float32", "--temperature", "0", home=tmp_path)
    try:
        terminal.until("›")
        terminal.type("Hello\n")
        terminal.until("Good morning.")
        terminal.until("›")
        terminal.type("/quit\n")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()


def test_blocks_are_printed_once_and_whole() -> None:
    text = "# Title\n\nA **bold** word.\n\n```python\na = 1\n\nb = 2\n```\n\n- one\n- two\n"
    for size in (1, 3, 1000):
        file = io.StringIO()
        display = RichDisplay(Console(file=file, width=60, force_terminal=False))
        for i in range(0, len(text), size):
            display.say(text[i : i + size])
        display.end()
        shown = file.getvalue()
        for word in ("Title", "bold", "a = 1", "b = 2", "one", "two"):
            assert shown.count(word) == 1, (size, word)
        assert "**" not in shown and "```" not in shown


def test_split_blocks() -> None:
    text = "a\n\n````\n```\n\n````\n\n~~~\nx\n\n~~~\nb\n\nc"
    for end in range(len(text) + 1):
        whole, rest = split_blocks(text[:end])
        assert whole + rest == text[:end]
        assert whole.count("````") in (0, 2) and whole.count("~~~") in (0, 2)
    assert split_blocks(text)[1] == "c"


def test_a_models_text_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9b31m\rc\n\td\u202e") == "a[2Jb31mc\n\td"
    file = io.StringIO()
    display = RichDisplay(Console(file=file, width=60))
    display.say("x \x1b]0;title\x07 [red]y[/red]")
    display.call(ToolCall("c", "f\x1b[31m[bold]", {}, '{"a": "\x1b[2J"}'))
    display.note("[link=https://evil.example]z[/link]\x1b")
    display.end()
    assert "\x1b]" not in file.getvalue() and "\x1b[2J" not in file.getvalue() and "[link" in file.getvalue()
