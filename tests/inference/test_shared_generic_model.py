"""A model of any architecture may be trained in one thread while the engine samples from it in another."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from rollouts.inference import EmbeddedEngine, SamplingParams

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


def make_model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, hidden_dropout=0.5, attention_dropout=0.5, max_position_embeddings=256,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def training_step(model: GPTNeoXForCausalLM) -> tuple[float, torch.Tensor]:
    """The loss under dropout that a seed decides, and the gradient of the embedding."""
    model.zero_grad()
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(3)
        ids = torch.tensor([[9, 10, 11, 12, 13, 14]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    grad = model.gpt_neox.embed_in.weight.grad
    assert grad is not None
    return loss.item(), grad.clone()


def test_a_trainer_computes_as_if_the_engine_were_not_there() -> None:
    """In the middle of each of the engine's passes the trainer makes a whole step of its own."""
    model = make_model().train()
    alone = training_step(model)
    undisturbed = copy.deepcopy(model).eval()
    steps = []

    def in_the_middle(*_: object) -> None:
        if threading.current_thread().name == "rollouts-engine" and not stepping.is_set():
            stepping.set()
            steps.append(training_step(model))
            stepping.clear()

    stepping = threading.Event()
    model.gpt_neox.layers[1].register_forward_pre_hook(in_the_middle)
    with EmbeddedEngine(model, max_length=64) as engine:
        (got,) = engine.generate_batch([PROMPT], PARAMS)
    assert len(steps) == PARAMS.max_tokens
    assert all(loss == alone[0] and torch.equal(grad, alone[1]) for loss, grad in steps)
    with EmbeddedEngine(undisturbed, max_length=64) as engine:
        (expected,) = engine.generate_batch([PROMPT], PARAMS)
    assert got.token_ids == expected.token_ids
    assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    assert model.training and model.config._attn_implementation == undisturbed.config._attn_implementation


def test_the_engine_sees_each_update_of_the_model() -> None:
    """In place, by another tensor in the same parameter, and by another parameter."""
    model = make_model()
    with EmbeddedEngine(model, max_length=64) as engine, torch.no_grad():
        for change in (
            lambda head: head.weight.mul_(-1),
            lambda head: setattr(head.weight, "data", head.weight.data.flip(0)),
            lambda head: setattr(head, "weight", torch.nn.Parameter(-head.weight)),
        ):
            change(model.lm_head)
            (got,) = engine.generate_batch([PROMPT], PARAMS)
            with EmbeddedEngine(copy.deepcopy(model), max_length=64) as other:
                (expected,) = other.generate_batch([PROMPT], PARAMS)
            assert got.token_ids == expected.token_ids
            assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
