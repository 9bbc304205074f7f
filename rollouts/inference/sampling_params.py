"""What a request asks of the engine: how to choose each token, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollouts.errors import UserError

_CONSTRAINTS = ("json_schema", "regex", "grammar")
_COLDEST, _LARGEST = 1e-3, 1e9  # logits changed by no more than this stay what they are meant to be in float32


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. The default samples from the model's own distribution.

    The order of operations is transformers': penalties and ``logit_bias`` change the logits, a grammar drops tokens,
    then comes ``temperature``, then ``top_k``, ``top_p`` and ``min_p`` each drop tokens from what the one before left.

    At most one of ``json_schema``, ``regex`` and ``grammar`` binds the text of the sample: only tokens that keep to it
    can be sampled, and end ids and ``stop_token_ids`` only where the text is complete (or nothing else is possible).
    The engine needs a tokenizer for it and refuses a bad one with a ``UserError``. Log-probs stay those of the full
    distribution.

    Args:
        max_tokens: tokens to sample at most, the stop token included.
        temperature: 0 takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum.
        min_p: drop tokens less likely than this fraction of the likeliest one.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; 1 = none.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once for each time a token is in the output.
        logit_bias: added to the logits of these token ids.
        seed: the same seed gives the same text; None draws one from the engine's own seed. A tuple of ``n`` seeds names
            one for each sample, which is then what a request of its own with that seed would give.
        stop_token_ids: ids that end the sample, as the model's own end ids do.
        stop: strings that end the sample as soon as its text holds one; needs an engine with a tokenizer.
        ignore_eos: go on past the model's own end ids (``stop_token_ids`` and ``stop`` still end the sample); a sample
            bound by a grammar goes on as long as its grammar lets it.
        n: samples of the same prompt; sample i of a seeded request has a stream of random numbers of its own.
        top_log_probs: also report the k likeliest tokens at each position, with raw log-probs.
        prompt_log_probs: also report the prompt's own raw log-probs, and its likeliest tokens if ``top_log_probs`` is
            set; the prompt is then computed even where the cache knows it.
        json_schema: the text is JSON that satisfies this schema, a dict, a bool or the schema as JSON text. Schemas
            may use what llguidance implements; ``{"type": "object"}`` is any JSON object.
        regex: the whole text matches this regular expression (Rust's syntax, without look-around).
        grammar: the text follows this Lark grammar, from its rule ``start``.

    Raises:
        UserError: a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | tuple[int, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    top_log_probs: int = 0
    prompt_log_probs: bool = False
    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if isinstance(self.seed, list):
            object.__setattr__(self, "seed", tuple(self.seed))
        seeds = self.seed if isinstance(self.seed, tuple) else () if self.seed is None else (self.seed,)
        rules = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or _COLDEST <= self.temperature < math.inf,
                f"0 or at least {_COLDEST}",
            ),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and up to 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (1e-6 <= self.repetition_penalty <= 1e6, "between 1e-6 and 1e6"),
            "presence_penalty": (abs(self.presence_penalty) <= _LARGEST, f"up to {_LARGEST:g} either way"),
            "frequency_penalty": (abs(self.frequency_penalty) <= _LARGEST, f"up to {_LARGEST:g} either way"),
            "logit_bias": (all(abs(b) <= _LARGEST for b in self.logit_bias.values()), f"up to {_LARGEST:g} either way"),
            "seed": (all(0 <= seed < 2**64 for seed in seeds), "between 0 and 2**64 - 1"),
            "stop": (all(self.stop), "strings that are not empty"),
            "n": (self.n >= 1, "at least 1"),
            "top_log_probs": (self.top_log_probs >= 0, "0 or more"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise UserError(f"sampling parameter {name} is out of range: {getattr(self, name)!r}; give {rule}")
        if isinstance(self.seed, tuple) and len(self.seed) != self.n:
            raise UserError(f"sampling parameter seed names {len(self.seed)} seeds for n = {self.n} samples")
        if sum(getattr(self, name) is not None for name in _CONSTRAINTS) > 1:
            raise UserError(f"sampling parameters {', '.join(_CONSTRAINTS)} exclude each other; give one")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be sampled, so that log-probs and sampling frequencies differ."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.constrained is not None

    @property
    def constrained(self) -> str | None:
        """Which parameter binds the text of the sample, if one does."""
        return next((name for name in _CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
