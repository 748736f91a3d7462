"""Weights laid out for the steps that read them often, and kept true when their owner changes them.

`prepare` moves parameters to where they are read fastest. They stay parameters, now views of that memory, and so do
those of a diffusers pipeline that shares them: what is written into them in place is what the next step reads.

    packed      the projections to queries, keys and values of one attention lie side by side: one matrix product
                (models.layers.project)
    convolved   weights of convolutions are channels-last, and on a GPU a corner of memory that is padded with zeros to
                multiples of 8 channels (kernels.conv.in_eights)
    folded      what is made of a parameter and kept beside it: on a GPU the phases of an upsampling convolution
                (kernels.conv.upsample_phases); the weights of an autoencoder that is rescaled for float16, made of
                those of an adopted pipeline, which stay as they are; on a CPU the U-Net's weights in oneDNN's layout
                (kernels.onednn), made when first needed

Two changes are not seen by themselves: a parameter that was replaced (`layer.weight = nn.Parameter(new)`,
`layer.weight.data = new`), since captured steps go on reading where it was, and any change of what is folded.
`Prepared.stale` finds both, `Prepared.weights_changed` brings all up to date in place, and `Prepared.refresh` does
before each request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.kernels.conv import in_eights, upsample_phases
from fastldm.kernels.linear import fast_library
from fastldm.kernels.onednn import Layouts, row_sums
from fastldm.models.clip import TextAttention
from fastldm.models.layers import Attention, Conv, Upsample, channels_last, stacked
from fastldm.models.unet import UNet
from fastldm.models.vae import HALF_EXPONENT, AutoencoderKL, EnlargedConv, rescale_for_half


class Kind(NamedTuple):
    """What a parameter cannot change without the steps that read it being made anew."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        return cls(x.shape, x.dtype, x.device)

    def __str__(self) -> str:
        return f"{tuple(self.shape)} in {self.dtype} on {self.device}".replace("torch.", "")


class Place(NamedTuple):
    """Where a module keeps a parameter, whichever parameter that is by now."""

    parameters: dict[str, nn.Parameter | None]  # the module's own
    leaf: str

    def read(self) -> nn.Parameter | None:
        return self.parameters.get(self.leaf)

    def address(self) -> int:
        parameter = self.read()
        return 0 if parameter is None else parameter.data_ptr()

    def expect(self, kind: Kind, name: str) -> nn.Parameter:
        """The parameter, or an InputError for one of another kind."""
        parameter = self.read()
        if parameter is None or Kind.of(parameter) != kind:
            got = "nothing" if parameter is None else Kind.of(parameter)
            raise InputError(f"{name} was replaced by {got}: expected {kind}, or the model to be loaded anew")
        return parameter


class Home(NamedTuple):
    """The memory that is read for a parameter."""

    name: str
    data: Tensor
    places: tuple[Place, ...]  # the network's own, then those of modules that share it


class Folded(NamedTuple):
    """A tensor made of a parameter and kept."""

    name: str
    data: Tensor
    source: Place
    kind: Kind  # of the source
    make: Callable[[Tensor], Tensor]

    def read(self) -> nn.Parameter:
        return self.source.expect(self.kind, f"what {self.name} is made of")


class Prepared:
    """Where the weights of some networks are, and what is made of them."""

    def __init__(self, homes: list[Home], folded: list[Folded], layouts: Layouts) -> None:
        self._homes, self._folded, self._layouts = homes, folded, layouts
        self._addresses = [(place, home.data.data_ptr()) for home in homes for place in home.places]
        self._seen = self._fingerprint()

    def stale(self) -> bool:
        """Whether a parameter was replaced, or what is folded was changed in any way, since all was last up to date.

        Compares addresses on the host and, only where something is folded, waits for the device. Raises InputError as
        `weights_changed` does.
        """
        moved = any(place.address() != at for place, at in self._addresses)
        return moved or not torch.equal(self._fingerprint(), self._seen) or self._layouts.stale()

    @torch.no_grad()
    def refresh(self) -> list[str]:
        """What `weights_changed` does, before each request, without waiting for a GPU: what is folded there is made
        anew unasked, for to see whether it has to be would wait. Returns the names of what is known to have changed."""
        folds_on_gpu = any(folded.data.is_cuda or folded.data.is_meta for folded in self._folded)
        if not folds_on_gpu:
            return self.weights_changed() if self.stale() else []
        changed = self._rehome()
        for folded in self._folded:
            folded.data.copy_(folded.make(folded.read()))
        return changed

    @torch.no_grad()
    def weights_changed(self) -> list[str]:
        """Bring what steps read up to date with the parameters, in place. Returns the names of what was not.

        A replaced parameter's content is copied to where the old one's was, and lives there from then on. Raises
        InputError for one of another shape or dtype, or on another device.
        """
        changed = self._rehome()
        for folded in self._folded:
            made = folded.make(folded.read())
            if not torch.equal(folded.data, made):
                folded.data.copy_(made)
                changed.append(folded.name)
        self._seen = self._fingerprint()
        for weight in self._layouts.drop_stale():
            at = weight.data_ptr()
            changed += [home.name for home in self._homes if 0 <= at - home.data.data_ptr() < home.data.nbytes]
        return list(dict.fromkeys(changed))

    def _rehome(self) -> list[str]:
        """Copy what lies elsewhere to where it is read."""
        changed = []
        for home in self._homes:
            for place in home.places:
                if place.address() != home.data.data_ptr():
                    home.data.copy_(place.expect(Kind.of(home.data), home.name))
                    _move(home.places, home.data)
                    changed.append(home.name)
        return changed

    def _fingerprint(self) -> Tensor:
        """Of all that is folded: for each row of its source, what the numbers' bits add up to as integers."""
        sums = [row_sums(folded.read()) for folded in self._folded]
        return torch.cat(sums) if sums else torch.empty(0)


