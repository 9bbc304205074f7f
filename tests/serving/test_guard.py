"""Who is answered: Host, Origin, keys, sizes and times."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, post_head, running
from transformers import PreTrainedTokenizerFast

from rollouts.errors import UserError
from rollouts.serving.settings import Settings, host_is_allowed, is_loopback

PATHS = ["/", "/health", "/metrics", "/v1/models", "/v1/completions", "/generate", "/update_weights_from_disk", "/none"]
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", PATHS)
def test_other_hosts_and_origins_are_refused_by_every_method(server: Any, method: str, path: str) -> None:
    port = server.url.rpartition(":")[2]
    for headers in (
        {"host": "evil.example"},
        {"host": f"evil.example:{port}"},
        {"host": f"127.0.0.1.evil.example:{port}"},
        {"host": "192.168.0.1"},
        {"host": "localhost:80:80"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"host": f"localhost:{port}", "origin": f"http://127.0.0.1:{port}"},
    ):
        response = server.http.request(method, path, headers=headers)
        assert response.status_code == 403, headers
        assert "access-control-allow-origin" not in response.headers


def test_own_names_and_own_pages_are_answered(server: Any) -> None:
    port = server.url.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
        headers = {"host": host, "origin": f"http://{host}"}
        assert server.http.get("/v1/models", headers=headers).status_code == 200, host
    preflight = server.http.options("/v1/models", headers={"origin": server.url})
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_hosts_of_a_server_that_others_reach() -> None:
    outside = Settings(host="0.0.0.0", api_key="k", allowed_hosts=("gpu.lan",))
    allowed = {
        "10.0.0.5:8000": True,
        "gpu.lan": True,
        "GPU.lan:8000": True,
        "[fe80::1]:80": True,
        "evil.example": False,
    }
    assert {host: host_is_allowed(host, outside) for host in allowed} == allowed
    assert not host_is_allowed("10.0.0.5", Settings())
    assert not host_is_allowed("", Settings())
    assert [is_loopback(h) for h in ("127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "example.com")] == [True] * 3 + [
        False
    ] * 3


def test_a_server_that_others_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "10.0.0.5", "::", "myhost"):
        with pytest.raises(UserError, match="--api-key"):
            Settings(host=host)


@pytest.fixture(scope="module")
def locked_server(served_weights: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    with running(served_weights / "a", tiny_tokenizer, Settings(api_key="sesame")) as one:
        yield one


def test_the_key(locked_server: Any) -> None:
    for path in PATHS[2:]:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "sesame"},
            {"authorization": "Bearer"},
        ):
            response = locked_server.http.get(path, headers=headers)
            assert response.status_code == 401 and "sesame" not in response.text
    assert locked_server.http.get("/health").status_code == 200
    with_key = {"authorization": "Bearer sesame"}
    assert locked_server.http.get("/v1/models", headers=with_key).status_code == 200


def test_large_bodies(server: Any) -> None:
    body = b'{"model": "tiny", "prompt": "' + b"a" * (1 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    assert server.http.post("/v1/completions", content=body, headers=headers).status_code == 413
    in_pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))  # chunked: no length is told
    assert server.http.post("/v1/completions", content=in_pieces, headers=headers).status_code == 413
    assert b" 413 " in talk(server, post_head("/v1/completions", 1 << 40), until=b" 413 ")
    assert server.http.get("/health").status_code == 200


def test_other_content_types(server: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = server.http.post("/flush_cache", content=b"{}", headers={"content-type": kind})
        assert response.status_code == 415


def test_unknown_paths_and_methods_have_the_same_errors(server: Any) -> None:
    for method, path, status in (("GET", "/none", 404), ("GET", "/generate", 405), ("GET", "/flush_cache", 405)):
        response = server.http.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert server.http.get("/docs").status_code == server.http.get("/openapi.json").status_code == 404


def talk(server: Any, sent: bytes, more: bytes = b"", until: bytes | None = None) -> bytes:
    """What the server says to ``sent``, then ``more`` every 50 ms, until it has said ``until`` or closes."""
    host, port = server.url.removeprefix("http://").split(":")
    deadline, said = time.monotonic() + 60, b""
    with socket.create_connection((host, int(port))) as client:
        client.settimeout(0.05)
        client.sendall(sent)
        while until is None or until not in said:
            assert time.monotonic() < deadline, f"the connection still stands; the server said {said!r}"
            try:
                piece = client.recv(4096)
                said += piece
                if not piece:
                    break
            except TimeoutError:
                try:
                    client.sendall(more)
                except OSError:
                    break
            except OSError:
                break
    return said


def test_slow_heads_and_bodies_are_dropped(served_weights: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with running(served_weights / "a", tiny_tokenizer, Settings(header_timeout=0.3, body_timeout=600)) as server:
        assert talk(server, b"") == b""
        assert talk(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"a") == b""
    with running(served_weights / "a", tiny_tokenizer, Settings(header_timeout=600, body_timeout=0.3)) as server:
        said = talk(server, post_head("/v1/completions", 1000), b" ", until=b"\r\n")
        assert b" 408 " in said.split(b"\r\n")[0]


def test_heads_are_bounded(server: Any) -> None:
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
    assert b" 200 " in talk(server, start + b"a" * 60_000 + b"\r\n\r\n", until=b"\r\n").split(b"\r\n")[0]
    assert b" 431 " in talk(server, start + b"a" * 70_000 + b"\r\n\r\n", until=b"\r\n").split(b"\r\n")[0]
    assert talk(server, start, b"a" * 10_000) == b"", "a head without an end is not kept"
    body = b" " * 2_000_000  # refused by its head, and read to its end all the same
    assert b" 413 " in talk(server, post_head("/v1/completions", len(body)) + body, until=b"\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    ],
)
def test_templates_render_in_a_sandbox(
    server: Any, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that came with a model and reaches for Python is an error of the request, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server.served.tokenizer, "chat_template", template)
    response = server.post("/v1/chat/completions", model="tiny", messages=[{"role": "user", "content": "x"}])
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages", response.text
    assert not list(tmp_path.iterdir())
