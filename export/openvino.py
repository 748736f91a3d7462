"""The OpenVINO backend, which reads the same ONNX files: the fastest on a CPU, in bfloat16 or float32.

Compiled networks go through the engine cache, without the weights if those are in a separate file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor

from fastldm.errors import EngineError
from fastldm.export.cache import EngineCache, Key, hash_files, instructions
from fastldm.export.engine import bound
from fastldm.export.spec import NetworkSpec

_PRECISIONS = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


class OpenVINOEngine:
    """A network compiled for the CPU. Inputs and outputs are not copied."""

    def __init__(self, compiled: ov.CompiledModel, spec: NetworkSpec) -> None:
        self.specs, self._request = (spec,), compiled.create_infer_request()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ins, outs = bound(self.specs[0], inputs, torch.device("cpu"))
        for name, tensor in {**ins, **outs}.items():
            self._request.set_tensor(name, ov.Tensor(tensor.numpy(), shared_memory=True))
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"{self.specs[0].name} failed in OpenVINO: {_last_line(error)}") from error
        return outs

    def close(self) -> None:
        del self._request


def open_engine(
    path: Path, spec: NetworkSpec, device: torch.device, precision: str | None, hashes: Mapping[str, str], threads: int
) -> OpenVINOEngine:
    """Open the network of an ONNX file. precision: "float32" (the default) or "bfloat16"."""
    if device.type != "cpu":
        raise EngineError(f"the OpenVINO backend runs on the CPU, not on {device}")
    precision = precision or "float32"
    if precision not in _PRECISIONS:
        raise EngineError(f"OpenVINO computes in {' or '.join(_PRECISIONS)} on a CPU, not in {precision}")
    if precision == "bfloat16" and not has_bfloat16():
        raise EngineError("OpenVINO has no bfloat16 on this CPU, only float32")
    core, weights = ov.Core(), path.with_name(f"{path.name}_data")
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    import_options = {}
    if weights.exists():  # serialised networks then refer to their offsets in that file
        settings["CACHE_MODE"] = "OPTIMIZE_SIZE"
        import_options["WEIGHTS_PATH"] = str(weights)

    def compile_here() -> bytes:
        try:
            return core.compile_model(core.read_model(path), "CPU", settings).export_model().getvalue()
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

    key = Key(
        network=spec.name,
        graph=hash_files(path, hashes=hashes),
        weights=hash_files(*[weights] * weights.exists(), hashes=hashes),
        backend="openvino",
        version=ov.__version__,
        precision=precision,
        ranges="",
        flags=f"threads={threads}",
        device=" ".join([core.get_property("CPU", "FULL_DEVICE_NAME"), *_capabilities(), instructions()]),
    )
    return EngineCache().fetch(key, compile_here, load)


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in _capabilities()


def _capabilities() -> list[str]:
    return list(ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _last_line(error: Exception) -> str:
    """The last line of an error's message: the lines before it name OpenVINO's source files."""
    return str(error).strip().split("\n")[-1]
