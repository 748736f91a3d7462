"""A model's networks in PyTorch, by the names of their spec: they are traced, and exports are compared with them.

ReferenceNetworks       in one dtype, on the CPU, each loaded on first use
ReferenceNetworks.run   run one of them, with tensors by name as inputs and outputs
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastldm.adapters.packing import DOWN, SCALE, UP, Layout, layouts, products
from fastldm.export.graphs import STEPS, graph_specs, reference_steps
from fastldm.export.spec import Control, DType, named_controls, sample, specs
from fastldm.kernels import use
from fastldm.kernels.lora import Places
from fastldm.loading import spec as loading
from fastldm.loading.state import load_module
from fastldm.models.clip import CLIPText
from fastldm.models.clip_vision import CLIPVision, Normalizer
from fastldm.models.controlnet import ControlNet
from fastldm.models.embeddings import Fourier, GuidanceSinusoids, Sinusoids
from fastldm.models.families import IMAGE_ENCODER, IMAGE_NORMALIZER, PRIOR, PRIOR_TEXT_ENCODER, encoder_names
from fastldm.models.layers import Adaptable, Beside, LowRank
from fastldm.models.prior import Prior
from fastldm.models.t2i_adapter import T2IAdapter
from fastldm.models.t5 import T5Text
from fastldm.models.text_encoders import text_encoder
from fastldm.models.unet import AddedConditions, Features, Residuals, UNet
from fastldm.models.vae import HALF_EXPONENT, AutoencoderKL, TinyAutoencoder, rescale_for_half

Named = Mapping[str, Tensor]


class ReferenceNetworks:
    """The networks of a model for export, on the CPU.

    dtype: of the weights; a float16 autoencoder is rescaled if its activations would overflow. exact: compute in
        float32 with the weights of that dtype.
    """

    def __init__(
        self,
        model: loading.Spec,
        dtype: DType,
        *,
        split: bool = False,
        adapter_rank: int = 0,
        controls: Sequence[Control] = (),
        control_networks: Sequence[nn.Module] = (),
        whole_picture: bool = False,
        exact: bool = False,
    ) -> None:
        """split, adapter_rank and controls: as of `specs`. control_networks: of those controls, in float32; networks of
        those that are not given cannot be run. whole_picture: whether there are `export.graphs` too, of which the steps
        can be run."""
        options: dict[str, Any] = {"split": split, "adapter_rank": adapter_rank, "controls": controls}
        self.specs = specs(
            model.unet, model.vae, model.text, dtype=dtype, vision=model.vision, prior=model.prior, **options
        )
        self._controls = dict(zip(named_controls(controls), control_networks, strict=False))
        self.layouts = layouts(model.unet, model.text, adapter_rank) if adapter_rank else {}
        self.graphs = graph_specs(self.specs, dtype, edits=model.unet.edits) if whole_picture else {}
        self.dtype, self._model, self._exact = dtype, model, exact
        self._loaded: dict[str, nn.Module] = {}

    def module(self, name: str) -> nn.Module:
        """The module that a network is, or is a part of."""
        key = component(name)
        if key not in self._loaded:  # only one is held: networks of one component are exported in sequence
            self._loaded = {key: self._load(key)}
        return self._loaded[key]

    def release(self) -> None:
        """Let go of the module that is held, and of its weights, which are no other module's, whoever still has it, as
        the exporter has what it traced last: the next call loads it once more."""
        for module in self._loaded.values():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.new_empty(0)
        self._loaded = {}

    def has(self, name: str) -> bool:
        """Whether a network can be run."""
        return not _OF_CONTROL.fullmatch(name) or component(name) in self._controls

    def _load(self, name: str) -> nn.Module:
        model = self._model
        if name in self._controls:
            network = copy.deepcopy(self._controls[name]).to("cpu", getattr(torch, self.dtype))
            return network.float() if self._exact else network
        with torch.device("meta"):
            if name == "unet":
                built: nn.Module = UNet(model.unet)
            elif name == "vae":
                built = loading.autoencoder(model.vae)
            elif name == IMAGE_ENCODER and model.vision is not None:
                built = CLIPVision(model.vision)
            elif name == IMAGE_NORMALIZER:
                built = Normalizer((model.unet.class_input_dim or 0) // 2)
            elif name == PRIOR and model.prior is not None:
                built = Prior(model.prior.model)
            elif name == PRIOR_TEXT_ENCODER and model.prior is not None and model.prior.text is not None:
                built = CLIPText(model.prior.text)
            else:
                built = text_encoder(dict(zip(encoder_names(model.text), model.text, strict=True))[name])
        part = model.checkpoint.components[name]
        dtype = getattr(torch, self.dtype)
        rescaled = dtype == torch.float16 and isinstance(built, AutoencoderKL)
        first = torch.float32 if rescaled or self._exact else dtype
        module = load_module(built, part.state(), dtype=first, source=part.source)
        if rescaled:  # before rounding its weights, which may overflow too
            assert isinstance(module, AutoencoderKL)
            rescale_for_half(module, self._exponent(module))
        module = module.to(dtype)
        return module.float() if self._exact else module

    @torch.no_grad()
    def _exponent(self, vae: AutoencoderKL) -> int:
        """The power of two that keeps the activations of a float32 autoencoder below a sixteenth of float16's range."""
        with _LargestActivation() as recorder, use("torch"):
            for name in ("vae_decoder", "vae_encoder"):
                inputs = sample(self.specs[name], {"height": 128, "width": 128})
                RUN[name](vae, {key: x.float() for key, x in inputs.items()})
        least = HALF_EXPONENT if vae.config.force_upcast else 0
        if not math.isfinite(recorder.largest):  # its weights overflow already: no power of two helps
            return least
        return min(-math.ceil(math.log2(max(1.0, recorder.largest * _MARGIN / torch.finfo(torch.float16).max))), least)

    def run(self, name: str, inputs: Named, precision: str | None = None) -> dict[str, Tensor]:
        """Run a network: all inputs of its spec to all its outputs.

        precision: round all results to it, see `rounding`, and outputs also to their dtype in the spec.
        """
        if name == STEPS:

            def step(step_inputs: Named) -> Tensor:
                sample = step_inputs["sample"].to(getattr(torch, self.dtype)).float()
                return self.run("unet_step", {**step_inputs, "sample": sample}, precision)["out_sample"]

            return reference_steps(step, inputs)
        module = self.module(name)  # loaded outside of the modes below
        mode = contextlib.nullcontext() if precision is None else _rounded(module, precision)
        # Outside a caller's inference mode, in which dispatch modes cannot create views of normal weights.
        with use("torch"), torch.inference_mode(False), torch.no_grad(), mode:
            results = self.evaluate(name, inputs)
        outputs = self.specs[name].outputs
        if precision is None:
            return {port.name: results[port.name] for port in outputs}
        return {port.name: results[port.name].to(port.torch_dtype).float() for port in outputs}

    def evaluate(self, name: str, inputs: Named) -> dict[str, Tensor]:
        """A network's module on its inputs, as it is traced."""
        module = self.module(name)
        with _adapted(module, self.layouts.get(name, ()), inputs):
            return runner(name)(module, {key: x for key, x in inputs.items() if key not in (DOWN, UP, SCALE)})


