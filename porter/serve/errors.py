"""Errors as OpenAI's API spells them. No path, name or line of the server's own gets into an answer."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from typing_extensions import TypedDict

from porter.runtime.errors import RequestError
from porter.serve.engine_client import EngineDied, EngineUnavailable, QueueFull, RequestRejected

_RETRY_UNAVAILABLE = 5  # seconds; loading a model again takes a few
_BAD_REQUEST = 400


class ErrorDetail(TypedDict):
    """What went wrong; `param` names the field of the request, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error with a status and an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> ErrorBody:
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorBody:
    """An OpenAI error object; its type follows from the status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as an answer; ASCII only, so that a text of the request with half a character can be quoted."""
    content = json.dumps(error_body(status, message, param, code))
    return Response(content, status, headers, media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """What the engine or a check says, as an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineUnavailable):
        return ApiError(503, str(error), code="unavailable", retry_after=_RETRY_UNAVAILABLE)
    if isinstance(error, EngineDied):
        return ApiError(500, str(error), code="engine_failed")
    if isinstance(error, RequestError | RequestRejected):
        return ApiError(_BAD_REQUEST, str(error))
    raise error


# The engine's errors that become answers; any other is a bug, and answered without its text
ANSWERED = (ApiError, QueueFull, EngineUnavailable, EngineDied, RequestError, RequestRejected)


async def on_answered(_: Request, error: Exception) -> Response:
    """Answer one of `ANSWERED`."""
    known = as_api_error(error)
    return error_response(known.status_code, known.detail, known.param, known.code, known.headers)


async def on_http_error(_: Request, error: Exception) -> Response:
    """Answer what the web framework found: an unknown path, a wrong method, a body that is no JSON."""
    assert isinstance(error, StarletteHTTPException)
    return error_response(error.status_code, str(error.detail), headers=error.headers)


async def on_invalid(_: Request, error: Exception) -> Response:
    """Answer a body that does not fit the schema with its first flaw."""
    assert isinstance(error, RequestValidationError)
    flaw = error.errors()[0]
    param = ".".join(str(part) for part in _field(flaw)) or None
    message = str(flaw["msg"]).removeprefix("Value error, ")
    return error_response(_BAD_REQUEST, f"{param}: {message}" if param else message, param)


async def on_bug(_: Request, __: Exception) -> Response:
    """Answer a bug; the server's log has its traceback."""
    return error_response(500, "internal error")


def _field(flaw: Mapping[str, Any]) -> list[Any]:
    """Where in the body the flaw is, without the names of the alternatives that were tried."""
    return [part for part in flaw["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
