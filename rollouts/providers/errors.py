"""What goes wrong when a model is asked over a network."""

from __future__ import annotations

from rollouts.errors import UserError


class ProviderError(RuntimeError):
    """A model could not be asked: the server failed, hung or vanished, and so did every retry.

    Args:
        status: the last answer's HTTP status; None when there was no answer.
        attempts: requests made, the first included.
    """

    def __init__(self, message: str, status: int | None = None, attempts: int = 1) -> None:
        super().__init__(message)
        self.status, self.attempts = status, attempts


class BadRequestError(ProviderError, UserError):
    """The server refused the request itself (a 4xx): asking again would not help."""
