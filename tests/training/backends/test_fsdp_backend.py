"""FSDP on two gloo ranks against one device: one launch runs every check of fsdp_worker.py, and the tests read it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsdp_worker as worker
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollouts.errors import UserError
from rollouts.training.backends import FSDPConfig, PyTorchTrainingBackend, create_fsdp_backend
from rollouts.training.checkpoints import verify_checkpoint

OPTIMIZERS = ("adamw", "muon")


@pytest.fixture(scope="session")
def fsdp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left: results_<rank>.json, weights and checkpoints; one launch for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "fsdp"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "launched").exists():
            (folder / "launched").touch()
            launch(folder)
    return folder


def launch(folder: Path) -> None:
    """Run all checks on two ranks, which begin with step 2 of one device."""
    (folder / "a_file").touch()
    for optimizer in OPTIMIZERS:
        backend = worker.one_device(worker.make_model(), optimizer, checkpoint_dir=folder / f"one_{optimizer}")
        with worker.muon_by(worker.orthogonalized):
            worker.train(backend, range(2))
        backend.save_checkpoint(2).wait()
    script = Path(worker.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def results_of(check: str, folder: Path) -> list[Any]:
    """Both ranks' results of one check."""
    both = [json.loads((folder / f"results_{rank}.json").read_text())[f"check_{check}"] for rank in range(2)]
    for result in both:
        assert not (isinstance(result, dict) and "error" in result), result["error"]
    return both


@pytest.fixture(autouse=True)
def muon_in_float32() -> Iterator[None]:
    with worker.muon_by(worker.orthogonalized):
        yield


def assert_close(a: list[dict[str, float]], b: list[dict[str, float]], atol: float = 1e-5) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert {**x, "grad_norm": 0} == pytest.approx({**y, "grad_norm": 0}, rel=0, abs=atol)
        assert x.get("grad_norm", 0) == pytest.approx(y.get("grad_norm", 0), rel=10 * atol)


MODELS: dict[str, Any] = {
    **dict.fromkeys(worker.STRATEGIES, worker.make_model),
    "untied": lambda: worker.make_model(tied=False),
    "muon": worker.make_model,
    "recomputing": worker.make_model,
    "lora": worker.lora_model,
    "frozen": worker.frozen_model,
}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_learn_what_one_does(fsdp_folder: Path, name: str) -> None:
    results = results_of("training", fsdp_folder)
    backend = worker.one_device(MODELS[name](), "muon" if name == "muon" else "adamw")
    history = [*worker.train(backend), {"loss": worker.evaluate(backend)}]
    assert results[0][name] == results[1][name]
    assert_close(results[0][name], history)
    expected = backend.get_weights().wait()
    for rank in range(2):
        weights = torch.load(fsdp_folder / f"weights_{name}_{rank}.pt")
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def test_muon_as_torch_rounds_it_stays_near(fsdp_folder: Path) -> None:
    """In bfloat16 the number of threads alone moves these losses by 5e-5, two ranks by 1e-4."""
    results = results_of("training", fsdp_folder)
    rounded, exact = (results[0][name] for name in ("muon_in_bfloat16", "muon"))
    assert results[0]["muon_in_bfloat16"] == results[1]["muon_in_bfloat16"]
    with worker.muon_by(worker.TORCH_MUON):
        backend = worker.one_device(worker.make_model(), "muon")
        assert_close(rounded, [*worker.train(backend), {"loss": worker.evaluate(backend)}], 5e-4)
    assert [m["loss"] for m in rounded] != [m["loss"] for m in exact]


def test_mixed_precision_stays_near(fsdp_folder: Path) -> None:
    results = results_of("training", fsdp_folder)
    exact, mixed = results[0]["FULL_SHARD"], results[0]["mixed_precision"]
    assert [m["loss"] for m in mixed] == pytest.approx([m["loss"] for m in exact], rel=5e-3)
    assert [m["loss"] for m in mixed] != [m["loss"] for m in exact]


