"""Samples of one prompt packed so that the prompt is computed once: ``[prompt][reply 1][reply 2] ...``.

A reply starts with a copy of the prompt's last token, which predicts its first one; so a token is predicted by the
state before it, as everywhere else, and only attention knows of prefixes (``rollouts.models.packed_attention``).

Worked example: samples ``a b c | d e`` and ``a b c | f`` (learned after the bar) become the row ``a b  c d e  c f``,
``cu_seqlens`` 0 2 5 7, positions 0 1 2 3 4 2 3, prefixes (0, 0) (0, 2) (0, 2).

Shapes: T tokens of the row, n sequences in it, N learned tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from rollouts.training.backends.protocol import Batch
from rollouts.training.loops.batches import plan_micro_batches
from rollouts.training.types import Sample


def shared_prompt_length(samples: Sequence[Sample]) -> int:
    """Leading tokens that all samples have in common and that predict no learned token; 0 for a sample alone."""
    if len(samples) < 2:
        return 0
    most = min(_first_learned(s) - 1 for s in samples)
    if most < 1:
        return 0
    leading = np.stack([np.asarray(s.tokens[:most]) for s in samples])
    differ = np.flatnonzero((leading != leading[0]).any(axis=0))
    return int(differ[0]) if len(differ) else most


def plan_shared_micro_batches(samples: Sequence[Sample], max_tokens: int, world_size: int = 1) -> list[list[list[int]]]:
    """As ``plan_micro_batches``, for samples whose groups share their prompt.

    ``plan[rank][micro_batch]`` lists positions in ``samples``, those of a group side by side; a group too long for one
    micro-batch is divided.
    """
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group_id or f"sample {i}", []).append(i)
    units: list[list[int]] = []
    costs: list[int] = []
    for members in groups.values():
        prompt = shared_prompt_length([samples[i] for i in members])
        room = -1
        for i in members:
            own = len(samples[i].tokens) - prompt
            if own > room:
                units.append([])
                costs.append(prompt)
                room = max_tokens - prompt
            units[-1].append(i)
            costs[-1] += own
            room -= own
    plan = plan_micro_batches(costs, max_tokens, world_size)
    return [[[i for unit in units_here for i in units[unit]] for units_here in rank] for rank in plan]


def prepare_shared_batch(samples: Sequence[Sample]) -> Batch:
    """As ``prepare_sft_batch`` packs, with the prompt of neighbors of one group computed once.

    Returns:
        Its tensors, and ``prefixes`` [n, 2] int32: the tokens of the row that a sequence goes on from, or (0, 0).
        Learned tokens stand in the samples' order.
    """
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    prefixes: list[tuple[int, int]] = []
    length = 0

    def append(piece: np.ndarray, mask: np.ndarray, start: int, prefix: tuple[int, int]) -> None:
        nonlocal length
        mask[:1] = 0.0  # nothing in the row predicts a sequence's first token
        tokens.append(piece)
        masks.append(mask)
        positions.append(np.arange(start, start + len(piece)))
        prefixes.append(prefix)
        length += len(piece)

    for _, neighbors in groupby(enumerate(samples), key=lambda pair: pair[1].group_id or pair[0]):
        group = [sample for _, sample in neighbors]
        shared = shared_prompt_length(group)
        prefix = (length, length + shared) if shared else (0, 0)
        if shared:
            append(np.asarray(group[0].tokens[:shared], np.int64), np.zeros(shared, np.float32), 0, (0, 0))
        for sample in group:
            ids, mask = np.asarray(sample.tokens, np.int64), np.asarray(sample.loss_mask, np.float32)
            append(ids[shared:], mask[shared:].copy(), shared, prefix)

    mask = np.concatenate(masks)
    lengths = [len(piece) for piece in tokens]
    row = torch.from_numpy(np.concatenate(tokens))[None]
    return {
        "input_ids": row,
        "labels": row,
        "loss_mask": torch.from_numpy(mask)[None],
        "loss_positions": torch.from_numpy(np.flatnonzero(mask)),
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        "max_seqlen": max(n + end - start for n, (start, end) in zip(lengths, prefixes)),
        "prefixes": torch.tensor(prefixes, dtype=torch.int32),
    }


def _first_learned(sample: Sample) -> int:
    """Index of the first token that carries loss; the number of tokens when none does."""
    learned = np.flatnonzero(np.asarray(sample.loss_mask, np.float32)[1:])
    return int(learned[0]) + 1 if len(learned) else len(sample.tokens)
