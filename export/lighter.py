"""A graph with smaller weights that computes in float32 still: files are smaller, and the rest is as it was.

    float16   every weight -> float16, Cast
    int8      matrices and kernels -> int8, Cast, Mul by a scale for each channel of the output; the rest as float16

A channel's scale is its largest magnitude / 127. Cast and Mul, in place of DequantizeLinear, so that every runtime
folds them into float32 weights when it loads the graph: ONNX Runtime keeps DequantizeLinear for kernels of its own, and
would compute it anew in each call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fastldm.export.quantize import rounded

FORMS = ("float32", "float16", "int8")
_LEAST = 256
"""Elements below which a weight stays as it is: biases, norms, constants."""
_HIGHEST = 65504.0  # of float16


def lighten(model: ModelProto, form: str) -> None:
    """Replace the float32 weights of a graph, whose data must be in it. form: of FORMS."""
    if form == "float32":
        return
    graph, axes = model.graph, _channel_axes(model.graph) if form == "int8" else {}
    kept: list[TensorProto] = []
    nodes: list[NodeProto] = []
    for tensor in graph.initializer:
        count = math.prod(tensor.dims)
        if tensor.data_type != TensorProto.FLOAT or count < _LEAST:
            kept.append(tensor)
            continue
        weight, name, half = numpy_helper.to_array(tensor), tensor.name, f"{tensor.name}/half"
        if name in axes:
            numbers, scale = rounded(weight, axes[name])
            kept.append(numpy_helper.from_array(numbers, f"{name}/int8"))
            kept.append(numpy_helper.from_array(scale, f"{name}/scale"))
            nodes.append(helper.make_node("Cast", [f"{name}/int8"], [f"{name}/cast"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", [f"{name}/cast", f"{name}/scale"], [name]))
        elif np.abs(weight).max() <= _HIGHEST:
            kept.append(numpy_helper.from_array(weight.astype(np.float16), half))
            nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
        else:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def load(path: str) -> ModelProto:
    """A graph with its weights in it."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:  # what onnx leaves of where they were
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model


def _channel_axes(graph: GraphProto) -> dict[str, int]:
    """The axis of the channels of the output, of each weight that has several axes and is read as such."""
    sizes = {tensor.name: len(tensor.dims) for tensor in graph.initializer if len(tensor.dims) > 1}
    axes: dict[str, int] = {}
    for node in _nodes(graph):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.type != AttributeProto.GRAPH}
        for k, name in enumerate(node.input):
            if name not in sizes:
                continue
            if (node.op_type, k) in (("Conv", 1), ("Gather", 0)):
                axes[name] = 0
            elif (node.op_type, k) == ("MatMul", 1):
                axes[name] = sizes[name] - 1
            elif (node.op_type, k) == ("Gemm", 1):
                axes[name] = 0 if attributes.get("transB") else 1
    return axes


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Those of a graph and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
