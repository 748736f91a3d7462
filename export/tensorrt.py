"""The TensorRT backend: TensorRT-RTX, which builds engines without GPU and driver, or TensorRT if installed.

Both have the same API. The ONNX file determines the precision of each op (strongly typed); the builder gets ranges of
the dynamic axes and, for GPUs of other machines, compute capabilities. Engines that are built on the machine that runs
them go through the engine cache; engines that are built ahead of time, for other GPUs, are stored in the bundle.
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

Ranges = Mapping[str, tuple[int, int, int]]  # least, best and most size of a spec's input axes by name


def _import_library() -> ModuleType:
    # The extra installs TensorRT-RTX. If TensorRT is installed too, it is preferred, but it needs a GPU to build.
    full = torch.cuda.is_available() and importlib.util.find_spec("tensorrt") is not None
    return importlib.import_module("tensorrt" if full else "tensorrt_rtx")


trt: Any = _import_library()


def static(spec: NetworkSpec, sizes: Mapping[str, int]) -> Ranges:
    """Ranges of an engine for a single shape, all sizes fixed. Axes that are not in `sizes` have their best size."""
    selected = {name: sizes.get(name, axis.best) for name, axis in spec.axes.items()}
    return {name: (size, size, size) for name, size in selected.items()}


def build(
    path: Path, spec: NetworkSpec, *, profiles: Sequence[Ranges] = ({},), capabilities: Sequence[int] = ()
) -> bytes:
    """Build a serialised engine from a network's model.onnx, whose inputs and outputs must be the spec's.

    profiles: ranges that the engine is optimised for, separately; axes that are missing have the spec's range. A single
        profile of one size per axis (`static`) gives an engine without dynamic shapes.
    capabilities: of target GPUs, such as 89; TensorRT-RTX only. By default, TensorRT-RTX builds an engine that runs on
        Ampere and later, and TensorRT one for this machine's GPU.

    Raises InputError for ranges outside the spec's, EngineError if the network cannot be built.
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
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; float32 means float32 here, as in kernels/float32.py
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
            raise EngineError(
                f"TensorRT refuses the ranges {describe_ranges([ranges], spec)} of {spec.name}: {log.last}"
            )
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"TensorRT cannot build {spec.name}: {log.last}")
    return bytes(engine)


class TensorRTEngine:
    """An engine on a GPU, on PyTorch's current stream: calls are asynchronous and can be captured in a CUDA graph.

    Activations are in memory that a call takes from PyTorch's allocator, as much as its shapes need, and gives back:
    what runs one after another on a stream shares it, profiles, engines and PyTorch's own ops alike. A context that
    held its own would hold as much as its profile's largest shapes need.
    """

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
        """The least and the most size of each axis."""
        ranges: dict[str, tuple[int, int]] = {}
        for port in spec.inputs:
            least, most = self._shapes(port.name, profile)
            for dimension, axis in port.axes.items():  # the first is in the unit of the spec's axes
                ranges.setdefault(axis.name, (least[dimension], most[dimension]))
        return ranges

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
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
        activations = torch.empty(context.update_device_memory_size_for_shapes(), dtype=torch.uint8, device=self.device)
        context.set_device_memory(activations.data_ptr(), activations.numel())
        for name, tensor in {**ins, **outs}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError(f"{self.specs[0].name} failed in TensorRT: {self._log.last}")
        return outs

    def _shapes(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""
        fixed = tuple(self._engine.get_tensor_shape(name))
        if -1 not in fixed:
            return fixed, fixed
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)

    def close(self) -> None:
        # Contexts must be deleted before their engine, and that before its runtime.
        del self._contexts
        del self._engine
        del self._runtime


def fitting(specs: Sequence[NetworkSpec], inputs: Mapping[str, Tensor]) -> int:
    """The first of an engine's profiles that fits these inputs; 0 if there is none."""

    def fits(spec: NetworkSpec) -> bool:
        shapes = [(port.shape, inputs[port.name].shape) for port in spec.inputs if port.name in inputs]
        pairs = [
            pair for axes, sizes in shapes for pair in zip(axes, sizes, strict=False)
        ]  # `bound` checks their number
        return all(isinstance(axis, int) or nearest(axis, size) == size for axis, size in pairs)

    return next((k for k, spec in enumerate(specs) if fits(spec)), 0)


