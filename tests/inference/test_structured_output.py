"""Structured output: what a grammar lets through is checked by other parsers, and nothing else of a sample changes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import assert_same_draws, plain_log_probs, random_prompt
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.errors import UserError
from rollouts.inference import Completion, EmbeddedEngine, SamplingParams, StopReason
from rollouts.inference.grammars import BoundText, TokenMasks, unpack_bits

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}( [a-z]{1,8})?"
SUM = 'start: number ("+" number)~2\nnumber: /[0-9]{1,3}/'


@pytest.fixture(scope="module")
def engine(peaked_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(peaked_model, tiny_tokenizer, max_length=512) as engine:
        yield engine


def check_person(text: str) -> None:
    value: dict[str, Any] = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    assert len(value["name"]) <= 5 and 0 <= value["age"] <= 120
    assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"red", "green", "blue"}


def text_of(tokenizer: PreTrainedTokenizerFast, completion: Completion) -> str:
    """The sample's text without the token that ended it."""
    assert completion.stop_reason is StopReason.STOP_TOKEN
    return str(tokenizer.decode(completion.token_ids[:-1]))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_every_sample_keeps_to_its_grammar_and_ends_where_it_may(
    engine: EmbeddedEngine, tiny_tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    common: dict[str, Any] = {"max_tokens": 300, "temperature": temperature, "n": 4, "seed": 1}
    params = [
        SamplingParams(json_schema=SCHEMA, **common),
        SamplingParams(json_schema=json.dumps(SCHEMA), top_k=20, **common),
        SamplingParams(regex=DATE, top_p=0.9, **common),
        SamplingParams(grammar=SUM, repetition_penalty=1.2, **common),
        SamplingParams(**{**common, "max_tokens": 20}),
    ]
    prompts = [random_prompt(20, seed) for seed in range(5)]
    got = [text_of(tiny_tokenizer, c) for c in engine.generate_batch(prompts[:4], params[:4])]
    for text in got[:8]:
        check_person(text)
    assert all(re.fullmatch(DATE, text) for text in got[8:12])
    assert all(re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3}){2}", text) for text in got[12:])
    # Neither those without a grammar nor the bound ones depend on their company.
    assert [text_of(tiny_tokenizer, c) for c in engine.generate_batch(prompts, params)[:16]] == got
    free = engine.generate_batch(prompts[4:], params[4:])
    assert [c.token_ids for c in engine.generate_batch(prompts, params)[16:]] == [c.token_ids for c in free]


def test_log_probs_are_those_of_the_full_distribution(engine: EmbeddedEngine, peaked_model: PreTrainedModel) -> None:
    prompt = random_prompt(30)
    params = SamplingParams(regex=DATE, max_tokens=60, temperature=0.8, seed=3, n=3, top_log_probs=2)
    for got in engine.generate_batch([prompt], params):
        expected = plain_log_probs(peaked_model, prompt, got.token_ids, 0.8)
        torch.testing.assert_close(got.log_probs, expected, atol=1e-4, rtol=0)


