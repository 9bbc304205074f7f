"""The chat page: files read once at the start, each answered under its own path and under strict rules for browsers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}

# Nothing inline, nothing from elsewhere, and text becomes elements through DOMPurify alone (Trusted Types): markup that
# got past the sanitizer would still find no script to run, no place to send to and no form to post.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # asks again, by ETag: a new version of rollouts is a new page
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page as it is answered."""

    body: bytes
    media_type: str
    etag: str


def read_page_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """The page's files by their path below the folder; what has no media type here (licenses, notes) is not served."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in MEDIA_TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            files[path.relative_to(folder).as_posix()] = PageFile(body, MEDIA_TYPES[path.suffix], etag)
    return files


def add_chat_page(app: FastAPI) -> None:
    """Answer ``/`` with the page and ``/page/...`` with its parts."""
    files = read_page_files()

    @app.get("/")
    async def show_page(request: Request) -> Response:
        return _answer(files["index.html"], request)

    @app.get("/page/{path:path}")
    async def show_page_file(path: str, request: Request) -> Response:
        if path not in files:
            raise HTTPException(404)
        return _answer(files[path], request)


def _answer(file: PageFile, request: Request) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
