"""Processes that a test may kill: forked from a server that has everything loaded, so that each costs milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import weakref
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess as Process
from typing import Any

KILLED = -9

_context = multiprocessing.get_context("forkserver")


def run(target: Callable[..., None], *args: Any, failpoint: str = "") -> int:
    """``start`` and wait. Returns the exit code: 0, 1 after an exception, -9 when killed."""
    return join([start(target, *args, failpoint=failpoint)])[0]


def start(target: Callable[..., None], *args: Any, failpoint: str = "", **environment: str) -> Process:
    """Run ``target(*args)`` in a process of its own with a failpoint armed; the caller waits for it or kills it."""
    _start_server()
    environment["ROLLOUTS_FAILPOINT"] = failpoint
    process = _context.Process(target=_child, args=(target, args, environment))
    process.start()
    return process


def start_ranks(
    count: int, target: Callable[..., None], *args: Any, failpoint: str = "", armed_rank: int = 0
) -> list[Process]:
    """``start`` ``count`` processes with the environment of torchrun's ranks; the failpoint is armed in one of them."""
    reserved = socket.socket()  # bound, not listening: the first rank alone, which shares addresses too, gets the port
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    port = str(reserved.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    processes = [
        start(target, *args, failpoint=failpoint if rank == armed_rank else "", RANK=str(rank), **place)
        for rank in range(count)
    ]
    weakref.finalize(processes[0], reserved.close)
    return processes


def join(processes: list[Process], timeout: float = 300, grace: float = 60) -> list[int]:
    """Wait for all; once one has failed, kill the others after ``grace`` seconds, as torchrun does.

    Returns:
        The exit codes.
    """
    deadline, failed = time.monotonic() + timeout, False
    while any(process.is_alive() for process in processes):
        if not failed and any(process.exitcode for process in processes):
            deadline, failed = time.monotonic() + grace, True
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            if not failed:
                raise TimeoutError(f"no end after {timeout} s")
        time.sleep(0.003)
    return [process.exitcode or 0 for process in processes]


def _start_server() -> None:
    """Start the server with all that runs need loaded; it looks in PYTHONPATH, not in our ``sys.path``."""
    _context.set_forkserver_preload(["warm"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def _child(target: Callable[..., None], args: tuple, environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*args)
