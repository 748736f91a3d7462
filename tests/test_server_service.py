"""What all dialects share: who is admitted, who is cancelled, what is answered when something goes wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import clients
import pytest
from asgi import Answer, scope
from servers import BODY, service_of, threads, wait_until
from sessions import tiny_pipeline
from starlette.testclient import TestClient

from fastldm import Pipeline
from fastldm.errors import WorkerLost
from fastldm.server import service as module
from fastldm.server.service import Service

KEYS = ("first-key-1", "second-key-2")
FIRST, SECOND = ({"authorization": f"Bearer {key}"} for key in KEYS)
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def http(pipe: Pipeline) -> Iterator[TestClient]:
    limits: dict[str, Any] = {"max_queue": 4, "max_per_key": 3, "max_batch": 1, "max_steps": 20, "max_pixels": 4096}
    with clients.client(pipe, api_keys=KEYS, max_prompt=100, max_n=2, **limits) as http:
        wait_until(lambda: http.get("/ready").status_code == 200)
        yield http


@pytest.fixture
def service(http: TestClient) -> Iterator[Service]:
    service = service_of(http)
    yield service
    wait_until(lambda: not service.open, 10)
    assert sum(service._arriving.values()) == 0


@pytest.fixture
def held(service: Service, gate: threading.Event) -> Iterator[threading.Event]:
    """No step is taken until it is set."""
    yield gate
    gate.set()
    wait_until(lambda: not service.open)


def ask(http: TestClient, headers: dict[str, str] = FIRST, **fields: Any) -> Any:
    return http.post(PATH, json={**BODY, **fields}, headers=headers)


def stats(service: Service) -> Any:
    session = service.models.default.session
    assert session is not None
    return session.stats()


# --- who is admitted


def test_a_key_has_so_many_requests_open(http: TestClient, service: Service, held: threading.Event) -> None:
    with threads(held) as pool:
        open_ = [pool.submit(ask, http) for _ in range(3)]
        wait_until(lambda: len(service.open) == 3)
        refused = ask(http)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        front = http.post("/sdapi/v1/txt2img", json={"steps": 1}, headers=FIRST)
        assert front.status_code == 429  # whatever it speaks
        other = pool.submit(ask, http, SECOND)
        wait_until(lambda: len(service.open) == 4)
        held.set()
        assert [one.result().status_code for one in (*open_, other)] == [200] * 4


def test_the_queue_is_the_servers(http: TestClient, service: Service, held: threading.Event) -> None:
    with threads(held) as pool:
        open_ = [pool.submit(ask, http, FIRST)]
        wait_until(lambda: stats(service).running == 1)
        open_ += [pool.submit(ask, http, headers) for headers in (FIRST, SECOND, SECOND)]
        wait_until(lambda: stats(service).waiting == 3)
        open_.append(pool.submit(ask, http, FIRST))
        wait_until(lambda: stats(service).waiting == 4)
        refused = ask(http, SECOND)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["x-should-retry"] == "true"
        held.set()
        assert [one.result().status_code for one in open_] == [200] * 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x" * 101}, "prompt has 101 characters: expected at most 100"),
        ({"negative_prompt": "x" * 101}, "negative_prompt has 101 characters"),
        ({"num_inference_steps": 21}, "num_inference_steps is 21: expected at most 20"),
        ({"num_inference_steps": None}, "num_inference_steps is 30, the model's own number: expected at most 20"),
        ({"n": 3}, "n is 3: expected at most 2"),
        ({"size": "72x64"}, "width times height is 4608: expected at most 4096 pixels"),
        ({"size": "8x8000"}, "width times height is 64000"),
        ({"sampler": "none such"}, "unknown sampler"),
        ({"adapters": {"none such": 1}}, "none such"),
    ],
)
def test_limits_are_400(http: TestClient, service: Service, fields: Any, message: str) -> None:
    answer = ask(http, **fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert message in answer.json()["error"]["message"]


def test_nothing_begins_while_it_drains(http: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "draining", True)
    job = http.post("/v1/jobs", json=BODY, headers=FIRST)
    front = http.post("/sdapi/v1/txt2img", json={"steps": 1}, headers=FIRST)
    for answer in (ask(http), ask(http, stream=True), job, front):
        assert answer.status_code == 503
        assert answer.headers["x-should-retry"] == "false"
    assert http.get("/ready").status_code == 503
    assert http.get("/health").status_code == 200


# --- who is cancelled


def from_client_that_goes(http: TestClient, headers: dict[str, str], **fields: Any) -> Answer:
    content = json.dumps({**BODY, **fields}).encode()
    asked = scope(PATH, "POST", {**FIRST, "content-type": "application/json", **headers})

    async def run() -> Answer:
        left = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if left:
                return left.pop()
            while not service_of(http).open:  # it stays until its request is queued
                await module.asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        answer = Answer()

        async def send(message: Any) -> None:
            answer.messages.append(message)

        await http.app(asked, receive, send)
        return answer

    assert http.portal is not None
    return http.portal.call(run)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_cancel(http: TestClient, service: Service, held: threading.Event, stream: bool) -> None:
    before = stats(service)
    with threads(held) as pool:
        other = pool.submit(ask, http, SECOND, num_inference_steps=3)
        wait_until(lambda: stats(service).running == 1)
        gone = pool.submit(from_client_that_goes, http, {}, stream=stream)
        wait_until(lambda: stats(service).cancelled == before.cancelled + 1)
        assert all(b"completed" not in message.get("body", b"") for message in gone.result().messages)
        held.set()
        assert len(other.result().json()["timings"]["steps"]) == 3


def test_detached_answers_are_kept_as_jobs(http: TestClient, service: Service) -> None:
    gone = from_client_that_goes(http, {"x-fastldm-detach": "1"}, num_inference_steps=2)
    wait_until(lambda: not service.open)
    assert not gone.messages or gone.status == 200
    ids = [id.removeprefix("job-") for id in service.kept._items]
    kept = http.get(f"/v1/jobs/{ids[-1]}", headers=FIRST).json()
    assert kept["status"] == "completed"
    assert http.get(f"/v1/jobs/{ids[-1]}", headers=SECOND).status_code == 404


def test_cancelled_in_the_queue_is_409(http: TestClient, service: Service, held: threading.Event) -> None:
    with threads(held) as pool:
        first = pool.submit(ask, http)
        wait_until(lambda: stats(service).running == 1)
        second = pool.submit(ask, http, SECOND)
        wait_until(lambda: len(service.open) == 2)
        next(work for work in [*service.open.values()] if work.generation.position()).generation.cancel()
        answer = second.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
        assert answer.headers["x-should-retry"] == "false"
        held.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_cut_off_at_the_end_is_503(
    http: TestClient, service: Service, held: threading.Event, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "draining", False)
    monkeypatch.setattr(service, "_stopped", False)
    with threads(held) as pool:
        asked = [pool.submit(ask, http, stream=stream) for _ in range(2)]  # one runs, one waits
        wait_until(lambda: len(service.open) == 2)
        http.portal.call(service.stop_now)  # type: ignore[union-attr]
        held.set()
        for one in asked:
            answer = one.result()
            assert "draining" in answer.text
            assert answer.status_code == (200 if stream else 503)  # a stream has begun


# --- what goes wrong


def test_deadlines_are_504(http: TestClient, service: Service) -> None:
    answer = ask(http, deadline=1e-6)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("raised", "status"), [(ValueError("/secret"), 500), (WorkerLost("x"), 503), (SystemExit(), 503)]
)
def test_a_poison_request_fails_once(
    http: TestClient,
    service: Service,
    pipe: Pipeline,
    raised: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own work raises: it is not tried again, and those beside it and behind it go on."""
    prepare, tries = pipe.stages.prepare, []

    def poisoned(request: Any, **options: Any) -> Any:
        if request.prompt == "poison":
            tries.append(request)
            raise raised
        return prepare(request, **options)

    monkeypatch.setattr(pipe.stages, "prepare", poisoned)
    failed = stats(service).failed
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, http, prompt=prompt) for prompt in ("a cat", "poison", "a dog")]
        answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200, status, 200]
    assert b"secret" not in answers[1].content
    assert len(tries) == 1
    assert stats(service).failed == failed + 1
    assert ask(http).status_code == 200


def test_pictures_are_encoded_off_the_loop(http: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    encode = module.encode_image

    def seen(*arguments: Any, **options: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return encode(*arguments, **options)

    monkeypatch.setattr(module, "encode_image", seen)
    assert ask(http, n=2).status_code == 200
    assert len(threads) == 2
    assert all(name.startswith("fastldm encode") for name in threads)
