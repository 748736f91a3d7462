"""Verification that networks compute what PyTorch does, each within its own bound.

The error of a sound computation, compared with PyTorch's in float32, depends on network, precision and output. It is
measured at export: each network runs in PyTorch with all results rounded to the precision, and the errors are stored
with the goldens. A backend may have FACTOR times those errors: in maximum, in mean square, and in what all errors have
in common, a shift or a factor, of which a sound computation has nearly none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastldm.adapters.control import read_control
from fastldm.adapters.packing import DOWN, UP
from fastldm.errors import BundleError, CheckpointError, EngineError, InputError, NonFinite
from fastldm.export import networks
from fastldm.export.backends import related
from fastldm.export.bundle import PICTURE, Bundle, control_identity
from fastldm.export.engine import Engine, open_engine
from fastldm.export.graphs import STEPS, WHOLE_PICTURE, case_sizes
from fastldm.export.parity import Difference, difference, gate, worst
from fastldm.export.reference import ReferenceNetworks
from fastldm.export.spec import TILE, Axis, NetworkSpec, sample, tiled
from fastldm.image import to_pixels
from fastldm.loading.spec import Spec
from fastldm.models.controlnet import ControlNetConfig
from fastldm.request import Request
from fastldm.runtime.complete import sample_request
from fastldm.runtime.stages import Stages
from fastldm.runtime.whole_picture import picture_inputs

Named = dict[str, Tensor]

PROMPT = "a photograph of a red apple"
PRECISIONS = {"float32": ("float32", "bfloat16"), "float16": ("float16", "float32", "bfloat16")}
"""Precisions in which a bundle of a dtype may be computed: OpenVINO has float32 and bfloat16 for all files."""


@dataclass(frozen=True)
class Check:
    """The result of running one network at one size, or of generating an image."""

    network: str
    origin: Literal["golden", "fresh"]  # of the expected outputs: stored in the bundle, or computed now
    sizes: str
    difference: Difference | None
    problem: str = ""  # empty if the network is correct


def verify(
    bundle: Bundle,
    backend: str = "onnxruntime",
    device: torch.device | str = "cpu",
    model: Spec | None = None,
    dtype: str | torch.dtype | None = None,
) -> Iterator[Check]:
    """Run every network on a backend at three sizes, and compare it with PyTorch's stored outputs in float32; then
    generate an image.

    model: the model that the bundle was exported from. If given, PyTorch also computes expected outputs for three other
        sizes, which are not in the bundle.
    dtype: to compute in, by default as a pipeline does.

    Raises EngineError if the backend is not installed or cannot load a network, BundleError if the model's networks are
    not the bundle's.
    """
    device = torch.device(device)
    form: dict[str, Any] = {"split": bundle.manifest["split"], "adapter_rank": bundle.adapter_rank}
    form |= {"controls": bundle.controls, "whole_picture": bool(bundle.graphs)}
    if model is not None:
        form["control_networks"] = _control_networks(bundle, model)
    reference = None if model is None else ReferenceNetworks(model, "float32", **form)
    if reference is not None and reference.specs.keys() != bundle.specs.keys():
        raise BundleError(
            f"the bundle has {', '.join(bundle.specs)}, the model it is to be compared with "
            f"{', '.join(reference.specs)}: give -m the model that it was exported from"
        )
    precision = networks.precision(bundle, backend, device, dtype)
    for network in (*bundle.specs, *bundle.graphs):
        yield from check_network(bundle, network, backend, device, precision, reference)
    for each in [name for name in related(backend) if bundle.graphs or name == backend]:
        yield _check_image(bundle, each, device, dtype, precision)


def _control_networks(bundle: Bundle, model: Spec) -> list[Any]:
    """A bundle's controls in float32, up to the first that is not where it was read from; a pickle counts as none."""
    found: list[Any] = []
    for entry, config in zip(bundle.manifest.get("controls", ()), bundle.controls, strict=True):
        pooled = isinstance(config, ControlNetConfig) and config.global_pool
        try:
            control = read_control(Path(entry["source"] or ""), model, global_pool_conditions=pooled)
        except (CheckpointError, InputError):
            break
        if control_identity(entry["name"], control)["weights"] != entry["weights"]:
            break
        found.append(control.network)
    return found


