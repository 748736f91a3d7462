"""Proof that networks compute what PyTorch does, each within a bound that is its own.

How far a sound computation is from PyTorch's in float32 depends on network, precision and output. So it is tried: each
network runs in PyTorch with all that an op makes rounded to the precision, at export, and what that costs is kept with
the goldens. A backend may be off by FACTOR times that, in its largest error, in its mean square, and in what all errors
have in common, a shift or a factor, which a sound computation has nearly none of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastldm.errors import BundleError, EngineError, NonFinite
from fastldm.export import networks
from fastldm.export.bundle import PICTURE, Bundle
from fastldm.export.engine import Engine, open_engine
from fastldm.export.parity import Difference, difference, gate, worst
from fastldm.export.reference import ReferenceNetworks
from fastldm.export.spec import Axis, NetworkSpec, sample
from fastldm.loading.spec import Spec
from fastldm.request import Request
from fastldm.runtime.stages import Stages

Named = dict[str, Tensor]

PRECISIONS = {"float32": ("float32", "bfloat16"), "float16": ("float16", "float32", "bfloat16")}
"""What a bundle in a dtype may be computed in: OpenVINO computes in float32 or bfloat16 whatever the file holds."""


@dataclass(frozen=True)
class Check:
    """One network, run at one size; or a whole picture."""

    network: str
    origin: Literal["golden", "fresh"]  # of what it was compared with: stored in the bundle, or computed just now
    sizes: str
    difference: Difference | None
    problem: str = ""  # what is wrong, where something is


def verify(
    bundle: Bundle,
    backend: str = "onnxruntime",
    device: torch.device | str = "cpu",
    model: Spec | None = None,
    dtype: str | torch.dtype | None = None,
) -> Iterator[Check]:
    """Run every network on a backend at three sizes and compare with what PyTorch made of the same inputs in float32;
    then a whole picture.

    model: what the bundle was exported from. With it, PyTorch computes the networks at three other sizes too, of which
        the bundle knows nothing.
    dtype: to compute in; what a pipeline computes in where it is None.

    Raises EngineError where the backend is not installed or cannot load a network, BundleError where the model is not
    of the bundle's kind.
    """
    place = torch.device(device)
    reference = None if model is None else ReferenceNetworks(model, "float32", split=bundle.manifest["split"])
    if reference is not None and reference.specs.keys() != bundle.specs.keys():
        raise BundleError(
            f"the bundle has {', '.join(bundle.specs)}, the model it is to be compared with "
            f"{', '.join(reference.specs)}: give -m the model that it was exported from"
        )
    precision = networks.precision(bundle, backend, place, dtype)
    for network in bundle.specs:
        yield from check_network(bundle, network, backend, place, precision, reference)
    yield _check_picture(bundle, backend, place, dtype, precision)


def check_network(
    bundle: Bundle,
    network: str,
    backend: str = "onnxruntime",
    device: torch.device | str = "cpu",
    precision: str | None = None,
    reference: ReferenceNetworks | None = None,
) -> Iterator[Check]:
    """One network of it. precision: the bundle's dtype where it is None."""
    spec = bundle.specs[network]
    precision = networks.precision_of(network, precision or bundle.manifest["dtype"])
    goldens = Goldens.read(bundle, network)
    engine = open_engine(backend, bundle.path(network), spec, device=device, precision=precision)
    cases: list[tuple[Literal["golden", "fresh"], Named, Named]] = [("golden", *case) for case in goldens.cases]
    try:
        for origin, inputs, wanted in _with_fresh(cases, spec, reference):
            sizes = "  ".join(f"{port.name} {tuple(inputs[port.name].shape)}" for port in spec.inputs[:1])
            try:
                got = engine({name: tensor.to(device) for name, tensor in inputs.items()})
                yield Check(network, origin, sizes, gate(network, got, wanted, goldens.sound[precision]))
            except (BundleError, EngineError) as error:
                yield Check(network, origin, sizes, None, str(error))
    finally:
        engine.close()


