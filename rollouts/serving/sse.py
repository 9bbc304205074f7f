"""Answers that a vanished client ends: event streams, and work that is waited for while the client is watched."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import StreamingResponse

from rollouts.errors import UserError
from rollouts.serving.errors import RequestError, error_body

T = TypeVar("T")
DONE = "data: [DONE]\n\n"

logger = logging.getLogger(__name__)


_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def event(value: Any) -> str:
    return f"data: {_to_json(value)}\n\n"


class TextEvent:
    """An event that a stream sends over and over with another text in it: all else is written once.

    Args:
        value: the event's, with ``TextEvent.HERE`` for the text.
    """

    HERE = uuid.uuid4().hex  # nothing that a client can have sent

    def __init__(self, value: Any) -> None:
        self._before, self._after = event(value).split(_to_json(self.HERE))

    def of(self, text: str) -> str:
        return f"{self._before}{_to_json(text)}{self._after}"


def event_stream(events: AsyncIterator[Any]) -> StreamingResponse:
    """Stream each value as a server-sent event, then ``[DONE]``; an error becomes the last event.

    A string is an event already.

    Starlette watches the client meanwhile and cancels ``events`` when it goes.
    """

    async def lines() -> AsyncIterator[str]:
        try:
            async with aclosing(events) as values:  # type: ignore[type-var]
                async for value in values:
                    yield value if isinstance(value, str) else event(value)
        except (RequestError, UserError, RuntimeError) as error:
            yield event(error_body(as_request_error(error)))
        yield DONE

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def as_request_error(error: Exception) -> RequestError:
    """What a client is told: its own mistake in full, a failure of the engine without its insides."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return RequestError(str(error))
    cause = error.__cause__ or error
    if not getattr(cause, "is_logged", False):  # once, however many requests an engine that is gone fails
        cause.is_logged = True  # type: ignore[attr-defined]
        logger.error("the engine failed", exc_info=error)
    return RequestError("the engine has failed; restart the server", status=503, code="engine_unavailable")


async def unless_disconnected(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """The result of ``work``, which is canceled when the client disconnects; the body must have been read."""
    result: list[T] = []
    try:
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            result.append(await work())
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = _first(group)
        raise error from error.__cause__  # not from the group
    if not result:
        raise RequestError("the client has gone", status=499)
    return result[0]


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
