"""Export of networks to ONNX files: trace, clean, check.

Graphs contain what the U-Net, autoencoder and text encoders compute with PyTorch's ops. All that depends only on
weights (stacked projections, transposes) is computed at export and not whenever a session starts. The same weights and
versions give the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastldm.errors import BundleError, InputError
from fastldm.export import fused
from fastldm.export.reference import ReferenceNetworks
from fastldm.export.spec import DATA, MODEL, Axis, NetworkSpec, sample
from fastldm.kernels import observe, use
from fastldm.kernels.dispatch import Op, replace_references

OPSETS = (21, 23)
"""21: GroupNormalization and Gelu are single nodes. 23: Attention too, which not all backends support."""


class _Traced(nn.Module):
    """A network with the inputs and outputs of its spec in order, as tracing needs it."""

    def __init__(self, networks: ReferenceNetworks, name: str) -> None:
        super().__init__()
        self.network = networks.module(name)
        self._spec, self._networks = networks.specs[name], networks

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = (port.name for port in self._spec.inputs)
        outputs = self._networks.evaluate(self._spec.name, dict(zip(names, inputs, strict=True)))
        return tuple(outputs[port.name] for port in self._spec.outputs)


def write(networks: ReferenceNetworks, name: str, folder: Path, *, opset: int = 21, fused_ops: bool = False) -> None:
    """Trace a network and write it into a new `folder`. BundleError for a graph with unexpected nodes, InputError for
    an opset that is not in OPSETS.

    fused_ops: GroupNorm with SiLU, attention and GEGLU are one node each, see `export.fused`.
    """
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}: expected {' or '.join(map(str, OPSETS))}")
    spec = networks.specs[name]
    with replace_references(fused.replacements() if fused_ops else {}):
        model = _trace(_Traced(networks, name), spec, opset)
    _clean(model, spec)
    fused.add_functions(model, opset)
    check_graph(model, networks, name, opset)
    folder.mkdir(parents=True)
    # With the sizes of Splits in the graph: ONNX Runtime reads them before it has the data.
    splits = (node.inputs[1] for node in model.graph.all_nodes() if node.op_type == "Split" and len(node.inputs) > 1)
    sizes = [value.const_value.nbytes for value in splits if value is not None and value.const_value is not None]
    inside = max([256, *(size + 8 for size in sizes)])
    ir.save(model, folder / MODEL, external_data=DATA, size_threshold_bytes=inside)
    if (folder / DATA).is_file() and not (folder / DATA).stat().st_size:  # all weights are in the graph
        (folder / DATA).unlink()
    for weight in model.graph.initializers.values():  # the exporter keeps its last graph
        weight.const_value = None


def trace_sizes(spec: NetworkSpec) -> dict[str, int]:
    """Sizes for tracing: small, all different and none of them 1, since traces specialise on equal sizes and on 1."""
    units = {"batch": 2, "height": 2, "width": 3, "steps": 3, "rows": 5}
    sizes = {name: count * spec.axes[name].multiple_of for name, count in units.items() if name in spec.axes}
    if "tokens" in spec.axes and spec.axes["tokens"].best == 1:  # of a picture in place of a text
        sizes["tokens"] = spec.axes["tokens"].most
    return sizes


def _trace(module: nn.Module, spec: NetworkSpec, opset: int) -> ir.Model:
    dims: dict[str, object] = {}

    def dim(axis: Axis) -> object:
        if axis.name not in dims:
            # Bounds become constraints of the trace. Only the positions of a text have one.
            most = axis.most if axis.name == "tokens" else None
            dims[axis.name] = torch.export.Dim(axis.name, min=1, max=most)
        return axis.multiple_of * dims[axis.name]

    shapes = tuple({i: dim(axis) for i, axis in port.axes.items()} for port in spec.inputs)
    with use("torch"), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            tuple(sample(spec, trace_sizes(spec)).values()),
            input_names=[port.name for port in spec.inputs],
            output_names=[port.name for port in spec.outputs],
            dynamic_shapes=(shapes,),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about itself (no torchvision, renamed axes)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _clean(model: ir.Model, spec: NetworkSpec) -> None:
    """Fold what depends only on weights, name the axes as in the spec, and remove traces of this machine."""
    unlimited = 1 << 62
    onnxscript.optimizer.fold_constants(model, input_size_limit=unlimited, output_size_limit=unlimited)
    with _without_joined_slices():
        onnxscript.optimizer.optimize(model, input_size_limit=unlimited, output_size_limit=unlimited)
    for value, port in zip((*model.graph.inputs, *model.graph.outputs), (*spec.inputs, *spec.outputs), strict=True):
        value.shape = ir.Shape([_dimension(size) if isinstance(size, Axis) else size for size in port.shape])
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.doc_string = spec.name, None


@contextlib.contextmanager
def _without_joined_slices() -> Iterator[None]:
    """Inside, onnxscript does not look for Slices that together are a Split: for that it compares each node with all of
    them, which takes longer than all else that it does to a U-Net, and there are none."""
    name, rewriter = "_DEFAULT_REWRITE_RULES", onnxscript.rewriter
    rules = getattr(rewriter, name, ())
    try:
        setattr(rewriter, name, tuple(rule for rule in rules if rule.name != "SlicesSplit"))
        yield
    finally:
        setattr(rewriter, name, rules)


def _dimension(axis: Axis) -> str:
    return axis.name if axis.multiple_of == 1 else f"{axis.multiple_of}*{axis.name}"


_DECOMPOSED = ("InstanceNormalization", "Erf")  # ops of norms and GELUs that are not one node


def check_graph(model: ir.Model, networks: ReferenceNetworks, name: str, opset: int) -> None:
    """BundleError unless each GroupNorm, GELU and mean of the network is one node, and at opset 23 or with fused ops
    each attention: backends have kernels for these nodes, but not for their decompositions."""
    fused_attention = 0

    def called(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal fused_attention
        fused_attention += op.name == "attention" and kwargs.get("kv_len") is None

    inputs = sample(networks.specs[name], trace_sizes(networks.specs[name]) | {"steps": 1})
    networks.module(name)  # loaded outside
    with use("torch"), observe(called), _Calls() as calls:
        networks.run(name, inputs)
    expected = dict.fromkeys(_DECOMPOSED, 0) | {
        "GroupNormalization": calls.of(F.group_norm),
        "Gelu": calls.of(F.gelu),
        "ReduceMean": calls.of(Tensor.mean, torch.mean),
    }
    if opset >= 23:
        expected["Attention"] = calls.of(F.scaled_dot_product_attention)
    elif model.functions:
        expected["Attention"] = fused_attention
    counts = Counter(fused.core_op(node) for node in model.graph.all_nodes())
    for op, count in expected.items():
        if counts[op] != count:
            raise BundleError(
                f"{name}: the traced graph has {counts[op]} {op} nodes, expected {count}: "
                f"torch {torch.__version__} traces it differently from the versions that fastldm was tested with"
            )


class _Calls(TorchFunctionMode):
    """Counts what is called of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[Any] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[func] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *functions: Any) -> int:
        return sum(self._counts[function] for function in functions)
