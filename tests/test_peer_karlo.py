"""Karlo beside diffusers' two pipelines: a prior, a decoder, and super-resolution that ends with another network."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import clients
import ip_adapters
import karlo
import numpy as np
import pytest
import torch
from both_ways import both_ways
from command import run
from judged import changed_copy, hub_copy, judged
from PIL import Image

from fastldm import Pipeline, Session
from fastldm.errors import CheckpointError, InputError
from fastldm.model import describe
from fastldm.models.unet import UNet
from fastldm.planning import cascade, memory, warm
from fastldm.request import Request

peer, pipe, folder = judged(karlo.karlo)
Options = dict[str, Any]
WIDTH = ip_adapters.PROJECTED


@pytest.fixture(scope="module")
def judge(peer: Any, pipe: Pipeline) -> Any:
    return karlo.exact(peer)


@pytest.fixture(scope="module")
def variation() -> tuple[Pipeline, Any]:
    """Ours and diffusers'."""
    theirs = karlo.karlo(variation=True)
    return Pipeline.from_diffusers(theirs), karlo.exact(theirs)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8))


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STEPS = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 3}
PRIOR_STEPS = {**STEPS, "prior_num_inference_steps": 3}


def both(ours: Pipeline, theirs: Any, **options: Any) -> None:
    """Equal images, and generators that have drawn the same. At the first step, of almost noise alone, a picture is
    predicted as a difference of nearly equal numbers times 20,000: of few pixels float32's last bits are seen."""
    many, made, states = options.pop("generator", None) == "list", [], []
    for pipeline in (ours, theirs):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)[: 1 + many]]
        generator: Any = generators if many else generators[0]
        made.append(np.asarray(pipeline(**options, generator=generator, output_type="np").images))
        states.append([each.get_state() for each in generators])
    assert made[0].shape == made[1].shape
    difference = np.abs(made[0] - made[1])
    assert difference.max() < 5e-3
    assert difference.mean() < 1e-5
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


CALLS: dict[str, Options] = {
    "plain": {},
    "several prompts": {"prompt": ["a cat", "a dog of two words"], "num_images_per_prompt": 2},
    "unguided": {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0},
    "unguided prior": {"prior_guidance_scale": 1.0},
    "unguided decoder": {"decoder_guidance_scale": 1.0, "prior_guidance_scale": 6.0},
    "two super-resolution steps": {"super_res_num_inference_steps": 2},
    "other steps": {
        "prior_num_inference_steps": 2,
        "decoder_num_inference_steps": 5,
        "super_res_num_inference_steps": 7,
    },
    "latents": {
        "prior_latents": noise(1, WIDTH),
        "decoder_latents": noise(1, 3, karlo.SMALL, karlo.SMALL, seed=2),
        "super_res_latents": noise(1, 3, karlo.LARGE, karlo.LARGE, seed=3),
    },
    "generators": {"num_images_per_prompt": 2, "generator": "list"},
}
FEW = ("several prompts", "latents")


@pytest.mark.parametrize(
    "case", [case if case in FEW else pytest.param(case, marks=pytest.mark.full) for case in CALLS]
)
def test_karlo_equals_diffusers(case: str, judge: Any, pipe: Pipeline) -> None:
    both(pipe, judge, **{"prompt": "a cat", **PRIOR_STEPS, **CALLS[case]})


GRID: dict[str, list[Any]] = {
    "prompt": ["a cat", ["a cat", "a dog"]],
    "num_images_per_prompt": [1, 2],
    "prior_guidance_scale": [1.0, 4.0],
    "decoder_guidance_scale": [1.0, 8.0],
    "prior_latents": [False, True],
    "decoder_latents": [False, True],
    "super_res_latents": [False, True],
    "generator": [None, "list"],
}
SHAPES = {
    "prior_latents": (WIDTH,),
    "decoder_latents": (3, karlo.SMALL, karlo.SMALL),
    "super_res_latents": (3, karlo.LARGE, karlo.LARGE),
}


