"""A prior attached to Kandinsky's decoder: prompts to pictures as one model, against diffusers' combined pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clients
import ip_adapters
import kandinsky
import numpy as np
import pytest
import tiny
import torch
from command import run
from PIL import Image
from servers import service_of, wait_until

from fastldm import InputError, KandinskyPrior, Pipeline, Session
from fastldm.errors import Cancelled, DeadlineExceeded
from fastldm.image import result_parameters
from fastldm.metadata import parse_parameters

BASE: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(count: int = 1) -> dict[str, Any]:
    return {name: torch.ones(count, ip_adapters.PROJECTED) for name in ("image_embeds", "negative_image_embeds")}


@pytest.fixture(scope="module")
def their_prior() -> Any:
    return kandinsky.prior()


@pytest.fixture(scope="module")
def prior(their_prior: Any) -> KandinskyPrior:
    return KandinskyPrior.from_diffusers(their_prior)


@pytest.fixture(scope="module")
def combined(their_prior: Any) -> Any:
    return kandinsky.combined(their_prior)


@pytest.fixture(scope="module")
def whole(combined: Any) -> Pipeline:
    return Pipeline.from_diffusers(combined)


PRIOR_STEPS = {"prior_num_inference_steps": 4}
WHOLE_CALLS: dict[str, dict[str, Any]] = {
    "negatives": {"prompt": ["a cat", "a small dog"], "negative_prompt": ["bad", "a mat"], "num_images_per_prompt": 2},
    "plain": {"prompt": "a cat"},
    "several": {"prompt": ["a cat", "a small dog"], "num_images_per_prompt": 3, "width": 48},
    "unguided": {"prompt": "a cat", "guidance_scale": 1.0, "prior_guidance_scale": 1.0, "negative_prompt": "bad"},
    "latents": {"prompt": "a cat", "prior_latents": torch.ones(1, ip_adapters.PROJECTED), "prior_guidance_scale": 2.0},
}


@pytest.mark.parametrize(
    "case", [case if case == "negatives" else pytest.param(case, marks=pytest.mark.full) for case in WHOLE_CALLS]
)
def test_prompts_equal_diffusers(case: str, combined: Any, whole: Pipeline) -> None:
    """With one generator, which draws for the prior first."""
    options = {**BASE, **PRIOR_STEPS, **WHOLE_CALLS[case]}
    theirs = {"latents" if name == "prior_latents" else name: value for name, value in options.items()}
    made = np.asarray(whole(generator=seeded(), **options).images)
    expected = np.asarray(combined(generator=seeded(), **theirs).images)
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() < 1e-3


@pytest.mark.full
def test_prompts_with_a_generator_each_equal_diffusers(combined: Any, whole: Pipeline) -> None:
    options = {**BASE, **PRIOR_STEPS, "prompt": ["a cat", "a small dog"]}
    made, expected = (
        np.asarray(each(generator=[seeded(1), seeded(2)], **options).images) for each in (whole, combined)
    )
    assert np.abs(made - expected).max() < 1e-3


def test_priors_of_many_requests_share_steps(whole: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**BASE, "num_inference_steps": 2, **PRIOR_STEPS}
    queries: list[dict[str, Any]] = [
        {**options, "prompt": ["a cat", "a small dog"], "seed": [3, 4]},
        {**options, "prompt": "a dog", "negative_prompt": "bad", "seed": 9, "prior_num_inference_steps": 3},
        {**options, "prompt": "a mat", "guidance_scale": 1.0, "prior_guidance_scale": 1.0, "seed": 5},
    ]
    alone = [np.asarray(whole(**query).images) for query in queries]
    network, rows = whole.stages.prior.model, []  # type: ignore[union-attr]
    step = network.step

    def counted(model_input: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        rows.append(len(model_input))
        return step(model_input, *rest, **named)

    monkeypatch.setattr(network, "step", counted)
    with Session(whole, max_batch=8) as session:
        futures = [session.submit(**query) for query in queries]
        for future, expected in zip(futures, alone, strict=True):
            result = future.result()
            assert np.abs(np.asarray(result.images) - expected).max() < 1e-4
            assert len(result.timings.steps) == 2 + result.request.prior_num_inference_steps
        assert (session.stats().completed, session.stats().waiting) == (3, 0)
    assert max(rows) == 2 * 2 + 2 * 2 + 1
    assert len(rows) < 4 + 3 + 4
    invariant = np.asarray(Session(whole, batch_invariant=True).submit(**queries[0]).result().images)
    assert np.abs(invariant - alone[0]).max() < 1e-4


def test_a_prior_has_progress_and_no_callbacks(whole: Pipeline) -> None:
    steps: list[int] = []

    def record(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        assert tensors["latents"].shape == (1, 4, 16, 16)
        return tensors

    options = {**BASE, **PRIOR_STEPS, "prompt": "a cat", "seed": 1}
    plain = np.asarray(whole(**options).images)
    called = whole(callback_on_step_end=record, **options)
    assert steps == [0, 1, 2]
    assert np.abs(np.asarray(called.images) - plain).max() == 0
    generation = whole.session.submit(preview=True, **options)
    progress = list(generation.progress())
    assert [step.step for step in progress] == [*range(7)]
    assert {step.steps for step in progress} == {7}
    assert [step.preview is not None for step in progress] == 4 * [False] + 3 * [True]
    (text,) = result_parameters(generation.result(), "kandinsky")
    assert "Prior steps: 4, Prior CFG scale: 4" in text
    read, _ = parse_parameters(text)
    assert (read.prompt, read.prior_num_inference_steps, read.prior_guidance_scale) == ("a cat", 4, 4.0)


def test_a_prior_is_cancelled_interrupted_and_late(whole: Pipeline) -> None:
    options = {**BASE, "prompt": "a cat", "seed": 1, "prior_num_inference_steps": 900}
    generation = whole.session.submit(**options)
    next(generation.progress())
    assert generation.cancel()
    with pytest.raises(Cancelled, match="cancelled after"):
        generation.result(60)
    with pytest.raises(DeadlineExceeded):
        whole.session.submit(**options, deadline=0.2).result(60)
    generation = whole.session.submit(**options)
    next(generation.progress())
    generation.interrupt()
    result = generation.result(60)
    assert np.asarray(result.images).shape == (1, 64, 64, 3)
    assert len(result.timings.steps) < 900


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a cat", **vectors()}, "prompt was given, and this model reads image_embeds.*leave out the one"),
        ({"negative_image_embeds": torch.zeros(1, 20)}, "negative_image_embeds was given without image_embeds"),
        ({"prompt": "a cat", "prior_latents": torch.zeros(2, 20)}, r"prior_latents has shape \(2, 20\): expected \(1"),
        ({"prompt": "a cat", "prior_num_inference_steps": 0}, "prior_num_inference_steps is 0"),
        ({"prompt": "a cat", "hires_scale": 2}, "a high-resolution pass was asked for, and the vectors"),
        ({"prompt": "a cat", "candidates": 2}, "candidates was given"),
        ({"prior_guidance_scale": 2.0}, "prompt is None"),
        ({"image_embeds": torch.zeros(1, ip_adapters.PROJECTED), "prior_guidance_scale": 2.0, "guidance_scale": 1},
         "prior_guidance_scale was given, and no prior makes what this request reads"),
    ],
)  # fmt: skip
def test_with_a_prior_other_fields_are_refused(fields: dict[str, Any], message: str, whole: Pipeline) -> None:
    with pytest.raises(InputError, match=message):
        whole(**fields)


def test_priors_that_do_not_fit_are_refused(prior: KandinskyPrior, combined: Any) -> None:
    pipe = Pipeline.from_diffusers(kandinsky.decoder())
    with pytest.raises(InputError, match=f"the prior makes vectors of {ip_adapters.PROJECTED}, and the model reads"):
        pipe.attach_prior(prior)
    other = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    with pytest.raises(InputError, match="reads no vectors that a prior makes"):
        other.attach_prior(prior)
    with pytest.raises(InputError, match="prior_num_inference_steps was given, and no prior"):
        other("a cat", prior_num_inference_steps=3)
    attached = Pipeline.from_diffusers(combined.decoder_pipe)
    attached.attach_prior(prior)
    attached.detach_prior()
    with pytest.raises(InputError, match="prompt was given, and this model reads image_embeds"):
        attached("a cat")


# ------------------------------------------------------------------------------------------------- from a picture


def picture(k: int = 0, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, (side, side, 3), np.uint8))


def hole() -> Image.Image:
    white = np.zeros((64, 64), np.uint8)
    white[16:40, 8:48] = 255
    return Image.fromarray(white)


@pytest.fixture(scope="module", params=["Img2Img", "Inpaint"])
def from_picture(request: pytest.FixtureRequest, their_prior: Any) -> tuple[str, Any, Pipeline]:
    changes = {"in_channels": 9} if request.param == "Inpaint" else {}
    theirs = kandinsky.combined(their_prior, request.param, **changes)
    return request.param, theirs, Pipeline.from_diffusers(theirs)


def test_pictures_are_redone_and_repainted_as_by_diffusers(from_picture: tuple[str, Any, Pipeline]) -> None:
    kind, theirs, ours = from_picture
    own: dict[str, Any] = {"strength": 0.7} if kind == "Img2Img" else {"mask_image": hole()}
    options = {**BASE, **PRIOR_STEPS, **own, "prompt": ["a cat", "a small dog"], "image": [picture(1)] * 2}
    if kind == "Inpaint":  # which blends all with the first
        options |= {"mask_image": [hole()] * 2}
    made, expected = (np.asarray(each(generator=seeded(), **options).images) for each in (ours, theirs))
    assert made.shape == expected.shape == (2, 64, 64, 3)
    assert np.abs(made - np.clip(expected, 0, 1)).max() < 1e-3


@pytest.mark.full
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_with_vectors_equal_diffusers(from_picture: tuple[str, Any, Pipeline], guidance: float) -> None:
    kind, theirs, ours = from_picture
    own: dict[str, Any] = {"strength": 0.5} if kind == "Img2Img" else {"mask_image": hole()}
    options = {**BASE, **own, **vectors(1), "image": picture(2), "guidance_scale": guidance}
    made, expected = (np.asarray(each(generator=seeded(), **options).images) for each in (ours, theirs.decoder_pipe))
    assert np.abs(made - np.clip(expected, 0, 1)).max() < 1e-3


@pytest.mark.full
def test_each_vector_has_its_picture(from_picture: tuple[str, Any, Pipeline]) -> None:
    kind, theirs, ours = from_picture
    if kind == "Inpaint":
        return
    options = {**BASE, **vectors(2), "image": [picture(1), picture(2)], "num_images_per_prompt": 2, "strength": 0.6}
    made, expected = (np.asarray(each(generator=seeded(), **options).images) for each in (ours, theirs.decoder_pipe))
    assert np.abs(made - expected).max() < 1e-3


def test_pictures_that_do_not_fit_are_refused(from_picture: tuple[str, Any, Pipeline]) -> None:
    kind, _, ours = from_picture
    wrong: list[tuple[dict[str, Any], str]] = [({"strength": 0.5}, "strength was given")]
    if kind == "Inpaint":
        repainted = {"image": picture(), "mask_image": hole(), "strength": 0.5}
        wrong += [({}, "this model is for inpainting"), (repainted, "strength is 0.5: this model repaints from noise")]
    else:
        wrong += [({"image": picture(), "mask_image": hole()}, "mask_image was given, and this model reads")]
        assert ours.session.submit("a cat", image=picture(0, 100), seed=1).request.strength == 0.3
    for fields, message in wrong:
        with pytest.raises(InputError, match=message):
            ours("a cat", **fields)
    ours.warmup(sizes=[(64, 64)])


@pytest.fixture(scope="module")
def folders(combined: Any, their_prior: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kandinsky")
    combined.decoder_pipe.save_pretrained(path / "decoder")
    their_prior.save_pretrained(path / "prior")
    return path


def test_folders_of_prior_and_decoder_are_one_model(folders: Path, whole: Pipeline) -> None:
    loaded = Pipeline.from_pretrained(folders / "decoder", prior=folders / "prior", device="cpu", dtype="float32")
    options = {**BASE, **PRIOR_STEPS, "prompt": "a cat", "seed": 1}
    assert np.abs(np.asarray(loaded(**options).images) - np.asarray(whole(**options).images)).max() < 1e-5
    loaded.warmup(sizes=[(64, 64)])
    with pytest.raises(InputError, match="the prior makes vectors of"):  # before a weight is read
        Pipeline.from_diffusers(kandinsky.decoder()).attach_prior(folders / "prior")


def test_the_command_takes_a_prior(folders: Path, tmp_path: Path) -> None:
    models = ["-m", str(folders / "decoder"), "--prior", str(folders / "prior")]
    out, fields = tmp_path / "cat.png", ["--steps", "2", "--prior-steps", "3", "--prior-guidance", "2", "--seed", "4"]
    on_cpu = ["--device", "cpu", "--dtype", "float32"]
    made = run("generate", "a cat", *models, *fields, *on_cpu, "-o", str(out))
    assert made.exit_code == 0, made.output
    request, _ = parse_parameters(Image.open(out).info["parameters"])
    assert (request.prompt, request.prior_num_inference_steps, request.prior_guidance_scale) == ("a cat", 3, 2.0)
    planned = json.loads(run("plan", *models, *on_cpu, "--json").output)
    assert {"prior", "prior's text encoder", "prior's image encoder"} <= {line["name"] for line in planned["weights"]}
    assert "prior" in {line["name"] for line in planned["phases"]}
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a cat", "prior_num_inference_steps": 3, "seed": 4}')
    lines = ["batch", str(tmp_path / "lines.jsonl"), "-o", str(tmp_path / "out"), "--steps", "2", *models, *on_cpu]
    assert run(*lines).exit_code == 0
    refused = run("generate", "a cat", *models[:2], *on_cpu, "-o", str(out), "--force")
    assert "--prior attaches one" in refused.output


@pytest.mark.full
def test_warming_compiles_a_prior(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = ["warm", "-m", str(folders / "decoder"), "--arch", "sm_90", "--cache", str(tmp_path)]
    counts = []
    for more in ([], ["--prior", str(folders / "prior")]):
        warmed = run(*command, *more)
        assert warmed.exit_code == 0, warmed.output
        counts.append(int(warmed.output.split(": ")[-1].split()[0]))
    assert counts[1] > counts[0]


def test_the_server_shares_a_prior(folders: Path) -> None:
    models = {"one": str(folders / "decoder"), "two": str(folders / "decoder")}
    with clients.client(models=models, prior=str(folders / "prior"), device="cpu", dtype="float32") as http:
        wait_until(lambda: http.get("/ready").status_code == 200)
        first, second = (model.pipe.stages.prior for model in service_of(http).models)
        assert first is second is not None
        body = {"prompt": "a cat", "seed": 4, "num_inference_steps": 2, "prior_num_inference_steps": 3}
        answer = http.post("/v1/images/generations", json={**body, "size": "64x64", "prior_guidance_scale": 2})
        request, _ = parse_parameters(clients.picture(answer.json()["data"][0]["b64_json"]).info["parameters"])
        assert (request.prior_num_inference_steps, request.prior_guidance_scale) == (3, 2.0)
        many = http.post("/v1/images/generations", json={**body, "prior_num_inference_steps": 1000})
        assert "prior_num_inference_steps is 1000" in many.json()["error"]["message"]
