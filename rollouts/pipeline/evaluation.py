"""How good a model is on held-out problems: exact grading of greedy replies, with 95% Wilson intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rollouts.pipeline.generation import reply_to_problems
from rollouts.pipeline.tasks import FAMILIES, Problem, is_correct

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def grade_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row a problem: family, question, right answer, the model's reply, and whether that is exactly right."""
    replies = reply_to_problems(
        model, tokenizer, problems, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    return [
        {
            "family": p.family,
            "question": p.question,
            "answer": p.answer,
            "reply": reply,
            "correct": is_correct(p, reply),
        }
        for p, reply in zip(problems, replies, strict=True)
    ]


def summarize(graded: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per family, and for "all": correct, number, accuracy, and the low and high end of its 95% interval, as shares."""
    results: dict[str, list[bool]] = {"all": [], **{family: [] for family in FAMILIES}}
    for row in graded:
        results["all"].append(row["correct"])
        results[row["family"]].append(row["correct"])
    return {family: score(sum(marks), len(marks)) for family, marks in results.items() if marks}


def score(correct: int, number: int) -> dict[str, float]:
    """An accuracy with its interval, ready for JSON."""
    low, high = wilson_interval(correct, number)
    return {"correct": correct, "number": number, "accuracy": correct / number, "low": low, "high": high}


def wilson_interval(correct: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion: honest also near 0 and 1 and for small numbers (Wilson 1927)."""
    if number == 0:
        return 0.0, 1.0
    p = correct / number
    center = p + z * z / (2 * number)
    spread = z * (p * (1 - p) / number + z * z / (4 * number * number)) ** 0.5
    scale = 1 + z * z / number
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
