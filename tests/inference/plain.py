"""The independent reference of the engine's tests: plain transformers, one sequence at a time; and an engine held."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from rollouts.inference import Completion, EmbeddedEngine, SamplingParams
from rollouts.inference.random_numbers import stream_start, uniforms

ROUNDING = 1e-4  # of log-probs, and of what they add up to


class Held:
    """An engine that steps only while ``may_step()``, until it is let go; commands and updates come in all the same.

    What a test finds in flight is in flight then, however fast the engine is and however slow the test.
    """

    def __init__(self, engine: EmbeddedEngine, may_step: Callable[[], bool]) -> None:
        self.may_step = may_step
        self._stands, self._free = threading.Event(), threading.Event()
        self._step = engine._thread._step
        engine._thread._step = self._step_or_stand  # type: ignore[method-assign]

    def _step_or_stand(self) -> None:
        if self._free.is_set() or self.may_step():
            self._step()
        else:
            self._stands.set()
            time.sleep(0.001)

    def wait(self) -> None:
        """Until it stands."""
        assert self._stands.wait(120)

    def let_go(self) -> None:
        self._free.set()


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 500), k=length)


@torch.no_grad()
def plain_log_probs(
    model: PreTrainedModel, prompt: list[int], sampled: list[int], temperature: float = 1
) -> list[float]:
    """Log-prob of each sampled token by one plain forward pass of the whole sequence."""
    logits = model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(sampled)[:, None])[:, 0].tolist()


@torch.no_grad()
def plain_greedy(model: PreTrainedModel, prompt: list[int], count: int, **options: object) -> list[int]:
    """transformers' greedy continuation, past the model's end ids; ``options`` go to its ``generate``."""
    ids = torch.tensor([prompt])
    # Without a mask, transformers would take padding tokens that the model itself has sampled for padding.
    settings = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "do_sample": False, **options}
    return model.generate(ids, max_new_tokens=count, **settings)[0, len(prompt) :].tolist()


@torch.no_grad()
def assert_greedy(model: PreTrainedModel, prompt: list[int], sampled: list[int]) -> None:
    """Each token is the likeliest, or as likely up to rounding."""
    logits = model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(sampled)[:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max() < ROUNDING


@torch.no_grad()
def assert_same_draws(
    model: PreTrainedModel,
    prompt: list[int],
    params: SamplingParams,
    first: Completion,
    second: Completion,
    allowed: Callable[[list[int]], torch.Tensor] | None = None,
) -> None:
    """One seed gave the same tokens twice, up to where its random number fell on the edge between two of them.

    There the last bits of the logits choose, which depend on who shares the matrix products: that befalls about one
    token in a hundred thousand, and so now and then an example that nobody has picked. ``allowed`` tells which tokens
    [V] may follow those sampled so far.
    """
    if first.token_ids == second.token_ids:
        return
    pairs = list(zip(first.token_ids, second.token_ids, strict=False))
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)  # none: one goes on where the other has ended
    sampled = first.token_ids[:at]
    logits = model(torch.tensor([prompt + sampled])).logits[0, -1].double()
    if allowed is not None:
        logits = logits.masked_fill(~allowed(sampled), float("-inf"))
    low, high = sorted(pairs[at])
    if params.greedy:
        assert (logits.max() - logits[[low, high]]).max() < ROUNDING
        return
    assert isinstance(params.seed, int)
    (number,) = uniforms(np.array([stream_start(params.seed, first.sample_index)]), np.array([at]))
    edges = (logits / params.temperature).softmax(-1).cumsum(-1)[low:high]
    assert (edges - float(number)).abs().max() < ROUNDING
