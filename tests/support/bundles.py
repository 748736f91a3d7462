"""Models and bundles for the tests of exports. Tracing takes a second for each layer of a network, so they have few,
and what one test process has exported serves the others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import controls
import deepfloyd
import kandinsky
import numpy as np
import other_networks
import picture_readers
import pytest
import tiny
import torch
from click.testing import CliRunner
from filelock import FileLock

from fastldm import Pipeline
from fastldm.adapters.control import read_control
from fastldm.cli import main
from fastldm.export import manifest as manifests
from fastldm.export import writing
from fastldm.export.bundle import Bundle
from fastldm.export.verify import verify
from fastldm.loading import spec as loading

if TYPE_CHECKING:
    from fastldm.export.reference import ReferenceNetworks


LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": (tiny.DOWN, tiny.CROSS_DOWN),
    "up_block_types": (tiny.CROSS_UP, tiny.UP),
    "mid_block_type": None,
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4),
}


NO_TEXT = "sd1-variation"
"""The family that reads a picture in place of a prompt."""


FEW: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": (other_networks.RESNET_DOWN, other_networks.SIMPLE_DOWN),
    "up_block_types": (other_networks.SIMPLE_UP, other_networks.RESNET_UP),
    "layers_per_block": 1,
}
"""As LEVELS, of the blocks of IF and Kandinsky."""


def _reader(family: str, components: dict[str, Any]) -> Any:
    """The smallest of READERS. components: of Stable Diffusion's smallest."""
    if family == "sd2-unclip-prior":
        return picture_readers.unclip_of_text(unet=picture_readers.unet("sd2-unclip", **LEVELS), **components)
    if family == "kandinsky":
        return kandinsky.decoder(movq=tiny.vq(**kandinsky.movq_blocks(64, 128)), **FEW)
    make, name = {"if": (deepfloyd.first_stage, "if-1"), "if-super-resolution": (deepfloyd.super_resolution, "if-2")}[
        family
    ]
    only = {"only_cross_attention": (True, True)} if family == "if-super-resolution" else {}
    width = {"cross_attention_dim": 128}  # with fewer the norm of a single token's groups is of two numbers
    return make(unet=other_networks.network(name, **FEW, **only, **width), text_encoder=deepfloyd.t5(1, num_layers=2))


READERS = ("sd2-unclip-prior", "if", "if-super-resolution", "kandinsky")
"""Families that read T5's states, or vectors that a prior makes."""


def smallest(family: str, folder: Path) -> Path:
    """A diffusers folder of the family's kind: two levels of one layer and nothing in the middle, a text encoder of two
    layers, an autoencoder of factor 2 without attention."""
    vae = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "mid_block_add_attention": False,
    }
    components: dict[str, Any] = {"vae": tiny.vae(family, 1, **vae)}
    if family not in (NO_TEXT, "sdxl-refiner"):
        components["text_encoder"] = tiny.text_encoder("l", 2, num_hidden_layers=2)
    if family in READERS:
        _reader(family, components).save_pretrained(folder)
        return folder
    if family in picture_readers.FAMILIES:
        make = picture_readers.variations if family == NO_TEXT else picture_readers.unclip
        make(unet=picture_readers.unet(family, **LEVELS), **components).save_pretrained(folder)
        return folder
    reads = "only_cross_attention" in tiny.UNETS[family]  # of each level
    components["unet"] = tiny.unet(family, **LEVELS, **({"only_cross_attention": (True, True)} if reads else {}))
    tiny.pipeline(family, **components).save_pretrained(folder)
    return folder


def for_family(family: str, query: dict[str, Any]) -> dict[str, Any]:
    """A request as a family understands it: with the pictures that it reads, and without what it does not."""
    height, width, prompts = query["height"], query["width"], query.get("prompt")
    photo = np.random.default_rng(9).random((height, width, 3), dtype=np.float32)
    photos = [photo[::-1] * 0.9**k for k in range(len(prompts))] if isinstance(prompts, list) else photo
    own: dict[str, Any]
    if family == "sd1-inpaint":
        return {"image": photo, "mask_image": np.eye(height, width, dtype=np.float32), **query}
    if family == "kandinsky":
        g, count = torch.Generator().manual_seed(4), len(prompts) if isinstance(prompts, list) else 1
        names = ("image_embeds", "negative_image_embeds")[: 1 + (query.get("guidance_scale") != 1)]
        own = {name: value for name, value in query.items() if name not in ("prompt", "negative_prompt")}
        return own | {name: torch.randn(count, 40, generator=g) for name in names}
    if family in READERS:
        own = {"if-super-resolution": {"image": photo, "noise_level": 120}, "sd2-unclip-prior": {"noise_level": 300}}
        return {**query, **own.get(family, {})}
    if not (family in picture_readers.FAMILIES or family.endswith(("-edit", "-depth"))):
        return query
    dropped = {"mask_image"} if family.endswith("-depth") else {"mask_image", "strength"}
    if family == NO_TEXT:
        dropped |= {"prompt", "negative_prompt", "clip_skip"}
    own = {name: value for name, value in query.items() if name not in dropped} | {"image": photos}
    if family.endswith("-edit"):
        own["image_guidance_scale"] = 1.3
    if family.endswith("-depth"):
        own["depth_map"] = torch.linspace(0, 1, width).expand(1, height, width)
    if family == "sd2-unclip":
        own["noise_level"] = 300
    return own


