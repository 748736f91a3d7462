"""Dry runs of a model on tensors without storage: its launches, costs and memory, before a weight is read.

The networks are built on the meta device and run there as a request would run them. Context managers observe the run:
`kernels.dispatch.observe` each op with its shapes, `kernels.dispatch.targeting` each kernel, for a given device, and
`allocator.record` the memory.

The functions from `conditions` to `text` build the inputs and return the run, a function without arguments. height and
width are those of the latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastldm import image as images
from fastldm.adapters.selection import Parameter
from fastldm.kernels.dispatch import Cost, Op, Target, device_type, observe, targeting
from fastldm.loading.prepare import prepare
from fastldm.loading.spec import autoencoder
from fastldm.models.clip_vision import CLIPVision, VisionConfig
from fastldm.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fastldm.models.controlnet import ControlNet, ControlNetConfig
from fastldm.models.glide import GlideConfig
from fastldm.models.ip_adapter import IPAdapter, IPAdapterConfig
from fastldm.models.latents import unscaled
from fastldm.models.layers import Linear, Pointwise
from fastldm.models.prior import Prior, PriorConfig
from fastldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from fastldm.models.t5 import T5_WINDOW, T5Config
from fastldm.models.text_encoders import text_encoder
from fastldm.models.text_projection import TextProjection, TextProjectionConfig
from fastldm.models.unet import AddedConditions, Features, UNet
from fastldm.models.vae import TILE, Decode, decode_pieces, finish
from fastldm.runtime.pages import Pages
from fastldm.runtime.prior import ROWS_AT_ONCE
from fastldm.runtime.slots import FEATURES, Slots, StaticBuffers

ControlConfig = ControlNetConfig | T2IAdapterConfig
OnceConfig = PriorConfig | TextProjectionConfig
Config = UNetConfig | AutoencoderConfig | TextConfig | VisionConfig | ControlConfig | IPAdapterConfig | OnceConfig
DryRun = Callable[[], object]


def network(config: Config, dtype: torch.dtype) -> nn.Module:
    """The network for a config, without weights, prepared as for the target device of the meta device."""
    return _network(config, dtype, device_type(_empty()))


@functools.lru_cache(maxsize=16)
def _network(config: Config, dtype: torch.dtype, device: str) -> nn.Module:
    text: dict[type, Callable[[Any], nn.Module]] = dict.fromkeys((TextConfig, T5Config, GlideConfig), text_encoder)
    controls = {ControlNetConfig: ControlNet, T2IAdapterConfig: T2IAdapter, IPAdapterConfig: IPAdapter}
    once = {PriorConfig: Prior, TextProjectionConfig: TextProjection}
    classes = {UNetConfig: UNet, VisionConfig: CLIPVision, **once, **text, **controls}
    build: Callable[[Any], nn.Module] = classes.get(type(config), autoencoder)
    with torch.device("meta"):
        module = build(config).to(dtype)
        prepare({"": module})
    return module


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def conditions(config: UNetConfig, *, steps: int, rows: int, tokens: int, dtype: torch.dtype) -> DryRun:
    """The tensors that are computed once for `rows` U-Net rows: time rows of all steps, keys and values of the texts.

    tokens: of a text, a multiple of the window if it takes several.
    """
    times = time_rows(config, count=steps * rows if config.needs_rows else steps, dtype=dtype)
    texts = cross_kv(config, rows=rows, tokens=tokens, dtype=dtype)
    return lambda: (times(), texts())


def time_rows(config: UNetConfig, *, count: int, dtype: torch.dtype) -> DryRun:
    """The time rows, which resnets read, of `count` times and conditions."""
    unet: UNet = network(config, dtype)  # type: ignore[assignment]
    added = _added(config, count, dtype)
    guidance = _empty(count) if config.needs_guidance else None
    more: dict[str, Any] = {}
    if config.enlarges_latents:
        more["timestep_cond"] = _empty(count, config.time_cond_proj_dim or 0, dtype=dtype)
    if config.pools_text:
        more["encoder_hidden_states"] = _empty(1, T5_WINDOW, config.text_width, dtype=dtype)
    if config.reads_image_embeds:
        more["image_embeds"] = _empty(count, config.encoder_hid_dim or 0, dtype=dtype)
    labels = _empty(count) if config.needs_class else None
    if config.class_input_dim is not None or config.adds_pooled:
        labels = _empty(count, config.class_input_dim or config.pooled_width, dtype=dtype)
    elif config.needs_projection:
        labels = _empty(count, config.time_embedding_dim, dtype=dtype)

    def run() -> object:
        with torch.device("meta"):  # the network computes LCM's guidance embedding on the default device
            return unet.time_rows(_empty(count), added=added, guidance=guidance, class_labels=labels, **more)

    return torch.no_grad()(run)


def _added(config: UNetConfig, count: int, dtype: torch.dtype) -> AddedConditions | None:
    """What SDXL's time embedding reads besides times, `count` of them."""
    if not config.needs_added:
        return None
    return AddedConditions(_empty(count, config.pooled_width, dtype=dtype), _empty(count, config.added_ids))


