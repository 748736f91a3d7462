"""What PyTorch says: a model's networks by the names of their spec, which is what is traced and what judges.

ReferenceNetworks       in one dtype, on the CPU, each loaded when it is asked for
ReferenceNetworks.run    one of them, tensors by name in and out
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastldm.export.spec import DType, sample, specs
from fastldm.kernels import use
from fastldm.loading import spec as loading
from fastldm.loading.state import load_module
from fastldm.models.clip import CLIPText
from fastldm.models.unet import AddedConditions, GuidanceSinusoids, Sinusoids, UNet
from fastldm.models.vae import HALF_EXPONENT, AutoencoderKL, TinyAutoencoder, rescale_for_half

Named = Mapping[str, Tensor]


class ReferenceNetworks:
    """The networks of a model for export, on the CPU. dtype: of the weights; a float16 autoencoder is rescaled where
    its activations would leave the range. exact: computed in float32 all the same."""

    def __init__(self, model: loading.Spec, dtype: DType, *, split: bool = False, exact: bool = False) -> None:
        self.specs = specs(model.unet, model.vae, model.text, dtype=dtype, split=split)
        self.dtype, self._model, self._exact = dtype, model, exact
        self._loaded: dict[str, nn.Module] = {}

    @staticmethod
    def part(name: str) -> str:
        """The component of the checkpoint that a network is made of."""
        if name.startswith("text_encoder"):
            return name
        return "vae" if name.startswith("vae") else "unet"

    def module(self, name: str) -> nn.Module:
        """The module that a network is, or is part of."""
        part = self.part(name)
        if part not in self._loaded:  # those of one part come one after the other, so one is held at a time
            self._loaded = {part: self._load(part)}
        return self._loaded[part]

    def _load(self, part: str) -> nn.Module:
        model = self._model
        with torch.device("meta"):
            if part == "unet":
                built: nn.Module = UNet(model.unet)
            elif part == "vae":
                built = loading.autoencoder(model.vae)
            else:
                built = CLIPText(model.text[1 if part.endswith("_2") else 0])
        component = model.checkpoint.components[part]
        dtype = getattr(torch, self.dtype)
        rescaled = dtype == torch.float16 and isinstance(built, AutoencoderKL)
        first = torch.float32 if rescaled or self._exact else dtype
        module = load_module(built, component.state(), dtype=first, source=component.source)
        if rescaled:  # before its weights are rounded, which may leave the range too
            assert isinstance(module, AutoencoderKL)
            rescale_for_half(module, self._exponent(module))
        module = module.to(dtype)
        return module.float() if self._exact else module

    @torch.no_grad()
    def _exponent(self, vae: AutoencoderKL) -> int:
        """The power of two that keeps what an autoencoder in float32 computes a sixteenth below float16's range."""
        with _Largest() as seen, use("torch"):
            for name in ("vae_decoder", "vae_encoder"):
                inputs = sample(self.specs[name], {"height": 128, "width": 128})
                RUN[name](vae, {key: x.float() for key, x in inputs.items()})
        least = HALF_EXPONENT if vae.config.force_upcast else 0
        if not math.isfinite(seen.largest):  # its weights leave the range already: no power of two helps
            return least
        return min(-math.ceil(math.log2(max(1.0, seen.largest * _MARGIN / torch.finfo(torch.float16).max))), least)

    def run(self, name: str, inputs: Named, precision: str | None = None) -> dict[str, Tensor]:
        """What PyTorch says: all inputs of the network's spec to all its outputs. precision: rounded to, see
        `rounding`; outputs to the dtype that the spec has them in too."""
        module = self.module(name)  # loaded outside of that
        mode = contextlib.nullcontext() if precision is None else _rounded(module, precision)
        # Not in a caller's inference mode, where a dispatch mode cannot take views of ordinary weights.
        with use("torch"), torch.inference_mode(False), torch.no_grad(), mode:
            made = RUN[name](module, inputs)
        outputs = self.specs[name].outputs
        if precision is None:
            return {port.name: made[port.name] for port in outputs}
        return {port.name: made[port.name].to(port.torch_dtype).float() for port in outputs}


# ---------------------------------------------------------------------------------------------- what precisions cost

_MARGIN = 16
_SPARE, _LAST = 5, 2
"""Bits of float32's 24 that sums in other orders and transforms of convolutions may cost, and what libraries differ in
where a number is computed of one of each input: at an angle of 1,000, five bits of it are worth a thousandth."""


def rounding(precision: str) -> _Rounding:
    """Within this, what an op of PyTorch makes in float32 is rounded to a precision, and so are the weights that it
    reads: what a computer of that precision with sums in float32 does. Of "float32" itself, the last bits are dropped,
    more where an op sums than where it does not."""
    if precision == "float32":
        return _Rounding(_without(_SPARE), _without(_LAST))
    through = _through(getattr(torch, precision))
    return _Rounding(through, through)


def _without(bits: int) -> Callable[[Tensor], Tensor]:
    """To float32 with so many bits less (Veltkamp's splitting)."""

    def drop(x: Tensor) -> Tensor:
        high = x * (2.0**bits + 1)
        return high - (high - x)

    return drop


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()


