"""From rollouts to micro-batches of a policy update: what is learned from, who computes what, packed back to back.

Shapes: S sequences, T tokens of a packed row, N learned tokens of it, n_i learned tokens of sample i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from rollouts.training.backends.protocol import Batch
from rollouts.training.loops.batches import empty_batch, plan_micro_batches, prepare_sft_batch, sample_lengths
from rollouts.training.loops.shared_prompts import plan_shared_micro_batches, prepare_shared_batch
from rollouts.training.types import Sample, SampleStatus

Columns = Mapping[str, Sequence[np.ndarray]]
"""Per-token quantities that are no field of ``Sample``, by the loss's name for them: one array [n_i] a sample."""


def learned_positions(sample: Sample) -> np.ndarray:
    """Indices [n_i] int64 of the tokens that carry loss; never the first, which nothing predicts."""
    return np.flatnonzero(np.asarray(sample.loss_mask, dtype=np.float32)[1:]) + 1


def as_arrays(sample: Sample) -> Sample:
    """The sample with an array for each list of its tokens, so that a step converts every list once.

    Nobody else sees it: rewards, logs and checkpoints have lists.
    """
    known = sample.rollout_log_probs
    return replace(
        sample,
        tokens=np.asarray(sample.tokens, np.int64),  # type: ignore[arg-type]
        loss_mask=np.asarray(sample.loss_mask, np.float32),  # type: ignore[arg-type]
        rollout_log_probs=None if known is None else np.asarray(known, np.float32),  # type: ignore[arg-type]
    )


def is_learnable(sample: Sample) -> bool:
    """Whether a policy can learn from it: it ended, it was judged, and some token of it was sampled.

    A sample whose reward failed has none (or one that is not a number); it is left out, never scored 0.
    """
    ended = sample.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)
    return ended and sample.reward is not None and math.isfinite(sample.reward) and sample.num_loss_tokens > 0


def compute_reward(sample: Sample) -> float:
    """1.0 if ``metadata["correct"]``, else 0.0."""
    return 1.0 if sample.metadata.get("correct") else 0.0


def prepare_rl_batch(samples: Sequence[Sample], columns: Columns | None = None, share_prompts: bool = True) -> Batch:
    """Tensors of one packed micro-batch of a policy update.

    Args:
        samples: none gives a batch that adds nothing, for a rank that has run out of samples. ``advantages`` and
            ``rollout_log_probs`` are taken from those that all have them.
        columns: further quantities for the loss (``old_log_probs``, ``ref_log_probs``, ``values``, ``returns``,
            ``token_weights``), one array [n_i] a sample.
        share_prompts: compute the prompt of neighbors of one group once.

    Returns:
        What ``prepare_sft_batch`` or ``prepare_shared_batch`` gives, ``sequence_ids`` [N] int64, and each quantity [N]
        float32, all aligned with ``loss_positions``.
    """
    prepare = prepare_shared_batch if share_prompts else prepare_sft_batch
    batch = dict(prepare(samples) if samples else empty_batch())
    positions = [learned_positions(s) for s in samples]
    counts = [len(p) for p in positions]
    batch["sequence_ids"] = torch.from_numpy(np.repeat(np.arange(len(samples)), counts))
    fields: dict[str, Sequence[np.ndarray]] = {}
    for name in ("advantages", "rollout_log_probs"):
        values = [getattr(s, name) for s in samples]
        if all(v is not None for v in values):
            fields[name] = [np.asarray(v, np.float32)[p] for v, p in zip(values, positions)]
    for name, arrays in {**fields, **(columns or {})}.items():
        assert [len(a) for a in arrays] == counts, f"{name} has {[len(a) for a in arrays]} values for {counts} tokens"
        flat = np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
        batch[name] = torch.from_numpy(flat if flat.dtype == np.bool_ else flat.astype(np.float32, copy=False))
    return batch


def collate_rl_step(
    samples: Sequence[Sample],
    indices: Sequence[int],
    max_tokens: int,
    columns: Columns | None = None,
    rank: int = 0,
    world_size: int = 1,
    share_prompts: bool = True,
) -> tuple[list[Batch], list[list[int]]]:
    """This rank's micro-batches of a pass over ``samples[i] for i in indices``, and the indices that each holds.

    ``columns`` speak of all ``samples``. Every rank gets as many micro-batches as every other.
    """
    given = [samples[i] for i in indices]
    if share_prompts:
        plan = plan_shared_micro_batches(given, max_tokens, world_size)[rank]
    else:
        plan = plan_micro_batches(sample_lengths(given), max_tokens, world_size)[rank]
    members = [[indices[p] for p in positions] for positions in plan]
    batches = [
        prepare_rl_batch(
            [samples[i] for i in chosen],
            {name: [c[i] for i in chosen] for name, c in (columns or {}).items()},
            share_prompts,
        )
        for chosen in members
    ]
    return batches, members


def draw_mini_batches(samples: Sequence[Sample], mini_batches: int, seed: Sequence[int]) -> list[list[int]]:
    """Indices of ``samples`` in ``mini_batches`` parts of nearly equal size, none of them empty.

    Groups are drawn in random order, their samples side by side, for they share a prompt; one part keeps the given
    order. ``seed`` makes the division the same on every rank and after a resume.
    """
    if not samples:
        return []
    if mini_batches == 1:
        return [list(range(len(samples)))]
    groups = group_samples(samples)
    place = {id(sample): i for i, sample in enumerate(samples)}
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    indices = np.array([place[id(sample)] for g in order for sample in groups[g]])
    return [part.tolist() for part in np.array_split(indices, min(mini_batches, len(samples)))]


def group_samples(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples by ``group_id``, groups in order of their first sample; a sample without one is a group of its own."""
    groups: dict[str, list[Sample]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group_id or f"\0{i}", []).append(sample)
    return list(groups.values())