def cross_kv(config: UNetConfig, *, rows: int, tokens: int, dtype: torch.dtype) -> DryRun:
    """Keys and values of `rows` texts."""
    unet: UNet = network(config, dtype)  # type: ignore[assignment]
    shape = (rows, config.text_width) if config.reads_image_embeds else (rows, tokens, config.text_width)
    text = _empty(*shape, dtype=dtype)
    return torch.no_grad()(lambda: unet.cross_kv(text))


def control(config: ControlConfig, *, height: int, width: int, batch: int, dtype: torch.dtype) -> DryRun:
    """The embedding of pictures for a ControlNet, or a T2I-Adapter's features. height and width are the pictures'."""
    module: Any = network(config, dtype)
    pictures = _empty(batch, config.image_channels, height, width, dtype=dtype)
    return torch.no_grad()(functools.partial(module.hint if isinstance(module, ControlNet) else module, pictures))


def control_conditions(config: ControlConfig, *, rows: int, tokens: int, dtype: torch.dtype) -> DryRun:
    """A ControlNet's time rows, and keys and values of the texts, for `rows` U-Net rows; a T2I-Adapter has none."""
    module: Any = network(config, dtype)
    if not isinstance(config, ControlNetConfig):
        return lambda: None
    unet = config.unet
    count = rows if unet.needs_added else 1
    text = _empty(rows, tokens, unet.cross_attention_dim, dtype=dtype)

    def run() -> object:
        times = module.time_rows(_empty(count), added=_added(unet, count, dtype))
        return times, module.cross_kv(text) if config.cross_widths else ()

    return torch.no_grad()(run)


