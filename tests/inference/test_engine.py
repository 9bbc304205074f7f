"""The engine against plain transformers: same greedy tokens, same log-probs, whoever joins and leaves meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import assert_greedy, assert_same_draws, plain_greedy, plain_log_probs, random_prompt
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rollouts.errors import UserError
from rollouts.inference import Completion, EmbeddedEngine, SamplingParams, StopReason

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def assert_log_probs(model: PreTrainedModel, prompt: list[int], got: Completion, temperature: float = 1) -> None:
    torch.testing.assert_close(
        got.log_probs, plain_log_probs(model, prompt, got.token_ids, temperature), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(got.raw_log_probs, plain_log_probs(model, prompt, got.token_ids), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def engine(peaked_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(peaked_model, tiny_tokenizer, max_length=512) as engine:
        yield engine


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_greedy_equals_transformers_for_ragged_batches(
    make_peaked_model: Callable[..., PreTrainedModel], architecture: str, tie_embeddings: bool, native: bool
) -> None:
    model = make_peaked_model(architecture=architecture, tie_embeddings=tie_embeddings)
    prompts = [random_prompt(length, length) for length in (1, 2, 15, 16, 17, 40, 100)]
    with EmbeddedEngine(model, max_length=256, native=native) as engine:
        for prompt, got in zip(prompts, engine.generate_batch(prompts, GREEDY), strict=True):
            assert got.token_ids == plain_greedy(model, prompt, 24)
            assert got.stop_reason is StopReason.LENGTH
            assert_log_probs(model, prompt, got)


def test_other_architectures_run_through_the_attention_interface() -> None:
    """A model with sandwiched norms, per-layer rotary bases and sliding windows; and windows in a Llama-shaped one."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 20, "initializer_range": 0.2,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    gemma = Gemma3ForCausalLM.config_class(
        **shape, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=16
    )
    for config in (gemma, MistralConfig(**shape)):
        model = AutoModelForCausalLM.from_config(config).eval()
        before = model.config._attn_implementation
        prompts = [random_prompt(length, length) for length in (5, 30, 70)]
        with EmbeddedEngine(model, max_length=256, step_tokens=32) as engine:
            for prompt, got in zip(prompts, engine.generate_batch(prompts, GREEDY), strict=True):
                assert_log_probs(model, prompt, got)
                assert got.token_ids == plain_greedy(model, prompt, 24)
        assert model.config._attn_implementation == before


