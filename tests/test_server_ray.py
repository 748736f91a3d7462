"""fastldm/server/ray.py: the server on Ray Serve. What needs a cluster has one of two replicas, and is `full`."""

from __future__ import annotations

import asyncio
import copy
import pickle
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from json import dumps, loads
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from asgi import call, scope
from clients import file, picture
from PIL import Image
from servers import BODY, LONG, wait_until

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install -e '.[ray]'")

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray_cluster import cluster, of_folder, running, serving

from fastldm.errors import InputError
from fastldm.server.ray import Router, app
from fastldm.server.settings import Settings

PATH = "/v1/images/generations"
LORAS = ["sketch", "pixel", "gold"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with cluster() as folder:
        yield folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving() as url:
        yield url


def deployed(**options: Any) -> float:
    """Seconds until an application is ready."""
    start = time.perf_counter()
    serve.run(app({"insecure": True, "log": "off", "num_replicas": 2, **options}))
    return time.perf_counter() - start


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    """A client of two replicas, as they are at the start."""
    if running() != 2 or running("Router") != 1:
        deployed()
    with httpx.Client(base_url=url, timeout=300) as http:
        yield http


def post(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(PATH, json={**BODY, **fields})


def many(http: httpx.Client, bodies: list[dict[str, Any]]) -> list[Any]:
    """Futures of the answers to requests at a time."""
    pool = ThreadPoolExecutor(len(bodies))
    futures = [pool.submit(post, http, **body) for body in bodies]
    pool.shutdown(wait=False)
    return futures


# --- the router, in front of replicas that do as they are told


class Replicas:
    """A handle. Each request is answered by `answers`, or fails with what it raises."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers
        self.asked: list[tuple[str, dict[str, Any], bytes, list[str]]] = []
        self.id = ""

    def options(self, multiplexed_model_id: str = "", **_: Any) -> Replicas:
        one = copy.copy(self)
        one.id = multiplexed_model_id
        return one

    def remote(self, scope: dict[str, Any], content: bytes, needs: list[str]) -> Replicas:
        self.asked.append((self.id, pickle.loads(pickle.dumps(scope)), content, needs))
        return self

    async def __aiter__(self) -> AsyncIterator[list[dict[str, Any]]]:
        for messages in self.answers:
            if isinstance(messages, Exception):
                raise messages
            yield messages

    def cancel(self) -> None:
        pass


def start_of(kind: str) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def body_of(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


DONE = [[start_of("application/json"), body_of(b"{}")]]


def ask(
    answers: list[Any],
    path: str = PATH,
    json: Any = None,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    form: httpx.Request | None = None,
    **settings: Any,
) -> tuple[Any, Replicas]:
    """What a client of a router is answered, and what replicas were asked."""
    replicas = Replicas(answers)
    router = Router(Settings(log="off", **settings), replicas)
    content = form.read() if form is not None else b"" if json is None else dumps(json).encode()
    kind = form.headers["content-type"] if form is not None else "application/json"
    sent = scope(path, method, {"content-type": kind, **(headers or {})})
    return asyncio.run(call(router.__serve_build_asgi_app__(), sent, [content])), replicas


MANY = {"load": "first", "models": {"a": "/a", "b": "/b"}, "loras": dict.fromkeys(LORAS, "/")}


@pytest.mark.parametrize(
    ("path", "body", "needs"),
    [
        (PATH, {"prompt": "x"}, [["a"]]),
        (PATH, {"prompt": "x", "model": "b"}, [["b"]]),
        (PATH, {"prompt": "x", "model": "dall-e-3"}, [["a"]]),
        (PATH, {"prompt": "x", "adapters": {"gold": 1, "sketch": 0.5, "none": 1}}, [["a", "sketch"], ["a", "gold"]]),
        (PATH, {"prompt": "x", "model": "b", "adapters": [{"name": "pixel"}]}, [["b", "pixel"]]),
        ("/sdapi/v1/txt2img", {"prompt": "x <lora:gold:0.5>"}, [["a", "gold"]]),
        ("/sdapi/v1/img2img", {"override_settings": {"sd_model_checkpoint": "b"}}, [["b"]]),
        ("/sdapi/v1/png-info", {"image": ""}, []),
        ("/sdapi/v1/options", {"sd_model_checkpoint": "a"}, []),
        (PATH, {"prompt": "x", "model": ["b"], "adapters": {}}, [["a"]]),
        (PATH, {"prompt": "x", "adapters": 3}, []),  # which the application refuses
        (PATH, [], []),
    ],
)
def test_requests_say_what_they_need(path: str, body: Any, needs: list[list[str]]) -> None:
    answer, replicas = ask(DONE, path, body, **MANY)
    ((id, asked, content, needed),) = replicas.asked
    assert answer.body == b"{}"
    assert [loads(one) for one in needed] == needs
    assert id == (needed[0] if needed else "")
    assert (asked["path"], loads(content)) == (path, body)
    _, replicas = ask(DONE, path, body, **{**MANY, "load": "start"})
    assert replicas.asked[0][0] == "", "all of them have everything"


def test_forms_say_what_they_need() -> None:
    files = {"image": ("a.png", b"\x89PNG", "image/png")}
    for data in ({"adapters[gold]": "0.5"}, {"adapters[][name]": "gold", "adapters[][scale]": "0.5"}):
        form = httpx.Request("POST", "http://x/v1/images/edits", data={"model": "b", **data}, files=files)
        _, replicas = ask(DONE, "/v1/images/edits", form=form, **MANY)
        assert [loads(one) for one in replicas.asked[0][3]] == [["b", "gold"]]
        assert replicas.asked[0][2] == form.read()


@pytest.mark.parametrize(
    ("path", "options", "named"),
    [
        ("/", {"method": "GET"}, "/ is"),
        ("/v1/jobs", {"json": {"prompt": "x"}}, "/v1/jobs"),
        ("/v1/jobs/4c72a3ed440b07fd", {"method": "GET"}, "/v1/jobs/"),
        ("/v1/images/files/x", {"method": "GET"}, "/v1/images/files"),
        ("/metrics", {"method": "GET"}, "/metrics"),
        ("/sdapi/v1/progress", {"method": "GET"}, "progress"),
        ("/sdapi/v1/interrupt", {}, "interrupt"),
        ("/sdapi/v1/options", {"json": {"sd_model_checkpoint": "b"}}, "override_settings"),
        (PATH, {"json": {"prompt": "x", "response_format": "url"}}, "response_format url"),
        (PATH, {"json": {"prompt": "x"}, "headers": {"x-fastldm-detach": "1"}}, "x-fastldm-detach"),
    ],
)
def test_what_replicas_would_not_share_is_refused(path: str, options: dict[str, Any], named: str) -> None:
    answer, replicas = ask(DONE, path, models={"a": "/a", "b": "/b"}, **options)
    assert answer.status == 422
    assert named in str(answer.json)
    assert not replicas.asked


def test_front_ends_may_choose_the_first_model() -> None:
    answer, replicas = ask(DONE, "/sdapi/v1/options", {"sd_model_checkpoint": "a", "more": 1}, models={"a": "/a"})
    assert (answer.status, len(replicas.asked)) == (200, 1)


def test_lost_replicas_are_errors_that_clients_repeat() -> None:
    lost = RayActorError()
    for path in (PATH, "/sdapi/v1/txt2img"):
        answer, _ = ask([lost], path, {"prompt": "x"})
        assert (answer.status, answer.headers["x-should-retry"]) == (503, "true")
        assert "is lost: ask again" in str(answer.json["detail" if "sdapi" in path else "error"])
    begun = [start_of("text/event-stream; charset=utf-8"), body_of(b": still at work\n\n", more=True)]
    answer, _ = ask([begun, lost], json={"prompt": "x", "stream": True})
    assert answer.status == 200
    assert answer.body.startswith(b": still at work\n\nevent: error\ndata: ")
    assert answer.messages[-1].get("more_body", False) is False
    answer, _ = ask([[start_of("application/json")], lost], json={"prompt": "x"})
    assert answer.body == b"", "which is no whole answer"


def test_queue_that_is_full_is_429() -> None:
    answer, _ = ask([BackPressureError(256, 256)], json={"prompt": "x"})
    assert (answer.status, answer.json["error"]["code"], answer.headers["retry-after"]) == (429, "queue_full", "1")


def test_keys_and_limits_are_the_routers() -> None:
    answer, replicas = ask(DONE, json={"prompt": "x"}, api_keys=("a-long-key",))
    assert (answer.status, replicas.asked) == (401, [])
    answer, replicas = ask(DONE, json={"prompt": "x" * 2000}, max_body=0.001)
    assert (answer.status, replicas.asked) == (413, [])
    sent = {"authorization": "Bearer a-long-key", "x-request-id": "of-serve"}
    answer, replicas = ask(DONE, json={"prompt": "x"}, api_keys=("a-long-key",), headers=sent)
    assert answer.status == 200
    assert "x-request-id" not in answer.headers, "Serve's proxy sends it"
    assert replicas.asked[0][1]["request_id"].startswith("of-serve-")


def test_pages_of_elsewhere_ask_without_a_key() -> None:
    origin = {"origin": "https://x.org"}
    asked = {**origin, "access-control-request-method": "POST"}
    settings: dict[str, Any] = {"api_keys": ("a-long-key",), "cors_origins": ("https://x.org",)}
    answer, replicas = ask(DONE, method="OPTIONS", headers=asked, **settings)
    assert (answer.status, replicas.asked) == (200, [])
    answer, _ = ask(DONE, json={}, headers={**origin, "authorization": "Bearer a-long-key"}, **settings)
    assert answer.headers["access-control-allow-origin"] == "https://x.org"


def test_half_a_body_goes_nowhere() -> None:
    replicas = Replicas(DONE)
    router = Router(Settings(log="off"), replicas).__serve_build_asgi_app__()
    asyncio.run(call(router, scope(PATH, "POST"), [b'{"prompt": '], stay=False))
    assert not replicas.asked


def test_options_are_those_of_the_command_and_rays() -> None:
    options = {"insecure": "true", "max-batch": "4", "drain": 7, "num_gpus": "1", "num_cpus": 3}
    router = app({**options, "autoscaling_config": {"min_replicas": 1, "max_replicas": 3}})._bound_deployment
    settings, replicas = router.init_args
    assert (settings.max_batch, settings.insecure) == (4, True)
    replica = replicas._bound_deployment
    assert (router.name, replica.name) == ("Router", "Replica")
    assert replica.ray_actor_options["num_gpus"] == 1
    assert replica.ray_actor_options["num_cpus"] == 3
    config = replica._deployment_config
    assert (config.max_ongoing_requests, config.graceful_shutdown_timeout_s) == (8, 12)
    assert (config.autoscaling_config.max_replicas, config.autoscaling_config.target_ongoing_requests) == (3, 4)
    assert (
        app({"insecure": True, "num_replicas": "2"})._bound_deployment.init_args[1]._bound_deployment.num_replicas == 2
    )
    for wrong, message in (({}, "insecure"), ({"port": 80}, "port"), ({"prot": 1, "insecure": True}, "prot")):
        with pytest.raises(InputError, match=message):
            app(wrong)


# --- two replicas on a cluster


@pytest.mark.full
def test_requests_go_to_both_replicas(http: httpx.Client) -> None:
    answers = [one.result() for one in many(http, [{"num_inference_steps": 8, "seed": k} for k in range(8)])]
    assert {one.status_code for one in answers} == {200}
    assert len({one.headers["x-fastldm-replica"] for one in answers}) == 2


@pytest.mark.full
def test_streams_are_not_buffered(http: httpx.Client) -> None:
    body = {**LONG, "num_inference_steps": 60, "stream": True, "partial_images": 3}
    start, times = time.perf_counter(), []
    with http.stream("POST", PATH, json=body) as answer:
        assert answer.status_code == 200
        times = [time.perf_counter() - start for line in answer.iter_lines() if line.startswith("event: ")]
    assert len(times) == 4
    assert times[0] < 0.5 * times[-1]


@pytest.mark.full
def test_openai_client_finds_its_server(http: httpx.Client, url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options = {"num_inference_steps": 2, "seed": 3}
    answer = client.images.generate(prompt="a red apple", size="32x32", extra_body=options)
    assert picture(answer.data[0].b64_json).size == (32, 32)  # type: ignore[index,arg-type]
    red = file(Image.new("RGB", (32, 32), "red"))
    edited = client.images.edit(image=("a.png", red), prompt="a fish", extra_body={**options, "strength": 0.5})
    assert picture(edited.data[0].b64_json).size == (32, 32)  # type: ignore[index,arg-type]
    events = client.images.generate(prompt="a fish", stream=True, partial_images=1, extra_body=options)
    assert [event.type for event in events][-1] == "image_generation.completed"
    with pytest.raises(openai.BadRequestError, match="num_inference_steps"):
        client.images.generate(prompt="a fish", extra_body={"num_inference_steps": 100_000})
    with pytest.raises(openai.UnprocessableEntityError, match="response_format url"):
        client.images.generate(prompt="a fish", response_format="url")
    assert http.post("/sdapi/v1/txt2img", json={"prompt": "a fish", "steps": 1}).json()["images"]
    assert http.get("/ready").status_code == 200
    assert http.get("/-/healthz").status_code == 200


@pytest.mark.full
def test_who_goes_away_has_the_request_cancelled(http: httpx.Client) -> None:
    start = time.perf_counter()
    for _ in range(8):
        with pytest.raises(httpx.TimeoutException):
            http.post(PATH, json={**LONG, "size": "128x128"}, timeout=0.5)
    assert post(http).status_code == 200
    assert time.perf_counter() - start < 60, "eight of them take minutes"


@pytest.mark.full
def test_a_killed_replica_costs_its_own_requests_alone(http: httpx.Client, folder: Path, url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")  # which asks again, twice
    bodies = [{"num_inference_steps": 100, "seed": k} for k in range(6)]
    with ThreadPoolExecutor(2) as pool:
        open_ = many(http, bodies)
        options = {"num_inference_steps": 60, "size": "32x32"}
        asking = [pool.submit(client.images.generate, prompt="a fish", extra_body=options) for _ in range(2)]
        time.sleep(1.5)
        of_folder(folder, "ServeReplica:default:Replica")[0].send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        wait_until(lambda: len(of_folder(folder, "ServeReplica:default:Replica")) == 2 and running() == 2, 180)
        back = time.perf_counter() - killed
        answers = [one.result() for one in open_]
        assert all(one.result().data for one in asking)
    statuses = Counter(one.status_code for one in answers)
    assert statuses.keys() == {200, 503}, statuses
    for lost in (one for one in answers if one.status_code == 503):
        assert lost.json()["error"]["code"] == "worker_lost"
        assert lost.headers["x-should-retry"] == "true"
    print(f"{statuses[503]} of {statuses.total()} were lost; both were back after {back:.1f} s")


@pytest.mark.full
def test_a_stream_whose_replica_dies_says_so(http: httpx.Client, folder: Path) -> None:
    body = {**BODY, **LONG, "stream": True, "partial_images": 3}
    with http.stream("POST", PATH, json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: image_generation.partial_image"
        for one in of_folder(folder, "ServeReplica:default:Replica"):
            one.send_signal(signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-2] == "event: error"
    assert loads(rest[-1].removeprefix("data: "))["error"]["code"] == "worker_lost"
    wait_until(lambda: len(of_folder(folder, "ServeReplica:default:Replica")) == 2 and running() == 2, 180)


@pytest.mark.full
def test_replicas_that_are_replaced_finish_first(http: httpx.Client) -> None:
    open_ = many(http, [{"num_inference_steps": 100, "seed": k} for k in range(6)])
    time.sleep(1)
    deployed(num_replicas=1)
    answers = [one.result() for one in open_]
    assert {one.status_code for one in answers} == {200}
    assert len({one.headers["x-fastldm-replica"] for one in answers}) == 2
    wait_until(lambda: running() == 1, 60)


@pytest.mark.full
def test_replicas_come_with_the_load_and_go(url: str) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "look_back_period_s": 2}
    deployed(autoscaling_config={**scaling, "upscale_delay_s": 1, "downscale_delay_s": 3})
    assert running() == 1
    with httpx.Client(base_url=url, timeout=300) as http:
        start = time.perf_counter()
        open_ = many(http, [{**LONG, "seed": k} for k in range(12)])
        wait_until(lambda: running() == 2, 180)
        up = time.perf_counter() - start
        assert {one.result().status_code for one in open_} == {200}
    start = time.perf_counter()
    wait_until(lambda: running() == 1, 120)
    print(f"up after {up:.1f} s, down {time.perf_counter() - start:.1f} s after the last answer")


@pytest.mark.full
def test_a_request_goes_where_its_adapter_lies(url: str) -> None:
    deployed(load="first", lora=LORAS, num_replicas=2)
    with httpx.Client(base_url=url, timeout=300) as http:
        first: dict[str, str] = {}
        for name in LORAS:
            first[name] = post(http, adapters={name: 0.8}).headers["x-fastldm-replica"]
        time.sleep(1)  # until routers have been told
        hits = Counter()
        for _ in range(10):
            for name in LORAS:
                answer = post(http, adapters={name: 0.8})
                assert answer.status_code == 200
                hits[answer.headers["x-fastldm-replica"] == first[name]] += 1
    print(f"{hits[True]} of {hits.total()} requests went where their adapter lies")
    assert len(set(first.values())) == 2
    assert hits[True] >= 0.9 * hits.total()
