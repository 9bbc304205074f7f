"""Worker processes for reward functions: started when needed, killed when late, never left behind.

idle ──acquire──► busy ──answer in time──► idle
                   └──late, cancelled, gone──► killed with everything it started; the next acquire starts another
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import anyio

from rollouts.errors import UserError
from rollouts.training.functions import MADE_MODULES
from rollouts.training.rewards.worker import HEADER
from rollouts.training.types import Sample

SECONDS_TO_START = 120.0  # importing a user's module (torch, a parser) on a busy machine takes its time
_MAX_ANSWER = 1 << 20
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rollouts.training.rewards import worker; worker.main()"
)


class WorkerDied(Exception):
    """The worker process ended while it was asked; the message says how."""


class Unsendable(Exception):
    """A sample that cannot be copied to another process; the message says why."""


class ProcessPool:
    """Workers that know the same functions. How many there are is up to how many ``ask`` at once.

    Raises:
        UserError: a function can neither be found by name in another process nor be copied there.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._program = _pack_functions(functions)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    async def ask(self, number: int, sample: Sample, timeout: float) -> dict[str, Any]:
        """What function ``number`` says of ``sample``: ``{"value": ...}``, ``{"raised": ...}``, ``{"invalid": ...}``
        or ``{"exited": ...}``. The time a new worker needs to start does not count.

        Raises:
            TimeoutError: no answer in ``timeout`` seconds; the worker is dead by then, and what it had started.
            WorkerDied: it ended without an answer.
            UserError: a new worker cannot load the functions.
            Unsendable: the sample cannot be copied to another process.
        """
        message = _pack_request(number, sample)
        worker = self._take_idle() or self._start()
        try:
            if not worker.loaded:
                await worker.load(self._program)
            with anyio.fail_after(timeout):
                answer = await worker.ask(message)
        except BaseException:
            self._end(worker)
            raise
        self._idle.append(worker)
        return answer

    def _take_idle(self) -> _Worker | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.how_it_ended() is None:
                return worker
            self._end(worker)  # it died of something else since: not the next sample's fault
        return None

    def _start(self) -> _Worker:
        worker = _Worker()
        self._all.add(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        self._all.discard(worker)
        worker.kill()

    def close(self) -> None:
        """Kill every worker."""
        for worker in self._all:
            worker.kill()
        self._all.clear()
        self._idle.clear()


class _Worker:
    """One process; everything but waiting for it is done at once, so that a cancellation leaves nothing half-made."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        try:
            # Its own session: killing the group takes what the reward started along, and Ctrl-C at the terminal does
            # not reach it before the trainer has decided.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                env=environment,
            )
        except BaseException:
            self._channel.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        self._channel.setblocking(False)
        self.loaded = False

    async def load(self, program: bytes) -> None:
        """Send the functions and wait until they are loaded."""
        try:
            with anyio.fail_after(SECONDS_TO_START):
                answer = await self.ask(program)
        except TimeoutError:
            raise UserError(f"reward: its module did not load in {SECONDS_TO_START:g} s in a worker process") from None
        if "failed" in answer:
            raise UserError(
                f"reward: a worker process cannot load it ({answer['failed']}); importable functions load anywhere, "
                'isolation="thread" needs no loading'
            )
        self.loaded = True

    async def ask(self, message: bytes) -> dict[str, Any]:
        try:
            await self._send(HEADER.pack(len(message)) + message)
            size = HEADER.unpack(await self._exactly(HEADER.size))[0]
            if size > _MAX_ANSWER:
                raise WorkerDied(f"the worker's answer has {size:,} bytes")
            return json.loads(await self._exactly(size))
        except (ConnectionError, EOFError, ValueError) as e:
            # The channel closes a moment before the process is gone.
            for _ in range(100):
                if how := self.how_it_ended():
                    raise WorkerDied(how) from None
                await anyio.sleep(0.01)
            raise WorkerDied(f"the process broke its connection ({type(e).__name__})") from None

    async def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._channel.send(rest) :]
            except BlockingIOError:
                await anyio.wait_writable(self._channel)

    async def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._channel.recv(size - len(data))
            except BlockingIOError:
                await anyio.wait_readable(self._channel)
                continue
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def how_it_ended(self) -> str | None:
        """How the process ended, None while it lives. It is looked at, not collected: its id must stay its own until
        its group has been killed."""
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is None:
            return None
        exited = found.si_code == os.CLD_EXITED
        return f"the process {'exited with code' if exited else 'was killed by signal'} {found.si_status}"

    def kill(self) -> None:
        """Kill the process and all that it started; does nothing the second time."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()
        os.close(self._lifeline)


def _pack_functions(functions: Sequence[Callable[..., Any]]) -> bytes:
    """Functions for another process: by name where they can be imported there, else copied with what they refer to."""
    try:
        packed = pickle.dumps(list(functions))
    except Exception:  # lambdas and closures, for which pickle has several exceptions
        packed = None
    if packed is None or b"__main__" in packed:  # __main__ is another module in another process
        import dill  # type: ignore[import-untyped]

        try:
            packed = dill.dumps(list(functions), recurse=True)
        except Exception as e:
            raise UserError(
                f"reward: it cannot be copied to a worker process ({type(e).__name__}: {str(e)[:200]}); put it into a "
                'module of its own, or run it in this process with isolation="thread"'
            ) from e
    return pickle.dumps(({n: m for n, m in MADE_MODULES.items() if n.encode() in packed}, packed))


def _pack_request(number: int, sample: Sample) -> bytes:
    """The request of ``ask``; tensors and arrays go as lists, so that a worker needs no torch to read them."""
    plain = copy.copy(sample)
    for name in ("tokens", "loss_mask", "rollout_log_probs", "advantages"):
        values = getattr(plain, name)
        if hasattr(values, "tolist"):
            setattr(plain, name, values.tolist())
    try:
        return pickle.dumps((number, plain))
    except Exception as e:
        raise Unsendable(f"{type(e).__name__}: {str(e)[:200]}") from e
