"""`rollouts serve` as a person starts it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from running_server import post_head

from rollouts.cli.main import main
from rollouts.cli.serve import name_models
from rollouts.errors import UserError

Start = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def start(tiny_model_dir: Path) -> Iterator[Start]:
    """``start(*arguments)``: `rollouts serve` in a process of its own; gives its id and its address once it answers."""
    command = [sys.executable, str(Path(__file__).with_name("forking_command.py")), str(tiny_model_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stdin, stdout = process.stdin, process.stdout
    assert stdin and stdout
    children: list[int] = []

    def start(*arguments: str) -> tuple[int, str]:
        stdin.write(json.dumps(["serve", *arguments, "--precision", "float32", "--cache-mb", "16"]) + "\n")
        stdin.flush()
        children.append(int(stdout.readline()))
        line = next(line for line in stdout if line.startswith("serving"))
        return children[-1], line.split()[-1]

    try:
        assert any(line == "ready\n" for line in stdout)
        yield start
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    running = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                running.append(int(stat.parent.name))
    return running


def seconds_until_gone(leader: int, limit: float = 60) -> float:
    started = time.perf_counter()
    while session(leader) and time.perf_counter() - started < limit:
        time.sleep(0.01)
    return time.perf_counter() - started


def test_models_by_name(start: Start, tiny_model_dir: Path) -> None:
    pid, url = start(f"one={tiny_model_dir}", str(tiny_model_dir), "--port", "0")
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert names == ["one", tiny_model_dir.name]
        answers = {
            client.completions.create(model=name, prompt="Anna", temperature=0).choices[0].text for name in names
        }
        assert len(answers) == 1
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=str(tiny_model_dir), prompt="Anna")
    os.kill(pid, signal.SIGINT)
    assert seconds_until_gone(pid) < 60


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_busy_server_stops(start: Start, tiny_model_dir: Path, kind: signal.Signals) -> None:
    stop_busy_server(start, tiny_model_dir, kind, 60)


@pytest.mark.long
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_busy_server_stops_within_five_seconds(start: Start, tiny_model_dir: Path, kind: signal.Signals) -> None:
    stop_busy_server(start, tiny_model_dir, kind, 5)


def stop_busy_server(start: Start, tiny_model_dir: Path, kind: signal.Signals, seconds: float) -> None:
    """With a stream, a request that waits for its whole answer, and one that waits for a trainer that never comes."""
    pid, url = start(f"m={tiny_model_dir}", "--port", "0")
    port = int(url.rpartition(":")[2])
    endless = {"model": "m", "prompt": "a", "max_tokens": 4000, "ignore_eos": True}
    group = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    requests = (
        ("/v1/completions", {**endless, "stream": True}),
        ("/v1/completions", {**endless, "n": 60}),
        ("/init_weights_update_group", group),
    )
    clients = []
    for path, body in requests:
        content = json.dumps(body).encode()
        clients.append(socket.create_connection(("127.0.0.1", port)))
        clients[-1].sendall(post_head(path, len(content)) + content)
    assert clients[0].recv(4096).startswith(b"HTTP/1.1 200")
    assert session(pid) == [pid]
    os.kill(pid, kind)
    assert seconds_until_gone(pid) < seconds
    with socket.create_server(("127.0.0.1", port)):
        pass  # the port is free
    for client in clients:
        client.close()


def test_names(tmp_path: Path) -> None:
    final = tmp_path / "run7" / "final"
    final.mkdir(parents=True)
    assert name_models([str(final), "q=Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B"]) == {
        "run7": str(final),
        "q": "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    }
    for bad in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(UserError, match="NAME=MODEL"):
            name_models(bad)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLLOUTS_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["x=none", "--host", "0.0.0.0"], "--api-key"),
            (["x=none", "--port", port], f"port {port}"),
            (["x=none", "--port", "99999"], "99999"),
            (["x=none", "--max-rows", "0"], "--max-rows"),
            (["x=./none", "--port", "0"], "does not exist"),
        ):
            assert main(["serve", *arguments]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 and message in error
