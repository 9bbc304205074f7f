"""Evaluation beside training: the same prompts and seeds each time, whatever fails on the way."""

from __future__ import annotations

import random

import pytest

from rollouts.errors import RunError, UserError
from rollouts.training.loops.rl_evaluate import RewardEvaluation
from rollouts.training.types import Sample, SampleStatus

pytestmark = pytest.mark.anyio

PROMPTS = [f"q{i}" for i in range(5)]


class Answers:
    """A ``generate_fn`` that answers in place; ``failures`` are raised one a call, half-way through."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    async def __call__(self, samples: list[Sample]) -> list[Sample]:
        self.calls += 1
        failure = self.failures.pop(0) if self.failures else None
        for i, sample in enumerate(samples):
            if failure is not None and i == len(samples) // 2:
                raise failure
            assert not sample.tokens, "a sample of the failed call is asked again as it was left"
            length = 1 + random.Random(sample.metadata["seed"]).randrange(9)
            sample.tokens, sample.loss_mask = [1, *range(2, 2 + length)], [0, *[1] * length]
            sample.status = SampleStatus.COMPLETED
        return samples


async def reward(sample: Sample) -> float:
    return float(sample.num_loss_tokens > 4)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_call_that_fails_is_made_again_from_the_start() -> None:
    smooth, rough = Answers(), Answers(ConnectionError("reset"))
    first, second = (
        RewardEvaluation(PROMPTS, answers, reward, n_samples_per_prompt=2, at_once=3) for answers in (smooth, rough)
    )
    metrics = await first(1)
    assert await second(1) == metrics == await first(2)
    assert (smooth.calls, rough.calls) == (4, 3)
    assert 0 < metrics["reward"] < metrics["pass@2"] <= 1
    assert metrics["response_length"] == sum(s.num_loss_tokens for s in first.samples) / 10


@pytest.mark.parametrize("failure", [UserError("the prompt is too long"), RunError("no engine is left")])
async def test_what_no_retry_mends_is_raised_at_once(failure: Exception) -> None:
    answers = Answers(failure)
    with pytest.raises(type(failure), match=str(failure)):
        await RewardEvaluation(PROMPTS, answers, reward)(1)
    assert answers.calls == 1