def check_network(
    bundle: Bundle,
    network: str,
    backend: str = "onnxruntime",
    device: torch.device | str = "cpu",
    precision: str | None = None,
    reference: ReferenceNetworks | None = None,
    engine: Engine | None = None,
) -> Iterator[Check]:
    """Check one network. precision: by default the bundle's dtype. engine: its own, in place of the backend's; closed
    at the end."""
    spec = bundle.spec(network)
    precision = networks.precision_of(network, precision or bundle.manifest["dtype"])
    goldens = Goldens.read(bundle, network)
    engine = engine or open_engine(backend, bundle.path(network), spec, device=device, precision=precision)
    cases: list[tuple[Literal["golden", "fresh"], Named, Named]] = [("golden", *case) for case in goldens.cases]
    try:
        for origin, inputs, expected in _with_fresh(bundle, cases, spec, reference):
            sizes = "  ".join(f"{port.name} {tuple(inputs[port.name].shape)}" for port in spec.inputs[:1])
            try:
                actual = engine({name: tensor.to(device) for name, tensor in inputs.items()})
                if network == WHOLE_PICTURE:
                    actual = {PICTURE: to_pixels(actual["image"], "pt")}
                yield Check(network, origin, sizes, gate(network, actual, expected, goldens.sound[precision]))
            except (BundleError, EngineError) as error:
                yield Check(network, origin, sizes, None, str(error))
    finally:
        engine.close()


def _with_fresh(
    bundle: Bundle,
    cases: list[tuple[Literal["golden", "fresh"], Named, Named]],
    spec: NetworkSpec,
    reference: ReferenceNetworks | None,
) -> Iterator[tuple[Literal["golden", "fresh"], Named, Named]]:
    yield from cases
    if reference is not None and spec.name == WHOLE_PICTURE:
        stages = _reference_stages(bundle, reference, None)
        for request in _picture_requests(stages, fresh=True):
            yield "fresh", picture_inputs(stages, request, spec), {PICTURE: _made(stages, request)}
    elif reference is not None and reference.has(spec.name) and spec.name not in bundle.quantized:
        for case, sizes in enumerate(fresh_sizes(spec)):
            inputs = sample(spec, sizes, seed=100 + case)
            yield "fresh", inputs, reference.run(spec.name, exact(inputs))


def _check_image(
    bundle: Bundle, backend: str, device: torch.device, dtype: str | torch.dtype | None, precision: str
) -> Check:
    goldens = Goldens.read(bundle, PICTURE)
    ((inputs, expected),) = goldens.cases
    sizes = f"{expected[PICTURE].shape[3]}x{expected[PICTURE].shape[2]} pixels"
    sizes += f" on {backend}" if bundle.graphs else ""
    loaded = networks.load(bundle, backend, device, dtype)
    try:
        actual = {PICTURE: fixed_image(Stages(bundle.model, loaded, bundle.manifest["model"]), inputs)}
        return Check(PICTURE, "golden", sizes, gate(PICTURE, actual, expected, goldens.sound[precision]))
    except (BundleError, EngineError, NonFinite) as error:
        return Check(PICTURE, "golden", sizes, None, str(error))


# ----------------------------------------------------------------------------------------------------------- goldens


@dataclass(frozen=True)
class Goldens:
    """PyTorch's outputs for sample inputs in float32, and the errors of a sound computation in each precision."""

    cases: list[tuple[Named, Named]]
    sound: dict[str, dict[str, Difference]]  # by precision and output

    @classmethod
    def read(cls, bundle: Bundle, network: str) -> Goldens:
        """Read the goldens of a bundle. BundleError if they are invalid."""
        path = bundle.goldens(network)
        cases: dict[str, tuple[Named, Named]] = {}
        sound: dict[str, dict[str, Difference]] = {precision: {} for precision in PRECISIONS[bundle.manifest["dtype"]]}
        try:
            for key, tensor in load_file(path).items():
                case, side, name = key.split(":")
                if case == "sound":
                    sound[side][name] = Difference(*tensor.tolist())
                else:
                    cases.setdefault(case, ({}, {}))[side == "out"][name] = tensor
            for port in () if network == PICTURE else bundle.spec(network).inputs:
                for inputs, _ in cases.values() if port.like == "factors" else ():
                    inputs[port.name] = tiled(inputs[port.name], port.shape[0])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BundleError(f"{path} holds no goldens of {network} ({error!r}): export the model again") from error
        return cls([cases[case] for case in sorted(cases)], sound)

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        tensors: Named = {}
        for case, (inputs, outputs) in enumerate(self.cases):
            # of factors of adapters their tile: they are as large as all of an adapter's file
            tensors |= {
                f"{case}:in:{name}": (x[:TILE] if name in (DOWN, UP) else x).clone() for name, x in inputs.items()
            }
            tensors |= {f"{case}:out:{name}": x.contiguous() for name, x in outputs.items()}
        for precision, differences in self.sound.items():
            for name, measured in differences.items():
                tensors[f"sound:{precision}:{name}"] = torch.tensor(measured.values(), dtype=torch.float64)
        return save(tensors)


