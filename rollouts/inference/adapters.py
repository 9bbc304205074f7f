"""What adapted layers compute, as plain matrices: a peft model is served as fast as one without adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.models.products import PLAIN_LINEARS


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, adapters in its layers; any other model itself.

    Raises:
        UserError: the adapter is not in the layers (prompt and prefix tuning).
    """
    if not hasattr(model, "peft_config"):
        return model
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise UserError(f"the engine cannot serve a {config.peft_type.value} adapter: it is not part of the layers")
    return model.get_base_model()


@torch.no_grad()
def merged_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For every adapted linear or embedding layer a plain one that computes the same, as its adapter is now.

    Sums are taken in float32 and rounded once. A layer without an active adapter is served by its own base.
    """
    merged: dict[nn.Module, nn.Module] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            own = module.get_base_layer()
            if not module.disable_adapters and not module.merged and type(own) in (*PLAIN_LINEARS, nn.Embedding):
                exact = copy.deepcopy(module).float()
                exact.merge()
                merged[module] = exact.get_base_layer().to(own.weight.dtype)
            else:
                merged[module] = own
        elif hasattr(module, "modules_to_save"):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            use_own = module.disable_adapters or not active
            merged[module] = module.original_module if use_own else module.modules_to_save[active[0]]
    return merged
