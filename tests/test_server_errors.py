"""The error table, row by row, in the shape of each dialect; and which answers clients repeat by themselves."""

from __future__ import annotations

import json
import logging
from concurrent.futures import CancelledError
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from fastldm import errors
from fastldm.server.errors import ApiError, answer, api_error, body, retry_after, stopping

ROWS: list[tuple[BaseException, int, str, str, bool | None]] = [
    (errors.InputError("n is 0"), 400, "invalid_request_error", "invalid_value", None),
    (errors.QueueFull("full"), 429, "rate_limit_error", "queue_full", True),
    (errors.DeadlineExceeded("late"), 504, "timeout_error", "deadline_exceeded", False),
    (errors.OutOfMemory("no room"), 503, "server_error", "out_of_memory", False),
    (errors.Cancelled("cancelled after 2 steps"), 409, "cancelled", "cancelled", False),
    (CancelledError(), 409, "cancelled", "cancelled", False),
    (errors.WorkerLost("lost"), 503, "server_error", "worker_lost", True),
    (errors.NonFinite("NaN"), 500, "server_error", "non_finite", False),
    (errors.CheckpointError("/secret/file"), 500, "server_error", "internal_error", False),
    (ValueError("/secret/file"), 500, "server_error", "internal_error", False),
    (MemoryError("/secret/file"), 500, "server_error", "internal_error", False),
    (HTTPException(404), 404, "invalid_request_error", "not_found", None),
    (HTTPException(405), 405, "invalid_request_error", "method_not_allowed", None),
    (HTTPException(415), 415, "invalid_request_error", "unsupported_media_type", None),
    (stopping(), 503, "server_error", "draining", False),
]


def ids(row: Any) -> str | None:
    return type(row).__name__ if isinstance(row, BaseException) else None


def content(error: BaseException, path: str) -> tuple[Any, Any]:
    response = answer(api_error(error, "id-1"), path, "id-1")
    return json.loads(bytes(response.body)), response


@pytest.mark.parametrize(("error", "status", "kind", "code", "retry"), ROWS, ids=ids)
def test_rows_in_the_shape_of_openai(error: Any, status: int, kind: str, code: str, retry: bool | None) -> None:
    given, response = content(error, "/v1/images/generations")
    assert response.status_code == status
    assert response.headers["x-request-id"] == "id-1"
    assert set(given) == {"error"}
    assert set(given["error"]) == {"message", "type", "param", "code"}
    assert (given["error"]["type"], given["error"]["code"]) == (kind, code)
    assert isinstance(given["error"]["message"], str)
    assert given["error"]["message"]


@pytest.mark.parametrize(("error", "status", "kind", "code", "retry"), ROWS, ids=ids)
def test_rows_in_the_shape_of_a1111(error: Any, status: int, kind: str, code: str, retry: bool | None) -> None:
    given, response = content(error, "/sdapi/v1/txt2img")
    assert response.status_code == status
    assert (given["error"], given["body"]) == (kind, "")
    assert given["detail"] == given["errors"] != ""


@pytest.mark.parametrize(("error", "status", "kind", "code", "retry"), ROWS, ids=ids)
def test_clients_are_told_whether_to_retry(error: Any, status: int, kind: str, code: str, retry: bool | None) -> None:
    headers = answer(api_error(error, ""), "/v1/", "").headers
    assert headers.get("x-should-retry") == (None if retry is None else str(retry).lower())


@pytest.mark.parametrize(("error", "status", "kind", "code", "retry"), ROWS, ids=ids)
def test_what_went_wrong_inside_is_only_logged(
    error: Any, status: int, kind: str, code: str, retry: bool | None, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging.getLogger("fastldm.server"), "propagate", True)
    message = api_error(error, "id-1").message
    hidden = code == "internal_error"
    assert "secret" not in message
    assert ("id-1" in message) == hidden
    assert ("/secret/file" in caplog.text) == hidden


def test_every_error_of_the_package_has_an_answer() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 8
    for kind in kinds:
        status = api_error(kind("x"), "").status_code
        assert 400 <= status < 600
        assert status != 500 or not issubclass(kind, errors.InputError)


def test_derived_errors_are_answered_as_their_base() -> None:
    class Special(errors.QueueFull):
        pass

    assert api_error(Special("x"), "").code == "queue_full"


@pytest.mark.parametrize(
    ("message", "param"),
    [("guidance_scale is x: expected", "guidance_scale"), ("this is so", None), ("", None), ("seed", "seed")],
)
def test_param_is_the_field_a_message_begins_with(message: str, param: str | None) -> None:
    assert body(api_error(errors.InputError(message), ""))["param"] == param


@pytest.mark.parametrize("text", ["\ud800", "\x00", "é\U0001f600", "a\nb"])
@pytest.mark.parametrize("path", ["/v1/x", "/sdapi/v1/x"])
def test_messages_may_hold_anything(text: str, path: str) -> None:
    given, _ = content(errors.InputError(text), path)
    assert text in _texts(given)


def _texts(value: Any) -> str:
    return "".join(map(_texts, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(
    ("seconds", "header"),
    [(None, "1"), (0.0, "1"), (0.2, "1"), (1.2, "2"), (119.5, "120"), (9999.0, "120"), (float("inf"), "120")],
)
def test_retry_after_is_whole_seconds_that_clients_wait(seconds: float | None, header: str) -> None:
    assert retry_after(seconds) == {"retry-after": header}


def test_own_headers_go_beside_retry() -> None:
    error = ApiError(429, "later", "queue_full", headers=retry_after(3))
    assert answer(error, "/v1/", "").headers["retry-after"] == "3"
    assert answer(error, "/v1/", "").headers["x-should-retry"] == "true"


class Fields(BaseModel):
    n: int
    deep: dict[str, list[int]] = {}


def invalid(value: Any) -> ApiError:
    try:
        Fields.model_validate(value)
    except ValidationError as error:
        return api_error(RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]), "")
    raise AssertionError("it is valid")


def test_invalid_fields_are_named_and_400() -> None:
    error = invalid({"n": "x"})
    assert (error.status_code, error.code, error.param) == (400, "invalid_value", "n")
    assert error.message.startswith("n: ")
    assert invalid({"n": 1, "deep": {"a": [1, "x"]}}).param == "deep.a.1"
    assert invalid({}).message == "n: Field required"
    assert "\n" not in invalid([]).message
