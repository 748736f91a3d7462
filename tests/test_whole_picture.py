"""Steps and pictures as one graph each: the images are the pipeline's, and the graphs what loops and browsers run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch
from torch import Tensor

from fastldm import Pipeline
from fastldm.errors import BundleError, InputError
from fastldm.export import verify as proof
from fastldm.export import writing
from fastldm.export.bundle import Bundle
from fastldm.export.engine import open_engine
from fastldm.export.graphs import FILES, STEPS, WHOLE_PICTURE
from fastldm.image import to_pixels
from fastldm.kernels.columns import COLUMNS
from fastldm.loading import spec as loading
from fastldm.request import Request
from fastldm.runtime.whole_picture import picture_inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
composing: Any = pytest.importorskip("fastldm.export.whole_picture", reason="needs fastldm[onnx]", exc_type=ImportError)
onnx = composing.onnx

ENGINES = ["onnxruntime", "openvino"]
FAMILIES = [
    *("sdxl", "sd1-inpaint", "sd2-v", "lcm", "sdxl-lcm", "sdxl-refiner"),
    *("sd1-edit", "sdxl-edit", "sd2-depth", "sd1-variation", "sd2-unclip"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLDM_CACHE", str(bundles.shared(tmp_path_factory) / "cache"))


def exported(factory: pytest.TempPathFactory, family: str = "sd1", **options: Any) -> tuple[Path, Path]:
    return bundles.exported(family, True, bundles.shared(factory), whole_picture=True, **options)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return exported(tmp_path_factory)


def requests(family: str) -> list[Request]:
    """By samplers of every kind, guided and not, from noise, from a picture and with a mask, one image and several."""
    small: dict[str, Any] = {"num_inference_steps": 3, "seed": 1, "output_type": "pt", "height": 16, "width": 24}
    start = np.random.default_rng(0).random((16, 24, 3), dtype=np.float32)
    mask = np.zeros((16, 24), dtype=np.float32)
    mask[4:12, 8:16] = 1
    again: dict[str, Any] = {"image": start, "strength": 0.9}
    options: list[dict[str, Any]] = [
        {"prompt": ["a cat", "two dogs"], "negative_prompt": "blurry", "sampler": "ddim", "guidance_scale": 3.0},
        {"prompt": "a cat", "guidance_scale": 1.0, "sampler": "euler a", "num_images_per_prompt": 2},
        {
            "prompt": "a cat",
            "guidance_scale": 4.0,
            "guidance_rescale": 0.7,
            "sampler": "unipc",
            "strength": 0.8,
            **again,
        },
        {"prompt": "a cat", "guidance_interval": (0.0, 0.5), "sampler": "heun", **again, "mask_image": mask},
        {"prompt": "a cat", "sampler": "dpm++ 2m sde", "guidance_scale": 2.0},
    ]
    return [Request(**bundles.for_family(family, {**small, **own})) for own in options]


def expect_pictures(source: Path, bundle: Path, backend: str, tolerance: float, family: str = "sd1") -> None:
    """The graph's images are those of the pipeline on PyTorch."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    pipe = Pipeline.from_pretrained(source, backend="torch", device="cpu", dtype="float32")
    opened = Bundle.open(bundle)
    spec = opened.graphs[WHOLE_PICTURE]
    engine = open_engine(backend, opened.path(WHOLE_PICTURE), spec)
    for request in requests(family):
        image = to_pixels(engine(picture_inputs(pipe.stages, request, spec))["image"], "pt")
        expected: Tensor = pipe(request).images  # type: ignore[assignment]
        assert image.shape == expected.shape
        assert float((image - expected).abs().max()) < tolerance, request.sampler
    engine.close()


