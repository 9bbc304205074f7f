"""What a server allows: whom it answers, and how much one request may ask for."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from rollouts.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Bounds and access rules of one server.

    Args:
        host: the address that the server binds.
        api_key: the bearer token that every request but ``/health`` must carry; needed unless ``host`` is loopback.
        allowed_hosts: names, besides localhost, under which browsers and clients may reach the server.
        max_header_bytes: of a request's head.
        max_body_bytes: of a request.
        max_weights_bytes: of a request that brings weights with it.
        max_queue: samples that may wait for a place in the engine; the next request gets 429.
        max_n: samples of one prompt.
        max_prompts: prompts of one request.
        max_stops: stop strings, and stop ids, of one request.
        max_stop_chars: length of a stop string.
        max_top_log_probs: alternatives reported at each token.
        body_timeout: seconds for a whole request body to arrive.
        send_timeout: seconds for a client to take a piece of its response.
        header_timeout: seconds for a request's head to arrive once its connection stands.
        group_timeout: seconds for a trainer to come to a process group, and for each of its broadcasts.

    Raises:
        UserError: a server that others can reach has no key.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_header_bytes: int = 1 << 16
    max_body_bytes: int = 1 << 20
    max_weights_bytes: int = 1 << 26
    max_queue: int = 1024
    max_n: int = 128
    max_prompts: int = 1024
    max_stops: int = 16
    max_stop_chars: int = 256
    max_top_log_probs: int = 20
    body_timeout: float = 30
    send_timeout: float = 60
    header_timeout: float = 10
    group_timeout: float = 120

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key:
            raise UserError(
                f"a server on {self.host} can be reached from outside; give it --api-key (or ROLLOUTS_API_KEY), "
                "or bind 127.0.0.1"
            )

    def max_bytes(self, path: str) -> int:
        """The longest body of a request to ``path``."""
        return self.max_weights_bytes if path == "/update_weights_from_tensor" else self.max_body_bytes


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def host_is_allowed(host_header: str, settings: Settings) -> bool:
    """Whether a Host header names this server.

    A page that points its own name at this machine (DNS rebinding) shows that name here. An address cannot be
    rebound, so a server that others may reach answers to any; one on loopback answers to loopback alone.
    """
    name, bracket, rest = host_header.lower().partition("]")
    if bracket:
        name, rest = name.removeprefix("["), rest.removeprefix(":")
    else:
        name, _, rest = name.partition(":")
    if rest and not (rest.isascii() and rest.isdecimal()):
        return False
    if is_loopback(name) or name in {allowed.lower() for allowed in settings.allowed_hosts}:
        return True
    return not is_loopback(settings.host) and _address(name) is not None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
