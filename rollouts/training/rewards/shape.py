"""Rewards for the form of a response: its tags and its length. None of them needs a reference answer."""

from __future__ import annotations

from collections.abc import Sequence

from rollouts.training.types import Sample


def answer_format(sample: Sample, *, tags: Sequence[str] = ("think", "answer"), opened: bool = False) -> float:
    """1.0 when the response is ``<think>...</think> <answer>...</answer>`` and nothing else, each tag once.

    Args:
        tags: the sections in order; each must hold something.
        opened: the prompt already ends with the first opening tag, as templates of reasoning models do.
    """
    text = f"<{tags[0]}>{sample.response}" if opened else sample.response
    position = 0
    for tag in tags:
        start, end = text.find(f"<{tag}>", position), text.find(f"</{tag}>", position)
        outside, inside = text[position:start], text[start + len(tag) + 2 : end]
        if not 0 <= start < end or outside.strip() or not inside.strip():
            return 0.0
        if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
            return 0.0
        position = end + len(tag) + 3
    return float(not text[position:].strip())


def response_tokens(sample: Sample) -> int:
    """Tokens that the model wrote: those with a loss mask."""
    return sum(1 for m in sample.loss_mask if m)


def length(sample: Sample, *, max_tokens: int, min_tokens: int = 0) -> float:
    """1.0 when the response has between ``min_tokens`` and ``max_tokens`` tokens, ends included."""
    return float(min_tokens <= response_tokens(sample) <= max_tokens)


def overlong(sample: Sample, *, max_tokens: int, buffer: int, factor: float = 1.0) -> float:
    """DAPO's soft penalty for length: 0 up to ``max_tokens - buffer``, then falling linearly to ``-factor``.

    ``min(0, (max_tokens - buffer - n) / buffer) * factor`` (DAPO, arXiv:2503.14476, eq. 13), and no lower than
    ``-factor``.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer must be between 1 and max_tokens {max_tokens}, got {buffer}")
    over = (max_tokens - buffer - response_tokens(sample)) / buffer
    return max(-1.0, min(0.0, over)) * factor
