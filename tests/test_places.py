"""Adapters of bundles that take them after they were exported: pictures, batches of several, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bundles
import lora
import numpy as np
import pytest
import tiny
import torch
from command import run

from fastldm import Pipeline, Session
from fastldm.adapters.forms import Change, Difference, LoRA
from fastldm.adapters.read import Adapter
from fastldm.adapters.targets import Target
from fastldm.errors import BundleError, InputError, NonFinite
from fastldm.export import networks
from fastldm.export.bundle import Bundle

pytestmark = pytest.mark.full  # their bundle takes a minute to export; test_controlling.py has another with factors

OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np", "seed": 5}
SETS: list[dict[str, Any]] = [
    {"a": 1.0},
    {},
    {"a": 0.5, "b": -1.5},
    {"b": {"text_encoder": 0.3, "unet": {"down": 0.5, "up": 1.5}}},
    {"a": {"scale": 0.8, "start": 0.0, "end": 0.5}},
]
Folders = tuple[Path, Path, dict[str, Path]]


def folders(family: str, factory: pytest.TempPathFactory) -> Folders:
    """A model, the bundle of it that takes adapters, and two of all its layers."""
    source, bundle, _ = bundles.taking(family, factory)
    folder, files = factory.mktemp(f"{family}-loras"), {}
    for seed, (name, rank) in enumerate({"a": 4, "b": 3}.items()):
        pipe = tiny.peer("diffusers").DiffusionPipeline.from_pretrained(source)
        files[name] = lora.write(folder / f"{name}.safetensors", pipe, seed=seed, rank=rank, unet=lora.ALL)
    return source, bundle, files


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return folders("sd1", tmp_path_factory)


def loaded(path: Path, files: dict[str, Path], **options: Any) -> Pipeline:
    pipe = Pipeline.from_pretrained(path, device="cpu", dtype="float32", **options)
    for name, file in files.items():
        pipe.load_lora_weights(file, adapter_name=name)
    return pipe


@pytest.fixture(scope="module")
def pipes(sd1: Folders) -> tuple[Pipeline, Pipeline]:
    """On PyTorch, and of the bundle."""
    source, bundle, files = sd1
    return loaded(source, files), loaded(bundle, files, backend="onnxruntime")


def image(pipe: Pipeline, adapters: Any, **options: Any) -> Any:
    return pipe("a cat", adapters=adapters, **{**OPTIONS, **options})


def check(pipe: Pipeline, reference: Pipeline) -> None:
    """Each set's pictures are PyTorch's, which all differ."""
    expected = [image(reference, weights).images for weights in SETS]
    assert min(np.abs(x - y).max() for k, x in enumerate(expected) for y in expected[:k]) > 1e-2
    for weights, right in zip(SETS, expected, strict=True):
        result = image(pipe, weights)
        assert np.abs(result.images - right).max() < 1e-5
        assert result.adapters == ("beside" if weights else "")


def test_pictures_equal_pytorch(pipes: tuple[Pipeline, Pipeline]) -> None:
    check(pipes[1], pipes[0])


def test_picture_equals_diffusers(sd1: Folders, pipes: tuple[Pipeline, Pipeline]) -> None:
    theirs = tiny.peer("diffusers").DiffusionPipeline.from_pretrained(sd1[0])
    theirs.load_lora_weights(sd1[2]["b"], adapter_name="b")
    size = {"height": 16, "width": 16}
    expected = lora.picture(theirs, **size)
    assert np.abs(lora.picture(pipes[1], adapters={"b": 1.0}, **size) - expected).max() < 1e-4
    theirs.disable_lora()
    assert np.abs(lora.picture(theirs, **size) - expected).max() > 1e-2


def test_openvino_makes_the_same_pictures(
    sd1: Folders, pipes: tuple[Pipeline, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    check(loaded(sd1[1], sd1[2], backend="openvino"), pipes[0])


def test_plain_pictures_are_the_plain_bundles(
    pipes: tuple[Pipeline, Pipeline], tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, plain = bundles.exported("sd1", True, bundles.shared(tmp_path_factory))
    pipe = Pipeline.from_pretrained(plain, backend="onnxruntime", device="cpu")
    assert np.abs(image(pipe, {}).images - image(pipes[1], {}).images).max() < 1e-6
    with pytest.raises(InputError, match=r"onnxruntime, which takes no adapters: .*--lora FILE`.*--adapters RANK`"):
        pipe.load_lora_weights("anywhere")


@pytest.mark.full
def test_pictures_of_sdxl_equal_pytorch(tmp_path_factory: pytest.TempPathFactory) -> None:
    source, bundle, files = folders("sdxl", tmp_path_factory)
    check(loaded(bundle, files, backend="onnxruntime"), loaded(source, files))


# ---- several at once


def together(pipe: Pipeline, sets: list[Any], **options: Any) -> list[Any]:
    with Session(pipe, max_batch=8) as session:
        generations = [session.submit("a cat", adapters=weights, **{**OPTIONS, **options}) for weights in sets]
        return [generation.result() for generation in generations]


def calls(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the network of a step, from now on."""
    step, rows = pipe.unet._step, []
    run = step._engine.__call__

    class Counting:
        specs = step.specs

        def __call__(self, inputs: dict[str, torch.Tensor]) -> Any:
            rows.append(len(inputs["sample"]))
            return run(inputs)

    monkeypatch.setattr(step, "_engine", Counting())
    return rows


