"""ONNX files of networks, run by ONNX Runtime on the CPU and held against PyTorch in float32."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections import Counter
from pathlib import Path
from typing import Any

import bundles
import onnx
import pytest
import tiny
import torch

import fastldm
from fastldm.errors import BundleError, EngineError, InputError
from fastldm.export.engine import open_engine
from fastldm.export.onnx import _trace, _Traced, check_graph, write
from fastldm.export.onnxruntime import ONNXRuntimeEngine
from fastldm.export.parity import Difference, difference, gate
from fastldm.export.reference import ReferenceNetworks
from fastldm.export.spec import NetworkSpec, sample
from fastldm.kernels import observe
from fastldm.loading import spec as loading
from fastldm.models.layers import GEGLU, GroupNorm
from fastldm.sizes import nearest

ROOT = Path(fastldm.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> loading.Spec:
    return loading.describe(bundles.smallest("sd1", tmp_path_factory.mktemp("model")))


def nodes(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def sizes_of(spec: NetworkSpec) -> list[dict[str, int]]:
    """None of them traced: one row, upright and broad pictures, one timestep and one each, two windows of text, and the
    largest of all."""
    axes = spec.axes
    height = {name: nearest(axes[name], axes[name].best // 2) for name in ("width",) if name in axes}
    width = {name: axes[name].most for name in ("width",) if name in axes}
    several = {name: min(2 * axes[name].best, axes[name].most) for name in ("tokens",) if name in axes}
    return [{"batch": 1, "steps": 1, "rows": 1, **height}, {"batch": 4, "steps": 4, "rows": 9, **width, **several}]


def judge(networks: ReferenceNetworks, reference: ReferenceNetworks, name: str, folder: Path, **options: Any) -> float:
    """Exports a network and returns its largest relative error, which is small."""
    write(networks, name, folder, **options)
    spec, worst = networks.specs[name], 0.0
    engine = ONNXRuntimeEngine(folder / "model.onnx", spec, torch.device("cpu"))
    dtype = next(port.dtype for port in spec.outputs)
    for seed, sizes in enumerate(sizes_of(spec)):
        inputs = sample(spec, sizes, seed)
        exact = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
        expected = reference.run(name, exact)
        got = engine(inputs)
        worst = max(worst, *(difference(got[output], expected[output]).relative for output in expected))
    assert worst <= {"float32": 1e-4, "float16": 1e-2}[dtype]
    return worst


def test_a_unet(model: loading.Spec, tmp_path: Path) -> None:
    networks = ReferenceNetworks(model, "float32")
    assert judge(networks, networks, "unet", tmp_path / "unet") > 0  # ONNX Runtime sums in another order
    counts = nodes(tmp_path / "unet")
    modules = list(networks.module("unet").modules())
    assert counts["GroupNormalization"] == sum(isinstance(module, GroupNorm) for module in modules) > 5
    assert counts["Gelu"] == sum(isinstance(module, GEGLU) for module in modules) > 2
    assert not counts.keys() & {"InstanceNormalization", "Erf"}
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"model.onnx", "model.onnx_data"}

    graph = onnx.load(tmp_path / "unet" / "model.onnx", load_external_data=False)
    dims = {
        port.name: [size.dim_param or size.dim_value for size in port.type.tensor_type.shape.dim]
        for port in (*graph.graph.input, *graph.graph.output)
    }
    assert dims == {
        "sample": ["batch", 4, "2*height", "2*width"],
        "timestep": ["steps"],
        "encoder_hidden_states": ["batch", "tokens", 32],
        "out_sample": ["batch", 4, "2*height", "2*width"],
    }
    # Nothing that depends on weights alone is left to be computed: no transpose or concatenation of initializers.
    weights = {tensor.name for tensor in graph.graph.initializer}
    constant_nodes = [node.op_type for node in graph.graph.node if node.input and set(node.input) <= weights]
    assert constant_nodes == []


def test_the_same_model_gives_the_same_bytes(model: loading.Spec, tmp_path: Path) -> None:
    for folder in ("once", "again"):
        write(ReferenceNetworks(model, "float32", split=True), "time_rows", tmp_path / folder)
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    graph = (tmp_path / "once" / "model.onnx").read_bytes()
    assert str(ROOT).encode() not in graph  # in the stack traces that the exporter leaves
    assert b"site-packages" not in graph


def test_graph_with_unexpected_nodes_is_refused(model: loading.Spec, tmp_path: Path) -> None:
    networks = ReferenceNetworks(model, "float32", split=True)
    traced = _trace(_Traced(networks, "text_kv"), networks.specs["text_kv"], 21)
    check_graph(traced, networks, "text_kv", 21)
    with pytest.raises(BundleError, match="vae_decoder: the traced graph has 0 GroupNormalization nodes, expected"):
        check_graph(traced, networks, "vae_decoder", 21)
    with pytest.raises(InputError, match="opset is 18: expected 21 or 23"):
        write(networks, "text_kv", tmp_path / "text_kv", opset=18)
    assert not (tmp_path / "text_kv").exists()


def test_differences() -> None:
    expected = torch.tensor([1.0, 2.0, -4.0])
    matches = difference(expected + torch.tensor([0.0, 0.0, 0.02]), expected)
    assert (matches.maximum, matches.relative) == (pytest.approx(0.02), pytest.approx(0.005))
    assert matches.psnr == pytest.approx(10 * math.log10(4 / (0.02**2 / 3)))
    assert matches.spread == pytest.approx(0.02 / 21**0.5)
    assert difference(expected, expected) == difference(torch.zeros(1), torch.zeros(1)) == Difference.none()
    for wrong in (expected * torch.nan, expected[:1], expected / 0):
        assert difference(wrong, expected).relative == difference(wrong, expected).bias == float("inf")
    many = torch.randn(10_000)
    assert difference(1.008 * many, many).bias == pytest.approx(0.008, rel=1e-3)  # a factor
    assert difference(many + 0.008, many).bias == pytest.approx(0.008, rel=0.1)  # a shift
    assert difference(many + 0.008 * torch.randn(10_000), many).bias < 0.0005  # as rounding is


def test_bounds_follow_sound_computation() -> None:
    """A bias is refused at half of a sound error, and noise at more than four times as much."""
    expected = torch.randn(100_000)
    sound = {"out": difference(expected + 1e-3 * torch.randn(100_000), expected)}
    gate("unet", {"out": expected + 3e-3 * torch.randn(100_000)}, {"out": expected}, sound)
    for wrong in (1.0008 * expected, expected + 0.0008, expected + 5e-3 * torch.randn(100_000), expected * torch.nan):
        with pytest.raises(
            BundleError, match=r"unet: out \(100000,\) is not PyTorch's .*: relative error .* allowed are"
        ):
            gate("unet", {"out": wrong}, {"out": expected}, sound)
    with pytest.raises(BundleError, match="unet has no output 'out', only other"):
        gate("unet", {"other": expected}, {"out": expected}, sound)


# Of those whose networks are alike, one: they differ in their schedulers, which are not exported.
ALIKE = {"sd2-v", "sd-turbo", "sdxl-turbo", "sdxl-lightning"}


@pytest.mark.full
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in (*ALIKE, "sdxl-refiner")])
def test_every_family(family: str, tmp_path: Path) -> None:
    spec = loading.describe(tiny.save_pipeline(family, tmp_path / "model"))
    full, split = (ReferenceNetworks(spec, "float32", split=split) for split in (False, True))
    for networks in (full, split):
        for name in networks.specs:
            if networks is full or name not in full.specs:
                judge(networks, networks, name, tmp_path / name)


FUSED = {"group_norm": "GroupNorm", "attention": "Attention", "linear_geglu": "GEGLU"}


@pytest.mark.parametrize(
    ("name", "opset", "dtype", "kinds"),
    [
        ("text_encoder", 21, "float32", {"CausalHeadAttention"}),
        ("vae_decoder", 21, "float16", {"GroupNormSiLU"}),
        pytest.param("text_encoder", 23, "float16", {"CausalHeadAttention"}, marks=pytest.mark.full),
        *(
            pytest.param(
                *("unet_step", opset, "float32"),
                {"GroupNorm", "GroupNormSiLU", "GroupNormSkipSiLU", "GroupNormShiftSiLU", "HeadAttention", "GEGLU"},
                marks=pytest.mark.full,
            )
            for opset in (21, 23)
        ),
    ],
)
def test_fused_ops_are_one_node_each(
    name: str,
    opset: int,
    dtype: Any,
    kinds: set[str],
    model: loading.Spec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ONNX Runtime, which knows none of them, runs what they stand for, and TensorRT builds it; OpenVINO says no."""
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    networks, reference = (ReferenceNetworks(model, precision, split=True) for precision in (dtype, "float32"))
    judge(networks, reference, name, tmp_path / name, opset=opset, fused_ops=True)
    path, spec = tmp_path / name / "model.onnx", networks.specs[name]
    onnx.checker.check_model(path)

    calls: Counter[str] = Counter()
    with observe(lambda op, args, kwargs: calls.update([op.name])):
        networks.run(name, sample(spec, {"batch": 1}))
    graph = onnx.load(path, load_external_data=False)
    matches = Counter(node.op_type for node in graph.graph.node if node.domain == "fastldm")
    assert matches.keys() == kinds == {function.name for function in graph.functions}
    assert sum(matches.values()) == sum(calls[op] for op in FUSED) > 0
    for op, op_type in FUSED.items():
        assert sum(count for kind, count in matches.items() if op_type in kind) == calls[op]
    # none of what the functions are made of is outside of them
    outside = {node.op_type for node in graph.graph.node if not node.domain}
    assert not outside & {"GroupNormalization", "Gelu", "Softmax", "Attention"}
    bodies = {function.name: [node.op_type for node in function.node] for function in graph.functions}
    assert all("GroupNormalization" in body for kind, body in bodies.items() if kind.startswith("GroupNorm"))

    if importlib.util.find_spec("openvino"):
        with pytest.raises(EngineError, match=r"has fused ops: export the model without --fused-ops"):
            open_engine("openvino", path, spec)
    if importlib.util.find_spec("tensorrt_rtx"):
        tensorrt = importlib.import_module("fastldm.export.tensorrt")
        assert len(tensorrt.build(path, spec)) > 10_000


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd1", "sdxl-lcm"])
def test_float16(family: str, tmp_path: Path) -> None:
    """SDXL's autoencoder is rescaled on the way."""
    spec = loading.describe(tiny.save_pipeline(family, tmp_path / "model"))
    networks, reference = ReferenceNetworks(spec, "float16"), ReferenceNetworks(spec, "float32")
    assert all(judge(networks, reference, name, tmp_path / name) > 1e-5 for name in networks.specs)


@pytest.mark.full
@pytest.mark.parametrize(("name", "attentions"), [("unet", 2 * 16), ("vae_decoder", 1), ("text_encoder", 3)])
def test_opset_23_has_attention_as_one_node(name: str, attentions: int, tmp_path: Path) -> None:
    networks = ReferenceNetworks(loading.describe(tiny.save_pipeline("sd1", tmp_path / "model")), "float32")
    judge(networks, networks, name, tmp_path / name, opset=23)
    assert nodes(tmp_path / name)["Attention"] == attentions
    assert nodes(tmp_path / name)["Softmax"] == 0


@pytest.mark.full
@pytest.mark.parametrize("kind", ["tiny", "codes"])
def test_other_autoencoders(kind: str, tmp_path: Path) -> None:
    """The nearest code is in the graph."""
    vae = tiny.tiny_vae() if kind == "tiny" else tiny.vq(latent_channels=4, num_vq_embeddings=2100)
    tiny.pipeline("sd1", vae=vae).save_pretrained(tmp_path / "model")
    networks = ReferenceNetworks(loading.describe(tmp_path / "model"), "float32")
    for name in ("vae_decoder", "vae_encoder"):
        judge(networks, networks, name, tmp_path / name)
