"""fastldm/server/openai.py, with the openai client itself: what it sends, what it retries, what it reads."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clients
import numpy as np
import openai
import pytest
import tiny
from PIL import Image
from starlette.testclient import TestClient

from fastldm import Pipeline

SMALL: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.default(dtype="float32")


@pytest.fixture(scope="module")
def http(pipe: Pipeline) -> Iterator[TestClient]:
    with clients.client(pipe, loras={"sketch": "sketch"}, heartbeat=0.02) as http:
        yield http


@pytest.fixture(scope="module")
def api(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(api_key="unused", base_url="http://testserver/v1", http_client=http, max_retries=0)


def apple(pipe: Pipeline, **options: Any) -> np.ndarray:
    result = pipe(**{"prompt": "a red apple", "seed": 3, **SMALL, **options})
    return np.asarray(result.images[0])


def same(actual: Image.Image, expected: np.ndarray) -> bool:
    """But for a rounding of float32."""
    return np.abs(np.asarray(actual).astype(int) - expected.astype(int)).max() <= 1


def test_pictures_are_those_of_the_pipeline(api: openai.OpenAI, pipe: Pipeline) -> None:
    answer = api.images.generate(
        model="default",
        prompt="a red apple",
        n=2,
        size="48x64",
        extra_body={"seed": 3, "guidance_scale": 3.0, "sampler": "euler a", "negative_prompt": "blue", **SMALL},
    )
    assert answer.size == "48x64"
    assert answer.output_format == "png"
    assert [one.seed for one in answer.data] == [3, 4]  # type: ignore[attr-defined,union-attr]
    extra = answer.model_extra
    assert extra["model"] == "default"
    assert extra["backend"] == "torch float32"
    assert len(extra["timings"]["steps"]) == 2
    expected = pipe(
        "a red apple", width=48, height=64, seed=3, guidance_scale=3, sampler="euler a", negative_prompt="blue",
        num_images_per_prompt=2, **SMALL,
    )  # fmt: skip
    for one, image in zip(answer.data, expected.images, strict=True):  # type: ignore[arg-type]
        assert same(clients.picture(one.b64_json), np.asarray(image))
    text = clients.picture(answer.data[1].b64_json).info["parameters"]  # type: ignore[index]
    assert "Sampler: Euler a" in text
    assert "Seed: 4" in text


def test_formats_and_urls(api: openai.OpenAI, http: TestClient) -> None:
    for kind, size in (("jpeg", None), ("webp", 90)):
        options = {} if size is None else {"output_compression": size}
        answer = api.images.generate(prompt="a dog", output_format=kind, extra_body=SMALL, **options)  # type: ignore[call-overload]
        assert clients.picture(answer.data[0].b64_json).format == kind.upper()
    answer = api.images.generate(prompt="a dog", response_format="url", extra_body=SMALL)
    url = answer.data[0].url  # type: ignore[index]
    assert url.startswith("http://testserver/v1/images/files/")
    assert answer.data[0].b64_json is None  # type: ignore[index]
    fetched = http.get(url)
    assert fetched.headers["content-type"] == "image/png"
    assert clients.picture(fetched.content).size == (64, 64)
    assert http.get(url + "x").status_code == 404


def test_stream_has_partial_pictures(api: openai.OpenAI, pipe: Pipeline) -> None:
    stream = api.images.generate(
        prompt="a red apple", stream=True, partial_images=2, n=2, extra_body={"seed": 3, "num_inference_steps": 6}
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 4 + ["image_generation.completed"] * 2
    assert [event.partial_image_index for event in events[:4]] == [0, 0, 1, 1]  # type: ignore[union-attr]
    assert all(clients.picture(event.b64_json).width == 64 for event in events)
    assert same(clients.picture(events[4].b64_json), apple(pipe, num_inference_steps=6))


def test_silent_stream_gets_comments(http: TestClient) -> None:
    """Proxies cut a connection on which nothing comes."""
    body = {"prompt": "a dog", "stream": True, "num_inference_steps": 60}
    with http.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = list(answer.iter_lines())
        assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[0].startswith(":")
    assert sum(line.startswith("event:") for line in lines) == 1


def test_stream_ends_with_its_error(api: openai.OpenAI, http: TestClient) -> None:
    with pytest.raises(openai.APIError, match=r"deadline of 0\.001 s"):
        list(api.images.generate(prompt="x", stream=True, extra_body={"deadline": 0.001}))
    # what is wrong with a request is known before its stream begins
    with pytest.raises(openai.BadRequestError, match="num_inference_steps is 1000: expected at most 150"):
        api.images.generate(prompt="x", stream=True, extra_body={"num_inference_steps": 1000})


def test_edit_repaints_what_is_transparent(api: openai.OpenAI, pipe: Pipeline) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    image = Image.fromarray(pixels[..., :3].copy())
    pixels[:, 32:, 3] = 0
    hole, mask = Image.fromarray(pixels), Image.fromarray(np.where(pixels[..., 3] == 0, 255, 0).astype(np.uint8))
    options: dict[str, Any] = {"prompt": "a red apple", "n": 1, "size": "auto"}
    by_mask = api.images.edit(
        image=("upload", clients.file(image)), mask=clients.file(hole), extra_body={"seed": 3, **SMALL}, **options
    )
    expected = apple(pipe, image=image, mask_image=mask)
    assert same(clients.picture(by_mask.data[0].b64_json), expected)
    assert not same(clients.picture(by_mask.data[0].b64_json), apple(pipe))
    # a picture that has the hole itself, in a list of one, as `image[]`
    answer = api.images.edit(image=[clients.file(hole)], extra_body={"seed": 3, **SMALL}, **options)
    assert clients.picture(answer.data[0].b64_json).size == (64, 64)
    stream = api.images.edit(
        image=clients.file(image), stream=True, partial_images=1, extra_body={"strength": 1.0, **SMALL}, **options
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_edit_without_mask_starts_from_the_picture(api: openai.OpenAI, pipe: Pipeline) -> None:
    image = pipe("a green tree", seed=1, width=48, **SMALL).images[0]
    extra = {"seed": 3, "strength": 0.5, "num_inference_steps": 4}
    answer = api.images.edit(image=clients.file(image), prompt="a red apple", extra_body=extra)
    expected = pipe("a red apple", image=image, **extra).images[0]
    assert same(clients.picture(answer.data[0].b64_json), np.asarray(expected))  # type: ignore[index]
    answer = api.images.create_variation(image=clients.file(image, "JPEG"), n=2, extra_body=SMALL)
    assert [clients.picture(one.b64_json).size for one in answer.data] == [(48, 64)] * 2  # type: ignore[union-attr]


def test_adapters_as_lists_and_dictionaries(api: openai.OpenAI, pipe: Pipeline) -> None:
    expected = apple(pipe, adapters={"sketch": 0.8})
    plain = apple(pipe)
    assert not same(Image.fromarray(plain), expected)
    image = Image.fromarray(plain)
    for adapters in ({"sketch": 0.8}, [{"name": "sketch", "scale": 0.8}]):
        body = {"adapters": adapters, "seed": 3, **SMALL}
        answer = api.images.generate(prompt="a red apple", extra_body=body)
        assert same(clients.picture(answer.data[0].b64_json), expected)  # type: ignore[index]
        # in a form the client flattens them
        edit = api.images.edit(image=clients.file(image), prompt="a red apple", extra_body={**body, "strength": 1.0})
        assert "sketch" in clients.picture(edit.data[0].b64_json).info["parameters"]  # type: ignore[index]
    assert same(
        clients.picture(api.images.generate(prompt="a red apple", extra_body={"seed": 3, **SMALL}).data[0].b64_json),
        plain,
    )  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="there is no adapter 'x'"):
        api.images.generate(prompt="a red apple", extra_body={"adapters": {"x": 1}})


def test_models_are_listed(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["default"]
    assert api.models.retrieve("default").owned_by == "fastldm"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        api.models.retrieve("x")
    with pytest.raises(openai.NotFoundError, match="there is no model 'x': this server has 'default'") as error:
        api.images.generate(prompt="x", model="x")
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"
    # what front ends send unasked is the first model; the answer says which it was
    for name in ("dall-e-2", "dall-e-3", "gpt-image-1", ""):
        answer = api.images.generate(prompt="x", model=name, extra_body=SMALL)
        assert answer.model_extra["model"] == "default"  # type: ignore[index]


def test_unknown_fields_are_ignored(api: openai.OpenAI) -> None:
    answer = api.images.generate(
        prompt="a dog", quality="high", style="vivid", moderation="low", user="me", background="opaque",
        extra_body={"of_next_year": {"a": 1}, **SMALL},
    )  # fmt: skip
    assert answer.quality == "high"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"background": "transparent"}, "background: Input should be 'auto' or 'opaque'"),
        ({"output_format": "svg"}, "output_format: Input should be 'png', 'jpeg' or 'webp'"),
        ({"frames": 8}, "frames: Input should be less than or equal to 1"),
        ({"n": 11}, "n is 11: expected at most 10"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"size": "63x64"}, "width is 63: expected a multiple of"),
        ({"size": "big"}, "size is 'big': expected WIDTHxHEIGHT in pixels, or auto"),
        ({"size": "8192x8192"}, "width times height is 67108864: expected at most 4194304 pixels"),
        ({"prompt": "x" * 9000}, "prompt has 9000 characters: expected at most 8192"),
        ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
        ({"sampler": "nonsense"}, "unknown sampler 'nonsense'"),
        ({"guidance_scale": 1e9}, "guidance_scale is"),
        ({"strength": 0.5}, "strength is for pictures that are changed"),
        ({"partial_images": 2}, "partial_images is for streams"),
        ({"stream": True, "response_format": "url"}, "response_format is url"),
        ({"deadline": -1}, "deadline: Input should be greater than 0"),
        ({"adapters": [1]}, 'adapters: expected {"NAME": SCALE}'),
        ({"adapters": {"sketch": 1e9}}, "adapters"),
        ({"seed": 2**63}, "seed: "),
        ({"image": "http://10.0.0.1/x.png", "num_inference_steps": 0}, "num_inference_steps: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_requests_say_what_is_wrong(http: TestClient, fields: dict[str, Any], message: str) -> None:
    import json

    answer = http.post(
        "/v1/images/generations",
        content=json.dumps({"prompt": "x", **fields}),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert {*error} == {"message", "type", "param", "code"}


def test_bad_forms_say_what_is_wrong(http: TestClient) -> None:
    good = clients.file(Image.new("RGB", (64, 64)))
    clear = clients.file(Image.new("RGBA", (32, 32)))
    for data, files, message in (
        ({"prompt": "x"}, {}, "image is missing: expected a file"),
        ({"prompt": "x"}, {"image": b"no picture"}, "image cannot be read as a picture"),
        ({"prompt": "x"}, {"image": b""}, "image is empty"),
        ({}, {"image": good}, "prompt is missing: this model reads one"),
        ({"prompt": "x", "n": "many"}, {"image": good}, "n: Input should be a valid integer"),
        ({"prompt": "x"}, {"image": good, "mask": clear}, "mask is 32x32 and image 64x64"),
        ({"prompt": "x"}, {"image": good, "mask": good}, "mask has no transparent pixels"),
        ({"prompt": "x", "mask": "text"}, {"image": good}, "mask is a text: expected a file"),
        ({"prompt": "x", "adapters[][name]": ["a"], "adapters[][scale]": ["1", "2"]}, {"image": good}, "1 names and 2"),
    ):
        answer = http.post("/v1/images/edits", data=data, files=files or {"other": b"x"})
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]
    two = [("image[]", good), ("image[]", good)]
    assert (
        "image is 2 files" in http.post("/v1/images/edits", data={"prompt": "x"}, files=two).json()["error"]["message"]
    )
    wrong = http.post("/v1/images/edits", json={"prompt": "x", "image": base64.b64encode(good).decode()})
    assert wrong.status_code == 415
    plain = http.post("/v1/images/generations", content=b"prompt=x", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    assert "send Content-Type: application/json" in plain.json()["error"]["message"]


def test_detached_request_is_kept_as_a_job(http: TestClient) -> None:
    body = {"prompt": "a dog", "seed": 1, **SMALL}
    answer = http.post("/v1/images/generations", json=body, headers={"x-fastldm-detach": "1"})
    job = http.get(f"/v1/jobs/{answer.headers['x-request-id']}").json()
    assert job["status"] == "completed"
    assert job["result"] == answer.json()


def test_enlarged_picture_has_the_model_s_size(tmp_path: Path) -> None:
    """Neither API's automatic size, which is the picture's own, is asked of a model that enlarges it."""
    model = Pipeline.from_pretrained(tiny.save_pipeline("x4-upscaler", tmp_path), dtype="float32", device="cpu")
    png = io.BytesIO()
    Image.new("RGB", (16, 8), (200, 90, 30)).save(png, "png")
    with clients.client(model, max_pixels=100 * 64) as http:

        def edited(picture: bytes, **fields: Any) -> Any:
            files = {"image": ("a.png", picture, "image/png")}
            return http.post(
                "/v1/images/edits", data={"prompt": "a cat", "num_inference_steps": "1", **fields}, files=files
            )

        assert edited(png.getvalue()).json()["size"] == edited(png.getvalue(), size="auto").json()["size"] == "64x32"
        assert "makes 4 times the picture" in edited(png.getvalue(), size="16x8").json()["error"]["message"]
        fields = {"init_images": [base64.b64encode(png.getvalue()).decode()], "prompt": "a cat", "steps": 1}
        made = http.post("/sdapi/v1/img2img", json={**fields, "width": 512, "height": 512}).json()
        assert Image.open(io.BytesIO(base64.b64decode(made["images"][0]))).size == (64, 32)
        large = io.BytesIO()
        Image.new("RGB", (32, 32)).save(large, "png")
        assert "at most 6400 pixels" in edited(large.getvalue()).json()["error"]["message"]
