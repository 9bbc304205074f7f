"""Steps of rows that only decode, each as one compiled call: forward pass, sampling, and what is written down of it.

Most steps are such ones, and in a small model a few Python statements take as long as a row does.
"""

from __future__ import annotations

import ctypes

import numpy as np

from rollouts.inference.kv_cache import KVCache
from rollouts.inference.model_runner import NativeForward
from rollouts.inference.sequences import Rows

_ARRAYS = (
    "tokens", "log_probs", "raw_log_probs", "num_prompt", "num_tokens", "num_computed", "max_length", "random_start",
    "stop_ids", "temperature", "greedy", "watched",
)  # fmt: skip


class _RowStates(ctypes.Structure):
    """``RowStates`` of step.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("longest", "num_stop_ids", *_ARRAYS)]


class NativeDecode:
    """Gives each of some rows, all of which sample from their full distributions, its next token."""

    def __init__(self, forward: NativeForward, rows: Rows, cache: KVCache) -> None:
        self._forward, self._rows, self._cache = forward, rows, cache
        address, count = ctypes.c_void_p, ctypes.c_int64
        self._decode = forward.library.decode_bfloat16 if forward.bfloat16 else forward.library.decode_float32
        self._decode.argtypes = (address, address, count, address, address, count, address, address, address)
        self._decode.restype = count
        self._states = _RowStates()
        self._which = np.empty(0, np.int64)
        self._flags = np.empty(0, np.uint8)
        self._generation = -1  # of the rows that ``_states`` and the addresses below speak of
        self._address_of_which = self._address_of_flags = 0

    def __call__(self, which: np.ndarray) -> np.ndarray | None:
        """Flags [D] of ``which`` [D], as ``Scheduler.append`` gives them; None if there are none."""
        if which is not self._which or self._generation != self._rows.generation:
            self._point(which)
        count = len(which)
        model, logits, memory = self._forward.prepare(self._cache, count, count)
        table = self._cache.page_table
        flagged = self._decode(
            ctypes.addressof(model), ctypes.addressof(self._states), count, self._address_of_which,
            table.ctypes.data, table.shape[1], logits, self._address_of_flags, memory,
        )  # fmt: skip
        self._forward.end_step()
        return self._flags if flagged else None

    def _point(self, which: np.ndarray) -> None:
        """Write down where everything lies; it stays there while the same rows decode."""
        rows, states = self._rows, self._states
        self._which, self._generation = which, rows.generation
        self._flags = np.zeros(len(which), np.uint8)
        self._address_of_which, self._address_of_flags = which.ctypes.data, self._flags.ctypes.data
        states.longest, states.num_stop_ids = rows.tokens.shape[1], rows.stop_ids.shape[1]
        for name in _ARRAYS:
            setattr(states, name, getattr(rows, name).ctypes.data)
