"""Bodies that are no requests: always a 4xx, never a 5xx, and the server lives on."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.serving.errors import RequestError
from rollouts.serving.strict_json import parse_json

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/generate", "/update_weights_from_disk", "/abort_request",
    "/update_weights_from_distributed", "/update_weights_from_tensor",
)  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 1.0,
        "logit_bias": {"5": 1.0}, "stop": ["a"], "seed": 1, "n": 1, "logprobs": True, "top_logprobs": 1,
        "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto", "parallel_tool_calls": True,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    },
    "/v1/completions": {"model": "tiny", "prompt": [1, 2], "max_tokens": 1, "logprobs": 1, "stop": "a", "echo": True},
    "/generate": {"input_ids": [[1, 2]], "sampling_params": {"max_new_tokens": 1}, "return_logprob": True},
    "/update_weights_from_disk": {"model_path": "/none", "weight_version": "1"},
    "/abort_request": {"rid": "a"},
    "/update_weights_from_distributed": {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "g"},
    "/update_weights_from_tensor": {"serialized_named_tensors": ["AAAA"], "weight_version": "1"},
}  # fmt: skip
VALUES = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "-" + "9" * 5000, "1e400", "0." + "1" * 5000,
    '"\\ud800"', '"\\udfff x"', '"\\u0000"', "[" * 100_000, '{"a":' * 50_000, "[" * 65 + "]" * 65, "{}", "[]", '""',
    "null", "true", "-1", "0", "1e308", "1.5", "18446744073709551616", '"' + "x" * 10_000 + '"', "[[[]]]", "[null]",
    '{"": {"": {}}}', "'a'", "undefined", "01", "1_000", "+1", ".5", "0x10", "\\", '"\t"', '["\\ud83d"]',
)  # fmt: skip
WHOLE = (
    b"\xff\xfe{}", b'{"model": "\xc3\x28"}', b'{"model": "\xed\xa0\x80"}', b"\x00" * 100, b"\xef\xbb\xbf{}", b"null",
    b"[]", b'"x"', b"5", b"{", b"}", b'{"a": 1, "a": 2}', b"{}{}", b"{}x", b" ", b"[" * 500_000, b'{"a":' * 150_000,
    b"[" * 500_000 + b"]" * 500_000, b'"' + b"\\\\" * 400_000, b'{"rid": "\\ud800"}',
)  # fmt: skip


def malformed(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(path, body): every whole one, then good requests with one value replaced, or with bytes spoiled."""
    rng = random.Random(seed)
    yield from ((path, body) for path in PATHS for body in WHOLE)
    for i in range(count - len(PATHS) * len(WHOLE)):
        path = PATHS[i % len(PATHS)]
        request = dict(GOOD[path])
        if rng.random() < 0.7:
            request[rng.choice([*request, "unknown"])] = "@@@"
            yield path, json.dumps(request).replace('"@@@"', rng.choice(VALUES)).encode()
        else:
            body = bytearray(json.dumps(request).encode())
            for _ in range(rng.randint(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            yield path, bytes(body[: rng.randint(1, len(body))])


def refuse_all(server: Any, count: int) -> None:
    statuses = []
    for path, body in malformed(count):
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code < 500, (path, body[:200], response.text)
        if response.status_code >= 400:
            answer = response.json()
            assert answer.get("error", {}).get("message") or answer["success"] is False
        statuses.append(response.status_code)
    assert sum(status >= 400 for status in statuses) > 0.7 * count
    assert server.http.get("/health_generate").status_code == 200


def test_malformed_bodies(server: Any) -> None:
    refuse_all(server, 400)


@pytest.mark.long
def test_ten_thousand_malformed_bodies_leave_no_memory_behind(server: Any) -> None:
    refuse_all(server, 500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; of client and server together
    refuse_all(server, 10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


SCHEMAS: list[Any] = [
    {"$ref": "#/$defs/none"},
    {"$ref": "#"},
    {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "((a{0,1000}){0,1000}){0,1000}"},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "items": {"type": "integer"}, "minItems": 10**12},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"enum": []},
    {"enum": [f"{i:012}" for i in range(20_000)]},
    {"not": {}},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"properties": {str(i): {"type": "object", "properties": {"x": {"$ref": "#"}}} for i in range(3_000)}},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_schemas_of_people_who_mean_harm(server: Any, schema: Any) -> None:
    """Each is refused or honored in a few seconds, and others are served meanwhile and afterwards."""
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "model": "tiny"}
    response = server.http.post("/v1/chat/completions", json={**body, "response_format": form})
    assert response.status_code in (200, 400), response.text
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}}}}
    forced = {**body, "tools": [tool], "tool_choice": "required"}
    assert server.http.post("/v1/chat/completions", json=forced).status_code in (200, 400)
    assert server.http.get("/health_generate").status_code == 200


def test_no_body_and_no_object(server: Any) -> None:
    response = server.http.post("/v1/completions")
    assert response.status_code == 400 and response.json()["error"]["param"] == "model"
    response = server.http.post("/v1/completions", json=[])
    assert response.status_code == 400 and "JSON object" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"5": 1e300}),
        ("temperature", 1e-300),
        ("repetition_penalty", 1e-300),
        ("stop", ""),
        ("stop", ["a", ""]),
    ],
)
def test_numbers_that_would_break_the_engine(server: Any, field: str, value: Any) -> None:
    """They overflow float32, or match everywhere: the message says what to give instead, and the engine lives."""
    response = server.post("/v1/completions", model="tiny", prompt="a", max_tokens=2, **{field: value})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field and error["message"].startswith(f"{field}: give ")
    assert server.post("/v1/completions", model="tiny", prompt="a", max_tokens=2).status_code == 200


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
def test_strict_json_reads_what_json_reads(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("text", ['"]]}\\"[["', '{"a": "\\\\", "b": [1]}', '"\\ud83d\\ude00"', "[" * 64 + "]" * 64])
def test_strict_json_accepts(text: str) -> None:
    assert parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("text", [*VALUES[:13], *VALUES[28:]])
def test_strict_json_refuses(text: str) -> None:
    if text in ("1e308", '{"": {"": {}}}', '"\\u0000"', "0." + "1" * 5000):
        return
    with pytest.raises(RequestError):
        parse_json(text.encode())


def test_model_names_are_not_paths(server: Any, tmp_path: Path) -> None:
    for name in ("../tiny", str(tmp_path), "tiny/", "TINY", "", "."):
        response = server.post("/v1/completions", model=name, prompt="a")
        assert response.status_code == 404 and response.json()["error"]["param"] == "model"