@pytest.mark.parametrize("backend", ENGINES)
def test_whole_picture_is_the_pipelines(backend: str, sd1: tuple[Path, Path]) -> None:
    expect_pictures(*sd1, backend, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_picture_of_every_family(family: str, backend: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    expect_pictures(*exported(tmp_path_factory, family), backend, 1e-4, family)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_float16_graphs_are_as_close_as_float16(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    expect_pictures(*exported(tmp_path_factory, family, dtype="float16"), "onnxruntime", 3e-2, family)


@pytest.mark.full
def test_opset_23_graphs_are_the_pipelines(tmp_path_factory: pytest.TempPathFactory) -> None:
    expect_pictures(*exported(tmp_path_factory, opset=23), "onnxruntime", 1e-4)


def graphs(bundle: Path) -> dict[str, Any]:
    return {name: onnx.load(bundle / file, load_external_data=False) for name, file in FILES.items()}


def nodes(graph: Any) -> list[Any]:
    """Those of a graph and of the bodies in it."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += nodes(attribute.g)
    return found


def test_graphs_are_what_loops_and_browsers_run(sd1: tuple[Path, Path]) -> None:
    for name, model in graphs(sd1[1]).items():
        found = nodes(model.graph)
        counts = {op: sum(node.op_type == op for node in found) for op in ("Loop", "If", "GroupNormalization")}
        assert counts == {"Loop": 1, "If": name == WHOLE_PICTURE, "GroupNormalization": 0}
        assert max(len(node.output) for node in found if node.op_type == "Split") <= 6
        assert max(len(node.input) for node in found if node.op_type == "Concat") <= 6
        own = {value.name for value in (*model.graph.input, *model.graph.output)}
        inner = {"x_out", "y_out", "h_out", "norm_out", "going_out"}
        named = {output for node in found for output in node.output} - own - inner
        scopes = {label.split("/")[0] for label in named}
        networks = {"unet_step"} if name == STEPS else {*bundles.NETWORKS} - {"vae_encoder"}
        assert scopes == networks | {"main", "step"} | ({"decoder", "none"} if name == WHOLE_PICTURE else set())


def test_wide_splits_and_concats_become_trees(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    helper = onnx.helper
    sizes = list(range(1, 41))
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, sum(sizes)]) for name in ("x", "y")]
    parts = [f"part{k}" for k in range(len(sizes))]
    inner = helper.make_graph(
        [
            helper.make_node("Split", ["x", "sizes"], parts, name="split", axis=1),
            helper.make_node("Concat", parts[::-1], ["y"], name="concat", axis=1),
        ],
        "wide",
        [value[0]],
        [value[1]],
        [onnx.numpy_helper.from_array(np.array(sizes), "sizes")],
    )
    main = composing.Nodes("main")
    outputs = main.network(helper.make_model(inner), "wide", {"x": "x"})
    main.named("y", "Identity", outputs["y"])
    weights = [composing._moved(tensor, "wide") for tensor in inner.initializer]
    graph = helper.make_graph(main.nodes, "narrow", [value[0]], [value[1]], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert max(max(len(node.input), len(node.output)) for node in main.nodes) <= 6
    x = np.random.default_rng(0).random((2, sum(sizes)), dtype=np.float32)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    expected = np.concatenate(np.split(x, np.cumsum(sizes)[:-1], axis=1)[::-1], axis=1)
    assert np.array_equal(y, expected)


def test_weights_are_stored_once(sd1: tuple[Path, Path]) -> None:
    bundle = sd1[1]
    for name, model in graphs(bundle).items():
        outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
        files = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
        networks = {"unet_step"} if name == STEPS else {*bundles.NETWORKS} - {"vae_encoder"}
        assert files == {f"{network}/model.onnx_data" for network in networks}
        inside = sum(len(tensor.raw_data) for tensor in model.graph.initializer if not tensor.external_data)
        assert inside < 20_000, "only what is too small to be worth a file"
    assert not [*bundle.glob("*.onnx_data")]


def test_manifest_and_graphs_name_the_columns(sd1: tuple[Path, Path]) -> None:
    manifest = json.loads((sd1[1] / "manifest.json").read_text())
    assert manifest["columns"] == list(COLUMNS)
    assert {*FILES.values()} <= manifest["files"].keys()
    for model in graphs(sd1[1]).values():
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert properties["columns"].split() == list(COLUMNS)


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino-graph", marks=pytest.mark.full)])
def test_verify_proves_graphs_too(backend: str, sd1: tuple[Path, Path]) -> None:
    pytest.importorskip(backend.removesuffix("-graph"), reason=f"{backend} is not installed")
    opened = Bundle.open(sd1[1])
    checks = [check for name in opened.graphs for check in proof.check_network(opened, name, backend)]
    assert [check.problem for check in checks] == [""] * 6
    assert {check.network for check in checks} == {STEPS, WHOLE_PICTURE}


@pytest.mark.parametrize(("first", "second"), [("e", "f0"), ("b1", "b2"), ("r", "s"), ("d", "e1")])
def test_verify_finds_wrong_column(
    first: str, second: str, sd1: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    copy = Path(shutil.copytree(sd1[1], tmp_path / "copy"))
    swapped = {first: second, second: first}
    monkeypatch.setattr(composing, "COLUMNS", tuple(swapped.get(name, name) for name in COLUMNS))
    opened = Bundle.read(copy)
    composing.write(opened, STEPS)
    assert all(check.problem for check in proof.check_network(opened, STEPS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused_ops": True}, "whole_picture does not go with fused_ops"),
        ({"adapter_rank": 4}, "whole_picture does not go with adapter_rank"),
        ({"controls": {"edges": object()}}, "whole_picture does not go with controls"),
        ({"whole_picture": 1}, "whole_picture is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_combinations_are_refused_by_name(
    options: dict[str, Any], message: str, sd1: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        writing.export(loading.describe(sd1[0]), tmp_path / "out", source=None, **{"whole_picture": True, **options})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a cat " * 100}, "several windows"),
        ({"prompt": "a (red:1.3) cat"}, "has weights"),
        ({"prompt": "a cat", "clip_skip": 1}, "clip_skip was given"),
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "prompt_embeds was given"),
    ],
    ids=["windows", "weights", "clip_skip", "embeddings"],
)
def test_graph_refuses_what_it_does_not_read(options: dict[str, Any], message: str, sd1: tuple[Path, Path]) -> None:
    pipe = Pipeline.from_pretrained(sd1[0], backend="torch", device="cpu", dtype="float32")
    with pytest.raises(InputError, match=message):
        picture_inputs(pipe.stages, Request(**options), Bundle.read(sd1[1]).graphs[WHOLE_PICTURE])


def test_manifest_with_other_columns_is_refused(sd1: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd1[1], tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    bundles.sign(copy, {**manifest, "columns": [*COLUMNS, "unheard_of"]})
    with pytest.raises(BundleError, match=r"'columns' are .* unheard_of, and samplers here have"):
        Bundle.read(copy)