def open_engine(
    path: Path, spec: NetworkSpec, device: torch.device, precision: str | None, hashes: Mapping[str, str], threads: int
) -> TensorRTEngine:
    """Open an engine file, or an ONNX file, which is built unless the bundle or the engine cache has its engine."""
    if device.type != "cuda":
        raise EngineError(f"TensorRT runs on NVIDIA GPUs, not on {device}: try backend openvino or onnxruntime")
    stored = next(port.dtype for port in spec.outputs)
    if precision not in (None, stored):
        raise EngineError(
            f"TensorRT computes in what the file holds, {stored}, not in {precision}: export it in {precision}"
        )
    if path.suffix != ".onnx":
        return TensorRTEngine(path.read_bytes(), spec, device)
    name, capability = torch.cuda.get_device_name(device), _capability_of(device)

    def build_here() -> bytes:
        with torch.cuda.device(device):
            return build(path, spec)

    key = key_of(path, spec, gpu=f"{name} sm_{capability}", hashes=hashes)
    bundled = Engines(path.parent.parent).find(key, capability)
    if bundled is not None:
        try:
            return TensorRTEngine(bundled, spec, device)
        except EngineError as error:
            logger.warning("the bundle's engine of %s is set aside: %s", spec.name, error)
    return EngineCache().fetch(key, build_here, lambda data: TensorRTEngine(data, spec, device))


def build_ahead(
    bundle: Bundle, *, capabilities: Sequence[int] = (), sizes: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[Record, float]]:
    """Build the missing engines of a bundle's networks and store them in the bundle. Yields each engine with the
    seconds that it took, 0 if it was there already.

    capabilities: as for `build`. sizes: width and height of images in pixels, for engines of only those sizes, see
        `image_ranges`; by default the spec's ranges.

    Raises InputError for a size that the networks do not take or if another process is building, EngineError if a
    network cannot be built or its engine cannot be written.
    """
    profiles = image_profiles(bundle.specs, sizes, bundle.model.vae.factor)
    engines, targets = Engines(bundle.folder), " ".join(f"sm_{capability}" for capability in capabilities)
    stored_capabilities = tuple(capabilities)
    if trt.__name__ == "tensorrt":  # builds for this machine's GPU
        stored_capabilities, targets = (_capability_of(torch.device("cuda")),), torch.cuda.get_device_name()
    architectures = [f"sm_{capability}" for capability in stored_capabilities] or ["portable"]
    library = f"{trt.__name__}-{trt.__version__}"
    folder = "-".join([library, *architectures, *(f"{width}x{height}" for width, height in sizes)])
    with engines.writing():
        for network, spec in bundle.specs.items():
            key = key_of(
                bundle.path(network),
                spec,
                profiles=profiles[network],
                gpu=targets or PORTABLE,
                hashes=bundle.hashes(network),
            )
            existing = engines.has(key)
            if existing is not None:
                yield existing, 0.0
                continue
            start = time.monotonic()
            data = build(bundle.path(network), spec, profiles=profiles[network], capabilities=capabilities)
            record = engines.keep(
                data, f"{folder}/{network}.engine", key, stored_capabilities, bundle.manifest["opset"]
            )
            yield record, time.monotonic() - start


def image_profiles(
    specs: Mapping[str, NetworkSpec], sizes: Sequence[tuple[int, int]], factor: int = 1
) -> dict[str, Sequence[Ranges]]:
    """For each network, a profile per image size; or a single one with all its ranges, if there are no sizes or it
    does not depend on them. factor: pixels of a latent, where no network makes images of latents. InputError for a size
    that the networks do not take."""
    by_size = [image_ranges(specs, size, factor) for size in dict.fromkeys(sizes)]
    return {name: [ranges[name] for ranges in by_size if ranges[name]] or ({},) for name in specs}


