"""rollouts as an arm: packed samples, isolated from one another, through the public backend."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.workload import StepClock, Workload

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def run(workload: Workload, clock: StepClock, precision: str, *options: str) -> None:
    """AdamW and clipping at 1 for the clock's steps, each of at most ``workload.tokens_per_step`` tokens.

    Args:
        precision: ``fp32``, or ``bf16``: bfloat16 operations with float32 master weights.
        options: ``compile``, ``checkpointing``, ``half`` (a step in micro-batches of half its tokens).
    """
    from rollouts.training.backends.pytorch_factory import create_pytorch_backend
    from rollouts.training.loops.batches import collate_step
    from rollouts.training.types import Sample

    clock.imported()
    backend = create_pytorch_backend(
        workload.make_model(),
        precision=PRECISIONS[precision],
        compile="compile" in options,
        activation_checkpointing="checkpointing" in options,
    )
    # Steps are not filled to the last token, so more samples are needed than the steps' capacity.
    samples = [Sample(tokens, workload.loss_mask(tokens)) for tokens in workload.samples(2 * clock.total)]
    micro_batch_tokens = workload.tokens_per_step // (2 if "half" in options else 1)
    steps = full_steps([len(sample) for sample in samples], workload.tokens_per_step)
    for _, indices in zip(range(clock.total), steps, strict=False):
        backend.forward_backward(collate_step(samples, indices, micro_batch_tokens)).wait()
        backend.optim_step().wait()
        clock.step_done(sum(len(samples[i]) for i in indices))


def full_steps(lengths: list[int], capacity: int) -> Iterator[list[int]]:
    """Indices of the samples of each step: taken in order, as many as fit into ``capacity`` tokens."""
    indices: list[int] = []
    room = capacity
    for i, length in enumerate(lengths):
        if length > room:
            yield indices
            indices, room = [], capacity
        indices.append(i)
        room -= length