def grid(names: list[str]) -> list[Options]:
    cases = []
    for values in itertools.product(*(GRID[name] for name in names)):
        options = dict(zip(names, values, strict=True))
        prompts = 2 if isinstance(options.get("prompt"), list) else 1
        count = options["num_images_per_prompt"] * prompts
        for seed, (name, shape) in enumerate(SHAPES.items()):
            options[name] = noise(count, *shape, seed=seed) if options.get(name) else None
        if options["generator"] is None or count == 2:
            cases.append({name: value for name, value in options.items() if value is not None})
    return cases


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_arguments_grid_equals_diffusers(part: int, judge: Any, pipe: Pipeline) -> None:
    cases = grid(list(GRID))
    assert len(cases) == 192
    for options in cases[part::4]:
        both(pipe, judge, **PRIOR_STEPS, **options)


VARIATIONS: dict[str, Options] = {
    "a picture": {"image": picture(), "num_images_per_prompt": 2},
    "pictures": {"image": [picture(1), picture(2)]},
    "a tensor": {"image": noise(2, 3, 32, 32), "decoder_guidance_scale": 1.0},
    "vectors": {"image_embeddings": noise(2, WIDTH), "decoder_guidance_scale": 3.0},
}


@pytest.mark.parametrize(
    "case", [case if case == "a picture" else pytest.param(case, marks=pytest.mark.full) for case in VARIATIONS]
)
def test_variations_equal_diffusers(case: str, variation: tuple[Pipeline, Any]) -> None:
    both(*variation, **STEPS, **VARIATIONS[case])


@pytest.mark.full
def test_arguments_grid_of_variations_equals_diffusers(variation: tuple[Pipeline, Any]) -> None:
    names = ["num_images_per_prompt", "decoder_guidance_scale", "decoder_latents", "super_res_latents", "generator"]
    cases = grid(names)
    assert len(cases) == 24
    for options in cases:
        options.pop("prior_latents", None)
        both(*variation, image=picture(), **STEPS, **options)


def test_prompt_and_vector_reach_the_pictures(pipe: Pipeline) -> None:
    """Else small random networks would hide what is lost; requests share their steps."""
    options: Options = {**PRIOR_STEPS, "output_type": "np", "seed": 3}
    alone = np.asarray(pipe("a cat", **options).images)
    assert np.abs(np.asarray(pipe("a small dog", **options).images) - alone).max() > 1e-3
    assert np.abs(np.asarray(pipe("a cat", **options, prior_guidance_scale=9.0).images) - alone).max() > 1e-3
    with Session(pipe) as session:
        made = [session.submit(text, **options) for text in ("a cat", "a dog", "a cat on a mat of two words")]
        assert np.abs(np.asarray(made[0].result().images) - alone).max() < 1e-5
    pairs = pipe(["a dog", "a cat"], **{**options, "seed": [1, 3]})
    assert np.abs(np.asarray(pairs.images)[1:] - alone).max() < 1e-5


def test_requests_share_the_steps_of_every_stage(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[int]] = {}
    assert pipe.stages.prior is not None
    networks = {"prior": pipe.stages.prior.model, "decoder": pipe.unet}
    networks |= {each.name: each.unet for each in pipe.stages.follows}
    for name, network in networks.items():

        def step(x: torch.Tensor, *rest: Any, own: Any = network.step, name: str = name, **options: Any) -> Any:
            rows.setdefault(name, []).append(len(x))
            return own(x, *rest, **options)

        monkeypatch.setattr(network, "step", step)
    submitted = threading.Event()
    with Session(pipe) as session:
        waiting = threading.Thread(target=session.call, args=(submitted.wait,))
        waiting.start()  # until both are there
        steps = {**PRIOR_STEPS, "super_res_num_inference_steps": 9}
        made = [session.submit(text, seed=3, **steps) for text in ("a cat", "a dog on a mat")]
        submitted.set()
        assert all(each.result().images for each in made)
        waiting.join()
    # The second joins a step behind the first. Of prior and decoder two rows are a picture's, of the others one.
    most = {name: max(counts) for name, counts in rows.items() if name != "super_res_last"}
    assert most == {"prior": 4, "decoder": 4, "super_res_first": 2}
    assert {name: sum(counts) for name, counts in rows.items()} == {
        "prior": 12,
        "decoder": 12,
        "super_res_first": 16,
        "super_res_last": 2,
    }


def test_steps_of_all_stages_are_told(pipe: Pipeline) -> None:
    seen: list[tuple[int, float]] = []
    result = pipe(
        "a cat", seed=0, **PRIOR_STEPS, callback_on_step_end=lambda p, step, t, kw: seen.append((step, t)) or {}
    )
    assert len(result.timings.steps) == 9
    assert [t for _, t in seen[-3:]] == [999, 500, 0]  # the last is another network's
    assert (result.request.width, result.request.height) == result.images[0].size == (karlo.LARGE, karlo.LARGE)
    assert (result.request.num_inference_steps, result.request.super_res_num_inference_steps) == (3, 3)


