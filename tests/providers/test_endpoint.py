"""An endpoint as a value: there and back as JSON, and no key in sight."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rollouts.errors import UserError
from rollouts.providers import Endpoint, Message, ToolCall


def test_json_round_trip() -> None:
    endpoint = Endpoint(
        "anthropic", "claude", "https://example.com/v1/", max_tokens=5, thinking={"type": "enabled", "budget_tokens": 9}
    )
    assert Endpoint.from_json(endpoint.to_json()) == endpoint
    assert json.loads(Endpoint("vllm", "m").to_json()) == {"provider": "vllm", "model": "m"}
    assert endpoint.url == "https://example.com"
    for set_by_somebody in (Endpoint("vllm", "m", max_tokens=8192), Endpoint("vllm", "m")):
        again = Endpoint.from_json(replace(set_by_somebody, temperature=0.5).to_json())
        assert again.max_tokens == 8192 and again.sets_max_tokens == set_by_somebody.sets_max_tokens
    assert len({endpoint, Endpoint.from_json(endpoint.to_json())}) == 1


def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint("openai", "m", api_key="sk-secret")
    assert "secret" not in repr(endpoint) + str(endpoint) + endpoint.to_json()
    assert endpoint.to_dict(with_api_key=True)["api_key"] == "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    assert Endpoint("openai", "m").key == "sk-of-the-environment"
    assert Endpoint("sglang", "m").key is None
    assert endpoint.key == "sk-secret"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"provider": "gpt", "model": "m"}, "provider"),
        ({"provider": "vllm", "model": "m", "max_tokens": 0}, "max_tokens"),
        ({"provider": "vllm", "model": "m", "timeout": float("nan")}, "timeout"),
        ({"provider": "vllm", "model": "m", "temperature": -1}, "temperature"),
        ({"provider": "vllm", "model": "m", "temprature": 1}, "temprature"),
    ],
)
def test_bad_values_name_their_field(values: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Endpoint.from_dict(values)


@pytest.mark.parametrize("raw", ["{", '{"a": 1', "[1]", "7", "nul", "[" * 100_000])
def test_bad_arguments_are_an_error_in_the_call(raw: str) -> None:
    call = ToolCall.parse("1", "add", raw)
    assert call.error and call.args == {} and call.raw == raw and call.arguments == "{}"


def test_messages_round_trip_and_stay_short_in_logs() -> None:
    call = ToolCall.parse("1", "add", '{"a": 1}')
    message = Message("assistant", "x" * 1000, "thought", "sealed", (call,))
    assert Message.from_dict(json.loads(json.dumps(message.to_dict()))) == message
    assert len(repr(message)) < 150 and "add" in repr(message)
    assert ToolCall.parse("1", "clear", "").error is None
