"""Weights that give no numbers fail the requests that meet them, with a clear line, and not the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine, SamplingParams


@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"temperature": 0}, {"logit_bias": {5: 2.0}, "n": 3}], ids=str)
def test_nan_weights_are_told_and_good_ones_are_served_again(
    make_tiny_model: Callable[..., PreTrainedModel], params: dict
) -> None:
    asked = SamplingParams(**params, max_tokens=5, seed=3)
    model = make_tiny_model()
    good = {name: weight.clone() for name, weight in model.state_dict().items()}
    with EmbeddedEngine(model, max_length=64) as engine:
        before = engine.generate_batch([[5, 6, 7]], asked)
        engine.update_weights({name: torch.full_like(weight, torch.nan) for name, weight in good.items()}).wait()
        with pytest.raises(UserError, match="weights 1 of the model are broken"):
            engine.generate_batch([[5, 6, 7]], asked)
        assert engine.alive and engine.num_running == 0
        engine.update_weights(good).wait()
        assert [c.log_probs for c in engine.generate_batch([[5, 6, 7]], asked)] == [c.log_probs for c in before]


def test_the_farthest_parameters_give_numbers(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    far = {
        "temperature": 1e-3, "repetition_penalty": 1e6, "presence_penalty": 1e9, "frequency_penalty": -1e9,
        "logit_bias": {5: 1e9, 6: -1e9},
    }  # fmt: skip
    with EmbeddedEngine(make_tiny_model(initializer_range=1.0), max_length=64) as engine:
        for name, value in (*far.items(), ("all", None)):
            chosen = far if name == "all" else {name: value}
            (got,) = engine.generate_batch([[5, 6, 7]], SamplingParams(**chosen, max_tokens=20, ignore_eos=True))
            assert torch.tensor([got.log_probs, got.raw_log_probs]).isfinite().all(), name