def _with_fresh(
    cases: list[tuple[Literal["golden", "fresh"], Named, Named]], spec: NetworkSpec, reference: ReferenceNetworks | None
) -> Iterator[tuple[Literal["golden", "fresh"], Named, Named]]:
    yield from cases
    if reference is not None:
        for case, sizes in enumerate(fresh_sizes(spec)):
            inputs = sample(spec, sizes, seed=100 + case)
            yield "fresh", inputs, reference.run(spec.name, exact(inputs))


def _check_picture(
    bundle: Bundle, backend: str, device: torch.device, dtype: str | torch.dtype | None, precision: str
) -> Check:
    goldens = Goldens.read(bundle, PICTURE)
    ((inputs, wanted),) = goldens.cases
    sizes = f"{wanted[PICTURE].shape[3]}x{wanted[PICTURE].shape[2]} pixels"
    loaded = networks.load(bundle, backend, device, dtype)
    try:
        got = {PICTURE: _picture(Stages(bundle.model, loaded, bundle.manifest["model"]), inputs)}
        return Check(PICTURE, "golden", sizes, gate(PICTURE, got, wanted, goldens.sound[precision]))
    except (BundleError, EngineError, NonFinite) as error:
        return Check(PICTURE, "golden", sizes, None, str(error))


# ----------------------------------------------------------------------------------------------------------- goldens


@dataclass(frozen=True)
class Goldens:
    """What PyTorch makes of some inputs in float32, and how far it is off that in each precision."""

    cases: list[tuple[Named, Named]]
    sound: dict[str, dict[str, Difference]]  # by precision and output

    @classmethod
    def read(cls, bundle: Bundle, network: str) -> Goldens:
        """Those of a bundle. BundleError where they are not whole."""
        path = bundle.goldens(network)
        cases: dict[str, tuple[Named, Named]] = {}
        sound: dict[str, dict[str, Difference]] = {one: {} for one in PRECISIONS[bundle.manifest["dtype"]]}
        try:
            for key, tensor in load_file(path).items():
                case, side, name = key.split(":")
                if case == "sound":
                    sound[side][name] = Difference(*tensor.tolist())
                else:
                    cases.setdefault(case, ({}, {}))[side == "out"][name] = tensor
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BundleError(f"{path} holds no goldens of {network} ({error!r}): export the model again") from error
        return cls([cases[case] for case in sorted(cases)], sound)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        tensors: Named = {}
        for case, (inputs, outputs) in enumerate(self.cases):
            tensors |= {f"{case}:in:{name}": x for name, x in inputs.items()}
            tensors |= {f"{case}:out:{name}": x.contiguous() for name, x in outputs.items()}
        for precision, differences in self.sound.items():
            for name, found in differences.items():
                tensors[f"sound:{precision}:{name}"] = torch.tensor(found.figures(), dtype=torch.float64)
        return save(tensors)


def goldens_of(spec: NetworkSpec, reference: ReferenceNetworks, stored: ReferenceNetworks) -> Goldens:
    """reference: the model in float32. stored: with the weights that the network is written with, computing in float32.
    BundleError where the dtype of these cannot hold what the network computes."""
    cases, sound = (
        [],
        {one: {port.name: Difference.none() for port in spec.outputs} for one in PRECISIONS[stored.dtype]},
    )
    for case, sizes in enumerate(golden_sizes(spec)):
        inputs = sample(spec, sizes, seed=case)
        wanted = reference.run(spec.name, exact(inputs))
        cases.append((inputs, wanted))
        for precision, figures in sound.items():
            got = stored.run(spec.name, exact(inputs), precision)
            figures |= {name: worst(figures[name], difference(got[name], wanted[name])) for name in figures}
    for name, found in sound[stored.dtype].items():
        if not found.maximum < float("inf"):
            raise BundleError(f"{spec.name}: {name} leaves the range of {stored.dtype}: export the model in float32")
    return Goldens(cases, sound)


