"""The chat page's files without a browser: all are there, under strict headers, and ask nothing of anybody else."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, running
from transformers import PreTrainedTokenizerFast

import rollouts
from rollouts.serving.chat_page import FOLDER, MEDIA_TYPES, read_page_files
from rollouts.serving.settings import Settings

VENDOR = FOLDER / "vendor"
OWN = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in MEDIA_TYPES and VENDOR not in path.parents]


def references(path: str, text: str) -> Iterator[str]:
    """What a file makes a browser load, as paths that the server is asked for."""
    if path.endswith(".html"):
        for link in re.findall(
            r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", text
        ):
            yield "/" + link
        return
    base = f"/page/{path}".rpartition("/")[0]
    patterns = {".css": r"url\(([^)]+)\)", ".js": r"^import\b[^\"]*\"([^\"]+)\""}
    for link in re.findall(patterns.get(Path(path).suffix, "(?!)"), text, re.MULTILINE):
        parts: list[str] = []
        for part in f"{base}/{link}".replace("'", "").replace('"', "").split("/"):
            parts = parts[:-1] if part == ".." else parts if part == "." else [*parts, part]
        yield "/".join(parts)


def reached(server: Any) -> dict[str, Any]:
    """Every answer that loading the page leads to, by path."""
    answers, left = {}, ["/"]
    while left:
        path = left.pop()
        if path in answers:
            continue
        answers[path] = server.http.get(path)
        assert answers[path].status_code == 200, path
        name = "index.html" if path == "/" else path.removeprefix("/page/")
        if name.endswith((".html", ".css", ".js")) and not name.endswith(".min.js"):
            left += references(name, answers[path].text)
    return answers


def test_all_that_the_page_refers_to_is_served_and_nothing_else_is_there(server: Any) -> None:
    answers = reached(server)
    served = {"/" if name == "index.html" else f"/page/{name}" for name in read_page_files()}
    assert set(answers) == served
    for path, response in answers.items():
        suffix = ".html" if path == "/" else Path(path).suffix
        assert response.headers["content-type"] == MEDIA_TYPES[suffix], path


def test_headers(server: Any) -> None:
    for path in ("/", "/page/js/main.js", "/page/css/base.css", "/page/vendor/katex/fonts/KaTeX_Main-Regular.woff2"):
        headers = server.http.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[kind] for kind in ("script-src", "style-src", "img-src", "font-src", "connect-src")} == {
            "'self'"
        }
        assert {policy[kind] for kind in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        again = server.http.get(path, headers={"if-none-match": headers["etag"]})
        assert again.status_code == 304 and not again.content
        assert again.headers["content-security-policy"] == headers["content-security-policy"]


def test_only_the_page_is_served(server: Any) -> None:
    assert (VENDOR / "VENDORED.md").is_file()
    for path in (
        "vendor/VENDORED.md",
        "vendor/licenses/katex.txt",
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "js/..%2f..%2fapp.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "js",
        "js/",
        "",
        "index.html%00",
        "js/main.js/",
        "JS/main.js",
    ):
        assert server.http.get(f"/page/{path}").status_code == 404, path
    assert server.http.post("/", json={}).status_code == 405
    assert server.http.post("/page/js/main.js", json={}).status_code == 405


def test_no_file_refers_to_another_site() -> None:
    names = "http://www.w3.org/2000/svg"  # a name, not an address that is asked
    for path in OWN:
        text = path.read_text(encoding="utf-8").replace(names, "")
        assert not re.search(r"(?:https?|wss?|ftp)://|[\"'(]//\w", text), path
        assert not re.search(
            r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b", text
        ), path
    # In minified files: names of namespaces, licenses and pages for people, none of which the code asks for.
    known = re.compile(
        r"http://www\.w3\.org/(?:2000/svg|1999/xhtml|1998/Math/MathML)$|https://github\.com/|http://\$\{"
    )
    for path in VENDOR.rglob("*"):
        if path.suffix in (".js", ".css"):
            text = path.read_text(encoding="utf-8")
            assert [url for url in re.findall(r"https?://[^\"'`) \\]+", text) if not known.match(url)] == [], path
            assert "eval(" not in text and "new Function(" not in text and "document.write" not in text, path
            assert not re.search(r"url\((?![\"']?fonts/)", text) or path.suffix == ".js", path


def test_nothing_is_inline() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert "<style" not in page and not re.search(r"\sstyle=|\son\w+=", page)
    assert all(not body.strip() for body in re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL))


def test_vendored_files_are_those_that_were_published() -> None:
    notes = (VENDOR / "VENDORED.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| (\S+) \|.*\| `([0-9a-f]{64})` \|$", notes, re.MULTILINE))
    files = {p.relative_to(VENDOR).as_posix(): p for p in VENDOR.rglob("*") if p.suffix in MEDIA_TYPES}
    assert told == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    for license_file in re.findall(r"\((licenses/[^)]+)\)", notes):
        assert (VENDOR / license_file).stat().st_size > 500
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 1 << 20, f"the page has grown to {size:,} bytes"


def test_the_files_are_in_the_package() -> None:
    root = Path(rollouts.__file__).parents[1]
    with (root / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["rollouts"]
    packaged = {path for pattern in patterns for path in (root / "rollouts").glob(pattern)}
    assert {path for path in FOLDER.rglob("*") if path.is_file()} <= packaged


@pytest.fixture(scope="module")
def keyed_server(served_weights: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    with running(served_weights / "a", tiny_tokenizer, Settings(api_key="sesame")) as one:
        yield one


def test_the_page_comes_without_a_key_and_tells_nothing(keyed_server: Any) -> None:
    page = keyed_server.http.get("/")
    assert page.status_code == 200 and "tiny" not in page.text
    assert keyed_server.http.get("/page/js/main.js").status_code == 200
    for path in ("/v1/models", "/page/../v1/models", "/page/%2e%2e/v1/models", "//v1/models"):
        assert keyed_server.http.get(path).status_code in (401, 404), path
    assert keyed_server.http.get("/", headers={"host": "evil.example"}).status_code == 403
