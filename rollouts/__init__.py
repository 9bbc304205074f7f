"""Post-training of language models: real data in, a trained and resumable model out, every step readable."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = ("cli", "errors", "inference", "models", "pipeline", "providers", "recipes", "serving", "training")


def __getattr__(name: str) -> Any:
    """Import subpackages on first use, so that ``import rollouts`` stays free of torch."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "Endpoint":
        return importlib.import_module(f"{__name__}.providers").Endpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
