"""Networks on OpenVINO, which reads the same ONNX files: the fastest on a CPU, in bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import openvino as ov
import torch
from torch import Tensor

from fastldm.engine import bound
from fastldm.errors import EngineError
from fastldm.export.spec import NetworkSpec
from fastldm.loading import choose_dtype

_PRECISIONS = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


class OpenVINOEngine:
    """A network compiled for the CPU. Inputs and outputs are the caller's memory."""

    def __init__(self, path: Path, spec: NetworkSpec, precision: str) -> None:
        self.spec = spec
        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            core = ov.Core()
            self._request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {path}: {_last_line(error)}") from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ins, outs = bound(self.spec, inputs, torch.device("cpu"))
        for name, tensor in {**ins, **outs}.items():
            self._request.set_tensor(name, ov.Tensor(tensor.numpy(), shared_memory=True))
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"{self.spec.name} failed in OpenVINO: {_last_line(error)}") from error
        return outs

    def close(self) -> None:
        del self._request


def open_engine(path: Path, spec: NetworkSpec, device: torch.device, precision: str | None) -> OpenVINOEngine:
    """The network of an ONNX file. precision: "float32" or "bfloat16"; what is fastest here where it is None."""
    if device.type != "cpu":
        raise EngineError(f"the OpenVINO backend runs on the CPU, not on {device}")
    fastest = str(choose_dtype(None, device)).removeprefix("torch.")
    if (precision or fastest) not in _PRECISIONS:
        raise EngineError(f"OpenVINO computes in {' or '.join(_PRECISIONS)} on a CPU, not in {precision}")
    return OpenVINOEngine(path, spec, precision or fastest)


def _last_line(error: Exception) -> str:
    """What was the matter; before it, OpenVINO names its own source files."""
    return str(error).strip().split("\n")[-1]
