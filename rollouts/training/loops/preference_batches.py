"""From preference pairs to micro-batches: both answers of a pair side by side, their prompt computed once.

Shapes: P pairs, S sequences, T tokens of a packed row, N learned tokens of it, n learned tokens of one answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rollouts.training import distributed_utils as ranks
from rollouts.training.backends.protocol import Batch
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.preferences import PreferencePair
from rollouts.training.loops.batches import plan_micro_batches
from rollouts.training.loops.rl_batches import learned_positions, prepare_rl_batch
from rollouts.training.loops.shared_prompts import shared_prompt_length
from rollouts.training.types import Sample

_ITEMS_AT_ONCE = 256  # whose micro-batches are made at once when a whole data set is measured


@dataclass(frozen=True)
class PreferenceItem:
    """What a step learns from as one: the two answers to a prompt (the better one first), or a single answer.

    Attributes:
        desirable: for each answer whether it is a good one.
        ref_log_probs: for each answer, the reference's log-probs of its learned tokens, float32 [n]; None without one.
        mismatched: the same prompt with another's answers, of which KTO takes its reference point.
    """

    answers: tuple[Sample, ...]
    desirable: tuple[bool, ...]
    ref_log_probs: tuple[np.ndarray, ...] | None = None
    mismatched: PreferenceItem | None = None

    @classmethod
    def of(cls, pair: PreferencePair) -> PreferenceItem:
        labels = [(s, label) for s, label in ((pair.chosen, True), (pair.rejected, False)) if s is not None]
        return cls(tuple(s for s, _ in labels), tuple(label for _, label in labels))

    def __len__(self) -> int:
        return sum(len(s) for s in self.answers)


def collate_items(
    items: Sequence[PreferenceItem], max_tokens: int, share_prompts: bool = True, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This rank's micro-batches of the step that learns from ``items``; an item is never divided."""
    plan = _plan(items, max_tokens, share_prompts, world_size)[rank]
    return [prepare_preference_batch([items[i] for i in members], share_prompts) for members in plan]


def prepare_preference_batch(items: Sequence[PreferenceItem], share_prompts: bool = True) -> Batch:
    """Tensors of one packed micro-batch.

    Returns:
        What ``prepare_rl_batch`` gives of the answers in order, ``ref_log_probs`` [N] float32 where the items have
        them, and ``desirable`` [S] bool. Of pairs, sequence 2p is the chosen answer and 2p + 1 the rejected one.
    """
    answers = [s for item in items for s in item.answers]
    columns = {}
    if all(item.ref_log_probs is not None for item in items):
        columns["ref_log_probs"] = [x for item in items for x in item.ref_log_probs or ()]
    batch = dict(prepare_rl_batch(answers, columns, share_prompts))
    batch["desirable"] = torch.tensor([d for item in items for d in item.desirable], dtype=torch.bool)
    return batch


def measure_log_probs(
    backend: PyTorchTrainingBackend, items: Sequence[PreferenceItem], max_tokens: int, share_prompts: bool = True
) -> list[tuple[np.ndarray, ...]]:
    """For each item, the log-probs of each answer's learned tokens, float32 [n]; on every rank those of all items."""
    mine: dict[int, tuple[np.ndarray, ...]] = {}
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        part = items[start : start + _ITEMS_AT_ONCE]
        plan = _plan(part, max_tokens, share_prompts, backend.world_size)[backend.rank]
        batches = [
            prepare_rl_batch([s for i in members for s in part[i].answers], {}, share_prompts) for members in plan
        ]
        for members, values in zip(plan, backend.compute_log_probs(batches).wait(), strict=True):
            counts = [len(learned_positions(s)) for i in members for s in part[i].answers]
            found = iter(np.split(values.float().cpu().numpy(), np.cumsum(counts)[:-1]) if counts else ())
            mine |= {start + i: tuple(next(found) for _ in part[i].answers) for i in members}
    everyones = {i: x for theirs in ranks.all_gather(mine) for i, x in theirs.items()}
    return [everyones[i] for i in range(len(items))]


def with_mismatched(items: Sequence[PreferenceItem]) -> list[PreferenceItem]:
    """The items, each with its prompt and the answers of the next item as ``mismatched``."""
    out = []
    for item, other in zip(items, [*items[1:], *items[:1]], strict=True):
        last = len(other.answers) - 1
        answers = tuple(_exchange_answer(s, other.answers[min(k, last)]) for k, s in enumerate(item.answers))
        out.append(replace(item, mismatched=PreferenceItem(answers, item.desirable)))
    return out


def _exchange_answer(sample: Sample, other: Sample) -> Sample:
    """The prompt of ``sample`` and the answer of ``other``; all that follows a prompt's last token is answer."""
    start, other_start = int(learned_positions(sample)[0]), int(learned_positions(other)[0])
    return replace(
        sample,
        tokens=[*sample.tokens[:start], *other.tokens[other_start:]],
        loss_mask=[*sample.loss_mask[:start], *other.loss_mask[other_start:]],
    )


def content_key(items: Sequence[PreferenceItem]) -> int:
    """A number of 63 bits that changes with any token or mask of the items."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        for s in item.answers:
            digest.update(np.asarray(s.tokens, np.int64).tobytes() + np.asarray(s.loss_mask, np.float32).tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def _plan(
    items: Sequence[PreferenceItem], max_tokens: int, share_prompts: bool, world_size: int
) -> list[list[list[int]]]:
    shared = [shared_prompt_length(item.answers) if share_prompts else 0 for item in items]
    costs = [n + sum(len(s) - n for s in item.answers) for n, item in zip(shared, items, strict=True)]
    return plan_micro_batches(costs, max_tokens, world_size)