def goldens_of(spec: NetworkSpec, reference: ReferenceNetworks, stored: ReferenceNetworks) -> Goldens:
    """The goldens of a network. reference: the model in float32. stored: the exported weights, computing in float32.
    BundleError if the network's activations overflow in the dtype of those."""
    cases = []
    sound = {p: {port.name: Difference.none() for port in spec.outputs} for p in PRECISIONS[stored.dtype]}
    for case, sizes in enumerate(golden_sizes(spec)):
        inputs = sample(spec, sizes, seed=case)
        expected = reference.run(spec.name, exact(inputs))
        cases.append((inputs, expected))
        for precision, largest in sound.items():
            # The best size takes long, and rounding errs as much at smaller ones, if nothing overflows. Of several
            # steps the first case is the longest, and not large.
            if case == 0 and precision != "float16" and (precision, spec.name) != ("float32", STEPS):
                continue
            actual = stored.run(spec.name, exact(inputs), precision)
            largest |= {name: worst(largest[name], difference(actual[name], expected[name])) for name in largest}
    for name, measured in sound[stored.dtype].items():
        if not measured.maximum < float("inf"):
            raise BundleError(f"{spec.name}: {name} leaves the range of {stored.dtype}: export the model in float32")
    return Goldens(cases, sound)


def goldens_of_image(bundle: Bundle, reference: ReferenceNetworks, stored: ReferenceNetworks) -> Goldens:
    """The goldens of an image of half the model's width and height in a few steps, from its prompt."""
    model = bundle.model
    unet = networks.latents(bundle)[0]
    height, width = (_fraction(axis, 1, 2) for axis in unet)
    shape = (1, model.vae.latent_channels, height, width)
    inputs = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def generate(source: ReferenceNetworks, precision: str | None) -> Named:
        return {PICTURE: fixed_image(_reference_stages(bundle, source, precision), inputs)}

    expected = generate(reference, None)
    sound = {
        p: {PICTURE: difference(generate(stored, p)[PICTURE], expected[PICTURE])} for p in PRECISIONS[stored.dtype]
    }
    return Goldens([(inputs, expected)], sound)


def goldens_of_whole_picture(bundle: Bundle, reference: ReferenceNetworks, stored: ReferenceNetworks) -> Goldens:
    """The goldens of the graph of a whole picture: requests of several samplers, as the pipeline answers them."""
    stages = _reference_stages(bundle, reference, None)
    requests = _picture_requests(stages)
    expected = [_made(stages, request) for request in requests]
    sound = {}
    for precision in PRECISIONS[stored.dtype]:
        rounded = _reference_stages(bundle, stored, precision)
        errors = [difference(_made(rounded, own), x) for own, x in zip(requests, expected, strict=True)]
        sound[precision] = {PICTURE: functools.reduce(worst, errors)}
    spec = bundle.graphs[WHOLE_PICTURE]
    cases = [(picture_inputs(stages, own, spec), {PICTURE: x}) for own, x in zip(requests, expected, strict=True)]
    return Goldens(cases, sound)


def _reference_stages(bundle: Bundle, source: ReferenceNetworks, precision: str | None) -> Stages:
    """A pipeline's stages on PyTorch's networks, which round to `precision` if it is not None."""

    def opened(name: str) -> Engine:
        return _ReferenceEngine(source, bundle.specs[name], precision)

    loaded = networks.load(bundle, "torch", torch.device("cpu"), opened=opened)
    return Stages(bundle.model, loaded, bundle.manifest["model"])


