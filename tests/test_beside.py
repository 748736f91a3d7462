"""planning/beside.py, and what else a plan has beside U-Net, VAE and text: against what is allocated."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ip_adapters
import numpy as np
import picture_readers
import pytest
import tiny
import torch
from live_bytes import assert_planned
from PIL import Image

from fastldm import OutOfMemory, Pipeline, Request
from fastldm.conditioning.image_encoder import ImageEncoder, Preprocessing
from fastldm.conditioning.ranking import Ranker
from fastldm.models.clip_vision import CLIPVision, VisionConfig
from fastldm.models.vae import finish
from fastldm.planning import memory
from fastldm.planning.memory import MemoryPlan, Workload, plan, upper_bound
from fastldm.runtime.image_prompts import start_pictures

VISION = VisionConfig(
    hidden=256,
    layers=3,
    heads=4,
    intermediate=1024,
    image_size=224,
    patch_size=14,
    act="gelu",
    norm_eps=1e-5,
    projection_dim=32,
)
SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 1}


def large_encoder() -> ImageEncoder:
    """Of so many pixels that what ATen takes inside of an op is little beside it."""
    model = CLIPVision(VISION).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return ImageEncoder(model, Preprocessing(224, 224), "here")


def lines(planned: MemoryPlan, part: str = "weights") -> dict[str, int]:
    return {line.name: line.bytes for line in getattr(planned, part)}


def bytes_of(*modules: Any) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def pictures(count: int, side: int = 64) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("candidates", [3, 40])
def test_what_ranks_is_planned_as_it_runs(candidates: int) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    stages = pipe.stages
    ranker = Ranker(large_encoder(), None, torch.randn(32, 32))
    stages.ranking.loaded = ranker
    completed = stages.complete(Request("a cat", candidates=candidates, seed=0, **SIZE))
    part = completed.parts(candidates)[0]
    planned = plan(Workload.of_request(stages, part, ranked=part.batch))
    assert lines(planned)["ranker's image encoder"] == bytes_of(ranker.images.model)
    assert lines(planned)["ranker's projection"] == 4 * 32 * 32
    made = pictures(candidates)
    run = lambda: ranker.scores(made, ["a cat"] * candidates, pipe.text_stages[0])  # noqa: E731
    assert_planned(lines(planned, "phases")["rank"], run)
    assert upper_bound(planned.workload) >= planned.needed - planned.loading
    without = plan(Workload.of_request(stages, stages.complete(Request("a cat", **SIZE))))
    assert "rank" not in lines(without, "phases")
    assert lines(without) == lines(planned), "it stays loaded"


def test_a_whole_ranker_has_a_text_encoder(tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    pipe.load_ranker(ip_adapters.clip_folder(tmp_path / "clip"))
    ranker = pipe.stages.ranking.loaded
    assert ranker is not None
    assert ranker.text is not None
    planned = lines(plan(Workload.of_stages(pipe.stages, width=64, height=64, batch=1, guided=True)))
    assert planned["ranker's text encoder"] == bytes_of(ranker.text.model)
    assert "ranker's projection" not in planned


@pytest.mark.full
def test_candidates_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    pipe.stages.ranking.loaded = Ranker(large_encoder(), None, torch.randn(32, 32))
    part = pipe.stages.complete(Request("a cat", num_images_per_prompt=4, **SIZE))
    need = {
        ranked: (planned := plan(Workload.of_request(pipe.stages, part, ranked=ranked))).needed - planned.loading
        for ranked in (0, 4)
    }
    assert need[4] > 1.3 * need[0]
    monkeypatch.setattr(memory, "free_bytes", lambda device: sum(need.values()) // 2)
    pipe("a cat", num_images_per_prompt=4, **SIZE)
    with pytest.raises(OutOfMemory, match="4 pictures of 64x64 need"):
        pipe("a cat", candidates=4, seed=0, **SIZE)


def depth_estimator() -> dict[str, Any]:
    dpt = tiny.peer("transformers")
    config = dpt.DPTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[32, 32, 64, 64],
        fusion_hidden_size=64,
        is_hybrid=False,
        image_size=256,
        patch_size=16,
    )
    processor = dpt.DPTImageProcessor(size={"height": 256, "width": 256})
    return {
        "depth_estimator": tiny.seeded(lambda: dpt.DPTForDepthEstimation(config), 1),
        "feature_extractor": processor,
    }


def test_what_estimates_depth_is_planned_as_it_runs(tmp_path: Path) -> None:
    peer = tiny.pipeline("sd2-depth", **depth_estimator())
    peer.save_pretrained(tmp_path)
    image = pictures(1)[0]
    for pipe in (Pipeline.from_diffusers(peer), Pipeline.from_pretrained(tmp_path, dtype="float32")):
        estimator = pipe.stages.spec.checkpoint.depth
        assert estimator is not None
        completed = pipe.stages.complete(Request("a cat", image=image, **SIZE))
        planned = plan(Workload.of_request(pipe.stages, completed))
        assert lines(planned)["depth estimator"] == bytes_of(peer.depth_estimator)
        network, processor = estimator._parts
        pixels = processor(images=[image], return_tensors="pt").pixel_values
        last = (
            4 * 32 * 256 * 256
        )  # oneDNN's convolution, of which transformers' are, makes its output in another layout
        assert_planned(lines(planned, "phases")["depth"], functools.partial(depth_of, network, pixels), last)
        assert upper_bound(planned.workload) >= planned.needed - planned.loading
        given = pipe.stages.complete(Request("a cat", image=image, depth_map=torch.rand(1, 8, 8), **SIZE))
        assert "depth estimator" not in lines(plan(Workload.of_request(pipe.stages, given)))


def depth_of(network: Any, pixels: torch.Tensor) -> None:
    network(pixels).predicted_depth.float()


def test_pictures_as_prompts_are_planned_as_they_run(tmp_path: Path) -> None:
    peer = tiny.pipeline("sd1")
    folder = ip_adapters.folder(tmp_path, peer.unet, "base", "plus")
    pipe = Pipeline.from_diffusers(peer)
    pipe.load_ip_adapter(folder, "models", ["base.safetensors", "plus.safetensors"])
    adapters, _, encoder = pipe.stages.image_prompts.loaded
    images = [pictures(2), pictures(1)]
    completed = pipe.stages.complete(Request("a cat", ip_adapter_image=images, **SIZE))
    planned = plan(Workload.of_request(pipe.stages, completed))
    assert encoder is not None
    assert lines(planned)["IP-Adapters' image encoder"] == bytes_of(encoder.model)
    for number, adapter in enumerate(adapters, 1):
        assert lines(planned)[f"IP-Adapter {number}"] == bytes_of(adapter.network)
    run = lambda: start_pictures(completed, True, torch.device("cpu"), torch.float32)  # noqa: E731
    assert_planned(lines(planned, "phases")["image prompts"], run)
    assert "image prompts" not in lines(
        plan(Workload.of_request(pipe.stages, pipe.stages.complete(Request("a cat", **SIZE)))), "phases"
    )


@pytest.mark.parametrize("kind", ["variations", "unclip"])
def test_weights_of_picture_readers_are_counted_to_the_byte(kind: str) -> None:
    pipe = Pipeline.from_diffusers(getattr(picture_readers, kind)())
    planned = plan(Workload.of_stages(pipe.stages, width=64, height=64, batch=1, guided=True))
    assert sum(lines(planned).values()) == pipe.stages.weight_bytes
    assert ("image normalizer" in lines(planned)) == (kind == "unclip")


def test_a_repainting_decoder_is_planned_as_it_runs() -> None:
    vae = tiny.seeded(
        lambda: tiny.peer("diffusers").AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            down_block_out_channels=(8, 16, 24, 24),
            up_block_out_channels=(12, 24, 36, 36),
            layers_per_down_block=1,
            layers_per_up_block=2,
            norm_num_groups=4,
        ),
        3,
    )
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", vae=vae))
    image = pictures(1, 256)[0]
    large = {**SIZE, "width": 256, "height": 256, "num_images_per_prompt": 2}
    completed = pipe.stages.complete(Request("a cat", image=image, mask_image=Image.new("L", (256, 256), 255), **large))
    planned = plan(Workload.of_request(pipe.stages, completed))
    assert sum(lines(planned).values()) == pipe.stages.weight_bytes
    assert lines(planned, "buffers")["repainted"] == 2 * 4 * 256 * 256 * 4
    z, picture, mask = torch.randn(2, 4, 32, 32), torch.randn(1, 3, 256, 256), torch.ones(1, 1, 256, 256)

    def decode() -> None:
        from fastldm import image as images

        parts = (z / pipe.vae.config.scaling_factor).split(1)
        decoded = torch.cat([finish(pipe.vae.decode_repainted(part, picture, mask)) for part in parts])
        decoded.isfinite().all()
        images.to_pixels(decoded, "pil")

    assert_planned(lines(planned, "phases")["decode"], decode)
    plain = plan(Workload.of_request(pipe.stages, pipe.stages.complete(Request("a cat", image=image, **large))))
    assert "repainted" not in lines(plain, "buffers")
    assert lines(plain, "phases")["decode"] < lines(planned, "phases")["decode"]
