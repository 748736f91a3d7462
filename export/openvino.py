"""The OpenVINO backend, which reads the same ONNX files: the fastest on a CPU, in bfloat16 or float32.

Compiled networks go through the engine cache, without the weights if those are in a separate file. The graph of several
steps is compiled for each size of images that it meets, where it is small: then no shape is worked out at each step.
That of a whole picture always is: with sizes that are not known, OpenVINO 2026.4.1 computes attention with narrow heads
in a loop wrongly.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor

from fastldm.errors import EngineError
from fastldm.export.cache import EngineCache, Key, hash_files, instructions
from fastldm.export.engine import bound
from fastldm.export.graphs import FILES, STEPS, WHOLE_PICTURE, weight_files
from fastldm.export.spec import NetworkSpec, Port
from fastldm.sizes import Axis

_SMALL = 2**28
"""Bytes of weights up to which a network is compiled for each size: what a step of a larger one takes for shapes is
little of its time, and another copy of its weights much of the memory."""
_SIZES = 8
_RECIPE = 2  # of the settings below: another number keeps engines of others from being taken
_PRECISIONS = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


class OpenVINOEngine:
    """A network compiled for the CPU. Inputs and outputs are not copied."""

    def __init__(self, compiled: ov.CompiledModel, spec: NetworkSpec) -> None:
        self.specs, self._request = (spec,), compiled.create_infer_request()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.run(*bound(self.specs[0], inputs, torch.device("cpu")))

    def run(self, ins: Mapping[str, Tensor], outs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As a call, with inputs that were checked, into these outputs."""
        for name, tensor in {**ins, **outs}.items():
            self._request.set_tensor(name, ov.Tensor(tensor.numpy(), shared_memory=True))
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"{self.specs[0].name} failed in OpenVINO: {_last_line(error)}") from error
        return outs

    def close(self) -> None:
        del self._request


Shapes = dict[str, tuple[int, ...]]
"""Of inputs by name; -1 for an axis of any size."""


class SizedEngine:
    """A network that is compiled for each size of its inputs, but for a table's number of rows. Of those `kept` at most
    are held: each has a copy of the weights."""

    def __init__(self, opening: Callable[[Shapes], OpenVINOEngine], spec: NetworkSpec, kept: int) -> None:
        self.specs, self._opening, self._kept = (spec,), opening, kept
        self._engines: OrderedDict[tuple[Any, ...], OpenVINOEngine] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ins, outs = bound(self.specs[0], inputs, torch.device("cpu"))
        shapes = {port.name: _shape(port, ins[port.name]) for port in self.specs[0].inputs}
        key = tuple(shapes.values())
        if key not in self._engines and len(self._engines) >= self._kept:
            self._engines.popitem(last=False)[1].close()
        engine = self._engines.pop(key) if key in self._engines else self._opening(shapes)
        self._engines[key] = engine
        return engine.run(ins, outs)

    def close(self) -> None:
        self._engines.clear()


def _shape(port: Port, x: Tensor) -> tuple[int, ...]:
    rows = isinstance(port.shape[0], Axis) and port.shape[0].name in ("count", "draws")
    return (-1, *x.shape[1:]) if rows else tuple(x.shape)


def open_engine(
    path: Path, spec: NetworkSpec, device: torch.device, precision: str | None, hashes: Mapping[str, str], threads: int
) -> OpenVINOEngine | SizedEngine:
    """Open the network of an ONNX file. precision: "float32" (the default) or "bfloat16"."""
    if device.type != "cpu":
        raise EngineError(f"the OpenVINO backend runs on the CPU, not on {device}")
    precision = precision or "float32"
    if precision not in _PRECISIONS:
        raise EngineError(f"OpenVINO computes in {' or '.join(_PRECISIONS)} on a CPU, not in {precision}")
    if precision == "bfloat16" and not has_bfloat16():
        raise EngineError("OpenVINO has no bfloat16 on this CPU, only float32")
    core, weights = ov.Core(), weight_files(path, spec.name)
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    import_options = {}
    if weights and spec.name not in FILES:  # serialised networks then refer to their offsets in that file
        settings["CACHE_MODE"] = "OPTIMIZE_SIZE"
        import_options["WEIGHTS_PATH"] = str(weights[0])

    def compiled(shapes: Shapes) -> ov.CompiledModel:
        try:
            model = core.read_model(path)
            if shapes:
                names = {name: port for port in model.inputs for name in port.get_names()}
                model.reshape({names[name]: ov.PartialShape(list(shape)) for name, shape in shapes.items()})
            own = {"SNIPPETS_MODE": "DISABLE"} if precision == "bfloat16" and _keeps_shapes(model) else {}
            return core.compile_model(model, "CPU", {**settings, **own})
        except RuntimeError as error:
            if "operations: fastldm." in str(error):  # OpenVINO does not read functions in ONNX files
                raise EngineError(
                    f"OpenVINO cannot read {path}, which has fused ops: export the model without --fused-ops"
                ) from error
            raise EngineError(f"OpenVINO cannot load {path}: {_last_line(error)}") from error

    def load(data: bytes) -> OpenVINOEngine:
        try:
            return OpenVINOEngine(core.import_model(io.BytesIO(data), "CPU", {**settings, **import_options}), spec)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load the compiled {spec.name}: {_last_line(error)}") from error

    def fetched(shapes: Shapes) -> OpenVINOEngine:
        key = Key(
            network=spec.name,
            graph=graph,
            weights=data,
            backend="openvino",
            version=ov.__version__,
            precision=precision,
            ranges=" ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items()),
            flags=f"threads={threads} recipe={_RECIPE}",
            device=" ".join([core.get_property("CPU", "FULL_DEVICE_NAME"), *_capabilities(), instructions()]),
        )
        return EngineCache().fetch(key, lambda: compiled(shapes).export_model().getvalue(), load)

    small = sum(file.stat().st_size for file in weights) <= _SMALL
    if spec.name == WHOLE_PICTURE or (spec.name == STEPS and not small):
        # Not cached: an entry of the cache would hold all weights once more.
        def opened(shapes: Shapes) -> OpenVINOEngine:
            return OpenVINOEngine(compiled(shapes), spec)

        return SizedEngine(opened, spec, 1) if spec.name == WHOLE_PICTURE else opened({})
    graph, data = hash_files(path, hashes=hashes), hash_files(*weights, hashes=hashes)
    return SizedEngine(fetched, spec, _SIZES) if spec.name == STEPS else fetched({})


def _keeps_shapes(model: ov.Model) -> bool:
    """Whether a transpose gives the shape that it was given, as of as many queries as heads: OpenVINO 2026.4.1 takes it
    for none when it fuses attention of known sizes in bfloat16, whose results are then wrong throughout."""
    for op in model.get_ops():
        kind = op.get_type_name()
        bodies = [op.get_function()] if kind == "Loop" else [op.get_function(k) for k in (0, 1)] if kind == "If" else []
        if any(map(_keeps_shapes, bodies)):
            return True
        if kind == "Transpose" and op.get_input_partial_shape(0).is_static:
            order, sizes = op.input_value(1).get_node(), list(op.get_input_shape(0))
            axes = order.get_data().tolist() if order.get_type_name() == "Constant" else []
            moved = any(axis != k and sizes[axis] > 1 for k, axis in enumerate(axes))
            if moved and [sizes[axis] for axis in axes] == sizes:
                return True
    return False


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in _capabilities()


def _capabilities() -> list[str]:
    return list(ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _last_line(error: Exception) -> str:
    """The last line of an error's message: the lines before it name OpenVINO's source files."""
    return str(error).strip().split("\n")[-1]
