"""Servers that fail in every way: what is asked again, when, how often, and what the caller is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import anyio
import anyio.to_thread
import pytest
from unruly_server import Handler, Unruly, unruly_server

from rollouts.inference import SamplingParams
from rollouts.providers import (
    BadRequestError,
    Endpoint,
    Message,
    ProviderError,
    chat,
    sample_tokens,
    stream_chat,
    stream_tokens,
)
from rollouts.providers import http as http_module

pytestmark = pytest.mark.anyio

ONE = SamplingParams(max_tokens=2)
GOOD = {
    "output_ids": [5, 6],
    "meta_info": {
        "finish_reason": {"type": "length", "length": 2},
        "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 2}],
    },
}
HALF = {"output_ids": [5], "meta_info": {"finish_reason": None, "output_token_logprobs": [[-1.0, 5, None]]}}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server() -> Iterator[Unruly]:
    with unruly_server() as one:
        yield one


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(http_module, "LONGEST_DELAY", 0.05)


def good(handler: Handler) -> None:
    handler.answer(GOOD)


def status(code: int, **headers: str) -> Any:
    return lambda handler: handler.answer({"error": {"message": f"code {code} sk-secret"}}, code, **headers)


def endpoint(server: Unruly, **options: Any) -> Endpoint:
    return Endpoint("sglang", "m", server.url, api_key="sk-secret", **{"timeout": 60, **options})


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503])
async def test_a_storm_passes(server: Unruly, code: int) -> None:
    server.plan = [*[status(code)] * 3, good]
    (sample,) = await sample_tokens(endpoint(server), [1], ONE)
    assert (sample.token_ids, sample.log_probs, sample.weight_version) == ([5, 6], [-1.0, -2.0], 3)
    assert len(server.times) == 4
    assert server.headers[0]["authorization"] == "Bearer sk-secret"


async def test_attempts_are_counted_and_then_it_is_over(server: Unruly, caplog: pytest.LogCaptureFixture) -> None:
    server.plan = [status(503)]
    with caplog.at_level(logging.DEBUG), pytest.raises(ProviderError, match=r"failed 4 times.*503") as caught:
        await sample_tokens(endpoint(server, max_retries=3), [1], ONE)
    assert (caught.value.status, caught.value.attempts) == (503, 4)
    assert len(server.times) == 4
    assert "secret" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 413, 422])
async def test_what_is_refused_is_not_asked_again(server: Unruly, code: int) -> None:
    server.plan = [status(code)]
    with pytest.raises(BadRequestError, match=f"code {code}") as caught:
        await sample_tokens(endpoint(server), [1], ONE)
    assert len(server.times) == 1 and caught.value.status == code
    assert "secret" not in str(caught.value)


async def test_retry_after_is_kept(server: Unruly) -> None:
    def later(handler: Handler) -> None:  # in whole seconds, so 1 to 2 of them
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        handler.answer({"error": "busy"}, 503, retry_after=date)

    server.plan = [status(429, retry_after="0.4"), later, good]
    await sample_tokens(endpoint(server), [1], ONE)
    assert server.times[1] - server.times[0] >= 0.4
    assert server.times[2] - server.times[1] >= 0.9


async def test_delays_grow_and_differ(server: Unruly, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = anyio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(http_module, "FIRST_DELAY", 0.25)
    monkeypatch.setattr(http_module, "LONGEST_DELAY", 30.0)
    monkeypatch.setattr(http_module.anyio, "sleep", noted)
    server.plan = [status(503)]
    with pytest.raises(ProviderError):
        await sample_tokens(endpoint(server, max_retries=12), [1], ONE)
    assert all(0 <= wait <= min(30, 0.25 * 2**i) for i, wait in enumerate(waits))
    assert len(set(waits)) == 12 and max(waits) > 1


async def test_a_hung_server_is_given_up(server: Unruly) -> None:
    def hang(handler: Handler) -> None:
        server.closing.wait()

    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "100000")
        handler.end_headers()
        while not server.closing.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    server.plan = [hang, drip, good]
    (sample,) = await sample_tokens(endpoint(server, timeout=0.5), [1], ONE)
    assert sample.token_ids == [5, 6]
    server.plan = [hang]
    with pytest.raises(ProviderError, match=r"no answer in 0\.3 s"):
        await sample_tokens(endpoint(server, timeout=0.3, max_retries=1), [1], ONE)


async def test_resets_and_garbage(server: Unruly) -> None:
    def garbage(handler: Handler) -> None:
        handler.answer(b"{not json")

    def cut(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"output_ids"')
        handler.reset()

    server.plan = [lambda handler: handler.reset(), garbage, cut, good]
    assert (await sample_tokens(endpoint(server), [1], ONE))[0].token_ids == [5, 6]
    server.plan = [lambda handler: handler.answer({"hello": 1})]
    with pytest.raises(ProviderError, match="lacks token ids"):
        await sample_tokens(endpoint(server), [1], ONE)


async def test_nobody_listens() -> None:
    with pytest.raises(ProviderError, match="failed 2 times"):
        await sample_tokens(Endpoint("sglang", "m", "http://127.0.0.1:9", max_retries=1), [1], ONE)


async def test_a_stream_is_asked_again_until_something_came(server: Unruly) -> None:
    def nothing(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        handler.reset()

    server.plan = [status(503), nothing, lambda handler: handler.events(HALF, GOOD)]
    chunks = [chunk async for chunk in stream_tokens(endpoint(server), [1], ONE)]
    assert [t for chunk in chunks for t in chunk.token_ids] == [5, 6]
    assert chunks[-1].completion is not None

    def broken(handler: Handler) -> None:
        handler.events(HALF, finish=False)
        handler.reset()

    for fault, words in (
        (broken, r"broke off|0 of 1 samples"),
        (lambda handler: handler.events(HALF), "0 of 1 samples"),
        (lambda handler: handler.events(HALF, "{bad"), "not valid JSON"),
        (lambda handler: handler.events(HALF, {"error": {"message": "lost", "code": 500}}), "lost"),
    ):
        server.plan, server.times[:] = [fault], []
        seen = []
        with pytest.raises(ProviderError, match=words):
            async for chunk in stream_tokens(endpoint(server), [1], ONE):
                seen.append(chunk)
        assert [chunk.token_ids for chunk in seen] == [[5]] and len(server.times) == 1


async def test_bad_arguments_in_a_stream_are_data(server: Unruly) -> None:
    def part(**function: str) -> dict[str, Any]:
        call = {"index": 0, "id": "c1", "function": function}
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}

    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    server.plan = [
        lambda handler: handler.events(
            thought, part(name="add"), part(arguments='{"a"'), part(arguments=": 2"), end, usage
        )
    ]
    chunks = [chunk async for chunk in stream_chat(Endpoint("openai", "m", server.url), [Message("user", "hi")])]
    assert [chunk.kind for chunk in chunks] == ["reasoning", "tool_error", "done"]
    done: Any = chunks[-1].data
    (call,) = done.message.tool_calls
    assert call.name == "add" and call.raw == '{"a": 2' and "not valid JSON" in call.error
    assert (done.usage.total_tokens, done.message.reasoning_content) == (7, "hm")


async def test_anthropics_events(server: Unruly) -> None:
    """The wire format of Anthropic's documentation, spoken by this file: its own servers cannot run here."""

    def block(i: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"type": "content_block_start", "index": i, "content_block": start},
            *({"type": "content_block_delta", "index": i, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": i},
        ]

    start = {"type": "message_start", "message": {"id": "m1", "model": "c", "usage": {"input_tokens": 4}}}
    events = [
        start,
        *block(
            0, {"type": "thinking", "thinking": ""},
            {"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "seal"},
        ),
        *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Hi"}),
        *block(
            2, {"type": "tool_use", "id": "t1", "name": "add", "input": {}},
            {"type": "input_json_delta", "partial_json": '{"a": '}, {"type": "input_json_delta", "partial_json": "1}"},
        ),
        *block(
            3, {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
            {"type": "input_json_delta", "partial_json": '{"a'},
        ),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]  # fmt: skip
    server.plan = [lambda handler: handler.events(*events, finish=False)]
    anthropic = Endpoint("anthropic", "c", server.url, api_key="sk-ant", thinking={"type": "enabled"})
    conversation = [
        Message("system", "Be kind."), Message("user", "2+2?"),
        Message("assistant", "Let me see.", "hm", "seal", ()), Message("tool", "4", tool_call_id="t0"),
        Message("user", "And?"),
    ]  # fmt: skip
    chunks = [chunk async for chunk in stream_chat(anthropic, conversation)]
    assert [chunk.kind for chunk in chunks] == ["reasoning", "content", "tool_call", "tool_error", "done"]
    done: Any = chunks[-1].data
    assert (done.message.text, done.message.reasoning_content, done.message.thinking_signature) == ("Hi", "hm", "seal")
    assert [dict(call.args) for call in done.message.tool_calls] == [{"a": 1}, {}]
    assert (done.stop_reason, done.usage.prompt_tokens, done.usage.completion_tokens) == ("tool_calls", 4, 9)
    assert server.headers[0]["x-api-key"] == "sk-ant" and "authorization" not in server.headers[0]
    sent = server.bodies[0]
    assert [turn["role"] for turn in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["messages"][2]["content"][0]["type"] == "tool_result"
    assert sent["messages"][1]["content"][0] == {"type": "thinking", "thinking": "hm", "signature": "seal"}
    assert sent["system"][0]["cache_control"] and sent["thinking"] == {"type": "enabled"}
    server.plan = [lambda handler: handler.events(*events[:-1], finish=False)]
    with pytest.raises(ProviderError, match="before the answer did"):
        [chunk async for chunk in stream_chat(anthropic, conversation)]
    server.plan = [status(529), lambda handler: handler.answer({"content": [{"type": "text", "text": "Yes"}],
                                                                  "stop_reason": "end_turn"})]  # fmt: skip
    assert (await chat(anthropic, conversation)).message.text == "Yes"


async def test_cancelling_closes_the_connection(server: Unruly) -> None:
    asked, gone = threading.Event(), threading.Event()

    def watch(handler: Handler) -> None:
        asked.set()
        handler.connection.settimeout(60)
        if handler.connection.recv(1) == b"":
            gone.set()

    server.plan = [watch]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sample_tokens, endpoint(server), [1], ONE)
        assert await anyio.to_thread.run_sync(asked.wait, 60)
        tasks.cancel_scope.cancel()
    assert await anyio.to_thread.run_sync(gone.wait, 60)


async def test_any_number_is_asked_at_once_by_clients_of_few_connections(server: Unruly) -> None:
    number = 2 * http_module.AT_ONCE + 1
    all_here = threading.Barrier(number, timeout=120)

    def meet(handler: Handler) -> None:
        all_here.wait()
        handler.answer(GOOD)

    server.plan = [meet]
    at = endpoint(server, timeout=240, connect_timeout=240)
    for _ in range(2):  # the second time by the same clients
        async with anyio.create_task_group() as tasks:
            for _ in range(number):
                tasks.start_soon(sample_tokens, at, [1], ONE)
        [clients] = http_module._clients.get().values()
        assert [client.in_flight for client in clients] == [0, 0, 0]
    server.plan = [lambda handler: handler.answer({}) if server.closing.wait(240) else None]
    with anyio.move_on_after(0.05):
        await sample_tokens(at, [1], ONE)
    assert [client.in_flight for client in clients] == [0, 0, 0]  # who is cancelled gives its place back
