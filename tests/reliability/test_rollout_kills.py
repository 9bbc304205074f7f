"""Kill -9 of a run that rolls out: when it has been started often enough, every prompt was consumed once, in order."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import driver
import pytest
from rollout_run import RolloutRun, roll_out

from rollouts.inference.native import native_library
from rollouts.training.checkpoints import find_latest, read_json

KINDS: dict[str, dict[str, Any]] = {
    "on policy": {},
    "with partial rollouts": {"over_sampling_factor": 2.0, "max_staleness": 1},
    "overlapped": {"max_staleness": 2, "overlap": True},
    "by order of finishing": {"over_sampling_factor": 1.5, "max_staleness": 1, "order": "finished"},
}


def committed(run: RolloutRun) -> dict[str, Any]:
    found = find_latest(run.folder)
    return read_json(found / "trainer_state.json") if found else {"step": 0, "consumed": []}


def finish(run: RolloutRun) -> dict[str, Any]:
    assert driver.run(roll_out, run) == 0, run.folder.with_suffix(".log").read_text()
    return committed(run)


def check_exactly_once(state: dict[str, Any]) -> None:
    """Consumed, dropped and open groups are all that was dealt, none twice; prompts come once an epoch."""
    ledger = state["rollouts"]["ledger"]
    consumed = [group for step in state["consumed"] for group in step]
    numbers = [int(number) for _, number in consumed] + [entry["number"] for entry in ledger["groups"]]
    assert len(set(numbers)) == len(numbers) == ledger["num_dealt"] - sum(ledger["dropped"].values())
    assert max(numbers) < ledger["num_dealt"]
    per_epoch = Counter((int(number) // 7, prompt) for prompt, number in consumed)
    assert set(per_epoch.values()) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again(ram_path: Path, model_folder: Path, kind: str) -> None:
    clean = RolloutRun(ram_path / "clean", model_folder, **KINDS[kind])
    expected = finish(clean)
    assert expected["step"] == 10
    check_exactly_once(expected)

    run = replace(clean, folder=ram_path / "killed")
    rng = random.Random(kind)
    kills = 0
    for _ in range(20):
        process = driver.start(roll_out, run)
        before = committed(run)["step"]
        deadline = time.monotonic() + rng.uniform(0.0, 0.3)
        while process.is_alive() and (committed(run)["step"] == before or time.monotonic() < deadline):
            time.sleep(0.002)
        process.kill()
        process.join()
        kills += process.exitcode == driver.KILLED
        if kills == 4 or (kills and process.exitcode == 0):
            break
        if process.exitcode == 0:
            shutil.rmtree(run.folder)  # it had ended before it was killed: this process slept too long
    assert kills
    state = finish(run)
    check_exactly_once(state)
    assert state["step"] == 10
    if run.order == "dealt" and run.max_staleness == 0 and native_library() is not None:
        assert state["consumed"] == expected["consumed"]  # the very same groups in the very same steps
    else:
        assert [len(step) for step in state["consumed"]] == [len(step) for step in expected["consumed"]]


@pytest.mark.usefixtures("compiled_step")
@pytest.mark.parametrize("place", ["checkpoint.before_rename@2", "checkpoint.after_rename@2", "checkpoint.mid_purge@1"])
def test_killed_while_a_step_is_committed(ram_path: Path, model_folder: Path, place: str) -> None:
    clean = RolloutRun(ram_path / "clean", model_folder)
    expected = finish(clean)
    run = replace(clean, folder=ram_path / "killed")
    assert driver.run(roll_out, run, failpoint=f"{place}=kill") == driver.KILLED
    assert finish(run)["consumed"] == expected["consumed"]
