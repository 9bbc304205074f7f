"""Loading a model sets torch's default precision for every thread of the process; an engine goes on as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from rollouts.inference import EmbeddedEngine, SamplingParams


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"logit_bias": {5: 0.3}}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_default_precision_changes_nothing(
    make_tiny_model: Callable[..., PreTrainedModel], dtype: torch.dtype, params: dict
) -> None:
    asked = SamplingParams(**params, max_tokens=20, seed=3, ignore_eos=True)
    prompts = [[5, 6, 7], [8, 9]]
    with EmbeddedEngine(make_tiny_model(dtype=dtype), max_length=64) as engine:
        engine.generate_batch(prompts, asked)  # what follows finds the prompts in the cache, every time
        before = engine.generate_batch(prompts, asked)
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            try:
                during = engine.generate_batch(prompts, asked)
            finally:
                torch.set_default_dtype(torch.float32)
            for one, other in zip(during, before, strict=True):
                assert (one.token_ids, one.log_probs) == (other.token_ids, other.log_probs)
