"""A server with the real page and guard whose models say what a test wrote, and have the names that it gives them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse

from rollouts.serving.chat_page import add_chat_page
from rollouts.serving.guard import Guard
from rollouts.serving.server import bind
from rollouts.serving.settings import Settings

Delta = dict[str, Any]
Script = Callable[[dict[str, Any]], list[Delta]]


def in_pieces(text: str, size: int) -> list[Delta]:
    return [{"content": text[i : i + size]} for i in range(0, len(text), size)]


@contextmanager
def scripted(names: list[str], script: Script, delay: float = 0) -> Iterator[str]:
    """Serve; gives the address. ``script`` makes the deltas that answer a request's body."""
    app = FastAPI()
    add_chat_page(app)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> StreamingResponse:
        body = await request.json()

        async def lines() -> AsyncIterator[str]:
            for delta in script(body):
                logprobs = delta.pop("logprobs", None)
                choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                await asyncio.sleep(delay)
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    server = uvicorn.Server(uvicorn.Config(Guard(app, Settings()), ws="none", lifespan="off", log_level="warning"))
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
