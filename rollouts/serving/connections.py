"""Limits of a connection that uvicorn does not have: a bounded head must arrive in time, and an answer be taken."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from rollouts.serving.settings import Settings


def timed_protocol(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's protocol that drops a connection without a whole head, or with a reader that has stalled."""

    class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        in_head, head_bytes = False, 0
        head_timer: asyncio.TimerHandle | None = None
        reader_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_head_timer()

        def data_received(self, data: bytes) -> None:
            self.head_bytes += len(data)
            super().data_received(data)
            if self.in_head and self.head_bytes > settings.max_header_bytes:
                self.transport.abort()
            if self.cycle is not None and not self.cycle.response_complete:  # a head is complete
                self._stop_head_timer()
            elif self.head_timer is None:
                self._start_head_timer()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.in_head, self.head_bytes = True, 0  # what came with its first piece may belong to a body before it

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self.in_head = False

        def pause_writing(self) -> None:
            super().pause_writing()
            self.reader_timer = self.loop.call_later(settings.send_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.reader_timer is not None:
                self.reader_timer.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            if self.reader_timer is not None:
                self.reader_timer.cancel()
            super().connection_lost(exc)

        def _start_head_timer(self) -> None:
            self.head_timer = self.loop.call_later(settings.header_timeout, self._no_head)

        def _no_head(self) -> None:
            self.head_timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

        def _stop_head_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return TimedProtocol
