"""Running the application under uvicorn until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import uvicorn

from rollouts.errors import UserError
from rollouts.serving.app import make_app
from rollouts.serving.connections import timed_protocol
from rollouts.serving.served_model import ServedModel
from rollouts.serving.settings import Settings


class Server(uvicorn.Server):
    """uvicorn's server, which says when it answers, and ends what runs when it is told to stop."""

    def __init__(self, config: uvicorn.Config, models: Sequence[ServedModel], on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._models = models
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for served in self._models:
            with suppress(RuntimeError):  # its engine has failed
                await served.engine.abort_all()  # clients get what there is
        await super().shutdown(sockets)


class _NoCancellations(logging.Filter):
    """Requests that are canceled when the server stops are no errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def make_server(
    models: Mapping[str, ServedModel], settings: Settings, on_ready: Callable[[], object] = lambda: None
) -> Server:
    """A server of ``models``; ``run(sockets=[...])`` it on what ``bind`` gives."""
    config = uvicorn.Config(
        make_app(models, settings),
        http=timed_protocol(settings),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could claim any address
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,  # then what still runs is canceled
        h11_max_incomplete_event_size=1 << 16,
    )
    logging.getLogger("uvicorn.error").addFilter(_NoCancellations())
    return Server(config, list(models.values()), on_ready)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number is not None and number > 0 else str(error)
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from error
