"""Where a model is asked, and how: one frozen value that goes into recipes and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from rollouts.errors import UserError

Provider = Literal["embedded", "sglang", "vllm", "openai", "anthropic"]

_API_BASES = {
    "sglang": "http://localhost:30000",
    "vllm": "http://localhost:8000",
    "openai": "https://api.openai.com",
    "anthropic": "https://api.anthropic.com",
}
_KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


class _Unset(int):
    """A number that nobody has chosen."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind one of five interfaces.

    Args:
        provider: ``embedded`` (an engine in this process, see ``register_engine``), ``sglang``, ``vllm``, ``openai``
            (anything that speaks OpenAI's API, `rollouts serve` too) or ``anthropic``.
        model: the name that the server knows it by; of an embedded one the name it was registered under.
        api_base: the server's address, with or without ``/v1``; None = the provider's usual one.
        api_key: None = the variable OPENAI_API_KEY or ANTHROPIC_API_KEY, where there is one. Never shown, and left out
            of ``to_dict`` unless asked for.
        max_tokens: of one answer. Where nobody sets it, servers that speak OpenAI's chat API are not told any, and
            tokens are sampled up to 8,192 or as many as the server has room for.
        temperature: of sampling.
        tool_choice: ``auto``, ``none``, ``required`` or a tool's name; None leaves it to the server.
        parallel_tool_calls: whether one answer may hold several calls; None leaves it to the server.
        reasoning_effort: ``low``, ``medium`` or ``high``, for models of OpenAI's that reason.
        max_completion_tokens: takes the place of ``max_tokens`` where a server knows only this name.
        thinking: Anthropic's ``{"type": "enabled", "budget_tokens": N}``.
        extra_params: further fields of the request body, as they are.
        timeout: seconds for a whole answer, or for the next piece of a streamed one.
        connect_timeout: seconds for the connection to stand.
        max_retries: further attempts after a time-out, a broken connection, or a status of 408, 429 or 5xx.

    Raises:
        UserError: the provider is unknown or a number is out of range.
    """

    provider: Provider
    model: str
    api_base: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_tokens: int = _Unset(8192)
    temperature: float = 1.0
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    thinking: Mapping[str, Any] | None = None
    extra_params: Mapping[str, Any] | None = None
    timeout: float = 600.0
    connect_timeout: float = 10.0
    max_retries: int = 4

    def __post_init__(self) -> None:
        if self.provider not in get_args(Provider):
            raise UserError(f"provider {self.provider!r} is unknown; use one of {', '.join(get_args(Provider))}")
        for name in ("max_tokens", "timeout", "connect_timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"endpoint.{name} is {getattr(self, name)}; it must be greater than 0")
        if self.temperature < 0 or self.max_retries < 0:
            raise UserError("endpoint.temperature and endpoint.max_retries must be 0 or more")

    def __hash__(self) -> int:
        return hash((self.provider, self.model, self.api_base))

    @property
    def sets_max_tokens(self) -> bool:
        """Whether somebody has chosen ``max_tokens``: it is then sent as it is."""
        return not isinstance(self.max_tokens, _Unset)

    @property
    def url(self) -> str:
        """The server's address without a trailing ``/v1``."""
        base = self.api_base or _API_BASES.get(self.provider, "")
        return base.rstrip("/").removesuffix("/v1")

    @property
    def key(self) -> str | None:
        """The key that is sent; not part of what is shown."""
        variable = _KEY_VARIABLES.get(self.provider)
        return self.api_key or (os.environ.get(variable) if variable else None)

    def to_dict(self, with_api_key: bool = False) -> dict[str, Any]:
        """A JSON-ready dictionary of what differs from the defaults; without the key, so that it can be saved."""
        given = asdict(self)
        kept = {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}
        if self.sets_max_tokens:
            kept["max_tokens"] = self.max_tokens
        if not with_api_key:
            kept.pop("api_key", None)
        return kept

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Endpoint:
        """Inverse of ``to_dict``. Raises UserError when a field is unknown."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(
                f"endpoint.{unknown[0]} is not a field of an endpoint; use one of "
                + ", ".join(f.name for f in fields(cls))
            )
        return cls(**values)

    def to_json(self, with_api_key: bool = False) -> str:
        return json.dumps(self.to_dict(with_api_key))

    @classmethod
    def from_json(cls, text: str) -> Endpoint:
        return cls.from_dict(json.loads(text))