def test_a_folder_runs_as_the_adopted_one(folder: Path, tmp_path: Path, pipe: Pipeline) -> None:
    loaded = Pipeline.from_pretrained(hub_copy(folder, tmp_path), device="cpu", dtype="float32")
    spec = loaded.stages.spec
    assert (loaded.family.name, spec.default_size, spec.own_size) == ("karlo", (16, 16), (8, 8))
    assert loaded.stages.weight_bytes == 4 * spec.parameters
    defaults = loaded.stages.complete(Request("a cat"))
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (25, 8.0)
    assert (defaults.prior_num_inference_steps, defaults.prior_guidance_scale) == (25, 4.0)
    options = {**PRIOR_STEPS, "seed": 1, "output_type": "np"}
    ours, adopted = (np.asarray(each("a cat", **options).images) for each in (loaded, pipe))
    assert np.abs(ours - adopted).max() < 1e-6


def test_slots_make_the_same_latents(pipe: Pipeline) -> None:
    """As a GPU takes the steps: each row reads its own tokens of a text."""
    stages = pipe.stages
    small = stages.complete(Request("a small dog on a mat", seed=1, num_inference_steps=2))
    large = stages.follows[0].complete(Request(image=picture(), seed=2, num_inference_steps=2))
    parts = ((stages, small.replace(image_embeds=noise(1, WIDTH)), 2), (stages.follows[0], large, 1))
    for own, request, rows in parts:
        in_a_slot, eager = both_ways(own, request, rows=rows, tokens=own.spec.window)
        assert torch.allclose(in_a_slot, eager, atol=1e-4)


@pytest.mark.full
def test_images_are_as_if_made_alone(pipe: Pipeline) -> None:
    options: Options = {**PRIOR_STEPS, "output_type": "np"}
    with Session(pipe, batch_invariant=True) as session:
        both = session.submit(["a cat", "a dog on a mat"], seed=[5, 6], **options).result().images
        alone = session.submit("a dog on a mat", seed=6, **options).result().images
    assert np.array_equal(both[1:], alone)


