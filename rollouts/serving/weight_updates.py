"""New weights for a served model: from a folder, from a request, or from a trainer's process group.

Pieces that come between ``begin`` and ``end`` are gathered and served together at the end, so that no sample sees
half of an update.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.serving.weight_groups import WeightGroups, check_shapes, dtype_name

if TYPE_CHECKING:
    from rollouts.serving.served_model import ServedModel


PICKLE = b"\x80"  # how pickles begin, such as those of SGLang's own clients


class WeightUpdates:
    """State of the updates of one served model. Everything blocks, and raises UserError where it cannot be done."""

    def __init__(self, served: ServedModel, group_timeout: float) -> None:
        self._served = served
        self.groups = WeightGroups(group_timeout)
        self._lock = threading.Lock()
        self._pieces: dict[str, torch.Tensor] | None = None  # of the session that is open
        self._version: int | None = None
        self._abort = False

    def from_folder(self, folder: str, version: int | None, abort: bool) -> int:
        """Serve the weights of a model folder on the server's machine; gives their version."""
        from rollouts.models.load import load_weights

        if not Path(folder).is_dir():
            raise UserError(f"model_path {folder} is not a folder on the server's machine")
        dtype = next(self._served.engine.model.parameters()).dtype
        return self._serve(load_weights(Path(folder), dtype), version, abort)

    def from_texts(self, texts: Sequence[str], version: int | None, abort: bool) -> int | None:
        """The same of safetensors files as base64 text; None within a session, which serves them at its end."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        weights: dict[str, torch.Tensor] = {}
        for i, text in enumerate(texts):
            field, content = f"serialized_named_tensors.{i}", b""
            try:
                content = base64.b64decode(text, validate=True)
                weights |= load(content)
            except (ValueError, SafetensorError) as error:
                if content.startswith(PICKLE):
                    raise UserError(
                        f"{field} is a pickle, which is never read, as it could run any code here; send the tensors "
                        "as a safetensors file in base64"
                    ) from error
                raise UserError(f"{field} is not a safetensors file in base64: {error}") from error
        check_shapes(self._served.engine.model, {name: tensor.shape for name, tensor in weights.items()})
        return self._take(weights, version, abort)

    def from_group(
        self, group: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]],
        flattened: bool, version: int | None, abort: bool,
    ) -> int | None:  # fmt: skip
        """The same of what rank 0 of a group broadcasts."""
        if not len(names) == len(dtypes) == len(shapes) == len(set(names)):
            raise UserError("names, dtypes and shapes must have one entry a tensor, and no name twice")
        by_name = dict(zip(names, shapes, strict=True))
        check_shapes(self._served.engine.model, by_name)
        weights = self.groups.receive(group, by_name, [dtype_name(dtype) for dtype in dtypes], flattened)
        return self._take(weights, version, abort)

    def begin(self) -> None:
        """Open a session. One that was left open is forgotten: its trainer has gone."""
        with self._lock:
            self._pieces, self._version, self._abort = {}, None, False

    def end(self) -> int:
        """Serve what the session has gathered; gives its version."""
        with self._lock:
            pieces, self._pieces = self._pieces, None
            if pieces is None:
                raise UserError("no weight update is open; call /begin_weight_update first")
            if not pieces:
                return self._served.engine.weight_version
            return self._serve(pieces, self._version, self._abort)

    def rename(self, version: int, abort: bool) -> None:
        """Call the weights that are served by another version."""
        self._served.change_weights(None, version, "abort" if abort else "continue")

    def _take(self, weights: dict[str, torch.Tensor], version: int | None, abort: bool) -> int | None:
        with self._lock:
            if self._pieces is None:
                return self._serve(weights, version, abort)
            self._pieces |= weights
            self._version = version if version is not None else self._version
            self._abort |= abort
            return None

    def _serve(self, weights: Mapping[str, torch.Tensor] | nn.Module, version: int | None, abort: bool) -> int:
        return self._served.change_weights(weights, version, "abort" if abort else None)
