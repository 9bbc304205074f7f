"""What this machine can do at best, measured, and the settings that let it."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
import time

import torch


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product; best of a few, measured once a process."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * n**3 / best


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep what tensors on the CPU have freed, for the next step to use again, instead of giving it back.

    A training step frees and asks for the same sizes over and over. Given back to the system, each comes anew as pages
    that must be cleared first: a fifth of a small model's step. Elsewhere than on Linux with glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, largest)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far, in MB: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
