"""Calling a function in an event loop, asyncio's or trio's, from the engine's thread without waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Wake = Callable[[Callable[[], object]], object]


def current_wake() -> Wake:
    """How other threads run a function soon in the event loop that runs now."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon


def call_now(function: Callable[[], object]) -> None:
    """The wake of those that wait in a thread: the function itself is safe to call from any."""
    function()
