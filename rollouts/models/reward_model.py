"""Reward models: a language model's body under one linear score, as transformers' sequence classifiers have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rollouts.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_reward_model(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The body of ``model``, a causal language model, under a new head of one score.

    The head's weights are drawn from ``seed`` with standard deviation 1 / sqrt(width + 1) (Stiennon et al. 2020,
    arXiv:2009.01325). The body is ``model``'s own, which must not be used afterwards.

    Raises:
        UserError: transformers has no sequence classifier of this architecture.
    """
    from transformers import AutoModelForSequenceClassification

    config = model.config
    config.num_labels = 1
    config.tie_word_embeddings = False  # there is no output layer to tie
    with torch.device("meta"):  # its body's weights are thrown away: they need not be made
        try:
            scorer = AutoModelForSequenceClassification.from_config(config)
        except ValueError:
            raise UserError(
                f"{type(model).__name__} has no sequence classifier in transformers, which a reward model is saved as; "
                "take a model of another architecture"
            ) from None
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    scorer.config = config  # the body's, so that what is set on one holds for both
    width = scorer.score.weight.shape[1]
    scorer.score = torch.nn.Linear(width, 1, bias=False, dtype=model.dtype)
    drawn = torch.randn(1, width, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    scorer.score.weight.data.copy_(drawn / (width + 1) ** 0.5)
    scorer.name_or_path = model.name_or_path
    return scorer.to(model.device).eval()


def is_reward_model(model: torch.nn.Module) -> bool:
    """Whether a model gives one score a sequence."""
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return hasattr(base, "score") and getattr(base, "num_labels", 0) == 1
