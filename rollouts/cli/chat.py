"""`rollouts chat`: talk with a model in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.errors import UserError

if TYPE_CHECKING:
    from rollouts.cli.chat_display import Display
    from rollouts.cli.chat_session import Session
    from rollouts.providers import Endpoint

HISTORY_LINES = 1000


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model: a folder or hub name, loaded here, or a name that the server at --api-base "
        "knows. /help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves. On a pipe each line is a message.",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder or hub name; with --api-base its name")
    parser.add_argument("--api-base", metavar="URL", help="ask a server with OpenAI's API instead of loading the model")
    parser.add_argument("--api-key", metavar="KEY", help="for --api-base; better set OPENAI_API_KEY instead")
    parser.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of OpenAI's function tools")
    parser.add_argument("--load", metavar="FILE", help="go on with a saved or exported conversation")
    parser.add_argument("--temperature", metavar="T", help="0 takes the likeliest token (default: 0.7)")
    parser.add_argument("--max-tokens", metavar="N", help="of one reply (default: 1024)")
    for name in ("top-p", "top-k", "seed"):
        parser.add_argument(f"--{name}", metavar="X", help=f"{name} of sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", default="bfloat16", help="bfloat16, float16 or float32 (default: bfloat16)")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends or /quit. Errors end a program on a pipe; a person reads them and goes on."""
    from rollouts.cli.chat_commands import Chat
    from rollouts.cli.chat_file import load_tools
    from rollouts.cli.chat_session import Session
    from rollouts.providers import Endpoint

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    session = Session(Endpoint("openai" if args.api_base else "embedded", args.model), system=args.system)
    for name in ("temperature", "max_tokens", "top_p", "top_k", "seed"):
        if getattr(args, name) is not None:
            session.set(name, getattr(args, name))
    if args.tools:
        session.tools = load_tools(Path(args.tools).expanduser())
    display = make_display(terminal)
    chat = Chat(session, display, terminal)
    if args.load:
        chat.load(args.load)
    with _endpoint(args) as endpoint:
        session.endpoint = endpoint
        return _talk(chat, session, display, terminal)


def _talk(chat: Any, session: Session, display: Display, terminal: bool) -> int:
    from rollouts.providers import ProviderError

    if terminal:
        display.note(f"{session.endpoint.model}  ·  /help lists the commands, Ctrl-D leaves")
    with _line_history(terminal):
        while True:
            try:
                line = input("\n› " if terminal else "")
            except EOFError:
                if terminal:
                    print()
                return 0
            except KeyboardInterrupt:  # at the prompt: forget the line, as shells do
                if not terminal:
                    raise
                print()
                continue
            try:
                if chat.take(line):
                    return 0
            except (UserError, ProviderError) as error:
                display.end()
                if not terminal:
                    raise UserError(str(error)) from error
                display.note(f"error: {error}")
            except KeyboardInterrupt:
                if not terminal:
                    raise
                display.end()


def make_display(terminal: bool) -> Display:
    from rollouts.cli.chat_display import PlainDisplay, RichDisplay

    if not terminal:
        return PlainDisplay()
    from rich.console import Console

    return RichDisplay(Console())


@contextmanager
def _endpoint(args: argparse.Namespace) -> Iterator[Endpoint]:
    """Who answers: a server, or an engine that lives as long as the context."""
    from rollouts.providers import Endpoint, registered

    if args.api_base:
        yield Endpoint("openai", args.model, api_base=args.api_base, api_key=args.api_key, max_retries=1)
        return
    from rollouts.cli.export import find_source
    from rollouts.inference import EmbeddedEngine
    from rollouts.models.load import load_hf_model

    folder = Path(args.model).expanduser()
    with redirect_stdout(sys.stderr):  # stdout is for replies
        source = find_source(folder) if folder.is_dir() else args.model
        model, tokenizer = load_hf_model(source, args.device, args.precision)
    if tokenizer.chat_template is None:
        raise UserError(f"{args.model} has no chat template, so it cannot chat; `rollouts serve` has /v1/completions")
    engine = EmbeddedEngine(model, tokenizer, max_rows=1)
    try:
        with registered(args.model, engine, tokenizer):
            yield Endpoint("embedded", args.model)
    finally:
        engine.close()


@contextmanager
def _line_history(terminal: bool) -> Iterator[None]:
    """Line editing with a history that outlives the program."""
    if not terminal:
        yield
        return
    try:
        import readline
    except ImportError:  # not on every system; input() works without
        yield
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "rollouts" / "chat_history"
    with suppress(OSError):  # none yet
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):  # a home that cannot be written to
            readline.write_history_file(path)