def _picture_requests(stages: Stages, fresh: bool = False) -> list[Request]:
    """Small pictures by several samplers: guided and not, from noise and from a picture with a mask, one and two."""
    factor = stages.vae.config.factor
    height, width = (factor * _fraction(axis, 1, 4) for axis in stages.latents[0])
    shared: dict[str, Any] = {"output_type": "pt", "seed": 0}
    shared |= {"height": height, "width": width, "num_inference_steps": 3}
    start = torch.randn(1, stages.latent_channels, height // factor, width // factor, generator=_seeded(1))
    mask = np.zeros((height, width), dtype=np.float32)
    mask[: height // 2] = 1
    from_picture: dict[str, Any] = {"image": start, "mask_image": mask, "strength": 0.7}
    needed = sample_request(stages.spec, height, width, PROMPT)
    shared |= needed
    if needed.keys() != {"prompt"} or not stages.spec.conditioned:
        from_picture = {"image_guidance_scale": 1.2} if stages.spec.unet.edits else {}
    negative = {"negative_prompt": "blurry"} if needed["prompt"] else {}
    if "mask_image" in needed:
        shared["mask_image"] = mask
    if fresh:
        options: list[dict[str, Any]] = [
            {"sampler": "unipc", "guidance_scale": 2.5},
            {"sampler": "heun", "guidance_scale": 1.0, "num_inference_steps": 2},
        ]
    else:
        options = [
            {"sampler": "ddim", "guidance_scale": 3.0, **negative},
            {"sampler": "euler a", "guidance_scale": 1.0, "num_images_per_prompt": 2},
            {"sampler": "dpm++ 2m", "guidance_scale": 4.0, "guidance_rescale": 0.7, **from_picture},
        ]
    if not stages.spec.conditioned:  # nor guided
        options = [{k: x for k, x in own.items() if not k.startswith("guidance")} for own in options]
    return [Request(**{**shared, **own}) for own in options]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _made(stages: Stages, request: Request) -> Tensor:
    return stages.make(request).float().cpu()


def fixed_image(stages: Stages, inputs: Mapping[str, Tensor]) -> Tensor:
    """The image (1, 3, H, W) in 0..1 of a fixed prompt, from these latents."""
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    height, width = (int(n) * stages.vae.config.factor for n in inputs["latents"].shape[2:])
    options |= sample_request(stages.spec, height, width, PROMPT)
    return stages.make(Request(**options, seed=0, latents=inputs["latents"])).float().cpu()


class _ReferenceEngine:
    """An engine that runs in PyTorch, rounding to `precision` if it is not None."""

    def __init__(self, source: ReferenceNetworks, spec: NetworkSpec, precision: str | None) -> None:
        self.specs, self._source, self._precision = (spec,), source, precision

    def __call__(self, inputs: Mapping[str, Tensor]) -> Named:
        return self._source.run(self.specs[0].name, exact(inputs), self._precision)

    def close(self) -> None:
        pass


def exact(inputs: Mapping[str, Tensor]) -> Named:
    """Inputs of a network in float32, with values rounded to their own dtype."""
    return {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}


def golden_sizes(spec: NetworkSpec) -> list[dict[str, int]]:
    """Three sizes at which a network is verified: one image of the best size, and two portrait and three landscape ones
    of an eighth of its pixels (larger ones would take long in PyTorch), with one timestep for all or one for each."""
    if spec.name == STEPS:
        return case_sizes(spec, fresh=False)
    axes = spec.axes

    def sides(**divisors: int) -> dict[str, int]:
        return {name: _fraction(axes[name], 1, divisor) for name, divisor in divisors.items() if name in axes}

    long = {"tokens": min(2 * axes["tokens"].best, axes["tokens"].most)} if "tokens" in axes else {}
    return [
        {"batch": 1},
        {"batch": 2, "steps": 2, "rows": 1, **sides(height=2, width=4)},
        {"batch": 3, "rows": 7, **long, **sides(height=4, width=2)},
    ]


def fresh_sizes(spec: NetworkSpec) -> list[dict[str, int]]:
    """Three other sizes at which a network is verified if the model is available: the smallest image with the shortest
    text, an image that is neither square nor half the best size, and four of a quarter."""
    if spec.name == STEPS:
        return case_sizes(spec, fresh=True)
    axes = spec.axes
    return [
        {**{name: axis.least for name, axis in axes.items()}, "rows": 2},
        {"batch": 1, "rows": 3, **{name: _fraction(axes[name], 3, 4) for name in ("height", "tokens") if name in axes}},
        {
            **{"batch": 4, "steps": 4, "rows": 50},
            **{name: _fraction(axes[name], 1, 4) for name in ("height", "width", "tokens") if name in axes},
        },
    ]


def _fraction(axis: Axis, numerator: int, denominator: int) -> int:
    """A fraction of the best size, rounded to an allowed one."""
    return max(axis.least, axis.best * numerator // denominator // axis.multiple_of * axis.multiple_of)
