"""Starts training runs in processes of their own, on one rank or two, and brings them to the end that a test wants."""

from __future__ import annotations

import random
import resource
import shutil
import time

import driver
from training_run import Run, train


def finish(run: Run, mutant: str = "") -> None:
    """Do what is left of the run."""
    assert set(_run(run, mutant)) == {0}, log_of(run)


def kill(run: Run, failpoint: str, mutant: str = "", rank: int = 0) -> None:
    """Start the run and let ``rank`` kill itself at a failpoint."""
    codes = _run(run, mutant, failpoint=f"{failpoint}=kill", rank=rank)
    assert codes[rank] == driver.KILLED, log_of(run)


def fail(run: Run, failpoint: str = "", file_size_limit: int = resource.RLIM_INFINITY) -> str:
    """Start the run and let it meet an error that is the user's to mend; returns its one line."""
    codes = _run(run, "", file_size_limit, failpoint=failpoint)
    assert set(codes) == {2}, log_of(run)
    error = (run.folder / "error.txt").read_text()
    assert error and "\n" not in error
    return error


def kill_at_random(run: Run, rng: random.Random) -> None:
    """Kill a rank of a run of many steps at a moment after the first step, wherever that falls."""
    for _ in range(10):
        processes = _start(run)
        while not (run.folder / "metrics.jsonl").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.4))
        victim = rng.randrange(len(processes))
        processes[victim].kill()
        if driver.join(processes)[victim] == driver.KILLED:
            return
        shutil.rmtree(run.folder)  # it had ended: this process slept too long on a busy machine
    raise AssertionError("the run always ended before it was killed: make it longer")


def log_of(run: Run) -> str:
    return (run.folder / "log.txt").read_text()


def _run(run: Run, *args: object, failpoint: str = "", rank: int = 0) -> list[int]:
    return driver.join(_start(run, *args, failpoint=failpoint, rank=rank))


def _start(run: Run, *args: object, failpoint: str = "", rank: int = 0) -> list[driver.Process]:
    if run.ranks == 1:
        return [driver.start(train, run, *args, failpoint=failpoint)]
    return driver.start_ranks(run.ranks, train, run, *args, failpoint=failpoint, armed_rank=rank)
