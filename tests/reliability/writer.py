"""Checkpoints without training: a process that writes small steps of known content, one after the other."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from pathlib import Path

import torch

from rollouts.training.checkpoints import (
    CheckpointError,
    checkpoint_transaction,
    find_latest,
    read_json,
    sweep_orphans,
    write_json,
    write_tensors,
)


def step_tensors(step: int) -> dict[str, torch.Tensor]:
    """What the writer stores at a step: a function of the step alone, so that a reader can tell whose it is."""
    return {"w": torch.arange(512, dtype=torch.float32) + step, "m": torch.full((3, 5), step, dtype=torch.bfloat16)}


def write_loop(root: Path, last: int, keep: int, mutant: str = "") -> None:
    """A run reduced to its checkpoints: resume after the newest good step and write one at each step up to ``last``."""
    if mutant:
        import mutants

        mutants.apply(mutant)
    sweep_orphans(root)
    found = find_latest(root)
    first = read_json(found / "trainer_state.json")["step"] + 1 if found else 1
    for step in range(first, last + 1):
        with checkpoint_transaction(root, step, keep) as folder:
            write_tensors(folder / "model.safetensors", step_tensors(step))
            write_tensors(folder / "optimizer.safetensors", step_tensors(-step))
            write_json(folder / "trainer_state.json", {"step": step, "lr": 0.1 / step})


def write_until_it_fails(root: Path, report: Path, file_size_limit: int = resource.RLIM_INFINITY) -> None:
    """Write ever larger steps until the disk refuses one; report the refusal and what can be resumed from."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, resource.RLIM_INFINITY))
    for step in itertools.count(1):
        try:
            with checkpoint_transaction(root, step, keep=1) as folder:
                write_json(folder / "trainer_state.json", {"step": step})
                write_tensors(folder / "model.safetensors", {"w": torch.ones(step * 5_000)})
        except CheckpointError as error:
            left = sorted(path.name for path in root.iterdir())
            found = read_json(find_latest(root) / "trainer_state.json")["step"]
            report.write_text(json.dumps({"error": str(error), "failed": step, "resumes_from": found, "left": left}))
            return


if __name__ == "__main__":
    write_until_it_fails(Path(sys.argv[1]), Path(sys.argv[2]))
