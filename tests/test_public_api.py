"""What callers rely on stays: names, arguments and fields of the package, and the keys of what the command prints.

Whoever changes a list here changes what users see, and says so in CHANGELOG.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from typing import Any

import pytest
from command import run

import fastldm
from fastldm.profiling.compare import Contender, Row
from fastldm.request import Timings

NAMES = """
BundleError CLIPGuidance Cancelled CheckpointError ClassifierGuidance DeadlineExceeded EngineError FastLDMError
Generation InputError KandinskyPrior NonFinite OutOfMemory Pipeline Progress QueueFull Request Result Session WorkerLost
__version__ read_parameters
"""
ATTRIBUTES = {  # beside those of base classes
    "Generation": "add_done_callback async_progress cancel cancelled done exception interrupt position progress "
    "remaining result running",
    "Pipeline": """
        clip_skip default device disable_fp8 disable_freeu disable_vae_slicing disable_vae_tiling
        do_classifier_free_guidance do_perturbed_attention_guidance dtype enable_fp8 enable_freeu enable_vae_slicing
        enable_vae_tiling export from_diffusers from_pretrained from_single_file guidance_rescale guidance_scale
        image_encoder image_guidance_scale interrupt load_ip_adapter load_ranker
        load_textual_inversion name num_timesteps
        pag_adaptive_scale pag_scale prepare_ip_adapter_image_embeds session set_ip_adapter_scale text_encoder
        text_encoder_2 tokenizer tokenizer_2 unload_ip_adapter unload_textual_inversion warmup weights_changed""",
    "Request": "batch count kept negative_prompts parts prompts replace",
    "Session": "call close stats submit",
}
FIELDS = {
    "Progress": "step steps timestep preview latents embeds",
    "Request": """
        prompt negative_prompt height width num_inference_steps guidance_scale image_guidance_scale pag_scale
        pag_adaptive_scale pag_applied_layers apg_rescale apg_eta apg_momentum use_original_formulation
        guidance_fn clip_guidance_scale
        guidance_rescale guidance_interval sampler timesteps sigmas eta s_churn s_tmin s_tmax s_noise noise_sampler_seed
        reuse num_images_per_prompt candidates keep seed generator latents image image_embeds negative_image_embeds
        original_image prior_num_inference_steps prior_guidance_scale prior_latents
        super_res_num_inference_steps super_res_latents strength
        denoising_start denoising_end depth_map class_labels noise_level
        refiner_switch_at hires_scale hires_height hires_width hires_strength hires_steps hires_upscaler
        upscaler_options mask_image padding_mask_crop
        control_image controlnet_conditioning_scale control_guidance_start control_guidance_end guess_mode
        adapter_conditioning_scale adapter_conditioning_factor clip_skip
        literal_prompt prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds prompt_2
        negative_prompt_2 original_size crops_coords_top_left target_size negative_original_size
        negative_crops_coords_top_left negative_target_size aesthetic_score negative_aesthetic_score output_type
        adapters cross_attention_kwargs ip_adapter_image ip_adapter_image_embeds ip_adapter_scale""",
    "ClassifierGuidance": "model class_labels scale",
    "CLIPGuidance": "scale prompt num_cutouts through_unet decoder",
    "Result": "images seeds timings backend dtype request adapters embeddings scores refiner upscalers",
}
ARGUMENTS = {
    "Generation.result": "self timeout",
    "Pipeline.export": "self out options",
    "Pipeline.from_pretrained": """
        cls path_or_id device dtype torch_dtype backend batch_invariant controlnet adapter ranker refiner prior
        upscaler where""",
    "Pipeline.from_single_file": "cls path options",
    "Pipeline.load_ip_adapter": """
        self pretrained_model_name_or_path_or_dict subfolder weight_name image_encoder_folder allow_pickle where""",
    "Pipeline.load_textual_inversion": """
        self pretrained_model_name_or_path token tokenizer text_encoder weight_name subfolder allow_pickle where""",
    "Pipeline.unload_textual_inversion": "self tokens tokenizer text_encoder",
    "Pipeline.warmup": "self sizes batches options",
    "Session.__init__": "self pipe max_batch max_queue batch_invariant",
    "Session.close": "self cancel",
    "Session.submit": "self prompt priority deadline preview id refiner upscalers options",
}
MODULES = {"heap": "keep", "kernels": "OPS observe use", "kernels.geglu": "geglu", "errors": "FastLDMError InputError"}
SPREAD = "median p90 p99 least most mean count"
KEYS = {  # of the JSON that each command prints, without what varies with model, machine and time
    "generate owl --steps 1 --device cpu --json": """
        files seeds model backend device dtype timings timings.text timings.steps timings.decode timings.total""",
    "plan --device cpu --json": """
        model workload workload.arch workload.backend workload.batch workload.decode workload.dtype workload.encode
        workload.guided workload.third workload.averages
        workload.height workload.steps workload.tokens workload.width weights weights.name weights.bytes
        weights.note buffers buffers.name buffers.bytes buffers.note libraries phases phases.name phases.bytes
        phases.note resident needed cached cached.name cached.bytes cached.note peak here here.fits here.free would_fit
        """,
    "plan --size 128x128 --device cpu --json": """
        model stages stages.model stages.shares_weights weights buffers libraries resident needed peak here here.fits
        here.free would_fit stages.workload stages.workload.arch stages.workload.backend stages.workload.batch
        stages.workload.decode stages.workload.dtype stages.workload.encode stages.workload.guided
        stages.workload.third stages.workload.averages
        stages.workload.height stages.workload.steps stages.workload.tokens stages.workload.width stages.weights
        stages.weights.name stages.weights.bytes stages.weights.note stages.buffers stages.buffers.name
        stages.buffers.bytes stages.buffers.note stages.libraries stages.phases stages.phases.name stages.phases.bytes
        stages.phases.note stages.resident stages.needed stages.cached stages.cached.name stages.cached.bytes
        stages.cached.note stages.peak""",
    "doctor --json": """
        fastldm python platform torch triton cpu cpu.threads cpu.capability gpus model model.name model.family
        model.parameters model.dtype ops ops.on ops.dtype ops.triton ops.torch adapters extras
        cache problems""",
    "profile --steps 1 --rounds 1 --size 32 --device cpu --json -": f"""
        about about.model about.backend about.device about.dtype about.fastest_dtype about.width about.height
        about.pictures about.rows about.steps about.sampler about.guidance about.threads about.machine
        about.adapters about.adapted about.controls
        about.machine.name about.machine.cores about.machine.capability about.machine.python about.machine.torch
        first first.import first.load first.compile ceilings ceilings.flops ceilings.bytes stages stages.name
        stages.note stages.host stages.device rows rows.stage rows.name rows.calls rows.seconds rows.share rows.flop
        rows.bytes rows.floor rows.paths memory memory.measured memory.planned operations operations.step advice
        step steps wall {" ".join(f"{name}.{key}" for name in ("step", "steps", "wall") for key in SPREAD.split())}
        {" ".join(f"stages.host.{key}" for key in SPREAD.split())}""",
}
VARYING = ("adapters.", "extras.", "ops.torch.", "rows.paths.", "operations.", "model.runs on")


def keys(value: Any, prefix: str = "") -> set[str]:
    """All keys of nested objects, those of a list's items without their place."""
    if isinstance(value, list):
        return set().union(*(keys(item, prefix) for item in value))
    if not isinstance(value, dict):
        return set()
    own = {f"{prefix}{key}" for key in value}
    return own.union(*(keys(item, f"{prefix}{key}.") for key, item in value.items()))


