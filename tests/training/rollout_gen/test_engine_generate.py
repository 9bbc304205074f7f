"""Pending samples become finished ones: what is stored, what a sample depends on, and how a part is continued."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.training.rollout_gen.engine_generate import EngineGenerate
from rollouts.training.types import Sample, SampleStatus

pytestmark = pytest.mark.anyio

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_tiny_model(initializer_range=0.2)


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(model, max_length=2048, max_rows=32) as engine:
        yield engine


def pending(count: int, prompt: object = QUESTION, first_seed: int = 0) -> list[Sample]:
    return [
        Sample(prompt=prompt, id=f"{i}", status=SampleStatus.PENDING, metadata={"seed": first_seed + i})  # type: ignore[arg-type]
        for i in range(count)
    ]


@asynccontextmanager
async def held_after(engine: EmbeddedEngine, num_tokens: int) -> AsyncIterator[threading.Event]:
    """The engine's thread stops between two steps when so many tokens are sampled, sets the event, and goes on after
    the block."""
    held, let_go = threading.Event(), threading.Event()

    def look() -> None:
        if engine.num_sampled_tokens >= num_tokens:
            held.set()
            let_go.wait()
        else:
            engine._thread.send(look)

    engine._thread.send(look)
    try:
        yield held
    finally:
        let_go.set()


async def test_everything_known_of_a_sample_is_stored(
    engine: EmbeddedEngine, model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    temperature = 0.7
    generate = EngineGenerate(engine, tiny_tokenizer, SamplingParams(max_tokens=60, temperature=temperature))
    samples = await generate(pending(8))
    prompt = tiny_tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert {s.status for s in samples} == {SampleStatus.COMPLETED, SampleStatus.TRUNCATED}
    for sample in samples:
        assert sample.tokens[: len(prompt)] == prompt
        answer = sample.tokens[len(prompt) :]
        assert sample.loss_mask == [0] * len(prompt) + [1] * len(answer)
        assert sample.response == tiny_tokenizer.decode(answer, skip_special_tokens=True)
        assert [(w.version, w.start, w.end) for w in sample.weight_versions] == [(0, len(prompt), len(sample.tokens))]
        if sample.status == SampleStatus.TRUNCATED:
            assert len(answer) == 60 and sample.stop_reason == "length"
        else:
            assert answer[-1] in (0, 2) and sample.stop_reason == "stop_token"
        with torch.no_grad():
            logits = model(torch.tensor([sample.tokens])).logits[0].float() / temperature
        expected = logits.log_softmax(-1)[:-1].gather(1, sample.input_ids[1:, None])[len(prompt) - 1 :, 0]
        got = torch.tensor(sample.rollout_log_probs[len(prompt) :])
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        assert sample.rollout_log_probs[: len(prompt)] == [0.0] * len(prompt)


async def test_a_sample_does_not_depend_on_its_company(
    engine: EmbeddedEngine, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Up to the last bits of matrix products, which choose another token about once in 10,000."""
    generate = EngineGenerate(engine, tiny_tokenizer, SamplingParams(max_tokens=40))
    together = await generate(pending(24))
    assert len({tuple(s.tokens) for s in together}) == 24
    mixed = (await generate([*pending(30, "Anna sees", 50), *pending(24)]))[30:]
    alone = [(await generate(pending(1, first_seed=i)))[0] for i in range(0, 24, 4)]
    assert sum(a.tokens != b.tokens for a, b in zip(mixed, together, strict=True)) <= 1
    assert sum(a.tokens != b.tokens for a, b in zip(alone, together[::4], strict=True)) <= 1


async def test_the_prompt_of_a_group_is_computed_once(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tiny_tokenizer.decode([300 + i % 200 for i in range(512)])
    ids = tiny_tokenizer(prompt)["input_ids"]
    with EmbeddedEngine(model, max_length=2048, max_rows=32) as engine:
        await EngineGenerate(engine, tiny_tokenizer, SamplingParams(max_tokens=4))(pending(16, prompt))
        assert engine.num_prefilled_tokens == len(ids)


async def test_an_aborted_sample_goes_on_where_it_was(
    engine: EmbeddedEngine, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    generate = EngineGenerate(engine, tiny_tokenizer, SamplingParams(max_tokens=1500, ignore_eos=True))
    samples = pending(40)  # more than there are rows
    async with anyio.create_task_group() as tasks, held_after(engine, 500) as held:
        tasks.start_soon(generate, samples)
        with anyio.fail_after(240):
            while not held.is_set():
                await anyio.sleep(0.001)
        tasks.start_soon(generate.abort)
        await anyio.wait_all_tasks_blocked()  # the engine has been told, and comes to it when it is let go
    assert {s.status for s in samples} == {SampleStatus.ABORTED}
    assert engine.num_running == engine.num_waiting == 0
    part = max(samples, key=len)
    before = (list(part.tokens), list(part.rollout_log_probs))
    sampled = sum(part.loss_mask)
    assert 0 < sampled < 1500

    await engine.update_weights()
    generate.params = SamplingParams(max_tokens=sampled + 20, ignore_eos=True)
    [whole] = await generate([part])
    assert whole.status == SampleStatus.TRUNCATED and sum(whole.loss_mask) == sampled + 20
    assert whole.tokens[: len(before[0])] == before[0]
    assert whole.rollout_log_probs[: len(before[0])] == before[1]
    assert [w.version for w in whole.weight_versions] == [0, 1]
    assert [w.start for w in whole.weight_versions] == [len(before[0]) - sampled, len(before[0])]
    assert whole.weight_versions[-1].end == len(whole.tokens)

    generate.params = SamplingParams(max_tokens=5)
    [short] = await generate([whole])
    assert short.status == SampleStatus.TRUNCATED and len(short) == len(before[0]) + 20


async def test_a_continued_sample_draws_new_random_numbers(
    engine: EmbeddedEngine, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """From the same tokens, the numbers that chose a first part must not choose the second part too."""
    generate = EngineGenerate(engine, tiny_tokenizer, SamplingParams(max_tokens=30, ignore_eos=True))
    [first] = await generate(pending(1))
    first_part = [t for t, m in zip(first.tokens, first.loss_mask) if m]
    as_prompt = Sample(tokens=first.tokens, loss_mask=[0] * len(first), id="x", metadata={"seed": 0})
    [same_numbers] = await generate([as_prompt])
    generate.params = SamplingParams(max_tokens=60, ignore_eos=True)
    [continued] = await generate([first])
    second_part = [t for t, m in zip(continued.tokens, continued.loss_mask) if m][len(first_part) :]
    assert second_part != same_numbers.tokens[-30:]


async def test_errors_come_out_plain(engine: EmbeddedEngine, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    generate = EngineGenerate(engine, tiny_tokenizer)
    with pytest.raises(UserError, match="has no prompt"):
        await generate([Sample(id="q")])
    with pytest.raises(UserError, match="leaves none"):
        await generate([*pending(2), Sample(tokens=[5] * 3000, loss_mask=[0] * 3000, id="long")])
    with pytest.raises(UserError, match="n_samples_per_prompt"):
        EngineGenerate(engine, tiny_tokenizer, SamplingParams(n=4))
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        await generate(pending(2))
