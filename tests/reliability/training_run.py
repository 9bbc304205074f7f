"""A small supervised run, told by a few plain values, that a test can start in a process of its own and kill."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import torch

from rollouts.errors import UserError
from rollouts.models.load import load_hf_model
from rollouts.models.lora import LoRAConfig, add_lora
from rollouts.training.backends.fsdp import FSDPConfig
from rollouts.training.backends.optimizers import OptimizerConfig, ScheduleConfig
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.backends.pytorch_factory import create_fsdp_backend, create_pytorch_backend
from rollouts.training.checkpoints import write_tensors
from rollouts.training.distributed_utils import cleanup
from rollouts.training.loops import sft_loop
from rollouts.training.metrics import JSONLLogger
from rollouts.training.types import Sample, SFTTrainingConfig

CLOCK_METRICS = {"tokens_per_second", "step_seconds", "mfu", "peak_memory_mb"}  # what no run repeats


@dataclass(frozen=True)
class Run:
    """Eight steps of three of eleven samples, so that epochs end within a step; a checkpoint every second step."""

    folder: Path
    model: Path
    num_steps: int = 8
    batch_size: int = 3
    num_samples: int = 11
    checkpoint_every: int = 2
    keep: int = 2
    patience: int = 10
    seed: int = 0
    shuffle: bool = True
    optimizer: str = "adamw"
    precision: str = "float32"
    lora: bool = False
    ranks: int = 1
    sharded: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def train(run: Run, mutant: str = "", file_size_limit: int = resource.RLIM_INFINITY) -> None:
    """Do the run, or the rest of it, and write beside its checkpoints what a test wants to compare:
    ``metrics.jsonl``, ``batches.jsonl`` (the samples each step read), ``error.txt`` and ``log.txt``."""
    run.folder.mkdir(exist_ok=True)
    with (run.folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
    if mutant:
        mutants.apply(mutant)
    sft_loop.matmul_peak = lambda *_: 1.0  # measuring the machine takes longer than the run
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, resource.RLIM_INFINITY))
    samples = RecordedSamples(make_samples(run.num_samples, seed=1))
    config = SFTTrainingConfig(
        num_steps=run.num_steps,
        batch_size=run.batch_size,
        max_tokens_per_micro_batch=24,  # two or three micro-batches a step
        shuffle=run.shuffle,
        seed=run.seed,
        eval_every=3,
        checkpoint_every=run.checkpoint_every,
        early_stopping_patience=run.patience,
        keep_checkpoints=run.keep,
    )
    logger = BatchLogger(run.folder, samples)
    try:
        backend = make_backend(run)
        asyncio.run(sft_loop.run_sft_training(backend, samples, config, logger, validation=make_samples(4, seed=2)))
        cleanup()
    except UserError as error:
        (run.folder / "error.txt").write_text(str(error))
        raise SystemExit(2) from error


def dump_state(run: Run, folder: Path) -> None:
    """Load the newest step and write the weights and moments that the backend then holds, whole, as plain tensors."""
    backend = make_backend(run)
    backend.load_checkpoint(backend.find_checkpoint()).wait()
    weights = {name: tensor.clone() for name, tensor in backend.get_weights().wait().items()}
    moments = dict(backend._host_tensors(backend._moments()))
    if backend.rank == 0:
        write_tensors(folder / "model.safetensors", weights)
        write_tensors(folder / "optimizer.safetensors", moments)
    cleanup()


def make_backend(run: Run) -> PyTorchTrainingBackend:
    for seed_library in (random.seed, np.random.seed, torch.manual_seed):
        seed_library(run.seed + int(os.environ.get("RANK", 0)))
    model, tokenizer = load_hf_model(str(run.model), device="cpu", dtype="float32")
    if run.lora:
        model = add_lora(model, LoRAConfig(r=2, dropout=0.1))
    model.get_input_embeddings().register_forward_hook(noisy_dropout)
    options: dict[str, Any] = {
        "checkpoint_dir": run.checkpoints,
        "precision": run.precision,
        "optimizer": OptimizerConfig(run.optimizer, lr=1e-2, weight_decay=0.1),
        "schedule": ScheduleConfig("cosine", warmup_steps=3),
        "num_steps": run.num_steps,
        "device": "cpu",
    }
    if run.ranks == 1:
        return create_pytorch_backend(model, tokenizer, **options)
    layout = FSDPConfig(mixed_precision=False, checkpoint_format="sharded" if run.sharded else "full")
    return create_fsdp_backend(model, tokenizer, config=layout, **options)


def noisy_dropout(module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
    """Dropout at a random rate, so that the weights depend on the random numbers of all three libraries."""
    if not module.training:
        return embedded
    return torch.nn.functional.dropout(embedded, 0.1 + 0.1 * random.random() + 0.1 * np.random.rand())


def make_samples(count: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        length = rng.randint(6, 14)
        tokens = [rng.randrange(512) for _ in range(length)]
        samples.append(Sample(tokens=tokens, loss_mask=[0] * 2 + [1] * (length - 2)))
    return samples


class RecordedSamples(Sequence[Sample]):
    """Samples that note which of them were read."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples
        self.lengths = np.array([len(s) for s in samples])
        self.loss_counts = np.array([s.num_loss_tokens for s in samples])
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        self.read.append(index)
        return self._samples[index]


class BatchLogger:
    """``metrics.jsonl``, and the numbers of the samples that each step read in ``batches.jsonl``."""

    def __init__(self, folder: Path, samples: RecordedSamples) -> None:
        self._samples = samples
        self._metrics, self._batches = JSONLLogger(folder / "metrics.jsonl"), JSONLLogger(folder / "batches.jsonl")

    def log(self, step: int, metrics: Any) -> None:
        self._metrics.log(step, metrics)
        self._batches.log(step, {"read": json.dumps(self._samples.read)})
        self._samples.read.clear()

    def close(self) -> None:
        self._metrics.close()
        self._batches.close()