def test_bfloat16_log_probs_are_as_near_to_float32_as_plain_bfloat16(
    make_peaked_model: Callable[..., PreTrainedModel],
) -> None:
    exact, model = make_peaked_model(), make_peaked_model(dtype=torch.bfloat16)
    prompt = random_prompt(40)
    with EmbeddedEngine(model, max_length=128) as engine:
        (got,) = engine.generate_batch([prompt], SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
    exact = type(exact)(exact.config)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    truth = torch.tensor(plain_log_probs(exact.eval(), prompt, got.token_ids))
    error = (torch.tensor(got.raw_log_probs) - truth).abs().mean()
    plain_error = (torch.tensor(plain_log_probs(model, prompt, got.token_ids)) - truth).abs().mean()
    assert error < 1.5 * plain_error + 1e-3


@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_joins_leaves_preemptions_and_shared_prefixes_in_any_order(
    peaked_model: PreTrainedModel, data: st.DataObject
) -> None:
    """Prompts grow out of a few shared beginnings; a small cache preempts; chunks are short."""
    beginnings = [random_prompt(50, seed) for seed in range(3)]
    prompts, params = [], []
    for i in range(data.draw(st.integers(1, 10), label="requests")):
        shared = data.draw(st.sampled_from(beginnings))[: data.draw(st.integers(1, 50))]
        prompts.append(shared + random_prompt(data.draw(st.sampled_from([0, 0, 1, 20, 40])), seed=i % 4))
        params.append(
            SamplingParams(
                temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
                max_tokens=data.draw(st.integers(1, 40)),
                n=data.draw(st.sampled_from([1, 1, 3])),
                seed=i,
            )
        )
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    engine = EmbeddedEngine(
        peaked_model,
        max_rows=data.draw(st.integers(1, 12), label="rows"),
        max_length=160,
        cache_bytes=page_bytes * data.draw(st.integers(10, 40), label="pages"),
        step_tokens=data.draw(st.sampled_from([16, 37, 512]), label="step_tokens"),
        native=data.draw(st.booleans(), label="native"),
    )
    with engine:
        first = engine.generate_batch(prompts, params)
        again = engine.generate_batch(prompts, params)  # finds much of the text in the cache
        assert engine.num_running == engine.num_waiting == 0
    flat = [(prompt, p) for prompt, p in zip(prompts, params, strict=True) for _ in range(p.n)]
    for (prompt, p), got, repeated in zip(flat, first, again, strict=True):
        assert_log_probs(peaked_model, prompt, got, p.temperature or 1)
        assert_same_draws(peaked_model, prompt, p, got, repeated)
        assert len(got.token_ids) == p.max_tokens or got.stop_reason is StopReason.STOP_TOKEN
        if p.greedy:
            assert_greedy(peaked_model, prompt, got.token_ids)


def test_preemption_loses_nothing(peaked_model: PreTrainedModel) -> None:
    prompts = [random_prompt(30, seed) for seed in range(6)]
    params = SamplingParams(max_tokens=60, seed=7, ignore_eos=True)
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    with EmbeddedEngine(peaked_model, max_length=160) as roomy:
        expected = roomy.generate_batch(prompts, params)
        assert roomy.num_preemptions == 0
    with EmbeddedEngine(peaked_model, max_length=160, cache_bytes=page_bytes * 16) as tight:
        got = tight.generate_batch(prompts, params)
        assert tight.num_preemptions > 0
    for a, b, prompt in zip(expected, got, prompts, strict=True):
        assert a.token_ids == b.token_ids
        assert_log_probs(peaked_model, prompt, b)


@pytest.mark.parametrize("length", [512, 500, 15, 1])
def test_samples_of_one_prompt_prefill_it_once(peaked_model: PreTrainedModel, length: int) -> None:
    prompt = random_prompt(length)
    with EmbeddedEngine(peaked_model, max_length=1024, step_tokens=200) as engine:
        got = engine.generate_batch([prompt], SamplingParams(n=16, max_tokens=4, seed=1, ignore_eos=True))
        assert engine.num_prefilled_tokens == length
        assert len({tuple(c.token_ids) for c in got}) > 8  # each sample has random numbers of its own
        for completion in got:
            assert_log_probs(peaked_model, prompt, completion)
    with EmbeddedEngine(peaked_model, max_length=1024, step_tokens=200) as engine:
        engine.generate_batch([prompt] * 16, [SamplingParams(max_tokens=4, seed=i) for i in range(16)])
        assert engine.num_prefilled_tokens == length


def test_turns_of_a_conversation_prefill_only_what_is_new(
    engine: EmbeddedEngine, peaked_model: PreTrainedModel
) -> None:
    history = random_prompt(70, seed=99)
    (first,) = engine.generate_batch([history], GREEDY)
    before = engine.num_prefilled_tokens
    longer = history + first.token_ids + random_prompt(9, seed=5)
    (second,) = engine.generate_batch([longer], GREEDY)
    # The last sampled token was never fed back, so it counts as new.
    assert engine.num_prefilled_tokens - before == 9 + 1
    assert second.num_cached_tokens == len(longer) - 10
    assert second.token_ids == plain_greedy(peaked_model, longer, 24)


def test_different_prompts_with_a_common_part_wait_for_it(peaked_model: PreTrainedModel) -> None:
    common = random_prompt(64)
    prompts = [common + random_prompt(10, seed) for seed in range(8)]
    with EmbeddedEngine(peaked_model, max_length=256) as engine:
        got = engine.generate_batch(prompts, GREEDY)
        assert engine.num_prefilled_tokens == 64 + 8 * 10
    for prompt, completion in zip(prompts, got, strict=True):
        assert completion.token_ids == plain_greedy(peaked_model, prompt, 24)


def test_a_seed_gives_the_same_text_in_any_company(engine: EmbeddedEngine) -> None:
    prompt, params = random_prompt(20), SamplingParams(max_tokens=40, seed=5, ignore_eos=True)
    (alone,) = engine.generate_batch([prompt], params)
    company = [random_prompt(length, length) for length in range(1, 60)]
    among = engine.generate_batch([*company[:30], prompt, *company[30:]], params)[30]
    assert among.token_ids == alone.token_ids
    others = engine.generate_batch([prompt, prompt], SamplingParams(max_tokens=40, ignore_eos=True))
    assert others[0].token_ids != others[1].token_ids != alone.token_ids


def test_one_seed_a_sample_makes_each_the_sample_of_its_own_request(engine: EmbeddedEngine) -> None:
    prompt = random_prompt(20, seed=77)
    seeds = (11, 5, 2**63, 5)
    before = engine.num_prefilled_tokens
    group = engine.generate_batch([prompt], SamplingParams(n=4, seed=seeds, max_tokens=20, ignore_eos=True))
    assert engine.num_prefilled_tokens - before == len(prompt)
    for seed, got in zip(seeds, group, strict=True):
        (alone,) = engine.generate_batch([prompt], SamplingParams(seed=seed, max_tokens=20, ignore_eos=True))
        assert alone.token_ids == got.token_ids
    assert group[1].token_ids == group[3].token_ids != group[0].token_ids
    with pytest.raises(UserError, match="2 seeds"):
        SamplingParams(seed=(1, 2), n=3)
    with pytest.raises(UserError, match="seed"):
        SamplingParams(seed=(1, -2), n=2)
    assert SamplingParams(seed=[1, 2], n=2).seed == (1, 2)  # type: ignore[arg-type]


def test_first_tokens_follow_the_models_distribution(engine: EmbeddedEngine, peaked_model: PreTrainedModel) -> None:
    from test_sampler import assert_follows

    prompt = random_prompt(12)
    got = engine.generate_batch([prompt], SamplingParams(max_tokens=1, n=4000, seed=0))
    with torch.no_grad():
        probs = peaked_model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert_follows(torch.tensor([c.token_ids[0] for c in got]), probs)


def test_stop_tokens_are_part_of_the_sample(engine: EmbeddedEngine) -> None:
    prompt = random_prompt(20)
    (full,) = engine.generate_batch([prompt], GREEDY)
    stop = full.token_ids[5]
    end = full.token_ids.index(stop) + 1
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(stop, 3), ignore_eos=True)
    (got,) = engine.generate_batch([prompt], params)
    assert (got.token_ids, got.stop_reason, got.stop_match) == (full.token_ids[:end], StopReason.STOP_TOKEN, stop)
    assert len(got.log_probs) == len(got.raw_log_probs) == end


