"""The engine's C++ functions (step.cpp), and the threads that they share with torch.

Where there is no compiler the engine decodes with torch operators, to the same numbers.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path

import torch

from rollouts import native


def native_library() -> ctypes.CDLL | None:
    """The compiled functions; None, with a warning, where they cannot be had."""
    return native.native_library(Path(__file__).with_name("step.cpp"))


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    library = ctypes.CDLL(str(native.OPENMP)) if native.OPENMP.exists() else None
    return library if library is not None and hasattr(library, "omp_pause_resource_all") else None


def release_threads() -> None:
    """Give back the threads that torch keeps ready for the calling one; its next parallel operation starts new ones.

    OpenMP keeps a team for every thread that has computed. As soon as the teams together outnumber the cores, none of
    them waits awake any more, and small parallel operations become several times slower. So whoever stops computing
    (a caller that waits for the engine, an engine without work) gives its team back.
    """
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(1)  # omp_pause_soft: settings are kept


def use_huge_pages(x: torch.Tensor) -> None:
    """Ask for memory pages of 2 MB where ``x`` lies, which nobody has touched yet; nothing on a GPU.

    Keys and values of many sequences are read here and there: of small pages the processor knows too few addresses.
    """
    if hasattr(mmap, "MADV_HUGEPAGE") and x.device.type == "cpu":
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = x.data_ptr() + x.nbytes - start
        if length > 0:  # a kernel that has none says so, and nothing is lost
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE))


def sample_rows(
    library: ctypes.CDLL,
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    greedy: torch.Tensor | None,
    uniforms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, log-probs at the sampling temperature and raw ones [B] of rows that sample from their full distribution.

    logits [B, V] and uniforms [B] float32, temperature [B, 1] float32 or None for 1, greedy [B] bool or None.
    """
    rows, vocab_size = logits.shape
    threads = min(torch.get_num_threads(), rows)
    inverse = None if temperature is None else temperature.reciprocal()
    ids = torch.empty(rows, dtype=torch.int64)
    log_probs, raw_log_probs = torch.empty(2, rows, dtype=torch.float32)
    scratch = torch.empty(threads, 2 * vocab_size, dtype=torch.float32)

    def address(x: torch.Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if x is None else x.data_ptr())

    library.sample_rows(
        address(logits), ctypes.c_int64(rows), ctypes.c_int64(vocab_size), address(inverse), address(greedy),
        address(uniforms), address(ids), address(log_probs), address(raw_log_probs), address(scratch),
        ctypes.c_int64(threads),
    )  # fmt: skip
    return ids, log_probs, raw_log_probs
