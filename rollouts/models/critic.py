"""A critic: a language model whose only logit is a value, what it expects the rest of the sequence to be worth."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_critic(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a causal language model with a value head in place of its output layer; values start at 0.

    Everything that trains, saves and loads a language model does so with it, but for its vocabulary of one.
    """
    critic: Any = copy.deepcopy(model)
    critic = critic.merge_and_unload() if hasattr(critic, "peft_config") else critic
    critic.requires_grad_(True)
    head = critic.get_output_embeddings()
    value = nn.Linear(head.in_features, 1, bias=False, device=head.weight.device, dtype=head.weight.dtype)
    nn.init.zeros_(value.weight)
    critic.config.tie_word_embeddings = False
    critic.all_tied_weights_keys = {}  # computed when the model was made; a checkpoint leaves out what it names
    critic.set_output_embeddings(value)
    return critic