@contextlib.contextmanager
def _rounded(module: nn.Module, precision: str) -> Iterator[None]:
    """`rounding`, but for sinusoids: they are float32 in a network of any dtype, for an angle of 1,000 has no digits in
    16 bits. (In bfloat16 alone they are rounded: OpenVINO takes all of a whole U-Net in it.)"""
    mode, hooks = rounding(precision), []

    def begin(*_: Any) -> None:
        mode.paused = True

    def end(_: nn.Module, __: Any, made: Tensor) -> Tensor:
        mode.paused = False
        return mode.pointwise(made)

    for part in module.modules():
        if isinstance(part, Sinusoids | GuidanceSinusoids) and precision != "bfloat16":
            hooks += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Rounding(TorchDispatchMode):
    """rounded: of what ops make that may sum, and of weights. pointwise: of what others make."""

    def __init__(self, rounded: Callable[[Tensor], Tensor], pointwise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounded, self.pointwise, self.paused = rounded, pointwise, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.is_view:  # of what is rounded already, or of weights where they lie: one may reach over several
            made = func(*args, **kwargs)
            return tree_map(self._round, made) if any(map(_is_weight, tree_leaves((args, kwargs)))) else made
        made = func(*tree_map(self._weight, args), **tree_map(self._weight, kwargs))
        rounded = self.pointwise if torch.Tag.pointwise in func.tags else self._rounded
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                x.copy_(rounded(x))
        return made

    def _weight(self, x: Any) -> Any:
        return self._round(x.detach()) if _is_weight(x) else x

    def _round(self, x: Any) -> Any:
        return self._rounded(x) if isinstance(x, Tensor) else x


def _is_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) and x.dtype == torch.float32


class _Largest(TorchDispatchMode):
    """The largest number that any op makes."""

    largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() and not func.is_view:
                self.largest = max(self.largest, float(x.abs().max()))
        return made


# ------------------------------------------------------------------------------- networks by the names of their spec


def _text_encoder(model: CLIPText, inputs: Named) -> dict[str, Tensor]:
    ids, text = inputs["input_ids"], model.text_model
    states = [text.embeddings(ids)]
    for layer in text.encoder.layers:
        states.append(layer(states[-1]))
    last = text.final_layer_norm(states[-1])
    pooled = last[torch.arange(ids.shape[0]), model.ends(ids)]
    made = {"last_hidden_state": last, "pooler_output": pooled}
    if model.text_projection is not None:
        made["text_embeds"] = model.text_projection(pooled)
    made |= {f"hidden_states.{i}": state for i, state in enumerate(states[:-1])}
    return made | {f"clip_skip.{n}": text.final_layer_norm(states[-1 - n]) for n in range(1, len(states) - 1)}


def _added(inputs: Named) -> AddedConditions | None:
    return AddedConditions(inputs["text_embeds"], inputs["time_ids"]) if "time_ids" in inputs else None


def _unet(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    added = _added(inputs)
    out = unet(
        inputs["sample"],
        _one_each(inputs["timestep"], inputs["sample"]),
        inputs["encoder_hidden_states"],
        inputs.get("timestep_cond"),
        None if added is None else vars(added),
    )
    return {"out_sample": out}


def _one_each(timestep: Tensor, sample: Tensor) -> Tensor:
    """timestep (1 or B,) -> (B,). A trace takes two symbolic sizes for unequal, so there it is ONNX's own Expand."""
    if not torch.compiler.is_exporting():
        return timestep.expand(sample.shape[0])
    batch = torch.onnx.ops.symbolic("Shape", [sample], {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,))
    return torch.onnx.ops.symbolic("Expand", [timestep, batch], dtype=timestep.dtype, shape=(sample.shape[0],))


def _text_kv(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    return {f"kv.{i}": kv for i, kv in enumerate(unet.cross_kv(inputs["encoder_hidden_states"]))}


def _time_rows(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    rows = unet.time_rows(inputs["timesteps"], added=_added(inputs), guidance=inputs.get("guidance"))
    return {"temb_rows": rows}


def _unet_step(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    kv = [tensor for name, tensor in inputs.items() if name.startswith("kv.")]
    return {"out_sample": unet.step(inputs["sample"], inputs["temb_row"], kv)}


def _vae_decoder(vae: AutoencoderKL | TinyAutoencoder, inputs: Named) -> dict[str, Tensor]:
    return {"sample": vae.decode(inputs["latent_sample"])}


def _vae_encoder(vae: AutoencoderKL | TinyAutoencoder, inputs: Named) -> dict[str, Tensor]:
    encoded = vae.encode(inputs["sample"])
    if isinstance(vae, TinyAutoencoder):
        return {"latent_sample": encoded}
    return {"latent_sample": encoded[:, : vae.config.latent_channels], "latent_parameters": encoded}


RUN: dict[str, Callable[..., dict[str, Tensor]]] = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder,
    "unet": _unet,
    "text_kv": _text_kv,
    "time_rows": _time_rows,
    "unet_step": _unet_step,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}
