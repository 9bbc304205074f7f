"""A bare training loop over a transformers model: packed rows whose samples see one another, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.workload import StepClock, Workload

if TYPE_CHECKING:
    import torch


def run(workload: Workload, clock: StepClock, precision: str, *options: str) -> None:
    """AdamW and clipping at 1 over ``[rows, sequence]`` batches without padding, for the clock's steps.

    Args:
        precision: ``fp32``, ``autocast`` (bfloat16 operations on float32 weights) or ``bf16`` (bfloat16 weights, too).
        options: ``compile``.
    """
    import torch
    import transformers  # noqa: F401  # its memory is the library's, not the model's

    clock.imported()
    model = workload.make_model("bfloat16" if precision == "bf16" else "float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if "compile" in options else model
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast")
    for input_ids, labels in _rows(workload, clock.total):
        with autocast:
            loss = forward(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_done(input_ids.numel())


def _rows(workload: Workload, num_steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels), both [rows, sequence]: all samples end to end, cut wherever a row is full."""
    import torch

    samples = workload.samples(num_steps)
    tokens = torch.tensor([token for sample in samples for token in sample])
    learned = torch.tensor([m for sample in samples for m in workload.loss_mask(sample)], dtype=torch.bool)
    labels = tokens.masked_fill(~learned, -100)
    for step in range(num_steps):
        part = slice(step * workload.tokens_per_step, (step + 1) * workload.tokens_per_step)
        yield tokens[part].view(workload.rows, -1), labels[part].view(workload.rows, -1)
