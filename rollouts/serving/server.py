"""Running the application under uvicorn until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

import uvicorn

from rollouts.errors import UserError
from rollouts.serving.app import make_app
from rollouts.serving.connections import timed_protocol
from rollouts.serving.served_model import ServedModel
from rollouts.serving.settings import Settings


class Server(uvicorn.Server):
    """uvicorn's server, which says when it answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


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
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=1 << 16,
    )
    return Server(config, on_ready)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error