@contextlib.contextmanager
def _adapted(module: nn.Module, layout: Layout, inputs: Named) -> Iterator[None]:
    """Inside, the layers of a network have the factors that are among its inputs beside their weights."""
    beside, layers, groups = Beside(), [], [*products(layout)]
    if groups:
        # One Split each: hundreds of Slices of one tensor take the graph's optimizer minutes.
        downs = inputs[DOWN].split([group[-1].down_end - group[0].down for group in groups])
        ups = inputs[UP].split([group[-1].up_end - group[0].up for group in groups])
        for group, down, up in zip(groups, downs, ups, strict=True):
            rank, rest = group[0].rank, group[0].down_shape[1:]
            down = down.view(*(() if len(rest) > 1 else (len(group),)), rank, *rest)
            low_rank = LowRank(down, up.view(-1, rank), beside)
            layers += [(module.get_submodule(own.target.module), low_rank) for own in group]
    try:
        for layer, low_rank in layers:
            assert isinstance(layer, Adaptable)
            layer.low_rank = low_rank
        with beside.having(Places(inputs.get(SCALE)) if layers else None):
            yield
    finally:
        for layer, _ in layers:
            del layer.low_rank


# ---------------------------------------------------------------------------------------------- errors of precisions

_MARGIN = 16
_SPARE, _LAST = 5, 2
"""Of float32's 24 bits, those that other orders of summation and convolution algorithms may change, and those in which
libraries differ for pointwise ops: at an angle of 1,000, five bits are a thousandth."""
_PIECE = 1 << 18  # numbers: 1 MiB


