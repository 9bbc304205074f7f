"""Asking a server over HTTP, under asyncio or trio: time-outs, and retries that back off.

What is asked again: no answer (refused, reset, timed out), 408, 429 and 5xx, at most ``Endpoint.max_retries`` times,
after a random part of 0.25 s, 0.5 s, 1 s, … 30 s, or after what ``Retry-After`` says. What is not: every other 4xx,
and a stream of which something has been handed on already.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import anyio
import httpx
from anyio.lowlevel import RunVar

from rollouts.errors import UserError
from rollouts.providers.endpoint import Endpoint
from rollouts.providers.errors import BadRequestError, ProviderError

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY, LONGEST_RETRY_AFTER = 0.25, 30.0, 120.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")

AT_ONCE = 16  # requests of one client, which looks at all its connections when one begins and again when it ends

_clients: RunVar[dict[tuple[str, float, float], list[_Client]]] = RunVar("rollouts_http_clients")


@dataclass
class _Client:
    """Some of the connections to a server, and how many requests are on them."""

    http: httpx.AsyncClient
    in_flight: int = 0


class _Failure(Exception):
    """One attempt that may be repeated."""

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


async def request_json(
    endpoint: Endpoint,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    max_retries: int | None = None,
) -> Any:
    """The JSON of a whole answer; None when it is empty or not JSON at all.

    Args:
        timeout, max_retries: instead of the endpoint's.

    Raises:
        BadRequestError: the server refused the request.
        ProviderError: it failed, and so did every retry.
    """
    seconds = timeout or endpoint.timeout

    async def attempt() -> Any:
        with anyio.fail_after(seconds):
            async with _client(endpoint) as client:
                response = await client.request(
                    method, endpoint.url + path, json=body, headers=_headers(endpoint, headers)
                )
        _check_status(endpoint, response.status_code, response.headers, response.content)
        try:
            return json.loads(response.content) if response.content else None
        except ValueError:
            if "json" in response.headers.get("content-type", ""):
                raise _Failure("the answer is not valid JSON") from None
            return None

    attempts = 0
    while True:
        attempts += 1
        try:
            return await attempt()
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(f"endpoint.api_base {endpoint.api_base!r} is not an address: {error}") from error
        except (_Failure, httpx.TransportError, TimeoutError) as error:
            await _back_off(endpoint, path, error, attempts, seconds, max_retries)


async def stream_events(
    endpoint: Endpoint, path: str, body: Mapping[str, Any], *, headers: Mapping[str, str] | None = None
) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an answer's server-sent events, up to ``[DONE]`` or the end.

    Raises:
        BadRequestError: the server refused the request, perhaps by an event.
        ProviderError: it failed. Once an event has been handed on, nothing is asked again.
    """
    attempts = 0
    while True:
        attempts += 1
        begun = False
        try:
            async with aclosing(_events_once(endpoint, path, body, headers)) as events:  # type: ignore[type-var]
                async for event in events:
                    begun = True
                    yield event
            return
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(f"endpoint.api_base {endpoint.api_base!r} is not an address: {error}") from error
        except (_Failure, httpx.TransportError, TimeoutError) as error:
            if begun:
                raise ProviderError(
                    f"{_where(endpoint, path)}: the stream broke off: {_reason(error, endpoint.timeout)}",
                    getattr(error, "status", None), attempts,
                ) from error  # fmt: skip
            await _back_off(endpoint, path, error, attempts, endpoint.timeout, None)


async def _events_once(
    endpoint: Endpoint, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None
) -> AsyncIterator[dict[str, Any]]:
    address, own = endpoint.url + path, _headers(endpoint, headers)
    async with _client(endpoint) as client, client.stream("POST", address, json=body, headers=own) as response:
        if response.status_code >= 400:
            with anyio.fail_after(endpoint.connect_timeout):
                content = await response.aread()
            _check_status(endpoint, response.status_code, response.headers, content)
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            text = line[5:].strip()
            if text == "[DONE]":
                return
            try:
                event = json.loads(text)
            except ValueError:
                raise _Failure("an event is not valid JSON") from None
            if isinstance(event, dict) and event.get("error"):
                _raise_event_error(endpoint, event["error"])
            yield event