REFUSED: dict[str, tuple[str, Options]] = {
    "negative_prompt": ("negative_prompt was given, and this model reads prompts alone", {"negative_prompt": "bad"}),
    "a picture": ("image was given, and this model's prior reads a prompt", {"image": picture()}),
    "embeds": ("prompt_embeds was given", {"prompt": None, "prompt_embeds": torch.zeros(1, 77, WIDTH)}),
    "width": ("width is 64: expected 16, the size of this model's pictures", {"width": 64}),
    "hires": ("hires_scale was given, and networks of its own enlarge", {"hires_scale": 2}),
    "a part": ("denoising_end was given, and networks of its own enlarge", {"denoising_end": 0.5}),
    "one step": ("takes two steps or more", {"super_res_num_inference_steps": 1}),
    "latents": ("super_res_latents have shape", {"super_res_latents": torch.zeros(1, 3, 8, 8)}),
    "both names": ("decoder_guidance_scale and guidance_scale were both given", {"decoder_guidance_scale": 2.0}),
    "text output": ("text_model_output is not supported: give prompt", {"text_model_output": (1, 2)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(case: str, pipe: Pipeline) -> None:
    message, fields = REFUSED[case]
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "a cat", **({"guidance_scale": 3.0} if case == "both names" else {}), **fields})


def test_other_models_refuse_super_resolution() -> None:
    with pytest.raises(InputError, match="super_res_num_inference_steps was given, and this model has no"):
        Pipeline.default(dtype="float32")("a cat", super_res_num_inference_steps=3)


def test_variations_refuse_prompts_and_priors(variation: tuple[Pipeline, Any], tmp_path: Path) -> None:
    ours, _ = variation
    with pytest.raises(InputError, match="prompt was given, and this model reads"):
        ours("a cat", image=picture())
    with pytest.raises(InputError, match="prior_guidance_scale was given, and no prior"):
        ours(image=picture(), prior_guidance_scale=2.0)
    with pytest.raises(InputError, match="a text projection makes what its U-Net reads"):
        ours.export(tmp_path / "bundle")


def test_exports_and_adapters_are_refused(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a text projection makes what its U-Net reads, and is not exported"):
        pipe.export(tmp_path / "bundle")
    with pytest.raises(InputError, match=r"a refiner is attached|the refiner's latents"):
        pipe.session.submit("a cat", refiner=Pipeline.default(dtype="float32").session)
    with pytest.raises(CheckpointError, match="and that of UnCLIPPipeline is unCLIP's"):
        pipe.load_lora_weights("sketch")
    with pytest.raises(InputError, match="textual inversion is not for unCLIP's networks"):
        pipe.load_textual_inversion(torch.zeros(WIDTH), token="<t>")
    exported = run("export", "-m", str(folder), str(tmp_path / "out"))
    assert exported.exit_code != 0
    assert "is not exported" in exported.stderr


MISFITS: list[tuple[str, Options, str]] = [
    ("text_proj/config.json", {"clip_embeddings_dim": 24}, "text_proj reads vectors and texts of 24 channels"),
    ("text_proj/config.json", {"time_embed_dim": 48}, "the decoder reads 64 and 32"),
    ("decoder/config.json", {"class_embed_type": None}, "is no decoder of a UnCLIPPipeline"),
    ("decoder/config.json", {"in_channels": 7}, "the decoder reads 7 channels"),
    ("super_res_first/config.json", {"in_channels": 3}, "has 3 input channels"),
    ("super_res_last/config.json", {"sample_size": 32}, "whose last step it takes"),
    ("super_res_last/config.json", {"num_class_embeds": 5}, "reads a class, and enlarges a picture"),
    ("prior/config.json", {"embedding_dim": 24}, "text_encoder makes 77 of 20"),
    ("decoder_scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler"}, "has an UnCLIPScheduler"),
    ("decoder_scheduler/scheduler_config.json", {"variance_type": "fixed_small_log"}, "makes 6"),
    ("model_index.json", {"super_res_last": [None, None]}, "has no super_res_last"),
    ("model_index.json", {"text_proj": [None, None]}, "has no text_proj"),
]


@pytest.mark.parametrize(("file", "values", "message"), MISFITS)
def test_misfits_are_refused(file: str, values: Options, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        describe(changed_copy(folder, tmp_path, file, values))


def test_plans_count_all_networks(peer: Any, pipe: Pipeline, folder: Path) -> None:
    spec = describe(folder)
    first = memory.Workload.of_spec(spec, width=8, height=8, batch=1, dtype=torch.float32, arch=0)
    planned = cascade.of_model(spec, "karlo", first, batch=1, dtype=torch.float32, arch=0)
    assert [stage.model for stage in planned.stages] == ["karlo", "super_res_first", "super_res_last"]
    networks = [part for part in peer.components.values() if isinstance(part, torch.nn.Module)]
    total = 4 * sum(p.numel() for network in networks for p in network.parameters())
    assert planned.weights == total == 4 * spec.parameters
    loaded = memory.Workload.of_stages(pipe.stages, width=8, height=8, batch=1, guided=True)
    assert {line.name for line in memory.plan(loaded).weights} >= {"prior", "text projection"}


_LEVELS: Options = {"layers_per_block": 3, "block_out_channels": [320, 640, 960, 1280]}
PUBLISHED: dict[str, Options] = {  # of kakaobrain/karlo-v1-alpha
    "decoder": {
        **_LEVELS,
        "sample_size": 64,
        "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        "cross_attention_dim": 1536,
        "attention_head_dim": 64,
        "norm_num_groups": 32,
    },
    **{
        name: {
            **_LEVELS,
            "sample_size": 256,
            "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
            "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
            "norm_num_groups": 32,
            "resnet_time_scale_shift": "default",
        }
        for name in ("super_res_first", "super_res_last")
    },
    "text_proj": {
        "clip_extra_context_tokens": 4,
        "clip_embeddings_dim": 768,
        "time_embed_dim": 1280,
        "cross_attention_dim": 1536,
    },
    "prior": {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20, "embedding_dim": 768},
    "text_encoder": {"hidden_size": 768, "projection_dim": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}


@pytest.mark.full
def test_published_sizes_are_planned(folder: Path, tmp_path: Path) -> None:
    """Of configs alone, without the weights."""
    for k, (name, values) in enumerate(PUBLISHED.items()):
        (tmp_path / str(k)).mkdir()
        folder = changed_copy(folder, tmp_path / str(k), f"{name}/config.json", values)
    spec = describe(folder)
    assert (spec.own_size, spec.default_size, spec.window) == ((64, 64), (256, 256), 81)
    with torch.device("meta"):
        decoder = UNet(spec.unet)
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6) == 885
    assert spec.prior is not None
    planned = run("plan", "-m", str(folder), "--arch", "sm_90")
    assert planned.exit_code == 0, planned.stderr
    assert "1 x 256x256, 7 steps" in planned.stdout
    assert "1 x 64x64, guided, 25 steps" in planned.stdout


def test_commands_make_and_plan(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--steps", "2", "--super-res-steps", "2", "--seed", "4", "-o", "a.png")
    done = run("generate", "a cat", "-m", str(folder), *options)
    assert done.exit_code == 0, done.stderr
    assert Image.open("a.png").size == (16, 16)
    planned = run("plan", "-m", str(folder), "--device", "cpu")
    assert planned.exit_code == 0, planned.stderr
    assert "3 stages, one after the other" in planned.stdout
    refused = run("plan", "-m", str(folder), "--device", "cpu", "--size", "64x64")
    assert "--size is not for this model, whose own networks make pictures of 16x16" in refused.stderr


@pytest.mark.full
def test_command_makes_variations(variation: tuple[Pipeline, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    karlo.karlo(variation=True).save_pretrained("karlo")
    picture().save("in.png")
    options = ("--steps", "2", "--n", "2", "--seed", "4", "--dtype", "float32", "-o", "a.png")
    done = run("generate", "-m", "karlo", "--image", "in.png", *options)
    assert done.exit_code == 0, done.stderr
    made = variation[0](image=picture(), num_inference_steps=2, num_images_per_prompt=2, seed=4).images
    read = [np.asarray(Image.open(path)).astype(int) for path in sorted(tmp_path.glob("a*.png"))]
    assert all(
        np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1 for ours, theirs in zip(read, made, strict=True)
    )


def test_servers_make_pictures_and_variations(pipe: Pipeline, variation: tuple[Pipeline, Any]) -> None:
    steps = {"num_inference_steps": 2, "super_res_num_inference_steps": 2, "seed": 3}
    with clients.client(pipe, models={"karlo": "default"}) as http:
        answer = http.post("/v1/images/generations", json={"prompt": "a cat", **steps}).json()
        made = np.asarray(clients.picture(answer["data"][0]["b64_json"])).astype(int)
        assert np.abs(made - np.asarray(pipe("a cat", **steps).images[0]).astype(int)).max() <= 1
        body = {"prompt": "a cat", "steps": 2, "seed": 3, "cfg_scale": 8, "width": 512, "height": 512}
        assert clients.picture(http.post("/sdapi/v1/txt2img", json=body).json()["images"][0]).size == (16, 16)
        refused = http.post("/v1/images/generations", json={"prompt": "a cat", "size": "64x64"})
        assert refused.status_code == 400
        assert "expected 16" in refused.json()["error"]["message"]
    with clients.client(variation[0], models={"karlo": "default"}) as http:
        files = {"image": clients.file(picture())}
        answer = http.post("/v1/images/variations", data=steps, files=files).json()
        made = np.asarray(clients.picture(answer["data"][0]["b64_json"])).astype(int)
        expected = np.asarray(variation[0](image=picture(), **steps).images[0]).astype(int)
        assert np.abs(made - expected).max() <= 1


def test_warm_ups_run_all_stages(
    variation: tuple[Pipeline, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variation[0].warmup()
    assert variation[0].weights_changed() == []
    warmed: list[tuple[str, Any]] = []
    monkeypatch.setattr(warm, "warm", lambda spec, _, sizes, **__: warmed.append((spec.component, sizes)) or 1)
    done = run("warm", "-m", str(folder), "--arch", "sm_90")
    assert done.exit_code == 0, done.stderr
    assert warmed == [("unet", [(8, 8)]), ("super_res_first", [(16, 16)]), ("super_res_last", [(16, 16)])]
    refused = run("warm", "-m", str(folder), "--arch", "sm_90", "--size", "64x64")
    assert "this model's own networks make pictures of 16x16" in refused.stderr
