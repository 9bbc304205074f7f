"""Supervised training: what it learns, validates, stops at, saves and resumes, on a tiny model."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollouts.errors import UserError
from rollouts.training.backends import OptimizerConfig, PyTorchTrainingBackend, ScheduleConfig, create_pytorch_backend
from rollouts.training.checkpoints import find_latest, read_json
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops import prepare_sft_batch, run_sft_training
from rollouts.training.loops.sft_loop import EarlyStopping
from rollouts.training.metrics import JSONLLogger
from rollouts.training.types import Sample, SFTTrainingConfig

MakeModel = Callable[..., PreTrainedModel]


class Recorder:
    """A metrics logger that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        pass


def make_samples(count: int = 10, seed: int = 0) -> list[Sample]:
    """Counting up by a step that the first two tokens tell: there is something to learn."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        start, stride, n = (int(x) for x in rng.integers([10, 1, 5], [200, 4, 12]))
        tokens = [start + stride * i for i in range(n)]
        samples.append(Sample(tokens=tokens, loss_mask=[0.0, 0.0] + [1.0] * (n - 2)))
    return samples


def make_backend(make_tiny_model: MakeModel, folder: Path | None = None, **options: Any) -> PyTorchTrainingBackend:
    optimizer = OptimizerConfig(lr=options.pop("lr", 3e-3))
    model = make_tiny_model(seed=options.pop("seed", 0))
    return create_pytorch_backend(model, checkpoint_dir=folder, optimizer=optimizer, device="cpu", **options)


def config(**changes: Any) -> SFTTrainingConfig:
    return SFTTrainingConfig(**{"num_steps": 6, "batch_size": 4, "max_tokens_per_micro_batch": 32, **changes})


def run(
    backend: PyTorchTrainingBackend, samples: Sequence[Sample], settings: SFTTrainingConfig, **options: Any
) -> list[dict[str, Any]]:
    logger = options.pop("logger", None) or Recorder()
    return asyncio.run(run_sft_training(backend, samples, settings, logger, **options))


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the clock decides."""
    timed = {"tokens_per_second", "mfu", "step_seconds", "peak_memory_mb"}
    return [{k: v for k, v in row.items() if k not in timed} for row in history]


def state(backend: PyTorchTrainingBackend) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in backend.model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_is_the_plain_loop(make_tiny_model: MakeModel) -> None:
    """The same batches, step by step, by hand."""
    samples, settings = make_samples(), config(num_steps=5)
    a, b = make_backend(make_tiny_model), make_backend(make_tiny_model)
    recorder = Recorder()
    history = run(a, samples, settings, logger=recorder)
    cursor = DataBuffer(range(10), seed=0)
    for row in history:
        batch = [samples[i] for i in cursor.get_prompts(4)]
        learned = b.forward_backward(prepare_sft_batch(batch)).wait()
        updated = b.optim_step().wait()
        assert row["loss"] == pytest.approx(learned["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(updated["grad_norm"], rel=1e-3)
        assert row["num_tokens"] == sum(s.num_loss_tokens for s in batch)
        assert row["tokens"] == sum(len(s) for s in batch) and row["samples"] == 4
    assert recorder.rows == [(row["step"], row) for row in history]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in history] == [0, 0, 1, 1, 1]
    for key in ("accuracy", "lr", "tokens_per_second", "mfu", "peak_memory_mb", "skipped_steps"):
        assert math.isfinite(history[0][key]), key


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_learns_under_either_event_loop(make_tiny_model: MakeModel, backend: str) -> None:
    trainer, samples = make_backend(make_tiny_model, lr=1e-2), make_samples(8)

    async def train() -> list[dict[str, Any]]:
        return await run_sft_training(trainer, samples, config(num_steps=25, batch_size=8), Recorder())

    history = anyio.run(train, backend=backend)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]