def expect_images(family: str, split: bool, backend: str, factory: pytest.TempPathFactory, **options: Any) -> None:
    """The bundle of a family's smallest model verifies on a backend, and makes PyTorch's images."""
    pytest.importorskip(backend.removesuffix("-graph"), reason=f"{backend} is not installed")
    source, out = exported(family, split, shared(factory), **options)
    with mock.patch.dict(os.environ, {"FASTLDM_CACHE": str(shared(factory) / "cache")}):
        checks = list(verify(Bundle.open(out), backend, dtype="float32", model=loading.describe(source)))
        assert [check.problem for check in checks if check.problem] == []
        pipes = [
            Pipeline.from_pretrained(path, backend=own, device="cpu", dtype="float32")
            for path, own in ((source, "torch"), (out, backend))
        ]
        small: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "pt"}
        for query in (
            {"prompt": ["a cat", "two dogs"], "negative_prompt": "blurry", "height": 24, "width": 16},
            {"prompt": "a cat", "guidance_scale": 1.0, "height": 16, "width": 32, "num_images_per_prompt": 2},
        ):
            expected, made = (pipe(**for_family(family, {**query, **small})).images for pipe in pipes)
            assert float((made - expected).abs().max()) < 1e-4  # type: ignore[operator, union-attr]
            assert float(expected.std()) > 0.01  # type: ignore[union-attr]


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "bundles"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def exported(family: str, split: bool, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The smallest model of a family, and the bundle of it, in a shared folder. Neither is to be written to."""
    source = folder / family
    out = folder / "-".join([family, "split" if split else "whole", *map(str, options.values())])
    with FileLock(folder / f"{family}.lock"):
        if not source.exists():
            smallest(family, source)
        if not out.exists():
            with traced_once(folder):
                writing.export(loading.describe(source), out, source=str(source), split=split, **options)
    return source, out


RANK = 8
"""Of the adapters that bundles of `taking` take."""


def taking(family: str, factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Path]]:
    """The smallest model of a family, a bundle of it that takes adapters and has controls, and the folders of those: a
    ControlNet and a T2I-Adapter. Not to be written to."""
    folder = shared(factory)
    source, out = folder / family, folder / f"{family}-taking"
    paths = {name: folder / f"{family}-controls" / name for name in ("edges", "depth")}
    with FileLock(folder / f"{family}.lock"):
        if not source.exists():
            smallest(family, source)
        if not out.exists():
            small_controlnet(family).save_pretrained(paths["edges"])
            small_adapter().save_pretrained(paths["depth"])
            spec = loading.describe(source)
            read = {name: read_control(path, spec) for name, path in paths.items()}
            with traced_once(folder):
                writing.export(spec, out, source=str(source), adapter_rank=RANK, controls=read)
    return source, out, paths


def small_controlnet(family: str, seed: int = 10, **changes: Any) -> Any:
    """diffusers' ControlNetModel for the smallest model of a family."""
    levels = {key: value for key, value in LEVELS.items() if key not in ("up_block_types", "mid_block_type")}
    return controls.controlnet(family, seed, **levels, conditioning_embedding_out_channels=(4, 6), **changes)


def small_adapter() -> Any:
    """diffusers' T2IAdapter for the smallest models."""
    config = {"channels": [16, 32], "adapter_type": "full_adapter_xl", "downscale_factor": 4, "num_res_blocks": 1}
    return tiny.seeded(lambda: tiny.peer("diffusers").T2IAdapter(**config), 20)


@contextlib.contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """Within this context networks of the same weights and shapes are traced once: families share text encoders and
    autoencoders."""
    onnx = pytest.importorskip("fastldm.export.onnx", reason="exporting needs fastldm[onnx]", exc_type=ImportError)
    trace = onnx.write

    def write(networks: ReferenceNetworks, name: str, out: Path, **options: Any) -> None:
        module = networks.module(name)
        state = module.state_dict()
        identity = [name, networks.specs[name].to_dict(), repr(getattr(module, "config", None)), options, *state]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for tensor in state.values():
            digest.update(tensor.numpy().tobytes())
        cached = folder / "traced" / digest.hexdigest()
        with FileLock(f"{folder / digest.hexdigest()}.lock"):
            if not cached.exists():
                trace(networks, name, cached, **options)
        shutil.copytree(cached, out, dirs_exist_ok=True)

    with mock.patch.object(onnx, "write", write):
        yield


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a changed manifest as somebody would who changes it on purpose."""
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifests.digest(manifest)}))


NETWORKS = ["text_encoder", "text_kv", "time_rows", "unet_step", "vae_decoder", "vae_encoder"]
"""Those of a bundle that was exported split."""


def split(model: Path, factory: pytest.TempPathFactory) -> Path:
    """The bundle of a model as the command exports it, split: its networks are the smaller ones, and more."""
    with traced_once(shared(factory)):
        done = CliRunner().invoke(main, ["export", "-m", str(model), str(model.parent / "bundle"), "--split"])
    assert done.exit_code == 0, done.output
    assert "as PyTorch computes them" in done.output
    return model.parent / "bundle"


def rehash(folder: Path) -> None:
    """As somebody would who edits a bundle on purpose."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = manifests.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