def test_the_models_end_ids_stop_unless_ignored(peaked_model: PreTrainedModel, engine: EmbeddedEngine) -> None:
    eos = peaked_model.generation_config.eos_token_id
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={eos: 1e4})
    (got,) = engine.generate_batch([[20]], params)
    assert (got.token_ids, got.stop_reason) == ([eos], StopReason.STOP_TOKEN)
    (got,) = engine.generate_batch(
        [[20]], SamplingParams(temperature=0, max_tokens=3, logit_bias={eos: 1e4}, ignore_eos=True)
    )
    assert (got.token_ids, got.stop_reason) == ([eos] * 3, StopReason.LENGTH)


def test_stop_strings_end_at_the_token_that_completes_them(
    engine: EmbeddedEngine, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, params = random_prompt(20), SamplingParams(max_tokens=60, seed=3, ignore_eos=True)
    (full,) = engine.generate_batch([prompt], params)
    text = tiny_tokenizer.decode(full.token_ids)
    clean = [i for i in range(10, len(text) - 4) if "\ufffd" not in text[i : i + 4]]
    stop = text[clean[0] : clean[0] + 4]  # may begin and end inside tokens
    (got,) = engine.generate_batch([prompt], replace(params, stop=("¬never", stop)))
    assert (got.stop_reason, got.stop_match) == (StopReason.STOP_STRING, stop)
    assert got.token_ids == full.token_ids[: len(got.token_ids)]
    assert stop in tiny_tokenizer.decode(got.token_ids)
    assert stop not in tiny_tokenizer.decode(got.token_ids[:-1])


def test_penalties_and_bias_act_on_the_whole_sample(engine: EmbeddedEngine, peaked_model: PreTrainedModel) -> None:
    prompt = random_prompt(20)
    expected = plain_greedy(peaked_model, prompt, 24, repetition_penalty=1.5)
    params = SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1.5, ignore_eos=True)
    plain = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    got, _ = engine.generate_batch([prompt, random_prompt(30)], [params, plain])
    assert got.token_ids == expected
    (got,) = engine.generate_batch([prompt], replace(plain, presence_penalty=1e4))
    assert len(set(got.token_ids)) == 24


