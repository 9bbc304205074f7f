"""JSON as the standard has it, from people who may mean harm: everything else is a ``RequestError``."""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Any, NoReturn

from rollouts.serving.errors import RequestError

MAX_DEPTH = 64
MAX_DIGITS = 20  # of an integer: those of 2**64

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"')
_BRACKET = re.compile(r"[][{}]")


def parse_json(body: bytes) -> Any:
    """The value of a UTF-8 JSON text.

    Raises:
        RequestError: not UTF-8 or not JSON, NaN or infinities in any spelling, integers of more than 20 digits, half a
            surrogate pair, a key twice in one object, or nesting deeper than 64.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
            object_pairs_hook=_object_without_repeats,
        )
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"the body is not JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise _too_deep() from error
    if _depth(text) > MAX_DEPTH:
        raise _too_deep()
    if "\\u" in text and _has_lone_surrogate(value):
        raise RequestError("the body has half a surrogate pair (\\ud800 to \\udfff) in a string; send whole characters")
    return value


def _depth(text: str) -> int:
    """The deepest nesting of a text that is known to be JSON."""
    brackets = _BRACKET.findall(_STRING.sub("", text))
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body has {name}, which is not JSON; send a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RequestError(f"the body has the number {text[:40]}, which is too large; send a finite number")
    return number


def _bounded(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise RequestError(f"the body has an integer of {len(text)} digits; the longest allowed has {MAX_DIGITS}")
    return int(text)


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RequestError(f"the body has the key {twice[:80]!r} twice in one object; send it once", param=twice[:80])
    return value


def _too_deep() -> RequestError:
    return RequestError(f"the body is nested too deeply; {MAX_DEPTH} levels are allowed")
