"""fastldm/server/a1111.py: what front ends send is replayed, and what they read of the answers is looked at."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import clients
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from fastldm import Pipeline
from fastldm.metadata import parse_parameters
from fastldm.samplers.names import resolve_sampler

MODELS = {"default": "default", "second": "default"}
KEYS = ("alice:wonderland", "bob-has-a-key")
ALICE = {"authorization": "Basic " + base64.b64encode(b"alice:wonderland").decode()}
BOB = {"authorization": "Basic " + base64.b64encode(b"anybody:bob-has-a-key").decode()}
TEXT = "/sdapi/v1/txt2img"

LIBRECHAT = {
    "prompt": "a red apple",
    "negative_prompt": "blue",
    "cfg_scale": 4.5,
    "steps": 2,
    "width": 64,
    "height": 48,
}
OPEN_WEBUI = {"prompt": "a red apple", "batch_size": 1, "width": 64, "height": 64, "steps": 2}
SILLY_TAVERN = {
    "url": "http://localhost:7860",
    "auth": "user:a password of its own",
    "prompt": "a red apple",
    "negative_prompt": "blue",
    "sampler_name": "DDIM",
    "scheduler": "normal",
    "steps": 2,
    "cfg_scale": 3,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2.0,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.default(dtype="float32")


@pytest.fixture(scope="module")
def http(pipe: Pipeline) -> Iterator[TestClient]:
    with clients.client(pipe, models=MODELS, loras={"sketch": "sketch"}) as http:
        yield http


def close(actual: str, expected: Any) -> bool:
    return np.abs(np.asarray(clients.picture(actual)).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def encoded(image: Image.Image) -> str:
    return base64.b64encode(clients.file(image)).decode()


def test_librechat_reads_info(http: TestClient) -> None:
    answer = http.post(TEXT, json=LIBRECHAT).json()
    image = clients.picture(answer["images"][0].split(",")[0])
    info = json.loads(answer["info"])
    assert (info["width"], info["height"]) == image.size == (64, 48)
    assert f"Seed: {info['seed']}" in info["infotexts"][0].split("\n")[-1]
    assert image.info["parameters"] == info["infotexts"][0]
    assert (info["cfg_scale"], info["steps"], info["negative_prompt"]) == (4.5, 2, "blue")


def test_open_webui_asks_and_chooses_models(http: TestClient) -> None:
    options = http.get("/sdapi/v1/options", headers={"authorization": ""}).json()
    assert options["sd_model_checkpoint"] == "default"
    assert [(one["title"], one["model_name"]) for one in http.get("/sdapi/v1/sd-models").json()] == [
        ("default", "default"),
        ("second", "second"),
    ]
    answer = http.post(TEXT, json={**OPEN_WEBUI, "sampler_name": "Euler a", "scheduler": "Automatic", "seed": 3})
    assert clients.picture(answer.json()["images"][0]).size == (64, 64)
    assert json.loads(answer.json()["info"])["sampler_name"] == "Euler a"
    assert http.post("/sdapi/v1/options", json={**options, "sd_model_checkpoint": "second"}).json() is None
    assert http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "second"
    assert json.loads(http.post(TEXT, json=OPEN_WEBUI).json()["info"])["sd_model_name"] == "second"
    once = {**OPEN_WEBUI, "override_settings": {"sd_model_checkpoint": "default"}}
    assert json.loads(http.post(TEXT, json=once).json()["info"])["sd_model_name"] == "default"
    assert http.post("/sdapi/v1/options", json={**options, "sd_model_checkpoint": "third"}).status_code == 404
    assert http.post("/sdapi/v1/options", json=options).status_code == 200


def test_sillytavern_asks_everything_first(http: TestClient, pipe: Pipeline) -> None:
    assert http.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
    assert "forge_preset" not in http.get("/sdapi/v1/options").json()  # else it takes the server for another
    samplers = [one["name"] for one in http.get("/sdapi/v1/samplers").json()]
    assert {"DDIM", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "UniPC", "LCM"} <= {*samplers}
    assert all(resolve_sampler(name) for name in samplers)
    assert {"automatic", "karras"} <= {one["name"] for one in http.get("/sdapi/v1/schedulers").json()}
    for name in ("upscalers", "latent-upscale-modes", "sd-vae"):
        assert isinstance(http.get(f"/sdapi/v1/{name}").json(), list)
    idle = http.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0.0
    assert idle["state"]["job_count"] == 0
    assert idle["current_image"] is None
    answer = http.post(TEXT, json={**SILLY_TAVERN, "seed": 3}, headers={"authorization": "Basic "})
    assert "password" not in answer.text
    options = {"num_inference_steps": 2, "guidance_scale": 3, "sampler": "ddim", "negative_prompt": "blue", "seed": 3}
    assert close(answer.json()["images"][0], pipe("a red apple", **options).images[0])
    assert [one["name"] for one in http.get("/sdapi/v1/loras").json()] == ["sketch"]


def test_pictures_of_a_batch_count_seeds(http: TestClient, pipe: Pipeline) -> None:
    answer = http.post(
        TEXT, json={"prompt": "a dog", "seed": 5, "batch_size": 2, "n_iter": 2, "steps": 2, "scheduler": "karras"}
    )
    assert answer.status_code == 400  # a schedule of which sampler?
    body = {"prompt": "a dog", "seed": 5, "batch_size": 2, "n_iter": 2, "steps": 2}
    answer = http.post(TEXT, json={**body, "sampler_name": "DPM++ 2M", "scheduler": "Karras"}).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [5, 6, 7, 8]
    assert info["sampler_name"] == "DPM++ 2M"
    for text, seed, image in zip(info["infotexts"], (5, 6, 7, 8), answer["images"], strict=True):
        request, _ = parse_parameters(text)
        assert "Sampler: DPM++ 2M, Schedule type: Karras" in text
        assert (request.sampler, request.seed) == ("dpm++ 2m karras", seed)
        # what the text says makes the picture again
        assert close(image, pipe(request).images[0])
    assert http.post(TEXT, json={**body, "send_images": False}).json()["images"] == []


def test_prompt_names_adapters(http: TestClient, pipe: Pipeline) -> None:
    answer = http.post(TEXT, json={"prompt": "a red apple <lora:sketch:0.8>", "seed": 3, "steps": 2})
    expected = pipe("a red apple", adapters={"sketch": 0.8}, seed=3, num_inference_steps=2).images[0]
    assert close(answer.json()["images"][0], expected)
    unknown = http.post(TEXT, json={"prompt": "a red apple <lora:x:1>"})
    assert unknown.status_code == 400
    assert "there is no adapter 'x'" in unknown.json()["detail"]


def test_image_to_image_and_masks(http: TestClient, pipe: Pipeline) -> None:
    image = pipe("a green tree", seed=1, num_inference_steps=2).images[0]
    mask = Image.fromarray(np.repeat(np.array([[0] * 32 + [255] * 32], np.uint8), 64, 0))
    body = {"prompt": "a red apple", "seed": 3, "steps": 4, "init_images": ["data:image/png;base64," + encoded(image)]}
    options = {"seed": 3, "num_inference_steps": 4, "image": image}

    def post(**fields: Any) -> Any:
        return http.post("/sdapi/v1/img2img", json={**body, **fields}).json()

    expected = pipe("a red apple", strength=0.5, **options).images[0]
    assert close(post(denoising_strength=0.5)["images"][0], expected)
    masked = pipe("a red apple", strength=1.0, mask_image=mask, **options).images[0]
    once = {"denoising_strength": 1.0, "mask": encoded(mask), "inpainting_fill": 1, "inpaint_full_res": False}
    assert close(post(**once)["images"][0], masked)
    inverse = {**once, "mask": encoded(Image.eval(mask, lambda level: 255 - level)), "inpainting_mask_invert": 1}
    assert close(post(**inverse)["images"][0], masked)
    blurred = clients.picture(post(**once, mask_blur=4)["images"][0])
    kept = np.asarray(blurred)[:, :16].astype(int) - np.asarray(image)[:, :16]
    assert np.abs(kept).max() <= 1, "far from the mask all is as it was"
    small = Image.new("L", image.size)
    small.paste(255, (40, 8, 56, 20))
    around = pipe("a red apple", strength=1.0, mask_image=small, padding_mask_crop=4, **options).images[0]
    fields = {**once, "mask": encoded(small), "inpaint_full_res": True, "inpaint_full_res_padding": 4}
    assert close(post(**fields)["images"][0], around)
    assert (np.asarray(around)[:, :40] == np.asarray(image)[:, :40]).all()
    for fields, message in (
        ({"mask": encoded(mask), "inpainting_fill": 0}, "inpainting_fill is 0"),
        ({"init_images": ["http://10.0.0.1/x.png"]}, "init_images is a URL"),
        ({"init_images": ["%%%"]}, "init_images is not base64"),
        ({"init_images": [encoded(image)] * 2}, "init_images has 2 pictures"),
        ({"resize_mode": 1}, "resize_mode is '1'"),
    ):
        assert message in post(**fields)["detail"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"sampler_name": "Nonsense"}, 404, "Sampler not found"),
        ({"sampler_name": "DDIM", "scheduler": "Polyexponential"}, 404, "Scheduler not found"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, 400, "is a network that fastldm does not have"),
        ({"enable_hr": True, "hr_sampler_name": "Euler"}, 422, "hr_sampler_name is 'Euler': both passes have the same"),
        ({"enable_hr": True, "hr_scale": 16, "width": 512, "height": 512}, 400, "width times height is"),
        ({"restore_faces": True}, 422, "restore_faces"),
        ({"tiling": True}, 422, "tiling"),
        ({"styles": ["ink"]}, 422, "styles"),
        ({"subseed_strength": 0.1}, 422, "subseed_strength"),
        ({"refiner_checkpoint": "xl-refiner"}, 404, "there is no model 'xl-refiner'"),
        ({"script_name": "x/y plot"}, 422, "script_name"),
        ({"alwayson_scripts": {"controlnet": {"args": [{}]}}}, 422, "always on script controlnet not found"),
        ({"firstphase_width": 64}, 422, "firstphase_width"),
        ({"override_settings": {"sd_vae": "other"}}, 422, "sd_vae is 'other'"),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, 422, "eta_noise_seed_delta"),
        ({"override_settings": {"sd_model_checkpoint": "third"}}, 404, "there is no model 'third'"),
        ({"override_settings": {"CLIP_stop_at_last_layers": "a"}}, 400, "CLIP_stop_at_last_layers"),
        ({"batch_size": 100}, 400, "n is 100: expected at most 10"),
        ({"prompt": 7}, 400, "prompt: Input should be a valid string"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_there_is_refused(http: TestClient, fields: dict[str, Any], status: int, message: str) -> None:
    answer = http.post(TEXT, json={"prompt": "x", **fields})
    assert answer.status_code == status
    assert message in answer.json()["detail"]
    assert {*answer.json()} == {"error", "detail", "body", "errors"}


def test_high_resolution_pass_is_made(http: TestClient) -> None:
    fields = {"enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 1, "denoising_strength": 0.5, "steps": 2}
    answer = http.post(TEXT, json={"prompt": "x", "seed": 3, "width": 32, "height": 32, **fields}).json()
    picture = clients.picture(answer["images"][0])
    assert picture.size == (64, 64)
    text = picture.info["parameters"]
    assert "Denoising strength: 0.5" in text
    assert "Hires upscale: 2" in text
    assert "Hires upscaler: Latent" in text
    modes = http.get("/sdapi/v1/latent-upscale-modes").json()
    assert {"name": "Latent (bicubic)"} in modes


def test_switched_off_fields_are_fine(http: TestClient) -> None:
    off = {
        "enable_hr": False, "restore_faces": False, "tiling": False, "styles": [], "subseed_strength": 0, "subseed": -1,
        "refiner_checkpoint": "None", "refiner_switch_at": 0.8, "script_name": None, "script_args": [],
        "alwayson_scripts": {"Seed": {"args": []}}, "firstphase_width": 0, "seed_resize_from_h": -1, "s_churn": 0.0,
        "override_settings": {"sd_vae": "Automatic", "samples_format": "jpg"}, "comments": {}, "eta": None,
    }  # fmt: skip
    answer = http.post(TEXT, json={"prompt": "x", "steps": 1, **off})
    assert clients.picture(answer.json()["images"][0]).format == "JPEG"


def test_png_info_reads_pictures(http: TestClient) -> None:
    made = http.post(
        TEXT, json={"prompt": "a (red:1.2) apple", "negative_prompt": "blue", "steps": 2, "seed": 9}
    ).json()
    info = http.post("/sdapi/v1/png-info", json={"image": made["images"][0]}).json()
    assert info["info"] == json.loads(made["info"])["infotexts"][0]
    assert info["parameters"]["Prompt"] == "a (red:1.2) apple"
    assert info["parameters"]["Negative prompt"] == "blue"
    assert info["parameters"]["Seed"] == "9"
    blank = encoded(Image.new("RGB", (8, 8)))
    assert http.post("/sdapi/v1/png-info", json={"image": blank}).json() == {"info": "", "items": {}, "parameters": {}}


# ---- progress and interrupt


@pytest.fixture(scope="module")
def keyed(pipe: Pipeline) -> Iterator[TestClient]:
    with clients.client(pipe, api_keys=KEYS, models=MODELS) as http:
        yield http


def test_progress_and_interrupt_are_of_ones_own(keyed: TestClient) -> None:
    assert keyed.get("/sdapi/v1/progress").status_code == 401
    assert keyed.get("/sdapi/v1/progress").headers["www-authenticate"].startswith("Basic")
    answers: dict[str, Any] = {}

    def generate(name: str, headers: dict[str, str]) -> None:
        body = {"prompt": "a dog", "steps": 150, "seed": 1}
        answers[name] = keyed.post(TEXT, json=body, headers=headers).json()

    threads = [threading.Thread(target=generate, args=one) for one in (("alice", ALICE), ("bob", BOB))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        progress = keyed.get("/sdapi/v1/progress", headers=ALICE).json()
        if progress["current_image"] and progress["state"]["sampling_step"] > 2:
            break
    assert 0 < progress["progress"] < 1
    assert progress["eta_relative"] > 0
    assert progress["state"]["job_count"] == 1
    assert progress["state"]["sampling_steps"] == 150
    assert clients.picture(progress["current_image"]).width == 64
    assert keyed.post("/sdapi/v1/interrupt", headers=ALICE).json() == {}
    threads[0].join(60)
    assert "bob" not in answers
    assert keyed.get("/sdapi/v1/progress", headers=ALICE).json()["state"]["job_count"] == 0
    assert keyed.get("/sdapi/v1/progress", headers=BOB).json()["state"]["job_count"] == 1
    assert clients.picture(answers["alice"]["images"][0]).size == (64, 64), "what it has is the answer"
    keyed.post("/sdapi/v1/interrupt", headers=BOB)
    threads[1].join(60)
    assert clients.picture(answers["bob"]["images"][0]).size == (64, 64)


def test_model_switch_is_per_key(keyed: TestClient) -> None:
    keyed.post("/sdapi/v1/options", json={"sd_model_checkpoint": "second"}, headers=ALICE)
    names = [keyed.get("/sdapi/v1/options", headers=who).json()["sd_model_checkpoint"] for who in (ALICE, BOB)]
    assert names == ["second", "default"]
