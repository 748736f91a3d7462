"""Attaching and detaching controls, before, between and while requests run."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import bundles
import controls
import lora
import numpy as np
import pytest
import tiny
from command import run
from controls import BASE, make, picture

from fastldm import Pipeline, Session
from fastldm.errors import BundleError, CheckpointError, InputError
from fastldm.export import networks
from fastldm.export.bundle import Bundle


def test_attach_names_and_detach(tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    theirs = controls.controlnet("sd1")
    theirs.save_pretrained(tmp_path / "outlines")
    assert [pipe.attach_control(tmp_path / "outlines") for _ in range(2)] == ["outlines", "outlines-2"]
    assert pipe.attach_control(theirs, "mine") == "mine"
    assert list(pipe.controls) == ["outlines", "outlines-2", "mine"]
    assert pipe.controls["mine"].source == "the given ControlNetModel"
    with pytest.raises(InputError, match="a control named 'mine' is attached"):
        pipe.attach_control(theirs, "mine")
    with pytest.raises(InputError, match="no control named 'none'"):
        pipe.detach_control("none")
    pipe.detach_control("outlines")
    assert list(pipe.controls) == ["outlines-2", "mine"]
    with pytest.raises(CheckpointError):
        pipe.attach_control(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="this T2I-Adapter does not fit the model"):
        pipe.attach_control(controls.t2i_adapter("xl"))
    assert list(pipe.controls) == ["outlines-2", "mine"]
    pipe.detach_control()
    assert pipe.controls == {}


def test_pipeline_loads_with_its_controls(tmp_path: Path) -> None:
    tiny.save_pipeline("sd1", tmp_path / "sd1")
    nets = [controls.controlnet("sd1", 10), controls.controlnet("sd1", 11)]
    nets[0].save_pretrained(tmp_path / "outlines")
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    pipe = Pipeline.from_pretrained(tmp_path / "sd1", controlnet=tmp_path / "outlines", **options)
    assert list(pipe.controls) == ["outlines"]
    made = make(pipe, control_image=picture())
    multi = tiny.peer("diffusers").MultiControlNetModel(nets)
    adapter = controls.t2i_adapter("light")
    pipe = Pipeline.from_pretrained(tmp_path / "sd1", controlnet=multi, adapter=[adapter], **options)
    assert len(pipe.controls) == 3
    first = next(iter(pipe.controls))
    assert np.abs(make(pipe, control_image={first: picture()}) - made).max() < 1e-6


def test_request_keeps_a_control_that_is_detached() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    pipe.attach_control(controls.controlnet("sd1"), "outlines")
    options = {**BASE, "seed": 0, "control_image": {"outlines": picture()}, "num_inference_steps": 6}
    expected = pipe(**options).images
    begun = threading.Event()

    def detach(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.detach_control("outlines")
            begun.set()
        return tensors

    assert np.array_equal(pipe(**options, callback_on_step_end=detach).images, expected)
    assert begun.is_set()
    with pytest.raises(InputError, match="no control is attached"):
        pipe(**options)


def test_attaching_while_others_run_touches_no_picture() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    expected = make(pipe, num_inference_steps=8)
    with Session(pipe, max_batch=2) as session:
        running = session.submit(**{**BASE, "seed": 0, "num_inference_steps": 8})
        pipe.attach_control(controls.controlnet("sd1"), "outlines")
        also = session.submit(**{**BASE, "seed": 0}, control_image={"outlines": picture()})
        assert np.abs(running.result().images - expected).max() < 2e-5  # type: ignore[operator]
        alone = make(pipe, control_image={"outlines": picture()})
        assert np.abs(also.result().images - alone).max() < 2e-5


# ---- bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Path]]:
    return bundles.taking("sd1", tmp_path_factory)


Pipes = tuple[Pipeline, Pipeline]


def loaded(bundle: tuple[Path, Path, dict[str, Path]], backend: str = "onnxruntime") -> Pipes:
    """On PyTorch, and of a bundle."""
    source, folder, paths = bundle
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    ours = Pipeline.from_pretrained(source, **options)
    for name, path in paths.items():
        ours.attach_control(path, name)
    return ours, Pipeline.from_pretrained(folder, backend=backend, **options)


@pytest.fixture(scope="module")
def pipes(bundle: tuple[Path, Path, dict[str, Path]]) -> Pipes:
    return loaded(bundle)


SMALL = picture(side=16)
USES: list[dict[str, Any]] = [
    {},
    {"control_image": {"edges": SMALL}},
    {"control_image": {"edges": picture(2, 16)}, "guess_mode": True, "control_guidance_end": 0.5},
    {"control_image": {"depth": SMALL}, "adapter_conditioning_factor": 0.5},
    {"control_image": {"depth": SMALL, "edges": SMALL}, "controlnet_conditioning_scale": 0.6},
]


def check(pipes: Pipes) -> None:
    """The bundle's pictures are PyTorch's, which all differ."""
    expected = [make(pipes[0], **use) for use in USES]
    assert min(np.abs(x - y).max() for k, x in enumerate(expected) for y in expected[:k]) > 1e-3
    assert max(np.abs(make(pipes[1], **use) - right).max() for use, right in zip(USES, expected, strict=True)) < 1e-5


def test_bundle_makes_pytorchs_pictures(pipes: Pipes) -> None:
    assert list(pipes[1].controls) == ["edges", "depth"]
    assert pipes[1].controls["edges"].short_hash == pipes[0].controls["edges"].short_hash
    check(pipes)
    image = {"image": picture(3, 16), "strength": 0.8, "control_image": [SMALL, SMALL]}
    assert np.abs(make(pipes[1], **image) - make(pipes[0], **image)).max() < 1e-5


def test_bundle_on_openvino_too(
    bundle: tuple[Path, Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    check(loaded(bundle, "openvino"))


@pytest.mark.full
def test_bundle_of_sdxl_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    check(loaded(bundles.taking("sdxl", tmp_path_factory)))


@pytest.mark.full
def test_pooled_controlnet_in_a_bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, _, _ = bundles.taking("sd1", tmp_path_factory)
    pipe = Pipeline.from_pretrained(source, device="cpu", dtype="float32")
    pipe.attach_control(bundles.small_controlnet("sd1", global_pool_conditions=True), "shuffle")
    expected, plain = make(pipe, control_image=SMALL), make(pipe)
    with bundles.traced_once(bundles.shared(tmp_path_factory)):
        out = pipe.export(tmp_path / "out")
    assert np.abs(expected - plain).max() > 1e-2
    deployed = Pipeline.from_pretrained(out, backend="onnxruntime", device="cpu")
    assert np.abs(make(deployed, control_image=SMALL) - expected).max() < 1e-5


def test_bundle_mixes_controls_and_adapters(pipes: Pipes, tmp_path: Path) -> None:
    """Requests with a control, another, none, and an adapter with one share a batch, texts of unlike length too."""
    ours, pipe = pipes
    theirs = tiny.peer("diffusers").DiffusionPipeline.from_pretrained(ours.stages.spec.checkpoint.source)
    file = lora.write(tmp_path / "a.safetensors", theirs, unet=lora.ALL)
    for each in pipes:
        each.load_lora_weights(file, adapter_name="a")
        each.set_adapters([])
    long = {"prompt": "a cat " * 60}
    uses: list[dict[str, Any]] = [*USES[1:], {**USES[1], "adapters": {"a": 1.0}}, {**USES[4], **long}, {}]
    expected = [make(ours, **use) for use in uses]
    with Session(pipe, max_batch=8) as session:
        generations = [session.submit(**{**BASE, "seed": 0, **use}) for use in uses]
        made = [generation.result().images for generation in generations]
    assert max(np.abs(x - y).max() for x, y in zip(made, expected, strict=True)) < 1e-5
    for each in pipes:
        each.unload_lora_weights()


def test_bundle_takes_no_other_controls(pipes: Pipes) -> None:
    with pytest.raises(InputError, match=r"controls that it was exported with.*`fastldm export --control PATH`"):
        pipes[1].attach_control("anywhere")
    with pytest.raises(InputError, match="there is no control named 'lines'"):
        make(pipes[1], control_image={"lines": SMALL})


def test_command_names_a_bundles_control(
    bundle: tuple[Path, Path, dict[str, Path]], pipes: Pipes, tmp_path: Path
) -> None:
    SMALL.save(tmp_path / "edges.png")
    options = ["--seed", "1", "--steps", "3", "-o", str(tmp_path / "x.png"), "--force"]

    def generate(*more: str) -> bytes:
        done = run("generate", "a cat", "-m", str(bundle[1]), "--backend", "onnxruntime", *options, *more)
        assert done.exit_code == 0, done.output
        return (tmp_path / "x.png").read_bytes()

    pixels = [str(tmp_path / "edges.png")]
    assert b"Model: edges" in generate("--control", "edges:0.5", "--control-image", *pixels)
    assert b"ControlNet" not in generate()
    done = run("generate", "a cat", "-m", str(bundle[1]), *options, "--control", "lines", "--control-image", *pixels)
    assert "has the controls that it was exported with (edges, depth) and takes no others" in done.output


def test_bundle_opens_only_the_controls_that_run(
    bundle: tuple[Path, Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_engine = networks.open_engine

    def opening(backend: str, path: Path, spec: Any, **options: Any) -> Any:
        opened.append(spec.name)
        return open_engine(backend, path, spec, **options)

    monkeypatch.setattr(networks, "open_engine", opening)
    pipe = Pipeline.from_pretrained(bundle[1], backend="onnxruntime", device="cpu")
    make(pipe)
    assert not [name for name in opened if name.startswith(("controlnet", "t2i"))]
    make(pipe, control_image={"depth": SMALL})
    assert [name for name in opened if name.startswith(("controlnet", "t2i"))] == ["t2i_adapter_2"]


@pytest.mark.full
def test_bundle_verifies_its_controls(bundle: tuple[Path, Path, dict[str, Path]]) -> None:
    done = run("verify", str(bundle[1]))
    assert done.exit_code == 0, done.output
    names = [f"controlnet_1_{part}" for part in ("hint", "text_kv", "time_rows", "step")]
    lines = [line.split()[:2] for line in done.output.splitlines()]
    for name in (*names, "t2i_adapter_2", "unet_step"):
        assert lines.count([name, "golden"]) == lines.count([name, "fresh"]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"_class_name": "ControlNetXS"}}, r"'controls\.0': '_class_name' is 'ControlNetXS'"),
        ({"config": {"_class_name": "T2IAdapter"}}, r"'controls\.0': this T2I-Adapter does not fit the model"),
        ({"weights": "none"}, r"'controls\[?\.?0\]?.*weights.* a sha256"),
        ({"name": 3}, r"'controls.*name' is 3"),
    ],
)
def test_forged_control_is_refused(
    change: dict[str, Any], message: str, bundle: tuple[Path, Path, dict[str, Path]], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle[1], tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["controls"][0] |= change
    bundles.sign(copy, manifest)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)