def rounding(precision: str) -> _Rounding:
    """A mode in which float32 results and weights of all PyTorch ops are rounded to a precision, as in hardware of that
    precision with float32 accumulation. For "float32", the last bits are dropped, more for ops that sum than for
    pointwise ops."""
    if precision == "float32":
        return _Rounding(_without(_SPARE), _without(_LAST))
    through = _through(getattr(torch, precision))
    return _Rounding(through, through)


def _without(bits: int) -> Callable[[Tensor], Tensor]:
    """Rounds float32 to fewer bits (Veltkamp's splitting)."""

    def drop(x: Tensor) -> Tensor:
        high = x * (2.0**bits + 1)
        return high - (high - x)

    return drop


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()


@contextlib.contextmanager
def _rounded(module: nn.Module, precision: str) -> Iterator[None]:
    """`rounding`, except for sinusoids, which are float32 in networks of any dtype: an angle of 1,000 has no fractional
    digits in 16 bits. (Only in bfloat16 they are rounded, since OpenVINO computes all of a U-Net in it.)"""
    mode, hooks = rounding(precision), []

    def begin(*_: Any) -> None:
        mode.paused = True

    def end(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        mode.paused = False
        return mode.pointwise(output)

    for layer in module.modules():
        if isinstance(layer, Sinusoids | GuidanceSinusoids | Fourier) and precision != "bfloat16":
            hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


_SELECTING = (torch.ops.aten.masked_fill, torch.ops.aten.where, torch.ops.aten.scalar_tensor)
"""Ops that compute nothing: masks of attention, whose numbers are at the end of float32's range, are made of them."""


class _Rounding(TorchDispatchMode):
    """Rounds results of pointwise ops by `pointwise`, those of other ops, and weights, by `rounded`."""

    def __init__(self, rounded: Callable[[Tensor], Tensor], pointwise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounded, self.pointwise, self.paused = rounded, pointwise, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.is_view:  # of rounded tensors, or of weights: a view may span several weights in one storage
            view = func(*args, **kwargs)
            return tree_map(self._round, view) if any(map(_is_weight, tree_leaves((args, kwargs)))) else view
        out = func(*tree_map(self._weight, args), **tree_map(self._weight, kwargs))
        if func.overloadpacket in _SELECTING:
            return out
        rounded = self.pointwise if torch.Tag.pointwise in func.tags else self._rounded
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                _apply(rounded, x)
        return out

    def _weight(self, x: Any) -> Any:
        return self._round(x.detach()) if _is_weight(x) else x

    def _round(self, x: Any) -> Any:
        return _apply(self._rounded, x.clone()) if isinstance(x, Tensor) else x


def _apply(rounded: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Round x in place, in pieces of its memory: what is computed on the way stays in the processor's cache, where as
    large as x it would be new memory, which the system clears first."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    whole = x.as_strided((x.numel(),), (1,)) if channels_last or x.is_contiguous() else x
    for piece in whole.split(_PIECE) if whole.ndim == 1 else (whole,):
        piece.copy_(rounded(piece))
    return x


def _is_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) and x.dtype == torch.float32


class _LargestActivation(TorchDispatchMode):
    """Records the largest magnitude of any result of an op."""

    largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() and not func.is_view:
                self.largest = max(self.largest, float(x.abs().max()))
        return out


# ------------------------------------------------------------------------------- networks by the names of their spec


def _text_encoder(model: CLIPText | T5Text, inputs: Named) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    if isinstance(model, T5Text):
        return {"last_hidden_state": model(ids)[0]}
    text = model.text_model
    states = [text.embeddings(ids)]
    for layer in text.encoder.layers:
        states.append(layer(states[-1]))
    last = text.final_layer_norm(states[-1])
    pooled = last[torch.arange(ids.shape[0]), model.ends(ids)]
    outputs = {"last_hidden_state": last, "pooler_output": pooled}
    if model.text_projection is not None:
        outputs["text_embeds"] = model.text_projection(pooled)
    outputs |= {f"hidden_states.{i}": state for i, state in enumerate(states)}
    return outputs | {f"clip_skip.{n}": text.final_layer_norm(states[-1 - n]) for n in range(1, len(states) - 1)}


def _image_encoder(model: CLIPVision, inputs: Named) -> dict[str, Tensor]:
    return {"image_embeds": model(inputs["pixel_values"])}


def _image_normalizer(model: Normalizer, inputs: Named) -> dict[str, Tensor]:
    embeds = inputs["image_embeds"]
    labels = model(embeds, inputs["noise"], inputs["rates"], inputs["noise_level"])
    return {"class_labels": labels.to(embeds.dtype)}


def _prior_kv(prior: Prior, inputs: Named) -> dict[str, Tensor]:
    kv = prior.cross_kv(inputs["encoder_hidden_states"], inputs["proj_embedding"], inputs["text_len"])
    return {f"kv.{i}": each for i, each in enumerate(kv)}


def _prior_step(prior: Prior, inputs: Named) -> dict[str, Tensor]:
    kv, kv_len = _numbered(inputs, "kv"), inputs["kv_len"]
    rows = prior.time_rows(inputs["timestep"], kv, kv_len=kv_len)
    return {"predicted_image_embedding": prior.step(inputs["hidden_states"], rows, kv, kv_len=kv_len)}


def _prior_vectors(prior: Prior, inputs: Named) -> dict[str, Tensor]:
    return {"image_embeds": prior.post_process_latents(inputs["prior_latents"])}


def _added(inputs: Named) -> AddedConditions | None:
    return AddedConditions(inputs["text_embeds"], inputs["time_ids"]) if "time_ids" in inputs else None


def _unet(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    added = _added(inputs)
    given = {} if added is None else vars(added)
    given |= {"image_embeds": inputs["image_embeds"]} if "image_embeds" in inputs else {}
    out = unet(
        inputs["sample"],
        _per_row(inputs["timestep"], inputs["sample"]),
        inputs.get("encoder_hidden_states"),
        inputs.get("timestep_cond"),
        given,
        inputs.get("class_labels"),
    )
    return {"out_sample": out}


def _per_row(timestep: Tensor, sample: Tensor) -> Tensor:
    """timestep (1 or B,) -> (B,). While tracing, ONNX's Expand, since a trace treats two symbolic sizes as unequal."""
    if not torch.compiler.is_exporting():
        return timestep.expand(sample.shape[0])
    batch = torch.onnx.ops.symbolic("Shape", [sample], {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,))
    return torch.onnx.ops.symbolic("Expand", [timestep, batch], dtype=timestep.dtype, shape=(sample.shape[0],))


def _text_kv(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    (text,) = inputs.values()
    return {f"kv.{i}": kv for i, kv in enumerate(unet.cross_kv(text))}


def _text_time(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    return {"text_embedding": unet.text_embedding(inputs["encoder_hidden_states"])}


def _time_rows(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    conditions = {name: x for name, x in inputs.items() if name not in ("timesteps", "text_embeds", "time_ids")}
    return {"temb_rows": unet.time_rows(inputs["timesteps"], added=_added(inputs), **conditions)}


def _unet_step(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    kv, added, levels = (_numbered(inputs, name) for name in ("kv", "residual", "feature"))
    options: dict[str, Any] = {"residuals": [Residuals((*added[:-1],), added[-1], first=None)]} if added else {}
    options |= {"features": [Features((*levels,), None)]} if levels else {}
    return {"out_sample": unet.step(inputs["sample"], inputs["temb_row"], kv, **options)}


def _numbered(inputs: Named, name: str) -> list[Tensor]:
    """Those that are called `name` and a number."""
    return [tensor for key, tensor in inputs.items() if key.startswith(f"{name}.")]


def _hint(network: ControlNet, inputs: Named) -> dict[str, Tensor]:
    return {"hint": network.hint(inputs["image"])}


def _control_rows(network: ControlNet, inputs: Named) -> dict[str, Tensor]:
    return {"temb_rows": network.time_rows(inputs["timesteps"], added=_added(inputs))}


def _control_step(network: ControlNet, inputs: Named) -> dict[str, Tensor]:
    kv = _numbered(inputs, "kv")
    skips, mid, *_ = network.step(inputs["sample"], inputs["temb_row"], kv, inputs["hint"])
    return {f"residual.{k}": residual for k, residual in enumerate((*skips, mid))}


def _t2i_adapter(network: T2IAdapter, inputs: Named) -> dict[str, Tensor]:
    return {f"feature.{k}": level for k, level in enumerate(network(inputs["image"]))}


def _vae_decoder(vae: AutoencoderKL | TinyAutoencoder, inputs: Named) -> dict[str, Tensor]:
    return {"sample": vae.decode(inputs["latent_sample"])}


def _vae_encoder(vae: AutoencoderKL | TinyAutoencoder, inputs: Named) -> dict[str, Tensor]:
    encoded = vae.encode(inputs["sample"])
    if not vae.config.moments:
        return {"latent_sample": encoded}
    return {"latent_sample": encoded[:, : vae.config.latent_channels], "latent_parameters": encoded}


RUN: dict[str, Callable[..., dict[str, Tensor]]] = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder,
    PRIOR_TEXT_ENCODER: _text_encoder,
    "prior_kv": _prior_kv,
    "prior_step": _prior_step,
    "prior_vectors": _prior_vectors,
    IMAGE_ENCODER: _image_encoder,
    IMAGE_NORMALIZER: _image_normalizer,
    "unet": _unet,
    "text_kv": _text_kv,
    "text_time": _text_time,
    "time_rows": _time_rows,
    "unet_step": _unet_step,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}
_RUN_CONTROL: dict[str, Callable[..., dict[str, Tensor]]] = {
    "hint": _hint,
    "text_kv": _text_kv,
    "time_rows": _control_rows,
    "step": _control_step,
}
_OF_CONTROL = re.compile(r"(controlnet_[1-9]\d?)_(hint|text_kv|time_rows|step)|(t2i_adapter_[1-9]\d?)")


def component(name: str) -> str:
    """The checkpoint component of a network, or its control."""
    if name.startswith("text_encoder") or name in (IMAGE_ENCODER, IMAGE_NORMALIZER, PRIOR_TEXT_ENCODER):
        return name
    if name.startswith("prior_"):
        return PRIOR
    if match := _OF_CONTROL.fullmatch(name):
        return match[1] or match[3]
    return "vae" if name.startswith("vae") else "unet"


def is_network(name: str) -> bool:
    """Whether a bundle may have a network of this name."""
    return name in RUN or _OF_CONTROL.fullmatch(name) is not None


def runner(name: str) -> Callable[..., dict[str, Tensor]]:
    """What runs a network: its module and all inputs of its spec to its outputs."""
    match = _OF_CONTROL.fullmatch(name)
    if match is None:
        return RUN[name]
    return _t2i_adapter if match[3] else _RUN_CONTROL[match[2]]
