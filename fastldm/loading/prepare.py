"""Weights laid out for the ops that read them in every step, and kept up to date when their owner changes them.

`prepare` moves parameters to the layout that is fastest to read. They stay parameters, now views of that memory, and
so do those of a diffusers pipeline that shares them: in-place writes are seen by the next step.

    packed      the query, key and value projections of one attention are stacked in one tensor: one matrix product
                (models.layers.project)
    convolved   convolution weights are channels-last, and on a GPU a slice of memory that is zero-padded to multiples
                of 8 channels (kernels.conv.pad_to_eights)
    derived     tensors computed from a parameter and cached beside it: on a GPU the phases of an upsampling convolution
                (kernels.conv.upsample_phases); the weights of an autoencoder that is rescaled for float16, computed
                from those of an adopted pipeline, which stay unchanged; on a CPU the U-Net's weights in oneDNN's layout
                (kernels.onednn), computed on first use; large linear layers in eight bits (runtime/eight_bits.py)

Two kinds of change need a check: a parameter that was replaced (`layer.weight = nn.Parameter(new)`,
`layer.weight.data = new`), because captured graphs keep reading the old address, and any change of the source of a
derived tensor. `Prepared.stale` detects both, `Prepared.weights_changed` updates everything in place, and
`Prepared.refresh` does so before each request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.kernels.conv import pad_to_eights, upsample_phases
from fastldm.kernels.linear import fast_library
from fastldm.kernels.onednn import Layouts, row_sums
from fastldm.models.clip import SelfAttention
from fastldm.models.layers import Attention, Conv, Upsample, channels_last, stacked
from fastldm.models.resnet import TimedResnet
from fastldm.models.unet import UNetEncoder
from fastldm.models.vae import HALF_EXPONENT, AutoencoderKL, EnlargedConv, rescale_for_half


class TensorSpec(NamedTuple):
    """What must not change when a parameter is replaced: the ops that read it were set up for this."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> TensorSpec:
        return cls(x.shape, x.dtype, x.device)

    def __str__(self) -> str:
        return f"{tuple(self.shape)} in {self.dtype} on {self.device}".replace("torch.", "")


class ParameterSlot(NamedTuple):
    """An entry in a module's `_parameters`, which may hold another parameter later."""

    parameters: dict[str, nn.Parameter | None]  # the module's own
    leaf: str

    def read(self) -> nn.Parameter | None:
        return self.parameters.get(self.leaf)

    def address(self) -> int:
        parameter = self.read()
        return 0 if parameter is None else parameter.data_ptr()

    def expect(self, spec: TensorSpec, name: str) -> nn.Parameter:
        """The parameter. InputError if its shape, dtype or device is not as in `spec`."""
        parameter = self.read()
        if parameter is None or TensorSpec.of(parameter) != spec:
            got = "nothing" if parameter is None else TensorSpec.of(parameter)
            raise InputError(f"{name} was replaced by {got}: expected {spec}, or the model to be loaded anew")
        return parameter


class Storage(NamedTuple):
    """The memory from which a parameter is read."""

    name: str
    data: Tensor
    slots: tuple[ParameterSlot, ...]  # the network's own, then those of modules that share it


class Derived(NamedTuple):
    """A cached tensor that was computed from a parameter."""

    name: str
    data: Tensor
    source: ParameterSlot
    source_spec: TensorSpec
    compute: Callable[[Tensor], Tensor]

    def read_source(self) -> nn.Parameter:
        return self.source.expect(self.source_spec, f"the source of {self.name}")


class Prepared:
    """The prepared weights of some networks, and the tensors derived from them."""

    def __init__(self, storages: list[Storage], derived: list[Derived], layouts: Layouts) -> None:
        self._storages, self._derived, self._layouts = storages, derived, layouts
        self._addresses = [(slot, storage.data.data_ptr()) for storage in storages for slot in storage.slots]
        self._last_fingerprint = self._fingerprint()

    def add(self, derived: Iterable[Derived]) -> None:
        """Keep more tensors up to date; they are now."""
        self._derived += derived
        self._last_fingerprint = self._fingerprint()

    def remove(self, unwanted: Callable[[Derived], bool]) -> None:
        """Forget derived tensors."""
        self._derived = [derived for derived in self._derived if not unwanted(derived)]
        self._last_fingerprint = self._fingerprint()

    def stale(self) -> bool:
        """Whether a parameter was replaced, or the source of a derived tensor changed, since the last update.

        Compares addresses on the host and, only if there are derived tensors, waits for the device. Raises InputError
        as `weights_changed` does.
        """
        moved = any(slot.address() != address for slot, address in self._addresses)
        return moved or not torch.equal(self._fingerprint(), self._last_fingerprint) or self._layouts.stale()

    @torch.no_grad()
    def refresh(self) -> list[str]:
        """What `weights_changed` does, before each request, without waiting for a GPU: tensors derived there are always
        computed again, since comparing them would wait. Returns the names of parameters that are known to have
        changed."""
        derived_on_gpu = any(derived.data.is_cuda or derived.data.is_meta for derived in self._derived)
        if not derived_on_gpu:
            return self.weights_changed() if self.stale() else []
        changed = self._restore_storage()
        for derived in self._derived:
            derived.data.copy_(derived.compute(derived.read_source()))
        return changed

    @torch.no_grad()
    def weights_changed(self) -> list[str]:
        """Update all prepared tensors in place from the parameters. Returns the names of those that were out of date.

        The values of a replaced parameter are copied into the old storage, which it then shares. Raises InputError for
        one of another shape or dtype, or on another device.
        """
        changed = self._restore_storage()
        for derived in self._derived:
            data = derived.compute(derived.read_source())
            if not torch.equal(derived.data, data):
                derived.data.copy_(data)
                changed.append(derived.name)
        self._last_fingerprint = self._fingerprint()
        for weight in self._layouts.drop_stale():
            address = weight.data_ptr()
            changed += [s.name for s in self._storages if 0 <= address - s.data.data_ptr() < s.data.nbytes]
        return list(dict.fromkeys(changed))

    def _restore_storage(self) -> list[str]:
        """Copy parameters that were replaced into the storage that is read."""
        changed = []
        for storage in self._storages:
            for slot in storage.slots:
                if slot.address() != storage.data.data_ptr():
                    storage.data.copy_(slot.expect(TensorSpec.of(storage.data), storage.name))
                    _move(storage.slots, storage.data)
                    changed.append(storage.name)
        return changed

    def _fingerprint(self) -> Tensor:
        """Of all sources of derived tensors: for each row, the sum of the values' bits as integers."""
        sums = [row_sums(derived.read_source()) for derived in self._derived]
        return torch.cat(sums) if sums else torch.empty(0)


