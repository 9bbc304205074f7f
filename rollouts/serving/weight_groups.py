"""Process groups by which a trainer broadcasts weights: the trainer is rank 0, servers are the other ranks.

trainer (rank 0)                              server (rank r)
----------------                              ---------------
opens the store at its address
POST /init_weights_update_group  --------->   joins; answers when all ranks have
joins
POST /update_weights_from_distributed  --->   checks names and shapes, then receives
broadcasts the tensors in that order  ===>    gathers them; answers when it has all
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from rollouts.errors import UserError

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


class WeightGroups:
    """The groups that one server has joined, by name."""

    def __init__(self, timeout: float) -> None:
        self._timeout = datetime.timedelta(seconds=timeout)
        self._groups: dict[str, Any] = {}

    def join(self, name: str, address: str, port: int, rank: int, world_size: int) -> None:
        """Join a gloo group. Blocks until all ranks have.

        The keys of the store are those of torch's own process groups, so that a trainer may use these.

        Raises:
            UserError: the name is taken, or the others did not come in time.
        """
        if name in self._groups:
            raise UserError(f"the group {name!r} exists; destroy it first")
        try:
            store = dist.TCPStore(address, port, world_size, is_master=False, timeout=self._timeout)
            prefixed = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
            group = dist.ProcessGroupGloo(prefixed, rank, world_size, self._timeout)
        except RuntimeError as error:  # torch's DistError is one
            raise UserError(f"cannot join the group {name!r} at {address} port {port}: {_line(error)}") from error
        self._groups[name] = group

    def leave(self, name: str) -> None:
        """Raises UserError: no such group."""
        if self._groups.pop(name, None) is None:
            raise UserError(f"there is no group {name!r}")

    def receive(
        self, name: str, shapes: Mapping[str, Sequence[int]], dtypes: Sequence[str], flattened: bool
    ) -> dict[str, torch.Tensor]:
        """The tensors that rank 0 broadcasts, one by one or, ``flattened``, as the bytes of all in a row. Blocks.

        Raises:
            UserError: no such group, or the tensors did not come.
        """
        group = self._groups.get(name)  # once: another request may leave it meanwhile
        if group is None:
            raise UserError(f"there is no group {name!r}; call /init_weights_update_group first")
        tensors = {
            key: torch.empty(tuple(shape), dtype=DTYPES[dtype])
            for (key, shape), dtype in zip(shapes.items(), dtypes, strict=True)
        }
        try:
            if flattened:
                _receive_flattened(group, tensors)
            else:
                for work in [group.broadcast(tensor, 0) for tensor in tensors.values()]:
                    work.wait()
        except RuntimeError as error:
            self._groups.pop(name, None)  # ranks that disagree about what has been sent cannot go on
            raise UserError(f"the group {name!r} is broken and gone: {_line(error)}") from error
        return tensors


def _receive_flattened(group: Any, tensors: dict[str, torch.Tensor]) -> None:
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    bucket = torch.empty(sum(sizes), dtype=torch.uint8)
    group.broadcast(bucket, 0).wait()
    for (key, tensor), part in zip(tensors.items(), bucket.split(sizes), strict=True):
        tensors[key] = part.clone().view(tensor.dtype).view(tensor.shape)  # cloned: a part need not be aligned


def dtype_name(text: str) -> str:
    """``bfloat16`` or ``torch.bfloat16`` as the former. Raises UserError for what weights are not sent as."""
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype {text[:40]!r} is not one of {', '.join(DTYPES)}")
    return name


def check_shapes(model: torch.nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Before memory is taken for them: every tensor is one of the model's. Raises UserError."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        if name not in own:
            raise UserError(f"weight update names {name[:200]!r}, which the model does not have")
        if list(shape) != list(own[name].shape):
            raise UserError(f"weight update: {name} has shape {list(shape)}, the model's has {list(own[name].shape)}")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
