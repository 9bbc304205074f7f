"""A stand-in for a model: answers whose length, text and time to write are functions of prompt and seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import anyio

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.types import Sample, SampleStatus, WeightSpan


class Writer:
    """A ``generate_fn``: writes one token a tick of ``tick`` seconds, with the seed's own length, as an engine would.

    ``version`` is that of its weights; ``trouble(call, sample)`` may raise or hang before a sample is written;
    ``hold(sample, done)`` may wait, or hang, before its next token.
    """

    def __init__(
        self,
        tick: float = 0.0,
        longest: int = 20,
        trouble: Callable[..., Any] | None = None,
        hold: Callable[..., Any] | None = None,
    ) -> None:
        self.tick, self.longest, self.trouble, self.hold = tick, longest, trouble, hold
        self.version = 0
        self.calls = 0
        self.asked: list[tuple[str, int]] = []  # prompt, seed
        self.running = 0

    async def __call__(self, samples: list[Sample], **kwargs: Any) -> list[Sample]:
        self.calls += 1
        self.running += 1
        try:
            async with anyio.create_task_group() as tasks:
                for sample in samples:
                    self.asked.append((sample.metadata["prompt_id"], sample.metadata["seed"]))
                    tasks.start_soon(self._write, self.calls, sample)
        except* ConnectionError as errors:
            raise errors.exceptions[0] from None
        finally:
            self.running -= 1
        return samples

    async def get_weight_version(self) -> int:
        return self.version

    async def _write(self, call: int, sample: Sample) -> None:
        if self.trouble is not None:
            await self.trouble(call, sample)
        seed = sample.metadata["seed"]
        length = answer_length(seed, self.longest)
        if not sample.tokens:
            sample.tokens, sample.loss_mask, sample.rollout_log_probs = [1, 2], [0, 0], [0.0, 0.0]
        try:
            while (done := sum(sample.loss_mask)) < length:
                if self.hold is not None:
                    await self.hold(sample, done)
                if self.tick:
                    await anyio.sleep(self.tick)
                token = 10 + random.Random(f"{seed} {done}").randrange(90)
                sample.tokens = [*sample.tokens, token]
                sample.loss_mask = [*sample.loss_mask, 1]
                sample.rollout_log_probs = [*sample.rollout_log_probs, -0.5 - self.version]
                spans = sample.weight_versions
                at = len(sample.tokens)
                if spans and spans[-1].version == self.version:
                    spans[-1] = WeightSpan(self.version, spans[-1].start, at)
                else:
                    spans.append(WeightSpan(self.version, at - 1, at))
        except anyio.get_cancelled_exc_class():
            sample.status = SampleStatus.ABORTED
            raise
        sample.status = SampleStatus.COMPLETED
        sample.response = f"{sample.prompt} {seed}"
        sample.stop_reason = "stop_token"
        await anyio.lowlevel.checkpoint()


def answer_length(seed: int, longest: int = 20) -> int:
    return 1 + random.Random(seed).randrange(longest)


def numbered(count: int) -> DataBuffer[Sample]:
    return DataBuffer([Sample(prompt=f"q{i}", id=f"q{i}") for i in range(count)], seed=3)


def prompt_ids(samples: list[Sample], group_size: int = 1) -> list[str]:
    """The prompt of each group of a batch; fails where a group is not whole or its samples are out of order."""
    groups = [samples[i : i + group_size] for i in range(0, len(samples), group_size)]
    for group in groups:
        assert len({s.group_id for s in group}) == 1
        assert [s.id for s in group] == [f"{group[0].group_id}/{i}" for i in range(group_size)]
        assert len({s.prompt for s in group}) == 1
    return [group[0].metadata["prompt_id"] for group in groups]


def dealt(count: int, total: int) -> list[str]:
    """The ids of the first ``total`` prompts that ``numbered(count)`` deals."""
    return [s.id for s in numbered(count).get_prompts(total)]
