"""Engines of this process under names, so that an ``Endpoint`` can be saved and still find them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollouts.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollouts.inference import EmbeddedEngine


@dataclass(frozen=True)
class Registered:
    """An engine and the tokenizer that chat needs."""

    engine: EmbeddedEngine
    tokenizer: PreTrainedTokenizerBase | None


_registered: dict[str, Registered] = {}


def register_engine(name: str, engine: EmbeddedEngine, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Let ``Endpoint(provider="embedded", model=name)`` mean this engine from now on."""
    _registered[name] = Registered(engine, tokenizer)


def forget_engine(name: str) -> None:
    _registered.pop(name, None)


@contextmanager
def registered(
    name: str, engine: EmbeddedEngine, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[EmbeddedEngine]:
    """``register_engine`` for as long as the context lasts."""
    register_engine(name, engine, tokenizer)
    try:
        yield engine
    finally:
        forget_engine(name)


def find_engine(name: str) -> Registered:
    """Raises UserError when there is none."""
    if name not in _registered:
        known = ", ".join(sorted(_registered)) or "none is"
        raise UserError(f"no embedded engine is registered as {name!r} ({known}); call register_engine first")
    return _registered[name]
