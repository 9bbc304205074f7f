"""One way to ask any model: embedded, SGLang, vLLM, OpenAI or Anthropic. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "endpoint": ("Endpoint", "Provider"),
    "errors": ("BadRequestError", "ProviderError"),
    "messages": ("ChatCompletion", "ChatStop", "Message", "StreamChunk", "Tool", "ToolCall", "Usage"),
    "http": ("close_clients",),
    "embedded": ("forget_engine", "register_engine", "registered"),
    "log_probs": ("LogProbMode",),
    "tokens": ("connect", "sample_tokens", "stream_tokens"),
    "chats": ("chat", "stream_chat"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
