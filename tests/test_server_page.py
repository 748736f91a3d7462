"""What the page at `/` is made of, and what it asks: its files, `/v1/options`, a PNG's settings, edits as jobs,
controls."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import clients
import numpy as np
import pytest
from PIL import Image, ImageDraw
from servers import wait_until
from starlette.testclient import TestClient

from fastldm import Pipeline
from fastldm.server.page import PAGE
from fastldm.system import LOOK

APPLE: dict[str, Any] = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 2, "size": "64x64"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.default(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def http(pipe: Pipeline) -> Iterator[TestClient]:
    with clients.client(pipe, loras={"sketch": "sketch"}, controls={"outline": "shape"}) as http:
        wait_until(lambda: http.get("/ready").status_code == 200)
        yield http


def heart() -> Image.Image:
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).ellipse((4, 20, 60, 44), fill=255)
    return image


def done(http: TestClient, id: str) -> Any:
    wait_until(lambda: http.get(f"/v1/jobs/{id}").json()["status"] not in ("queued", "running"))
    return http.get(f"/v1/jobs/{id}").json()


def pixels(record: Any) -> np.ndarray:
    return np.asarray(clients.picture(record["result"]["data"][0]["b64_json"])).astype(int)


# --- files


def test_page_is_small_and_from_nowhere_else(http: TestClient) -> None:
    page = http.get("/")
    named = re.findall(r'(?:href|src)="([^"#]+)"', page.text)
    assert all(name.startswith("page/") for name in named)
    imported = re.findall(r'from "\./([^"]+)"', "".join(path.read_text() for path in PAGE.glob("*.js")))
    served = {name: http.get(f"/{name}") for name in (*named, *(f"page/{name}" for name in imported))}
    assert {name.removeprefix("page/") for name in served} == {p.name for p in (*PAGE.iterdir(), *LOOK.iterdir())} - {
        "index.html"
    }
    assert sum(len(answer.content) for answer in (page, *served.values())) < 150_000
    for answer in (page, *served.values()):
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
    assert http.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    assert http.get("/page/nothing.js").status_code == 404


def test_every_control_has_a_name() -> None:
    text = (PAGE / "index.html").read_text()
    labelled = set(re.findall(r'<label for="([^"]+)"', text))
    for tag, attributes in re.findall(r"<(input|select|textarea|canvas)\b([^>]*)>", text):
        if " hidden" not in attributes:
            id = re.search(r'id="([^"]+)"', attributes)
            assert id, attributes
            assert id[1] in labelled or "aria-label=" in attributes, f"{tag} {id[1]}"
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\$\("([^"]+)"\)', (PAGE / "page.js").read_text()))
    assert used <= set(ids), used - set(ids)


def test_page_needs_no_key_and_all_else_does(pipe: Pipeline) -> None:
    with clients.client(pipe, api_keys=("a-key-of-letters",)) as http:
        assert http.get("/").status_code == http.get("/page/page.js").status_code == 200
        for path in ("/v1/options", "/v1/models", "/page", "/metrics", "/page/../v1/models"):
            assert http.get(path).status_code in (401, 404), path
        assert http.get("/v1/options").status_code == 401


# --- what may be chosen


def test_options_are_what_requests_may_have(http: TestClient, pipe: Pipeline) -> None:
    options = http.get("/v1/options").json()
    (model,) = options["models"]
    assert model == {
        "id": "default", "size": "64x64", "multiple": 4, "num_inference_steps": 4, "guidance_scale": 2.0,
        "reads": {
            "prompt": True, "guidance": True, "image": "optional", "strength": True, "classes": 0, "noise_level": None,
            "enlarges": 1,
        },
        "adapters": ["sketch"], "controls": ["outline"],
    }  # fmt: skip
    assert (options["adapters"], options["controls"]) == (["sketch"], ["outline"])
    assert options["limits"] == {"max_n": 10, "max_steps": 150, "max_pixels": 4_194_304, "max_prompt": 8192}
    for sampler in options["samplers"]:
        for schedule in ("", *sampler["schedules"]):
            name = f"{sampler['name']} {schedule}".strip()
            pipe.stages.complete(pipe_request(sampler=name))  # is known


def pipe_request(**fields: Any) -> Any:
    from fastldm import Request

    return Request("a red apple", **fields)


def test_settings_of_a_png_make_it_again(http: TestClient) -> None:
    asked = {**APPLE, "negative_prompt": "a leaf", "sampler": "dpm++ 2m karras", "guidance_scale": 3.0, "reuse": 2}
    asked["adapters"] = {"sketch": 0.5}
    first = http.post("/v1/images/generations", json=asked).json()["data"][0]["b64_json"]
    found = http.post("/v1/images/settings", json={"image": first}).json()
    assert found == asked
    again = http.post("/v1/images/generations", json=found).json()["data"][0]["b64_json"]
    assert np.array_equal(np.asarray(clients.picture(again)), np.asarray(clients.picture(first)))
    plain = base64.b64encode(clients.file(heart())).decode()
    for image, message in (
        (plain, "does not say how it was made"),
        ("https://x.org/a.png", "is a URL"),
        ("!", "base64"),
    ):
        refused = http.post("/v1/images/settings", json={"image": image})
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]


# --- edits as jobs, and controls


def test_edits_are_jobs_too(http: TestClient) -> None:
    start = Image.new("RGB", (64, 64), "white")
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    files = {"image": ("a.png", clients.file(start)), "mask": ("m.png", clients.file(mask))}
    fields = {"prompt": "a red apple", "seed": "3", "size": "64x64", "strength": "1", "adapters[sketch]": "0.5"}
    answer = http.post("/v1/jobs/edits", data=fields, files=files)
    assert answer.status_code == 202
    record = done(http, answer.json()["id"])
    assert record["status"] == "completed"
    changed = 255 - pixels(record).min(-1)
    assert changed[:, :28].mean() > 20 > changed[:, 40:].mean()
    refused = http.post("/v1/jobs/edits", data=fields, files={"mask": files["mask"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "image")


@pytest.mark.parametrize("as_form", [False, True])
def test_control_gives_the_outline(http: TestClient, pipe: Pipeline, as_form: bool) -> None:
    start = {"image": Image.new("RGB", (64, 64), "white"), "strength": 1.0} if as_form else {}
    control = {"control_image": {"outline": heart()}, "adapter_conditioning_scale": 0.9}
    expected = pipe("a red apple", seed=3, num_inference_steps=2, **control, **start).images[0]
    content = clients.file(heart())
    if as_form:
        files = {
            "image": ("a.png", clients.file(Image.new("RGB", (64, 64), "white"))),
            "control_image": ("c.png", content),
        }
        fields = {**APPLE, "strength": "1", "control": "outline", "control_scale": "0.9"}
        answer = http.post("/v1/images/edits", data=fields, files=files)
    else:
        fields = {**APPLE, "control_image": base64.b64encode(content).decode(), "control_scale": 0.9}
        answer = http.post("/v1/images/generations", json=fields)
    made = clients.picture(answer.json()["data"][0]["b64_json"])
    assert np.abs(np.asarray(made).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert "ControlNet 0" in made.info["parameters"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"control": "outline"}, "control_image", "is missing"),
        ({"control_scale": 1.0}, "control_image", "is missing"),
        ({"control": "none such", "control_image": "PNG"}, "control", "this server has outline"),
        ({"control_image": "no base64!"}, "control_image", "not base64"),
        ({"control_image": base64.b64encode(b"text").decode()}, "control_image", "control_image"),
    ],
)
def test_mistakes_about_controls_are_400(http: TestClient, fields: Any, param: str | None, message: str) -> None:
    if fields.get("control_image") == "PNG":
        fields = {**fields, "control_image": base64.b64encode(clients.file(heart())).decode()}
    answer = http.post("/v1/images/generations", json={**APPLE, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert message in answer.json()["error"]["message"]


def test_a_server_without_controls_says_so(pipe: Pipeline) -> None:
    with clients.client(Pipeline.default(device="cpu", dtype="float32")) as http:
        content = base64.b64encode(clients.file(heart())).decode()
        answer = http.post("/v1/images/generations", json={**APPLE, "control_image": content})
        assert answer.status_code == 400
        assert "--control" in answer.json()["error"]["message"]