def test_packing_and_micro_batches_change_nothing(make_tiny_model: MakeModel) -> None:
    runs = [
        run(make_backend(make_tiny_model), make_samples(), config(packing=packing, max_tokens_per_micro_batch=size))
        for packing in (True, False)
        for size in (1, 24, 1000)
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
            assert b["num_tokens"] == a["num_tokens"]


def test_without_shuffling_the_order_is_kept(make_tiny_model: MakeModel) -> None:
    samples = make_samples(4)
    rows = run(make_backend(make_tiny_model), samples, config(num_steps=6, batch_size=1, shuffle=False))
    assert [r["tokens"] for r in rows] == [len(samples[i % 4]) for i in range(6)]


def test_validation_is_the_mean_over_all_its_tokens(make_tiny_model: MakeModel) -> None:
    held_out = make_samples(7, seed=5)
    backend = make_backend(make_tiny_model)
    history = run(backend, make_samples(), config(num_steps=5, eval_every=2), validation=held_out)
    assert [row["step"] for row in history if "val_loss" in row] == [2, 4, 5]  # and at the last step
    expected = backend.evaluate(prepare_sft_batch(held_out)).wait()
    assert history[-1]["val_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert history[-1]["val_accuracy"] == pytest.approx(expected["accuracy"])
    plain = run(make_backend(make_tiny_model), make_samples(), config(num_steps=5))
    assert [r["loss"] for r in plain] == [r["loss"] for r in history]  # measuring changes nothing


def test_validation_never_asked_for_still_comes_at_the_end(make_tiny_model: MakeModel) -> None:
    history = run(make_backend(make_tiny_model), make_samples(), config(num_steps=3), validation=make_samples(3))
    assert ["val_loss" in row for row in history] == [False, False, True]


# Early stopping -----------------------------------------------------------------------------------------------------


def test_patience_counts_validations_without_a_lower_loss() -> None:
    stopper = EarlyStopping(2)
    seen = []
    for loss in (3.0, 2.0, 2.0, 1.9, 2.5, math.nan, 1.0):
        stopper.update(loss)
        seen.append(stopper.should_stop)
    assert seen == [False, False, False, False, False, True, False]
    never = EarlyStopping(0)
    for _ in range(5):
        never.update(1.0)
    assert not never.should_stop


def test_a_loss_that_is_not_a_number_is_no_best() -> None:
    stopper = EarlyStopping(2)
    for loss in (math.nan, 2.0, 1.0):
        stopper.update(loss)
    assert stopper.best == 1.0 and not stopper.should_stop


def diverging(make_tiny_model: MakeModel, folder: Path | None) -> PyTorchTrainingBackend:
    return make_backend(make_tiny_model, folder, lr=0.3)  # far too high: the validation loss rises soon


@pytest.mark.parametrize("interrupted", [False, True])
def test_early_stopping_survives_a_resume(make_tiny_model: MakeModel, tmp_path: Path, interrupted: bool) -> None:
    held_out = make_samples(5, seed=9)
    settings = config(num_steps=40, eval_every=1, checkpoint_every=1, early_stopping_patience=3, keep_checkpoints=0)
    whole = run(diverging(make_tiny_model, tmp_path / "whole"), make_samples(), settings, validation=held_out)
    assert len(whole) < 40
    losses = [row["val_loss"] for row in whole]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 and all(later >= losses[best] for later in losses[best + 1 :])
    assert find_latest(tmp_path / "whole").name == f"step_{len(whole):06d}"  # the stopping step is saved
    if interrupted:
        short = config(num_steps=len(whole) - 1, eval_every=1, early_stopping_patience=3)
        run(diverging(make_tiny_model, tmp_path / "cut"), make_samples(), short, validation=held_out)
        rest = run(diverging(make_tiny_model, tmp_path / "cut"), make_samples(), settings, validation=held_out)
        assert numbers(rest) == numbers(whole[-1:])
    again = run(diverging(make_tiny_model, tmp_path / "whole"), make_samples(), settings, validation=held_out)
    assert again == whole[-1:]  # a stopped run stays stopped


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_checkpoints_come_when_due_and_always_at_the_end(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    for every, expected in ((0, [5]), (2, [2, 4, 5]), (5, [5])):
        folder = tmp_path / str(every)
        run(
            make_backend(make_tiny_model, folder),
            make_samples(),
            config(num_steps=5, checkpoint_every=every, keep_checkpoints=0),
        )
        assert sorted(p.name for p in folder.glob("step_*")) == [f"step_{s:06d}" for s in expected]
    run(make_backend(make_tiny_model, tmp_path / "two"), make_samples(), config(checkpoint_every=1, keep_checkpoints=2))
    assert sorted(p.name for p in (tmp_path / "two").glob("step_*")) == ["step_000005", "step_000006"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_run(make_tiny_model: MakeModel, tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {"precision": precision, "schedule": ScheduleConfig("cosine"), "num_steps": 7}
    samples, held_out = make_samples(), make_samples(3, seed=4)
    settings = config(num_steps=7, eval_every=2, checkpoint_every=3)
    whole = make_backend(make_tiny_model, tmp_path / "whole", **options)
    history = run(whole, samples, settings, validation=held_out)

    first = make_backend(make_tiny_model, tmp_path / "cut", **options)
    run(first, samples, config(num_steps=3, eval_every=2), validation=held_out)
    second = make_backend(make_tiny_model, tmp_path / "cut", seed=77, **options)  # other weights, to be overwritten
    rest = run(second, samples, settings, validation=held_out)
    assert numbers(rest) == numbers(history[3:])
    assert_same(state(whole), state(second))
    a, b = (read_json(find_latest(tmp_path / name) / "trainer_state.json") for name in ("whole", "cut"))
    assert a["state"]["cursor"] == b["state"]["cursor"] and a["rng"] == b["rng"]


def test_a_completed_run_gives_its_last_metrics(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    history = run(make_backend(make_tiny_model, tmp_path), make_samples(), config(), validation=make_samples(2))
    backend, recorder = make_backend(make_tiny_model, tmp_path, seed=3), Recorder()
    assert run(backend, make_samples(), config(), logger=recorder) == history[-1:]
    assert recorder.rows == []
    longer = run(backend, make_samples(), config(num_steps=8))  # and can be made longer
    assert [row["step"] for row in longer] == [7, 8]


def test_resume_can_be_declined(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    first = run(make_backend(make_tiny_model, tmp_path), make_samples(), config())
    again = run(make_backend(make_tiny_model, tmp_path), make_samples(), config(), resume=False)
    assert numbers(again) == numbers(first)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"batch_size": 5}, "batch_size"), ({"seed": 3}, "seed"), ({"shuffle": False}, "shuffle"), ({}, "num_samples")],
)
def test_a_checkpoint_of_another_run_is_refused(
    make_tiny_model: MakeModel, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    run(make_backend(make_tiny_model, tmp_path), make_samples(), config(num_steps=2))
    samples = make_samples(10 if change else 11)
    with pytest.raises(UserError, match=key):
        run(make_backend(make_tiny_model, tmp_path), samples, config(num_steps=4, **change))


def test_without_a_folder_nothing_is_written(
    make_tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(make_backend(make_tiny_model), make_samples(), config(checkpoint_every=1))
    assert list(tmp_path.iterdir()) == []


# Faults -------------------------------------------------------------------------------------------------------------


def poisoned(count: int) -> list[Sample]:
    samples = make_samples(count)
    samples[1].loss_mask = [0.0, 0.0] + [math.inf] * (len(samples[1]) - 2)
    return samples


def test_a_bad_step_is_counted_and_saved_around(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    """One sample's weight is infinite: its steps are skipped, and a checkpoint at such a step is as good as any."""
    settings = config(num_steps=6, batch_size=1, shuffle=False, checkpoint_every=1, keep_checkpoints=0)
    history = run(make_backend(make_tiny_model, tmp_path), poisoned(4), settings)
    assert [row["skipped"] for row in history] == [0, 1, 0, 0, 0, 1]
    assert [row["skipped_steps"] for row in history] == [0, 1, 1, 1, 1, 2]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]  # the run's steps; the schedule's are fewer
    again = run(make_backend(make_tiny_model, tmp_path), poisoned(4), settings)
    assert again[0]["step"] == 6 and again[0]["skipped"] == 1


def test_too_many_bad_steps_end_the_run(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    backend = make_backend(make_tiny_model, tmp_path)
    samples = make_samples(3)
    for sample in samples:
        sample.loss_mask = [math.nan] * len(sample)
    before = state(backend)
    with pytest.raises(FloatingPointError, match="2 gradients in a row"):
        run(backend, samples, config(max_bad_steps=2))
    assert_same(state(backend), before)


@pytest.mark.parametrize("what", ["samples", "validation samples"])
@pytest.mark.parametrize("empty", [True, False])
def test_nothing_to_learn_is_the_users_error(
    make_tiny_model: MakeModel, tmp_path: Path, what: str, empty: bool
) -> None:
    bad = [] if empty else [Sample(tokens=[1, 2, 3], loss_mask=[1, 0, 0])]
    samples, held_out = (bad, None) if what == "samples" else (make_samples(), bad)
    message = f"{what} cannot be empty" if empty else f"no token of the {what} carries loss"
    with pytest.raises(UserError, match=message):
        run(make_backend(make_tiny_model, tmp_path), samples, config(), validation=held_out)
    assert list(tmp_path.iterdir()) == []


def test_the_metrics_file_has_each_step_once(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for num_steps in (3, 5):
        logger = JSONLLogger(path)
        run(
            make_backend(make_tiny_model, tmp_path / "steps"),
            make_samples(),
            config(num_steps=num_steps),
            logger=logger,
        )
        logger.close()
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4, 5]
