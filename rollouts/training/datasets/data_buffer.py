"""An endless, seeded stream over a list of prompts that can be stopped and resumed anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from rollouts.errors import UserError
from rollouts.training.datasets.sources import read_rows

T = TypeVar("T")


class DataBuffer(Generic[T]):
    """Deals out prompts epoch after epoch, each epoch in an order made from ``(seed, epoch)`` alone.

    The caller's sequence is only ever indexed: it may be a ``range`` or a memory-mapped data set.

    Args:
        prompts: what to deal out, at least one.
        seed: orders of two buffers with the same seed and size are the same, on every machine.
        shuffle: False deals in the given order, every epoch.

    Attributes:
        epoch_id: the epoch of the prompt dealt last (0 at first).
        sample_offset: how many prompts of that epoch have been dealt.
    """

    def __init__(self, prompts: Sequence[T], seed: int = 0, shuffle: bool = True) -> None:
        if len(prompts) == 0:
            raise ValueError("DataBuffer needs at least one prompt")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self.epoch_id = 0
        self.sample_offset = 0
        self._order = self._epoch_order()

    def __len__(self) -> int:
        return len(self.prompts)

    def get_prompts(self, n: int) -> list[T]:
        """The next ``n`` prompts; where an epoch ends, the next begins."""
        if n < 0:
            raise ValueError(f"cannot deal {n} prompts")
        dealt: list[T] = []
        while len(dealt) < n:
            if self.sample_offset == len(self.prompts):
                self.epoch_id += 1
                self.sample_offset = 0
                self._order = self._epoch_order()
            stop = min(self.sample_offset + n - len(dealt), len(self.prompts))
            dealt += [self.prompts[i] for i in self._order[self.sample_offset : stop].tolist()]
            self.sample_offset = stop
        return dealt

    def _epoch_order(self) -> np.ndarray:
        """Indices in this epoch's order, int64 [len].

        Sorting raw bits keeps the order the same in every NumPy version, which ``permutation`` does not promise.
        """
        if not self.shuffle:
            return np.arange(len(self.prompts))
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch_id])).random_raw(len(self.prompts))
        return np.argsort(bits, kind="stable")

    def state_dict(self) -> dict[str, Any]:
        """Where the buffer stands, as JSON-ready values."""
        return {
            "epoch_id": self.epoch_id,
            "sample_offset": self.sample_offset,
            "num_prompts": len(self.prompts),
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            UserError: the state is not one, or was taken with other prompts, seed or shuffle; names the key.
        """
        for key, mine in self.state_dict().items():
            if key not in state:
                raise UserError(f"data position: {key} is missing; this is not the state of a DataBuffer")
            if key in ("num_prompts", "seed", "shuffle") and state[key] != mine:
                raise UserError(
                    f"data position: {key} was {state[key]!r} when it was saved and is {mine!r} now; "
                    "resume with the same data and seed, or start a new run"
                )
        epoch, offset = state["epoch_id"], state["sample_offset"]
        if not (isinstance(epoch, int) and epoch >= 0 and isinstance(offset, int) and 0 <= offset <= len(self.prompts)):
            raise UserError(f"data position: epoch {epoch!r}, offset {offset!r} is no place in {len(self)} prompts")
        self.epoch_id, self.sample_offset = epoch, offset
        self._order = self._epoch_order()

    def save_state(self, path: str | Path) -> None:
        """Write ``state_dict`` as JSON, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.state_dict()) + "\n")
        temporary.replace(path)

    def load_state(self, path: str | Path) -> None:
        """Inverse of ``save_state``. Raises UserError as ``load_state_dict`` does, or when the file cannot be read."""
        try:
            state = json.loads(Path(path).read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: no readable data position ({e}); was it written by save_state?") from e
        if not isinstance(state, dict):
            raise UserError(f"{path}: no readable data position; was it written by save_state?")
        self.load_state_dict(state)


def load_prompts_from_list(prompts: Sequence[T]) -> list[T]:
    """A copy of a list of prompts. Raises UserError when it is empty."""
    if len(prompts) == 0:
        raise UserError("the list of prompts is empty; give at least one")
    return list(prompts)


def load_prompts_from_jsonl(path: str | Path, prompt_key: str = "prompt") -> list[Any]:
    """The field ``prompt_key`` of every row (a text or a list of messages).

    ``load_rl_prompts`` reads every row format and keeps answers; this reads one field as it stands.

    Raises:
        UserError: the file is missing or empty, or a row has no such field; naming ``file:line``.
    """
    prompts = []
    for row in read_rows(path):
        if row.error or not isinstance(row.data, dict) or row.data.get(prompt_key) is None:
            raise UserError(f"{row.where}: {row.error or f'has no field {prompt_key!r}'}; fix the row")
        prompts.append(row.data[prompt_key])
    if not prompts:
        raise UserError(f"{path}: holds no rows; give at least one prompt")
    return prompts


def create_buffer_from_jsonl(
    path: str | Path, prompt_key: str = "prompt", seed: int = 0, shuffle: bool = True
) -> DataBuffer[Any]:
    """A ``DataBuffer`` over ``load_prompts_from_jsonl``."""
    return DataBuffer(load_prompts_from_jsonl(path, prompt_key), seed=seed, shuffle=shuffle)
