"""Rewards by name, and several of them with weights.

A reward function takes a finished ``Sample`` and gives a float, or a dict of named floats; it may be async, and takes
its options as keyword arguments. ``reward: gsm8k`` in a recipe, ``RewardSpec("gsm8k", options={"method": "flexible"})``
and ``functools.partial(gsm8k, method="flexible")`` are three ways to say the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rollouts.errors import UserError
from rollouts.training.functions import load_function, nearest
from rollouts.training.rewards import answers, judge, reward_model, shape, symbolic
from rollouts.training.rewards.worker import unwrapped
from rollouts.training.types import Sample

Reward = float | dict[str, float]
RewardFn = Callable[[Sample], Reward | Awaitable[Reward]]

REWARDS: dict[str, Callable[..., Any]] = {
    "exact_match": answers.exact_match,
    "numeric": answers.numeric,
    "math": symbolic.symbolic_math,
    "gsm8k": answers.gsm8k,
    "regex": answers.regex,
    "correct": answers.correct,
    "format": shape.answer_format,
    "length": shape.length,
    "overlong": shape.overlong,
    "judge": judge.llm_judge,
    "reward_model": reward_model.reward_model,
}
# Linear in the response's length and our own: nothing in them can hang, so they need no process around them. A user's
# pattern can (regex), and so can algebra (math).
CHEAP = frozenset(REWARDS.values()) - {symbolic.symbolic_math, answers.regex, reward_model.reward_model}


@dataclass(frozen=True)
class RewardSpec:
    """One reward of possibly several.

    Args:
        function: a callable, a name of ``REWARDS``, ``pkg.module:function`` or ``file.py:function``.
        weight: its share of the weighted sum.
        name: its key in ``sample.rewards``; by default the function's name.
        options: keyword arguments of the function.
    """

    function: str | Callable[..., Any]
    weight: float = 1.0
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NamedReward:
    """A reward ready to be called with a sample."""

    name: str
    function: RewardFn
    weight: float = 1.0


RewardLike = str | RewardFn | RewardSpec | NamedReward | Mapping[str, Any]


def load_reward(spec: RewardLike) -> NamedReward:
    """The reward that ``spec`` names: a function, a name or path, a ``RewardSpec``, or a mapping of its fields.

    Raises:
        UserError: no such function, an option that it does not take, or a field that ``RewardSpec`` does not have.
    """
    if isinstance(spec, NamedReward):
        return spec
    if isinstance(spec, Mapping):
        unknown = sorted(set(spec) - {f.name for f in fields(RewardSpec)})
        if unknown or "function" not in spec:
            problem = f"unknown key {unknown[0]!r}" if unknown else "no function"
            raise UserError(f"reward {dict(spec)!r}: {problem}; keys are function, weight, name and options")
        spec = RewardSpec(**spec)
    if not isinstance(spec, RewardSpec):
        spec = RewardSpec(spec)
    if isinstance(spec.weight, bool) or not isinstance(spec.weight, int | float) or not abs(spec.weight) < float("inf"):
        raise UserError(f"reward {spec.function}: weight must be a number, got {spec.weight!r}")
    function = load_function(spec.function, REWARDS, "reward")
    name = spec.name or (spec.function if isinstance(spec.function, str) and spec.function in REWARDS else "")
    name = name or getattr(unwrapped(function), "__name__", type(function).__name__)
    _check_options(name, function, spec.options)
    return NamedReward(name, functools.partial(function, **spec.options) if spec.options else function, spec.weight)


def load_rewards(specs: RewardLike | Sequence[RewardLike]) -> list[NamedReward]:
    """One reward or several, each with its own name.

    Raises:
        UserError: as ``load_reward``; none at all; or two of one name.
    """
    several = isinstance(specs, Sequence) and not isinstance(specs, str)
    rewards = [load_reward(s) for s in specs] if several else [load_reward(specs)]  # type: ignore[arg-type, union-attr]
    names = [r.name for r in rewards]
    if not rewards:
        raise UserError("no reward given: name at least one")
    if twice := {n for n in names if names.count(n) > 1}:
        raise UserError(f"two rewards are called {sorted(twice)[0]!r}: give one of them another name")
    return rewards


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature
        return
    takes = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes = takes[1:] if parameters and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY else takes
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in takes and not anything:
            known = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise UserError(f"reward {name}: no option {option!r}{nearest(option, takes)}; {known}")
    for p in parameters[1:]:
        if p.default is p.empty and p.kind is p.KEYWORD_ONLY and p.name not in options:
            raise UserError(f"reward {name}: option {p.name!r} is needed")
