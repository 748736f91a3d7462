"""The ONNX Runtime backend: on a CPU, or with its CUDA provider on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from fastldm.errors import EngineError
from fastldm.export.engine import bound
from fastldm.export.graphs import FILES
from fastldm.export.spec import NetworkSpec

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ELEMENTS = {torch.float32: 1, torch.float16: 10, torch.int32: 6}  # onnx.TensorProto's, without importing onnx


class ONNXRuntimeEngine:
    """A network whose inputs and outputs are bound by address, without copies."""

    def __init__(
        self, path: Path, spec: NetworkSpec, device: torch.device, threads: int = 0, *, in_place: bool = False
    ) -> None:
        """threads: number of CPU threads; 0 for one per core. in_place: read the weights where they lie in their file,
        and give memory back after each call: for a network that is run a few times, since it loads in no time. What
        else each process holds is a copy of them in the order that its kernels read best."""
        provider = _PROVIDERS.get(device.type)
        if provider not in ort.get_available_providers():
            raise EngineError(
                f"this onnxruntime cannot run on {device}, only with {', '.join(ort.get_available_providers())}: "
                "pip install 'fastldm[onnx-gpu]' for NVIDIA GPUs, or run on the CPU"
            )
        self.specs, self.device, self._index = (spec,), device, device.index or 0
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait would slow down the other networks and PyTorch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Weights in eight bits become floats once, when they are loaded, and not at each run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 3  # errors, which are raised too
        if in_place:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # not the layout's
            options.enable_cpu_mem_arena = False
        # TF32 is on by default; float32 means float32 here, as in kernels/float32.py.
        provider_options = {"device_id": self._index, "use_tf32": 0} if device.type == "cuda" else {}
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[(provider, provider_options)])
        except Exception as error:  # ONNX Runtime's exceptions have no other common base
            raise EngineError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        if self._session.get_providers()[0] != provider:  # it only logs that it fell back to the CPU
            raise EngineError(
                f"ONNX Runtime could not start its {provider} for {path}: are its versions of CUDA and cuDNN installed?"
            )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ins, outs = bound(self.specs[0], inputs, self.device)
        binding, kind = self._session.io_binding(), self.device.type
        for name, tensor in ins.items():
            binding.bind_input(name, kind, self._index, _ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outs.items():
            shape = tuple(tensor.shape)
            binding.bind_output(name, kind, self._index, _ELEMENTS[tensor.dtype], shape, tensor.data_ptr())
        if kind == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has its own stream
        try:
            self._session.run_with_iobinding(binding)  # waits for its stream
        except Exception as error:
            raise EngineError(f"{self.specs[0].name} failed in ONNX Runtime: {_first_line(error)}") from error
        return outs

    def close(self) -> None:
        del self._session


def open_engine(
    path: Path, spec: NetworkSpec, device: torch.device, precision: str | None, hashes: Mapping[str, str], threads: int
) -> ONNXRuntimeEngine:
    """Open the network of an ONNX file. precision: must be the file's, which ONNX Runtime computes in. `hashes` are not
    needed, since nothing is cached."""
    stored = next(port.dtype for port in spec.outputs)
    if precision not in (None, stored) and spec.name not in FILES:  # whose state is float32 in every bundle
        raise EngineError(
            f"ONNX Runtime computes in what the file holds, {stored}, not in {precision}: export it in {precision}"
        )
    return ONNXRuntimeEngine(path, spec, device, threads)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
