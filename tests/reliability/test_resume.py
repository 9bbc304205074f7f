"""A supervised run that is killed and started again ends bit for bit like one that never stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mutants
import pytest
from checks import check_after_kill, check_same_end, check_whole, file_hashes, read_batches
from steering import fail, finish, kill, kill_at_random, log_of
from training_run import Run

from rollouts.failpoints import FAILPOINTS
from rollouts.training.checkpoints import CheckpointError, find_latest, read_tensors

NewRun = Callable[..., Run]
Uninterrupted = Callable[[Run], Run]
Killed = Callable[..., Run]

# Failpoint, hit; after it: steps on disk, step resumed from. Checkpoints are made at steps 2, 4, 6, 8; two are kept.
KILLS = [
    ("train.after_optim_step", 3, [2, 4], 4),
    ("checkpoint.mid_file", 5, [2, 4], 4),
    ("checkpoint.mid_file", 6, [2, 4], 4),
    ("checkpoint.before_fsync", 3, [2, 4], 4),
    ("checkpoint.mid_manifest", 3, [2, 4], 4),
    ("checkpoint.before_rename", 3, [2, 4], 4),
    ("checkpoint.after_rename", 3, [2, 4, 6], 4),
    ("checkpoint.before_latest", 3, [2, 4, 6], 4),
    ("checkpoint.mid_purge", 1, [4, 6], 6),
]


def test_a_run_repeats_itself(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    run = new_run()
    finish(run)
    check_same_end(run, uninterrupted(run))
    other = uninterrupted(replace(run, seed=1))
    with pytest.raises(AssertionError):
        check_same_end(run, other)


def test_the_reference_visits_every_sample_once_an_epoch(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    read = [i for step in read_batches(uninterrupted(new_run())) for i in dict.fromkeys(step)]
    assert sorted(read[:11]) == sorted(read[11:22]) == list(range(11))


@pytest.mark.parametrize(("name", "hit", "on_disk", "resumes_from"), KILLS)
def test_killed_at_a_failpoint(
    new_run: NewRun, uninterrupted: Uninterrupted, name: str, hit: int, on_disk: list[int], resumes_from: int
) -> None:
    run = new_run()
    kill(run, f"{name}@{hit}")
    check_after_kill(run, on_disk, resumes_from)
    finish(run)
    check_same_end(run, uninterrupted(run))


def test_every_failpoint_is_killed_at() -> None:
    assert {*(case[0] for case in KILLS), "checkpoint.mid_replace", "rl.before_sync"} == set(FAILPOINTS)


def test_killed_while_a_damaged_step_is_written_again(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    run = new_run()
    kill(run, "checkpoint.mid_purge")
    (run.checkpoints / "step_000006" / "model.safetensors").unlink()
    kill(run, "checkpoint.mid_replace")
    finish(run)
    check_same_end(run, uninterrupted(run))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"precision": "bfloat16"},
        {"lora": True},
        {"num_samples": 2},  # an epoch is shorter than a step
        {"shuffle": False},
        {"patience": 2, "num_steps": 40},  # stops early
    ],
    ids=str,
)
def test_other_kinds_of_run(new_run: NewRun, uninterrupted: Uninterrupted, changes: dict) -> None:
    run = new_run(**changes)
    kill(run, "train.after_optim_step@3")
    finish(run)
    check_same_end(run, uninterrupted(run))


FOUR_STEPS_AN_EPOCH = {"num_samples": 12, "checkpoint_every": 1}


def test_three_kills_in_one_epoch(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    run = new_run(**FOUR_STEPS_AN_EPOCH)
    kill(run, "train.after_optim_step@6")  # in steps 6, 7 and again 7 of the epoch that is steps 5 to 8
    assert check_whole(run.checkpoints) == 5
    kill(run, "checkpoint.before_rename@2")
    assert check_whole(run.checkpoints) == 6
    kill(run, "checkpoint.before_latest@1")
    assert check_whole(run.checkpoints) == 6
    finish(run)
    check_same_end(run, uninterrupted(run))


@pytest.mark.parametrize(
    ("failpoint", "resumes_from"),
    [("train.after_optim_step@4", 3), ("checkpoint.before_latest@4", 3), ("checkpoint.mid_purge@2", 4)],
)
def test_a_kill_at_the_end_of_an_epoch(
    new_run: NewRun, uninterrupted: Uninterrupted, failpoint: str, resumes_from: int
) -> None:
    run = new_run(**FOUR_STEPS_AN_EPOCH)
    kill(run, failpoint)
    assert check_whole(run.checkpoints) == resumes_from
    finish(run)
    check_same_end(run, uninterrupted(run))


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_time(new_run: NewRun, uninterrupted: Uninterrupted, seed: int) -> None:
    run = new_run(num_steps=60, patience=0)
    kill_at_random(run, random.Random(seed))
    check_whole(run.checkpoints)
    finish(run)
    check_same_end(run, uninterrupted(run))


def test_a_finished_run_is_left_as_it_is(new_run: NewRun) -> None:
    run = new_run()
    finish(run)
    before = file_hashes(run.folder, but=("log.txt",))
    finish(run)
    assert file_hashes(run.folder, but=("log.txt",)) == before


def test_a_step_is_a_model_folder_for_transformers(new_run: NewRun, uninterrupted: Uninterrupted) -> None:
    import torch
    import transformers

    latest = uninterrupted(new_run()).checkpoints / "latest"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(latest, output_loading_info=True)
    assert not any(info.values()), info
    assert transformers.AutoTokenizer.from_pretrained(latest).chat_template
    stored = read_tensors(latest / "model.safetensors")
    weights = model.state_dict()
    assert all(torch.equal(weights[name].float(), tensor) for name, tensor in stored.items())


# Mutants --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", ["", *mutants.RESUME_MUTANTS])
def test_forgetting_a_part_of_the_state_is_noticed(killed: Killed, uninterrupted: Uninterrupted, mutant: str) -> None:
    run = killed()
    finish(run, mutant)
    if not mutant:
        return check_same_end(run, uninterrupted(run))
    with pytest.raises(AssertionError):
        check_same_end(run, uninterrupted(run))


@pytest.mark.parametrize(
    ("mutant", "place"),
    [
        ("the rename is dropped", "checkpoint.mid_manifest"),
        ("latest is moved early", "checkpoint.before_rename"),
        ("old steps are purged early", "checkpoint.before_rename"),
    ],
)
def test_a_mistake_in_the_order_is_noticed(new_run: NewRun, mutant: str, place: str) -> None:
    run = new_run()
    name, hit, on_disk, resumes_from = next(case for case in KILLS if case[0] == place)
    kill(run, f"{name}@{hit}", mutant)
    with pytest.raises((AssertionError, CheckpointError)):
        check_after_kill(run, on_disk, resumes_from)


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "action"),
    [pytest.param(case, ("enospc", "eio")[i % 2], id=f"{case[0]}@{case[1]}") for i, case in enumerate(KILLS[1:])],
)
def test_a_disk_that_fails_once(new_run: NewRun, uninterrupted: Uninterrupted, case: tuple, action: str) -> None:
    run = new_run()
    name, hit, on_disk, resumes_from = case
    error = fail(run, f"{name}@{hit}={action}")
    assert {"enospc": "No space left on device", "eio": "Input/output error"}[action] in error
    assert "step_000006" in error
    check_after_kill(run, on_disk, resumes_from)
    finish(run)
    check_same_end(run, uninterrupted(run))


@pytest.mark.parametrize("limit", [50_000, 100_000], ids=["model.safetensors", "optimizer.safetensors"])
def test_a_file_that_does_not_fit(killed: Killed, uninterrupted: Uninterrupted, limit: int) -> None:
    """The limit is the system's own, and the file that meets it is the one that gives the test its name."""
    run = killed()
    error = fail(run, file_size_limit=limit)
    assert "step_000006 could not be written" in error
    assert "File too large" in error
    check_after_kill(run, [2, 4], 4)
    finish(run)
    check_same_end(run, uninterrupted(run))


