"""New weights under a running engine: what was sampled by which, and that nothing of the old ones is found again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from plain import Held, plain_greedy, plain_log_probs, random_prompt
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from rollouts.errors import UserError
from rollouts.inference import Completion, EmbeddedEngine, SamplingParams, StopReason
from rollouts.training.types import WeightSpan

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, seed=0, ignore_eos=True)
PROMPT = random_prompt(40)


@pytest.fixture
def model(make_peaked_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_peaked_model(seed=0)


@pytest.fixture
def other(make_peaked_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_peaked_model(seed=1)


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(model, max_length=1024, max_rows=4, weight_version=5) as engine:
        yield engine


def in_background(engine: EmbeddedEngine, count: int = 1) -> tuple[threading.Thread, list[Completion], Held]:
    """``count`` long samples, of which as many as there are rows are under way, and held there."""
    results: list[Completion] = []
    prompts = [random_prompt(40, seed) for seed in range(count)]
    thread = threading.Thread(target=lambda: results.extend(engine.generate_batch(prompts, LONG)))
    enough = engine.num_sampled_tokens + 3 * min(count, 4)
    held = Held(engine, lambda: engine.num_sampled_tokens < enough)
    thread.start()
    held.wait()
    return thread, results, held


def test_a_trainer_changes_shared_weights_in_place(engine: EmbeddedEngine, model: PreTrainedModel) -> None:
    (before,) = engine.generate_batch([PROMPT], GREEDY)
    with engine.paused(), torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert engine.update_weights().wait(60) == 6
    (after,) = engine.generate_batch([PROMPT], GREEDY)
    assert after.num_cached_tokens == 0  # cached text is of weights that are no more
    assert after.token_ids == plain_greedy(model, PROMPT, 24) != before.token_ids
    assert (before.weight_version, after.weight_version) == (5, 6)


@pytest.mark.parametrize("as_model", [True, False])
def test_weights_are_copied_into_the_engines_own_storage(
    engine: EmbeddedEngine, model: PreTrainedModel, other: PreTrainedModel, as_model: bool
) -> None:
    places = [p.data_ptr() for p in model.parameters()]
    engine.update_weights(other if as_model else other.state_dict(), version=9).wait(60)
    assert [p.data_ptr() for p in model.parameters()] == places
    (got,) = engine.generate_batch([PROMPT], GREEDY)
    assert got.token_ids == plain_greedy(other, PROMPT, 24)
    assert got.weight_versions == [WeightSpan(9, 0, 24)]
    with EmbeddedEngine(other, max_length=64) as reference:
        assert engine.weights_checksum() == reference.weights_checksum()


def test_draining_lets_samples_in_flight_end_on_the_old_weights(
    engine: EmbeddedEngine, model: PreTrainedModel, other: PreTrainedModel
) -> None:
    expected = engine.generate_batch([random_prompt(40, seed) for seed in range(6)], LONG)
    thread, results, held = in_background(engine, count=6)  # four rows: two of the six have not begun
    future = engine.update_weights(other, mode="drain")
    held.let_go()
    (late,) = engine.generate_batch([PROMPT], GREEDY)
    thread.join()
    assert future.done()
    for old, got in zip(expected[:4], results[:4], strict=True):
        assert got.token_ids == old.token_ids
        assert got.weight_versions == [WeightSpan(5, 0, 400)]
    for seed in (4, 5):
        assert results[seed].weight_versions == [WeightSpan(6, 0, 400)]
        got_log_probs = results[seed].log_probs
        torch.testing.assert_close(
            got_log_probs, plain_log_probs(other, random_prompt(40, seed), results[seed].token_ids), atol=1e-4, rtol=0
        )
    assert late.weight_version == 6
    assert late.token_ids == plain_greedy(other, PROMPT, 24)


def test_continuing_samples_tell_which_version_sampled_what(
    engine: EmbeddedEngine, model: PreTrainedModel, other: PreTrainedModel
) -> None:
    (old,) = engine.generate_batch([PROMPT], LONG)
    thread, results, held = in_background(engine)
    engine.update_weights(other, mode="continue").wait(60)
    held.let_go()
    thread.join()
    (got,) = results
    first, second = got.weight_versions
    assert (first.version, second.version) == (5, 6)
    assert (first.start, first.end, second.end) == (0, second.start, 400)
    assert got.token_ids[: first.end] == old.token_ids[: first.end]
    assert got.token_ids != old.token_ids
    (after,) = engine.generate_batch([PROMPT + got.token_ids], GREEDY)
    assert after.num_cached_tokens == 0  # its keys and values are of both weights: nobody else may use them
    assert after.token_ids == plain_greedy(other, PROMPT + got.token_ids, 24)


def test_retracted_samples_go_on_as_if_the_new_weights_had_read_them(
    engine: EmbeddedEngine, model: PreTrainedModel, other: PreTrainedModel
) -> None:
    (old,) = engine.generate_batch([PROMPT], LONG)
    thread, results, held = in_background(engine, count=5)
    engine.update_weights(other, mode="retract").wait(60)
    held.let_go()
    thread.join()
    for seed, got in enumerate(results[:4]):
        first, second = got.weight_versions
        assert (first.version, first.start, second.version, second.start, second.end) == (5, 0, 6, first.end, 400)
        # Unlike those that merely continue, the later tokens have exactly the new model's log-probs.
        expected = plain_log_probs(other, random_prompt(40, seed), got.token_ids)
        torch.testing.assert_close(got.log_probs[first.end :], expected[first.end :], atol=1e-4, rtol=0)
    cut = results[0].weight_versions[0].end
    assert results[0].token_ids[:cut] == old.token_ids[:cut]
    assert results[4].weight_versions == [WeightSpan(6, 0, 400)]


def test_a_flushed_cache_is_forgotten_and_disturbs_nobody(engine: EmbeddedEngine) -> None:
    expected = engine.generate_batch([random_prompt(40, seed) for seed in range(2)], LONG)
    (known,) = engine.generate_batch([PROMPT], GREEDY)
    assert known.num_cached_tokens > 0
    thread, results, held = in_background(engine, count=2)
    engine.flush_cache().wait(60)
    held.let_go()
    (got,) = engine.generate_batch([PROMPT], GREEDY)
    thread.join()
    assert (got.num_cached_tokens, got.token_ids, got.weight_version) == (0, known.token_ids, 5)
    assert [c.token_ids for c in results] == [c.token_ids for c in expected]
    assert engine.num_free_pages == engine.num_pages


def test_aborted_samples_keep_what_they_have(engine: EmbeddedEngine, other: PreTrainedModel) -> None:
    (old,) = engine.generate_batch([PROMPT], LONG)
    thread, results, held = in_background(engine, count=5)
    engine.update_weights(other, mode="abort").wait(60)
    held.let_go()
    thread.join()
    assert [c.stop_reason for c in results] == [StopReason.ABORTED] * 4 + [StopReason.LENGTH]
    assert 0 < len(results[0].token_ids) < 400
    assert results[0].token_ids == old.token_ids[: len(results[0].token_ids)]
    assert results[0].weight_versions == [WeightSpan(5, 0, len(results[0].token_ids))]
    assert results[4].weight_version == 6  # it had not begun: it waited for the new weights


def test_prompts_half_computed_begin_anew(model: PreTrainedModel, other: PreTrainedModel) -> None:
    prompt = random_prompt(900)
    with EmbeddedEngine(model, max_length=1024, step_tokens=16) as engine:
        results: list[Completion] = []
        thread = threading.Thread(target=lambda: results.extend(engine.generate_batch([prompt], GREEDY)))
        held = Held(engine, lambda: engine.num_prefilled_tokens < 32)
        thread.start()
        held.wait()
        assert engine.num_prefilled_tokens < 900
        engine.update_weights(other, mode="continue").wait(60)
        held.let_go()
        thread.join()
    assert results[0].token_ids == plain_greedy(other, prompt, 24)
    assert results[0].weight_versions == [WeightSpan(1, 0, 24)]


def test_replaced_parameters_are_served_after_an_update(
    engine: EmbeddedEngine, model: PreTrainedModel, other: PreTrainedModel
) -> None:
    """As ``load_state_dict(assign=True)`` leaves them: other objects in other places."""
    engine.generate_batch([PROMPT], GREEDY)
    with engine.paused():
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
        model.tie_weights()
    engine.update_weights().wait(60)
    (got,) = engine.generate_batch([PROMPT], GREEDY)
    assert got.token_ids == plain_greedy(other, PROMPT, 24)


@pytest.mark.parametrize("fault", ["unknown", "missing", "shape", "array"])
def test_weights_that_do_not_fit_change_nothing(
    engine: EmbeddedEngine, model: PreTrainedModel, other: PreTrainedModel, fault: str
) -> None:
    checksum = engine.weights_checksum()
    state = dict(other.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "unknown":
        state["model.layers.7.mlp.up_proj.weight"] = state[name]
    elif fault == "missing":
        del state[name]
    elif fault == "array":
        state[name] = state[name].detach().numpy()
    else:
        state[name] = state[name][:3]
    with pytest.raises(UserError, match=r"up_proj"):
        engine.update_weights(state).wait(60)
    assert engine.weights_checksum() == checksum
    assert engine.weight_version == 5
    with pytest.raises(UserError, match="drain"):
        engine.update_weights(mode="later")  # type: ignore[arg-type]


def test_tied_weights_may_be_named_once_or_twice(engine: EmbeddedEngine, other: PreTrainedModel) -> None:
    state = dict(other.state_dict())
    assert "lm_head.weight" in state
    engine.update_weights(state).wait(60)
    del state["lm_head.weight"]
    engine.update_weights(state).wait(60)


def test_the_checksum_sees_one_changed_bit(engine: EmbeddedEngine, model: PreTrainedModel) -> None:
    before = engine.weights_checksum()
    weight = model.model.layers[0].mlp.down_proj.weight
    with engine.paused(), torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1
    assert engine.weights_checksum() != before
    with engine.paused(), torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1
    assert engine.weights_checksum() == before


def test_nothing_steps_while_paused(engine: EmbeddedEngine) -> None:
    thread, _, held = in_background(engine)
    with engine.paused():
        held.let_go()
        before = engine.num_sampled_tokens
        time.sleep(0.05)
        assert engine.num_sampled_tokens == before
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


def test_an_update_of_shared_weights_costs_no_copy(engine: EmbeddedEngine) -> None:
    """Under 5 ms whatever the model's size, since nothing of its size happens."""
    engine.update_weights().wait(60)
    times = []
    for _ in range(21):  # a busy machine slows some of them
        started = time.perf_counter()
        engine.update_weights().wait(60)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_125_million_parameters_takes_no_time_and_no_memory(dtype: torch.dtype) -> None:
    """The trainer's step is seen by the next sample: in place, in under 5 ms, with nothing of the model's size kept."""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 24576}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 64, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads), dtype=dtype).eval()
    assert model.num_parameters() > 120e6
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    process, prompt = psutil.Process(), random_prompt(8)
    with EmbeddedEngine(model, max_length=64, max_rows=2) as engine:
        before = engine.generate_batch([prompt], params)[0]
        held, times = process.memory_info().rss, []
        for _ in range(21):
            with engine.paused(), torch.no_grad():
                model.lm_head.weight.mul_(-1.01)
            start = time.perf_counter()
            engine.update_weights().wait()
            times.append(time.perf_counter() - start)
        after = engine.generate_batch([prompt], params)[0]
        assert process.memory_info().rss - held < 64e6  # the smallest copy would be 250 MB
    assert min(times) < 0.005
    assert after.token_ids != before.token_ids and after.weight_version == 21
