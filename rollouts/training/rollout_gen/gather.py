"""Side by side: one function over many items, in structured concurrency."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import anyio

T = TypeVar("T")
R = TypeVar("R")


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