# Damage ---------------------------------------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random, flip: bool) -> None:
    data = bytearray(path.read_bytes())
    if flip:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)


FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
]


def test_two_hundred_damaged_files(killed: Killed, caplog: pytest.LogCaptureFixture) -> None:
    run = killed()
    rng = random.Random(1)
    newest = run.checkpoints / "step_000004"
    assert sorted(path.name for path in newest.iterdir()) == FILES
    for case in range(200):
        path = newest / FILES[case % len(FILES)]
        original = path.read_bytes()
        damage(path, rng, flip=case % 2 == 0)
        caplog.clear()
        assert find_latest(run.checkpoints).name == "step_000002", f"case {case}: {path} was accepted"
        assert str(path) in caplog.text
        path.write_bytes(original)
    assert find_latest(run.checkpoints) == newest


@pytest.mark.parametrize("name", ["manifest.json", "optimizer.safetensors", "trainer_state.json"])
def test_a_damaged_step_costs_the_way_back_and_nothing_else(
    killed: Killed, uninterrupted: Uninterrupted, name: str
) -> None:
    run = killed()
    path = run.checkpoints / "step_000004" / name
    damage(path, random.Random(2), flip=True)
    finish(run)
    assert str(path) in log_of(run)
    check_same_end(run, uninterrupted(run))


