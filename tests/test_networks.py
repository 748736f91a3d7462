"""The pipeline on exported bundles: the same call, the same picture, the same errors, whatever runs the networks."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fastldm import Pipeline, Session
from fastldm.cli import main
from fastldm.errors import BundleError, CheckpointError, EngineError, InputError
from fastldm.export import auto, networks
from fastldm.export.bundle import Bundle
from fastldm.export.engine import bound
from fastldm.export.networks import Network
from fastldm.export.spec import NetworkSpec
from fastldm.model import describe
from fastldm.profiling import backends

ENGINES = ["onnxruntime", "openvino"]
CPU = torch.device("cpu")
# Each kind of network once in either form that it has: the others of a family are the same networks with another
# scheduler, which no engine sees.
KINDS = ["sd1-split", "sd1-whole", "sdxl-split"]
OTHERS = [
    "sd1-inpaint-split",
    "sd1-inpaint-whole",
    "lcm-split",
    "sd2-v-split",
    "sd2-v-whole",
    "lcm-whole",
    "sdxl-whole",
    "small-split",
    "small-whole",
    "sdxl-lcm-split",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One for all tests here: OpenVINO's compiled networks are what costs time."""
    folder = bundles.shared(tmp_path_factory) / "cache"
    monkeypatch.setenv("FASTLDM_CACHE", str(folder))
    return folder


