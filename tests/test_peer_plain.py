"""Models without a prompt (DDPM, DDIM, consistency models, latent diffusion and its super-resolution) against
diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clients
import diffusers
import numpy as np
import pytest
import tiny
import torch
from command import run
from pairs import close, generator
from PIL import Image

from fastldm import CheckpointError, InputError, Pipeline, Request, Session
from fastldm.metadata import parse_parameters
from fastldm.model import describe
from fastldm.planning import memory
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.slots import Slots, StaticBuffers

Options = dict[str, Any]
SIZES = {"LDMPipeline": 64, "LDMSuperResolutionPipeline": 128}


class Pairs:
    def __init__(self) -> None:
        self._loaded: dict[str, tuple[Any, Pipeline]] = {}

    def __call__(self, name: str) -> tuple[Any, Pipeline]:
        if name not in self._loaded:
            theirs = tiny.plain(name)
            self._loaded[name] = theirs, Pipeline.from_diffusers(theirs)
        return self._loaded[name]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs()


@pytest.fixture(scope="module")
def folders(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    for name in tiny.PLAIN:
        pairs(name)[0].save_pretrained(root / name)
    return {name: root / name for name in tiny.PLAIN}


def photo(width: int = 32, height: int = 32, seed: int = 1) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def needs(name: str) -> Options:
    return {"image": photo()} if name == "LDMSuperResolutionPipeline" else {}


CALLS: list[tuple[str, Options]] = [
    ("DDPMPipeline", {"batch_size": 2}),
    ("DDPMPipeline", {"num_inference_steps": 7}),
    ("DDIMPipeline", {"batch_size": 3}),
    ("DDIMPipeline", {"eta": 0.7, "batch_size": 2}),
    ("DDIMPipeline", {"eta": 1.0, "num_inference_steps": 6}),
    ("LDMPipeline", {"batch_size": 2}),
    ("LDMPipeline", {"eta": 0.5, "num_inference_steps": 5}),
    ("ConsistencyModelPipeline", {"class_labels": 3}),
    ("ConsistencyModelPipeline", {"class_labels": [3, 9], "batch_size": 2}),
    ("ConsistencyModelPipeline", {"class_labels": torch.tensor([1, 0]), "batch_size": 2, "num_inference_steps": 1}),
    ("ConsistencyModelPipeline", {"class_labels": [5], "timesteps": [22, 0], "num_inference_steps": None}),
    ("ConsistencyModelPipeline", {"class_labels": [5], "latents": torch.randn(1, 3, 16, 16, generator=generator(2))}),
    ("LDMSuperResolutionPipeline", {"image": photo()}),
    ("LDMSuperResolutionPipeline", {"image": photo(71, 40), "eta": 1.0}),
    ("LDMSuperResolutionPipeline", {"image": torch.rand(2, 3, 32, 16, generator=generator(4)) * 2 - 1}),
]
FEW = (0, 3, 6, 8, 13)


@pytest.mark.parametrize(
    ("name", "options"),
    [call if k in FEW else pytest.param(*call, marks=pytest.mark.full) for k, call in enumerate(CALLS)],
)
def test_plain_model_equals_diffusers(name: str, options: Options, pairs: Pairs) -> None:
    """Latent diffusion's pipelines draw the noise of steps from the global generator, which here draws all."""
    theirs, ours = pairs(name)
    images = []
    for each in (ours, theirs):
        torch.manual_seed(3)
        call = {"num_inference_steps": 3, "output_type": "np", **options}
        images.append(each(**call, generator=torch.default_generator).images)
    close(*images)


def test_table_of_timesteps_equals_diffusers() -> None:
    """`time_embedding_type` "learned": whole timesteps alone."""
    unet = tiny.plain_unet(time_embedding_type="learned", num_train_timesteps=1000)
    theirs = tiny.plain("DDPMPipeline", unet=unet)
    ours = Pipeline.from_diffusers(theirs)
    options: Options = {"num_inference_steps": 3, "output_type": "np"}
    close(*(each(**options, generator=generator()).images for each in (ours, theirs)))
    with pytest.raises(InputError, match="a vector for each of 1000 whole timesteps"):
        ours(**options, sampler="euler", timesteps=[900.5, 20.0])


