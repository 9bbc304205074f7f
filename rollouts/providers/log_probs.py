"""What a server means by a log-prob: three conventions, told apart by asking.

================  ============================================================  ================================
convention        the number is the log-prob under                              who
================  ============================================================  ================================
RAW               the model's own distribution, at temperature 1                OpenAI's API; vLLM by default
SCALED            logits / temperature, no token dropped                        SGLang; the embedded engine
PROCESSED         what was sampled from: tempered, then top-k, top-p, min-p     vLLM ``processed_logprobs``
================  ============================================================  ================================

A trainer computes SCALED ones. At temperature 1 with no token dropped all three agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum

from rollouts.inference.sampling_params import SamplingParams


class LogProbMode(StrEnum):
    RAW = "raw"
    SCALED = "scaled"
    PROCESSED = "processed"


def needs_mode(params: SamplingParams) -> bool:
    """Whether the conventions differ under these parameters."""
    return params.temperature not in (0, 1) or params.truncates or _shifts(params)


def normalize(
    given: Sequence[float], params: SamplingParams, mode: LogProbMode | None
) -> tuple[list[float], list[float]]:
    """(log-probs at the sampling temperature, log-probs at temperature 1), as ``Completion`` has them.

    What a server's numbers do not tell is NaN, which no loss takes for a log-prob: from RAW ones the tempered, from
    tempered ones the raw, and nothing where penalties, biases or dropped tokens have changed the distribution.
    """
    values, unknown = list(given), [math.nan] * len(given)
    if mode is None or not needs_mode(params):
        return values, list(values)
    tempered = params.temperature not in (0, 1)
    if mode is LogProbMode.RAW:
        return (unknown if tempered else list(values)), values
    if _shifts(params) or (mode is LogProbMode.PROCESSED and params.truncates):
        return unknown, list(unknown)
    return values, (unknown if tempered else list(values))


def is_raw(at_one: Mapping[int, float], at_two: Mapping[int, float]) -> bool | None:
    """Whether temperature leaves log-probs alone, from those of some sampled tokens at temperatures 1 and 2.

    None where nothing tells: no token in common, or only such as are certain either way.
    """
    pairs = [(at_one[token], at_two[token]) for token in at_one.keys() & at_two.keys()]
    if any(abs(one - two) > 1e-4 for one, two in pairs):
        return False
    return True if any(one < -1e-4 for one, _ in pairs) else None


def _shifts(params: SamplingParams) -> bool:
    return params.penalizes or bool(params.logit_bias)
