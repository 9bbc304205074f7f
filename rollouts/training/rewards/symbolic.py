"""Mathematical equality by math-verify: LaTeX or plain expressions, sets, intervals, matrices, equations."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from rollouts.training.rewards.answers import between_tags, reference_answer
from rollouts.training.types import Sample


def symbolic_math(sample: Sample, *, tag: str | None = None, digits: int = 6) -> float:
    """1.0 when the response's final expression equals the reference answer as mathematics, else 0.0.

    A boxed expression is preferred, then the last one in LaTeX, then the last plain one. A response without an
    expression, or one that cannot be understood, is wrong. math-verify's own time limits are off, for they turn an
    expression that takes too long into a wrong answer and work in a main thread only: run this reward in a worker
    process (the default), whose limit leaves the sample out instead.

    Args:
        tag: read the last ``<tag>...</tag>`` of the response only.
        digits: decimals that must agree where numbers are compared.

    Raises:
        ValueError: the reference answer is no expression.
    """
    gold = _reference(reference_answer(sample))
    response = between_tags(sample.response, tag)
    if response is None:
        return 0.0
    verify, parse, configs = _math_verify()
    answer = parse(response, configs, parsing_timeout=None)
    return float(bool(answer) and verify(list(gold), answer, float_rounding=digits, timeout_seconds=None))


def _prepare(**options: object) -> None:
    _math_verify()


symbolic_math.prepare = _prepare  # type: ignore[attr-defined]


@cache
def _reference(text: str) -> tuple[Any, ...]:
    """The reference answer parsed; bare LaTeX (``\\frac{1}{2}``) is as good as delimited (``$\\frac{1}{2}$``)."""
    _, parse, configs = _math_verify()
    delimited = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    parsed = parse(text if delimited else f"\\boxed{{{text}}}", configs, parsing_timeout=None)
    if not parsed:
        parsed = parse(text, configs, parsing_timeout=None)
    if not parsed:
        raise ValueError("the reference answer is no mathematical expression")
    return tuple(parsed)


@cache
def _math_verify() -> tuple[Any, Any, list[Any]]:
    import math_verify  # type: ignore[import-untyped]

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they warn that their time limits are off
    return (
        math_verify.verify,
        math_verify.parse,
        [
            math_verify.LatexExtractionConfig(boxed_match_priority=0),
            math_verify.ExprExtractionConfig(),
        ],
    )
