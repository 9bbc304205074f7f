"""A process that calls reward functions for another: one request in, one answer out, for as long as its parent lives.

    parent ──(pickled: sys.path, modules made from files, functions)──► worker: loads and prepares them, says "ready"
    parent ──(pickled: number of a function, a sample)────────────────► worker: calls it, answers {"value": ...} or
                                                                        {"raised": ...} as JSON
    parent's end of the lifeline closes (however it died) ─────────────► the kernel kills the worker's process group

The answers are JSON, so that nothing a reward function made is unpickled by the trainer. What it prints goes to stderr.
"""

from __future__ import annotations

import fcntl
import functools
import inspect
import json
import math
import numbers
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

HEADER = struct.Struct("!Q")  # length of the message that follows


def main() -> None:
    """Serve until the parent hangs up. Arguments: sys.path as JSON, descriptors of the socket and of the lifeline."""
    channel = socket.socket(fileno=int(sys.argv[2]))
    die_with_parent(int(sys.argv[3]))
    os.dup2(2, 1)
    try:
        functions = _load(_receive(channel))
    except BaseException as e:
        _send(channel, {"failed": describe(e)})
        return
    _send(channel, {"ready": True})
    while (message := _receive(channel)) is not None:
        try:
            number, sample = pickle.loads(message)
            answer: dict[str, Any] = {"value": checked(call(functions[number], sample))}
        except NotAReward as e:
            answer = {"invalid": str(e)}
        except SystemExit as e:
            answer = {"exited": describe(e)}
        except BaseException as e:
            answer = {"raised": describe(e)}
        _send(channel, answer)


def die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process group when the last writer of the pipe ``lifeline`` is gone.

    Signal-driven input works while Python code or a library holds the interpreter's lock, and unlike the parent-death
    signal it does not fire when merely the thread that started this process ends. Where the kernel has no such thing,
    a thread watches the pipe.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([lifeline], [], [], 0)[0]:  # the parent died before the kernel was told
            os.killpg(0, signal.SIGKILL)
        return

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class NotAReward(Exception):
    """What a reward function gave back is no reward; the message says what it was."""


def unwrapped(function: Any) -> Any:
    """The function inside ``functools.partial``s."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def prepare(function: Callable[..., Any]) -> None:
    """Load what takes long before the first sample's time begins: what its ``prepare`` loads, or an event loop."""
    options = getattr(function, "keywords", {})  # of a functools.partial
    function = unwrapped(function)
    if ready := getattr(function, "prepare", None):
        ready(**options)
    if inspect.iscoroutinefunction(function):
        import anyio
        import anyio.lowlevel

        anyio.run(anyio.lowlevel.checkpoint)


def call(function: Callable[[Any], Any], sample: Any) -> Any:
    """``function(sample)``, in an event loop of its own where it is async."""
    value = function(sample)
    if isinstance(value, Awaitable):
        import anyio

        async def wait() -> Any:
            return await value

        return anyio.run(wait)
    return value


def checked(value: Any) -> float | dict[str, float]:
    """A reward as a float or a dict of floats.

    Raises:
        NotAReward: not a number (a bool is one, a scalar of NumPy or torch too), or not finite.
    """
    if isinstance(value, dict):
        if not value:
            raise NotAReward("an empty dict")
        if odd := [k for k in value if not isinstance(k, str)]:
            raise NotAReward(f"a dict with the key {odd[0]!r:.60}")
        return {k: _number(v, f"{k} = ") for k, v in value.items()}
    return _number(value)


def _number(value: Any, place: str = "") -> float:
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise NotAReward(f"{place}{value!r:.60} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        raise NotAReward(f"{place}a number beyond the range of a float") from None
    if not math.isfinite(number):
        raise NotAReward(f"{place}{number}")
    return number


def describe(error: BaseException) -> str:
    """An exception on one line of at most 300 characters."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its message cannot be shown)"
    return f"{type(error).__name__}: {text}"[:300]


def _load(message: bytes | None) -> list[Callable[..., Any]]:
    from rollouts.training.functions import make_module

    modules, functions = pickle.loads(message or b"")
    for name, (path, source) in modules.items():
        make_module(name, path, source)
    loaded = pickle.loads(functions)
    for function in loaded:
        prepare(function)
    return loaded


def _receive(channel: socket.socket) -> bytes | None:
    header = _exactly(channel, HEADER.size)
    return None if header is None else _exactly(channel, HEADER.unpack(header)[0])


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def _send(channel: socket.socket, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode(errors="replace")
    channel.sendall(HEADER.pack(len(data)) + data)


if __name__ == "__main__":
    main()
