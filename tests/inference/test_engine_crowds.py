"""Crowds of 1 to 256 requests that join, leave, are preempted and share beginnings: each as if it were alone."""

from __future__ import annotations

import random
import time

import anyio
import pytest
import torch
from plain import random_prompt
from transformers import PreTrainedModel

from rollouts.inference import Completion, EmbeddedEngine, SamplingParams

Request = tuple[list[int], SamplingParams]


def crowd(draw: random.Random, count: int) -> list[Request]:
    """Ragged prompts out of a few shared beginnings; half of them greedy, half sampled."""
    beginnings = [random_prompt(50, seed) for seed in range(4)]
    requests = []
    for i in range(count):
        prompt = draw.choice(beginnings)[: draw.randint(1, 50)] + random_prompt(draw.choice((0, 1, 20, 60)), seed=i)
        params = SamplingParams(
            temperature=draw.choice((0.0, 1.0)), max_tokens=draw.randint(1, 40), ignore_eos=True, seed=i
        )
        requests.append((prompt, params))
    return requests


async def meet(engine: EmbeddedEngine, requests: list[Request], draw: random.Random) -> dict[int, Completion]:
    """Everyone joins at a time of their own; one in eight leaves before the end. Completions of those that stayed."""
    done: dict[int, Completion] = {}

    async def ask(i: int, joins: float, leaves: float | None) -> None:
        await anyio.sleep(joins)
        with anyio.move_on_after(leaves):
            done[i] = await engine.generate(*requests[i])

    async with anyio.create_task_group() as group:
        for i in range(len(requests)):
            leaves = draw.uniform(0, 0.05) if draw.random() < 1 / 8 else None
            group.start_soon(ask, i, draw.uniform(0, 0.1), leaves)
    return done


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("count", [1, 2, 16, 64, 256])
def test_everyone_gets_what_they_would_get_alone(peaked_model: PreTrainedModel, count: int, native: bool) -> None:
    draw = random.Random(count)
    requests = crowd(draw, count)
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    with EmbeddedEngine(
        peaked_model, max_rows=256, max_length=160, cache_bytes=page_bytes * 24, native=native
    ) as engine:
        done = anyio.run(meet, engine, requests, draw)
        deadline = time.monotonic() + 30  # the last to leave is noticed at the next step
        while engine.num_running or engine.num_waiting or engine.num_free_pages < engine.num_pages:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert engine.num_preemptions > 0 or count < 256
    assert len(done) >= count / 2
    with torch.no_grad():
        for i, completion in done.items():
            prompt, params = requests[i]
            sampled = torch.tensor(completion.token_ids)
            assert len(sampled) == params.max_tokens
            logits = peaked_model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            log_probs = logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.log_probs), log_probs, atol=1e-4, rtol=0)
            if params.greedy:  # the likeliest token each time, but for ties within rounding
                assert (logits.gather(-1, sampled[:, None])[:, 0] >= logits.amax(-1) - 1e-4).all()
