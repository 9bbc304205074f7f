"""Decoding in steps of fixed shapes: against torch operators and transformers, and recorded where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from plain import plain_greedy, plain_log_probs, random_prompt
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.inference.decode_graphs import GraphedForward
from rollouts.inference.model_runner import StructuredForward

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def graphed(model: PreTrainedModel, max_length: int, native: bool) -> GraphedForward:
    return GraphedForward(StructuredForward(model, max_length))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The engine takes graphed steps by itself on a GPU; elsewhere it is told to."""
    monkeypatch.setattr("rollouts.inference.engine.make_forward", graphed)
    yield request.param


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_ragged_rows_that_join_and_leave(
    make_peaked_model: Callable[..., PreTrainedModel], architecture: str, device: str
) -> None:
    """Rows of 1 to 5 pages, more of them than run at once, so that steps mix chunks and 1 to 5 decoding rows."""
    model = make_peaked_model(architecture=architecture)
    prompts = [random_prompt(length, length) for length in (1, 2, 15, 16, 17, 40, 100)]
    expected = [plain_greedy(model, prompt, 40) for prompt in prompts]
    log_probs = [plain_log_probs(model, prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    with EmbeddedEngine(model.to(device), max_length=256, max_rows=5, step_tokens=32) as engine:
        for got, tokens, known in zip(engine.generate_batch(prompts, GREEDY), expected, log_probs, strict=True):
            assert got.token_ids == tokens
            torch.testing.assert_close(got.log_probs, known, atol=1e-4, rtol=0)


def test_a_window_hides_what_is_behind_it(device: str) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=20, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    prompt = random_prompt(30)
    expected = plain_greedy(model, prompt, 40)
    with EmbeddedEngine(model.to(device), max_length=128) as engine:
        assert engine.generate_batch([prompt], GREEDY)[0].token_ids == expected


def test_new_weights_are_read_wherever_they_lie(make_peaked_model: Callable[..., PreTrainedModel], device: str) -> None:
    """In place, and in the place of others: a recording of the weights that were must not be played again."""
    model, other, third = (make_peaked_model(seed=seed) for seed in (0, 1, 2))
    prompt = random_prompt(20)
    second, last = plain_greedy(other, prompt, 40), plain_greedy(third, prompt, 40)
    with EmbeddedEngine(model.to(device), max_length=128) as engine:
        first = engine.generate_batch([prompt], GREEDY)[0].token_ids
        engine.update_weights(other.to(device)).wait()
        assert first != engine.generate_batch([prompt], GREEDY)[0].token_ids == second
        for parameter, source in zip(model.parameters(), third.to(device).parameters(), strict=True):
            parameter.data = source.data
        engine.update_weights().wait()
        assert engine.generate_batch([prompt], GREEDY)[0].token_ids == last
