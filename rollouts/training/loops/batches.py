"""From samples to micro-batches: who computes what, packed back to back or padded into rows.

Shapes: T tokens of a packed row, B rows, S positions of a padded row, n sequences, N tokens that carry loss.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from rollouts.training.backends.protocol import Batch
from rollouts.training.datasets.dataset_loaders import SampleDataset
from rollouts.training.datasets.packing import best_fit_bins
from rollouts.training.types import Sample


def sample_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """Tokens of each sample, int64 [len]; a tokenized data set knows them without reading any."""
    lengths = getattr(samples, "lengths", None)
    return np.asarray(lengths if lengths is not None else [len(s.tokens) for s in samples], dtype=np.int64)


def plan_micro_batches(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, world_size: int = 1, packing: bool = True
) -> list[list[list[int]]]:
    """Divide the samples of one optimizer step: ``plan[rank][micro_batch]`` lists positions in ``lengths``.

    Every rank gets as many micro-batches as every other (an empty one means: take part, add nothing), of similar size,
    and no micro-batch exceeds ``max_tokens`` unless a single sample does. Every rank computes the same plan, so nothing
    needs to be communicated.

    There are as few micro-batches as best fit needs, but they are filled evenly: a largest one that is smaller takes
    less memory, and a last one that is small costs as many calls as any.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    bins = best_fit_bins(lengths, max_tokens) if packing else _padded_bins(lengths, max_tokens)
    rounds = -(-len(bins) // world_size)
    if packing:
        bins = _spread(lengths, rounds * world_size, max_tokens) or bins
    if world_size > 1:
        bins += [[] for _ in range(rounds * world_size - len(bins))]
        bins.sort(key=lambda b: -int(lengths[b].sum()))
    # Heaviest first, dealt back and forth, so that ranks meet at each exchange with similar work behind them.
    turns = [bins[i : i + world_size] for i in range(0, len(bins), world_size)]
    turns = [turn[::-1] if i % 2 else turn for i, turn in enumerate(turns)]
    return [[turn[rank] for turn in turns] for rank in range(world_size)]


def _spread(lengths: np.ndarray, num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Longest first into the emptiest of ``num_bins`` bins; None when a bin would overflow by it."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, number) for number in range(num_bins)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        load, target = emptiest[0]
        heapq.heapreplace(emptiest, (load + int(lengths[i]), target))
        bins[target].append(i)
    fits = all(load <= max_tokens or len(bins[number]) == 1 for load, number in emptiest)
    return bins if fits else None


def _padded_bins(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Rows of similar length together; rows times the longest stays within ``max_tokens``."""
    bins: list[list[int]] = []
    longest = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        if not bins or (len(bins[-1]) + 1) * longest > max_tokens:
            bins.append([])
            longest = int(lengths[i])
        bins[-1].append(i)
    return bins


def prepare_sft_batch(samples: Sequence[Sample], packing: bool = True) -> Batch:
    """Tensors of one micro-batch.

    Args:
        samples: at least one; ``metadata["segments"]`` (starts of documents within a sample) are isolated too, which
            only packing can do.
        packing: True gives one row [1, T] with ``position_ids`` that restart at each sequence, ``cu_seqlens`` [n+1] and
            ``max_seqlen``; False gives rows [B, S] padded on the right with zeros, which carry no loss.

    Returns:
        ``input_ids``, ``labels`` int64, ``loss_mask`` float32, ``loss_positions`` [N] int64 flat positions of the
        tokens to learn; a sequence's first token carries no loss, for nothing predicts it.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    arrays = [(np.asarray(s.tokens, dtype=np.int64), np.asarray(s.loss_mask, dtype=np.float32)) for s in samples]
    segments = [_segments(s) for s in samples]
    if not packing and any(len(starts) > 1 for starts in segments):
        raise ValueError("a sample of several documents must be packed: in a padded row they would see each other")
    return _packed(arrays, segments) if packing else _padded(arrays)


def collate_batch(samples: Sequence[Sample], batch_size: int, step: int, packing: bool = True) -> Batch:
    """The batch of ``step`` when samples are taken in order, round and round; a pure function of its arguments."""
    start = step * batch_size
    return prepare_sft_batch([samples[(start + i) % len(samples)] for i in range(batch_size)], packing)


def collate_step(
    samples: Sequence[Sample],
    indices: Sequence[int],
    max_tokens: int,
    packing: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """This rank's micro-batches of the optimizer step that learns from ``samples[i] for i in indices``."""
    if isinstance(samples, SampleDataset):
        lengths = samples.lengths[list(indices)]
    else:
        lengths = sample_lengths([samples[i] for i in indices])
    plan = plan_micro_batches(lengths, max_tokens, world_size, packing)[rank]
    return [
        prepare_sft_batch([samples[indices[i]] for i in positions], packing) if positions else empty_batch()
        for positions in plan
    ]


def empty_batch() -> Batch:
    """Two tokens without loss: a rank that has run out of samples still has to take part in the others' exchange."""
    return _packed([(np.zeros(2, np.int64), np.zeros(2, np.float32))], [[0]])


def _segments(sample: Sample) -> list[int]:
    return sample.metadata.get("segments") or [0]


def _packed(arrays: list[tuple[np.ndarray, np.ndarray]], segments: list[list[int]]) -> Batch:
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in arrays)])
    starts = np.concatenate([np.asarray(s) + o for s, o in zip(segments, offsets[:-1], strict=True)])
    bounds = np.append(starts, offsets[-1])
    lengths = np.diff(bounds)
    mask = np.concatenate([m for _, m in arrays])
    mask[starts] = 0.0
    tokens = torch.from_numpy(np.concatenate([t for t, _ in arrays]))[None]
    return {
        "input_ids": tokens,
        "labels": tokens,
        "loss_mask": torch.from_numpy(mask)[None],
        "loss_positions": torch.from_numpy(np.flatnonzero(mask)),
        "position_ids": torch.from_numpy(np.arange(bounds[-1]) - np.repeat(starts, lengths))[None],
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "max_seqlen": int(lengths.max()),
    }


def _padded(arrays: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    width = max(len(tokens) for tokens, _ in arrays)
    tokens, mask = np.zeros((len(arrays), width), np.int64), np.zeros((len(arrays), width), np.float32)
    for row, (t, m) in enumerate(arrays):
        tokens[row, : len(t)], mask[row, : len(m)] = t, m
    mask[:, 0] = 0.0
    return {
        "input_ids": torch.from_numpy(tokens),
        "labels": torch.from_numpy(tokens),
        "loss_mask": torch.from_numpy(mask),
        "loss_positions": torch.from_numpy(np.flatnonzero(mask)),
    }
