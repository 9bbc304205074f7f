"""From a recipe of kind ``dpo`` or ``reward-model`` to pairs, the loop's configuration and the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rollouts.recipes.preference_schema import USUAL_BETA, DPORecipe, RewardModelRecipe
from rollouts.recipes.schema import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollouts.training.datasets.preferences import PreferenceDataset
    from rollouts.training.loops.preference_loop import PreferenceTrainingConfig
    from rollouts.training.loops.reward_loop import RewardTrainingConfig

PairRecipe = DPORecipe | RewardModelRecipe


def build_pairs(recipe: PairRecipe, specs: list[DataSpec], tokenizer: PreTrainedTokenizerBase) -> PreferenceDataset:
    """The pairs of some of the recipe's data.

    Raises:
        UserError: see ``load_preference_dataset``.
    """
    from rollouts.training.datasets.preferences import load_preference_dataset
    from rollouts.training.datasets.sources import DatasetSpec

    return load_preference_dataset(
        [DatasetSpec(**spec.model_dump()) for spec in specs],
        tokenizer,
        max_length=recipe.data.max_length,
        on_bad_row=recipe.data.on_bad_row,
        seed=recipe.seed,
    )


def build_pair_config(recipe: PairRecipe, num_pairs: int) -> PreferenceTrainingConfig | RewardTrainingConfig:
    """The loop's configuration; ``num_epochs`` becomes the steps that pass over the pairs so often."""
    train = recipe.train
    options = train.model_dump(exclude={"num_steps", "num_epochs", "max_grad_norm"}) | {"seed": recipe.seed}
    options["num_steps"] = train.num_steps or math.ceil(num_pairs * (train.num_epochs or 1) / train.batch_size)
    if isinstance(recipe, RewardModelRecipe):
        from rollouts.training.loops.reward_loop import RewardTrainingConfig

        return RewardTrainingConfig(**options)
    from rollouts.training.algorithms.preference import PreferenceConfig
    from rollouts.training.loops.preference_loop import PreferenceTrainingConfig

    loss = recipe.preference.model_dump() | {"beta": recipe.preference.beta or USUAL_BETA[recipe.preference.name]}
    return PreferenceTrainingConfig(loss=PreferenceConfig(**loss), **options)
