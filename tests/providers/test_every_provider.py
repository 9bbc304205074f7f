"""One set of tests for every provider that can run here: what is sampled means the same whoever samples it.

The embedded engine and our own server run in the default suite; real vLLM and SGLang in `make test-engines`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from real_engines import sglang_server, vllm_server
from running_server import running
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.errors import UserError
from rollouts.inference import Completion, EmbeddedEngine, SamplingParams, StopReason
from rollouts.providers import (
    ChatCompletion,
    ChatStop,
    Endpoint,
    LogProbMode,
    Message,
    ProviderError,
    Tool,
    chat,
    connect,
    registered,
    sample_tokens,
    stream_chat,
    stream_tokens,
)
from rollouts.providers.embedded_chat import split_calls

pytestmark = pytest.mark.anyio

PROMPT = [20 + i % 50 for i in range(40)]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
MESSAGES = [Message("system", "Be brief."), Message("user", "What is 2 + 2?")]
ADD = Tool("add", "Add two numbers.", {"type": "object", "properties": {"a": {"type": "number"}}})
CALLING = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'

OURS = ["embedded", "rollouts-openai", "rollouts-sglang"]
REAL = [pytest.param(name, marks=pytest.mark.engines) for name in ("vllm", "sglang")]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_tiny_model(initializer_range=0.2, head_dim=32, max_position_embeddings=2048)


def serve(kind: str, folder: Path, model: PreTrainedModel, tokenizer: Any, stack: ExitStack) -> Endpoint:
    """The endpoint of a provider that is up until ``stack`` closes."""
    if kind == "embedded":
        engine = stack.enter_context(EmbeddedEngine(model, tokenizer, max_length=1024))
        stack.enter_context(registered("tiny", engine, tokenizer))
        return Endpoint("embedded", "tiny", max_tokens=64)
    if kind.startswith("rollouts"):
        server = stack.enter_context(running(folder, tokenizer))
        return Endpoint(kind.removeprefix("rollouts-"), "tiny", f"{server.url}/v1", max_tokens=64)  # type: ignore[arg-type]
    start = vllm_server if kind == "vllm" else sglang_server
    url = stack.enter_context(start(folder, folder.parent / f"{kind}.log"))
    return Endpoint(kind, "tiny", url, max_tokens=64)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[*OURS, *REAL])
def endpoint(
    request: pytest.FixtureRequest,
    model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("provided") / "model"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    with ExitStack() as stack:
        yield serve(request.param, folder, model, tiny_tokenizer, stack)


def log_probs(
    model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """transformers' own, of ``ids`` after ``prompt``."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].float()
    table = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return table.gather(1, torch.tensor(list(ids))[:, None])[:, 0].tolist()


def assert_same(one: Completion, other: Completion) -> None:
    assert (one.token_ids, one.stop_reason, one.stop_match) == (other.token_ids, other.stop_reason, other.stop_match)
    assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4, nan_ok=True)


async def test_a_limit_that_nobody_set_gives_way_to_the_room(endpoint: Endpoint) -> None:
    unset = Endpoint(endpoint.provider, endpoint.model, endpoint.api_base)
    prompt = (PROMPT * 60)[:1004]
    (sample,) = await sample_tokens(unset, prompt)
    assert 0 < len(sample.token_ids) <= 2048 - len(prompt)  # ours have room for 1,024 in all
    assert (await chat(unset, MESSAGES)).usage.completion_tokens > 0
    if endpoint.provider not in ("embedded", "vllm"):  # which take what there is room for
        with pytest.raises(UserError):
            await sample_tokens(replace(unset, max_tokens=8192), prompt)
    if endpoint.provider != "embedded":
        with pytest.raises(UserError):
            await chat(replace(unset, max_tokens=8192), MESSAGES)


