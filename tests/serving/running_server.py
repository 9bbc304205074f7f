"""Running a real server in a thread, for the tests of serving."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from transformers import PreTrainedTokenizerFast

from rollouts.serving.served_model import ServedModel
from rollouts.serving.server import bind, make_server
from rollouts.serving.settings import Settings


@dataclass
class Running:
    """A server that runs, and how to reach it."""

    url: str
    served: ServedModel
    http: httpx.Client

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    @contextmanager
    def held(self, condition: Callable[[], bool]) -> Iterator[threading.Event]:
        """Inside, the engine takes no further step once ``condition`` holds between two; the event tells when.

        What is asked of it between steps, such as to abort or to take new weights, it does.
        """
        thread, reached, ended = self.served.engine._thread, threading.Event(), threading.Event()

        def look() -> None:
            if condition():
                thread.pauses += 1
                reached.set()
            elif not ended.is_set():
                time.sleep(0.001)  # an idle engine would look all the time
                thread.send(look)

        def go_on() -> None:
            thread.pauses -= reached.is_set()
            ended.set()

        thread.send(look)
        try:
            yield reached
        finally:
            thread.send(go_on)

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> float:
        """Wait for the condition; gives the seconds that it took."""
        started = time.perf_counter()
        while not condition():
            assert time.perf_counter() - started < seconds, "the condition did not come true in time"
            time.sleep(0.005)
        return time.perf_counter() - started


def post_head(path: str, length: int) -> bytes:
    """The head of a POST request, for tests that write to sockets."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


@contextmanager
def running(
    folder: Path, tokenizer: PreTrainedTokenizerFast, settings: Settings | None = None, **engine: int
) -> Iterator[Running]:
    """Serve the model of ``folder`` under the name ``tiny``."""
    from transformers import AutoModelForCausalLM

    settings = settings or Settings()
    model = AutoModelForCausalLM.from_pretrained(folder)
    served = ServedModel(
        "tiny", str(folder), model, tokenizer, settings, **{"max_length": 1024, "cache_bytes": 64 << 20, **engine}
    )
    ready = threading.Event()
    server = make_server({"tiny": served}, settings, ready.set)
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(120)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
                yield Running(url, served, client)
        finally:
            server.should_exit = True
            thread.join()
            served.close()
