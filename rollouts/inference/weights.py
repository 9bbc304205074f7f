"""New weights for a model in place, and a checksum of those that it has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.models.critic import without_value_head


@torch.no_grad()
def copy_weights(source: Mapping[str, torch.Tensor] | nn.Module, model: nn.Module) -> None:
    """Copy parameters by name into ``model``'s own storage; tied parameters may be named once. Nothing or everything.

    Raises:
        UserError: a name is unknown or missing, a shape differs or something is no tensor; the model is unchanged then.
    """
    given = _parameters(source) if isinstance(source, nn.Module) else dict(source)
    own = without_value_head(dict(model.named_parameters(remove_duplicate=False)))
    if hasattr(model, "peft_config"):
        adapter = _adapter(model)
        if given and given.keys() <= adapter.keys():
            own = adapter
    for name, tensor in given.items():
        if name not in own:
            raise UserError(f"weight update names {name!r}, which the model does not have")
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"weight update: {name} is a {type(tensor).__name__}; give torch tensors")
        if tensor.shape != own[name].shape:
            raise UserError(
                f"weight update: {name} has shape {list(tensor.shape)}, the model's has {list(own[name].shape)}"
            )
    covered = {id(own[name]) for name in given}
    missing = [name for name, parameter in own.items() if id(parameter) not in covered]
    if missing:
        raise UserError(f"weight update lacks {missing[0]!r} and {len(missing) - 1} other parameters of the model")
    for name, tensor in given.items():
        if tensor.data_ptr() != own[name].data_ptr():
            own[name].copy_(tensor)


def _adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """The active adapter's own tensors by the names under which peft saves them."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)  # type: ignore[arg-type]


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every parameter in order of names; tied ones count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(_parameters(model).items()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 (hex) of the bytes of each parameter, by name; tied ones are there once."""
    return {
        name: hashlib.sha256(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, p in _parameters(model).items()
    }


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What an engine serves; tied parameters are there once."""
    return without_value_head(dict(model.named_parameters()))
