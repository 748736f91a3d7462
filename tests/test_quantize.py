"""Networks in eight bits: weights and what layers read are rounded as the formulas say, and files hold no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

quantize: Any = pytest.importorskip("fastldm.export.quantize", reason="needs fastldm[onnx]", exc_type=ImportError)
onnx, ort = quantize.onnx, quantize.ort
Array = NDArray[Any]


def network(path: Path) -> dict[str, Array]:
    """A convolution (4 to 8 channels), its mean over rows, and a linear layer of 8 to 5. Returns its weights."""
    rng = np.random.default_rng(0)
    sizes = np.logspace(-2, 1, 8, dtype=np.float32)[:, None, None, None]
    weights: dict[str, Array] = {
        "conv": rng.normal(size=(8, 4, 3, 3)).astype(np.float32) * sizes,
        "bias": rng.normal(size=8).astype(np.float32),
        "linear": rng.normal(size=(8, 5)).astype(np.float32),
        "axes": np.array([2, 3]),
    }
    weights["linear"][:, 2] = 0
    nodes = [
        onnx.helper.make_node("Conv", ["x", "conv", "bias"], ["y"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("ReduceMean", ["y", "axes"], ["z"], keepdims=0),
        onnx.helper.make_node("MatMul", ["z", "linear"], ["out"]),
    ]
    value = onnx.helper.make_tensor_value_info
    floats = onnx.TensorProto.FLOAT
    tensors = [onnx.numpy_helper.from_array(x, name) for name, x in weights.items()]
    graph = onnx.helper.make_graph(
        nodes, "small", [value("x", floats, ["N", 4, 6, 5])], [value("out", floats, ["N", 5])], tensors
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=256)
    return weights


def run(path: Path, x: Array) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # what the nodes say, one by one
    return ort.InferenceSession(str(path), options).run(None, {"x": x})[0]


def through_int8(w: Array, axis: int) -> Array:
    others = tuple(i for i in range(w.ndim) if i != axis)
    scale = np.abs(w).max(others, keepdims=True) / np.float32(127)
    return np.round(w / np.where(scale > 0, scale, 1)) * scale


def inputs(seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(3, 4, 6, 5)).astype(np.float32) + np.float32(0.5)


def test_weights_are_rounded_by_output_channel(tmp_path: Path) -> None:
    weights = network(tmp_path / "a" / "model.onnx")
    quantize.write_weights(tmp_path / "a" / "model.onnx", tmp_path / "b")
    expected = network(tmp_path / "c" / "model.onnx")
    for name, axis in (("conv", 0), ("linear", 1)):
        expected[name] = through_int8(weights[name], axis)
    model = onnx.load(tmp_path / "c" / "model.onnx")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(expected[tensor.name], tensor.name))
    onnx.save(model, tmp_path / "c" / "model.onnx")
    x = inputs()
    actual, rounded, floats = (run(tmp_path / name / "model.onnx", x) for name in "bca")
    assert np.abs(actual - rounded).max() < 1e-5 < np.abs(actual - floats).max()
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    assert stored["conv/int8"].data_type == onnx.TensorProto.INT8
    assert not {"conv", "linear"} & stored.keys()


def test_ranges_are_of_what_layers_read(tmp_path: Path) -> None:
    network(tmp_path / "a" / "model.onnx")
    several = [inputs(seed) for seed in range(3)]
    ranges = quantize.observe(tmp_path / "a" / "model.onnx", [{"x": x} for x in several])
    assert list(ranges) == ["x", "z"]
    own, stacked = ranges["x"], np.stack(several).astype(np.float64)
    assert (own.low, own.high) == (stacked.min(), stacked.max())
    assert own.power == pytest.approx(np.square(stacked).mean(), rel=1e-6)
    step = (stacked.max() - stacked.min()) / 255
    error = np.round(stacked / step) * step - stacked
    assert own.noise == pytest.approx(np.square(error).mean() / np.square(stacked).mean(), rel=0.2)


def test_what_layers_read_is_rounded_and_cut(tmp_path: Path) -> None:
    network(tmp_path / "a" / "model.onnx")
    graph = quantize.write_weights(tmp_path / "a" / "model.onnx", tmp_path / "b")
    x = inputs()
    own = quantize.Range(-1.0, 2.0, 1.0)  # narrower than x
    onnx.save(quantize.with_activations(graph, {"x": own}), tmp_path / "b" / "both.onnx")
    scale = np.float32(3 / 255)
    rounded = (np.clip(np.round(x / scale) + 85, 0, 255) - 85) * scale
    expected = run(tmp_path / "b" / "model.onnx", rounded.astype(np.float32))
    actual = run(tmp_path / "b" / "both.onnx", x)
    assert np.abs(actual - expected).max() < 1e-5 < np.abs(actual - run(tmp_path / "b" / "model.onnx", x)).max()
    ops = [node.op_type for node in onnx.load(tmp_path / "b" / "both.onnx", load_external_data=False).graph.node]
    assert ops.count("QuantizeLinear") == 1, "the linear layer reads floats"


def test_float16_stays_float16(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    rounded, scale = quantize.rounded(weights, 1)
    assert scale.dtype == np.float16
    assert np.abs(rounded * scale.astype(np.float32) - weights).max() <= 0.52 * scale.max()
