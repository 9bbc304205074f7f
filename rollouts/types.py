"""What training and inference both speak of: the awaitable result of an operation, and who sampled which tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class WeightSpan:
    """Tokens ``[start, end)`` of a sample were sampled by weights of this version."""

    version: int
    start: int
    end: int


class TrainFuture(Generic[T]):
    """The result of one backend operation: ``await future``, ``await future.result()`` or ``future.wait()``.

    Operations take effect in the order they were submitted, whenever their futures are awaited. ``None`` is a
    value like any other, and an exception raised by the operation is raised again by every way of waiting. A task that
    awaits can be cancelled, which leaves the operation as it is.

    Args:
        operation: name shown in messages, for example ``"forward_backward"``.
    """

    def __init__(self, operation: str = "") -> None:
        self.operation = operation
        self._done = threading.Event()
        self._completing, self._reading = threading.Lock(), threading.Lock()
        self._waiting: list[Callable[[], object]] = []  # wake those that await
        self._value: T | None = None
        self._read: Callable[[], T] | None = None
        self._error: BaseException | None = None

    def set_result(self, value: T) -> None:
        """Complete with ``value``. Raises RuntimeError if already complete."""
        self._complete(value=value)

    def set_lazy_result(self, read: Callable[[], T]) -> None:
        """Complete with a value that is read on first use, so that a GPU is not synchronized before someone looks."""
        self._complete(read=read)

    def set_exception(self, error: BaseException) -> None:
        """Complete with an exception, raised to whoever waits."""
        self._complete(error=error)

    def _complete(
        self, value: T | None = None, read: Callable[[], T] | None = None, error: BaseException | None = None
    ) -> None:
        with self._completing:
            if self._done.is_set():
                raise RuntimeError(f"TrainFuture({self.operation!r}) is already complete")
            self._value, self._read, self._error = value, read, error
            self._done.set()
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            with suppress(RuntimeError):  # the event loop has ended: nobody waits in it
                wake()

    def done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> T:
        """Block until complete and return the value. Raises TimeoutError after ``timeout`` seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"{self.operation or 'operation'} did not complete in {timeout} s")
        if self._error is not None:
            raise self._error
        with self._reading:  # whoever waits, in whatever thread, it is read once
            if self._read is not None:
                self._value, self._read = self._read(), None
        return self._value  # type: ignore[return-value]

    def result(self) -> TrainFuture[T]:
        """The awaitable itself, so that ``await backend.optim_step().result()`` reads as in the field."""
        return self

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done.is_set():
            yield from self._until_done().__await__()
        return self.wait()

    async def _until_done(self) -> None:
        """Wait in the event loop, asyncio's or trio's: a thread that waits could not be cancelled."""
        import anyio
        from anyio.lowlevel import current_token

        loop: Any = current_token().native_token
        call_soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon
        event = anyio.Event()
        with self._completing:
            if self._done.is_set():
                return
            self._waiting.append(lambda: call_soon(event.set))
        await event.wait()

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self.done() else "pending"
        return f"TrainFuture({self.operation!r}, {state})"


class ImmediateTrainFuture(TrainFuture[T]):
    """A future that is complete from the start."""

    def __init__(self, value: T, operation: str = "") -> None:
        super().__init__(operation)
        self.set_result(value)
