"""Critics: what is expected of the rest of a sequence, by a model of its own or by a head on the policy's trunk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VALUE_HEAD = "value_head"  # the name of the head among a model's modules


def make_critic(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a causal language model with a value head in place of its output layer; values start at 0.

    Everything that trains, saves and loads a language model does so with it, but for its vocabulary of one.
    """
    critic: Any = copy.deepcopy(model)
    critic = critic.merge_and_unload() if hasattr(critic, "peft_config") else critic
    critic.requires_grad_(True)
    value = _value_head(critic.get_output_embeddings())
    critic.config.tie_word_embeddings = False
    critic.all_tied_weights_keys = {}  # computed when the model was made; a checkpoint leaves out what it names
    critic.set_output_embeddings(value)
    return critic


def add_value_head(model: nn.Module) -> None:
    """Give a causal language model, or the one inside a peft model, a value head beside its output layer.

    Trunk and head then learn together and are checkpointed together. The head is the trainer's alone: engines and
    exported folders never get it. Values start at 0.
    """
    causal_lm: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    setattr(causal_lm, VALUE_HEAD, _value_head(causal_lm.get_output_embeddings()))


def is_value_head(name: str) -> bool:
    """Whether a parameter of that name belongs to a head that ``add_value_head`` made."""
    return VALUE_HEAD in name.split(".")


def without_value_head(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the language model alone."""
    return {name: weight for name, weight in weights.items() if not is_value_head(name)}


def _value_head(output_layer: Any) -> nn.Linear:
    like = output_layer.weight
    head = nn.Linear(like.shape[1], 1, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(head.weight)
    return head
