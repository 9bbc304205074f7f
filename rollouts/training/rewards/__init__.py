"""Rewards: what a finished sample is worth. Names are imported when first used: a reward worker needs few of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "answers": ("exact_match", "extract_gsm8k", "gsm8k", "numeric", "regex"),
    "symbolic": ("symbolic_math",),
    "shape": ("answer_format", "length", "overlong"),
    "judge": ("llm_judge",),
    "reward_model": ("RewardModel",),
    "registry": ("REWARDS", "RewardSpec", "load_reward", "load_rewards"),
    "runner": ("RewardFault", "RewardReport", "RewardRunner", "score_samples"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
