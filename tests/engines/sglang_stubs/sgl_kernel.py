"""Stands in for SGLang's compiled kernels, which have no build for CPUs without AMX: names import, calls fail.

Nothing is called when SGLang runs on torch's own attention and sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.0.0"
__path__: list[str] = []


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} was called, but there are no kernels here")

    return missing