def test_package_exports_these_names() -> None:
    assert sorted(fastldm.__all__) == sorted(NAMES.split())
    assert all(getattr(fastldm, name) is not None for name in NAMES.split())


@pytest.mark.parametrize("module", MODULES)
def test_documented_modules_keep_their_names(module: str) -> None:
    assert all(hasattr(importlib.import_module(f"fastldm.{module}"), name) for name in MODULES[module].split())


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_classes_keep_their_attributes(name: str) -> None:
    assert set(ATTRIBUTES[name].split()) <= set(dir(getattr(fastldm, name)))


def test_generation_has_its_request() -> None:
    pipe = fastldm.Pipeline.default(device="cpu")
    with fastldm.Session(pipe) as session:
        generation = session.submit("an owl", num_inference_steps=1)
        assert generation.request.prompt == "an owl"
        assert isinstance(generation.result(timeout=60), fastldm.Result)


@pytest.mark.parametrize("name", FIELDS)
def test_records_keep_their_fields(name: str) -> None:
    record = getattr(fastldm, name)
    assert [field.name for field in dataclasses.fields(record)] == FIELDS[name].split()
    assert [field.name for field in dataclasses.fields(Timings)] == ["text", "steps", "decode", "total"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_calls_keep_their_arguments(name: str) -> None:
    owner, _, method = name.partition(".")
    call = inspect.getattr_static(getattr(fastldm, owner), method)
    assert [*inspect.signature(getattr(call, "__func__", call)).parameters] == ARGUMENTS[name].split()


@pytest.mark.parametrize("command", KEYS)
def test_json_of_a_command_keeps_its_keys(command: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*command.split())
    assert done.exit_code == 0, done.output
    stable = {key for key in keys(json.loads(done.stdout)) if not key.startswith(VARYING) or key == "operations.step"}
    assert stable == set(KEYS[command].split())


def test_json_of_bench_keeps_its_keys() -> None:
    row = Row(Contender("fastldm", "float32"), (0.1,), (4.0,), None, 0.2, 1 << 20, 0.0, False)
    assert keys(row.to_dict()) == {
        *("contender.backend", "contender.bundle", "contender.dtype", "contender.name", "contender.note"),
        *("contender", "contender.title", "difference", "failure", "first", "load", "median", "peak", "ratio"),
        *("ratios", "seconds", "spread", "wrong"),
    }