@pytest.mark.parametrize("name", ["DDPMPipeline", "ConsistencyModelPipeline"])
def test_a_list_of_generators_equals_diffusers(name: str, pairs: Pairs) -> None:
    theirs, ours = pairs(name)
    options: Options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    options |= {"class_labels": [4, 2]} if name == "ConsistencyModelPipeline" else {}
    close(*(each(**options, generator=[generator(1), generator(2)]).images for each in (ours, theirs)))


@pytest.mark.full
@pytest.mark.parametrize("output_type", ["pil", "pt"])
@pytest.mark.parametrize("name", ["DDPMPipeline", "ConsistencyModelPipeline"])
def test_outputs_are_of_diffusers_types(name: str, output_type: str, pairs: Pairs) -> None:
    theirs, ours = pairs(name)
    options: Options = {"batch_size": 2, "num_inference_steps": 2, "output_type": output_type, "return_dict": False}
    options |= {"class_labels": [4, 2]} if name == "ConsistencyModelPipeline" else {}
    (mine,), (expected,) = (each(**options, generator=generator(1)) for each in (ours, theirs))
    assert type(mine) is type(expected)
    close(*(np.stack([np.asarray(image, dtype=np.float64) for image in each]) for each in (mine, expected)))


@pytest.mark.full
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_ddim_pipeline_runs_any_scheduler_as_ddim(scheduler: str, tmp_path: Path) -> None:
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample_range": 0.8}
    theirs = tiny.plain("DDIMPipeline", scheduler=getattr(diffusers, scheduler)(**options))
    tiny.plain("DDPMPipeline", scheduler=getattr(diffusers, scheduler)(**options)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDIMPipeline"}))
    ours = Pipeline.from_pretrained(tmp_path, dtype="float32")
    assert index["scheduler"][1] == scheduler
    call: Options = {"num_inference_steps": 5, "output_type": "np", "eta": 0.3}
    close(*(each(**call, generator=generator(2)).images for each in (ours, theirs)))


def test_learned_variance_equals_diffusers() -> None:
    """As of ADM and of improved DDPM, whose networks make it beside the noise."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2")
    theirs = tiny.plain("DDPMPipeline", scheduler=scheduler, unet=tiny.plain_unet(out_channels=6))
    call: Options = {"num_inference_steps": 4, "output_type": "np", "batch_size": 2}
    close(*(each(**call, generator=generator(2)).images for each in (Pipeline.from_diffusers(theirs), theirs)))


@torch.no_grad()
def test_class_conditional_ddim_is_a_plain_loop() -> None:
    """diffusers' DDIMPipeline gives its U-Net no classes: the loop with them is the judge."""
    unet = tiny.plain_unet(num_class_embeds=7, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8)
    unet.class_embedding.weight.data *= 3
    theirs = tiny.plain("DDIMPipeline", unet=unet)
    ours = Pipeline.from_diffusers(theirs)
    x = torch.cat([torch.randn(1, 3, 16, 16, generator=generator(seed)) for seed in (4, 5)])
    scheduler = theirs.scheduler
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, class_labels=torch.tensor([6, 2])).sample, t, x).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    options: Options = {"num_inference_steps": 3, "output_type": "np"}
    close(ours(batch_size=2, seed=4, class_labels=[6, 2], **options).images, expected)
    alone = [ours(seed=seed, class_labels=label, **options).images[0] for seed, label in ((4, 6), (5, 2))]
    assert np.abs(np.stack(alone) - expected).max() < 1e-3
    other = ours(batch_size=2, seed=4, class_labels=[6, 3], **options).images
    assert np.abs(other[0] - expected[0]).max() < 1e-3 < np.abs(other[1] - expected[1]).max()


def test_requests_of_different_classes_share_steps(pairs: Pairs) -> None:
    _, ours = pairs("ConsistencyModelPipeline")
    options: list[Options] = [
        {"class_labels": k, "seed": k, "num_inference_steps": 2 + k % 2, "output_type": "np"} for k in range(4)
    ]
    with Session(ours, max_batch=4) as session:
        futures = [session.submit(**each) for each in options]
        together = [future.result().images for future in futures]
    for each, images in zip(options, together, strict=True):
        assert np.abs(ours(**each).images - images).max() < 1e-3