async def test_log_probs_mean_the_same(endpoint: Endpoint, model: PreTrainedModel) -> None:
    """At the sampling temperature and at 1; what a server cannot tell is NaN, never another distribution's."""
    mode = await connect(endpoint, tempered=False)
    assert (mode is LogProbMode.RAW) == (endpoint.provider == "openai")
    for temperature in (1.0, 0.5, 1.9):
        params = SamplingParams(max_tokens=10, temperature=temperature, n=3, ignore_eos=True)
        group = await sample_tokens(endpoint, PROMPT, params)
        assert [sample.sample_index for sample in group] == [0, 1, 2]
        for sample in group:
            assert (len(sample.token_ids), sample.stop_reason) == (10, StopReason.LENGTH)
            assert sample.num_prompt_tokens == 40
            scaled = log_probs(model, PROMPT, sample.token_ids, temperature)
            raw = log_probs(model, PROMPT, sample.token_ids)
            knows_scaled = mode is not LogProbMode.RAW or temperature == 1
            knows_raw = mode is LogProbMode.RAW or temperature == 1 or endpoint.provider == "embedded"
            assert sample.log_probs == pytest.approx(scaled if knows_scaled else [math.nan] * 10, abs=1e-4, nan_ok=True)
            assert sample.raw_log_probs == pytest.approx(raw if knows_raw else [math.nan] * 10, abs=1e-4, nan_ok=True)


async def test_training_on_raw_log_probs_is_refused(endpoint: Endpoint) -> None:
    if endpoint.provider == "openai":
        with pytest.raises(ProviderError, match="at temperature 1 whatever"):
            await connect(endpoint)
    else:
        assert await connect(endpoint) is not LogProbMode.RAW


async def test_greedy_is_the_likeliest(endpoint: Endpoint, model: PreTrainedModel) -> None:
    (sample,) = await sample_tokens(endpoint, PROMPT, GREEDY)
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert sample.token_ids == ids[40:]
    assert sample.log_probs == pytest.approx(log_probs(model, PROMPT, ids[40:]), abs=1e-4)


async def test_streams_hold_the_same(endpoint: Endpoint) -> None:
    (whole,) = await sample_tokens(endpoint, PROMPT, GREEDY)
    chunks = [chunk async for chunk in stream_tokens(endpoint, PROMPT, GREEDY)]
    last = chunks[-1].completion
    assert last is not None
    assert_same(last, whole)
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [p for chunk in chunks for p in chunk.log_probs] == pytest.approx(whole.log_probs, abs=1e-4)
    group = SamplingParams(max_tokens=5, n=3, ignore_eos=True)
    chunks = [chunk async for chunk in stream_tokens(endpoint, PROMPT, group)]
    for i in range(3):
        own = [token for chunk in chunks if chunk.sample_index == i for token in chunk.token_ids]
        (final,) = [c.completion for c in chunks if c.completion is not None and c.sample_index == i]
        assert own == final.token_ids and len(own) == 5


async def test_stop_tokens_and_seeds(endpoint: Endpoint) -> None:
    (whole,) = await sample_tokens(endpoint, PROMPT, GREEDY)
    stop = whole.token_ids[6]
    (stopped,) = await sample_tokens(endpoint, PROMPT, replace(GREEDY, ignore_eos=False, stop_token_ids=(stop,)))
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert (stopped.stop_reason, stopped.stop_match) == (StopReason.STOP_TOKEN, stop)
    if endpoint.provider == "sglang":
        with pytest.raises(UserError, match="ignore_eos"):
            await sample_tokens(endpoint, PROMPT, replace(GREEDY, stop_token_ids=(stop,)))
    seeded = SamplingParams(max_tokens=8, seed=(3, 2**63 - 1, 3), n=3, ignore_eos=True)
    first, second, third = await sample_tokens(endpoint, PROMPT, seeded)
    assert [sample.sample_index for sample in (first, second, third)] == [0, 1, 2]
    if endpoint.provider != "sglang":  # SGLang itself draws as it likes unless started as deterministic
        assert first.token_ids == third.token_ids != second.token_ids


async def test_what_does_not_fit_is_the_callers_fault(endpoint: Endpoint) -> None:
    for prompt, params in (([], GREEDY), ([-1], GREEDY), (PROMPT * 80, GREEDY)):
        with pytest.raises(UserError):
            await sample_tokens(endpoint, prompt, params)
    assert await sample_tokens(endpoint, PROMPT, GREEDY)


async def test_many_at_once_and_some_that_leave(endpoint: Endpoint) -> None:
    (whole,) = await sample_tokens(endpoint, PROMPT, GREEDY)
    results: list[Completion] = []

    async def one() -> None:
        results.extend(await sample_tokens(endpoint, PROMPT, GREEDY))

    async def leave() -> None:
        with anyio.move_on_after(0.02):
            await sample_tokens(endpoint, PROMPT, replace(GREEDY, max_tokens=900))

    async def leave_a_stream() -> None:
        async with aclosing(stream_tokens(endpoint, PROMPT, replace(GREEDY, max_tokens=900))) as chunks:  # type: ignore[type-var]
            async for _ in chunks:
                break

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(one)
            tasks.start_soon(leave)
        tasks.start_soon(leave_a_stream)
    assert len(results) == 12
    for sample in results:
        assert_same(sample, whole)


