"""SGLang's endpoints for new weights: from disk, from tensors in the request, from a trainer's process group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rollouts.errors import UserError
from rollouts.inference.wake import current_wake
from rollouts.serving.errors import RequestError
from rollouts.serving.requests import read_request
from rollouts.serving.served_model import ServedModel, find_model
from rollouts.serving.settings import Settings, is_loopback
from rollouts.serving.sglang_schema import (
    BeginUpdateRequest,
    GroupRequest,
    GroupWeightsRequest,
    LeaveGroupRequest,
    ModelRequest,
    TensorWeightsRequest,
    UpdateWeightsRequest,
    WeightsCheckRequest,
    WeightVersionRequest,
    whole_version,
)


def add_weight_routes(app: FastAPI, models: Mapping[str, ServedModel], settings: Settings) -> None:
    """Add the endpoints to ``app``."""

    @app.post("/update_weights_from_disk")
    async def update_from_disk(request: Request) -> Response:
        body = await read_request(request, UpdateWeightsRequest, settings)
        served = find_model(models, body.model)
        return await _change(
            served, partial(served.updates.from_folder, body.model_path, body.version(), bool(body.abort_all_requests))
        )

    @app.post("/update_weights_from_tensor")
    async def update_from_tensor(request: Request) -> Response:
        body = await read_request(request, TensorWeightsRequest, settings)
        served = find_model(models, body.model)
        texts = body.serialized_named_tensors
        return await _change(
            served, partial(served.updates.from_texts, texts, body.version(), bool(body.abort_all_requests))
        )

    @app.post("/init_weights_update_group")
    async def join_group(request: Request) -> Response:
        body = await read_request(request, GroupRequest, settings)
        served = find_model(models, body.model)
        if is_loopback(settings.host) and not is_loopback(body.master_address):
            field = "master_address"
            raise RequestError(f"{field}: a server on loopback joins groups on its own machine only", field)
        if body.rank_offset >= body.world_size:
            raise RequestError("rank_offset: ranks are below world_size", "rank_offset")
        join = partial(
            served.updates.groups.join, body.group_name, body.master_address, body.master_port, body.rank_offset,
            body.world_size,
        )  # fmt: skip
        return await _change(served, join, f"joined the group {body.group_name!r}")

    @app.post("/destroy_weights_update_group")
    async def leave_group(request: Request) -> Response:
        body = await read_request(request, LeaveGroupRequest, settings)
        served = find_model(models, body.model)
        return await _change(served, partial(served.updates.groups.leave, body.group_name), "left the group")

    @app.post("/update_weights_from_distributed")
    async def update_from_group(request: Request) -> Response:
        body = await read_request(request, GroupWeightsRequest, settings)
        served = find_model(models, body.model)
        receive = partial(
            served.updates.from_group, body.group_name, body.names, body.dtypes, body.shapes,
            body.load_format is not None, body.version(), bool(body.abort_all_requests),
        )  # fmt: skip
        return await _change(served, receive)

    @app.post("/begin_weight_update")
    async def begin(request: Request) -> Response:
        served = find_model(models, (await read_request(request, BeginUpdateRequest, settings)).model)
        return await _change(served, served.updates.begin, "weights are gathered until /end_weight_update")

    @app.post("/end_weight_update")
    async def end(request: Request) -> Response:
        served = find_model(models, (await read_request(request, ModelRequest, settings)).model)
        return await _change(served, served.updates.end)

    @app.post("/update_weight_version")
    async def rename(request: Request) -> Response:
        body = await read_request(request, WeightVersionRequest, settings)
        served = find_model(models, body.model)
        version = whole_version(body.new_version, "new_version")
        return await _change(
            served, partial(served.updates.rename, version, body.abort_all_requests), new_version=str(version)
        )

    @app.post("/weights_checker")
    async def check_weights(request: Request) -> Response:
        served = find_model(models, (await read_request(request, WeightsCheckRequest, settings)).model)
        checksum = await anyio.to_thread.run_sync(served.engine.weights_checksum)
        ranks = [{"checksums": await anyio.to_thread.run_sync(served.engine.weights_digests)}]
        message = "SHA-256 over names, dtypes, shapes and bytes of the parameters; of each one's bytes in ranks"
        return done(served, message, checksum=checksum, per_engine_checksum=checksum, ranks=ranks)


async def _change(served: ServedModel, change: Callable[[], object], message: str = "", **more: Any) -> Response:
    """Do it in a thread; what cannot be done is told as SGLang tells it, with ``success`` false."""
    try:
        version = await _in_daemon_thread(change)
    except UserError as error:
        return JSONResponse({"success": False, "message": str(error)}, 400)
    if not message:
        message = f"weights of version {version} are served" if version is not None else "the weights are noted"
    return done(served, message, **more)


async def _in_daemon_thread(work: Callable[[], object]) -> object:
    """The result of what may wait long for a trainer: the thread is left behind when the server stops."""
    finished, wake = anyio.Event(), current_wake()
    results: list[object] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        with suppress(RuntimeError):  # the server has stopped meanwhile
            wake(finished.set)

    threading.Thread(target=run, name="rollouts-weights", daemon=True).start()
    await finished.wait()
    if errors:
        raise errors[0]
    return results[0]


def done(served: ServedModel, message: str, **more: Any) -> JSONResponse:
    return JSONResponse(
        {"success": True, "message": message, "weight_version": str(served.engine.weight_version), **more}
    )
