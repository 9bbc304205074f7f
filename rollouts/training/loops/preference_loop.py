"""Learning from preferences: DPO, IPO, KTO, SimPO and ORPO, over pairs that exist already.

once:  pairs --> reference log-probs (the model before training) --> beside the checkpoints
then:  the loop of supervised fine-tuning, over items that carry those log-probs

Shapes: N learned tokens of a micro-batch, S answers of a step, n learned tokens of one answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollouts.errors import UserError
from rollouts.training import distributed_utils as ranks
from rollouts.training.algorithms.preference import PreferenceConfig, kto_reference_point, make_preference_loss
from rollouts.training.backends.protocol import Batch
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.checkpoints import CheckpointError, list_steps, read_tensors, write_tensors
from rollouts.training.datasets.preferences import PreferencePair
from rollouts.training.loops.preference_batches import (
    PreferenceItem,
    collate_items,
    content_key,
    measure_log_probs,
    with_mismatched,
)
from rollouts.training.loops.sft_loop import run_gradient_steps
from rollouts.training.metrics import MetricsLogger
from rollouts.training.types import SFTTrainingConfig

log = logging.getLogger(__name__)

REFERENCE_FILE = "reference_log_probs.safetensors"


@dataclass(frozen=True)
class PreferenceTrainingConfig(SFTTrainingConfig):
    """As ``SFTTrainingConfig``; ``batch_size`` counts pairs (or single answers), and they are always packed.

    Args:
        loss: which preference loss, and its constants.
        share_prompts: compute the prompt of a pair once for both answers.
    """

    loss: PreferenceConfig = field(default_factory=PreferenceConfig)
    share_prompts: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.packing:
            raise UserError("preference training packs the answers of a step: leave train.packing at true")


async def run_preference_training(
    backend: PyTorchTrainingBackend,
    pairs: Sequence[PreferencePair],
    config: PreferenceTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    validation: Sequence[PreferencePair] | None = None,
    resume: bool = True,
) -> list[dict[str, Any]]:
    """Train on ``pairs`` for ``config.num_steps`` optimizer steps; checkpoints, resume and validation as in SFT.

    The reference of DPO, IPO and KTO is the model as ``backend`` holds it when the run begins: its log-probs are
    computed once, before the first step, and kept beside the checkpoints, so no second model stays in memory. (A fresh
    LoRA adapter changes nothing, so under LoRA that is the base model.) Sets ``backend.loss_fn``.

    Args:
        pairs: two answers each; for KTO also single ones.
        validation: pairs whose loss and metrics (``val_accuracy``, ...) are measured every ``config.eval_every`` steps
            and at the end.

    Returns:
        The metrics of each step, as ``run_sft_training`` does; of pairs also ``accuracy`` (the chosen answer is ahead),
        ``reward_chosen``, ``reward_rejected``, ``reward_margin`` (implicit rewards) and the answers' mean log-probs.

    Raises:
        UserError: no pairs, a single answer where the loss needs two, or an answer without a learned token.
    """
    backend.loss_fn = make_preference_loss(config.loss)
    sets = {"train": _items(pairs, config.loss, "pairs")}
    if validation is not None:
        sets["validation"] = _items(validation, config.loss, "validation pairs")
    if config.loss.name == "kto":
        sets = {name: with_mismatched(items) for name, items in sets.items()}
    if config.loss.needs_reference:
        sets = _with_references(backend, sets, config, resume)

    def collate(items: Sequence[PreferenceItem], indices: Sequence[int]) -> list[Batch]:
        chosen = [items[i] for i in indices]
        batches = collate_items(
            chosen, config.max_tokens_per_micro_batch, config.share_prompts, backend.rank, backend.world_size
        )
        if config.loss.name != "kto":
            return batches
        point = _reference_point(backend, chosen, config)
        return [{**batch, "reference_point": point} for batch in batches]

    title = config.loss.name.upper()
    return await run_gradient_steps(
        backend, sets["train"], config, metrics_logger,
        collate=collate, validation=sets.get("validation"), resume=resume, title=title,
    )  # fmt: skip


def _items(pairs: Sequence[PreferencePair], loss: PreferenceConfig, what: str) -> list[PreferenceItem]:
    if len(pairs) == 0:
        raise UserError(f"{what} cannot be empty: give at least one")
    items = []
    for pair in pairs:
        item = PreferenceItem.of(pair)
        if loss.name != "kto" and len(item.answers) != 2:
            raise UserError(f"{what}: {pair.id} has {len(item.answers)} answer; only kto learns from a single one")
        if not item.answers or not all(s.num_loss_tokens for s in item.answers):
            raise UserError(f"{what}: {pair.id} has an answer in which no token carries loss")
        items.append(item)
    return items


def _reference_point(
    backend: PyTorchTrainingBackend, items: Sequence[PreferenceItem], config: PreferenceTrainingConfig
) -> torch.Tensor:
    """KTO's z [] over the whole step, all ranks: how far the policy is from the reference on mismatched answers."""
    others = [item.mismatched for item in items if item.mismatched is not None]
    measured = measure_log_probs(backend, others, config.max_tokens_per_micro_batch, config.share_prompts)
    now = [torch.from_numpy(x) for answers in measured for x in answers]
    before = [torch.from_numpy(x) for other in others for x in other.ref_log_probs or ()]
    ids = torch.repeat_interleave(torch.arange(len(now)), torch.tensor([len(x) for x in now]))
    return kto_reference_point(torch.cat(now), torch.cat(before), ids)