def test_slots_have_a_class_each(pairs: Pairs) -> None:
    """As on a GPU: two requests of two classes and numbers of steps in static buffers."""
    stages = pairs("ConsistencyModelPipeline")[1].stages
    requests = [Request(class_labels=k, seed=k, num_inference_steps=1 + k) for k in (1, 2)]
    completed = [stages.complete(request) for request in requests]
    sizes = {"height": 16, "width": 16, "tokens": 1, "steps": 3}
    buffers = StaticBuffers.empty(stages.spec.unet, slots=2, rows=2, **sizes, dtype=torch.float32, device="cpu")
    latents = []
    for batch in (Slots(stages.unet, buffers), EagerBatch(stages.unet)):
        runs = [stages.prepare(request) for request in completed]
        for each in runs:
            batch.admit(each)
        while any(not each.done for each in runs):
            batch.step([each for each in runs if not each.done])
        latents.append(torch.cat([batch.latents(each) for each in runs]))
    assert torch.allclose(*latents, atol=1e-4 * float(latents[0].abs().max()))


def test_server_takes_classes(pairs: Pairs) -> None:
    _, ours = pairs("ConsistencyModelPipeline")
    expected = np.asarray(ours(class_labels=[3, 8], batch_size=2, seed=5).images[1]).astype(int)
    with clients.client(ours, models={"plain": "default"}) as http:
        body = {"prompt": "", "n": 2, "class_labels": [3, 8], "seed": 5}
        answer = http.post("/v1/images/generations", json=body).json()
        made = np.asarray(clients.picture(answer["data"][1]["b64_json"])).astype(int)
        assert np.abs(made - expected).max() <= 1
        for wrong, message in (({"class_labels": 99}, "classes from 0 to 9"), ({"prompt": "a cat"}, "reads no text")):
            answer = http.post("/v1/images/generations", json={**body, **wrong})
            assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True)


def test_classes_are_drawn_of_each_seed(pairs: Pairs) -> None:
    _, ours = pairs("ConsistencyModelPipeline")
    labels = ours(batch_size=4, seed=11).request.class_labels
    assert labels == tuple(ours(seed=11 + k).request.class_labels[0] for k in range(4))
    assert len({ours(seed=seed).request.class_labels for seed in range(8)}) > 2
    torch.manual_seed(5)
    expected = tuple(torch.randint(0, 10, size=(2,)).tolist())
    torch.manual_seed(5)
    assert ours(batch_size=2, generator=generator(1)).request.class_labels == expected


@pytest.mark.parametrize("name", tiny.PLAIN)
def test_plain_folder_is_the_adopted_model(name: str, pairs: Pairs, folders: dict[str, Path]) -> None:
    loaded, (_, adopted) = Pipeline.from_pretrained(folders[name], dtype="float32"), pairs(name)
    assert loaded.stages.spec.default_size == (SIZES.get(name, 16),) * 2
    assert not loaded.text_stages
    options: Options = {"num_inference_steps": 2, "seed": 4, "output_type": "np", **needs(name)}
    made = loaded(**options).images
    assert np.array_equal(made, adopted(**options).images)
    assert made.shape == (1, SIZES.get(name, 16), SIZES.get(name, 16), 3)
    if name == "LDMPipeline":
        encoded = loaded(image=photo(64, 64), strength=0.5, **options).images
        assert np.abs(encoded - made).max() > 0.01


