"""What a recipe of kind ``sft+rl`` may say: two runs, of which the second starts from the model of the first."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ModelWrapValidatorHandler, SerializerFunctionWrapHandler, model_serializer, model_validator

from rollouts.recipes.rl_schema import RLRecipe
from rollouts.recipes.schema import KINDS, Recipe, SFTRecipe

SHARED = ("seed", "device")  # said once, for both
OWN = ("kind", "run_dir")  # follow from the whole
STARTS = ("path", "init", "tokenizer")  # of rl's model: it is the one that sft leaves


class SFTRLRecipe(Recipe):
    """Supervised fine-tuning, then reinforcement learning from its model.

    sft, rl: as recipes of those kinds, less the keys that follow: their runs lie in run_dir/sft and run_dir/rl, seed
    and device are said once for both, and rl starts from run_dir/sft/final (rl.model may say precision, lora, ...).
    """

    keep_nulls: ClassVar[bool] = True

    kind: Literal["sft+rl"] = "sft+rl"
    device: str = "auto"
    sft: SFTRecipe
    rl: RLRecipe

    @model_validator(mode="wrap")
    @classmethod
    def _hand_down(cls, values: Any, validate: ModelWrapValidatorHandler[SFTRLRecipe]) -> SFTRLRecipe:
        if not isinstance(values, dict) or not isinstance(values.get("run_dir"), str):
            return validate(values)
        run_dir = values["run_dir"]
        filled = dict(values)
        for name in ("sft", "rl"):
            section = values.get(name)
            if not isinstance(section, dict):
                continue  # refused below
            for key in (*SHARED, *OWN):
                if key in section:
                    raise ValueError(f"{name}.{key} is that of the whole recipe; leave it out of the section {name}")
            shared = {key: values[key] for key in SHARED if key in values}
            filled[name] = {**section, **shared, "run_dir": type(run_dir)(f"{run_dir}/{name}")}
        if isinstance(filled.get("rl"), dict):
            model = filled["rl"].get("model") or {}
            if not isinstance(model, dict) or any(model.get(key) is not None for key in STARTS):
                raise ValueError("rl.model is the one that sft leaves; say only how to train it (precision, lora, ...)")
            filled["rl"]["model"] = {**model, "path": type(run_dir)(f"{run_dir}/sft/final")}
        return validate(filled)

    @model_serializer(mode="wrap")
    def _without_what_follows(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was handed down is left out, so that the resolved recipe is itself a recipe."""
        values: dict[str, Any] = dump(self)
        for name in ("sft", "rl"):
            values[name] = {k: v for k, v in values[name].items() if k not in (*SHARED, *OWN)}
        values["rl"]["model"] = {k: v for k, v in values["rl"]["model"].items() if k not in STARTS}
        return values


KINDS["sft+rl"] = SFTRLRecipe