def image_ranges(specs: Mapping[str, NetworkSpec], size: tuple[int, int], factor: int = 1) -> dict[str, Ranges]:
    """Ranges of each network for images of one size, width and height in pixels.

    Networks of images have this size and the best of all other axes, except for what varies for a single image: rows,
    one or two with guidance; timesteps, one for all rows or one per row; and smaller images to decode, for previews.
    Other networks keep their ranges.
    """
    latents = specs["unet_step" if "unet_step" in specs else "unet"].axes["height"].best
    pixels_high = specs["vae_encoder"].axes["height"].best if "vae_encoder" in specs else factor * latents
    result: dict[str, Ranges] = {}
    for name, spec in specs.items():
        if "height" not in spec.axes:
            result[name] = {}
            continue
        unit = pixels_high // spec.axes["height"].best  # pixels of what it takes: latents or images
        axes = [spec.axes["width"], spec.axes["height"]]
        allowed = [nearest(axis, pixels // unit) * unit for axis, pixels in zip(axes, size, strict=True)]
        if allowed != list(size):
            raise InputError(
                f"the size is {size[0]}x{size[1]}: {name} takes widths and heights from {axes[0].least * unit} to "
                f"{axes[0].most * unit} in steps of {axes[0].multiple_of * unit}, the nearest is "
                f"{allowed[0]}x{allowed[1]}"
            )
        fixed = dict(static(spec, {"width": size[0] // unit, "height": size[1] // unit}))
        for axis in {"batch", "steps"} & fixed.keys():
            fixed[axis] = (1, fixed[axis][1], spec.axes["batch"].best)
        if name == "vae_decoder":
            fixed |= {side: (spec.axes[side].least, fixed[side][1], fixed[side][2]) for side in ("height", "width")}
        result[name] = fixed
    return result


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
    """The cache key of the engine that `build` returns for a network's model.onnx. Reads all files without a hash in
    `hashes`."""
    return Key(
        network=spec.name,
        graph=hash_files(path, hashes=hashes),
        weights=hash_files(*sorted(path.parent.glob(f"{path.name}_data*")), hashes=hashes),
        backend=trt.__name__,
        version=trt.__version__,
        precision=next(port.dtype for port in spec.outputs),
        ranges=describe_ranges(profiles, spec),
        flags="ieee",  # no TF32
        device=gpu,
    )


def describe_ranges(profiles: Sequence[Ranges], spec: NetworkSpec) -> str:
    """Text such as "batch=1:2:16 height=16:64:128", with a bar between profiles."""
    full = [
        {name: ranges.get(name, (axis.least, axis.best, axis.most)) for name, axis in spec.axes.items()}
        for ranges in profiles
    ]
    return " | ".join(
        " ".join(f"{name}={low}:{best}:{high}" for name, (low, best, high) in profile.items()) for profile in full
    )


# ---------------------------------------------------------------------------------------------------------- building


def shapes(spec: NetworkSpec, ranges: Ranges) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The least, best and most shape of each input with axes. InputError for ranges outside the spec's."""
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
    selected = {name: ranges.get(name, (axis.least, axis.best, axis.most)) for name, axis in axes.items()}
    ends = [{name: sizes[k] for name, sizes in selected.items()} for k in range(3)]
    return {port.name: tuple(spec.shape(port, sizes) for sizes in ends) for port in spec.inputs if port.axes}


def _check_ports(network: Any, spec: NetworkSpec) -> None:
    """EngineError if the parsed network's inputs or outputs are not the spec's."""
    sides = (
        ("inputs", [network.get_input(i) for i in range(network.num_inputs)], spec.inputs),
        ("outputs", [network.get_output(i) for i in range(network.num_outputs)], spec.outputs),
    )
    for side, tensors, ports in sides:
        actual = {(tensor.name, trt.nptype(tensor.dtype).__name__, tuple(tensor.shape)) for tensor in tensors}
        expected = {
            (port.name, port.dtype, tuple(size if isinstance(size, int) else -1 for size in port.shape))
            for port in ports
        }
        if actual != expected:
            raise EngineError(
                f"the {side} of {spec.name} are not what its bundle says: "
                f"found {_ports(actual - expected)}, expected {_ports(expected - actual)}"
            )


def _ports(ports: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, dtype, shape in sorted(ports)) or "no other"


def _allow_any_attention(network: Any) -> None:
    """Allow decomposing attention nodes (opset 23): TensorRT has fused kernels only for some head sizes in float16."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' downcast
            layer.attention.decomposable = True


def parse_capability(arch: str) -> int:
    """ "sm_89" -> 89. InputError for GPUs that this library does not build for."""
    if trt.__name__ == "tensorrt":
        raise InputError("TensorRT builds for this machine's GPU: builds for others need TensorRT-RTX")
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
    """Forwards TensorRT's messages to the logger, and holds the last error, since failed calls return no reason."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.last = "no reason was logged"

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.last = message
        logger.debug("TensorRT: %s", message)
