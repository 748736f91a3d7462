"""Smaller weights of a graph: ONNX Runtime computes with what they were rounded to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx: Any = pytest.importorskip("onnx", reason="needs fastldm[onnx]")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="needs fastldm[onnx]")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fastldm.export.lighter import lighten  # noqa: E402

SHAPES = {"table": (40, 16), "kernel": (24, 16, 3, 1), "product": (24, 20), "gemm": (16, 20), "bias": (16,)}
CHANNELS = {"table": 0, "kernel": 0, "product": 1, "gemm": 0}


def weights() -> dict[str, np.ndarray]:
    """Each with channels of very different sizes, one of them all zeros."""
    draw = np.random.default_rng(0)
    made = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    for name, axis in CHANNELS.items():
        scale = np.geomspace(1e-3, 10, SHAPES[name][axis])
        scale[1] = 0
        made[name] *= scale.reshape([-1 if k == axis else 1 for k in range(made[name].ndim)])
    return {name: value.astype(np.float32) for name, value in made.items()}


def graph(values: dict[str, np.ndarray]) -> Any:
    """A lookup, then, in the body of an If, as the decoder is, a convolution, a product and a Gemm."""
    body = [
        helper.make_node("Conv", ["x", "kernel"], ["convolved"], pads=[1, 0, 1, 0]),
        helper.make_node("Transpose", ["convolved"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["last", "product"], ["multiplied"]),
        helper.make_node("Reshape", ["multiplied", "flat"], ["flattened"]),
        helper.make_node("Gemm", ["flattened", "gemm", "bias"], ["y"], transB=1),
    ]
    own = helper.make_graph(body, "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])])
    other = helper.make_graph(
        [helper.make_node("Identity", ["product"], ["z"])],
        "else",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", "m"])],
    )
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
        helper.make_node("Reshape", ["rows", "image"], ["x"]),
        helper.make_node("If", ["yes"], ["out"], then_branch=own, else_branch=other),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    for name, value in {"flat": np.array([-1, 20]), "image": np.array([1, 16, 5, 2]), "yes": np.array(True)}.items():
        tensors.append(numpy_helper.from_array(value, name))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [10])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", "m"])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [ids], [out], tensors), opset_imports=[helper.make_opsetid("", 21)]
    )
    model.ir_version = 10
    return model


def run(model: Any) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"ids": np.arange(10)})
    return out


def in_8_bits(name: str, value: np.ndarray) -> np.ndarray:
    """Per channel, a grid of 255 numbers to the largest."""
    if name not in CHANNELS:
        return value
    lines = np.moveaxis(value, CHANNELS[name], 0)
    rounded = np.zeros_like(lines)
    for k, line in enumerate(lines):
        if line.any():
            step = np.float32(np.abs(line).max() / 127)
            rounded[k] = np.round(line / step) * step
    return np.moveaxis(rounded, 0, CHANNELS[name])


@pytest.mark.parametrize(
    ("form", "rounding"),
    [
        ("float32", lambda name, value: value),
        ("float16", lambda name, value: value if name == "bias" else value.astype(np.float16).astype(np.float32)),
        ("int8", lambda name, value: in_8_bits(name, value)),
    ],
    ids=["float32", "float16", "int8"],
)
def test_lighter_graph_computes_with_rounded_weights(form: str, rounding: Any) -> None:
    model = graph(weights())
    lighten(model, form)
    onnx.checker.check_model(model)
    expected = run(graph({name: rounding(name, value) for name, value in weights().items()}))
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-4)
    assert (np.abs(run(graph(weights())) - expected).max() > 1e-2) == (form != "float32")


def test_weights_take_what_their_form_takes() -> None:
    sizes = {}
    for form in ("float32", "float16", "int8"):
        model = graph(weights())
        lighten(model, form)
        sizes[form] = sum(len(numpy_helper.to_array(tensor).tobytes()) for tensor in model.graph.initializer)
    large = sum(np.prod(shape) for name, shape in SHAPES.items() if name != "bias")
    assert sizes["float32"] - sizes["float16"] == 2 * large
    scales = 4 * sum(SHAPES[name][axis] for name, axis in CHANNELS.items())
    assert sizes["float32"] - sizes["int8"] == 3 * large - scales


def test_weights_beyond_float16_stay_as_they_are() -> None:
    values = weights()
    values["gemm"] *= 1e5
    model = graph(values)
    lighten(model, "float16")
    kept = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kept.get("gemm") == TensorProto.FLOAT
    assert kept.get("kernel/half") == TensorProto.FLOAT16
