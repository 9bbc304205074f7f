"""The independent reference of the engine's tests: plain transformers, one sequence at a time."""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedModel


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
