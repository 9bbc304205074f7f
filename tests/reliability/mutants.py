"""Plausible mistakes, put in place of the right code, to show that the suite notices each."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollouts.training import checkpoints, rng
from rollouts.training import distributed_utils as ranks
from rollouts.training.backends import optimizers
from rollouts.training.backends.fsdp import FSDPTrainingBackend
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.data_buffer import DataBuffer

_transaction = checkpoints.checkpoint_transaction
_rename = checkpoints._rename
_load_checkpoint = PyTorchTrainingBackend._load_checkpoint


@contextmanager
def _written_in_place(root: Path, step: int, keep: int = 3) -> Iterator[Path]:
    final = Path(root) / f"step_{step:06d}"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir(parents=True)
    yield final
    checkpoints._seal(final)
    checkpoints._point_latest(final)
    checkpoints._purge(Path(root), step, keep)


@contextmanager
def _purged_early(root: Path, step: int, keep: int = 3) -> Iterator[Path]:
    for old in list(checkpoints.list_steps(root).values())[: -(keep - 1) or None]:
        shutil.rmtree(old)
    with _transaction(root, step, keep) as folder:
        yield folder


def _latest_moved_early(partial: Path, final: Path) -> None:
    checkpoints._point_latest(final)
    _rename(partial, final)


def _no_random_state(state: dict[str, Any]) -> None: ...


def _no_moments(optimizer: Any, parameters: Any, tensors: Any) -> None: ...


def _no_cursor(self: DataBuffer, state: Any) -> None: ...


def _no_clock(self: PyTorchTrainingBackend, folder: Path) -> dict[str, Any]:
    state = _load_checkpoint(self, folder)
    self.step = 0
    return state


def _no_weights(self: PyTorchTrainingBackend, tensors: Any, head_too: bool) -> None: ...


def _no_early_stopping(self: PyTorchTrainingBackend, folder: Path) -> dict[str, Any]:
    state = _load_checkpoint(self, folder)
    return state | {"early_stopping": {**state["early_stopping"], "best": None, "bad_in_a_row": 0}}


def _one_random_state(self: FSDPTrainingBackend, value: Any) -> list[Any]:
    return [ranks.broadcast(value)] * self.world_size


WRITER_MUTANTS = {  # name: (right code, mistake)
    "the rename is dropped": (checkpoints.checkpoint_transaction, _written_in_place),
    "latest is moved early": (checkpoints._rename, _latest_moved_early),
    "old steps are purged early": (checkpoints.checkpoint_transaction, _purged_early),
}
RESUME_MUTANTS = {
    "the random state is dropped": (rng.restore_rng, _no_random_state),
    "the moments are dropped": (optimizers.load_optimizer_state, _no_moments),
    "the data cursor is dropped": (DataBuffer.load_state_dict, _no_cursor),
    "the schedule's clock is dropped": (PyTorchTrainingBackend._load_checkpoint, _no_clock),
    "the weights are dropped": (PyTorchTrainingBackend._load_masters, _no_weights),
    "the best validation loss is dropped": (PyTorchTrainingBackend._load_checkpoint, _no_early_stopping),
}
RANKS_MUTANTS = {
    "rank 0's random state is saved for all": (FSDPTrainingBackend._gather, _one_random_state),
}


def apply(mutant: str) -> None:
    """Put a mistake wherever a loaded module or its classes hold the right code. For a process of its own."""
    right, mistake = (WRITER_MUTANTS | RESUME_MUTANTS | RANKS_MUTANTS)[mutant]
    modules = [m for name, m in sys.modules.items() if name.startswith("rollouts.") or name == "writer"]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    places = [(owner, name) for owner in modules + classes for name, value in vars(owner).items() if value is right]
    assert places, f"{right} is used nowhere"
    for owner, name in places:
        setattr(owner, name, mistake)