def test_offloading_changes_no_number(fsdp_folder: Path) -> None:
    results = results_of("cpu_offload", fsdp_folder)
    assert_close(results[0], worker.train(worker.one_device(worker.make_model())))


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
def test_gradients_travel_once_a_call(fsdp_folder: Path, strategy: str) -> None:
    """One reduction a sharded group (two layers and the root) and one of the sums, however many micro-batches."""
    results = results_of("communication", fsdp_folder)
    exchange = "allreduce_" if strategy == "NO_SHARD" else "_reduce_scatter_base_"
    for parts in ("1", "4"):
        counts = results[0][f"{strategy} {parts}"]
        assert counts[exchange] + counts["allreduce_"] * (strategy != "NO_SHARD") == 4
    # A layer's weights are gathered for forward and again for backward only where they are given up in between.
    gathered = {"FULL_SHARD": 5, "SHARD_GRAD_OP": 3, "NO_SHARD": 0}[strategy]
    assert results[0][f"{strategy} 1"].get("_allgather_base_", 0) == gathered


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
def test_evaluation_leaves_no_stale_weights(fsdp_folder: Path, strategy: str) -> None:
    results = results_of("stale_weights", fsdp_folder)
    backend = worker.one_device(worker.make_model(seed=5))
    expected = [worker.evaluate(backend)]
    backend.forward_backward(worker.step_batches(0, backend)).wait()
    backend.optim_step().wait()
    learned = backend.forward_backward(worker.step_batches(1, backend)).wait()
    assert results[0][strategy] == pytest.approx([*expected, learned["loss"], learned["grad_norm"]], rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_two_ranks_resume_bit_for_bit(fsdp_folder: Path, kind: str, optimizer: str) -> None:
    results = results_of("checkpoints", fsdp_folder)
    for rank in range(2):
        result = results[rank][f"{kind} {optimizer}"]
        assert result["step"] == "step_000002" and result["state"] == {"cursor": 7}
        assert result["random"] and result["history"] and result["different"] == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_one_device_resumes_what_two_ranks_began(fsdp_folder: Path, kind: str, optimizer: str) -> None:
    results = results_of("checkpoints", fsdp_folder)
    step = fsdp_folder / f"{kind}_{optimizer}" / "step_000002"
    verify_checkpoint(step)
    backend = worker.one_device(worker.make_model(seed=8), optimizer)
    backend.load_checkpoint(step).wait()
    losses = [m["loss"] for m in worker.train(backend, range(2, 4))]
    assert losses == pytest.approx(results[0][f"{kind} {optimizer}"]["losses"], rel=0, abs=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_ranks_resume_what_one_device_began(fsdp_folder: Path, optimizer: str) -> None:
    results = results_of("from_one_device", fsdp_folder)
    backend = worker.one_device(worker.make_model(), optimizer)
    assert_close(results[0][optimizer], worker.train(backend)[2:])


def test_a_full_checkpoint_is_a_transformers_model(fsdp_folder: Path) -> None:
    step = fsdp_folder / "full_adamw" / "step_000002"
    loaded, report = AutoModelForCausalLM.from_pretrained(step, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    backend = worker.one_device(worker.make_model())
    worker.train(backend, range(2))
    for (name, a), b in zip(loaded.named_parameters(), backend.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_an_adapter_resumes_bit_for_bit(fsdp_folder: Path, kind: str) -> None:
    results = results_of("partly_trained_checkpoints", fsdp_folder)
    assert results[0][f"{kind} lora"] == results[1][f"{kind} lora"] == [True, []]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_frozen_weights_are_part_of_a_checkpoint(fsdp_folder: Path, kind: str) -> None:
    """A model made with other values resumes with those of the run, on two ranks and on one device."""
    for rank in range(2):
        assert results_of("partly_trained_checkpoints", fsdp_folder)[rank][f"{kind} frozen"] == [True, []]
    backend = worker.one_device(worker.frozen_model(seed=4), checkpoint_dir=fsdp_folder / f"frozen_{kind}")
    backend.load_checkpoint(backend.find_checkpoint()).wait()
    saved = torch.load(fsdp_folder / f"frozen_{kind}_0.pt")
    assert not worker.same(worker.weights(backend), saved)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_save_that_fails_fails_on_every_rank(fsdp_folder: Path, kind: str) -> None:
    results = results_of("failed_save", fsdp_folder)
    for rank in range(2):
        name, message, steps = results[rank][kind]
        assert name == "UnwrittenCheckpointError" and "a_file/step_000001 could not be written" in message
        assert steps == 2  # and training goes on


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_of_another_model_names_the_weight(fsdp_folder: Path, kind: str) -> None:
    results = results_of("wrong_checkpoint", fsdp_folder)
    for rank in range(2):
        is_user_error, message = results[rank][kind]
        assert is_user_error and "model.layers.2." in message


def test_one_ranks_bad_gradient_is_skipped_by_all(fsdp_folder: Path) -> None:
    results = results_of("bad_gradient_on_one_rank", fsdp_folder)
    assert results[0] == results[1]
    assert results[0]["skipped"] == 1 and results[0]["different"] == []
    expected = worker.train(worker.one_device(worker.make_model()))
    assert_close(results[0]["next"], [m | {"skipped_steps": 1} for m in expected])


def test_no_checkpoint_mends_a_torn_pass(fsdp_folder: Path) -> None:
    """torch's FSDP would no longer reduce gradients, and say nothing."""
    results = results_of("torn_pass", fsdp_folder)
    for rank in range(2):
        failure, refusal = results[rank]
        assert failure.startswith("ZeroDivisionError") and "make a new backend" in refusal


def test_helpers_agree_over_ranks(fsdp_folder: Path) -> None:
    results = results_of("helpers", fsdp_folder)
    for rank in range(2):
        assert results[rank] == {
            "gathered": [{"rank": 0}, {"rank": 1}],
            "broadcast": "from 1",
            "sum": [3.0],
            "main": rank == 0,
            "world": 2,
        }
    x, mask, white = (torch.cat(parts) for parts in zip(*(torch.load(fsdp_folder / f"whiten_{r}.pt") for r in (0, 1))))
    valid = x[mask > 0]
    torch.testing.assert_close(white[mask > 0], (valid - valid.mean()) / valid.std(), rtol=1e-4, atol=1e-5)


def test_an_optimizer_made_before_the_sharding_is_refused(fsdp_folder: Path) -> None:
    results = results_of("refusals", fsdp_folder)
    assert "optimizer factory" in results[0]


def test_bad_layouts_and_no_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="use FULL_SHARD, SHARD_GRAD_OP or NO_SHARD"):
        FSDPConfig("HYBRID")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="use full or sharded"):
        FSDPConfig(checkpoint_format="pickle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="launch by torchrun"):
        create_fsdp_backend(worker.make_model(), device="cpu")
    assert issubclass(worker.FSDPTrainingBackend, PyTorchTrainingBackend)


def test_log_probs_are_those_of_one_device(fsdp_folder: Path) -> None:
    for result in results_of("log_probs", fsdp_folder):
        assert result.pop("adapter") > 1e-3
        assert len(result) == 13 and max(result.values()) < 1e-5, result
