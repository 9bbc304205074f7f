"""What recipes of the kinds ``dpo`` and ``reward-model`` may say."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rollouts.recipes.schema import KINDS, Optimizer, Section, Train, TrainingRecipe

USUAL_BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "simpo": 2.0, "orpo": 0.1}


class Preference(Section):
    """Which preference loss; the meaning of each key is ``PreferenceConfig``'s.

    beta: null takes the loss's usual value, 2.0 for simpo and 0.1 for the others.
    """

    name: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    beta: float | None = Field(None, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    margin: float = Field(0.0, ge=0)
    length_normalized: bool | None = None
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, names in (("label_smoothing", ("dpo",)), ("margin", ("simpo",))):
            if getattr(self, key) and self.name not in names:
                raise ValueError(f"{key} is of the loss {names[0]}; {self.name} has none, leave it out")
        return self


class PairTrain(Train):
    """As Train, with batch_size counting pairs. share_prompts: compute a pair's prompt once for both answers."""

    share_prompts: bool = True

    @model_validator(mode="after")
    def _packs(self) -> Self:
        if not self.packing:
            raise ValueError("packing must be true: the answers of a step are packed")
        return self


class PolicyOptimizer(Optimizer):
    """As Optimizer, with the small steps that a policy bears which must stay near where it began."""

    lr: float = Field(1e-6, gt=0)


class RewardModelOptimizer(Optimizer):
    """As Optimizer, with steps for a whole model under a new head."""

    lr: float = Field(1e-5, gt=0)


class DPORecipe(TrainingRecipe):
    """Learning from preferences without rollouts: DPO, IPO, KTO, SimPO or ORPO on pairs of answers."""

    kind: Literal["dpo"] = "dpo"
    preference: Preference = Preference()
    train: PairTrain = PairTrain()
    optimizer: PolicyOptimizer = PolicyOptimizer()


class RewardModelRecipe(TrainingRecipe):
    """A reward model: a language model's body under a score, learned from pairs of answers (Bradley-Terry)."""

    kind: Literal["reward-model"] = "reward-model"
    train: PairTrain = PairTrain()
    optimizer: RewardModelOptimizer = RewardModelOptimizer()

    @model_validator(mode="after")
    def _has_a_body(self) -> Self:
        if self.model.init is not None:
            raise ValueError("a reward model starts from a trained model; set model.path, and model.init to null")
        return self


KINDS["dpo"] = DPORecipe
KINDS["reward-model"] = RewardModelRecipe
