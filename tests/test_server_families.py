"""Families beside Stable Diffusion over HTTP, several in one server: what clients are told that each reads, what they
send, and what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import all_families
import clients
import numpy as np
import openai
import pytest
from PIL import Image
from servers import wait_until
from starlette.testclient import TestClient

from fastldm import Pipeline

FEW = ("consistency", "ldm-super-resolution", "if-super-resolution", "ldm-text")
SMALL: dict[str, Any] = {"seed": 3, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Pipeline]:
    return {name: Pipeline.from_diffusers(all_families.MAKERS[name]()) for name in FEW}


@pytest.fixture(scope="module")
def http(pipes: dict[str, Pipeline]) -> Iterator[TestClient]:
    with clients.client(pipes, max_steps=60) as http:
        wait_until(lambda: http.get("/ready").status_code == 200, 60)
        yield http


@pytest.fixture(scope="module")
def api(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(api_key="unused", base_url="http://testserver/v1", http_client=http, max_retries=0)


def photo() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)


def sent() -> tuple[str, io.BytesIO]:
    return "photo.png", io.BytesIO(clients.file(photo()))


def same(content: str, expected: Any) -> bool:
    picture = np.asarray(clients.picture(content)).astype(int)
    return picture.shape == np.shape(expected) and np.abs(picture - np.asarray(expected).astype(int)).max() <= 1


def test_models_say_what_they_read(api: openai.OpenAI, http: TestClient) -> None:
    told = {model.id: model.reads for model in api.models.list()}  # type: ignore[attr-defined]
    nothing = {"prompt": False, "guidance": False, "image": "optional", "strength": True}
    text = {"prompt": True, "guidance": True}
    beside = {"classes": 0, "noise_level": None, "enlarges": 1}
    picture = {"image": "needed", "strength": False}
    assert told == {
        "consistency": {**nothing, **beside, "classes": 10},
        "ldm-super-resolution": {**nothing, **picture, **beside, "enlarges": 4},
        "if-super-resolution": {**text, **picture, **beside, "noise_level": 999},
        "ldm-text": {**nothing, **text, **beside},
    }
    assert {model["id"]: model["reads"] for model in http.get("/v1/options").json()["models"]} == told
    assert http.get("/v1/models/consistency").json()["reads"] == told["consistency"]


def test_all_were_warmed_up(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    assert not [record for record in caplog.get_records("setup") if "warmed up" in record.getMessage()]


def test_classes_are_asked_for_by_the_client(api: openai.OpenAI, pipes: dict[str, Pipeline]) -> None:
    body = {**SMALL, "class_labels": [3, 9]}
    answer = api.images.generate(model="consistency", prompt="", n=2, extra_body=body)
    expected = pipes["consistency"](class_labels=[3, 9], batch_size=2, **SMALL).images
    for one, image in zip(answer.data or (), expected, strict=True):
        assert same(one.b64_json or "", image)
    with pytest.raises(openai.BadRequestError, match="expected classes from 0 to 9") as error:
        api.images.generate(model="consistency", prompt="", extra_body={**SMALL, "class_labels": 10})
    assert error.value.param == "class_labels"


def test_pictures_are_enlarged_by_the_client(api: openai.OpenAI, pipes: dict[str, Pipeline]) -> None:
    expected = pipes["ldm-super-resolution"](image=photo(), **SMALL).images[0]
    answers = [
        api.images.create_variation(model="ldm-super-resolution", image=sent(), extra_body=SMALL),
        api.images.edit(model="ldm-super-resolution", image=sent(), prompt="", extra_body=SMALL),
    ]
    for answer in answers:
        assert answer.size == "128x128"
        assert same(answer.data[0].b64_json or "", expected)  # type: ignore[index]
    answer = api.images.edit(
        model="if-super-resolution", image=sent(), prompt="a dog", extra_body={**SMALL, "noise_level": 700}
    )
    expected = pipes["if-super-resolution"]("a dog", image=photo(), noise_level=700, **SMALL).images[0]
    assert same(answer.data[0].b64_json or "", expected)  # type: ignore[index]


REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "a prompt": ({"model": "consistency", "prompt": "a cat"}, "prompt", "this model reads no text"),
    "no prompt": ({"model": "ldm-text"}, "prompt", "prompt is missing: this model reads one"),
    "guidance": ({"model": "consistency", "guidance_scale": 4}, "guidance_scale", "no text to be guided by"),
    "ranking": ({"model": "consistency", "best_of": 3}, "candidates", "this model reads none"),
    "no picture": ({"model": "ldm-super-resolution", **SMALL}, "image", "this model enlarges an image: give it image"),
    "a class": ({"model": "ldm-text", "prompt": "", "class_labels": 1}, "class_labels", "only class-conditional"),
    "CLIP": (
        {"model": "consistency", "clip_guidance_scale": 9},
        None,
        "this model's are pixels, which nothing decodes",
    ),
    "another sampler": ({"model": "consistency", "sampler": "euler a"}, "sampler", "for other models"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_does_not_read_is_400(case: str, http: TestClient) -> None:
    body, param, message = REFUSED[case]
    answer = http.post("/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], message in error["message"]) == (400, param, True), error


def test_default_steps_beyond_the_limit_are_named(http: TestClient) -> None:
    answer = http.post("/v1/images/variations", data={"model": "ldm-super-resolution"}, files={"image": sent()})
    assert answer.status_code == 400
    assert "num_inference_steps is 100, the model's own number: expected at most 60" in answer.text


def test_front_ends_send_what_is_not_read(http: TestClient, pipes: dict[str, Pipeline]) -> None:
    """AUTOMATIC1111's have a guidance scale, a strength and a size in each request."""
    own = {"seed": 3, "steps": 2, "cfg_scale": 7, "denoising_strength": 0.5, "width": 512, "height": 512}
    encoded = base64.b64encode(clients.file(photo())).decode()
    of = {"override_settings": {"sd_model_checkpoint": "ldm-super-resolution"}, "init_images": [encoded]}
    answer = http.post("/sdapi/v1/img2img", json={**own, **of})
    assert answer.status_code == 200, answer.text
    assert same(answer.json()["images"][0], pipes["ldm-super-resolution"](image=photo(), **SMALL).images[0])
    own = {**own, "width": 16, "height": 16, "class_labels": 4}
    of = {"override_settings": {"sd_model_checkpoint": "consistency"}}
    answer = http.post("/sdapi/v1/txt2img", json={**own, **of})
    assert answer.status_code == 200, answer.text
    assert same(answer.json()["images"][0], pipes["consistency"](class_labels=4, **SMALL).images[0])


