"""A real HTTP server that misbehaves as told: storms of errors, silence, resets, dripping, then good answers."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Handler"], None]


@dataclass
class Unruly:
    """What the server does with its next requests; the last entry also with all further ones."""

    url: str
    plan: list[Behaviour] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)  # what hangs may end

    def next(self) -> Behaviour:
        return self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    unruly: Unruly

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.unruly.times.append(time.monotonic())
        self.unruly.bodies.append(json.loads(body))
        self.unruly.headers.append({k.lower(): v for k, v in self.headers.items()})
        self.unruly.next()(self)

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def events(self, *events: Any, finish: bool = True) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        if finish:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def reset(self) -> None:
        """Close with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextmanager
def unruly_server() -> Iterator[Unruly]:
    class Own(Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    Own.unruly = Unruly(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Own.unruly
    finally:
        Own.unruly.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
