"""fastldm/server/extras.py: pictures that are sent, enlarged by filters and by models."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import clients
import numpy as np
import pytest
from PIL import Image
from servers import service_of
from starlette.testclient import TestClient

from fastldm import Pipeline
from fastldm.server.app import create_app
from fastldm.server.settings import Settings

SINGLE, BATCH = "/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images"


@pytest.fixture(scope="module")
def upscaler() -> Pipeline:
    return Pipeline.from_pretrained("upscaler", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def http(upscaler: Pipeline) -> Iterator[TestClient]:
    pipes = {"default": Pipeline.default(dtype="float32"), "large": upscaler}
    settings = Settings(models=dict.fromkeys(pipes, "default"), max_pixels=2**18, max_n=3, log="off")
    with TestClient(create_app(settings, pipes), raise_server_exceptions=False) as http:
        yield http


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(clients.file(image)).decode()


def single(http: TestClient, image: Image.Image, **fields: Any) -> tuple[Image.Image, str]:
    answer = http.post(SINGLE, json={"image": encoded(image), **fields})
    assert answer.status_code == 200, answer.text
    return clients.picture(answer.json()["image"]), answer.json()["html_info"]


def close(actual: Image.Image, expected: Image.Image) -> bool:
    assert actual.size == expected.size
    return bool(np.abs(np.asarray(actual, int) - np.asarray(expected, int)).max() <= 1)


def test_upscalers_are_filters_and_models(http: TestClient) -> None:
    found = {one["name"]: one["scale"] for one in http.get("/sdapi/v1/upscalers").json()}
    assert found == {"None": 1, "Nearest": 1, "Bilinear": 1, "Bicubic": 1, "Lanczos": 1, "large": 2}


@pytest.mark.parametrize("name", ["Nearest", "Bilinear", "Bicubic", "Lanczos"])
def test_filters_are_pillows(http: TestClient, name: str) -> None:
    image = picture()
    made, info = single(http, image, upscaler_1=name, upscaling_resize=1.7)
    assert made.size == (80, 48), "multiples of 8, as in AUTOMATIC1111"
    assert close(made, image.resize((80, 48), Image.Resampling[name.upper()]))
    assert info == f"<p>Postprocess upscale by: 1.7, Postprocess upscaler: {name}</p>"


def test_nothing_is_done_by_none(http: TestClient) -> None:
    made, info = single(http, picture(), upscaling_resize=4)
    assert close(made, picture())
    assert info == "<p></p>"


def test_a_model_enlarges_until_it_is_enough(http: TestClient, upscaler: Pipeline) -> None:
    image = picture()
    once = upscaler(image=image, seed=0).images[0]
    assert close(single(http, image, upscaler_1="large")[0], once)
    assert close(single(http, image, upscaler_1="large")[0], once), "the same picture comes back"
    twice = upscaler(image=once, seed=0).images[0]
    made, _ = single(http, image, upscaler_1="large", upscaling_resize=3)
    assert close(made, twice.resize((144, 96), Image.Resampling.LANCZOS))
    assert not service_of(http).open


@pytest.mark.parametrize(("crop", "size"), [(True, (96, 96)), (False, (144, 96))])
def test_sizes_are_covered_and_perhaps_cropped(http: TestClient, crop: bool, size: tuple[int, int]) -> None:
    fields = {"resize_mode": 1, "upscaling_resize_w": 96, "upscaling_resize_h": 96, "upscaling_crop": crop}
    made, info = single(http, picture(), upscaler_1="Lanczos", **fields)
    large = picture().resize((144, 96), Image.Resampling.LANCZOS)
    assert made.size == size
    assert close(made, large.crop((24, 0, 120, 96)) if crop else large)
    assert "Postprocess upscale to: 96x96" in info
    assert ("Postprocess crop to: 96x96" in info) == crop


def test_two_upscalers_are_blended(http: TestClient) -> None:
    image = picture()
    fields = {"upscaler_1": "Nearest", "upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.25}
    made, info = single(http, image, **fields)
    parts = [image.resize((96, 64), Image.Resampling[name]) for name in ("NEAREST", "LANCZOS")]
    assert close(made, Image.blend(*parts, 0.25))
    assert "Postprocess upscaler 2: Lanczos" in info


def test_a_batch_keeps_its_order_and_settings(http: TestClient) -> None:
    made = http.post("/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 1, "seed": 4}).json()["images"][0]
    files = [{"data": made, "name": "a.png"}, {"data": encoded(picture(16, 24)), "name": ""}]
    answer = http.post(BATCH, json={"imageList": files, "upscaler_1": "Bicubic"}).json()
    first, second = map(clients.picture, answer["images"])
    assert (first.size, second.size) == ((128, 128), (32, 48))
    assert "Seed: 4" in first.info["parameters"]
    assert "parameters" not in second.info
    assert answer["html_info"].startswith("<p>Postprocess upscale by: 2")


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"upscaler_1": "R-ESRGAN 4x+"}, 400, "upscaler_1 is 'R-ESRGAN 4x+': expected one of None, Nearest, Bilinear,"),
        ({"upscaler_1": "default"}, 400, "Lanczos, large"),
        ({"upscaler_1": "Lanczos", "upscaler_2": "x"}, 400, "upscaler_2 is 'x'"),
        ({"gfpgan_visibility": 0.5}, 422, "gfpgan_visibility is 0.5, which is not there"),
        ({"codeformer_visibility": 1}, 422, "codeformer_visibility is 1, which is not there"),
        ({"upscaler_1": "Lanczos", "upscaling_resize": 60}, 400, "width times height is"),
        ({"upscaler_1": "large", "upscaling_resize": 60}, 400, "width times height is"),
        ({"upscaling_resize": 0}, 400, "upscaling_resize: Input should be greater than 0"),
        ({"resize_mode": 2}, 400, "resize_mode: Input should be less than or equal to 1"),
        ({"image": "http://10.0.0.1/x.png"}, 400, "image is a URL"),
        ({"image": "AAAA"}, 400, "image cannot be read as a picture"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_there_is_refused(http: TestClient, fields: dict[str, Any], status: int, message: str) -> None:
    answer = http.post(SINGLE, json={"image": encoded(picture()), **fields})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


def test_switched_off_fields_are_fine(http: TestClient) -> None:
    off = {"gfpgan_visibility": 0, "codeformer_visibility": 0.0, "codeformer_weight": 0.5, "upscale_first": True}
    assert single(http, picture(), upscaler_1="Nearest", show_extras_results=True, **off)[0].size == (96, 64)


def test_batches_are_bounded(http: TestClient) -> None:
    files = [{"data": encoded(picture())}] * 4
    answer = http.post(BATCH, json={"imageList": files, "upscaler_1": "Lanczos"})
    assert "imageList has 4 pictures: expected at most 3" in answer.json()["detail"]
    answer = http.post(BATCH, json={"imageList": [*files[:1], {"data": "%"}], "upscaler_1": "Lanczos"})
    assert "imageList[1] is not base64" in answer.json()["detail"]
