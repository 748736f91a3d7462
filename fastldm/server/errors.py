"""Which answer an exception is: one table for all dialects, and a shape for each."""

from __future__ import annotations

import json
import logging
import math
import re
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastldm import errors
from fastldm.request import Request

logger = logging.getLogger("fastldm.server")


class ApiError(HTTPException):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry: bool = True,
        headers: dict[str, str] | None = None,
    ) -> None:
        """kind: OpenAI's `type`. param: the field that is wrong. retry: whether clients that repeat such requests by
        themselves should."""
        # The openai client repeats 408, 409, 429 and 5xx, unless it is told not to.
        repeated = status in (408, 409, 429) or status >= 500
        own = {"x-should-retry": "true" if retry else "false"} if repeated else {}
        super().__init__(status, message, {**own, **(headers or {})})
        self.message, self.code, self.kind, self.param = message, code, kind, param


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """What OpenAI's API answers to what it does not do."""

    error: _Error


class A1111Error(BaseModel):
    """What AUTOMATIC1111's does."""

    error: str
    detail: str
    body: str
    errors: str


def documented(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The answers of a dialect that are errors, for the OpenAPI document."""
    return {"4XX": {"model": model}, "5XX": {"model": model}}


class _Answer(NamedTuple):
    status: int
    kind: str
    code: str
    retry: bool = True


_TABLE: dict[type[BaseException], _Answer] = {  # the first that fits counts
    errors.InputError: _Answer(400, "invalid_request_error", "invalid_value"),
    errors.QueueFull: _Answer(429, "rate_limit_error", "queue_full"),
    errors.DeadlineExceeded: _Answer(504, "timeout_error", "deadline_exceeded", retry=False),
    errors.OutOfMemory: _Answer(503, "server_error", "out_of_memory", retry=False),
    errors.Cancelled: _Answer(409, "cancelled", "cancelled", retry=False),
    CancelledError: _Answer(409, "cancelled", "cancelled", retry=False),
    errors.WorkerLost: _Answer(503, "server_error", "worker_lost"),
    errors.NonFinite: _Answer(500, "server_error", "non_finite", retry=False),
}
# Whose messages name files of the server, or what went wrong inside: the log has them.
_HIDDEN = _Answer(500, "server_error", "internal_error", retry=False)

_STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


def api_error(error: BaseException, request_id: str) -> ApiError:
    """The answer that an exception is. What is no known error of the request is logged, and says only where."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):  # the framework's own: no such path, no such method, a body that is no form
        code = _STATUS_CODES.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {}))
    answer = next((answer for kind, answer in _TABLE.items() if isinstance(error, kind)), _HIDDEN)
    message = str(error)
    if answer is _HIDDEN:
        logger.error("request %s failed", request_id, exc_info=error)
        message = f"something went wrong in the server: its log has request {request_id}"
    elif isinstance(error, CancelledError):
        message = "the request was cancelled"
    param = _field_of(message) if isinstance(error, errors.InputError) else None
    return ApiError(answer.status, message, answer.code, kind=answer.kind, param=param, retry=answer.retry)


def _field_of(message: str) -> str | None:
    """The field that an InputError is about: its messages begin with it, or say to give it."""
    known = (*Request.__dataclass_fields__, "n", "size", "mask", "control")
    names = re.findall(r"^\w+|(?<=: give it )\w+|(?<=: give )\w+", message)
    return next((name for name in names if name in known), None)


def _invalid(error: RequestValidationError) -> ApiError:
    """Of a body that is not what a dialect takes: the first thing that is wrong, in a sentence."""
    first: dict[str, Any] = dict(error.errors()[0])
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path")]
    if first.get("type") == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "")
        return ApiError(400, f"the body is not JSON{f': {reason}' if reason else ''}", "invalid_json")
    name = ".".join(place)
    message = str(first.get("msg", "it is invalid")).removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message}" if name else f"the body: {message}", "invalid_value", param=name or None)


def retry_after(seconds: float | None) -> dict[str, str]:
    """The header, of whole seconds: from the queue's own times, 1 where nothing was timed, and at most two minutes,
    beyond which the openai client does not wait."""
    return {"retry-after": str(max(1, math.ceil(min(120, seconds or 1))))}


def stopping() -> ApiError:
    """The answer of a server that ends to what it does not do any more."""
    return ApiError(503, "the server is stopping", "draining", kind="server_error", retry=False)


def answer(error: ApiError, path: str, request_id: str) -> Response:
    """The response, in the shape of the dialect that the path is of."""
    if path.startswith("/sdapi/"):
        content: dict[str, Any] = {"error": error.kind, "detail": error.message, "body": "", "errors": error.message}
    else:
        content = {"error": body(error)}
    # As ASCII: a message may show what a client sent, which need not be Unicode.
    headers = {**(error.headers or {}), "x-request-id": request_id}
    return Response(json.dumps(content), error.status_code, headers, media_type="application/json")


def body(error: ApiError) -> dict[str, Any]:
    """As in OpenAI's answers and events."""
    return {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