def test_top_log_probs(engine: EmbeddedEngine, peaked_model: PreTrainedModel) -> None:
    prompt = random_prompt(20)
    with_top, without = engine.generate_batch(
        [prompt, prompt], [SamplingParams(temperature=0, max_tokens=5, top_log_probs=4, ignore_eos=True), GREEDY]
    )
    assert without.top_log_probs is None and with_top.top_log_probs is not None
    assert [best[0][0] for best in with_top.top_log_probs] == with_top.token_ids
    assert all(len(best) == 4 for best in with_top.top_log_probs)
    torch.testing.assert_close([best[0][1] for best in with_top.top_log_probs], with_top.raw_log_probs)


def test_the_longest_sequence_ends_a_sample(peaked_model: PreTrainedModel) -> None:
    with EmbeddedEngine(peaked_model, max_length=32) as engine:
        (got,) = engine.generate_batch([random_prompt(30)], SamplingParams(max_tokens=10, ignore_eos=True))
        assert (len(got.token_ids), got.stop_reason) == (2, StopReason.LENGTH)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "empty"),
        ([512], SamplingParams(), "vocabulary"),
        ([-1], SamplingParams(), "vocabulary"),
        ([1] * 512, SamplingParams(), "max_length"),
        ([1], SamplingParams(logit_bias={600: 1.0}), "logit_bias"),
    ],
)
def test_bad_requests_are_refused_at_once(
    engine: EmbeddedEngine, prompt: list[int], params: SamplingParams, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        engine.generate_batch([[5], prompt], params)
    assert len(engine.generate_batch([[5]], GREEDY)) == 1


def test_stop_strings_need_a_tokenizer(peaked_model: PreTrainedModel) -> None:
    with EmbeddedEngine(peaked_model, max_length=64) as engine, pytest.raises(UserError, match="tokenizer"):
        engine.generate_batch([[5]], SamplingParams(stop=("a",)))


def test_a_failed_step_reaches_everyone_who_waits(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    model = make_peaked_model(seed=3)
    with EmbeddedEngine(model, max_length=64) as engine:
        model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(
            3, 3
        )  # prompts are prefilled by torch, which says no
        with pytest.raises(RuntimeError, match="thread has failed"):
            engine.generate_batch([[5], [6]], GREEDY)
        with pytest.raises(RuntimeError, match="thread has failed"):
            engine.generate_batch([[5]], GREEDY)
