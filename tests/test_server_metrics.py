"""Metrics: names by Prometheus' conventions, and values that are what happened."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import clients
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import BODY, metric, service_of, threads, wait_until
from sessions import tiny_pipeline
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with clients.client(tiny_pipeline(), max_batch=1) as http:
        wait_until(lambda: http.get("/ready").status_code == 200)
        yield http


def scraped(http: TestClient) -> str:
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text


def ask(http: TestClient, **fields: Any) -> Any:
    return http.post("/v1/images/generations", json={**BODY, **fields})


class Differences:
    """How much samples have grown since."""

    def __init__(self, http: TestClient) -> None:
        self._http, self._before = http, scraped(http)

    def __call__(self, name: str, **labels: str) -> float:
        return metric(scraped(self._http), name, **labels) - metric(self._before, name, **labels)


def test_names_follow_the_conventions(http: TestClient) -> None:
    ask(http)
    ask(http, n=0)
    families = {family.name: family for family in text_string_to_metric_families(scraped(http))}
    assert len(families) > 15
    for name, family in families.items():
        assert re.fullmatch(r"fastldm_[a-z0-9_]+", name)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples if "created" not in sample.name)
        if family.type == "histogram":
            assert re.search(r"_(seconds|latency_seconds)$", name)
        assert not re.search(r"_(ms|millis|mb|kb|percent)(_|$)", name)  # seconds, bytes and ratios
        assert ("memory" in name) <= name.endswith("_bytes")


def test_pictures_steps_and_stages_are_counted(http: TestClient) -> None:
    grown = Differences(http)
    assert ask(http, n=2, num_inference_steps=3).status_code == 200
    assert ask(http).status_code == 200
    assert grown("fastldm_images_total", model="default") == 3
    assert grown("fastldm_step_time_seconds_count", model="default") == 4
    for stage in ("queue_time", "text_time", "decode_time", "encode_time", "e2e_request_latency"):
        assert grown(f"fastldm_{stage}_seconds_count", model="default") == 2
    assert grown("fastldm_requests_total", outcome="completed") == 2
    parts = ("text_time", "step_time", "decode_time", "queue_time")
    whole = grown("fastldm_e2e_request_latency_seconds_sum")
    assert 0.5 * whole < sum(grown(f"fastldm_{part}_seconds_sum") for part in parts) <= 1.01 * whole


def test_requests_are_counted_by_endpoint(http: TestClient) -> None:
    grown = Differences(http)
    ask(http)
    ask(http, n=0)
    http.get("/v1/jobs/some-id")
    http.get("/v1/jobs/another-id")
    http.get("/nothing/here")
    http.request("BREW", "/health")
    path = "/v1/images/generations"
    assert grown("fastldm_http_requests_total", endpoint=path, method="POST", status="200") == 1
    assert grown("fastldm_http_requests_total", endpoint=path, method="POST", status="400") == 1
    assert grown("fastldm_http_requests_total", endpoint="/v1/jobs/{id}", status="404") == 2
    assert grown("fastldm_http_requests_total", endpoint="other", method="GET", status="404") == 1
    assert grown("fastldm_http_requests_total", method="other") == 1
    assert grown("fastldm_http_request_duration_seconds_count", endpoint=path) == 2


def test_what_clients_choose_makes_no_series(http: TestClient) -> None:
    http.get("/metrics")
    before = len(scraped(http).splitlines())
    for k in range(20):
        http.request(f"METHOD{k}", f"/path/{k}?query={k}", headers={"x-request-id": str(k)})
        http.get(f"/v1/models/{k}")
        ask(http, model=f"model {k}", user=str(k))
    assert len(scraped(http).splitlines()) < before + 40


def test_errors_are_counted_by_code(http: TestClient) -> None:
    grown = Differences(http)
    ask(http, deadline=1e-6)
    assert grown("fastldm_errors_total", code="deadline_exceeded", model="default") == 1
    assert grown("fastldm_requests_total", outcome="failed") == 1
    assert grown("fastldm_images_total") == 0


def test_gauges_show_the_moment(http: TestClient, gate: threading.Event) -> None:
    with threads(gate) as pool:
        asked = [pool.submit(ask, http) for _ in range(3)]
        wait_until(lambda: metric(scraped(http), "fastldm_num_queue_reqs") == 2)
        text = scraped(http)
        assert metric(text, "fastldm_num_running_reqs", model="default") == 1
        assert metric(text, "fastldm_batch_images") == metric(text, "fastldm_max_batch_images") == 1
        grown = Differences(http)
        next(iter(service_of(http).of_owner(""))).generation.cancel()
        gate.set()
        wait_until(lambda: grown("fastldm_requests_total", outcome="cancelled") == 1)
        assert sorted(one.result().status_code for one in asked) == [200, 200, 409]
    wait_until(lambda: metric(scraped(http), "fastldm_num_running_reqs") == 0)
    text = scraped(http)
    assert metric(text, "fastldm_num_queue_reqs") == metric(text, "fastldm_batch_images") == 0
    assert metric(text, "fastldm_used_memory_bytes") > metric(text, "fastldm_planned_memory_bytes") > 0


def test_scraping_beside_work(http: TestClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, http) for _ in range(5)]
        texts = [pool.submit(scraped, http) for _ in range(5)]
        assert {one.result().status_code for one in asked} == {200}
        assert all("fastldm_images_total" in one.result() for one in texts)