def goldens_of_picture(bundle: Bundle, reference: ReferenceNetworks, stored: ReferenceNetworks) -> Goldens:
    """The same of a picture of a quarter of the model's size in few steps, from its text on."""
    model = bundle.model
    unet = networks.latents(bundle)[0]
    height, width = (_share(axis, 1, 2) for axis in unet)
    shape = (1, model.vae.latent_channels, height, width)
    inputs = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def made(source: ReferenceNetworks, precision: str | None) -> Named:
        def opened(name: str) -> Engine:
            return _Reference(source, bundle.specs[name], precision)

        loaded = networks.load(bundle, "torch", torch.device("cpu"), opened=opened)
        return {PICTURE: _picture(Stages(model, loaded, bundle.manifest["model"]), inputs)}

    wanted = made(reference, None)
    sound = {
        one: {PICTURE: difference(made(stored, one)[PICTURE], wanted[PICTURE])} for one in PRECISIONS[stored.dtype]
    }
    return Goldens([(inputs, wanted)], sound)


def _picture(stages: Stages, inputs: Mapping[str, Tensor]) -> Tensor:
    """(1, 3, H, W) in 0..1 of a fixed prompt, from these latents."""
    asked: dict[str, Any] = {"prompt": "a photograph of a red apple", "num_inference_steps": 3, "output_type": "pt"}
    if stages.unet.config.in_channels > stages.latent_channels:  # made for inpainting
        height, width = (int(n) * stages.vae.config.factor for n in inputs["latents"].shape[2:])
        grey = np.full((height, width, 3), 0.5, dtype=np.float32)
        asked |= {"image": grey, "mask_image": grey[..., 0] * 2, "strength": 1.0}
    return stages.make(Request(**asked, seed=0, latents=inputs["latents"])).float().cpu()


class _Reference:
    """PyTorch in an engine's place, rounding to a precision where one is given."""

    def __init__(self, source: ReferenceNetworks, spec: NetworkSpec, precision: str | None) -> None:
        self.specs, self._source, self._precision = (spec,), source, precision

    def __call__(self, inputs: Mapping[str, Tensor]) -> Named:
        return self._source.run(self.specs[0].name, exact(inputs), self._precision)

    def close(self) -> None:
        pass


def exact(inputs: Mapping[str, Tensor]) -> Named:
    """What a network is given, rounded to its dtype, in float32."""
    return {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}


def golden_sizes(spec: NetworkSpec) -> list[dict[str, int]]:
    """Three sizes that a network is judged at: one picture of the best size, and two upright and three broad ones of an
    eighth of its pixels (at full size it is PyTorch's time that counts), with a timestep for all and one for each."""
    axes = spec.axes

    def sides(**parts: int) -> dict[str, int]:
        return {name: _share(axes[name], 1, whole) for name, whole in parts.items() if name in axes}

    long = {"tokens": min(2 * axes["tokens"].best, axes["tokens"].most)} if "tokens" in axes else {}
    return [
        {"batch": 1},
        {"batch": 2, "steps": 2, "rows": 1, **sides(height=2, width=4)},
        {"batch": 3, "rows": 7, **long, **sides(height=4, width=2)},
    ]


def fresh_sizes(spec: NetworkSpec) -> list[dict[str, int]]:
    """Three sizes that a network is judged at where the model is at hand, none of them a golden's: the smallest
    picture with the shortest text, a picture that is neither square nor a half of the best, and four of a quarter."""
    axes = spec.axes
    return [
        {**{name: axis.least for name, axis in axes.items()}, "rows": 2},
        {"batch": 1, "rows": 3, **{name: _share(axes[name], 3, 4) for name in ("height", "tokens") if name in axes}},
        {
            **{"batch": 4, "steps": 4, "rows": 50},
            **{name: _share(axes[name], 1, 4) for name in ("height", "width", "tokens") if name in axes},
        },
    ]


def _share(axis: Axis, part: int, whole: int) -> int:
    """A part of the best size, as the axis allows it."""
    return max(axis.least, axis.best * part // whole // axis.multiple_of * axis.multiple_of)
