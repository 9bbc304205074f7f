"""An RL run killed again and again: every prompt is learned from once, and the end is the one of a clean run."""

from __future__ import annotations

import json
from pathlib import Path

import driver
import rl_run
import torch

from rollouts.inference.native import native_library
from rollouts.training.checkpoints import read_tensors

# Of every two commits at a step the critic's is the first, the policy's the second.
KILLS = (
    "train.after_optim_step@1",  # step 2: nothing is on disk yet
    "checkpoint.mid_file@6",  # between two files of a commit
    "checkpoint.after_rename@1",  # the critic has committed a step that the policy has not
    "checkpoint.before_latest@2",  # both have, and `latest` does not know
    "rl.before_sync@2",  # a later step, learned and committed or not; the engine has not got it
    "checkpoint.mid_purge@1",
    "rl.before_sync@1",  # the first act of a resumed run
)


def test_kills_lose_no_prompt_and_learn_from_none_twice(tmp_path: Path, tiny_model_dir: Path) -> None:
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    for folder in (clean, killed):
        folder.mkdir()
    assert driver.run(rl_run.train, clean, tiny_model_dir) == 0
    died = [driver.run(rl_run.train, killed, tiny_model_dir, failpoint=f"{kill}=kill") for kill in KILLS]
    assert died.count(driver.KILLED) >= 6, died
    assert driver.run(rl_run.train, killed, tiny_model_dir) == 0

    consumed = [json.loads(line) for line in (killed / "rollouts.jsonl").open()]
    assert len(consumed) == rl_run.NUM_STEPS * 3 * 2
    assert len({sample["id"] for sample in consumed}) == len(consumed)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").open()]
    assert steps == list(range(1, rl_run.NUM_STEPS + 1))
    if native_library() is None:
        return  # a run repeats to the last bit by the engine's compiled step alone; the books are right either way
    assert (killed / "rollouts.jsonl").read_text() == (clean / "rollouts.jsonl").read_text()
    a, b = read_tensors(clean / "end.safetensors"), read_tensors(killed / "end.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
