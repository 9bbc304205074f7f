"""The errors that clients see: a status, and OpenAI's error object, which names the field at fault."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class RequestError(Exception):
    """A request that cannot be answered as asked.

    Args:
        message: what is wrong and what to do, for a person.
        param: the request's field at fault, dotted: ``messages.0.role``.
        status: of the response; 400 unless there is a closer one.
        code: a word for programs, for example ``model_not_found``.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def error_body(error: RequestError) -> dict[str, Any]:
    kind = TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {"retry-after": "1"}
    return JSONResponse(error_body(error), error.status, headers if error.status in (401, 429) else None)
