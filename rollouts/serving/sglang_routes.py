"""SGLang's endpoints for RL: generation, health, pausing, aborting, and what is served."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import rollouts
from rollouts.inference import SamplingParams
from rollouts.serving import sglang_generate
from rollouts.serving.errors import RequestError
from rollouts.serving.metrics import Metrics
from rollouts.serving.requests import read_request
from rollouts.serving.served_model import ServedModel, find_model
from rollouts.serving.settings import Settings
from rollouts.serving.sglang_schema import AbortRequest, ContinueRequest, GenerateRequest, ModelRequest, PauseRequest
from rollouts.serving.sglang_weights import add_weight_routes, done
from rollouts.serving.sse import event_stream, unless_disconnected

HEALTH_TIMEOUT = 20  # seconds for one token


def add_sglang_routes(app: FastAPI, models: Mapping[str, ServedModel], settings: Settings, metrics: Metrics) -> None:
    """Add the endpoints to ``app``. What changes anything is POST only: pages of other sites can send any GET."""
    add_weight_routes(app, models, settings)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        body = await read_request(request, GenerateRequest, settings)
        served = find_model(models, body.model)
        prepared = await sglang_generate.prepare(served, body)
        if body.stream:
            return event_stream(sglang_generate.events(served, metrics, body, prepared))
        work = partial(sglang_generate.answer, served, metrics, body, prepared)
        return JSONResponse(await unless_disconnected(request, work))

    @app.get("/health")
    async def health() -> Response:
        for served in models.values():
            _check_alive(served)
        return Response()

    @app.get("/health_generate")
    async def health_generate() -> Response:
        for served in models.values():
            _check_alive(served)
            if served.paused:
                raise RequestError(f"{served.name} is paused", status=503, code="paused")
            with anyio.move_on_after(HEALTH_TIMEOUT) as scope:
                await served.engine.generate([0], SamplingParams(max_tokens=1))
            if scope.cancelled_caught:
                raise RequestError(f"{served.name} gave no token in {HEALTH_TIMEOUT} s", status=503, code="stuck")
        return Response()

    @app.get("/model_info")
    @app.get("/get_model_info")
    async def model_info(model: str | None = None) -> dict[str, Any]:
        served = find_model(models, model)
        return {
            "model_path": served.path,
            "tokenizer_path": served.path,
            "served_model_name": served.name,
            "is_generation": True,
            "weight_version": str(served.engine.weight_version),
            "max_model_len": served.engine.max_length,
            "vocab_size": served.engine.vocab_size,
        }

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def server_info() -> dict[str, Any]:
        return {"version": rollouts.__version__, "models": [_state(served) for served in models.values()]}

    @app.post("/pause_generation")
    async def pause(request: Request) -> Response:
        body = await read_request(request, PauseRequest, settings)
        served = find_model(models, body.model)
        if body.mode == "abort":
            await served.engine.abort_all()
        await anyio.to_thread.run_sync(served.pause)
        if body.mode == "retract":
            await served.retract()
        return done(served, "paused", status="ok")

    @app.post("/continue_generation")
    async def resume(request: Request) -> Response:
        served = find_model(models, (await read_request(request, ContinueRequest, settings)).model)
        await anyio.to_thread.run_sync(served.resume)
        return done(served, "running", status="ok")

    @app.post("/flush_cache")
    async def flush_cache(request: Request) -> Response:
        served = find_model(models, (await read_request(request, ModelRequest, settings)).model)
        await served.engine.flush_cache()
        return done(served, "the prefix cache is empty")

    @app.post("/abort_request")
    async def abort(request: Request) -> Response:
        body = await read_request(request, AbortRequest, settings)
        served = find_model(models, body.model)
        if body.abort_all:
            await served.engine.abort_all()
        elif body.rid is None:
            raise RequestError("rid: say which request, or send abort_all", "rid")
        else:
            await served.engine.abort(body.rid)
        return done(served, "aborted")


def _check_alive(served: ServedModel) -> None:
    """Raises RequestError (503): the engine's thread has ended, and nothing will come of any request."""
    if not served.engine.alive:
        raise RequestError(f"the engine of {served.name} has failed; restart the server", status=503, code="dead")


def _state(served: ServedModel) -> dict[str, Any]:
    engine = served.engine
    return {
        "served_model_name": served.name,
        "model_path": served.path,
        "weight_version": str(engine.weight_version),
        "max_model_len": engine.max_length,
        "vocab_size": engine.vocab_size,
        "paused": served.paused,
        "num_running_reqs": engine.num_running,
        "num_waiting_reqs": engine.num_waiting,
        "num_cache_pages": engine.num_pages,
        "num_free_cache_pages": engine.num_free_pages,
    }
