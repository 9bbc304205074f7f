"""Samples that a grammar binds: a JSON schema, a regular expression or a Lark grammar, by way of llguidance.

A matcher follows one sample's text and says after each token which tokens may come next, as one bit a token. End ids
are among them exactly where the text so far is complete.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from rollouts.errors import UserError
from rollouts.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

# Between the parts of a JSON text: enough to indent it, not enough for a weak model to go on forever.
_JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"


@dataclass(frozen=True)
class BoundText:
    """One sample's text and what it may become.

    Args:
        matcher: has seen the sample's tokens so far.
        stop_ids: ids besides the engine's end ids that end the sample: taken only where the text is complete.
        avoided_ids: end ids that the sample takes only where nothing else is possible.
    """

    matcher: LLMatcher
    stop_ids: np.ndarray  # int64
    avoided_ids: np.ndarray  # int64

    def copy(self) -> BoundText:
        return replace(self, matcher=self.matcher.deep_copy())

    @property
    def error(self) -> str | None:
        """Why the matcher gave up, which it does on texts that cost it too much; it then lets the text end."""
        return _line(self.matcher.get_error()) if self.matcher.is_error() else None


class Grammars:
    """The compiled grammars of one engine; safe to call from any thread.

    Args:
        end_ids: tokens that may end a sample whose text is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._lock = threading.Lock()
        self._compile = functools.lru_cache(maxsize=256)(self._compile_text)

    def bound_text(self, params: SamplingParams) -> BoundText | None:
        """The empty text of a request, to be copied for each sample; None if nothing binds it.

        The first one of an engine reads the whole vocabulary, up to about a second; a grammar takes milliseconds.

        Raises:
            UserError: the grammar is not valid, nothing satisfies it, or the engine has no tokenizer or end id.
        """
        if not params.constrained:
            return None
        if self._tokenizer is None:
            raise UserError(f"sampling parameter {params.constrained} needs an engine with a tokenizer; give it one")
        if not self._end_ids:
            raise UserError(f"sampling parameter {params.constrained} needs a model or tokenizer with an end id")
        text = getattr(params, params.constrained)
        with self._lock:
            matcher = self._compile(params.constrained, text if isinstance(text, str) else json.dumps(text))
        stop_ids = sorted(set(params.stop_token_ids) - set(self._end_ids))
        avoided_ids = self._end_ids if params.ignore_eos else []
        return BoundText(matcher, np.array(stop_ids, np.int64), np.array(avoided_ids, np.int64))

    def _compile_text(self, kind: str, text: str) -> LLMatcher:
        from llguidance import LLMatcher

        if kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        elif kind == "grammar":
            grammar = LLMatcher.grammar_from_lark(text)
        else:
            try:
                json.loads(text)
                grammar = LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": _JSON_WHITESPACE})
            except (ValueError, RecursionError) as error:
                raise UserError(f"sampling parameter json_schema is not valid JSON: {_line(error)}") from None
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"sampling parameter {kind} cannot be used: {_line(matcher.get_error())}")
        return matcher

    @functools.cached_property
    def _vocabulary(self):  # type: ignore[no-untyped-def]
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._end_ids)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"this tokenizer cannot be used for structured output: {_line(error)}") from None


class TokenMasks:
    """Which tokens each of M bound texts may take next."""

    def __init__(self, texts: Sequence[BoundText], vocab_size: int) -> None:
        self._texts = texts
        self._numbered = [(text.matcher, i) for i, text in enumerate(texts)]
        self._special = [i for i, text in enumerate(texts) if len(text.stop_ids) or len(text.avoided_ids)]
        self._bits = np.zeros((len(texts), -(-vocab_size // 32)), np.int32)  # [M, W]

    def bits(self) -> torch.Tensor:
        """[M, W] int32: bit b of word w stands for token 32 w + b. Every text may take at least one token."""
        bits = self._bits
        _executor().unsafe_compute_mask_ptr(self._numbered, bits.ctypes.data, bits.shape[1] * 4, len(bits))
        for i in self._special:
            text, words = self._texts[i], bits[i].view(np.uint32)
            if text.matcher.is_accepting():
                np.bitwise_or.at(words, text.stop_ids // 32, _bit(text.stop_ids))
            else:
                _drop(words, text.stop_ids)
            _drop(words, text.avoided_ids)
        return torch.from_numpy(bits)

    def consume(self, which: np.ndarray, token_ids: np.ndarray) -> None:
        """Texts ``which`` [m] go on with ``token_ids`` [m]."""
        pairs = [(self._texts[i].matcher, token_id) for i, token_id in zip(which, token_ids.tolist(), strict=True)]
        if pairs:
            _executor().consume_token_par(pairs)


def unpack_bits(bits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[M, W] int32 -> [M, vocab_size] bool, on the device of ``bits``."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(1)[:, :vocab_size].bool()


def _bit(ids: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32))


def _drop(words: np.ndarray, ids: np.ndarray) -> None:
    """Clear the bits of ``ids``, unless no other is set."""
    rest = words.copy()
    np.bitwise_and.at(rest, ids // 32, ~_bit(ids))
    if rest.any():
        words[:] = rest


@functools.cache
def _executor():  # type: ignore[no-untyped-def]
    from llguidance import LLExecutor

    return LLExecutor(num_threads=torch.get_num_threads())


def _line(error: object) -> str:
    """An error's first words on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