@pytest.fixture(params=[*KINDS, *(pytest.param(kind, marks=pytest.mark.full) for kind in OTHERS)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(kind: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the bundle of it."""
    family, form = kind.rsplit("-", 1)
    return bundles.exported(family, form == "split", bundles.shared(factory))


def load(path: Path, backend: str, **options: Any) -> Pipeline:
    if backend in ENGINES:
        pytest.importorskip(backend, reason=f"{backend} is not installed")
    return Pipeline.from_pretrained(path, backend=backend, **{"device": "cpu", "dtype": "float32", **options})


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return model("sd1-split", tmp_path_factory)


@pytest.fixture(scope="module")
def torch_pipe(sd1: tuple[Path, Path]) -> Pipeline:
    return load(sd1[0], "torch")


@pytest.fixture(params=ENGINES)
def pipe(sd1: tuple[Path, Path], request: pytest.FixtureRequest) -> Pipeline:
    return load(sd1[1], request.param)


def apart(images: Any, expected: Any) -> float:
    return float((images - expected).abs().max())


# Pictures are in 0..1. Engines sum in another order, and twenty evaluations pass it on: 1e-6 was seen.
TOLERANCE = 1e-4
SMALL = {"num_inference_steps": 2, "seed": 1, "output_type": "pt"}


def images_of(pipe: Pipeline, kind: str) -> list[Any]:
    """Of requests that between them use every network and every input: several prompts of which one has two windows,
    guided and not, upright and broad, from a picture."""
    several = {"prompt": ["a cat", "two dogs, " * 20], "negative_prompt": "blurry", "height": 24, "width": 16, **SMALL}
    unguided = {"prompt": "a (red:1.3) cat", "guidance_scale": 1.0, "height": 16, "width": 32, "clip_skip": 1, **SMALL}
    start = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32)
    again = {"prompt": "a cat", "image": start, "strength": 0.9, "height": 32, "width": 32, **SMALL}
    mask = np.zeros((32, 32), dtype=np.float32)
    mask[8:24, 8:24] = 1
    if "inpaint" in kind:
        return [pipe(**again, mask_image=mask).images, pipe(**{**again, **several}, mask_image=mask).images]
    return [
        pipe(**several).images,
        pipe(**unguided).images,
        pipe(**again).images,
        pipe(**again, mask_image=mask).images,
    ]


def test_every_network_kind_gives_pytorch_images(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, bundle = model(kind, tmp_path_factory)
    expected = images_of(load(source, "torch"), kind)
    for backend in ENGINES:
        pipe = load(bundle, backend)
        got = images_of(pipe, kind)
        assert max(map(apart, got, expected)) <= TOLERANCE, backend
        assert pipe("a cat", **{**SMALL, **_masked(kind)}).backend == pipe.backend == backend


def _masked(kind: str) -> dict[str, Any]:
    grey = np.zeros((32, 32, 3), dtype=np.float32)
    return {"image": grey, "mask_image": grey[..., 0]} if "inpaint" in kind else {}


def test_different_requests_share_batch(pipe: Pipeline, torch_pipe: Pipeline) -> None:
    """Prompts of one and two windows, guided and not, in samplers of one and of four memories."""
    requests = [
        {"prompt": "a cat", "sampler": "dpm++ 2m", "num_inference_steps": 4},
        {"prompt": "two dogs, " * 20, "sampler": "euler a", "num_inference_steps": 3},
        {"prompt": "a fish", "guidance_scale": 1.0, "sampler": "plms", "num_inference_steps": 5},
        {"prompt": "a bird", "guidance_scale": 3.0, "guidance_rescale": 0.7, "num_images_per_prompt": 2},
    ]
    common = {"num_inference_steps": 3, "seed": 4, "output_type": "pt", "height": 16, "width": 16}
    alone = [torch_pipe(**{**common, **request}).images for request in requests]
    with Session(pipe, max_batch=8) as session:
        waiting = [session.submit(**{**common, **request}) for request in requests]
        for generation, expected in zip(waiting, alone, strict=True):
            assert apart(generation.result(timeout=120).images, expected) <= TOLERANCE
            assert generation.result().backend == pipe.backend


def test_more_rows_than_engine_limit_run(pipe: Pipeline, torch_pipe: Pipeline) -> None:
    """Bundles are for up to 16: 17 guided pictures are 34."""
    request = {"prompt": "a cat", "num_images_per_prompt": 17, "height": 16, "width": 16, **SMALL}
    assert apart(pipe(**request).images, torch_pipe(**request).images) <= TOLERANCE


def test_split_bundle_caches_text_and_time(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    run = Network.__call__

    def counted(network: Network, **inputs: torch.Tensor) -> Any:
        calls[network.specs[0].name] += 1
        return run(network, **inputs)

    monkeypatch.setattr(Network, "__call__", counted)
    pipe("a cat", num_inference_steps=6, sampler="euler", seed=0)
    assert calls == {"text_encoder": 1, "text_kv": 1, "time_rows": 1, "unet_step": 6, "vae_decoder": 1}


def test_previews_slices_and_latents(pipe: Pipeline, torch_pipe: Pipeline) -> None:
    request = {"prompt": "a cat", "num_inference_steps": 2, "sampler": "euler", "seed": 1}
    latents = pipe(**request, output_type="latent").images
    assert apart(latents, torch_pipe(**request, output_type="latent").images) <= TOLERANCE * latents.abs().max()
    full = pipe(**request, num_images_per_prompt=2, output_type="pt").images
    pipe.enable_vae_slicing()
    assert apart(pipe(**request, num_images_per_prompt=2, output_type="pt").images, full) <= TOLERANCE
    with Session(pipe) as session:
        preview_sizes = [step.preview[0].size for step in session.submit(**request, preview=True).progress()]
    assert preview_sizes == [(16, 16)] * 2  # the model's own size


def test_unsupported_sizes_and_texts_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"size is 18x16: this bundle runs 4x4 to 32x32 in steps of 4, of which 16x16"):
        pipe("a cat", width=18)
    with pytest.raises(InputError, match=r"size is 16x64: this bundle runs .* of which 16x32 is nearest"):
        pipe("a cat", height=64)
    with pytest.raises(InputError, match=r"the text has \d+ tokens and this bundle takes 308: shorten the prompt"):
        pipe("dog " * 301)
    with pytest.raises(InputError, match="cannot decode in tiles: decode sliced or whole"):
        pipe.enable_vae_tiling()
    assert pipe("a cat", **SMALL).images.isfinite().all()  # none of that has harmed it


def test_engines_for_one_size_run(
    sd1: tuple[Path, Path], torch_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT's may be: other sizes are refused before anything runs, more pictures go through one by one, and
    previews are small as ever."""
    pipe = _for_sizes(sd1[1], [(32, 16)], monkeypatch)
    several = {"prompt": ["a cat", "two dogs", "a bird"], "width": 32, "height": 16, **SMALL}
    assert apart(pipe(**several).images, torch_pipe(**several).images) <= TOLERANCE
    alone = {"prompt": "a cat", "guidance_scale": 1.0, "width": 32, "height": 16, **SMALL}
    assert apart(pipe(**alone).images, torch_pipe(**alone).images) <= TOLERANCE
    steps = list(pipe.session.submit(**alone, preview=True).progress())
    assert steps[-1].preview[0].size == (32, 16)
    with pytest.raises(InputError, match="the size is 32x32: this bundle runs 32x16, of which 32x16 is nearest"):
        pipe("a cat", width=32, height=32)
    with pytest.raises(InputError, match="the text has 154 tokens and this bundle takes 77"):
        pipe("two dogs, " * 20, width=32, height=16)


def test_engines_for_several_sizes_run(
    sd1: tuple[Path, Path], torch_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs, and what lies between them does not."""
    pipe = _for_sizes(sd1[1], [(32, 16), (16, 24)], monkeypatch)
    for width, height in ((16, 24), (32, 16)):
        request = {"prompt": "a cat", "width": width, "height": height, **SMALL}
        assert apart(pipe(**request).images, torch_pipe(**request).images) <= TOLERANCE
    with pytest.raises(InputError, match=r"size is 32x20: this bundle runs 32x16 or 16x24, of which 32x16 is nearest"):
        pipe("a cat", width=32, height=20)


def _for_sizes(bundle: Path, sizes: Sequence[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A bundle on ONNX Runtime with the profiles that TensorRT engines would have, which need a GPU."""
    tensorrt = pytest.importorskip("fastldm.export.tensorrt", reason="TensorRT-RTX is not installed")
    profiles = tensorrt.image_profiles(Bundle.read(bundle).specs, sizes)
    opened = networks.open_engine

    class Profiled:
        def __init__(self, backend: str, path: Path, spec: NetworkSpec, **options: Any) -> None:
            self._engine = opened(backend, path, spec, **options)
            self.specs = [
                spec.narrowed({name: (least, most) for name, (least, _, most) in ranges.items()})
                for ranges in profiles[spec.name]
            ]

        def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            bound(self.specs[tensorrt.fitting(self.specs, inputs)], inputs, CPU)
            return self._engine(inputs)

    monkeypatch.setattr(networks, "open_engine", Profiled)
    return load(bundle, "onnxruntime")


def test_backend_is_selected_by_name(sd1: tuple[Path, Path]) -> None:
    source, bundle = sd1
    with pytest.raises(InputError, match="backend is 'tensorflow': expected auto, torch, onnxruntime"):
        Pipeline.from_pretrained(bundle, backend="tensorflow")
    with pytest.raises(InputError, match=rf"openvino runs bundles, and {source} is none: `fastldm export -m "):
        Pipeline.from_pretrained(source, backend="openvino")
    with pytest.raises(InputError, match="variant: not for a bundle"):
        Pipeline.from_pretrained(bundle, backend="onnxruntime", variant="fp16")
    with pytest.raises(EngineError, match=r"ONNX Runtime computes in what the file holds, float32, not in bfloat16"):
        load(bundle, "onnxruntime", dtype="bfloat16")
    if _has("tensorrt_rtx"):
        with pytest.raises(EngineError, match="TensorRT runs on NVIDIA GPUs, not on cpu: try backend openvino"):
            load(bundle, "tensorrt")
    assert load(source, "auto").backend == "torch"
    assert load(bundle, "torch").backend == "torch"  # from the model that it was made of


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def test_bundle_is_described_without_its_model(sd1: tuple[Path, Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(sd1[1], moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["source"] = "/gone"
    bundles.sign(moved, manifest)
    with pytest.raises(BundleError, match="was made of /gone, which is not here: PyTorch cannot read the bundle"):
        load(moved, "torch")
    assert load(moved, "onnxruntime").family.name == "sd1"
    with pytest.raises(CheckpointError, match="is an exported bundle, which PyTorch cannot read"):
        describe(moved).checkpoint.components["unet"].state()


def test_a_damaged_bundle_is_refused(sd1: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(sd1[1], tmp_path / "damaged"))
    data = damaged / "unet_step" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    for backend in ("auto", *ENGINES):
        with pytest.raises(BundleError, match=r"unet_step/model.onnx_data has \d+ bytes, expected"):
            Pipeline.from_pretrained(damaged, backend=backend)


def test_auto_uses_fastest_measured_backend(
    sd1: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = sd1
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    opened = Bundle.open(bundle)
    assert auto.choose(opened, CPU) == ("openvino" if _has("openvino") else "onnxruntime")  # nothing was measured
    slow, fast = auto.Measured(9.0, 0.1, "float32"), auto.Measured(1.0, 2.0, "float32")
    auto.remember(opened, CPU, {"openvino": slow, "onnxruntime": fast, "torch": slow})
    assert load(bundle, "auto").backend == "onnxruntime"  # the sum counts
    auto.remember(opened, CPU, {"openvino": slow, "torch": fast})
    assert load(bundle, "auto").backend == "torch"
    path = auto._path(opened, CPU)
    path.write_text(path.read_text().replace("torch 2", "torch 1"))
    assert auto.read(opened, CPU) == {}  # of other versions
    path.write_text("{")
    assert auto.read(opened, CPU) == {}
    measured = backends.measure(opened, "onnxruntime", CPU)
    assert auto.read(opened, CPU) == {"onnxruntime": measured}
    assert min(measured.start_up, measured.picture) > 0
    assert measured.precision == "float32"


def test_command_prints_backend(sd1: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    out = tmp_path / "cat.png"
    command = ["generate", "a cat", "-m", str(sd1[1]), "--steps", "1", "--seed", "3", "-o", str(out)]
    done = CliRunner().invoke(main, [*command, "--backend", "openvino", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert "openvino bfloat16 on cpu: " in done.output
    with Image.open(out) as image:
        assert "Backend: openvino bfloat16" in image.info["parameters"]
    refused = CliRunner().invoke(main, ["generate", "a cat", "-m", str(sd1[0]), "--backend", "openvino"])
    assert refused.exit_code == 2
    assert "makes one" in refused.output


def test_the_plan_of_a_bundle(sd1: tuple[Path, Path]) -> None:
    def planned(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(main, ["plan", *options, "--device", "cpu", "--json"])
        assert done.exit_code == 0, done.output
        return {**json.loads(done.output), "here": None}  # what is free changes

    source, bundle = (str(path) for path in sd1)
    torch_plan = planned("-m", source, "--dtype", "float32")
    for backend, dtype, copies in (("onnxruntime", "float32", 1.0), ("openvino", "bfloat16", 0.5)):
        plan = planned("-m", bundle, "--backend", backend, "--dtype", dtype)
        assert plan["workload"]["backend"] == backend
        assert plan["weights"] == torch_plan["weights"]
        assert plan["phases"] == torch_plan["phases"]
        assert plan["cached"]["bytes"] == copies * sum(line["bytes"] for line in plan["weights"])
    refused = CliRunner().invoke(main, ["plan", "-m", bundle, "--size", "18x16", "--device", "cpu"])
    assert refused.exit_code == 2
    assert "of which 16x16 is nearest" in refused.output
    assert planned("-m", bundle, "--backend", "torch", "--dtype", "float32") == {**torch_plan, "model": bundle}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_a_pipeline_on_a_gpu(backend: str, sd1: tuple[Path, Path], torch_pipe: Pipeline) -> None:
    if not _has({"tensorrt": "tensorrt_rtx"}.get(backend, backend)):
        pytest.skip(f"{backend} is not installed")
    pipe = Pipeline.from_pretrained(sd1[1], backend=backend, device="cuda")
    request = {"prompt": ["a cat", "two dogs, " * 20], **SMALL}
    assert apart(pipe(**request).images.cpu(), torch_pipe(**request).images) <= 1e-3


@pytest.mark.full
def test_float16(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Held against the float32 reference; OpenVINO computes it in float32 and has only the weights' error."""
    shared = bundles.shared(tmp_path_factory)
    source, bundle = bundles.exported("sdxl", True, shared, dtype="float16")
    expected = load(source, "torch")("a cat", **SMALL).images
    assert apart(load(bundle, "onnxruntime", dtype=None)("a cat", **SMALL).images, expected) <= 1e-2
    assert apart(load(bundle, "openvino")("a cat", **SMALL).images, expected) <= 1e-2
