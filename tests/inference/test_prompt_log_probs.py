"""Log-probs of given text, however the prompt is cut, cached, shared, preempted or overtaken by new weights."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import Held, plain_log_probs, random_prompt
from transformers import PreTrainedModel

from rollouts.inference import Completion, EmbeddedEngine, SamplingParams

SCORE = SamplingParams(max_tokens=1, prompt_log_probs=True, seed=0)


def assert_scores(model: PreTrainedModel, prompt: list[int], got: Completion) -> None:
    assert got.prompt_log_probs is not None and got.prompt_log_probs[0] is None
    expected = plain_log_probs(model, prompt[:1], prompt[1:]) if len(prompt) > 1 else []
    torch.testing.assert_close(got.prompt_log_probs[1:], expected, atol=1e-4, rtol=0)


@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_scores_equal_a_plain_forward_whatever_else_happens(peaked_model: PreTrainedModel, data: st.DataObject) -> None:
    beginning = random_prompt(60)
    prompts, params = [], []
    for i in range(data.draw(st.integers(1, 7), label="requests")):
        prompts.append(beginning[: data.draw(st.integers(1, 60))] + random_prompt(data.draw(st.integers(0, 30)), i))
        params.append(
            SamplingParams(
                max_tokens=data.draw(st.integers(1, 20)),
                n=data.draw(st.integers(1, 3)),
                prompt_log_probs=data.draw(st.booleans()),
                seed=i,
            )
        )
    with EmbeddedEngine(
        peaked_model,
        max_rows=data.draw(st.integers(1, 8), label="rows"),
        max_length=128,
        cache_bytes=2 * 2 * 2 * 16 * 16 * 4 * data.draw(st.integers(8, 20), label="pages"),
        step_tokens=data.draw(st.sampled_from([16, 37, 512])),
        native=data.draw(st.booleans()),
    ) as engine:
        results = engine.generate_batch(prompts, params)
    flat = [(prompt, p) for prompt, p in zip(prompts, params, strict=True) for _ in range(p.n)]
    for (prompt, p), got in zip(flat, results, strict=True):
        if p.prompt_log_probs:
            assert_scores(peaked_model, prompt, got)
        else:
            assert got.prompt_log_probs is None
        torch.testing.assert_close(
            got.log_probs, plain_log_probs(peaked_model, prompt, got.token_ids), atol=1e-4, rtol=0
        )


def test_a_group_computes_its_prompt_once_and_cached_text_is_scored_all_the_same(peaked_model: PreTrainedModel) -> None:
    prompt = random_prompt(100)
    with EmbeddedEngine(peaked_model, max_length=256, step_tokens=32) as engine:
        engine.generate_batch([prompt], SamplingParams(max_tokens=2, seed=0))
        before = engine.num_prefilled_tokens
        group = engine.generate_batch([prompt], SamplingParams(n=4, max_tokens=3, prompt_log_probs=True, seed=1))
        assert engine.num_prefilled_tokens - before == 100
        for got in group:
            assert_scores(peaked_model, prompt, got)
        # What was scored is cached as any other text.
        engine.generate_batch([prompt], SamplingParams(max_tokens=1))
        assert engine.num_prefilled_tokens - before == 101


def test_the_likeliest_tokens_of_a_prompt(peaked_model: PreTrainedModel) -> None:
    prompt = random_prompt(30)
    with EmbeddedEngine(peaked_model, max_length=64, step_tokens=16) as engine:
        (got,) = engine.generate_batch(
            [prompt], SamplingParams(max_tokens=1, prompt_log_probs=True, top_log_probs=3, seed=0)
        )
    with torch.no_grad():
        values, ids = peaked_model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1).topk(3)
    assert got.prompt_top_log_probs is not None and got.prompt_top_log_probs[0] == []
    assert [[token for token, _ in row] for row in got.prompt_top_log_probs[1:]] == ids.tolist()
    got_values = torch.tensor([[value for _, value in row] for row in got.prompt_top_log_probs[1:]])
    torch.testing.assert_close(got_values, values, atol=1e-4, rtol=0)


def test_logits_of_a_long_prompt_are_computed_a_few_at_a_time(
    peaked_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollouts.inference.scheduler._SCORED_LOGITS", 20 * 512)
    prompts = [random_prompt(length, length) for length in (90, 41, 20, 1)]
    with EmbeddedEngine(peaked_model, max_length=128) as engine:
        for prompt, got in zip(prompts, engine.generate_batch(prompts, SCORE), strict=True):
            assert_scores(peaked_model, prompt, got)


def test_new_weights_half_way_score_the_whole_prompt_anew(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    prompt = random_prompt(900)
    other = make_peaked_model(seed=1)
    with EmbeddedEngine(make_peaked_model(seed=0), max_length=1024, step_tokens=16) as engine:
        results: list[Completion] = []
        thread = threading.Thread(target=lambda: results.extend(engine.generate_batch([prompt], SCORE)))
        held = Held(engine, lambda: engine.num_prefilled_tokens < 32)
        thread.start()
        held.wait()
        engine.update_weights(other, mode="continue").wait(60)
        held.let_go()
        thread.join()
    assert_scores(other, prompt, results[0])
