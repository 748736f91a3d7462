"""Networks as TensorRT engines, by TensorRT-RTX, which builds with no GPU and no driver, or by TensorRT if installed.

Both have one API. The ONNX file says what is computed in which precision (strongly typed); the builder is told ranges
of the dynamic axes and, for GPUs that are not here, their compute capabilities. What is built on the machine that runs
it goes through the engine cache; what is built ahead, for GPUs that need not be here, travels with the bundle.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import EngineError, InputError
from fastldm.export.bundle import Bundle
from fastldm.export.cache import EngineCache, Key, hash_files
from fastldm.export.engine import bound
from fastldm.export.engines import PORTABLE, Engines, Record
from fastldm.export.spec import NetworkSpec
from fastldm.sizes import nearest

logger = logging.getLogger("fastldm")

Ranges = Mapping[str, tuple[int, int, int]]  # of axes of a spec's inputs by name: least, best, most


def _import_library() -> ModuleType:
    # The extra brings TensorRT-RTX. Whoever installed the other one did so on purpose, but it builds on a GPU only.
    full = torch.cuda.is_available() and importlib.util.find_spec("tensorrt") is not None
    return importlib.import_module("tensorrt" if full else "tensorrt_rtx")


trt: Any = _import_library()


def static(spec: NetworkSpec, sizes: Mapping[str, int]) -> Ranges:
    """Ranges of an engine for one shape alone: the builder knows all sizes. Axes not named have their best."""
    chosen = {name: sizes.get(name, axis.best) for name, axis in spec.axes.items()}
    return {name: (size, size, size) for name, size in chosen.items()}


def build(
    path: Path, spec: NetworkSpec, *, profiles: Sequence[Ranges] = ({},), capabilities: Sequence[int] = ()
) -> bytes:
    """A serialised engine from a network's model.onnx, whose inputs and outputs must be the spec's.

    profiles: ranges that the engine is optimised for, each on its own; an axis that one does not name has the spec's
        range. A single profile of one size per axis (`static`) makes an engine without dynamic shapes.
    capabilities: of the GPUs that it is for, such as 89; TensorRT-RTX only. Without any, TensorRT-RTX builds one that
        runs on Ampere and later, and TensorRT one for this machine's GPU.

    Raises InputError for ranges outside the spec's, EngineError where the network cannot be built.
    """
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise EngineError(
            f"TensorRT cannot read {path}: {parser.get_error(0).desc() if parser.num_errors else log.last}"
        )
    _check_ports(network, spec)
    _allow_any_attention(network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: float32 is float32, as in kernels/float32.py
    _set_capabilities(config, capabilities)
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes(spec, ranges).items():
            if len(profiles) == 1 and least == most:
                inputs[name].shape = best
            else:
                profile.set_shape(name, least, best, most)
        if any(-1 in tensor.shape for tensor in inputs.values()) and config.add_optimization_profile(profile) < 0:
            raise EngineError(f"TensorRT refuses the ranges {range_words([ranges], spec)} of {spec.name}: {log.last}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"TensorRT cannot build {spec.name}: {log.last}")
    return bytes(engine)


class TensorRTEngine:
    """An engine on a GPU, on PyTorch's current stream: a call waits for nothing and can be captured in a CUDA graph."""

    def __init__(self, data: bytes, spec: NetworkSpec, device: torch.device) -> None:
        self.device, self._log = device, _Log()
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise EngineError(f"TensorRT refuses the engine of {spec.name}: {self._log.last}")
            profiles = range(max(1, self._engine.num_optimization_profiles))
            self.specs = [spec.narrowed(self._ranges(spec, k)) for k in profiles]
            self._contexts = [self._context(k) for k in profiles]

    def _ranges(self, spec: NetworkSpec, profile: int) -> dict[str, tuple[int, int]]:
        """Least and most of each axis."""
        ranges: dict[str, tuple[int, int]] = {}
        for port in spec.inputs:
            least, most = self._shapes(port.name, profile)
            ranges |= {axis.name: (least[dimension], most[dimension]) for dimension, axis in port.axes.items()}
        return ranges

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(f"TensorRT has no memory to run {self.specs[0].name}: {self._log.last}")
        stream = torch.cuda.current_stream(self.device)
        if profile and not context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise EngineError(f"{self.specs[0].name} cannot use its profile {profile}: {self._log.last}")
        stream.synchronize()
        return context

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        profile = fitting(self.specs, inputs)
        ins, outs = bound(self.specs[profile], inputs, self.device)
        context = self._contexts[profile]
        for name, tensor in ins.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in {**ins, **outs}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError(f"{self.specs[0].name} failed in TensorRT: {self._log.last}")
        return outs

    def _shapes(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The least and the most shape of an input."""
        fixed = tuple(self._engine.get_tensor_shape(name))
        if -1 not in fixed:
            return fixed, fixed
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)

    def close(self) -> None:
        # A context must go before its engine, and that before its runtime.
        del self._contexts
        del self._engine
        del self._runtime


def fitting(specs: Sequence[NetworkSpec], inputs: Mapping[str, Tensor]) -> int:
    """The first of an engine's profiles that these inputs fit into; the first of all where there is none."""

    def takes(spec: NetworkSpec) -> bool:
        shapes = [(port.shape, inputs[port.name].shape) for port in spec.inputs if port.name in inputs]
        pairs = [pair for wanted, given in shapes for pair in zip(wanted, given, strict=False)]  # `bound` counts them
        return all(isinstance(axis, int) or nearest(axis, size) == size for axis, size in pairs)

    return next((k for k, spec in enumerate(specs) if takes(spec)), 0)


def open_engine(
    path: Path, spec: NetworkSpec, device: torch.device, precision: str | None, hashes: Mapping[str, str], threads: int
) -> TensorRTEngine:
    """An engine file, or an ONNX file that is built here unless the engine cache has it."""
    if device.type != "cuda":
        raise EngineError(f"TensorRT runs on NVIDIA GPUs, not on {device}: try backend openvino or onnxruntime")
    has = next(port.dtype for port in spec.outputs)
    if precision not in (None, has):
        raise EngineError(
            f"TensorRT computes in what the file holds, {has}, not in {precision}: export it in {precision}"
        )
    if path.suffix != ".onnx":
        return TensorRTEngine(path.read_bytes(), spec, device)
    name, capability = torch.cuda.get_device_name(device), _capability_of(device)

    def build_here() -> bytes:
        with torch.cuda.device(device):
            return build(path, spec)

    key = key_of(path, spec, gpu=f"{name} sm_{capability}", hashes=hashes)
    ahead = Engines(path.parent.parent).find(key, capability)
    if ahead is not None:
        try:
            return TensorRTEngine(ahead, spec, device)
        except EngineError as error:
            logger.warning("the bundle's engine of %s is set aside: %s", spec.name, error)
    return EngineCache().fetch(key, build_here, lambda data: TensorRTEngine(data, spec, device))


def build_ahead(
    bundle: Bundle, *, capabilities: Sequence[int] = (), sizes: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[Record, float]]:
    """Build the engines of a bundle's networks into the bundle, one after the other; those that are there already are
    taken. Gives each with the seconds that it took, 0 where it was there.

    capabilities: as `build` takes them. size: width and height of pictures in pixels, for engines of that size alone,
        see `picture_ranges`; the spec's ranges where it is None.

    Raises InputError for a size that the networks do not take or where another process builds, EngineError where a
    network cannot be built or its engine not be written.
    """
    profiles = picture_profiles(bundle.specs, sizes)
    engines, targets = Engines(bundle.folder), " ".join(f"sm_{one}" for one in capabilities)
    kept_for = tuple(capabilities)
    if trt.__name__ == "tensorrt":  # builds for the GPU that is here
        kept_for, targets = (_capability_of(torch.device("cuda")),), torch.cuda.get_device_name()
    words = [f"{trt.__name__}-{trt.__version__}", *(f"sm_{one}" for one in kept_for)] + ["portable"] * (not kept_for)
    folder = "-".join([*words, *(f"{width}x{height}" for width, height in sizes)])
    with engines.writing():
        for network, spec in bundle.specs.items():
            key = key_of(
                bundle.path(network),
                spec,
                profiles=profiles[network],
                gpu=targets or PORTABLE,
                hashes=bundle.hashes(network),
            )
            there = engines.has(key)
            if there is not None:
                yield there, 0.0
                continue
            start = time.monotonic()
            data = build(bundle.path(network), spec, profiles=profiles[network], capabilities=capabilities)
            record = engines.keep(data, f"{folder}/{network}.engine", key, kept_for, bundle.manifest["opset"])
            yield record, time.monotonic() - start


def picture_profiles(specs: Mapping[str, NetworkSpec], sizes: Sequence[tuple[int, int]]) -> dict[str, Sequence[Ranges]]:
    """Of each network, a profile for each of these sizes of pictures; one for all that it takes where there are none,
    or where it does not see the size. InputError for a size that the networks do not take."""
    each = [picture_ranges(specs, size) for size in dict.fromkeys(sizes)]
    return {name: [one[name] for one in each if one[name]] or ({},) for name in specs}


def picture_ranges(specs: Mapping[str, NetworkSpec], size: tuple[int, int]) -> dict[str, Ranges]:
    """Of each network for pictures of a size, width and height in pixels: networks of pictures have that one and the
    best of all else, but for what a single picture varies: its rows, one or guided two; time steps, one for all rows or
    one each; and smaller pictures to decode, which are previews. The others keep their ranges."""
    encoder = specs["vae_encoder"]
    factor = encoder.inputs[0].axes[2].best // encoder.outputs[0].axes[2].best
    made: dict[str, Ranges] = {}
    for name, spec in specs.items():
        if "height" not in spec.axes:
            made[name] = {}
            continue
        unit = 1 if name == "vae_encoder" else factor
        axes = [spec.axes["width"], spec.axes["height"]]
        takes = [nearest(axis, pixels // unit) * unit for axis, pixels in zip(axes, size, strict=True)]
        if takes != list(size):
            raise InputError(
                f"the size is {size[0]}x{size[1]}: {name} takes widths and heights from {axes[0].least * unit} to "
                f"{axes[0].most * unit} in steps of {axes[0].multiple_of * unit}, the nearest is {takes[0]}x{takes[1]}"
            )
        fixed = dict(static(spec, {"width": size[0] // unit, "height": size[1] // unit}))
        for axis in {"batch", "steps"} & fixed.keys():
            fixed[axis] = (1, fixed[axis][1], spec.axes["batch"].best)
        if name == "vae_decoder":
            fixed |= {side: (spec.axes[side].least, fixed[side][1], fixed[side][2]) for side in ("height", "width")}
        made[name] = fixed
    return made


def _capability_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def key_of(
    path: Path,
    spec: NetworkSpec,
    *,
    profiles: Sequence[Ranges] = ({},),
    gpu: str,
    hashes: Mapping[str, str] | None = None,
) -> Key:
    """What an engine that `build` makes of a network's model.onnx is kept under. Reads all of its weights, but for
    those whose hashes are known, by the files' names."""
    return Key(
        network=spec.name,
        graph=hash_files(path, known=hashes),
        weights=hash_files(*sorted(path.parent.glob(f"{path.name}_data*")), known=hashes),
        backend=trt.__name__,
        version=trt.__version__,
        precision=next(port.dtype for port in spec.outputs),
        ranges=range_words(profiles, spec),
        flags="ieee",  # no TF32
        device=gpu,
    )


def range_words(profiles: Sequence[Ranges], spec: NetworkSpec) -> str:
    """Such as "batch=1:2:16 height=16:64:128", with a bar between profiles."""
    whole = [
        {name: ranges.get(name, (axis.least, axis.best, axis.most)) for name, axis in spec.axes.items()}
        for ranges in profiles
    ]
    return " | ".join(
        " ".join(f"{name}={low}:{best}:{high}" for name, (low, best, high) in one.items()) for one in whole
    )


# ---------------------------------------------------------------------------------------------------------- building


def shapes(spec: NetworkSpec, ranges: Ranges) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, best and most shape of each input that has axes. InputError for ranges outside the spec's."""
    axes = spec.axes
    for name, sizes in ranges.items():
        if name not in axes:
            raise InputError(f"{spec.name} has no axis {name!r}: expected some of {', '.join(axes)}")
        if list(sizes) != sorted(sizes) or any(nearest(axes[name], size) != size for size in sizes):
            axis = axes[name]
            raise InputError(
                f"{spec.name}: {name} is to be from {sizes[0]} over {sizes[1]} to {sizes[2]}: expected ascending "
                f"multiples of {axis.multiple_of} from {axis.least} to {axis.most}"
            )
    chosen = {name: ranges.get(name, (axis.least, axis.best, axis.most)) for name, axis in axes.items()}
    ends = [{name: sizes[k] for name, sizes in chosen.items()} for k in range(3)]
    return {port.name: tuple(spec.shape(port, sizes) for sizes in ends) for port in spec.inputs if port.axes}


def _check_ports(network: Any, spec: NetworkSpec) -> None:
    """EngineError where the parsed network's inputs or outputs are not the spec's."""
    sides = (
        ("inputs", [network.get_input(i) for i in range(network.num_inputs)], spec.inputs),
        ("outputs", [network.get_output(i) for i in range(network.num_outputs)], spec.outputs),
    )
    for side, tensors, ports in sides:
        found = {(tensor.name, trt.nptype(tensor.dtype).__name__, tuple(tensor.shape)) for tensor in tensors}
        expected = {
            (port.name, port.dtype, tuple(size if isinstance(size, int) else -1 for size in port.shape))
            for port in ports
        }
        if found != expected:
            raise EngineError(
                f"the {side} of {spec.name} are not what its bundle says: "
                f"found {_ports(found - expected)}, expected {_ports(expected - found)}"
            )


def _ports(ports: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, dtype, shape in sorted(ports)) or "no other"


def _allow_any_attention(network: Any) -> None:
    """Attention as one node (opset 23) has kernels for some head sizes in float16 only; others may be taken apart."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to say which layer it is
            layer.attention.decomposable = True


def parse_capability(arch: str) -> int:
    """ "sm_89" -> 89. InputError for GPUs that this library does not build for."""
    if trt.__name__ == "tensorrt":
        raise InputError("TensorRT builds for the GPU that is here: builds for others need TensorRT-RTX")
    offered = [name.lower().replace("sm", "sm_") for name in trt.ComputeCapability.__members__ if name[:2] == "SM"]
    if arch not in offered:
        raise InputError(
            f"TensorRT-RTX does not build for {arch}: expected {', '.join(offered)}, or none for {PORTABLE}"
        )
    return int(arch.removeprefix("sm_"))


def _set_capabilities(config: Any, capabilities: Sequence[int]) -> None:
    for capability in capabilities:
        parse_capability(f"sm_{capability}")
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability}"], i)


class _Log(trt.ILogger):
    """TensorRT's messages in ours, and the last error, since its calls return only that they failed."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.last = "it does not say why"

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.last = message
        logger.debug("TensorRT: %s", message)