@torch.no_grad()
def prepare(networks: Mapping[str, nn.Module], sharing: Iterable[nn.Module] = ()) -> Prepared:
    """Lay out the weights of networks, by name; layer by layer, so that at most one layer's weights exist twice.

    sharing: modules whose parameters share memory with those of the networks, and keep sharing it. An autoencoder in
    float16 whose activations would overflow (`force_upcast`) is rescaled; modules that shared its weights keep theirs.
    """
    shared: dict[tuple[int, torch.Size], list[ParameterSlot]] = {}
    for module in sharing:
        for _, slot, parameter in _named_parameters(module):
            shared.setdefault((parameter.data_ptr(), parameter.shape), []).append(slot)

    storages: list[Storage] = []
    derived: list[Derived] = []
    blocked: list[Tensor] = []
    for title, network in networks.items():
        slots = {
            name: (slot, *shared.get((parameter.data_ptr(), parameter.shape), ()))
            for name, slot, parameter in _named_parameters(network)
        }
        sources = {name: slots[name][1:] for name in _rescale(network)}
        slots |= {name: slots[name][:1] for name in sources}
        for path, module in network.named_modules():
            for name, data in _layout(module).items():
                _move(slots[_join(path, name)], data)

        parameters = {name: parameter.data for name, _, parameter in _named_parameters(network)}
        storages += [Storage(_join(title, name), data, slots[name]) for name, data in parameters.items()]
        # The other networks run once per request, and would gain less than checking for changes costs.
        if isinstance(network, UNetEncoder):
            blocked += [data for data in parameters.values() if data.device.type == "cpu" and not fast_library(data)]
        for name, adopted in sources.items():
            data = parameters[name]
            derived += [
                Derived(_join(title, name), data, source, TensorSpec.of(data), _rescaled) for source in adopted[:1]
            ]
        for path, module in network.named_modules():
            conv = _enlarging(module)
            if conv is not None and fast_library(conv.weight):
                phases = module.phases = upsample_phases(conv.weight)
                source, spec = ParameterSlot(conv._parameters, "weight"), TensorSpec.of(conv.weight)
                derived.append(Derived(_join(title, path, "phases"), phases, source, spec, upsample_phases))
    return Prepared(storages, derived, Layouts(blocked))


def _enlarging(module: nn.Module) -> Conv | None:
    """The convolution of an image that the module enlarges before it, if it does, by whose `phases` it can."""
    if isinstance(module, EnlargedConv):
        return module
    if isinstance(module, TimedResnet):
        return module.conv1 if module.resize == "up" else None
    return module.conv if isinstance(module, Upsample) else None


def _layout(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a layer that have a special layout, by name, copied into that layout."""
    if isinstance(module, Conv):
        weight = module.weight.data
        filters, channels, *kernel = weight.shape
        if kernel != [1, 1] and fast_library(weight):
            return {"weight": pad_to_eights(channels_last(weight))[:filters, :channels]}
        return {"weight": channels_last(weight)}
    if isinstance(module, Attention):
        return _stacked(module, module.packed)
    if isinstance(module, SelfAttention):
        return _stacked(module, ("q_proj", "k_proj", "v_proj"))
    return {}


def _stacked(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights and biases of projections, as consecutive rows of one tensor each."""
    views: dict[str, Tensor] = {}
    for leaf in ("weight", "bias"):
        parameters = {f"{name}.{leaf}": getattr(module.get_submodule(name), leaf) for name in names}
        if None not in parameters.values():
            rows = [x.shape[0] for x in parameters.values()]
            views |= dict(zip(parameters, stacked([x.data for x in parameters.values()]).split(rows), strict=True))
    return views


def _rescale(network: nn.Module) -> list[str]:
    """Rescale an autoencoder that needs it. Returns the names of the rescaled parameters."""
    if not isinstance(network, AutoencoderKL) or not network.config.force_upcast:
        return []
    return rescale_for_half(network) if next(network.parameters()).dtype == torch.float16 else []


def _rescaled(x: Tensor) -> Tensor:
    return x * 2.0**HALF_EXPONENT


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, ParameterSlot, nn.Parameter]]:
    for path, layer in module.named_modules():
        for leaf, parameter in layer._parameters.items():
            if parameter is not None:
                yield _join(path, leaf), ParameterSlot(layer._parameters, leaf), parameter


def _move(slots: Iterable[ParameterSlot], data: Tensor) -> None:
    for slot in slots:
        parameter = slot.read()
        if parameter is not None:
            parameter.data = data


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