def _raise_event_error(endpoint: Endpoint, error: Any) -> None:
    status = error.get("code") if isinstance(error, dict) else None
    message = _redact(endpoint, str(error.get("message", error) if isinstance(error, dict) else error))
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        raise BadRequestError(f"{endpoint.provider} refuses: {message}", status)
    raise _Failure(message, status if isinstance(status, int) else None)


def _check_status(endpoint: Endpoint, status: int, headers: httpx.Headers, content: bytes) -> None:
    if 200 <= status < 300:
        return
    message = _redact(endpoint, _error_message(content))
    if status in (408, 429) or status >= 500:
        raise _Failure(f"status {status}: {message}", status, _retry_after(headers.get("retry-after")))
    raise BadRequestError(f"{endpoint.provider} at {endpoint.url} refuses (status {status}): {message}", status)


def _error_message(content: bytes) -> str:
    """What the server says, in OpenAI's, Anthropic's, SGLang's or FastAPI's way; at most 500 characters."""
    text = content[:10_000].decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        return text[:500]
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return str(value)[:500]


def _redact(endpoint: Endpoint, text: str) -> str:
    return text.replace(endpoint.key, "***") if endpoint.key else text


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number or an HTTP date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if seconds == seconds else None


async def _back_off(
    endpoint: Endpoint, path: str, error: Exception, attempts: int, seconds: float, max_retries: int | None
) -> None:
    """Wait before the next attempt, or raise ProviderError when there is none left."""
    reason = _reason(error, seconds)
    if attempts > (endpoint.max_retries if max_retries is None else max_retries):
        raise ProviderError(
            f"{_where(endpoint, path)} failed {attempts} times, at last: {reason}",
            getattr(error, "status", None), attempts,
        ) from error  # fmt: skip
    delay = random.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempts - 1)))
    delay = max(delay, getattr(error, "retry_after", None) or 0.0)
    logger.info("%s: %s; asking again in %.1f s", _where(endpoint, path), reason, delay)
    await anyio.sleep(delay)


def _where(endpoint: Endpoint, path: str) -> str:
    return f"{endpoint.provider} {endpoint.model} at {endpoint.url}{path}"


def _reason(error: Exception, seconds: float) -> str:
    if isinstance(error, TimeoutError | httpx.ReadTimeout):
        return f"no answer in {seconds:g} s"
    return str(error) or type(error).__name__


def _headers(endpoint: Endpoint, headers: Mapping[str, str] | None) -> dict[str, str]:
    if headers is not None:
        return dict(headers)
    return {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}


@asynccontextmanager
async def _client(endpoint: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    """One of this event loop's clients for a server, the first with room; loops cannot share connections."""
    clients = _clients.get({})
    _clients.set(clients)
    own = clients.setdefault((endpoint.url, endpoint.timeout, endpoint.connect_timeout), [])
    client = next((client for client in own if client.in_flight < AT_ONCE), None)
    if client is None:
        client = _Client(_make_client(endpoint))
        own.append(client)
    client.in_flight += 1
    try:
        yield client.http
    finally:
        client.in_flight -= 1


def _make_client(endpoint: Endpoint) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        timeout=httpx.Timeout(endpoint.timeout, connect=endpoint.connect_timeout, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE),
        trust_env=httpx.URL(endpoint.url).host not in LOOPBACK,  # no proxy stands between us and this machine
        verify=endpoint.url.startswith("https"),
    )


async def run_all(functions: Sequence[Callable[[], Coroutine[Any, Any, object]]]) -> None:
    """Run them side by side; the first exception cancels the others and is raised as it is, not in a group."""
    try:
        async with anyio.create_task_group() as tasks:
            for function in functions:
                tasks.start_soon(function)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__


async def close_clients() -> None:
    """Close this event loop's connections; they close with the loop otherwise."""
    clients = _clients.get({})
    for name in list(clients):
        for client in clients.pop(name):
            await client.http.aclose()