def test_no_good_step_stops_the_run(killed: Killed) -> None:
    run = killed()
    for step in (2, 4):
        damage(run.checkpoints / f"step_{step:06d}" / "model.safetensors", random.Random(3), flip=False)
    before = file_hashes(run.checkpoints, but=())
    assert "none is whole" in fail(run)
    assert file_hashes(run.checkpoints, but=()) == before


# Changed configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 4}, "batch_size"),
        ({"num_samples": 12}, "num_samples"),
        ({"seed": 1}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"optimizer": "muon"}, "optimizer"),
        ({"lora": True}, "lora"),
    ],
    ids=str,
)
def test_a_change_that_cannot_resume_is_named(killed: Killed, changes: dict, key: str) -> None:
    run = killed()
    before = file_hashes(run.checkpoints, but=())
    assert key in fail(replace(run, **changes))
    assert file_hashes(run.checkpoints, but=()) == before


def test_another_model_is_named(killed: Killed, wider_model_folder: Path) -> None:
    run = killed()
    before = file_hashes(run.checkpoints, but=())
    assert "model.embed_tokens.weight" in fail(replace(run, model=wider_model_folder))
    assert file_hashes(run.checkpoints, but=()) == before


# The long versions ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("hit", range(1, 6))
@pytest.mark.parametrize("name", sorted({case[0] for case in KILLS}))
def test_eight_failpoints_five_times(new_run: NewRun, uninterrupted: Uninterrupted, name: str, hit: int) -> None:
    run = new_run(checkpoint_every=1)
    kill(run, f"{name}@{hit}")
    check_whole(run.checkpoints)
    finish(run)
    check_same_end(run, uninterrupted(run))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 120))
def test_twenty_random_kills(new_run: NewRun, uninterrupted: Uninterrupted, seed: int) -> None:
    run = new_run(num_steps=60, patience=0)
    kill_at_random(run, random.Random(seed))
    check_whole(run.checkpoints)
    finish(run)
    check_same_end(run, uninterrupted(run))


@pytest.mark.long
@pytest.mark.parametrize("action", ["enospc", "eio"])
@pytest.mark.parametrize("case", KILLS[1:], ids=lambda case: f"{case[0]}@{case[1]}")
def test_a_disk_that_fails_in_either_way(
    new_run: NewRun, uninterrupted: Uninterrupted, case: tuple, action: str
) -> None:
    test_a_disk_that_fails_once(new_run, uninterrupted, case, action)
