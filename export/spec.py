"""Inputs and outputs of the networks of an exported model: names, dtypes, axes and their ranges.

Derived only from a model's configs, and read by the tracer, the backends and the parity checks. Names are those of
optimum's and diffusers' exports, so that their pipelines can load bundles:

    text_encoder, text_encoder_2    input_ids -> last_hidden_state, pooler_output or text_embeds, hidden_states.N
    image_encoder                   pixel_values -> image_embeds (models that read a picture)
    image_normalizer                image_embeds, noise, rates, noise_level -> class_labels (unCLIP)
    prior_text_encoder              as text_encoder_2 (unCLIP of texts, as are the next)
    prior_kv                        encoder_hidden_states, proj_embedding, text_len -> kv.0, kv.1, ...: keys | values of
                                    each layer, of the vector and the text, per prompt
    prior_step                      hidden_states, timestep, kv.0, kv.1, ..., kv_len -> predicted_image_embedding
    prior_vectors                   prior_latents -> image_embeds
    unet                            sample, timestep, and what else it reads -> out_sample
    vae_decoder                     latent_sample -> sample
    vae_encoder                     sample -> latent_sample, latent_parameters (a tiny autoencoder: the first alone)

A model whose latents are pixels has no autoencoder. What a U-Net reads beside latents and time follows from its config,
whatever the model is (`UNetConfig`):

    encoder_hidden_states    a text, by `cross_widths`; or image_embeds, a picture's vector, by `encoder_hid_dim_type`
    text_embeds, time_ids    pooled text and sizes, by `needs_added`
    image_embeds             a picture's vector with the time, by `addition_embed_type`
    class_labels             a class or noise level, by `num_class_embeds`; a time or a vector, by `class_embed_type`
    timestep_cond            by `time_cond_proj_dim`: LCM's embedded guidance, or pooled text of the x2 upscaler

Optimum and diffusers are both supported where they differ: diffusers passes token ids in int32, and optimum in the
dtype of the input; diffusers reads the latent from an encoder's first output, optimum mean and log variance by name.

In the split form, the U-Net is three networks, as `models.unet` runs it:

    text_kv      encoder_hidden_states, or image_embeds -> kv.0, kv.1, ...: keys | values of each cross-attention, per
                 prompt; none where there is no cross-attention
    text_time    encoder_hidden_states -> text_embedding: what the time embedding has of a text, per prompt, of networks
                 that pool it (`pools_text`)
    time_rows    timesteps, and what else enters with the time (text_embedding for a text; guidance for timestep_cond
                 where the network reads that scale) -> temb_rows, per schedule
    unet_step    sample, temb_row, kv.0, kv.1, ... -> out_sample, per step

A control that was exported with such a model is networks of its own, k being its number from 1 on, and the step reads
what it adds, all controls together (absent from a bundle without, zeros for rows without):

    controlnet_k_hint         image, in 0..1 -> hint
    controlnet_k_text_kv      as text_kv; none if it reads no text
    controlnet_k_time_rows    as time_rows
    controlnet_k_step         sample, temb_row, kv.0, ..., hint -> residual.0, residual.1, ...: of each skip connection,
                              and of the middle block
    t2i_adapter_k             image, in 0..1 -> feature.0, feature.1, ...
    unet_step                 also residual.0, ..., and feature.0, ...

A whole picture and its steps as one network each are in `export.graphs`.

Where a bundle takes adapters, all but the autoencoder's read their factors too, see `adapters.packing`: lora_down and
lora_up, and the last of them lora_scale.

Over 500 lines, for the inputs and outputs of all networks are one list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastldm.adapters.packing import DOWN, SCALE, UP, Layout, layouts
from fastldm.models.clip_vision import VisionConfig
from fastldm.models.config import AutoencoderConfig, PixelResidualConfig, TextConfig, UNetConfig
from fastldm.models.controlnet import ControlNetConfig
from fastldm.models.families import IMAGE_ENCODER, IMAGE_NORMALIZER, PRIOR_TEXT_ENCODER, encoder_names
from fastldm.models.t2i_adapter import T2IAdapterConfig, feature_places
from fastldm.models.t5 import T5_WINDOW, T5Config
from fastldm.models.unet_config import VECTOR_TOKENS
from fastldm.sizes import Axis

if TYPE_CHECKING:
    from fastldm.loading.spec import PriorSpec

DType = Literal["float32", "float16", "int32"]
Like = Literal["normal", "latents", "picture", "factors", "scales", "padded"]
MODEL, DATA = "model.onnx", "model.onnx_data"
"""The files of an exported network: graph and weights."""


@dataclass(frozen=True)
class Port:
    """An input or output of a network."""

    name: str
    dtype: DType
    shape: tuple[int | Axis, ...]
    below: int | None = None  # sample inputs are in 0..below; if None, see `like`
    like: Like = "normal"
    """Sample inputs: normally distributed, latents of an autoencoder, an image in -1..1, factors of adapters, or their
    scales, of which half are 0; token ids without padding, or with some of id 0 behind them."""
    scale: float = 1.0  # standard deviation of what is not below a number

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def axes(self) -> dict[int, Axis]:
        """The axes by dimension."""
        return {i: axis for i, axis in enumerate(self.shape) if isinstance(axis, Axis)}


@dataclass(frozen=True)
class NetworkSpec:
    """A network as seen by backends: inputs and outputs by name."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes of the inputs by name."""
        return {axis.name: axis for port in reversed(self.inputs) for axis in port.axes.values()}

    def shape(self, port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one of its ports for these sizes of axes, in the inputs' unit; by default the best sizes."""
        axes = self.axes

        def size(axis: Axis) -> int:
            own = axes[axis.name]
            return sizes.get(axis.name, own.best) * axis.best // own.best

        return tuple(size(axis) if isinstance(axis, Axis) else axis for axis in port.shape)

    def narrowed(self, ranges: Mapping[str, tuple[int, int]]) -> NetworkSpec:
        """The same network for narrower ranges. ranges: least and most of the inputs' axes, by name."""
        axes = self.axes

        def narrow(size: int | Axis) -> int | Axis:
            if isinstance(size, int) or size.name not in ranges:
                return size
            own, (least, most) = axes[size.name], ranges[size.name]
            low, best, high = (end * size.best // own.best for end in (least, min(max(own.best, least), most), most))
            return replace(size, least=low, best=best, most=high)

        def narrow_ports(ports: tuple[Port, ...]) -> tuple[Port, ...]:
            return tuple(replace(port, shape=tuple(map(narrow, port.shape))) for port in ports)

        return NetworkSpec(self.name, narrow_ports(self.inputs), narrow_ports(self.outputs))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetworkSpec:
        def read_ports(ports: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
            return tuple(
                Port(
                    port["name"],
                    port["dtype"],
                    tuple(Axis(**size) if isinstance(size, Mapping) else size for size in port["shape"]),
                    port["below"],
                    port["like"],
                    float(port["scale"]),
                )
                for port in ports
            )

        return cls(data["name"], read_ports(data["inputs"]), read_ports(data["outputs"]))


def specs(
    unet: UNetConfig,
    vae: AutoencoderConfig,
    texts: Sequence[TextConfig],
    *,
    dtype: DType,
    split: bool = False,
    adapter_rank: int = 0,
    controls: Sequence[Control] = (),
    vision: VisionConfig | None = None,
    prior: PriorSpec | None = None,
) -> dict[str, NetworkSpec]:
    """All networks of a model by name. dtype: "float32" or "float16", of weights and activations. Of a model that is
    split, adapter_rank is of the adapters that its networks take, together; 0 is none. controls: configs of those that
    are exported with it. vision: of a model that reads a picture. prior: of one that makes its vector of a text."""
    # As in `conditioning.text`: SDXL's are not, nor are those of the x2 upscaler.
    normalised = all(text.projection_dim is None and not text.pools for text in texts[-1:])
    networks = [
        _text_encoder(name, text, dtype, normalised) for name, text in zip(encoder_names(texts), texts, strict=True)
    ]
    # A picture in place of a text is one token; of a text whose encoder is another model's the embeddings are given.
    window = min((text.max_position for text in texts), default=T5_WINDOW if unet.pools_text else 1)
    if vision is not None:
        networks.append(_image_encoder(vision, dtype))
    if prior is not None:
        networks += _prior(prior, dtype)
    if unet.needs_vector:
        networks.append(_normalizer((unet.class_input_dim or 0) // 2, dtype))
    networks += _split_unet(unet, window, dtype, controls) if split else [_unet(unet, window, dtype)]
    for name, control in named_controls(controls).items():
        if isinstance(control, ControlNetConfig):
            networks += _controlnet(name, control, unet, window, dtype)
        else:
            networks.append(_t2i_adapter(name, control, unet, vae.factor, dtype))
    if not isinstance(vae, PixelResidualConfig):
        networks += [_vae_decoder(unet, vae, dtype), _vae_encoder(unet, vae, dtype)]
    packed = layouts(unet, texts, adapter_rank) if adapter_rank else {}
    return {network.name: _with_factors(network, packed.get(network.name, ()), dtype) for network in networks}


def sample(spec: NetworkSpec, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Sample inputs of a network from a seed, on the CPU. sizes: of its axes by name, by default the best.

    Token ids have the highest id, CLIP's end of text, twice per row, of which the first counts. Latents and images are
    patches with noise, in their usual range: smooth inputs give larger activations.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for port in spec.inputs:
        shape = spec.shape(port, sizes or {})
        if port.dtype == "int32":
            assert port.below is not None
            values = torch.randint(port.below, shape, generator=generator)
            if len(shape) > 1:  # token ids
                ends = torch.rand(shape, generator=generator).topk(min(2, shape[1]), dim=1).indices
                values.scatter_(1, ends, port.below - 1)
            if port.like == "padded":
                values[: 1 + shape[0] // 2, 1 + shape[1] // 2 :] = 0
        elif port.below is not None:
            values = port.below * torch.rand(shape, generator=generator)
        elif port.like == "normal":
            values = port.scale * torch.randn(shape, generator=generator)
        elif port.like == "factors":
            values = tiled(port.scale * torch.randn(min(TILE, *shape), generator=generator), *shape)
        elif port.like == "scales":
            values = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
        else:
            values = _patches(shape, generator)
            values = port.scale * values if port.like == "latents" else (0.7 * values).clamp(-1, 1)
        inputs[port.name] = values.to(port.torch_dtype)
    return inputs


TILE = 65_521  # a prime, so that few layers begin at the same number


def tiled(tile: Tensor, size: int) -> Tensor:
    """Numbers repeated up to a size: samples of factors, of which goldens hold the tile alone."""
    return tile.repeat(-(-size // len(tile)))[:size]


def _patches(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(B, C, H, W) of mean 0 and standard deviation 1, half of the variance in patches of 8x8."""
    batch, channels, height, width = shape
    coarse = torch.randn((batch, channels, -(-height // 8), -(-width // 8)), generator=generator)
    coarse = coarse.repeat_interleave(8, 2)[:, :, :height].repeat_interleave(8, 3)[..., :width]
    return (coarse + torch.randn(shape, generator=generator)) / 2**0.5


# --------------------------------------------------------------------------------------------------------- networks

# Two rows are a guided image, sixteen are eight of them.
_BATCH = Axis("batch", 1, 2, 16)
_IMAGES = Axis("batch", 1, 1, 16)


def _with_factors(network: NetworkSpec, layout: Layout, dtype: DType) -> NetworkSpec:
    """A network that reads factors of adapters too."""
    if not layout:
        return network
    rank, down, up = layout[0].rank, layout[-1].down_end, layout[-1].up_end
    width = down / rank / len(layout)  # so that what a sample adds is about as large as what it is added to
    inputs = [
        Port(DOWN, dtype, (down,), like="factors", scale=width**-0.5),
        Port(UP, dtype, (up,), like="factors", scale=0.5 * rank**-0.5),
    ]
    if network.name == "unet_step":
        inputs.append(Port(SCALE, dtype, (_BATCH, rank), like="scales"))
    return replace(network, inputs=(*network.inputs, *inputs))


def _text_encoder(name: str, config: TextConfig, dtype: DType, normalised: bool) -> NetworkSpec:
    tokens = Axis("tokens", 3, config.max_position, config.max_position)  # at least bos, a token and eos
    ids, hidden = Port("input_ids", "int32", (_BATCH, tokens), config.vocab), (_BATCH, tokens, config.hidden)
    last = Port("last_hidden_state", dtype, hidden)
    if isinstance(config, T5Config):
        return NetworkSpec(name, (replace(ids, like="padded"),), (last,))
    if config.projection_dim is not None:
        outputs = [Port("text_embeds", dtype, (_BATCH, config.projection_dim)), last]
    else:
        outputs = [last, Port("pooler_output", dtype, (_BATCH, config.hidden))]
    outputs += [Port(f"hidden_states.{i}", dtype, hidden) for i in range(config.layers + config.pools)]
    if normalised:
        # Read by clip_skip N; without the final norm, that is one of the hidden states.
        outputs += [Port(f"clip_skip.{n}", dtype, hidden) for n in range(1, config.layers)]
    return NetworkSpec(name, (ids,), tuple(outputs))


def _image_encoder(config: VisionConfig, dtype: DType) -> NetworkSpec:
    pixels = Port("pixel_values", dtype, (_BATCH, 3, config.image_size, config.image_size), like="latents")
    return NetworkSpec(IMAGE_ENCODER, (pixels,), (Port("image_embeds", dtype, (_BATCH, config.projection_dim)),))


def _normalizer(width: int, dtype: DType) -> NetworkSpec:
    inputs = (
        Port("image_embeds", dtype, (_BATCH, width)),
        Port("noise", "float32", (_BATCH, width)),
        Port("rates", "float32", (_BATCH, 2), below=1),
        Port("noise_level", "float32", (_BATCH,), below=1000),
    )
    return NetworkSpec(IMAGE_NORMALIZER, inputs, (Port("class_labels", dtype, (_BATCH, 2 * width)),))


def _prior(prior: PriorSpec, dtype: DType) -> list[NetworkSpec]:
    """Texts have all their tokens, and a number of those that are visible."""
    assert prior.text is not None  # that of models that are exported is its own
    config, tokens = prior.model, prior.model.tokens
    kv = [Port(f"kv.{i}", dtype, (_BATCH, 1 + tokens, 2 * config.channels)) for i in range(config.layers)]
    text = (
        Port("encoder_hidden_states", dtype, (_BATCH, tokens, config.text_dim)),
        Port("proj_embedding", dtype, (_BATCH, config.vector_dim)),
        Port("text_len", "int32", (_BATCH,), tokens + 1),
    )
    step = (
        Port("hidden_states", dtype, (_BATCH, config.text_dim)),
        Port("timestep", "float32", (_BATCH,), 1000),
        *kv,
        Port("kv_len", "int32", (_BATCH,), tokens + 2),
    )
    made = Port("predicted_image_embedding", dtype, (_BATCH, config.out_dim))
    return [
        _text_encoder(PRIOR_TEXT_ENCODER, prior.text, dtype, normalised=False),
        NetworkSpec("prior_kv", text, tuple(kv)),
        NetworkSpec("prior_step", step, (made,)),
        NetworkSpec("prior_vectors", (replace(made, name="prior_latents"),), (replace(made, name="image_embeds"),)),
    ]


def _tokens(window: int) -> Axis:
    """Tokens that the U-Net reads: up to four windows, or a caller's embeddings."""
    return Axis("tokens", 1, window, 4 * window)


def _latents(config: UNetConfig, name: str) -> Axis:
    """A latent's height or width: from a quarter of the trained size to twice the trained size."""
    stride, trained = config.stride, config.sample_size[name == "width"]

    def steps(size: int) -> int:
        # A blur reflects what it pads, for which there have to be two pixels.
        return max(2 if config.even_sizes else 1, size // stride) * stride

    return Axis(name, steps(trained // 4), steps(trained), steps(2 * trained), stride)


def _image(config: UNetConfig, channels: int) -> tuple[int | Axis, ...]:
    return _BATCH, channels, _latents(config, "height"), _latents(config, "width")


def _pooled(config: UNetConfig, rows: Axis, dtype: DType) -> list[Port]:
    ids = Port("time_ids", "float32", (rows, config.added_ids), 1024)
    return [Port("text_embeds", dtype, (rows, config.pooled_width)), ids]


def _class_labels(config: UNetConfig, rows: Axis, dtype: DType) -> list[Port]:
    if config.num_class_embeds is not None:
        return [Port("class_labels", "int32", (rows,), config.num_class_embeds)]
    if config.class_embed_type == "timestep":
        return [Port("class_labels", "float32", (rows,), 1000)]
    if config.class_embed_type == "identity":
        return [Port("class_labels", dtype, (rows, config.time_embedding_dim))]
    return [] if config.class_input_dim is None else [Port("class_labels", dtype, (rows, config.class_input_dim))]


def _text(config: UNetConfig, tokens: Axis, dtype: DType) -> list[Port]:
    """What its cross-attentions read, of which they make `_kv`."""
    if config.encoder_hid_dim_type == "image_proj":
        return [Port("image_embeds", dtype, (_BATCH, config.text_width))]
    if not config.reads_text:
        return []
    return [Port("encoder_hidden_states", dtype, (_BATCH, tokens, config.text_width))]


def _with_time(config: UNetConfig, rows: Axis, dtype: DType, *, split: bool) -> list[Port]:
    """What enters with the time. split: as of `time_rows`, which has what the text and the guidance scale make of it,
    where the whole network has the text, and the scale embedded."""
    ports = _pooled(config, rows, dtype) if config.needs_added else []
    if config.pools_text and split:
        ports.append(Port("text_embedding", dtype, (rows, config.time_embedding_dim)))
    if config.addition_embed_type in ("image", "image_hint"):
        ports.append(Port("image_embeds", dtype, (rows, config.encoder_hid_dim or 0)))
    condition = (
        [] if config.time_cond_proj_dim is None else [Port("timestep_cond", dtype, (rows, config.time_cond_proj_dim))]
    )
    if config.needs_guidance and split:
        ports.append(Port("guidance", "float32", (rows,), 10))
        condition = []
    return [*ports, *_class_labels(config, rows, dtype), *condition]


def _unet(config: UNetConfig, window: int, dtype: DType) -> NetworkSpec:
    inputs = [
        Port("sample", dtype, _image(config, config.in_channels)),
        # float32, since samplers have fractional timesteps, with its own axis: one for all rows, or one per row.
        Port("timestep", "float32", (Axis("steps", 1, 1, _BATCH.most),), 1000),
        *_text(config, _tokens(window), dtype),
    ]
    inputs += [port for port in _with_time(config, _BATCH, dtype, split=False) if port not in inputs]
    return NetworkSpec("unet", tuple(inputs), (Port("out_sample", dtype, _image(config, config.step_channels)),))


def _kv(widths: Sequence[int], tokens: int | Axis, dtype: DType) -> list[Port]:
    return [Port(f"kv.{i}", dtype, (_BATCH, tokens, 2 * channels)) for i, channels in enumerate(widths)]


def _text_kv(name: str, text: Sequence[Port], kv: Sequence[Port]) -> list[NetworkSpec]:
    return [NetworkSpec(name, tuple(text), tuple(kv))] if kv else []


def _time_rows(name: str, config: UNetConfig, channels: int, dtype: DType) -> NetworkSpec:
    rows = Axis("rows", 1, 32, 1024)  # of all rows of all steps
    inputs = Port("timesteps", "float32", (rows,), 1000), *_with_time(config, rows, dtype, split=True)
    return NetworkSpec(name, inputs, (Port("temb_rows", dtype, (rows, channels)),))


def _split_unet(config: UNetConfig, window: int, dtype: DType, controls: Sequence[Control]) -> list[NetworkSpec]:
    tokens = _tokens(window)
    text = _text(config, tokens, dtype)
    kv = _kv(config.cross_widths, VECTOR_TOKENS if config.encoder_hid_dim_type == "image_proj" else tokens, dtype)
    step = [
        Port("sample", dtype, _image(config, config.in_channels)),
        Port("temb_row", dtype, (_BATCH, config.time_channels)),
        *kv,
    ]
    if any(isinstance(control, ControlNetConfig) for control in controls):
        step += _residuals(config, dtype)
    if not all(isinstance(control, ControlNetConfig) for control in controls):
        step += _features(config, dtype)
    networks = _text_kv("text_kv", text, kv)
    if config.pools_text:
        pooled = Port("text_embedding", dtype, (_BATCH, config.time_embedding_dim))
        networks.append(NetworkSpec("text_time", tuple(text), (pooled,)))
    return [
        *networks,
        _time_rows("time_rows", config, config.time_channels, dtype),
        NetworkSpec("unet_step", tuple(step), (Port("out_sample", dtype, _image(config, config.step_channels)),)),
    ]


Control = ControlNetConfig | T2IAdapterConfig


def named_controls(controls: Sequence[Control]) -> dict[str, Control]:
    """Configs by the names that their networks begin with."""
    kinds = ["controlnet" if isinstance(control, ControlNetConfig) else "t2i_adapter" for control in controls]
    return {f"{kind}_{k}": control for k, (kind, control) in enumerate(zip(kinds, controls, strict=True), 1)}


def _scaled(axis: Axis, factor: int, divisor: int = 1) -> Axis:
    """The same quantity in a smaller unit, or a larger one, of which it is a multiple."""
    sizes = (axis.least, axis.best, axis.most, axis.multiple_of)
    assert all(size * factor % divisor == 0 for size in sizes)
    return Axis(axis.name, *(size * factor // divisor for size in sizes))


def _map(config: UNetConfig, channels: int, stride: int, batch: Axis = _BATCH) -> tuple[int | Axis, ...]:
    """The shape of values of which there is one for each `stride` latents."""
    return batch, channels, *(_scaled(_latents(config, side), 1, stride) for side in ("height", "width"))


def _pixels(config: UNetConfig, channels: int, factor: int) -> tuple[int | Axis, ...]:
    return _IMAGES, channels, *(_scaled(_latents(config, side), factor) for side in ("height", "width"))


def _residuals(config: UNetConfig, dtype: DType, pooled: bool = False) -> list[Port]:
    """Of each skip connection of a U-Net, and of the middle block."""
    last = config.levels - 1
    halvings = [
        0,
        *(
            i + (k == len(level.depths))
            for i, level in enumerate(config.down)
            for k in range(len(level.depths) + (i < last))
        ),
    ]
    places = [*zip(config.skip_channels, halvings, strict=True), (config.skip_channels[-1], last)]
    shapes = [(_BATCH, width, 1, 1) if pooled else _map(config, width, 2**halved) for width, halved in places]
    return [Port(f"residual.{k}", dtype, shape) for k, shape in enumerate(shapes)]


def _features(config: UNetConfig, dtype: DType) -> list[Port]:
    places = enumerate(feature_places(config))
    return [Port(f"feature.{k}", dtype, _map(config, width, stride)) for k, (width, stride) in places]


def _controlnet(name: str, config: ControlNetConfig, unet: UNetConfig, window: int, dtype: DType) -> list[NetworkSpec]:
    """unet: that of the model, whose sizes it has."""
    tokens, own = _tokens(window), config.unet
    kv = _kv(config.cross_widths, tokens, dtype)
    image = Port("image", dtype, _pixels(unet, config.image_channels, config.factor), below=1)
    hint = Port("hint", dtype, _map(unet, own.down[0].channels, 1, _IMAGES))
    step = [
        Port("sample", dtype, _image(unet, own.in_channels)),
        Port("temb_row", dtype, (_BATCH, config.time_channels)),
        *kv,
        replace(hint, shape=_map(unet, own.down[0].channels, 1)),
    ]
    return [
        NetworkSpec(f"{name}_hint", (image,), (hint,)),
        *_text_kv(f"{name}_text_kv", _text(own, tokens, dtype), kv),
        _time_rows(f"{name}_time_rows", replace(own, time_cond_proj_dim=None), config.time_channels, dtype),
        NetworkSpec(f"{name}_step", tuple(step), tuple(_residuals(unet, dtype, config.global_pool))),
    ]


def _t2i_adapter(name: str, config: T2IAdapterConfig, unet: UNetConfig, factor: int, dtype: DType) -> NetworkSpec:
    image = Port("image", dtype, _pixels(unet, config.image_channels, factor), below=1)
    levels = zip(config.channels, config.strides, strict=True)
    shapes = [_map(unet, width, stride // factor, _IMAGES) for width, stride in levels]
    return NetworkSpec(name, (image,), tuple(Port(f"feature.{k}", dtype, shape) for k, shape in enumerate(shapes)))


def _image_shape(unet: UNetConfig, channels: int, unit: int) -> tuple[int | Axis, ...]:
    """The shape of latents, for unit 1, or of images, for unit `vae.factor`. Any size, since previews are small."""
    sides = [_latents(unet, name) for name in ("height", "width")]
    return (_IMAGES, channels, *(Axis(side.name, unit, side.best * unit, side.most * unit, unit) for side in sides))


def _vae_decoder(unet: UNetConfig, vae: AutoencoderConfig, dtype: DType) -> NetworkSpec:
    size, image = _image_shape(unet, vae.latent_channels, 1), _image_shape(unet, vae.out_channels, vae.factor)
    latents = Port("latent_sample", dtype, size, like="latents", scale=1 / vae.scaling_factor)
    return NetworkSpec("vae_decoder", (latents,), (Port("sample", dtype, image),))


def _vae_encoder(unet: UNetConfig, vae: AutoencoderConfig, dtype: DType) -> NetworkSpec:
    image = Port("sample", dtype, _image_shape(unet, vae.in_channels, vae.factor), like="picture")
    outputs = [Port("latent_sample", dtype, _image_shape(unet, vae.latent_channels, 1))]
    if vae.moments:  # mean and log variance
        outputs.append(Port("latent_parameters", dtype, _image_shape(unet, 2 * vae.latent_channels, 1)))
    return NetworkSpec("vae_encoder", (image,), tuple(outputs))
