"""Checkpoints: what is committed reads back, and damage of any kind is found and named."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from rollouts.errors import UserError
from rollouts.failpoints import FAILPOINTS, FailpointError, failpoint, reset_failpoints
from rollouts.training.checkpoints import (
    CheckpointError,
    checkpoint_transaction,
    find_latest,
    list_steps,
    read_json,
    read_tensors,
    require_same,
    sweep_orphans,
    verify_checkpoint,
    write_json,
    write_tensors,
)


def commit(root: Path, step: int, keep: int = 3) -> Path:
    generator = torch.Generator().manual_seed(step)
    with checkpoint_transaction(root, step, keep) as folder:
        write_tensors(folder / "model.safetensors", {"w": torch.randn(16, 8, generator=generator)})
        write_tensors(folder / "optimizer.safetensors", {"w.exp_avg": torch.randn(16, 8, generator=generator)})
        write_json(folder / "trainer_state.json", {"step": step})
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return root / f"step_{step:06d}"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_committed_step_reads_back(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(4, 3),
        "bf16": torch.randn(7).to(torch.bfloat16),
        "int": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 5).T,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    value = {"step": 7, "lr": 0.1 + 0.2, "names": ["ä", "\ud800"], "none": None}
    with checkpoint_transaction(tmp_path / "checkpoints", 7) as folder:
        write_tensors(folder / "a.safetensors", tensors)
        write_json(folder / "state.json", value)
    step = find_latest(tmp_path / "checkpoints")
    assert step == tmp_path / "checkpoints" / "step_000007"
    assert read_json(step / "state.json") == value
    read = read_tensors(step / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())


def test_tensors_read_do_not_hold_the_file_open(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(1000)})
    read = read_tensors(tmp_path / "a.safetensors")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert read["w"].sum() == 1000


def test_latest_is_a_link_that_opens_as_a_folder(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    assert os.readlink(tmp_path / "latest") == "step_000002"  # relative: the run folder may be moved
    assert read_json(tmp_path / "latest" / "trainer_state.json") == {"step": 2}


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        commit(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step_000030", "step_000040"]


def test_keep_zero_keeps_all(tmp_path: Path) -> None:
    for step in range(5):
        commit(tmp_path, step, keep=0)
    assert list(list_steps(tmp_path)) == [0, 1, 2, 3, 4]


def test_a_run_that_went_back_purges_the_steps_it_left_first(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        commit(tmp_path, step)
    commit(tmp_path, 15, keep=2)
    assert names(tmp_path) == ["latest", "step_000010", "step_000015"]
    assert find_latest(tmp_path).name == "step_000015"


def test_a_million_steps_sort_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        commit(tmp_path, step)
    assert list(list_steps(tmp_path)) == [999_999, 1_000_000]
    assert find_latest(tmp_path).name == "step_1000000"


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    commit(tmp_path, 5)
    with checkpoint_transaction(tmp_path, 5) as folder:
        write_json(folder / "trainer_state.json", {"step": 5, "second": True})
    assert names(tmp_path) == ["latest", "step_000005"]
    assert read_json(find_latest(tmp_path) / "trainer_state.json")["second"]
    assert not (tmp_path / "step_000005" / "model.safetensors").exists()


def test_files_written_by_another_process_are_part_of_the_step(tmp_path: Path) -> None:
    with checkpoint_transaction(tmp_path, 1) as folder:
        write_json(folder / "trainer_state.json", {})
        child = os.fork()
        if child == 0:  # a second rank: it knows the folder's name and nothing of the transaction
            (folder / "shard_1").mkdir()
            (folder / "shard_1" / "data.bin").write_bytes(b"12345")
            os._exit(0)
        os.waitpid(child, 0)
    manifest = read_json(tmp_path / "step_000001" / "manifest.json")
    assert manifest["files"]["shard_1/data.bin"]["size"] == 5
    verify_checkpoint(tmp_path / "step_000001")


def test_an_exception_in_the_body_leaves_no_trace(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), checkpoint_transaction(tmp_path, 2) as folder:
        write_json(folder / "trainer_state.json", {"step": 2})
        _ = 1 / 0
    assert names(tmp_path) == ["latest", "step_000001"]


def test_an_empty_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing was written"), checkpoint_transaction(tmp_path, 2):
        pass
    assert names(tmp_path) == []


def test_tied_tensors_are_refused(tmp_path: Path) -> None:
    w = torch.randn(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(tmp_path / "a.safetensors", {"a": w, "b": w})


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "absent") is None
    assert find_latest(tmp_path) is None
    assert sweep_orphans(tmp_path / "absent") == []


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def test_two_hundred_damaged_files_are_found_and_the_step_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(0)
    for step in (10, 20):
        commit(tmp_path, step)
    files = sorted(path for path in (tmp_path / "step_000020").rglob("*") if path.is_file())
    assert len(files) == 5
    for case in range(200):
        path = files[case % len(files)]
        original = path.read_bytes()
        (flip_bit if case // len(files) % 2 else truncate)(path, rng)
        caplog.clear()
        assert find_latest(tmp_path) == tmp_path / "step_000010", f"case {case}: {path} is damaged and was accepted"
        assert str(path) in caplog.text
        with pytest.raises(CheckpointError, match=path.name):
            verify_checkpoint(tmp_path / "step_000020")
        path.write_bytes(original)
    assert find_latest(tmp_path) == tmp_path / "step_000020"


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    with checkpoint_transaction(tmp_path, 1) as folder:
        (folder / "a.json").write_text("{}")
    manifest = tmp_path / "step_000001" / "manifest.json"
    original = manifest.read_bytes()
    for bit in range(0, len(original) * 8, 3):  # every byte, and over them every bit
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify_checkpoint(manifest.parent)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "files": {"a": 3}}', '{"format": 2, "files": {}}'])
def test_a_manifest_that_is_json_and_no_manifest(tmp_path: Path, content: str) -> None:
    step = commit(tmp_path, 1)
    (step / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(step)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    step = commit(tmp_path, 1)
    (step / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        verify_checkpoint(step)


def test_no_good_step_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (commit(tmp_path, step) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds 2 checkpoints and none is whole"):
        find_latest(tmp_path)


@pytest.mark.parametrize("damage", ["absent", "dangling", "a file", "elsewhere"])
def test_a_lost_latest_gives_the_newest_step(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    for step in (9, 10):
        commit(tmp_path, step)
    latest = tmp_path / "latest"
    latest.unlink()
    if damage == "dangling":
        latest.symlink_to("step_000011")
    elif damage == "a file":
        latest.write_text("step_000009")
    elif damage == "elsewhere":
        latest.symlink_to(tmp_path)
    assert find_latest(tmp_path) == tmp_path / "step_000010"
    assert "latest names no step" in caplog.text


def test_latest_decides_when_it_was_moved_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step_000002")
    assert find_latest(tmp_path) == tmp_path / "step_000002"
    (tmp_path / "step_000002" / "model.safetensors").unlink()
    assert find_latest(tmp_path) == tmp_path / "step_000001"  # before it, not after
    (tmp_path / "step_000001" / "model.safetensors").unlink()
    assert find_latest(tmp_path) == tmp_path / "step_000003"


def test_the_sweep_removes_orphans_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    commit(tmp_path, 1)
    orphans = ["step_000002.tmp", "step_000000.purged.tmp"]
    for name in (*orphans, "mine.tmp", "step_000003.backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "latest.tmp").symlink_to("step_000001")
    swept = sweep_orphans(tmp_path)
    assert sorted(path.name for path in swept) == sorted([*orphans, "latest.tmp"])
    assert names(tmp_path) == ["latest", "mine.tmp", "step_000001", "step_000003.backup"]
    assert "swept 3" in caplog.text


def test_a_half_done_replacement_is_undone_by_the_sweep(tmp_path: Path) -> None:
    step = commit(tmp_path, 1)
    step.rename(tmp_path / "step_000001.replaced")
    sweep_orphans(tmp_path)
    assert find_latest(tmp_path) == step
    shutil.copytree(step, tmp_path / "step_000001.replaced")
    sweep_orphans(tmp_path)
    assert names(tmp_path) == ["latest", "step_000001"]


DISK_FAILPOINTS = [name for name in FAILPOINTS if name.startswith("checkpoint.")]


@pytest.mark.parametrize("action", ["enospc", "eio", "raise"])
@pytest.mark.parametrize("name", DISK_FAILPOINTS)
def test_a_failing_disk_leaves_a_good_step(
    tmp_path: Path, name: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path, 1, keep=1)
    written = 1 if name == "checkpoint.mid_replace" else 2
    reset_failpoints()
    monkeypatch.setenv("ROLLOUTS_FAILPOINT", f"{name}={action}")
    with pytest.raises(FailpointError if action == "raise" else CheckpointError) as caught:
        commit(tmp_path, written, keep=1)
    if action != "raise":
        assert f"step_{written:06d}" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__.errno == {"enospc": errno.ENOSPC, "eio": errno.EIO}[action]
    monkeypatch.delenv("ROLLOUTS_FAILPOINT")

    sweep_orphans(tmp_path)
    survivor = find_latest(tmp_path)
    assert read_json(survivor / "trainer_state.json")["step"] == (2 if name == "checkpoint.mid_purge" else 1)
    commit(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["latest", "step_000003"]


@pytest.mark.parametrize("spec", ["checkpoint.before_renam=kill", "checkpoint.before_rename=explode", "x", "a@=b"])
def test_a_misspelt_failpoint_never_passes_silently(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUTS_FAILPOINT", spec)
    with pytest.raises(ValueError, match="ROLLOUTS_FAILPOINT"):
        failpoint("checkpoint.before_rename")


def test_a_failpoint_acts_at_the_hit_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    reset_failpoints()
    monkeypatch.setenv("ROLLOUTS_FAILPOINT", "checkpoint.before_rename@3=raise")
    failpoint("checkpoint.before_rename")
    failpoint("checkpoint.after_rename")
    failpoint("checkpoint.before_rename")
    with pytest.raises(FailpointError):
        failpoint("checkpoint.before_rename")
    failpoint("checkpoint.before_rename")


def test_a_changed_setting_is_named_with_both_values() -> None:
    saved = {"train": {"batch_size": 8, "seed": 0}, "optimizer": {"betas": [0.9, 0.95]}}
    require_same(saved, json.loads(json.dumps(saved)), "step_000010")
    with pytest.raises(UserError, match=r"step_000010 .*train\.batch_size was 8 and is now 16"):
        require_same(saved, {**saved, "train": {"batch_size": 16, "seed": 0}}, "step_000010")
    with pytest.raises(UserError, match=r"train\.seed was 0 and is now None"):
        require_same(saved, {**saved, "train": {"batch_size": 8}}, "step_000010")
