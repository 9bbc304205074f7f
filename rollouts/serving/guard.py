"""The door of the server: who may ask, by what the head of a request tells."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from rollouts.serving.errors import RequestError, error_response
from rollouts.serving.settings import Settings, host_is_allowed

# Without a key: what load balancers ask, and the page's files, which hold no secret; the page itself asks for the key.
OPEN_PATHS = ("/health", "/")
OPEN_FOLDER = "/page/"


class Guard:
    """ASGI middleware: checks sizes, Host, Origin and the bearer token of every method."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            check_head(scope, self.settings)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def check_head(scope: Scope, settings: Settings) -> None:
    """Check what a request's head alone tells. Raises RequestError."""
    if sum(len(name) + len(value) for name, value in scope["headers"]) > settings.max_header_bytes:
        raise RequestError(f"the headers are larger than {settings.max_header_bytes:,} bytes; send less", status=431)
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, []).append(value)
    hosts = [host.decode("latin-1") for host in headers.get(b"host", [])]
    if len(hosts) != 1 or not host_is_allowed(hosts[0], settings):
        raise RequestError(
            "the Host header does not name this server; use localhost, or start it with --allow-host NAME",
            param="Host",
            status=403,
        )
    allowed_origins = {f"{scheme}://{hosts[0]}".lower() for scheme in ("http", "https")}
    if any(origin.decode("latin-1").lower() not in allowed_origins for origin in headers.get(b"origin", [])):
        raise RequestError("requests from pages of other sites are refused", param="Origin", status=403)
    open_path = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER)
    if settings.api_key is not None and not open_path:
        given = headers.get(b"authorization", [b""])[0]
        if not hmac.compare_digest(given, b"Bearer " + settings.api_key.encode()):
            raise RequestError(
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                param="Authorization",
                status=401,
                code="invalid_api_key",
            )
    length = headers.get(b"content-length", [b"0"])[0]
    limit = settings.max_bytes(scope["path"])
    if not length.isdigit() or len(length) > 18 or int(length) > limit:
        raise body_too_large(limit)


def body_too_large(limit: int) -> RequestError:
    return RequestError(f"the body is larger than {limit:,} bytes; send less", status=413)
