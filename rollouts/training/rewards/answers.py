"""Rewards that compare a response with the reference answer in ``sample.metadata["answer"]``: 1.0 or 0.0."""

from __future__ import annotations

import re
from decimal import Decimal

from rollouts.training.types import Sample

# A number as people write it: sign, digits with or without thousands commas, decimals, exponent.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?")
_GSM8K_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_GSM8K_FLEXIBLE = re.compile(r"-?[0-9.,]*[0-9][0-9.,]*")
_CLIP = 300  # characters at the end in which GSM8K's answer is looked for, as the field does


def reference_answer(sample: Sample) -> str:
    """``metadata["answer"]`` as text.

    Raises:
        ValueError: there is none, so that the sample is left out rather than scored 0.
    """
    answer = sample.metadata.get("answer")
    if answer is None or isinstance(answer, bool | list | dict) or not str(answer).strip():
        raise ValueError("the prompt has no reference answer (metadata['answer'])")
    return str(answer)


def between_tags(text: str, tag: str | None) -> str | None:
    """What stands in the last ``<tag>...</tag>`` of a text; the text itself without a tag, None where it is missing."""
    if tag is None:
        return text
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if end >= 0 and start >= 0 else None


def exact_match(
    sample: Sample, *, ignore_case: bool = False, ignore_space: bool = True, tag: str | None = None
) -> float:
    """1.0 when the response is the reference answer.

    Args:
        ignore_space: runs of white space count as one blank, and none counts at the ends.
        tag: compare only what stands in the last ``<tag>...</tag>`` of the response.
    """

    def normal(text: str) -> str:
        text = " ".join(text.split()) if ignore_space else text
        return text.casefold() if ignore_case else text

    response = between_tags(sample.response, tag)
    return float(response is not None and normal(response) == normal(reference_answer(sample)))


def numeric(sample: Sample, *, tolerance: float = 1e-6, tag: str | None = None) -> float:
    """1.0 when the last number of the response is the last number of the reference answer.

    Commas, units, currency and text around the number do not matter: ``$1,234.50 in all.`` is 1234.5. A percentage is
    its number: 50% is 50. Fractions and expressions are for ``symbolic_math``.

    Args:
        tolerance: allowed difference, relative to the answer where that is above 1.
        tag: read the number in the last ``<tag>...</tag>`` of the response.
    """
    gold = last_number(reference_answer(sample))
    if gold is None:
        raise ValueError("the reference answer holds no number")
    response = between_tags(sample.response, tag)
    found = last_number(response) if response is not None else None
    if found is None:
        return 0.0
    return float(abs(found - gold) <= Decimal(repr(tolerance)) * max(Decimal(1), abs(gold)))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly as written."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def gsm8k(sample: Sample, *, method: str = "strict", format_score: float = 0.0) -> float:
    """GSM8K's score: 1.0 for the right answer, ``format_score`` for a wrong one in the right form, else 0.0.

    The reference may be the bare number or the data set's whole solution, which ends with ``#### 72``.

    Args:
        method: "strict" wants ``#### 72`` in the response, "flexible" takes its last number. As verl extracts them,
            except that a full stop or comma after the number is no part of it and thousands commas never matter.
    """
    gold = extract_gsm8k(reference_answer(sample), "strict") or extract_gsm8k(reference_answer(sample), "flexible")
    if gold is None:
        raise ValueError("the reference answer holds no number")
    found = extract_gsm8k(sample.response, method)
    return 0.0 if found is None else 1.0 if found == gold else format_score


def extract_gsm8k(text: str, method: str = "strict") -> str | None:
    """The answer as text without commas, or None: the last ``#### n`` ("strict"), or the last number ("flexible")."""
    if method not in ("strict", "flexible"):
        raise ValueError(f"method must be 'strict' or 'flexible', got {method!r}")
    found = (_GSM8K_STRICT if method == "strict" else _GSM8K_FLEXIBLE).findall(text[-_CLIP:])
    return found[-1].replace(",", "").rstrip(".") or None if found else None


def regex(sample: Sample, *, pattern: str, flags: str = "") -> float:
    """1.0 when ``pattern`` is found in the response.

    Args:
        pattern: Python's syntax, searched for anywhere. What the last match holds in a group named ``answer``, written
            ``(?P<answer>...)``, must also be the reference answer.
        flags: letters of Python's inline flags, for example "is".
    """
    compiled = re.compile(f"(?{flags})" + pattern if flags else pattern)
    matches = list(compiled.finditer(sample.response))
    if not matches or "answer" not in compiled.groupindex:
        return float(bool(matches))
    found = matches[-1]["answer"]
    return float(found is not None and found.strip() == reference_answer(sample).strip())


def correct(sample: Sample) -> float:
    """1.0 when ``metadata["correct"]`` is true: what an environment or an agent found out itself."""
    if "correct" not in sample.metadata:
        raise ValueError("nothing has set metadata['correct']")
    return 1.0 if sample.metadata["correct"] else 0.0
