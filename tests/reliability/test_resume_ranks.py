"""The same promises for runs on two ranks, whose weights and moments are sharded, and for a changed number of ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import driver
import pytest
import torch
from checks import check_after_kill, check_same_end, check_whole
from steering import fail, finish, kill, kill_at_random
from training_run import Run, dump_state

from rollouts.failpoints import FAILPOINTS
from rollouts.training.checkpoints import find_latest, read_json, read_tensors

NewRun = Callable[..., Run]
Uninterrupted = Callable[[Run], Run]
Killed = Callable[..., Run]


def test_ranks_have_random_states_of_their_own(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    state = read_json(find_latest(uninterrupted(new_run(ranks=2)).checkpoints) / "trainer_state.json")
    assert len(state["rng"]) == 2
    assert state["rng"][0] != state["rng"][1]


KILLS = [  # is the checkpoint sharded, failpoint, hit, rank; after it: steps on disk, step resumed from
    (False, "train.after_optim_step", 3, 0, [2, 4], 4),
    (False, "train.after_optim_step", 3, 1, [2, 4], 4),
    (False, "checkpoint.mid_file", 5, 0, [2, 4], 4),
    (False, "checkpoint.before_latest", 3, 0, [2, 4, 6], 4),
    (True, "train.after_optim_step", 3, 1, [2, 4], 4),
    (True, "checkpoint.before_rename", 3, 0, [2, 4], 4),
    (True, "checkpoint.mid_purge", 1, 0, [4, 6], 6),
]


@pytest.mark.parametrize(("sharded", "name", "hit", "rank", "on_disk", "resumes_from"), KILLS)
def test_killed_at_a_failpoint(
    new_run: NewRun,
    uninterrupted: Uninterrupted,
    sharded: bool,
    name: str,
    hit: int,
    rank: int,
    on_disk: list[int],
    resumes_from: int,
) -> None:
    run = new_run(ranks=2, sharded=sharded)
    kill(run, f"{name}@{hit}", rank=rank)
    check_after_kill(run, on_disk, resumes_from)
    finish(run)
    check_same_end(run, uninterrupted(run))


def test_every_shard_is_in_the_manifest(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    step = find_latest(uninterrupted(new_run(ranks=2, sharded=True)).checkpoints)
    listed = json.loads((step / "manifest.json").read_text())["files"]
    assert {"shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp"} < set(listed)


@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
def test_a_disk_that_fails(new_run: NewRun, uninterrupted: Uninterrupted, sharded: bool) -> None:
    """Every rank ends with the same one line, and none waits for another."""
    run = new_run(ranks=2, sharded=sharded)
    error = fail(run, "checkpoint.mid_manifest@3=enospc")
    assert "step_000006" in error
    assert "No space left on device" in error
    check_after_kill(run, [2, 4], 4)
    error = fail(run, file_size_limit=30_000)
    assert "step_000006" in error
    assert "File too large" in error
    check_after_kill(run, [2, 4], 4)
    finish(run)
    check_same_end(run, uninterrupted(run))


def test_sharing_one_random_state_is_noticed(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    run = new_run(ranks=2)
    kill(run, "train.after_optim_step@3", "rank 0's random state is saved for all")
    finish(run)
    with pytest.raises(AssertionError):
        check_same_end(run, uninterrupted(run))


@pytest.mark.parametrize(("saved", "sharded", "loaded"), [(1, False, 2), (2, False, 1), (2, True, 1), (2, True, 3)])
def test_a_step_loads_on_another_number_of_ranks(
    killed: Killed, tmp_path: Path, saved: int, sharded: bool, loaded: int
) -> None:
    """Weights and moments are those that the run had, bit for bit, and the run goes on from there."""
    run = replace(killed(ranks=saved, sharded=sharded), ranks=loaded)
    twin = killed(ranks=saved, folder=run.folder.with_name("twin"))  # its steps are plain safetensors
    assert set(driver.join(driver.start_ranks(loaded, dump_state, run, tmp_path))) == {0}
    for name in ("model", "optimizer"):
        expected = read_tensors(twin.checkpoints / "latest" / f"{name}.safetensors")
        found = read_tensors(tmp_path / f"{name}.safetensors")
        assert expected.keys() <= found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    finish(run)
    assert check_whole(run.checkpoints) == run.num_steps


def test_shards_of_another_model_are_refused(killed: Killed, wider_model_folder: Path) -> None:
    run = killed(ranks=2, sharded=True)
    assert "model.embed_tokens.weight" in fail(replace(run, model=wider_model_folder))


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize("hit", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(set(FAILPOINTS) - {"checkpoint.mid_replace", "rl.before_sync"}))
def test_every_failpoint(new_run: NewRun, uninterrupted: Uninterrupted, name: str, hit: int, sharded: bool) -> None:
    run = new_run(ranks=2, sharded=sharded, checkpoint_every=1)
    kill(run, f"{name}@{hit}")
    check_whole(run.checkpoints)
    finish(run)
    check_same_end(run, uninterrupted(run))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_ten_random_kills(new_run: NewRun, uninterrupted: Uninterrupted, seed: int) -> None:
    run = new_run(ranks=2, sharded=seed % 2 == 1, num_steps=60, patience=0)
    kill_at_random(run, random.Random(seed))
    check_whole(run.checkpoints)
    finish(run)
    check_same_end(run, uninterrupted(run))