def _with_references(
    backend: PyTorchTrainingBackend,
    sets: dict[str, list[PreferenceItem]],
    config: PreferenceTrainingConfig,
    resume: bool,
) -> dict[str, list[PreferenceItem]]:
    """The items with the reference's log-probs: of the run's beginning where it is resumed, else of the model now."""
    everything = {name: [*items, *(i.mismatched for i in items if i.mismatched)] for name, items in sets.items()}
    file = backend.checkpoint_dir / REFERENCE_FILE if backend.checkpoint_dir is not None else None
    if resume and file is not None and file.exists() and list_steps(file.parent):
        flat = _read_references(file, everything)
    else:
        log.info(
            "log-probs of the reference for %d answers", sum(len(i.answers) for x in everything.values() for i in x)
        )
        flat = {
            name: measure_log_probs(backend, items, config.max_tokens_per_micro_batch, config.share_prompts)
            for name, items in everything.items()
        }
        if file is not None:
            if backend.rank == 0:
                _write_references(file, everything, flat)
            ranks.barrier()
    out = {}
    for name, items in sets.items():
        mine, others = flat[name][: len(items)], flat[name][len(items) :]
        out[name] = [replace(item, ref_log_probs=x) for item, x in zip(items, mine, strict=True)]
        if others:
            out[name] = [
                replace(item, mismatched=replace(item.mismatched, ref_log_probs=x))
                for item, x in zip(out[name], others, strict=True)
                if item.mismatched is not None
            ]
    return out


References = dict[str, list[tuple[np.ndarray, ...]]]


def _write_references(file: Path, sets: dict[str, list[PreferenceItem]], references: References) -> None:
    tensors = {}
    for name, items in sets.items():
        tensors[name] = torch.from_numpy(np.concatenate([x for answers in references[name] for x in answers]))
        tensors[f"{name}.content"] = torch.tensor([content_key(items)])
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    write_tensors(partial, tensors)
    partial.replace(file)


def _read_references(file: Path, sets: dict[str, list[PreferenceItem]]) -> References:
    tensors = read_tensors(file)
    out: References = {}
    for name, items in sets.items():
        if name not in tensors or int(tensors[f"{name}.content"]) != content_key(items):
            raise CheckpointError(
                f"{file}: is of other {name} data than the run goes on with; set the data back, or start a new run"
            )
        rest = tensors[name].numpy()
        out[name] = []
        for item in items:
            counts = [s.num_loss_tokens for s in item.answers]
            pieces = np.split(rest[: sum(counts)], np.cumsum(counts)[:-1])
            out[name].append(tuple(pieces))
            rest = rest[sum(counts) :]
    return out