def test_mixed_batch_equals_each_alone(pipes: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipes[1]
    alone = [image(pipe, weights).images for weights in SETS[:3]]
    rows = calls(pipe, monkeypatch)
    for result, expected in zip(together(pipe, SETS[:3]), alone, strict=True):
        assert np.abs(result.images - expected).max() < 1e-5
    assert max(rows) == 6  # all in one call, once they are there


def test_sets_that_do_not_fit_take_turns(pipes: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of 3 and one of 7 are more than 8."""
    pipe = pipes[1]
    weights = [{"b": 1.0}, {"b": {"unet": {"mid": 0.5, "up": 0.2}}}, {"b": {"unet": {"up": 0.1}}}, {"b": 0.5}]
    alone = [image(pipe, each).images for each in weights]
    rows = calls(pipe, monkeypatch)
    for result, expected in zip(together(pipe, weights), alone, strict=True):
        assert np.abs(result.images - expected).max() < 1e-5
    assert max(rows) <= 6


def layer(name: str, form: Any) -> Adapter:
    """An adapter of the first convolution alone, which has the input (4, 3, 3)."""
    return Adapter(name, "nowhere", "kohya", "0" * 12, MappingProxyType({Target("unet", "conv_in"): Change(form)}), ())


def test_overflow_stays_in_its_own_picture(pipes: tuple[Pipeline, Pipeline]) -> None:
    """A scale of 0 leaves out what is infinite, which times 0 is not a number."""
    pipe = pipes[1]
    loud = LoRA(torch.full((1, 4, 3, 3), 3e38), torch.ones(16, 1), 1.0)
    pipe.stages.adapters.add("loud", layer("loud", loud))
    expected = image(pipe, {"a": 1.0}).images
    try:
        with Session(pipe, max_batch=8) as session:
            generations = [
                session.submit("a cat", adapters=weights, **OPTIONS) for weights in ({"loud": 1.0}, {"a": 1.0})
            ]
            with pytest.raises(NonFinite):
                generations[0].result()
            assert np.abs(generations[1].result().images - expected).max() < 1e-5  # type: ignore[operator]
    finally:
        pipe.delete_adapters("loud")


def test_batch_invariant_pictures_are_bitwise_alone(pipes: tuple[Pipeline, Pipeline]) -> None:
    pipe = pipes[1]
    sets: list[dict[str, Any]] = [{"a": 1.0}, {"b": 0.5}, {"a": 1.0}]
    with Session(pipe, max_batch=8, batch_invariant=True) as session:

        def submit(weights: Any) -> Any:
            return session.submit("a cat", adapters=weights, **OPTIONS)

        alone = [submit(weights).result().images for weights in sets]
        for result, expected in zip([submit(weights) for weights in sets], alone, strict=True):
            assert np.array_equal(result.result().images, expected)
    assert np.abs(alone[0] - image(pipe, {"a": 1.0}).images).max() < 1e-5


def test_swaps_rebuild_nothing(pipes: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipes[1]
    monkeypatch.setattr(networks, "open_engine", lambda *args, **options: pytest.fail("an engine was opened"))
    packed = pipe.stages.adapters.places.networks  # type: ignore[union-attr]
    before = {name: (own.down.data_ptr(), own.up.data_ptr()) for name, own in packed.items()}
    first = image(pipe, {"a": 1.0}).images
    for weights in ({"b": 1.0}, {"a": 0.1, "b": 0.2}, {}):
        image(pipe, weights)
    assert np.array_equal(image(pipe, {"a": 1.0}).images, first)
    assert {name: (own.down.data_ptr(), own.up.data_ptr()) for name, own in packed.items()} == before


# ---- the names, and what is refused


def test_methods_are_those_of_diffusers(pipes: tuple[Pipeline, Pipeline], sd1: Folders) -> None:
    pipe = loaded(sd1[1], {"a": sd1[2]["a"]}, backend="onnxruntime")
    adapted, plain = (image(pipes[1], weights).images for weights in ({"a": 1.0}, {}))
    assert np.array_equal(pipe("a cat", **OPTIONS).images, adapted)
    pipe.disable_lora()
    assert np.array_equal(pipe("a cat", **OPTIONS).images, plain)
    pipe.enable_lora()
    pipe.set_adapters("a", 0.5)
    assert pipe.get_active_adapters() == ["a"]
    half = image(pipes[1], {"a": 0.5}).images
    assert np.array_equal(pipe("a cat", **OPTIONS).images, half)
    scaled = pipe("a cat", adapters={"a": 1.0}, cross_attention_kwargs={"scale": 0.5}, **OPTIONS).images
    assert np.array_equal(scaled, half)
    for change in (pipe.fuse_lora, pipe.unfuse_lora):
        with pytest.raises(InputError, match=r"whose weights cannot be changed: .*`fastldm export --lora FILE:SCALE`"):
            change()
    pipe.unload_lora_weights()
    assert np.array_equal(pipe("a cat", **OPTIONS).images, plain)


def test_what_does_not_fit_is_refused(pipes: tuple[Pipeline, Pipeline], sd1: Folders, tmp_path: Path) -> None:
    pipe = pipes[1]
    whole = layer("whole", Difference(torch.zeros(16, 4, 3, 3)))
    with pytest.raises(InputError, match=r"no LoRA \(Difference\) for unet.conv_in.*export --lora FILE:SCALE`"):
        pipe.stages.adapters.add("whole", whole)
    with pytest.raises(InputError, match=r"rank 9 for unet.conv_in, and this bundle takes 8: .*`--adapters 9`"):
        pipe.stages.adapters.add("wide", layer("wide", LoRA(torch.zeros(9, 4, 3, 3), torch.zeros(16, 9), 1.0)))
    pipe.load_lora_weights(sd1[2]["a"], adapter_name="c")
    with pytest.raises(InputError, match=r"a rank of 11 together, and this bundle takes 8: .*`--adapters 11`"):
        image(pipe, {"a": 1.0, "b": 1.0, "c": 1.0})
    pipe.delete_adapters("c")
    assert list(pipe.adapters) == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_rank": 9}, r"text_encoder has lora_down \(\d+\) in float32 where its configs have lora_down"),
        (
            {"adapter_rank": 0, "adapter_inputs": {}},
            r"text_encoder has lora_down .* where its configs have",
        ),
        ({"adapter_inputs": {}}, "'adapter_inputs.unet_step' is not where unet_step reads the factors"),
        ({"adapter_rank": "8"}, "'adapter_rank' is '8', expected a whole number"),
        ({"split": False}, "it has adapters or controls, and its model is not split"),
    ],
)
def test_forged_manifest_is_refused(change: dict[str, Any], message: str, sd1: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd1[1], tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    bundles.sign(copy, {**manifest, **change})
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_moved_slice_is_refused(sd1: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd1[1], tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["adapter_inputs"]["unet_step"][3]["down"]["offset"] += 1
    bundles.sign(copy, manifest)
    with pytest.raises(BundleError, match=r"'adapter_inputs\.unet_step' is not where unet_step reads the factors"):
        Bundle.open(copy)


def test_command_exports_and_generates(sd1: Folders, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, bundle, files = sd1
    _, _, controls = bundles.taking("sd1", tmp_path_factory)
    options = [f"--control={path}" for path in controls.values()]
    done = run("export", "-m", str(source), str(bundle), f"--adapters={bundles.RANK}", *options)
    assert done.exit_code == 0, done.output  # opened: it is there
    done = run("export", "-m", str(source), str(bundle), "--adapters", "4", *options)
    assert (done.exit_code, "(adapter_rank differ)" in done.output) == (2, True)
    done = run("export", "-m", str(source), str(bundle), "--adapters", str(bundles.RANK), options[0])
    assert (done.exit_code, "(controls differ)" in done.output) == (2, True)
    image = tmp_path / "x.png"
    options = ["--lora", f"{files['a']}:0.5", "--steps", "2", "--seed", "1", "-o", str(image)]
    done = run("generate", "a cat", "-m", str(bundle), "--backend", "onnxruntime", *options)
    assert done.exit_code == 0, done.output
    assert b"Lora hashes" in image.read_bytes()
