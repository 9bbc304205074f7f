"""Small tools of structured concurrency: many calls side by side, sync or async functions, and retries."""

from __future__ import annotations

import inspect
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel

from rollouts.errors import RunError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

MAX_BACKOFF_S = 60.0


async def gather(function: Callable[[T], Awaitable[R]], items: Iterable[T]) -> list[R]:
    """``function`` of every item, all at once; results in the items' order.

    The first that fails cancels the others, and its exception is raised as it is, outside any group.
    """
    items = list(items)
    results: dict[int, R] = {}
    first_error: list[Exception] = []

    async def run(index: int, item: T) -> None:
        try:
            results[index] = await function(item)
        except Exception as error:
            first_error.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for index, item in enumerate(items):
            tasks.start_soon(run, index, item)
    if first_error:
        raise first_error[0]
    return [results[index] for index in range(len(items))]


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an async function here and any other in a thread of its own.

    A thread cannot be stopped: when the caller is cancelled, nobody waits for it any more, not even the process's end.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return await function(*args, **kwargs)
    done = anyio.Event()
    token = anyio.lowlevel.current_token()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((function(*args, **kwargs), None))
        except BaseException as error:
            outcome.append((None, error))
        with suppress(RuntimeError, anyio.RunFinishedError):  # the event loop has ended: nobody waits
            anyio.from_thread.run_sync(done.set, token=token)

    threading.Thread(target=run, name=f"call {getattr(function, '__name__', function)}", daemon=True).start()
    await done.wait()
    value, error = outcome[0]
    if error is not None:
        raise error
    return await value if inspect.isawaitable(value) else value


def is_permanent(error: BaseException) -> bool:
    """Whether trying again is pointless: our own refusals, and a server's 4xx but 408 (time-out) and 429 (too many)."""
    if isinstance(error, UserError):
        return True
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


async def persist(attempt: Callable[[], Awaitable[T]], max_retries: int = 5, first: float = 0.5) -> T:
    """``attempt()``, again after a growing wait when it fails; raises what no retry mends, and the last failure."""
    failures = 0
    while True:
        try:
            return await attempt()
        except Exception as error:
            if is_permanent(error) or isinstance(error, RunError) or failures == max_retries:
                raise
            logger.warning("failed and is tried again: %r", error)
            await anyio.sleep(backoff(failures, first))
            failures += 1


def backoff(attempt: int, first: float) -> float:
    """Seconds to wait before retry ``attempt`` (from 0): ``first`` doubled each time, up to a minute, ±50 %."""
    return min(first * 2**attempt, MAX_BACKOFF_S) * random.uniform(0.5, 1.5)
