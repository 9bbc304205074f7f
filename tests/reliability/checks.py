"""What must hold of a run's folder: at any instant, and at the end of a run that was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from training_run import CLOCK_METRICS, Run

from rollouts.training.checkpoints import find_latest, list_steps, read_json, verify_checkpoint
from rollouts.training.metrics import read_metrics


def check_whole(root: Path) -> int:
    """What must hold in a folder of checkpoints at any instant. Returns the step a run would resume from, 0 if none.

    Every folder with a step's name is a whole step, and so is what ``latest`` names.

    Raises:
        CheckpointError, AssertionError: something does not hold.
    """
    for folder in list_steps(root).values():
        verify_checkpoint(folder)
    if os.path.lexists(root / "latest"):
        verify_checkpoint(root / "latest")
    found = find_latest(root)
    if found is None:
        return 0
    step = read_json(found / "trainer_state.json")["step"]
    assert found.name == f"step_{step:06d}"
    return step


def check_after_kill(run: Run, on_disk: list[int], resumes_from: int) -> None:
    assert list(list_steps(run.checkpoints)) == on_disk
    assert check_whole(run.checkpoints) == resumes_from


def check_same_end(run: Run, reference: Run) -> None:
    """The two runs ended alike: the samples of each step, its metrics, and every byte of the last step but the clock's.

    That step holds the weights, moments, random state of each library, data cursor, schedule clock and early stopping.
    """
    assert read_metrics(run.folder / "batches.jsonl") == read_metrics(reference.folder / "batches.jsonl")
    ours, theirs = (read_metrics(r.folder / "metrics.jsonl") for r in (run, reference))
    assert [row["step"] for row in ours] == list(range(1, len(theirs) + 1))
    assert [without_clock(row) for row in ours] == [without_clock(row) for row in theirs]
    our_step, their_step = (find_latest(r.checkpoints) for r in (run, reference))
    assert our_step.name == their_step.name == f"step_{len(theirs):06d}"
    our_state, their_state = (read_json(step / "trainer_state.json") for step in (our_step, their_step))
    assert without_clock(our_state) == without_clock(their_state)
    assert file_hashes(our_step) == file_hashes(their_step)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == sorted(p.name for p in reference.checkpoints.iterdir())


def without_clock(value: Any) -> Any:
    """The value without what differs between two equal runs: times, speeds, memory."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k != "time" and k not in CLOCK_METRICS}
    return value


def file_hashes(
    folder: Path, but: tuple[str, ...] = ("trainer_state.json", "manifest.json", ".metadata")
) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in but]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_batches(run: Run) -> list[list[int]]:
    """Samples read at each step."""
    return [json.loads(row["read"]) for row in read_metrics(run.folder / "batches.jsonl")]
