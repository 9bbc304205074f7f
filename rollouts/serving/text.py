"""From sampled ids to the text that clients read, whole or as it grows."""

from __future__ import annotations

import codecs
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
        self, names: TokenNames, stops: Sequence[str] = (), *, skip_special: bool = True, trim: bool = True
    ) -> None:  # fmt: skip
        self._names, self._stops = names, stops if trim else ()
        self._skip_special, self._trim = skip_special, trim
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if names.are_bytes else None
        self._context: list[int] = []  # tokens already in the text: some tokenizers decode a token by its neighbors
        self._pending: list[int] = []
        self._held = ""
        self._given = 0  # characters

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        if self._utf8 is None:
            text = self._decode(token_ids)
        else:
            text = self._utf8.decode(self._names.all_bytes(token_ids, self._skip_special))
        if not text:
            return ""
        text = self._held + text
        hold = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        self._given += len(text) - hold
        return text[: len(text) - hold]

    def finish(self, completion: Completion) -> str:
        """The rest of the finished sample's text."""
        tokenizer = self._names.tokenizer
        text = completion_text(tokenizer, completion, skip_special=self._skip_special, trim=self._trim)
        return text[self._given :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens after those before, by the tokenizer itself."""
        self._pending += token_ids
        before = decode(self._names.tokenizer, self._context, self._skip_special)
        text = decode(self._names.tokenizer, self._context + self._pending, self._skip_special)[len(before) :]
        if text.endswith(UNFINISHED) and len(self._pending) < MAX_PENDING:
            return ""
        self._context, self._pending = self._pending, []
        return text


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
    """Token ids as the text and bytes that clients are shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._byte_level = "Ġ" in tokenizer.get_vocab()
        self._alphabet = _byte_alphabet()
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._known: dict[int, bytes] = {}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        #: A text is its tokens' bytes one after the other, whatever stands beside what.
        self.are_bytes = self._byte_level and type(decoder).__name__ == "ByteLevel"

    def text(self, token_id: int) -> str:
        return decode(self.tokenizer, [token_id], skip_special=False)

    def utf8(self, token_id: int) -> list[int]:
        """The token's bytes, which need not be whole characters."""
        return list(self._bytes(token_id))

    def all_bytes(self, token_ids: Sequence[int], skip_special: bool) -> bytes:
        return b"".join(self._bytes(i) for i in token_ids if not (skip_special and i in self._special))

    def _bytes(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if self._byte_level and isinstance(token, str) and all(char in self._alphabet for char in token):
                known = bytes(self._alphabet[char] for char in token)
            else:
                known = self.text(token_id).encode()
            self._known[token_id] = known
        return known


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones of Latin-1 as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
