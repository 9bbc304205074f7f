"""Kill -9 at every failpoint of a process that writes checkpoints: a whole step is always there to resume from."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import driver
import mutants
import pytest
import torch
import writer
from checks import check_whole

from rollouts.failpoints import FAILPOINTS
from rollouts.training.checkpoints import (
    CheckpointError,
    find_latest,
    list_steps,
    read_tensors,
)

LAST, KEEP = 5, 2


def check_content(root: Path) -> int:
    """``check_whole``, and the step's tensors are its own."""
    step = check_whole(root)
    if step == 0:
        return 0
    found = find_latest(root)
    tensors = read_tensors(found / "model.safetensors")
    assert all(torch.equal(tensors[name], expected) for name, expected in writer.step_tensors(step).items())
    return step


def check_finished(root: Path) -> None:
    assert driver.run(writer.write_loop, root, LAST, KEEP) == 0
    assert check_content(root) == LAST
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000004", "step_000005"]


KILLS_IN_STEP_4 = [  # failpoint, the hit that falls into step 4; after it: steps on disk, step resumed from
    ("checkpoint.mid_file", 10, [2, 3], 3),
    ("checkpoint.mid_file", 11, [2, 3], 3),
    ("checkpoint.mid_file", 12, [2, 3], 3),
    ("checkpoint.before_fsync", 4, [2, 3], 3),
    ("checkpoint.mid_manifest", 4, [2, 3], 3),
    ("checkpoint.before_rename", 4, [2, 3], 3),
    ("checkpoint.after_rename", 4, [2, 3, 4], 3),
    ("checkpoint.before_latest", 4, [2, 3, 4], 3),
    ("checkpoint.mid_purge", 2, [3, 4], 4),
]


def kill_writer(root: Path, name: str, hit: int, mutant: str = "") -> None:
    code = driver.run(writer.write_loop, root, LAST, KEEP, mutant, failpoint=f"{name}@{hit}=kill")
    assert code == driver.KILLED


def check_killed_in_step_4(root: Path, on_disk: list[int], resumes_from: int) -> None:
    assert list(list_steps(root)) == on_disk
    assert check_content(root) == resumes_from


@pytest.mark.parametrize(("name", "hit", "on_disk", "resumes_from"), KILLS_IN_STEP_4)
def test_killed_at_a_failpoint(ram_path: Path, name: str, hit: int, on_disk: list[int], resumes_from: int) -> None:
    kill_writer(ram_path, name, hit)
    check_killed_in_step_4(ram_path, on_disk, resumes_from)
    check_finished(ram_path)


@pytest.mark.parametrize(
    ("mutant", "place"),
    [
        ("the rename is dropped", "checkpoint.mid_file"),
        ("the rename is dropped", "checkpoint.before_fsync"),
        ("the rename is dropped", "checkpoint.mid_manifest"),
        ("latest is moved early", "checkpoint.before_rename"),
        ("old steps are purged early", "checkpoint.mid_file"),
        ("old steps are purged early", "checkpoint.before_rename"),
    ],
)
def test_a_mistake_in_the_order_is_noticed(ram_path: Path, mutant: str, place: str) -> None:
    assert mutant in mutants.WRITER_MUTANTS
    name, hit, on_disk, resumes_from = next(case for case in KILLS_IN_STEP_4 if case[0] == place)
    kill_writer(ram_path, name, hit, mutant)
    with pytest.raises((AssertionError, CheckpointError)):
        check_killed_in_step_4(ram_path, on_disk, resumes_from)


@pytest.mark.parametrize("name", sorted({case[0] for case in KILLS_IN_STEP_4}))
def test_killed_in_the_first_step(ram_path: Path, name: str) -> None:
    assert driver.run(writer.write_loop, ram_path, LAST, 1, failpoint=f"{name}=kill") == driver.KILLED
    committed = {"checkpoint.after_rename": 1, "checkpoint.before_latest": 1, "checkpoint.mid_purge": 2}
    assert check_content(ram_path) == committed.get(name, 0)
    check_finished(ram_path)


@pytest.mark.parametrize("name", ["checkpoint.mid_replace", "checkpoint.after_rename", "checkpoint.mid_purge"])
def test_killed_while_a_damaged_step_is_written_again(ram_path: Path, name: str) -> None:
    assert driver.run(writer.write_loop, ram_path, 4, KEEP) == 0
    os.truncate(ram_path / "step_000004" / "model.safetensors", 10)
    assert driver.run(writer.write_loop, ram_path, LAST, KEEP, failpoint=f"{name}=kill") == driver.KILLED
    check_finished(ram_path)


def test_every_checkpoint_failpoint_is_killed_at() -> None:
    named = {*(case[0] for case in KILLS_IN_STEP_4), "checkpoint.mid_replace"}
    assert named == {name for name in FAILPOINTS if name.startswith("checkpoint.")}


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_time(ram_path: Path, seed: int) -> None:
    process = driver.start(writer.write_loop, ram_path, 100_000, KEEP)
    while not list_steps(ram_path):
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 0.05))
    process.kill()
    process.join()
    assert process.exitcode == driver.KILLED
    assert check_content(ram_path) >= 1


def test_a_full_disk(ram_path: Path) -> None:
    """A real one: a file system of 400 KB, on which steps grow until one does not fit."""
    report = ram_path / "report.json"
    disk = ram_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=400k none {disk}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("no right to mount a file system here")
    command = f"{mount} && exec {sys.executable} {writer.__file__} {disk}/checkpoints {report}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(["unshare", "-rm", "sh", "-c", command], check=True, env=environment)
    outcome = json.loads(report.read_text())
    assert "could not be written" in outcome["error"]
    assert "No space left on device" in outcome["error"]
    assert outcome["resumes_from"] == outcome["failed"] - 1 >= 1
    assert outcome["left"] == ["latest", f"step_{outcome['resumes_from']:06d}"]


def test_a_file_size_limit(ram_path: Path) -> None:
    report = ram_path / "report.json"
    assert driver.run(writer.write_until_it_fails, ram_path / "checkpoints", report, 100_000) == 0
    outcome = json.loads(report.read_text())
    assert "File too large" in outcome["error"]
    assert outcome["resumes_from"] == outcome["failed"] - 1 >= 1
