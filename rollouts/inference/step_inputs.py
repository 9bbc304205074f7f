"""A step's plan as tensors: array operations over the rows' state, then one copy to the device."""

from __future__ import annotations

import numpy as np
import torch

from rollouts.inference.attention import Chunk, Reads, Step
from rollouts.inference.kv_cache import PAGE_SIZE, KVCache
from rollouts.inference.scheduler import Plan
from rollouts.inference.sequences import Rows


def make_step(plan: Plan, rows: Rows, cache: KVCache, device: torch.device, with_reads: bool) -> Step:
    """The tokens that ``plan`` computes and the pages that they write, and if asked those that they read."""
    lengths = np.array([end - start for _, start, end in plan.chunks], np.int64)
    positions = rows.num_computed[plan.decoding]
    row_of = plan.decoding
    if len(lengths):
        positions = np.concatenate((positions, *(np.arange(start, end) for _, start, end in plan.chunks)))
        row_of = np.concatenate((row_of, np.repeat([row for row, _, _ in plan.chunks], lengths)))

    num_decode = len(plan.decoding)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(device, non_blocking=True)

    chunks = []
    first = num_decode
    for row, start, end in plan.chunks:
        pages = cache.page_table[row, : -(-end // PAGE_SIZE)]
        chunks.append(Chunk(first, end - start, start, tensor(pages)))
        first += end - start
    return Step(
        token_ids=tensor(rows.tokens[row_of, positions]),
        positions=tensor(positions),
        pages=tensor(cache.page_table[row_of, positions // PAGE_SIZE]),
        offsets=tensor(positions % PAGE_SIZE),
        rows=tensor(row_of),
        num_decode=num_decode,
        reads=Reads(*map(tensor, _reads(plan.decoding, positions[:num_decode], cache))) if with_reads else None,
        chunks=chunks,
        outputs=tensor(plan.outputs),
    )


def _reads(rows: np.ndarray, positions: np.ndarray, cache: KVCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of the decoding tokens reads which page, and where that page begins: three arrays [N]."""
    counts = positions // PAGE_SIZE + 1
    which = np.repeat(np.arange(len(rows)), counts)
    nth = np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts)
    return which, cache.page_table[rows[which], nth], nth * PAGE_SIZE
