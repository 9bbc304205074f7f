"""The application: which path is answered by what."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollouts.errors import UserError
from rollouts.serving import openai_chat, openai_completions
from rollouts.serving.chat_page import add_chat_page
from rollouts.serving.errors import RequestError, error_response
from rollouts.serving.guard import Guard
from rollouts.serving.metrics import Metrics
from rollouts.serving.openai_schema import ChatRequest, CompletionRequest, SamplingRequest
from rollouts.serving.requests import read_request
from rollouts.serving.served_model import ServedModel, find_model
from rollouts.serving.settings import Settings
from rollouts.serving.sglang_routes import add_sglang_routes
from rollouts.serving.sse import as_request_error, event_stream, unless_disconnected

logger = logging.getLogger(__name__)


def make_app(models: Mapping[str, ServedModel], settings: Settings) -> ASGIApp:
    """The ASGI application that serves ``models`` by name; the first answers where a request cannot name one."""
    # The interactive documentation would load scripts from another site.
    app = FastAPI(title="rollouts", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics()
    metrics.watch(list(models.values()))
    _add_error_handlers(app)
    _add_openai_routes(app, models, settings, metrics)
    add_sglang_routes(app, models, settings, metrics)
    add_chat_page(app)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return _Counted(Guard(app, settings), metrics)


def _add_openai_routes(app: FastAPI, models: Mapping[str, ServedModel], settings: Settings, metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(served) for served in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        return _describe(find_model(models, name))

    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> Response:
        body = await read_request(request, ChatRequest, settings)
        served = _find_for(models, body)
        prepared = await openai_chat.prepare(served, body)
        if body.stream:
            return event_stream(openai_chat.events(served, metrics, body, prepared))
        work = partial(openai_chat.answer, served, metrics, body, prepared)
        return JSONResponse(await unless_disconnected(request, work))

    @app.post("/v1/completions")
    async def complete_text(request: Request) -> Response:
        body = await read_request(request, CompletionRequest, settings)
        served = _find_for(models, body)
        jobs = await openai_completions.prepare(served, body)
        if body.stream:
            return event_stream(openai_completions.events(served, metrics, body, jobs[0]))
        work = partial(openai_completions.answer, served, metrics, body, jobs)
        return JSONResponse(await unless_disconnected(request, work))


def _find_for(models: Mapping[str, ServedModel], request: SamplingRequest) -> ServedModel:
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options: needs stream to be true", "stream_options")
    return find_model(models, request.model)


def _describe(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "rollouts",
        "max_model_len": served.engine.max_length,
    }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    @app.exception_handler(UserError)
    @app.exception_handler(RuntimeError)
    async def on_known_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(as_request_error(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        response = error_response(RequestError(message, status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> JSONResponse:
        return error_response(RequestError("the server has failed on this request", status=500))


class _Counted:
    """ASGI middleware: counts and times every answer, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted_send)
        finally:
            # The route, not the path, so that strangers cannot make up labels.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.count_request(path, status, time.perf_counter() - started)
