"""What lies around all dialects: request ids, the access log, keys, and limits of a body's size and time."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import re
from typing import Any

import pytest
from asgi import Answer, call, scope
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from fastldm.errors import InputError, QueueFull
from fastldm.server.middleware import Keyed, Limited, Observed
from fastldm.server.settings import Settings

KEYS = ("sesame-open-1", "sesame-open-2")
LIMITS = Settings(max_body=0.01, body_timeout=0.1)  # 10,485 bytes


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(f"{scope['owner']} {len(body)}")(scope, receive, send)


def observed(inner: Any, log: str = "off", counted: list[Any] | None = None) -> Observed:
    seen: list[Any] = [] if counted is None else counted
    return Observed(inner, log, lambda *values: seen.append(values))


def ask(app: Any, *arguments: Any, **options: Any) -> Answer:
    return asyncio.run(call(app, *arguments, **options))


def raising(error: BaseException, after_start: bool = False) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if after_start:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    return app


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fastldm.server.access"]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("fastldm.server"), "propagate", True)
    caplog.set_level(logging.INFO, "fastldm.server")
    return caplog


# --- observed


def test_every_answer_has_its_own_request_id() -> None:
    ids = {ask(observed(echo), scope()).headers["x-request-id"] for _ in range(10)}
    assert len(ids) == 10
    assert all(re.fullmatch(r"[0-9a-f]{16}", one) for one in ids)


def test_clients_do_not_choose_request_ids() -> None:
    answer = ask(observed(echo), scope(headers={"x-request-id": "mine"}))
    assert answer.headers["x-request-id"] != "mine"


def test_unhandled_errors_are_answered_without_their_text(log: pytest.LogCaptureFixture) -> None:
    answer = ask(observed(raising(RuntimeError("/secret/path"))), scope())
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert answer.headers["x-request-id"] in answer.json["error"]["message"]
    assert "/secret/path" in log.text  # where the operator finds it


@pytest.mark.parametrize(("error", "status"), [(InputError("n is 0"), 400), (QueueFull("full"), 429)])
def test_known_errors_are_answered_by_the_table(error: Exception, status: int) -> None:
    assert ask(observed(raising(error)), scope()).status == status


def test_requests_cut_off_at_the_end_are_503() -> None:
    counted: list[Any] = []
    answer = ask(observed(raising(asyncio.CancelledError()), counted=counted), scope())
    assert (answer.status, answer.json["error"]["code"]) == (503, "draining")
    assert answer.headers["x-should-retry"] == "false"
    assert counted[0][2] == 503


def test_clients_that_go_are_counted_as_499(log: pytest.LogCaptureFixture) -> None:
    counted: list[Any] = []
    answer = ask(observed(echo, "plain", counted), scope(method="POST"), [b"half"], stay=False)
    assert answer.messages == []
    assert counted[0][:3] == ("other", "POST", 499)
    assert " 499 " in lines(log)[0]
    assert "Traceback" not in log.text


def test_errors_after_the_start_are_logged_only(log: pytest.LogCaptureFixture) -> None:
    answer = ask(observed(raising(ValueError("late"), after_start=True)), scope())
    assert [message["type"] for message in answer.messages] == ["http.response.start"]
    assert "late" in log.text


# --- the access log


def test_plain_lines_hold_what_an_operator_asks_for(log: pytest.LogCaptureFixture) -> None:
    answer = ask(observed(echo, "plain"), scope("/v1/x"))
    pattern = rf"127\.0\.0\.1 - GET /v1/x 200 2 [\d.]+ {answer.headers['x-request-id']}"
    assert re.fullmatch(pattern, lines(log)[0])


def test_json_lines_are_json(log: pytest.LogCaptureFixture) -> None:
    answer = ask(observed(Keyed(echo, KEYS), "json"), scope(headers={"authorization": f"Bearer {KEYS[0]}"}))
    record = json.loads(lines(log)[0])
    assert record["key"].startswith("key-")
    assert (record["status"], record["id"]) == (200, answer.headers["x-request-id"])
    assert set(record) == {"time", "client", "key", "method", "path", "status", "bytes", "ms", "id"}


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_no_query_body_or_key_is_logged(kind: str, log: pytest.LogCaptureFixture) -> None:
    log.set_level(logging.DEBUG)
    for key in (KEYS[0], "wrong-secret-key"):
        asked = scope("/a", "POST", {"authorization": f"Bearer {key}"}, query_string=b"token=secret-query")
        ask(observed(Keyed(echo, KEYS), kind), asked, [b"secret-body"])
    assert len(lines(log)) == 2
    for secret in (*KEYS, "wrong-secret-key", "secret-query", "secret-body"):
        assert secret not in log.text


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_a_log_line_cannot_be_forged(kind: str, log: pytest.LogCaptureFixture) -> None:
    asked = scope(method="GET\n1.2.3.4", client=("evil\n1.2.3.4 key-x GET /forged 200", 1))
    asked["raw_path"] = b"/\n1.2.3.4 - GET /forged 200 1 1 id\x1b[31m\xff" + b"x" * 9999
    ask(observed(echo, kind), asked)
    (line,) = lines(log)
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 1000
    if kind == "plain":
        assert len(line.split(" ")) == 8


def test_off_logs_nothing(log: pytest.LogCaptureFixture) -> None:
    ask(observed(echo), scope())
    assert lines(log) == []


# --- keys


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


GOOD = [f"Bearer {KEYS[0]}", f"bearer  {KEYS[1]}", basic(KEYS[0]), basic(f":{KEYS[1]}")]
BAD = ["", "Bearer", "Bearer ", f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}", KEYS[0], f"Digest {KEYS[0]}", "Basic"]
BAD += ["Basic ?", basic("name:wrong"), basic(f"{KEYS[0]}:"), "Basic /w==", "Bearer \xff\xfe", basic("")]


@pytest.mark.parametrize("header", GOOD)
def test_each_key_is_taken_as_bearer_and_basic(header: str) -> None:
    assert ask(observed(Keyed(echo, KEYS)), scope(headers={"authorization": header})).status == 200


def test_basic_takes_the_key_as_name_and_password() -> None:
    keyed = observed(Keyed(echo, ("user:password",)))
    assert ask(keyed, scope(headers={"authorization": basic("user:password")})).status == 200
    assert ask(keyed, scope(headers={"authorization": basic("other:password")})).status == 401


@pytest.mark.parametrize("header", BAD)
@pytest.mark.parametrize("path", ["/v1/models", "/sdapi/v1/samplers", "/metrics", "/openapi.json", "/nothing"])
def test_everything_else_is_401(header: str, path: str) -> None:
    answer = ask(observed(Keyed(echo, KEYS)), scope(path, headers={"authorization": header} if header else {}))
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Basic" if path.startswith("/sdapi/") else "Bearer")


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(path: str) -> None:
    assert ask(observed(Keyed(echo, KEYS)), scope(path)).status == 200


def test_without_keys_all_is_open() -> None:
    assert ask(observed(Keyed(echo, ())), scope("/v1/models")).body == b" 0"


def test_owners_differ_by_key_and_are_no_keys() -> None:
    keyed = observed(Keyed(echo, KEYS))
    owners = {ask(keyed, scope(headers={"authorization": f"Bearer {key}"})).body for key in (*KEYS, *KEYS)}
    assert len(owners) == 2
    assert not any(key.encode() in owner for key in KEYS for owner in owners)


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    original = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        assert len(a) == len(b)  # else the comparison ends early
        return original(a, b)

    monkeypatch.setattr("fastldm.server.middleware.hmac.compare_digest", compare)
    for key in (KEYS[0], "x"):
        ask(observed(Keyed(echo, KEYS)), scope(headers={"authorization": f"Bearer {key}"}))
    assert len(compared) == 2 * len(KEYS)  # the first that fits does not end it


# --- limits


def limited(inner: Any = echo) -> Any:
    return observed(Limited(inner, LIMITS))


def test_bodies_within_the_limit_pass_whole() -> None:
    assert ask(limited(), scope(method="POST"), [b"x" * 5000, b"x" * 5000]).body == b" 10000"


def test_a_length_beyond_the_limit_is_413_unread() -> None:
    asked = scope("/v1/images/generations", "POST", {"content-length": "100000000"})
    answer = ask(limited(raising(AssertionError("it was asked"))), asked)
    assert (answer.status, answer.json["error"]["code"]) == (413, "too_large")
    assert "connection" not in answer.headers  # it stays open while the client sends the rest


@pytest.mark.parametrize("length", ["9" * 5000, "10486"])
def test_lengths_of_any_size_are_numbers(length: str) -> None:
    assert ask(limited(), scope(headers={"content-length": length})).status == 413


def test_chunks_beyond_the_limit_are_413() -> None:
    read = 0

    async def chunks(scope: Any, receive: Any, send: Any) -> None:
        nonlocal read
        async for chunk in Request(scope, receive).stream():
            read += len(chunk)

    answer = ask(limited(chunks), scope(method="POST"), [b"x" * 1000] * 1000)
    assert answer.status == 413
    assert read <= 10_485


def test_a_length_that_lies_is_counted() -> None:
    answer = ask(limited(), scope(method="POST", headers={"content-length": "1"}), [b"x" * 20_000])
    assert answer.status == 413


def test_the_limit_has_each_dialects_shape() -> None:
    answer = ask(limited(), scope("/sdapi/v1/txt2img", "POST", {"content-length": "99999"}))
    assert "has more than 10485 bytes" in answer.json["detail"]


def test_a_body_that_does_not_come_is_408() -> None:
    async def run() -> Answer:
        answer = Answer()

        async def receive() -> Any:  # a byte now and then never ends
            await asyncio.sleep(0.03)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            answer.messages.append(message)

        await asyncio.wait_for(limited()(scope(method="POST"), receive, send), 5)
        return answer

    answer = asyncio.run(run())
    assert (answer.status, answer.json["error"]["code"]) == (408, "body_timeout")
    assert (answer.headers["connection"], answer.headers["x-should-retry"]) == ("close", "false")


def test_waiting_for_a_client_to_go_is_unlimited() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Request(scope, receive).body()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(receive(), 3 * LIMITS.body_timeout)
        await PlainTextResponse("ok")(scope, receive, send)

    assert ask(limited(app), scope(method="POST"), [b"x"]).body == b"ok"