async def test_chat_keeps_the_tokens(
    endpoint: Endpoint, model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    short = replace(endpoint, max_tokens=8)
    answer = await chat(short, MESSAGES, with_tokens=True)
    rendered = [message.to_dict() for message in MESSAGES]
    prompt = tiny_tokenizer.apply_chat_template(rendered, add_generation_prompt=True, return_dict=False)
    assert answer.prompt_token_ids == prompt and answer.token_ids and answer.log_probs
    assert list(answer.log_probs) == pytest.approx(log_probs(model, prompt, answer.token_ids), abs=1e-4)
    assert answer.usage.completion_tokens == len(answer.token_ids) and answer.usage.prompt_tokens == len(prompt)
    assert answer.stop_reason in (ChatStop.LENGTH, ChatStop.STOP)
    greedy = replace(short, temperature=0)
    whole = await chat(greedy, MESSAGES)
    chunks = [chunk async for chunk in stream_chat(greedy, MESSAGES)]
    assert chunks[-1].kind == "done" and isinstance(chunks[-1].data, ChatCompletion)
    assert chunks[-1].data.message == whole.message
    assert "".join(str(chunk.data) for chunk in chunks if chunk.kind == "content") == whole.message.text


@pytest.fixture(scope="module")
def taught(make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model that has learned by heart to answer with CALLING."""
    rendered = [message.to_dict() for message in MESSAGES]
    tool = {"name": ADD.name, "description": ADD.description, "parameters": dict(ADD.parameters)}
    prompt = tiny_tokenizer.apply_chat_template(
        rendered, tools=[{"type": "function", "function": tool}], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt + tiny_tokenizer.encode(CALLING)])
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    model = make_tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = torch.tensor(1.0)
    while loss > 0.05:
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module", params=["embedded", "rollouts-openai"])
def calling(
    request: pytest.FixtureRequest,
    taught: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("calling")
    taught.save_pretrained(folder)
    with ExitStack() as stack:
        endpoint = serve(request.param, folder, taught, tiny_tokenizer, stack)
        yield replace(endpoint, temperature=0.0, tool_choice="auto")


async def test_tool_calls(calling: Endpoint) -> None:
    answer = await chat(calling, MESSAGES, [ADD])
    assert (answer.message.content, answer.stop_reason) == ("Let me see.", ChatStop.TOOL_CALLS)
    (call,) = answer.message.tool_calls
    assert (call.name, dict(call.args), call.error) == ("add", {"a": 2}, None)
    chunks = [chunk async for chunk in stream_chat(calling, MESSAGES, [ADD])]
    assert [chunk.kind for chunk in chunks][-2:] == ["tool_call", "done"]
    assert "".join(str(chunk.data) for chunk in chunks if chunk.kind == "content") == "Let me see."
    # And the conversation goes on: the call and its result are rendered back.
    after = [*MESSAGES, answer.message, Message("tool", "4", tool_call_id=call.id)]
    assert (await chat(replace(calling, max_tokens=4), after, [ADD])).usage.prompt_tokens > answer.usage.prompt_tokens


async def test_a_broken_call_of_an_embedded_model_is_an_error() -> None:
    text, calls = split_calls('Oh.\n<tool_call>\n{"name": "add", "arguments": {"a": 2\n</tool_call>')
    assert text == "Oh." and (calls[0].name, calls[0].raw) == ("add", '{"a": 2') and calls[0].error
    text, calls = split_calls('Oh.\n<tool_call>\n{"name": "add" "arguments": {"a": 2}}\n</tool_call>')
    assert text == "Oh." and calls[0].error and calls[0].raw.startswith('{"name"')
    assert split_calls("No call at all.") == ("No call at all.", ())


async def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(UserError, match="register_engine"):
        await sample_tokens(Endpoint("embedded", "nobody"), [1])
    with pytest.raises(UserError, match="no token ids"):
        await sample_tokens(Endpoint("anthropic", "claude"), [1])