@torch.no_grad()
def prepare(networks: Mapping[str, nn.Module], sharing: Iterable[nn.Module] = ()) -> Prepared:
    """Lay out the weights of networks, by name; layer by layer, so that at most a layer's weights are there twice.

    sharing: modules whose parameters share memory with those of the networks, and go on doing so. An autoencoder in
    float16 whose activations would leave its range (`force_upcast`) is rescaled; whoever shared its weights keeps them.
    """
    sharers: dict[tuple[int, torch.Size], list[Place]] = {}
    for module in sharing:
        for _, place, parameter in _named_parameters(module):
            sharers.setdefault((parameter.data_ptr(), parameter.shape), []).append(place)

    homes: list[Home] = []
    folded: list[Folded] = []
    blocked: list[Tensor] = []
    for title, network in networks.items():
        places = {
            name: (place, *sharers.get((parameter.data_ptr(), parameter.shape), ()))
            for name, place, parameter in _named_parameters(network)
        }
        sources = {name: places[name][1:] for name in _rescale(network)}
        places |= {name: places[name][:1] for name in sources}
        for path, module in network.named_modules():
            for name, data in _layout(module).items():
                _move(places[_join(path, name)], data)

        parameters = {name: parameter.data for name, _, parameter in _named_parameters(network)}
        homes += [Home(_join(title, name), data, places[name]) for name, data in parameters.items()]
        # The others run once a request, and would gain less than looking for changes costs.
        if isinstance(network, UNet):
            blocked += [data for data in parameters.values() if data.device.type == "cpu" and not fast_library(data)]
        for name, theirs in sources.items():
            data = parameters[name]
            folded += [Folded(_join(title, name), data, source, Kind.of(data), _rescaled) for source in theirs[:1]]
        for path, module in network.named_modules():
            if isinstance(module, Upsample | EnlargedConv):
                conv = module.conv if isinstance(module, Upsample) else module
                if fast_library(conv.weight):
                    module.phases = upsample_phases(conv.weight)
                    source, kind = Place(conv._parameters, "weight"), Kind.of(conv.weight)
                    folded.append(Folded(_join(title, path, "phases"), module.phases, source, kind, upsample_phases))
    return Prepared(homes, folded, Layouts(blocked))


def _layout(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a layer that have a layout of their own, in it."""
    if isinstance(module, Conv):
        weight = module.weight.data
        filters, channels, *kernel = weight.shape
        if kernel != [1, 1] and fast_library(weight):
            return {"weight": in_eights(channels_last(weight))[:filters, :channels]}
        return {"weight": channels_last(weight)}
    if isinstance(module, Attention):
        to_itself = module.to_q.weight.shape == module.to_k.weight.shape
        return _side_by_side(module, ("to_q", "to_k", "to_v") if to_itself else ("to_k", "to_v"))
    if isinstance(module, TextAttention):
        return _side_by_side(module, ("q_proj", "k_proj", "v_proj"))
    return {}


def _side_by_side(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    placed: dict[str, Tensor] = {}
    for leaf in ("weight", "bias"):
        given = {f"{name}.{leaf}": getattr(module.get_submodule(name), leaf) for name in names}
        if None not in given.values():
            rows = [x.shape[0] for x in given.values()]
            placed |= dict(zip(given, stacked([x.data for x in given.values()]).split(rows), strict=True))
    return placed


def _rescale(network: nn.Module) -> list[str]:
    """The names of the parameters of an autoencoder that had to be rescaled."""
    if not isinstance(network, AutoencoderKL) or not network.config.force_upcast:
        return []
    return rescale_for_half(network) if next(network.parameters()).dtype == torch.float16 else []


def _rescaled(x: Tensor) -> Tensor:
    return x * 2.0**HALF_EXPONENT


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, Place, nn.Parameter]]:
    for path, layer in module.named_modules():
        for leaf, parameter in layer._parameters.items():
            if parameter is not None:
                yield _join(path, leaf), Place(layer._parameters, leaf), parameter


def _move(places: Iterable[Place], data: Tensor) -> None:
    for place in places:
        parameter = place.read()
        if parameter is not None:
            parameter.data = data


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
