"""From sampled ids to the text that clients read, whole or as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rollouts.inference import Completion, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how tokenizers show the first bytes of a character whose rest is to come
MAX_PENDING = 8  # tokens; no character has more, so that bytes which are none do not pile up


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], skip_special: bool = True) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)  # type: ignore[return-value]


def completion_text(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, *, skip_special: bool = True, trim: bool = True
) -> str:
    """The text of a sample; ``trim`` leaves out the stop token, or the stop string and what follows it."""
    token_ids = completion.token_ids
    if trim and completion.stop_reason is StopReason.STOP_TOKEN:
        token_ids = token_ids[:-1]
    text = decode(tokenizer, token_ids, skip_special)
    if trim and completion.stop_reason is StopReason.STOP_STRING:
        text = text.partition(str(completion.stop_match))[0]
    return text


class TextStream:
    """The text of one growing sample in pieces, none of which is taken back: together they are ``completion_text``.

    Text is held back while it may change (the first bytes of a character) or may turn out to begin a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), *, skip_special: bool = True,
        trim: bool = True,
    ) -> None:  # fmt: skip
        self._tokenizer, self._stops = tokenizer, stops if trim else ()
        self._skip_special, self._trim = skip_special, trim
        self._context: list[int] = []  # tokens already in the text: some tokenizers decode a token by its neighbors
        self._pending: list[int] = []
        self._held = ""
        self._given = 0  # characters

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        self._pending += token_ids
        before = decode(self._tokenizer, self._context, self._skip_special)
        text = decode(self._tokenizer, self._context + self._pending, self._skip_special)[len(before) :]
        if text.endswith(UNFINISHED) and len(self._pending) < MAX_PENDING:
            return ""
        self._context, self._pending = self._pending, []
        text = self._held + text
        hold = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        self._given += len(text) - hold
        return text[: len(text) - hold]

    def finish(self, completion: Completion) -> str:
        """The rest of the finished sample's text."""
        text = completion_text(self._tokenizer, completion, skip_special=self._skip_special, trim=self._trim)
        return text[self._given :]


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that may go on to become ``tag``, or that holds it.

    >>> overlap("a <to", "<tool>"), overlap("a <tool> b", "<tool>"), overlap("ab", "<tool>")
    (3, 8, 0)
    """
    found = text.find(tag)
    if found >= 0:
        return len(text) - found
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class TokenNames:
    """Token ids as the text and bytes that log-prob reports show."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._byte_level = "Ġ" in tokenizer.get_vocab()
        self._bytes = _byte_alphabet()

    def text(self, token_id: int) -> str:
        return decode(self._tokenizer, [token_id], skip_special=False)

    def utf8(self, token_id: int) -> list[int]:
        """The token's bytes, which need not be whole characters."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._byte_level and isinstance(token, str) and all(char in self._bytes for char in token):
            return [self._bytes[char] for char in token]
        return list(self.text(token_id).encode())


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones of Latin-1 as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