def test_tokens_follow_the_models_distribution_among_those_allowed(
    engine: EmbeddedEngine, peaked_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from test_sampler import assert_follows

    prompt = random_prompt(12)
    got = engine.generate_batch([prompt], SamplingParams(regex="[a-f]x", max_tokens=1, n=3000, seed=0))
    with torch.no_grad():
        probs = peaked_model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    allowed = torch.tensor([tiny_tokenizer.convert_tokens_to_ids(letter) for letter in "abcdef"])
    probs = torch.zeros_like(probs).index_copy(0, allowed, probs[allowed])
    assert_follows(torch.tensor([c.token_ids[0] for c in got]), probs / probs.sum())


@given(st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_preemptions_joins_and_shared_prefills_do_not_change_a_bound_sample(
    peaked_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, engine: EmbeddedEngine, data: st.DataObject
) -> None:
    prompts = [random_prompt(data.draw(st.sampled_from([5, 40])), data.draw(st.integers(0, 1))) for _ in range(5)]
    params = [
        SamplingParams(
            n=data.draw(st.integers(1, 3)), seed=i, max_tokens=data.draw(st.integers(1, 80)),
            **data.draw(st.sampled_from([{"json_schema": SCHEMA}, {"regex": "[a-z]{20,60}"}, {}])),
        )
        for i in range(5)
    ]  # fmt: skip
    expected = engine.generate_batch(prompts, params)
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    with EmbeddedEngine(
        peaked_model, tiny_tokenizer, max_rows=data.draw(st.integers(2, 6)), max_length=128,
        cache_bytes=page_bytes * data.draw(st.integers(8, 16)), step_tokens=data.draw(st.sampled_from([16, 512])),
    ) as tight:  # fmt: skip
        got = tight.generate_batch(prompts, params)
    flat = [(prompt, p) for prompt, p in zip(prompts, params, strict=True) for _ in range(p.n)]
    for (prompt, p), first, second in zip(flat, expected, got, strict=True):
        bound = functools.partial(allowed_after, engine._grammars.bound_text(p))
        assert_same_draws(peaked_model, prompt, p, first, second, bound)


def allowed_after(text: BoundText | None, sampled: list[int]) -> torch.Tensor:
    """Which tokens [V] may follow."""
    if text is None:
        return torch.ones(512, dtype=torch.bool)
    masks = TokenMasks([text.copy()], 512)
    for token in sampled:
        masks.consume(np.array([0]), np.array([token]))
    return unpack_bits(masks.bits(), 512)[0]


def test_preemption_really_happens_to_bound_samples(
    peaked_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, engine: EmbeddedEngine
) -> None:
    prompts = [random_prompt(30, seed) for seed in range(6)]
    params = SamplingParams(regex="[a-z0-9]{160}", max_tokens=60, seed=7)
    expected = engine.generate_batch(prompts, params)
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    with EmbeddedEngine(peaked_model, tiny_tokenizer, max_length=160, cache_bytes=page_bytes * 16) as tight:
        got = tight.generate_batch(prompts, params)
        assert tight.num_preemptions > 0
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]


def test_end_ids_and_stop_ids_wait_for_a_complete_text(
    engine: EmbeddedEngine, peaked_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    eos = peaked_model.generation_config.eos_token_id
    letter = tiny_tokenizer.convert_tokens_to_ids("k")
    push = {eos: 100.0, letter: 50.0}
    (got,) = engine.generate_batch([[5]], SamplingParams(regex="[a-z]{4,9}", logit_bias=push))
    assert (got.token_ids, got.stop_match) == ([letter] * 4 + [eos], eos)
    # The letter is a stop id, too: it waits as the end ids do. Those are ignored as long as anything else is possible.
    params = SamplingParams(regex="[a-z]{4,9}", logit_bias=push, stop_token_ids=(letter,), ignore_eos=True)
    (got,) = engine.generate_batch([[5]], params)
    assert got.stop_match == letter
    text = tiny_tokenizer.decode(got.token_ids[:-1])
    assert re.fullmatch("[a-z]{4,9}", text) and "k" not in text[:4]
    params = SamplingParams(regex="[a-z]{4,9}", logit_bias={eos: 100.0}, ignore_eos=True)
    (got,) = engine.generate_batch([[5]], params)
    assert (len(tiny_tokenizer.decode(got.token_ids[:-1])), got.stop_match) == (9, eos)


def test_the_length_limit_cuts_a_bound_sample_as_any_other(engine: EmbeddedEngine) -> None:
    (got,) = engine.generate_batch([[5]], SamplingParams(regex="[a-z]{50}", max_tokens=7))
    assert (len(got.token_ids), got.stop_reason) == (7, StopReason.LENGTH)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json_schema": {"type": "objekt"}}, "objekt"),
        ({"json_schema": "{"}, "not valid JSON"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed"),
        ({"json_schema": False}, "json_schema"),
        ({"regex": "("}, "unclosed"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": "begin: /a/"}, "start"),
    ],
)
def test_bad_grammars_are_refused_in_one_line(engine: EmbeddedEngine, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        engine.generate_batch([[5]], SamplingParams(**params))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert next(iter(params)) in str(caught.value)


def test_grammars_exclude_each_other_and_need_a_tokenizer(peaked_model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="exclude"):
        SamplingParams(regex="a", json_schema={})
    with EmbeddedEngine(peaked_model, max_length=64) as engine, pytest.raises(UserError, match="tokenizer"):
        engine.generate_batch([[5]], SamplingParams(regex="a"))


def test_a_grammar_that_costs_too_much_fails_its_request_alone(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matcher gives up when a step exceeds its limits; here they are set so low that it does so at once."""
    import llguidance

    limits = llguidance.LLParserLimits(step_lexer_fuel=300)
    matcher = llguidance.LLMatcher

    class Strict:
        grammar_from_regex = staticmethod(matcher.grammar_from_regex)

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return matcher(*args, limits=limits, **kwargs)

    monkeypatch.setattr(llguidance, "LLMatcher", Strict)
    params = SamplingParams(regex="([ab]{3}|[bc]{5}|.*[a-k]{30}.*[0-9]{40}x)", max_tokens=200, n=2, seed=0)
    with pytest.raises(UserError, match="cost too much"):
        engine.generate_batch([[5]], params)
    (got,) = engine.generate_batch([[5]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(got.token_ids) == 5 and engine.num_running == 0


def test_bound_samples_stream(engine: EmbeddedEngine, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(json_schema=SCHEMA, max_tokens=300, seed=5, n=2)

    async def collect() -> list[list[int]]:
        tokens: list[list[int]] = [[], []]
        async for chunk in engine.stream([5, 6], params):
            tokens[chunk.sample_index] += chunk.token_ids
        return tokens

    streamed = anyio.run(collect)
    assert streamed == [c.token_ids for c in engine.generate_batch([[5, 6]], params)]
    check_person(tiny_tokenizer.decode(streamed[0][:-1]))