def step(
    config: UNetConfig,
    *,
    height: int,
    width: int,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    controls: Sequence[ControlConfig] = (),
    lora: bool = False,
    reuse: bool = False,
    rare: bool = False,
    perturbed: Sequence[int] = (),
    averages: bool = False,
) -> DryRun:
    """One step of `rows` U-Net rows: on a GPU all calls of its graph, on a CPU the networks. controls: what acts on all
    rows. lora: with adapters beside all linear layers, on a GPU. reuse: where deep features are kept, which all rows
    compute. rare: as for `kernels.step.end_step`. perturbed: places of self-attentions that are in a row. averages:
    with projected guidance that has momentum."""
    unet: UNet = network(config, dtype)  # type: ignore[assignment]
    nets: list[Any] = [network(each, dtype) for each in controls if isinstance(each, ControlNetConfig)]
    adapted = len(nets) < len(controls)
    shape: dict[str, Any] = {"height": height, "width": width, "tokens": tokens, "dtype": dtype, "device": "meta"}
    shape |= {"controls": nets, "features": adapted, "reuse": reuse, "averages": averages}
    buffers = StaticBuffers.empty(config, slots=rows, rows=rows, steps=1, **shape)
    if device_type(buffers.temb) != "cpu":
        indices = [*([FEATURES] if adapted else []), *range(len(nets))]
        controlled = tuple((index, ((0, rows),)) for index in indices)
        deep = rows if reuse else None
        guided: dict[str, Any] = {"perturbed": perturbed, "projections": averages, "averages": averages}
        body = functools.partial(Slots(unet, buffers).body, rows, True, controlled, lora, deep, rare, **guided)
        return torch.no_grad()(functools.partial(_with_pages, unet, body) if lora else body)
    model_input = buffers.step.u

    def states(temb: Tensor, text: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return temb[:rows, 0], tuple(kv[:rows] for kv in text)

    def run() -> object:
        residuals = []
        for own in buffers.controls:
            latents = model_input[:, : own.network.config.unet.in_channels]
            output = own.network.step(latents, *states(own.temb, own.text), own.hint)
            residuals.append(output._replace(weights=own.weights.T))
        options: dict[str, Any] = {"features": [Features(buffers.features)] if adapted else []}
        if perturbed:
            options["perturbed"] = {layer: _empty(rows, dtype=torch.bool) for layer in perturbed}
        return unet.step(model_input, *states(buffers.temb, buffers.text), residuals=residuals, **options)

    return torch.no_grad()(run)


def _in_step(config: UNetConfig, path: str) -> bool:
    return Parameter.of("unet", path, "weight", config).part == "step"


def _with_pages(unet: UNet, run: DryRun) -> None:
    pages = Pages(unet, fixed=2)
    for path, layer in unet.named_modules():
        if isinstance(layer, Linear | Pointwise) and _in_step(unet.config, path):
            pages.add(path)
    try:
        run()
    finally:
        pages.close()


def prior(config: PriorConfig, *, rows: int, steps: int, dtype: torch.dtype) -> DryRun:
    """What a prior computes of `rows` texts and the times of so many steps, and one of these."""
    model: Prior = network(config, dtype)  # type: ignore[assignment]
    shape: dict[str, Any] = {"height": 1, "width": config.text_dim, "tokens": config.tokens + 1, "device": "meta"}
    buffers = StaticBuffers.empty(config, slots=rows, rows=rows, steps=1, dtype=dtype, **shape)
    text, vectors = (rows, config.tokens, config.text_dim), (rows, config.vector_dim)
    count = min(ROWS_AT_ONCE, rows * steps)
    lengths, slots = _empty(rows, dtype=torch.int32), _empty(count, dtype=torch.int32)

    def run() -> None:
        kv = model.cross_kv(_empty(*text, dtype=dtype), _empty(*vectors, dtype=dtype), lengths)
        temb = model.time_rows(_empty(count), kv, kv_len=lengths, slots=slots)
        if device_type(temb) != "cpu":
            Slots(model, buffers).body(rows, False)
        else:
            model.step(buffers.step.u, _empty(rows, config.time_channels, dtype=dtype), kv, kv_len=lengths)

    return torch.no_grad()(run)


def decode(
    config: AutoencoderConfig,
    *,
    height: int,
    width: int,
    batch: int,
    dtype: torch.dtype,
    mode: Decode = "whole",
    repainted: bool = False,
) -> DryRun:
    """Latents to the bytes of images. repainted: by an asymmetric decoder, which reads picture and mask too."""
    vae: Any = network(config, dtype)
    latents = _empty(batch, config.latent_channels, height, width)
    side = {"height": height * config.factor, "width": width * config.factor}
    picture, mask = (_empty(1, channels, *side.values(), dtype=dtype) for channels in (config.out_channels, 1))

    def run() -> None:
        z = unscaled(config, latents).to(dtype)
        tiles = -(-max(height, width) // TILE)
        if repainted:
            decoded = torch.cat([finish(vae.decode_repainted(part, picture, mask)) for part in z.split(1)])
        else:
            decoded = _first_tiles(vae, z) if mode == "tiled" and tiles > 4 else finish(decode_pieces(vae, z, mode))
        decoded.isfinite().all()
        images.to_pixels(decoded, "pil")

    return torch.no_grad()(run)


def gradient(
    unet_config: UNetConfig,
    vae_config: AutoencoderConfig,
    *,
    height: int,
    width: int,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
) -> DryRun:
    """CLIP guidance of so many images, but for the image encoder: the prompts' rows through the U-Net, the denoised
    latents through the decoder, and back."""
    unet: UNet = network(unet_config, dtype)  # type: ignore[assignment]
    vae: Any = network(vae_config, dtype)
    temb = _empty(batch, unet_config.time_channels, dtype=dtype)
    text = tuple(_empty(batch, tokens, 2 * channels, dtype=dtype) for channels in unet_config.cross_widths)

    def run() -> None:
        latents = _empty(batch, unet_config.in_channels, height, width).requires_grad_()
        denoised = unet.step(latents.to(dtype), temb, text)[:, : vae_config.latent_channels].float()
        pictures = vae.decode(unscaled(vae_config, denoised).to(dtype)).float()
        torch.autograd.grad(pictures.sum(), latents)

    return torch.enable_grad()(run)


def _first_tiles(vae: Any, z: Tensor) -> Tensor:
    """The peak of a tiled decode, without a thousand tiles of equal size: the first tiles of the last image, beside the
    decoded rest, and the end.
    """
    config = vae.config
    shape = (config.out_channels, z.shape[2] * config.factor, z.shape[3] * config.factor)
    rest = z.new_empty((z.shape[0] - 1, *shape))
    layers = len(vae.low()) + 3 * len(vae.high())  # statistics, then two tiles
    pieces = decode_pieces(vae, z[:1], "tiled")
    for _ in range(layers):
        next(pieces)
    pieces.close()
    last = z.new_empty((1, *shape), dtype=torch.float32).to(z.dtype)
    return torch.cat([rest, last])


def encode(config: AutoencoderConfig, *, height: int, width: int, batch: int, dtype: torch.dtype) -> DryRun:
    """Images to latents."""
    factor = config.factor
    pixels = _empty(batch, config.in_channels, height * factor, width * factor)
    vae: Any = network(config, dtype)
    return torch.no_grad()(lambda: vae.encode(pixels.to(dtype)).float())


def text(configs: Sequence[TextConfig | VisionConfig], *, batch: int, dtype: torch.dtype) -> DryRun:
    """One window of text, or a picture, for each of `batch` prompts, through all encoders."""
    encoders = [network(config, dtype) for config in configs]
    inputs = [_input(config, batch) for config in configs]
    return torch.no_grad()(lambda: [encoder(x) for encoder, x in zip(encoders, inputs, strict=True)])


def _input(config: TextConfig | VisionConfig, batch: int) -> Tensor:
    if isinstance(config, TextConfig):
        return torch.empty(batch, config.max_position, dtype=torch.long, device="meta")
    return _empty(batch, 3, config.image_size, config.image_size)


# ---------------------------------------------------------------------------------------------- runs to observe


def run_unet(
    config: UNetConfig,
    *,
    height: int,
    width: int,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    controls: Sequence[ControlConfig] = (),
    **options: Any,
) -> None:
    """All of one step for `rows` U-Net rows (2 for a guided image), and its conditions. controls and options as of
    `step`."""
    text: dict[str, Any] = {"rows": rows, "tokens": tokens, "dtype": dtype}
    conditions(config, steps=1, **text)()
    for each in controls:
        control_conditions(each, **text)()
    step(config, height=height, width=width, **text, controls=controls, **options)()


def run_decoder(config: AutoencoderConfig, *, height: int, width: int, batch: int, dtype: torch.dtype) -> None:
    """Latents to images."""
    decode(config, height=height, width=width, batch=batch, dtype=dtype)()


def run_encoder(config: AutoencoderConfig, *, height: int, width: int, batch: int, dtype: torch.dtype) -> None:
    """Images to latents."""
    encode(config, height=height, width=width, batch=batch, dtype=dtype)()


def run_text(configs: Sequence[TextConfig | VisionConfig], *, batch: int, dtype: torch.dtype) -> None:
    """One window of text for each of `batch` prompts, through all encoders."""
    text(configs, batch=batch, dtype=dtype)()


def run_projection(config: TextProjectionConfig, *, rows: int, tokens: int, dtype: torch.dtype) -> None:
    """The text projection of unCLIP's decoder, of so many texts, with tokens that it makes of vectors among theirs."""
    module, width = network(config, dtype), config.vector_dim
    vectors, states = _empty(rows, width, dtype=dtype), _empty(rows, tokens - config.tokens, width, dtype=dtype)
    torch.no_grad()(module)(vectors, vectors, states)


# -------------------------------------------------------------------------------------------------------- costs


def count(make: Callable[[], DryRun]) -> dict[str, Cost]:
    """The costs of a run's ops on a CPU, by name; the ops that an op calls count as its own. Under "enlarging": the
    additional operations of a convolution of the enlarged image, by which the literature counts.
    """
    costs: dict[str, Cost] = {}
    parents: list[str] = []

    def add(name: str, flop: int, moved: int) -> None:
        previous = costs.get(name, Cost(0, 0))
        costs[name] = Cost(previous.flop + flop, previous.bytes + moved)

    def watch(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        if not parents:
            cost = op.cost(*args, **kwargs)
            add(op.name, cost.flop, cost.bytes)
            if op.name == "upsample_conv2d":
                x, weight, _, height, width = args[:5]
                add("enlarging", 2 * x.shape[0] * height * width * weight.numel() - cost.flop, 0)
        parents.append(op.name)
        return parents.clear if len(parents) == 1 else lambda: None

    with targeting(Target(0)), observe(watch):
        make()()
    return costs


def total(make: Callable[[], DryRun]) -> Cost:
    """The total cost of a run's ops on a CPU."""
    costs = [cost for name, cost in count(make).items() if name != "enlarging"]
    return Cost(sum(cost.flop for cost in costs), sum(cost.bytes for cost in costs))


def operations(config: UNetConfig, *, height: int, width: int, rows: int, tokens: int) -> dict[str, int]:
    """Float operations of the full U-Net for `rows` rows, 2 for each multiply-add of a product, by when they are
    computed: "step" at each step. The total is that of the literature.
    """
    dtype = torch.float32
    step_counts = count(lambda: step(config, height=height, width=width, rows=rows, tokens=tokens, dtype=dtype))
    enlarging = step_counts.pop("enlarging", Cost(0, 0))
    return {
        "step": sum(cost.flop for cost in step_counts.values()),
        "once a prompt: keys and values": total(lambda: cross_kv(config, rows=rows, tokens=tokens, dtype=dtype)).flop,
        "once a schedule: time rows": total(lambda: time_rows(config, count=rows, dtype=dtype)).flop,
        "never: convolutions of enlarged pictures": enlarging.flop,
    }
