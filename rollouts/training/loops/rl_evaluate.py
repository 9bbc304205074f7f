"""Evaluation between two training steps: held-out prompts answered by the policy and judged by a reward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rollouts.training.loops.rl_batches import group_samples
from rollouts.training.loops.rl_metrics import SOLVED
from rollouts.training.rewards.runner import RewardRunner
from rollouts.training.rollout_gen.concurrency import call, persist
from rollouts.training.rollout_gen.ledger import as_prompt, pending_samples
from rollouts.training.rollout_gen.seeds import sampling_seed
from rollouts.training.types import Sample, SampleStatus


class RewardEvaluation:
    """``await evaluation(step)`` -> metrics; the same prompts and seeds every time, so that steps compare.

    Args:
        prompts: held out.
        generate_fn: as a rollout manager's; greedy for one sample a prompt.
        reward_fn: what ``RewardRunner`` takes. A sample without a reward counts as unsolved, and is counted.
        n_samples_per_prompt: more than one needs sampling, and gives pass@k.
        at_once: prompts in flight.

    Attributes:
        samples: those of the last evaluation.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        generate_fn: Any,
        reward_fn: Any,
        *,
        n_samples_per_prompt: int = 1,
        seed: int = 0,
        at_once: int = 64,
    ) -> None:
        self._prompts = [as_prompt(prompt) for prompt in prompts]
        self._generate, self._reward = generate_fn, reward_fn
        self._count, self._seed, self._at_once = n_samples_per_prompt, seed, at_once
        self.samples: list[Sample] = []

    async def __call__(self, step: int) -> dict[str, float]:
        """``reward`` (mean), ``pass@1``, ``pass@k`` with k samples a prompt, ``truncated``, ``response_length`` and
        ``unjudged``."""
        self.samples = []
        async with RewardRunner(self._reward) as judge:
            for start in range(0, len(self._prompts), self._at_once):
                numbers = range(start, min(start + self._at_once, len(self._prompts)))
                done = await persist(partial(self._answer, numbers))
                await judge.score(done)
                self.samples += done
        rewards = [s.reward or 0.0 for s in self.samples]
        solved = [[(s.reward or 0.0) >= SOLVED for s in group] for group in group_samples(self.samples)]
        metrics = {
            "reward": sum(rewards) / len(rewards),
            "pass@1": sum(sum(g) / len(g) for g in solved) / len(solved),
            "truncated": sum(s.status is SampleStatus.TRUNCATED for s in self.samples) / len(rewards),
            "response_length": sum(s.num_loss_tokens for s in self.samples) / len(rewards),
            "unjudged": sum(s.reward is None for s in self.samples),
        }
        if self._count > 1:
            metrics[f"pass@{self._count}"] = sum(map(any, solved)) / len(solved)
        return metrics

    async def _answer(self, numbers: Sequence[int]) -> list[Sample]:
        pending = [s for number in numbers for s in pending_samples(self._prompts[number], number, self._count)]
        for sample in pending:
            sample.metadata["seed"] = sampling_seed(self._seed, "evaluation", sample.id)
        return await call(self._generate, pending)