def test_jobs_and_metrics_know_each_model(http: TestClient) -> None:
    job = http.post("/v1/jobs", json={"model": "consistency", "class_labels": 2, **SMALL}).json()
    wait_until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["status"] not in ("queued", "running"))
    data = http.get(f"/v1/jobs/{job['id']}").json()["result"]["data"]
    found = http.post("/v1/images/settings", json={"image": data[0]["b64_json"]}).json()
    assert (found["class_labels"], found["seed"], found["num_inference_steps"]) == (2, 3, 2)
    form = {"model": "ldm-super-resolution", **SMALL}
    job = http.post("/v1/jobs/edits", data=form, files={"image": sent()}).json()
    wait_until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["status"] == "completed")
    metrics = http.get("/metrics").text
    assert all(f'model="{name}"' in metrics for name in FEW)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in all_families.MAKERS if name not in FEW])
def test_other_families_are_served(name: str) -> None:
    pipe = Pipeline.from_diffusers(all_families.MAKERS[name]())
    with clients.client({name: pipe}) as http:
        wait_until(lambda: http.get("/ready").status_code == 200, 60)
        reads = http.get("/v1/models").json()["data"][0]["reads"]
        body = {**SMALL, **({"prompt": "a cat"} if reads["prompt"] else {})}
        if reads["image"] == "needed":
            answer = http.post("/v1/images/edits", data=body, files={"image": sent()})
        else:
            answer = http.post("/v1/images/generations", json=body)
        if name == "kandinsky":  # without its prior
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image_embeds")
            return
        image = {"image": photo()} if reads["image"] == "needed" else {}
        expected = pipe(body.get("prompt"), **image, **SMALL).images[0]
        assert same(answer.json()["data"][0]["b64_json"], expected)
