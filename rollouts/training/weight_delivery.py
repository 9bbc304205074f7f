"""What servers are sent of a policy's weights: tensors, a folder of them, or a LoRA adapter alone.

Whatever it is stays as it is until the next: an engine that comes back in between can be given it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rollouts.errors import UserError
from rollouts.models.export import write_model
from rollouts.models.folders import new_folder
from rollouts.training.weight_push import named_tensors

if TYPE_CHECKING:
    from rollouts.training.remote_engines import RemoteEngine

Way = Literal["auto", "push", "disk", "adapter"]

PREFIX, BASE, LORA_A = "base_model.model.", ".base_layer.", ".lora_A."


class WeightDelivery:
    """``prepare`` of a ``WeightSyncManager``: makes what is sent of what the trainer's backend gives.

    Args:
        model: the policy, perhaps with a LoRA adapter on it.
        folder: where folders for the servers go, one a version; only the newest is kept.
        way: ``push``, from memory; ``disk``, a folder that the servers can read; ``adapter``, a folder with the adapter
            alone, on top of the base model that the servers have; ``auto``, the first that all of them take of adapter
            (of a policy with one), push and disk. An adapter is merged into the weights unless it is sent alone.

    Raises:
        UserError: ``adapter`` for a policy without one.
    """

    def __init__(self, model: Any, folder: str | Path, way: Way = "auto") -> None:
        self.model, self.folder, self.way = model, Path(folder), way
        self.has_adapter = hasattr(model, "peft_config")
        if way == "adapter" and not self.has_adapter:
            raise UserError("engine.weights is adapter, but the model has none; set model.lora, or take push or disk")

    async def choose(self, engines: Sequence[RemoteEngine]) -> None:
        """Settle what ``auto`` means for these servers. Raises ProviderError: one does not answer."""
        if self.way != "auto":
            return
        if self.has_adapter and all([await engine.takes_adapters() for engine in engines]):
            self.way = "adapter"
        else:
            self.way = "push" if all([await engine.takes_pushes() for engine in engines]) else "disk"

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, torch.Tensor], version: int) -> dict[str, torch.Tensor] | Path:
        """What the servers are sent as this version."""
        if self.way == "adapter":
            return self._write(self.model, weights, version)
        plain = merge_adapter(self.model, weights) if self.has_adapter else dict(weights)
        if self.way == "disk":
            return self._write(self.model.get_base_model() if self.has_adapter else self.model, plain, version)
        given = {tensor.data_ptr() for tensor in weights.values()}
        kept = named_tensors(plain)  # those on an accelerator are copies already
        return {name: tensor.clone() if tensor.data_ptr() in given else tensor for name, tensor in kept.items()}

    def _write(self, model: Any, weights: Mapping[str, torch.Tensor], version: int) -> Path:
        folder = self.folder / f"version_{version:06d}"
        with new_folder(folder, overwrite=True) as partial:
            write_model(model, None, partial, state_dict=weights)
        for older in self.folder.glob("version_*"):
            if older != folder:
                shutil.rmtree(older)
        return folder


def merge_adapter(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base model's weights by its own names, W + (alpha / r) B A where there is an adapter.

    Args:
        model: a peft model with LoRA on linear layers; tells the scales.
        weights: its whole state dictionary.

    Sums are taken in float32 and rounded once.
    """
    merged = {}
    for name, tensor in weights.items():
        layer, is_base, rest = name.partition(BASE)
        a_name = next((n for n in weights if n.startswith(f"{layer}{LORA_A}")), None) if is_base else None
        if a_name is not None and rest == "weight":
            module = model.get_submodule(layer)
            delta = weights[a_name.replace(LORA_A, ".lora_B.")].float() @ weights[a_name].float()
            scale = module.scaling[a_name.removeprefix(f"{layer}{LORA_A}").partition(".")[0]]
            tensor = (tensor.float() + scale * (delta.T if module.fan_in_fan_out else delta)).to(tensor.dtype)
        elif ".lora_" in name:
            continue
        merged[name.removeprefix(PREFIX).replace(BASE, ".")] = tensor
    return merged