def test_defaults_are_diffusers_ones(folders: dict[str, Path]) -> None:
    steps = {name: describe(folder).family.num_inference_steps for name, folder in folders.items()}
    assert steps == {
        "DDPMPipeline": 1000,
        "DDIMPipeline": 50,
        "ConsistencyModelPipeline": 1,
        "LDMPipeline": 50,
        "LDMSuperResolutionPipeline": 100,
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDPMPipeline", {"prompt": "a cat"}, "prompt is 'a cat': this model reads no text"),
        ("DDPMPipeline", {"negative_prompt": "a cat"}, "negative_prompt is 'a cat': this model reads no text"),
        ("DDPMPipeline", {"guidance_scale": 3.0}, "guidance_scale is 3: this model reads no text"),
        ("DDPMPipeline", {"class_labels": 3}, "class_labels is 3: only class-conditional models"),
        ("DDPMPipeline", {"pag_scale": 3.0}, "pag_scale is 3: this model has no self-attention before"),
        ("DDPMPipeline", {"apg_rescale": 15.0}, "this model reads no text to be guided by"),
        ("DDPMPipeline", {"sampler": "euler cfg++"}, "is CFG\\+\\+, and this model reads no text"),
        ("DDPMPipeline", {"candidates": 3}, "candidates is 3: they are ranked by a prompt"),
        ("DDPMPipeline", {"noise_level": 3}, "noise_level is 3: only models that enlarge"),
        ("DDPMPipeline", {"batch_size": 2, "num_images_per_prompt": 2}, "were both given"),
        ("DDPMPipeline", {"batch_size": 2, "prompt": ""}, "batch_size counts images of models that read no prompt"),
        ("DDPMPipeline", {"batch_size": 0}, "batch_size is 0: expected a whole number"),
        ("DDIMPipeline", {"use_clipped_model_output": True}, "use_clipped_model_output is not supported"),
        ("ConsistencyModelPipeline", {"class_labels": 10}, "class_labels is 10: expected classes from 0 to 9"),
        ("ConsistencyModelPipeline", {"class_labels": [1, 2]}, "class_labels has 2 classes for 1 images"),
        ("ConsistencyModelPipeline", {"class_labels": -1}, "class_labels is -1: expected a whole number"),
        ("ConsistencyModelPipeline", {"class_labels": torch.rand(1)}, "expected a tensor of whole numbers"),
        ("ConsistencyModelPipeline", {"sampler": "ddim"}, "a consistency model"),
        ("LDMSuperResolutionPipeline", {}, "this model enlarges an image: give it image"),
        ("LDMSuperResolutionPipeline", {"image": photo(), "width": 64}, "this model makes 4 times the picture"),
        ("LDMPipeline", {"width": 30}, "width is 30: expected a multiple of 4"),
    ],
)
def test_what_plain_models_do_not_read_is_named(name: str, options: Options, message: str, pairs: Pairs) -> None:
    with pytest.raises(InputError, match=message):
        pairs(name)[1](**options)


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("DDPMPipeline", {"unet": ["diffusers", "UNet2DConditionModel"]}, "unet is a UNet2DConditionModel"),
        ("DDPMPipeline", {"vae": ["diffusers", "AutoencoderKL"]}, "has vae"),
        ("LDMPipeline", {"vqvae": [None, None]}, "has no vqvae"),
        ("DDPMPipeline", {"_class_name": "ScoreSdeVePipeline"}, "is a ScoreSdeVePipeline: score SDE"),
        ("LDMPipeline", {"_class_name": "LDMSuperResolutionPipeline"}, "has 3 input channels .* has 6"),
        ("LDMSuperResolutionPipeline", {"_class_name": "LDMPipeline"}, "has 6 input channels .* has 3"),
    ],
)
def test_other_plain_folders_are_refused_by_name(
    name: str, index: Options, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for path in folders[name].iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    listed = json.loads((folders[name] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**listed, **index}))
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path)


def test_plain_models_are_planned(folders: dict[str, Path], pairs: Pairs) -> None:
    for name, folder in folders.items():
        spec = describe(folder)
        width, height = spec.default_size
        workload: Options = {"width": width, "height": height, "batch": 2, "dtype": torch.float32, "arch": 0}
        plan = memory.plan(memory.Workload.of_spec(spec, **workload))
        assert plan.needed > 4 * spec.parameters
        assert not any(line.name == "text" and line.bytes for line in plan.phases)
        pairs(name)[1].warmup()


def test_command_needs_no_prompt(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("generate", "-m", str(folders["DDPMPipeline"]), "--steps", "2", "--seed", "4", "--n", "2", "-o", "a.png")
    assert done.exit_code == 0, done.stderr
    assert Image.open("a-1.png").size == (16, 16)
    model = str(folders["ConsistencyModelPipeline"])
    done = run("generate", "-m", model, "--class-label", "3", "--class-label", "8", "--n", "2", "-o", "b.png")
    assert done.exit_code == 0, done.stderr
    requests = [parse_parameters(Image.open(f"b-{k}.png").info["parameters"])[0] for k in range(2)]
    assert [request.class_labels for request in requests] == [3, 8]
    refused = run("generate", "a cat", "-m", model)
    assert refused.exit_code != 0
    assert "this model reads no text" in refused.stderr
    planned = run("plan", "-m", model, "--device", "cpu")
    assert planned.exit_code == 0, planned.stderr
    profiled = run("profile", "-m", model, "--device", "cpu", "--rounds", "1")
    assert profiled.exit_code == 0, profiled.stderr
