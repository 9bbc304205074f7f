"""Server-sent events as text."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from rollouts.serving.sse import TextEvent, event


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=5))
def test_an_event_written_once_says_what_a_whole_one_says(text: str, other: str) -> None:
    def value(content: str) -> dict[str, object]:
        return {"id": other, "choices": [{"delta": {"content": content}, "index": 0}], "usage": None}

    written = TextEvent(value(TextEvent.HERE)).of(text)
    assert written == event(value(text))
    assert written.startswith("data: ") and written.endswith("\n\n")
    assert written.count("\n") == 2 and json.loads(written[6:]) == value(text)
