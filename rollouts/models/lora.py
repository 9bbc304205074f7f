"""LoRA adapters through peft: put one on a model, save it alone, merge it into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rollouts.errors import UserError
from rollouts.models.folders import new_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank update ``(alpha / r) B A`` beside each target layer (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: rank of the update.
        alpha: its scale, divided by ``r``.
        dropout: probability of dropping an input of the update while training.
        target_modules: last parts of layer names, for example ``("q_proj", "v_proj")``; ``"all-linear"`` = every linear
            layer but the output layer.

    Raises:
        UserError: a value is out of range.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.lora.r must be at least 1, got {self.r}")
        if self.alpha <= 0:
            raise UserError(f"model.lora.alpha must be greater than 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.target_modules:
            raise UserError("model.lora.target_modules is empty; name some layers, or use all-linear")


def add_lora(model: PreTrainedModel, config: LoRAConfig | None = None, seed: int = 0) -> PeftModel:
    """Put a fresh adapter on ``model`` (changed in place) and freeze everything else.

    B starts at zero, so the outputs are those of ``model``; A is drawn from ``seed``. Under half-precision weights peft
    keeps the adapter in float32. The head of a reward model is trained and saved with the adapter.

    Raises:
        UserError: ``config.target_modules`` names no layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    from rollouts.models.reward_model import is_reward_model

    config = config or LoRAConfig()
    names = config.target_modules
    targets = [names] if isinstance(names, str) else list(names)
    peft_config = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # declared int, used as a factor
        lora_dropout=config.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="SEQ_CLS" if is_reward_model(model) else "CAUSAL_LM",  # the former keeps and saves the head
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return get_peft_model(model, peft_config)  # type: ignore[return-value]
        except ValueError as error:
            linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            raise UserError(
                f"model.lora.target_modules {', '.join(targets)} does not fit the model, whose linear layers are "
                f"{', '.join(sorted(linear))}; use some of these, or all-linear"
            ) from error


def save_lora(
    model: PeftModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, overwrite: bool = False
) -> Path:
    """Write the adapter alone (``adapter_config.json``, ``adapter_model.safetensors``), loadable by plain peft.

    The base model is named in it by the path it was loaded from, made absolute if that was a folder; a base that was
    never loaded from anywhere has no name, and then ``base_model_name_or_path`` has to be set by hand.

    Raises:
        UserError: ``folder`` exists already and ``overwrite`` is not set.
    """
    from rollouts.models.tokenizer import save_tokenizer

    with new_folder(folder, overwrite=overwrite) as partial:
        write_adapter(model, partial)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
    return Path(folder)


def write_adapter(model: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter's files into a folder that exists; its weights from ``state_dict`` where that is given."""
    # "auto", the default, would ask the hub whether the embedding was resized; here it never is
    model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is a form left blank


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Add the adapter into the weights and return the plain model; ``model`` must not be used afterwards.

    The sum is rounded to the weights' dtype: merge a float32 model, then cast, to lose nothing of a small update.

    Raises:
        UserError: the adapter makes a weight non-finite.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}; it holds a value that is not finite") from error
