"""From the bytes of a request to a validated object, and from validation errors to one that names the field."""

from __future__ import annotations

from typing import TypeVar

import anyio
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from rollouts.serving.errors import RequestError
from rollouts.serving.guard import body_too_large
from rollouts.serving.settings import Settings
from rollouts.serving.strict_json import parse_json


class StrictModel(BaseModel):
    """A part of a request: types as JSON has them, no unknown fields, finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


async def read_request(request: Request, model: type[M], settings: Settings) -> M:
    """Read the body, within its bounds, as a ``model``; an empty one is ``{}``.

    Raises:
        RequestError: too large (413), too slow (408), not ``application/json`` (415), or not a valid request (400).
    """
    body, limit = bytearray(), settings.max_bytes(request.url.path)
    try:
        with anyio.fail_after(settings.body_timeout):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise body_too_large(limit)
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", status=408) from error
    except ClientDisconnect as error:
        raise RequestError("the client has gone", status=499) from error
    if not body:
        return validate(model, {})
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError("send the body with the header Content-Type: application/json", "Content-Type", status=415)
    return validate(model, parse_json(bytes(body)))


def validate(model: type[M], value: object) -> M:
    """``value`` as a ``model``. Raises RequestError about the first field at fault."""
    if not isinstance(value, dict):
        raise RequestError("the body is no JSON object; send one with the request's fields")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # Of a union's alternatives the one that was meant has come furthest.
        first = max(error.errors(include_url=False, include_input=False), key=lambda e: len(_path(e)))
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    param = ".".join(_path(first))[:200] or None
    if first["type"] == "extra_forbidden":
        raise RequestError(f"{param} is not supported; leave it out", param)
    message = first["msg"].removeprefix("Value error, ")
    raise RequestError(f"{param}: {message}" if param else f"the body: {message}", param)


def _path(error: ErrorDetails) -> list[str]:
    """The field's path without the names that pydantic gives to a union's alternatives: types and models."""
    *outer, last = error["loc"] or ("",)
    if error["type"] != "extra_forbidden":  # whose last part is the client's own word
        outer, last = [*outer, last], ""
    models = {model.__name__ for model in StrictModel.__subclasses__()}
    kept = [
        str(part) for part in outer if isinstance(part, int) or (part.isidentifier() and part not in models | KINDS)
    ]
    return kept + ([str(last)] if last else [])


KINDS = {"str", "int", "float", "bool", "list", "dict"}
