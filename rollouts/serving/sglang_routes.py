"""SGLang's endpoints for RL: generation, weights from disk, pausing, aborting, and what is served."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rollouts.errors import UserError
from rollouts.inference import SamplingParams
from rollouts.serving import sglang_generate
from rollouts.serving.errors import RequestError
from rollouts.serving.metrics import Metrics
from rollouts.serving.requests import read_request
from rollouts.serving.served_model import ServedModel
from rollouts.serving.settings import Settings
from rollouts.serving.sglang_schema import (
    AbortRequest,
    GenerateRequest,
    ModelRequest,
    PauseRequest,
    UpdateWeightsRequest,
    WeightsCheckRequest,
)
from rollouts.serving.sse import event_stream, unless_disconnected

HEALTH_TIMEOUT = 20  # seconds for one token


def add_sglang_routes(app: FastAPI, models: Mapping[str, ServedModel], settings: Settings, metrics: Metrics) -> None:
    """Add the endpoints to ``app``. What changes anything is POST only: pages of other sites can send any GET."""

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        body = await read_request(request, GenerateRequest, settings)
        served = _find(models, body.model)
        prepared = await sglang_generate.prepare(served, body)
        if body.stream:
            return event_stream(sglang_generate.events(served, metrics, body, prepared))
        work = partial(sglang_generate.answer, served, metrics, body, prepared)
        return JSONResponse(await unless_disconnected(request, work))

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/health_generate")
    async def health_generate() -> Response:
        for served in models.values():
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
        served = _find(models, model)
        return {
            "model_path": served.path,
            "tokenizer_path": served.path,
            "served_model_name": served.name,
            "is_generation": True,
            "weight_version": str(served.engine.weight_version),
            "max_model_len": served.engine.max_length,
            "vocab_size": served.engine.vocab_size,
        }

    @app.post("/update_weights_from_disk")
    async def update_weights(request: Request) -> Response:
        body = await read_request(request, UpdateWeightsRequest, settings)
        served = _find(models, body.model)
        load = partial(served.load_weights, body.model_path, body.version(), bool(body.abort_all_requests))
        try:
            version = await anyio.to_thread.run_sync(load)
        except UserError as error:
            return JSONResponse({"success": False, "message": str(error)}, 400)
        return _done(served, f"weights of version {version} are served")

    @app.post("/weights_checker")
    async def check_weights(request: Request) -> Response:
        body = await read_request(request, WeightsCheckRequest, settings)
        served = _find(models, body.model)
        checksum = await anyio.to_thread.run_sync(served.engine.weights_checksum)
        return _done(served, "SHA-256 over names, dtypes, shapes and bytes of the parameters", checksum=checksum)

    @app.post("/pause_generation")
    async def pause(request: Request) -> Response:
        body = await read_request(request, PauseRequest, settings)
        served = _find(models, body.model)
        if body.mode == "abort":
            await served.abort_all()
        await anyio.to_thread.run_sync(served.pause)
        return _done(served, "paused")

    @app.post("/continue_generation")
    async def resume(request: Request) -> Response:
        served = _find(models, (await read_request(request, ModelRequest, settings)).model)
        await anyio.to_thread.run_sync(served.resume)
        return _done(served, "running")

    @app.post("/flush_cache")
    async def flush_cache(request: Request) -> Response:
        served = _find(models, (await read_request(request, ModelRequest, settings)).model)
        await served.flush_cache()
        return _done(served, "the prefix cache is empty")

    @app.post("/abort_request")
    async def abort(request: Request) -> Response:
        body = await read_request(request, AbortRequest, settings)
        served = _find(models, body.model)
        if body.abort_all:
            await served.abort_all()
        elif body.rid is None:
            raise RequestError("rid: say which request, or send abort_all", "rid")
        elif body.rid in served.aborts:  # else it has ended already
            served.aborts[body.rid].abort()
        return _done(served, "aborted")


def _done(served: ServedModel, message: str, **more: Any) -> JSONResponse:
    return JSONResponse(
        {"success": True, "message": message, "weight_version": str(served.engine.weight_version), **more}
    )


def _find(models: Mapping[str, ServedModel], name: str | None) -> ServedModel:
    if name is not None and name not in models:
        raise RequestError(f"the model {name[:100]!r} is not served here", "model", status=404, code="model_not_found")
    return next(iter(models.values())) if name is None else models[name]
