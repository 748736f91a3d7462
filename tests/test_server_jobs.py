"""`/v1/jobs`: place, progress, preview, result; and that a job is its key's alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import clients
import pytest
from servers import BODY, service_of, wait_until
from sessions import tiny_pipeline
from starlette.testclient import TestClient

from fastldm import Pipeline

KEYS = ("first-key-1", "second-key-2")
OTHER = {"authorization": f"Bearer {KEYS[1]}"}
FIELDS = {**BODY, "num_inference_steps": 3, "size": "64x64"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def http(pipe: Pipeline) -> Iterator[TestClient]:
    with clients.client(pipe, api_keys=KEYS, max_batch=1) as http:
        http.headers["authorization"] = f"Bearer {KEYS[0]}"
        wait_until(lambda: http.get("/ready").status_code == 200)
        yield http


@pytest.fixture
def held(http: TestClient, gate: threading.Event) -> Iterator[threading.Event]:
    """No step is taken until it is set."""
    yield gate
    gate.set()
    wait_until(lambda: not service_of(http).open)


def begin(http: TestClient, **fields: Any) -> str:
    answer = http.post("/v1/jobs", json={**FIELDS, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.json()["object"] == "job"
    return str(answer.json()["id"])


def show(http: TestClient, id: str, **query: Any) -> Any:
    return http.get(f"/v1/jobs/{id}", params=query).json()


def ended(http: TestClient, id: str) -> Any:
    wait_until(lambda: show(http, id)["status"] not in ("queued", "running"))
    return show(http, id)


def test_jobs_know_their_place(http: TestClient, held: threading.Event) -> None:
    ids = [begin(http) for _ in range(3)]
    wait_until(lambda: show(http, ids[0])["status"] == "running")
    assert [show(http, id)["position"] for id in ids] == [0, 1, 2]
    assert [show(http, id)["status"] for id in ids] == ["running", "queued", "queued"]
    held.set()
    assert [ended(http, id)["status"] for id in ids] == ["completed"] * 3


def test_results_are_those_of_a_plain_request(http: TestClient) -> None:
    done = ended(http, begin(http, n=2, output_format="webp"))
    plain = http.post("/v1/images/generations", json={**FIELDS, "n": 2, "output_format": "webp"}).json()
    assert (done["progress"], done["model"]) == (1.0, "default")
    assert [one["seed"] for one in done["result"]["data"]] == [0, 1]
    assert [one["b64_json"] for one in done["result"]["data"]] == [one["b64_json"] for one in plain["data"]]
    assert ended(http, done["id"]) == done  # as often as it is asked for


def test_results_may_be_urls(http: TestClient) -> None:
    done = ended(http, begin(http, response_format="url"))
    url = done["result"]["data"][0]["url"]
    assert clients.picture(http.get(url).content).size == (64, 64)
    assert http.get(url, headers=OTHER).status_code == 404


def test_progress_and_previews(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.runtime.batch import EagerBatch

    steps, step = threading.Semaphore(0), EagerBatch.step

    def stepping(self: Any, runs: Any) -> str:
        assert steps.acquire(timeout=60)
        return step(self, runs)

    monkeypatch.setattr(EagerBatch, "step", stepping)
    id = begin(http)
    first = show(http, id, preview=True)
    assert (first["progress"], first["preview"]) == (0.0, None)  # the next step has one
    steps.release()
    wait_until(lambda: show(http, id)["progress"] > 0)
    seen = show(http, id, preview=True)
    assert seen["progress"] == pytest.approx(1 / 3, abs=1e-4)
    assert seen["remaining_seconds"] >= 0
    wait_until(lambda: show(http, id, preview=True)["preview"] is not None)  # it is encoded after the step
    assert clients.picture(show(http, id, preview=True)["preview"]).format == "PNG"
    assert "preview" not in show(http, id)
    steps.release(2)
    assert ended(http, id)["status"] == "completed"


def test_deleting_cancels_that_job_only(http: TestClient, held: threading.Event) -> None:
    ids = [begin(http) for _ in range(4)]
    wait_until(lambda: show(http, ids[0])["status"] == "running")
    for id in (ids[0], ids[2]):  # one that runs, and one that waits
        assert http.delete(f"/v1/jobs/{id}").json() == {"id": id, "object": "job", "status": "cancelling"}
    held.set()
    records = [ended(http, id) for id in ids]
    assert [record["status"] for record in records] == ["cancelled", "completed", "cancelled", "completed"]
    for record in (records[0], records[2]):
        assert record["error"]["code"] == "cancelled"
        assert "result" not in record


def test_deleting_what_is_done_changes_nothing(http: TestClient) -> None:
    id = begin(http)
    done = ended(http, id)
    assert http.delete(f"/v1/jobs/{id}").json()["status"] == "completed"
    assert show(http, id) == done


def test_another_keys_job_is_404(http: TestClient, held: threading.Event) -> None:
    id = begin(http)
    for path in (f"/v1/jobs/{id}", f"/v1/jobs/{id}?preview=true", "/v1/jobs/none-such"):
        for method in ("GET", "DELETE"):
            answer = http.request(method, path, headers=OTHER)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    held.set()
    assert ended(http, id)["status"] == "completed"
    assert http.get(f"/v1/jobs/{id}", headers=OTHER).status_code == 404
    assert http.delete(f"/v1/jobs/{id}", headers=OTHER).status_code == 404


def test_failed_jobs_say_why(http: TestClient) -> None:
    record = ended(http, begin(http, deadline=1e-6))
    assert (record["status"], record["error"]["code"]) == ("failed", "deadline_exceeded")
    assert "deadline" in record["error"]["message"]


@pytest.mark.parametrize("fields", [{"stream": True}, {"n": 99}, {"size": "x"}, {"model": "none such"}])
def test_what_cannot_run_is_no_job(http: TestClient, fields: Any) -> None:
    answer = http.post("/v1/jobs", json={**FIELDS, **fields})
    assert answer.status_code in (400, 404)
    assert "error" in answer.json()


def test_results_go_when_others_need_the_room(pipe: Pipeline) -> None:
    with clients.client(pipe, max_kept=0.03, max_batch=1) as http:  # MiB: three or so
        ids = [begin(http, seed=k) for k in range(8)]
        assert ended(http, ids[-1])["status"] == "completed"
        wait_until(lambda: not service_of(http).open)
        assert http.get(f"/v1/jobs/{ids[0]}").status_code == 404
        assert service_of(http).kept.size <= 0.03 * 2**20
