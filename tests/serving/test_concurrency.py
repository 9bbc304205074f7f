"""Many clients at once, clients that go, and a line that is full."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_server import post_head, running
from transformers import PreTrainedTokenizerFast

from rollouts.inference import EmbeddedEngine
from rollouts.serving.settings import Settings

ENDLESS: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True}


def streams_equal_serial_answers(server: Any, count: int) -> None:
    prompts = [[20 + i % 400, 30 + i % 7, 40] * (1 + i % 5) for i in range(count)]
    options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    serial = [server.openai.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]

    async def all_at_once() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:

            async def one(prompt: list[int]) -> str:
                text, reason = "", None
                async for chunk in await client.completions.create(prompt=prompt, stream=True, **options):
                    text += chunk.choices[0].text
                    reason = chunk.choices[0].finish_reason or reason
                assert reason == "length"
                return text

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(all_at_once()) == serial


def test_concurrent_streams(server: Any) -> None:
    streams_equal_serial_answers(server, 16)


@pytest.mark.long
def test_two_hundred_concurrent_streams(server: Any) -> None:
    streams_equal_serial_answers(server, 200)


def disconnects_free_their_slots(server: Any, path: str, stream: bool, seconds: float) -> None:
    """Of the one that runs and of the one that waits in line: neither has to send to be noticed."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": ENDLESS,
        "/v1/chat/completions": {
            "model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3900, "ignore_eos": True
        },
        "/generate": {"input_ids": [5], "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}, "rid": None},
    }  # fmt: skip
    host, port = server.url.removeprefix("http://").split(":")
    engine = server.served.engine
    request = httpx.Request("POST", f"{server.url}{path}", json={**bodies[path], "stream": stream})
    raw = post_head(path, len(request.content)) + request.content
    clients = []
    for i in range(2):
        clients.append(socket.create_connection((host, int(port))))
        clients[i].sendall(raw)
        server.until(lambda i=i: engine.num_running + engine.num_waiting == i + 1)
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    clients[1].close()
    server.until(lambda: engine.num_waiting == 0 and server.served.num_active == 1, seconds)
    assert engine.num_running == 1
    clients[0].close()
    server.until(lambda: engine.num_running == 0 and server.served.num_active == 0, seconds)


WAYS = pytest.mark.parametrize(
    ("path", "stream"), list(product(["/v1/completions", "/v1/chat/completions", "/generate"], [False, True]))
)


@WAYS
def test_a_disconnect_frees_the_slot(small_server: Any, path: str, stream: bool) -> None:
    """The engine stands still once it has begun, so that nothing but the disconnect can end a sample."""
    engine = small_server.served.engine
    with small_server.held(lambda: engine.num_running == 1):
        disconnects_free_their_slots(small_server, path, stream, 60)


@pytest.mark.long
@WAYS
def test_a_disconnect_frees_the_slot_within_a_second(small_server: Any, path: str, stream: bool) -> None:
    """Of an engine that works meanwhile, if slowly."""
    with slow_steps(small_server.served.engine):
        disconnects_free_their_slots(small_server, path, stream, 1)


@contextmanager
def slow_steps(engine: EmbeddedEngine) -> Iterator[None]:
    """Every step takes 20 ms or more inside: what is long takes minutes."""
    over = threading.Event()

    def rest() -> None:
        over.wait(0.02)
        if not over.is_set():
            engine._thread.send(rest)

    rest()
    try:
        yield
    finally:
        over.set()


def test_a_full_line_is_429_and_empties(small_server: Any) -> None:
    with ThreadPoolExecutor() as pool:
        with small_server.served.engine.paused():  # until it goes on, nobody leaves the line
            body = {**ENDLESS, "max_tokens": 30}
            waiting = [pool.submit(small_server.post, "/v1/completions", **body) for _ in range(3)]
            small_server.until(lambda: small_server.served.num_active == 3)
            for stream in (False, True):
                response = small_server.post("/v1/completions", **ENDLESS, stream=stream)
                assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
            with pytest.raises(openai.RateLimitError):
                small_server.openai.completions.create(model="tiny", prompt="a")
        assert [answer.result().status_code for answer in waiting] == [200] * 3
    assert small_server.post("/v1/completions", model="tiny", prompt="a").status_code == 200


@pytest.mark.long
def test_a_reader_that_stalls_is_dropped(served_weights: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """It has asked for a long stream and takes none of it: its slot is free soon after its buffers are full."""
    sampling = {"max_new_tokens": 4000, "ignore_eos": True, "n": 3}
    body = {"input_ids": [5], "sampling_params": sampling, "stream": True, "return_logprob": True}
    settings = Settings(max_queue=2, send_timeout=0.5)
    with running(served_weights / "a", tiny_tokenizer, settings, max_rows=1, max_length=4096) as server:
        host, port = server.url.removeprefix("http://").split(":")
        content = httpx.Request("POST", server.url, json=body).content
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(post_head("/generate", len(content)) + content)
            server.until(lambda: server.served.num_active == 3)
            server.until(lambda: server.served.num_active == 0)
        assert server.served.engine.num_sampled_tokens < 3 * 4000
