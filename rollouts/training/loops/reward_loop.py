"""Training a reward model on preference pairs (Bradley-Terry): the better answer's score above the other's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollouts.errors import UserError
from rollouts.models.reward_model import is_reward_model
from rollouts.training.algorithms.reward_model import reward_model_loss
from rollouts.training.backends.protocol import Batch
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.preferences import PreferencePair
from rollouts.training.loops.preference_batches import PreferenceItem, collate_items
from rollouts.training.loops.sft_loop import run_gradient_steps
from rollouts.training.metrics import MetricsLogger
from rollouts.training.types import Sample, SFTTrainingConfig


@dataclass(frozen=True)
class RewardTrainingConfig(SFTTrainingConfig):
    """As ``SFTTrainingConfig``; ``batch_size`` counts pairs, and they are always packed.

    Args:
        share_prompts: compute the prompt of a pair once for both answers.
    """

    share_prompts: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.packing:
            raise UserError("reward-model training packs the answers of a step: leave train.packing at true")


async def run_reward_training(
    backend: PyTorchTrainingBackend,
    pairs: Sequence[PreferencePair],
    config: RewardTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    validation: Sequence[PreferencePair] | None = None,
    resume: bool = True,
) -> list[dict[str, Any]]:
    """Train the reward model in ``backend`` (see ``make_reward_model``); checkpoints and resume as in SFT.

    A sequence's score is read where transformers' sequence classifiers read it: at the last token that is no padding.
    Sets ``backend.loss_fn``.

    Args:
        pairs: two answers each.
        validation: pairs whose loss and ``val_accuracy`` are measured every ``config.eval_every`` steps and at the end.

    Returns:
        The metrics of each step, with ``accuracy`` (the chosen answer scores higher), ``score_chosen``,
        ``score_rejected`` and ``score_margin``.

    Raises:
        UserError: no pairs, one with a single answer, or a model that is no reward model.
    """
    if not is_reward_model(backend.model):
        raise UserError(
            "the model has no score head: make it a reward model with make_reward_model or load_reward_model"
        )
    backend.loss_fn = reward_model_loss
    base: Any = backend.model
    pad = base.config.pad_token_id
    items = _items(pairs, pad, "pairs")
    held_out = _items(validation, pad, "validation pairs") if validation is not None else None

    def collate(some: Sequence[PreferenceItem], indices: Sequence[int]) -> list[Batch]:
        return collate_items(
            [some[i] for i in indices],
            config.max_tokens_per_micro_batch,
            config.share_prompts,
            backend.rank,
            backend.world_size,
        )

    return await run_gradient_steps(
        backend,
        items,
        config,
        metrics_logger,
        collate=collate,
        validation=held_out,
        resume=resume,
        title="reward model",
    )


def scored_position(tokens: Sequence[int], pad_token_id: int | None) -> int:
    """Where transformers' sequence classifiers read the score: the last token that is not the padding token."""
    last = len(tokens) - 1
    while last > 0 and tokens[last] == pad_token_id:
        last -= 1
    return last


def _items(pairs: Sequence[PreferencePair], pad: int | None, what: str) -> list[PreferenceItem]:
    if len(pairs) == 0:
        raise UserError(f"{what} cannot be empty: give at least one")
    items = []
    for pair in pairs:
        item = PreferenceItem.of(pair)
        if len(item.answers) != 2:
            raise UserError(f"{what}: {pair.id} has {len(item.answers)} answer; a reward model learns from two")
        items.append(replace(item, answers=tuple(_scored_once(s, pad) for s in item.answers)))
    return items


def _scored_once(sample: Sample, pad: int | None) -> Sample:
    """The sample with a loss mask that marks the one token at which it is scored."""
    mask = [0.0] * len(sample.tokens)
    position = scored_position(sample.tokens, pad)
    if position == 0:
        raise UserError(f"{sample.id} has fewer than two tokens to score")
    mask[position] = 1.0
    return replace(sample, loss_mask=mask)
