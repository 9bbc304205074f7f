"""Finding a stop string in text that arrives token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how tokenizers show the first bytes of a character whose rest is to come


class StopStrings:
    """Watches one sample; it remembers no more text than the longest stop string needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._overlap = max(len(stop) for stop in stops) - 1
        self._context: list[int] = []  # tokens already in the text: some tokenizers decode a token by its neighbors
        self._pending: list[int] = []  # tokens whose text may still change
        self._tail = ""

    def push(self, token_id: int) -> str | None:
        """The stop string that this token completes, the one that begins first if it completes several."""
        self._pending.append(token_id)
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)[len(before) :]
        searched = self._tail + text.rstrip(_UNFINISHED)
        found = [(at, stop) for stop in self._stops if (at := searched.find(stop)) >= 0]
        if not text.endswith(_UNFINISHED):
            self._tail = searched[-self._overlap :] if self._overlap else ""
            self._context, self._pending = self._pending, []
        return min(found)[1] if found else None

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
