"""A network's ONNX file in eight bits, as ONNX Runtime and OpenVINO both read it.

The weights of convolutions and linear layers become int8, with a scale for each output channel:

    s = max |W| / 127, W_q = round(W / s)                     DequantizeLinear(W_q, s)

What a layer reads becomes uint8, with one scale for all its values, from the range that they had in pictures:

    s = (high - low) / 255, z = round(-low / s)               DequantizeLinear(QuantizeLinear(x, s, z), s, z)

That is uniform quantization as in Jacob et al. 2018 (arXiv 1712.05877). A backend that has kernels for it multiplies
the integers, and others compute with the rounded values in floats: their pictures are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fastldm.export.spec import DATA, MODEL

MODES = ("int8-weights", "int8")
_OUTPUTS = {"Conv": 0, "MatMul": 1}  # the axis of a weight's output channels
_INLINE = 1024  # bytes of a tensor up to which it is in the graph


class Layer(NamedTuple):
    """A convolution or linear layer, by the names of its op, what it reads, and its weight."""

    op: str
    value: str
    weight: str


@dataclass(frozen=True)
class Range:
    """What a layer read."""

    low: float
    high: float
    power: float  # mean of the squares

    @property
    def noise(self) -> float:
        """The mean square of what rounding it to eight bits adds, over that of itself."""
        return (self.high - self.low) ** 2 / (12 * 255**2) / self.power if self.power else 0.0


def layers(model: ModelProto) -> list[Layer]:
    """All layers whose weights can be rounded, in the graph's order."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) in (2, 4)}
    return [
        Layer(node.op_type, node.input[0], node.input[1])
        for node in model.graph.node
        if node.op_type in _OUTPUTS and node.input[1] in weights
    ]


def observe(path: Path, inputs: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, Range]:
    """What each layer of a network reads, when it runs on these inputs, by value's name."""
    model = onnx.load(path, load_external_data=False)
    values = list(dict.fromkeys(layer.value for layer in layers(model)))
    for value in values:
        for op in ("ReduceMin", "ReduceMax", "ReduceSumSquare"):
            model.graph.node.append(helper.make_node(op, [value], [f"{value}/{op}"], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(f"{value}/{op}", TensorProto.FLOAT, []))
        model.graph.node.append(helper.make_node("Size", [value], [f"{value}/Size"]))
        model.graph.output.append(helper.make_tensor_value_info(f"{value}/Size", TensorProto.INT64, []))
    ends = ("ReduceMin", "ReduceMax", "ReduceSumSquare", "Size")
    names = [f"{value}/{end}" for value in values for end in ends]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # which copies weights
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    totals = np.array([[np.inf, -np.inf, 0.0, 0.0]] * len(values))
    for feed in inputs:
        low, high, squares, count = np.array(session.run(names, dict(feed)), np.float64).reshape(-1, 4).T
        totals = np.stack(
            [np.fmin(totals[:, 0], low), np.fmax(totals[:, 1], high), totals[:, 2] + squares, totals[:, 3] + count], 1
        )
    return {
        value: Range(float(low), float(high), float(squares / count))
        for value, (low, high, squares, count) in zip(values, totals, strict=True)
    }


def rounded(values: NDArray[Any], axis: int) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """A weight in int8, and in its own dtype the scales of the channels along an axis, which broadcast with it."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(others, keepdims=True).astype(np.float32)
    scale = np.where(largest > 0, largest / 127, 1).astype(values.dtype)
    return np.clip(np.round(values / scale), -127, 127).astype(np.int8), scale


def write_weights(source: Path, folder: Path) -> ModelProto:
    """Write a network with weights in int8 into a folder, a tensor at a time. Returns its graph."""
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    axes = {layer.weight: _OUTPUTS[layer.op] for layer in layers(model)}
    tensors: list[TensorProto] = []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("wb") as file:

        def add(name: str, values: NDArray[Any]) -> None:
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
            if values.nbytes <= _INLINE:
                tensor.raw_data = values.tobytes()
            else:
                file.write(bytes(-file.tell() % 4096 if values.nbytes > 2**16 else -file.tell() % 64))
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", DATA), ("offset", file.tell()), ("length", values.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(np.ascontiguousarray(values).data)
            tensors.append(tensor)

        for tensor in graph.initializer:
            values = _values(tensor, source)
            if tensor.name not in axes:
                add(tensor.name, values)
                continue
            numbers, scale = rounded(values, axes[tensor.name])
            add(f"{tensor.name}/int8", numbers)
            add(f"{tensor.name}/scale", scale.reshape(-1))
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    nodes = [
        helper.make_node(
            "DequantizeLinear", [f"{name}/int8", f"{name}/scale"], [f"{name}/float"], name=f"{name}/float", axis=axis
        )
        for name, axis in axes.items()
    ]
    for node in graph.node:
        if _reads(node, axes):
            node.input[1] = f"{node.input[1]}/float"
    _replace_nodes(model, [*nodes, *graph.node])
    onnx.save(model, folder / MODEL)
    return model


def with_activations(model: ModelProto, ranges: Mapping[str, Range]) -> ModelProto:
    """A graph that `write_weights` returned, in which the layers that read these values read them in uint8."""
    changed = ModelProto()
    changed.CopyFrom(model)
    nodes: list[NodeProto] = []
    done: set[str] = set()
    for node in changed.graph.node:
        value = node.input[0] if node.input else ""
        if node.op_type in _OUTPUTS and node.input[1].endswith("/float") and value in ranges:
            if value not in done:
                done.add(value)
                nodes += _through_uint8(changed, value, ranges[value])
            node.input[0] = f"{value}/float"
        nodes.append(node)
    _replace_nodes(changed, nodes)
    return changed


def _through_uint8(model: ModelProto, value: str, own: Range) -> list[NodeProto]:
    low, high = min(own.low, 0.0), max(own.high, 0.0)
    scale = np.float32((high - low) / 255 or 1.0)
    numbers = {"scale": np.asarray(scale), "zero": np.asarray(round(-low / float(scale)), np.uint8)}
    model.graph.initializer.extend(numpy_helper.from_array(x, f"{value}/{name}") for name, x in numbers.items())
    inputs = [f"{value}/{name}" for name in numbers]
    return [
        helper.make_node("QuantizeLinear", [value, *inputs], [f"{value}/uint8"], name=f"{value}/uint8"),
        helper.make_node("DequantizeLinear", [f"{value}/uint8", *inputs], [f"{value}/float"], name=f"{value}/float"),
    ]


def _replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    nodes = [*nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _reads(node: NodeProto, weights: Mapping[str, int]) -> bool:
    return node.op_type in _OUTPUTS and node.input[1] in weights


def _values(tensor: TensorProto, path: Path) -> NDArray[Any]:
    """A tensor's values, those in another file not yet read."""
    if not tensor.external_data:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file = path.with_name(place["location"])
    return np.memmap(file, dtype, "r", int(place.get("offset", 0)), tuple(tensor.dims))
