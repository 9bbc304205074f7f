"""Float32 master weights behind half-precision parameters: the model computes in 16 bits, the optimizer in 32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HALF_PRECISION = (torch.bfloat16, torch.float16)


class MasterWeights:
    """Pairs every trainable parameter with the tensor the optimizer steps: itself, or its float32 master.

    Gradients of half-precision parameters are added to a float32 sum as soon as backward has produced them, so that
    accumulation over micro-batches does not lose what bfloat16 cannot hold, and are then freed.

    Args:
        named_parameters: (name, parameter) of what trains.
        optimizer: its parameter groups are pointed at the masters; it must not have stepped yet.
        masters: the float32 values of half-precision parameters by name, where something more exact than the
            parameters themselves is known.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        optimizer: Any,
        masters: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.parameters = dict(named_parameters)
        self.masters: dict[str, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        replaced: dict[int, torch.Tensor] = {}
        for name, parameter in named_parameters:
            if parameter.dtype not in HALF_PRECISION:
                self.masters[name] = parameter
                continue
            exact = (masters or {}).get(name, parameter)
            master = exact.detach().float().requires_grad_(True)
            self.masters[name] = replaced[id(parameter)] = master
            self._copies.append((parameter, master))
            parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]

    def gradients(self) -> list[torch.Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters the model computes with."""
        if self._copies:
            torch._foreach_copy_([p for p, _ in self._copies], [m for _, m in self._copies])

    @torch.no_grad()
    def set(self, name: str, value: torch.Tensor) -> None:
        """Overwrite one weight, master and working copy."""
        self.masters[name].copy_(value)
        if self.masters[name] is not self.parameters[name]:
            self.parameters[name].copy_(value)


def _accumulate_into(master: torch.Tensor) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return hook
