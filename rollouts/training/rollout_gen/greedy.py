"""ReMax's baseline: the reward of one greedy answer to each prompt of a batch, beside the sampled ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any

from rollouts.training.rewards.runner import RewardRunner
from rollouts.training.rollout_gen.concurrency import call, persist
from rollouts.training.rollout_gen.manager import AsyncRolloutManager
from rollouts.training.types import RolloutBatch, Sample, SampleStatus


class GreedyBaselines:
    """A rollout manager whose samples bring ``metadata["greedy_reward"]`` (ReMax, arXiv:2310.10505).

    A prompt whose greedy answer cannot be judged has no baseline: its samples lose their reward, and are left out.

    Args:
        manager: makes the batches.
        generate_fn: answers greedily (temperature 0).
        reward_fn: judges the greedy answers as it does the sampled ones.
    """

    def __init__(self, manager: AsyncRolloutManager, generate_fn: Any, reward_fn: Any) -> None:
        self.manager = manager
        self._generate, self._reward_fn = generate_fn, reward_fn
        self._stack = AsyncExitStack()
        self._judge: RewardRunner

    @property
    def weight_version(self) -> int:
        return self.manager.weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self.manager.weight_version = version

    async def __aenter__(self) -> GreedyBaselines:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.manager)
            self._judge = await stack.enter_async_context(RewardRunner(self._reward_fn))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def generate_batch(self) -> RolloutBatch:
        batch = await self.manager.generate_batch()
        first = {sample.group_id: sample for sample in reversed(batch.samples)}
        greedy = await persist(lambda: call(self._generate, [_prompt_of(sample) for sample in first.values()]))
        await self._judge.score(greedy)
        rewards = dict(zip(first, (sample.reward for sample in greedy), strict=True))
        for sample in batch.samples:
            if (baseline := rewards[sample.group_id]) is None:
                sample.reward = None
                sample.metadata["reward_error"] = "the greedy answer has no reward"
            else:
                sample.metadata["greedy_reward"] = baseline
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.manager.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.manager.load_state_dict(state)


def _prompt_of(sample: Sample) -> Sample:
    """The sample before anything was sampled: the tokens up to the first learned one."""
    start = next((i for i, learned in enumerate(sample.loss_mask) if learned), len(sample.tokens))
    return Sample(
        prompt=sample.prompt,
        tokens=list(sample.tokens[:start]),
        loss_mask=[0] * start,
        id=f"{sample.group_id}/greedy",
        group_id=sample.group_id,
        status=SampleStatus.PENDING,
        metadata=dict(sample.metadata),
    )
