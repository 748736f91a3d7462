"""What goes into each network of an exported model and what comes out: names, dtypes, axes and their ranges.

Derived from a model's configs alone, and read by everything that follows: the tracer, the backends, the parity checks.
Names are those of optimum's and diffusers' exports, so that their pipelines load the folders as they are:

    text_encoder, text_encoder_2    input_ids -> last_hidden_state, pooler_output or text_embeds, hidden_states.N
    unet                            sample, timestep, encoder_hidden_states (SDXL: text_embeds, time_ids; LCM:
                                    timestep_cond) -> out_sample
    vae_decoder                     latent_sample -> sample
    vae_encoder                     sample -> latent_sample, latent_parameters (a tiny autoencoder: the first alone)

Where theirs differ, both are served: diffusers gives token ids in int32, and optimum in whatever the network takes;
diffusers reads an encoder's first output as the latent, and optimum the mean and log variance by their name.

The split form has the U-Net in three, as `models.unet` runs it:

    text_kv      encoder_hidden_states -> kv.0, kv.1, ...: keys | values of each cross-attention, once a prompt
    time_rows    timesteps (SDXL: text_embeds, time_ids; LCM: guidance) -> temb_rows, once a schedule
    unet_step    sample, temb_row, kv.0, kv.1, ... -> out_sample, each step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastldm.models.config import TextConfig, TinyVAEConfig, UNetConfig, VAEConfig
from fastldm.sizes import Axis

DType = Literal["float32", "float16", "int32"]
Like = Literal["normal", "latents", "picture"]
MODEL, DATA = "model.onnx", "model.onnx_data"
"""The files of an exported network: the graph, and beside it the weights."""


@dataclass(frozen=True)
class Port:
    """An input or output."""

    name: str
    dtype: DType
    shape: tuple[int | Axis, ...]
    below: int | None = None  # what is fed in lies in 0..below; where it is None, it is
    like: Like = (
        "normal"  # numbers of mean 0 and deviation 1, latents as an autoencoder has them, or a picture in -1..1
    )
    scale: float = 1.0  # deviation of latents

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def axes(self) -> dict[int, Axis]:
        """Its axes by dimension."""
        return {i: axis for i, axis in enumerate(self.shape) if isinstance(axis, Axis)}


@dataclass(frozen=True)
class NetworkSpec:
    """A network as backends see it: tensors by name in, tensors by name out."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes of the inputs by name."""
        return {axis.name: axis for port in reversed(self.inputs) for axis in port.axes.values()}

    def shape(self, port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one of its ports where its axes have these sizes, in the inputs' unit; their best where none is
        given."""
        axes = self.axes

        def size(axis: Axis) -> int:
            own = axes[axis.name]
            return sizes.get(axis.name, own.best) * axis.best // own.best

        return tuple(size(axis) if isinstance(axis, Axis) else axis for axis in port.shape)

    def narrowed(self, ranges: Mapping[str, tuple[int, int]]) -> NetworkSpec:
        """The same network for fewer sizes. ranges: least and most of axes of the inputs, by name."""
        axes = self.axes

        def narrow(size: int | Axis) -> int | Axis:
            if isinstance(size, int) or size.name not in ranges:
                return size
            own, (least, most) = axes[size.name], ranges[size.name]
            low, best, high = (end * size.best // own.best for end in (least, min(max(own.best, least), most), most))
            return replace(size, least=low, best=best, most=high)

        def ports(given: tuple[Port, ...]) -> tuple[Port, ...]:
            return tuple(replace(port, shape=tuple(map(narrow, port.shape))) for port in given)

        return NetworkSpec(self.name, ports(self.inputs), ports(self.outputs))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetworkSpec:
        def ports(given: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
            return tuple(
                Port(
                    port["name"],
                    port["dtype"],
                    tuple(Axis(**size) if isinstance(size, Mapping) else size for size in port["shape"]),
                    port["below"],
                    port["like"],
                    float(port["scale"]),
                )
                for port in given
            )

        return cls(data["name"], ports(data["inputs"]), ports(data["outputs"]))


def specs(
    unet: UNetConfig,
    vae: VAEConfig | TinyVAEConfig,
    texts: Sequence[TextConfig],
    *,
    dtype: DType,
    split: bool = False,
) -> dict[str, NetworkSpec]:
    """All networks of a model by name. dtype: "float32" or "float16", that of weights and activations."""
    names = ("text_encoder", "text_encoder_2")
    normalised = texts[-1].projection_dim is None  # as `fastldm.conditioning.text` reads them: SDXL's are not
    networks = [_text_encoder(name, text, dtype, normalised) for name, text in zip(names, texts, strict=False)]
    window = min(text.max_position for text in texts)
    networks += _split_unet(unet, window, dtype) if split else [_unet(unet, window, dtype)]
    networks += [_vae_decoder(unet, vae, dtype), _vae_encoder(unet, vae, dtype)]
    return {network.name: network for network in networks}


def sample(spec: NetworkSpec, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a network from a seed, on the CPU. sizes: of its axes by name, their best where none is given.

    Token ids hold the highest one, CLIP's end of text, twice in each row: the first is to count. Latents and pictures
    are patches with noise on them, in the range that they have in use: what is smooth drives activations further.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for port in spec.inputs:
        shape = spec.shape(port, sizes or {})
        if port.dtype == "int32":
            assert port.below is not None
            values = torch.randint(port.below, shape, generator=generator)
            ends = torch.rand(shape, generator=generator).topk(min(2, shape[1]), dim=1).indices
            values.scatter_(1, ends, port.below - 1)
        elif port.below is not None:
            values = port.below * torch.rand(shape, generator=generator)
        elif port.like == "normal":
            values = torch.randn(shape, generator=generator)
        else:
            values = _patches(shape, generator)
            values = port.scale * values if port.like == "latents" else (0.7 * values).clamp(-1, 1)
        made[port.name] = values.to(port.torch_dtype)
    return made


def _patches(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of mean 0 and deviation 1, half of it in patches of eight a side: (B, C, H, W)."""
    batch, channels, height, width = shape
    coarse = torch.randn((batch, channels, -(-height // 8), -(-width // 8)), generator=generator)
    coarse = coarse.repeat_interleave(8, 2)[:, :, :height].repeat_interleave(8, 3)[..., :width]
    return (coarse + torch.randn(shape, generator=generator)) / 2**0.5


# --------------------------------------------------------------------------------------------------------- networks

# Two rows are a guided picture. Sixteen are eight of them.
_BATCH = Axis("batch", 1, 2, 16)
_PICTURES = Axis("batch", 1, 1, 16)


def _text_encoder(name: str, config: TextConfig, dtype: DType, normalised: bool) -> NetworkSpec:
    tokens = Axis("tokens", 3, config.max_position, config.max_position)  # a window is bos, a token and eos at least
    hidden = (_BATCH, tokens, config.hidden)
    last = Port("last_hidden_state", dtype, hidden)
    if config.projection_dim is not None:
        outputs = [Port("text_embeds", dtype, (_BATCH, config.projection_dim)), last]
    else:
        outputs = [last, Port("pooler_output", dtype, (_BATCH, config.hidden))]
    outputs += [Port(f"hidden_states.{i}", dtype, hidden) for i in range(config.layers)]
    if normalised:
        # What clip_skip N reads; where it is not normalised, that is one of the hidden states.
        outputs += [Port(f"clip_skip.{n}", dtype, hidden) for n in range(1, config.layers)]
    return NetworkSpec(name, (Port("input_ids", "int32", (_BATCH, tokens), config.vocab),), tuple(outputs))


def _tokens(window: int) -> Axis:
    """Of what the U-Net reads: four windows, or whatever embeddings a caller made."""
    return Axis("tokens", 1, window, 4 * window)


def _latents(config: UNetConfig, name: str) -> Axis:
    """A latent's height or width: from a quarter of what the model was trained at to twice as much."""
    stride, trained = config.stride, config.sample_size[name == "width"]

    def steps(size: int) -> int:
        return max(1, size // stride) * stride

    return Axis(name, steps(trained // 4), steps(trained), steps(2 * trained), stride)


def _image(config: UNetConfig, channels: int) -> tuple[int | Axis, ...]:
    return _BATCH, channels, _latents(config, "height"), _latents(config, "width")


def _pooled(config: UNetConfig, rows: Axis, dtype: DType) -> list[Port]:
    channels = config.addition_input_dim - 6 * config.addition_time_embed_dim
    return [Port("text_embeds", dtype, (rows, channels)), Port("time_ids", "float32", (rows, 6), 1024)]


def _unet(config: UNetConfig, window: int, dtype: DType) -> NetworkSpec:
    inputs = [
        Port("sample", dtype, _image(config, config.in_channels)),
        # float32, since samplers have fractional ones, and an axis of its own: one for all rows, or one each.
        Port("timestep", "float32", (Axis("steps", 1, 1, _BATCH.most),), 1000),
        Port("encoder_hidden_states", dtype, (_BATCH, _tokens(window), config.cross_attention_dim)),
    ]
    if config.needs_added:
        inputs += _pooled(config, _BATCH, dtype)
    if config.time_cond_proj_dim is not None:
        inputs.append(Port("timestep_cond", dtype, (_BATCH, config.time_cond_proj_dim)))
    return NetworkSpec("unet", tuple(inputs), (Port("out_sample", dtype, _image(config, config.out_channels)),))


def _split_unet(config: UNetConfig, window: int, dtype: DType) -> list[NetworkSpec]:
    tokens, rows = _tokens(window), Axis("rows", 1, 32, 1024)  # of all steps and all rows of each
    kv = [Port(f"kv.{i}", dtype, (_BATCH, tokens, 2 * width)) for i, width in enumerate(config.cross_widths)]
    conditions = [Port("timesteps", "float32", (rows,), 1000)]
    if config.needs_added:
        conditions += _pooled(config, rows, dtype)
    if config.needs_guidance:
        conditions.append(Port("guidance", "float32", (rows,), 10))
    step = [
        Port("sample", dtype, _image(config, config.in_channels)),
        Port("temb_row", dtype, (_BATCH, config.time_channels)),
        *kv,
    ]
    hidden = Port("encoder_hidden_states", dtype, (_BATCH, tokens, config.cross_attention_dim))
    return [
        NetworkSpec("text_kv", (hidden,), tuple(kv)),
        NetworkSpec("time_rows", tuple(conditions), (Port("temb_rows", dtype, (rows, config.time_channels)),)),
        NetworkSpec("unet_step", tuple(step), (Port("out_sample", dtype, _image(config, config.out_channels)),)),
    ]


def _picture(unet: UNetConfig, channels: int, unit: int) -> tuple[int | Axis, ...]:
    """Latents for a unit of 1, pictures for one of the autoencoder's factor. Any size: previews are small."""
    sides = [_latents(unet, name) for name in ("height", "width")]
    return (_PICTURES, channels, *(Axis(side.name, unit, side.best * unit, side.most * unit, unit) for side in sides))


def _vae_decoder(unet: UNetConfig, vae: VAEConfig | TinyVAEConfig, dtype: DType) -> NetworkSpec:
    size, picture = _picture(unet, vae.latent_channels, 1), _picture(unet, vae.out_channels, vae.factor)
    latents = Port("latent_sample", dtype, size, like="latents", scale=1 / vae.scaling_factor)
    return NetworkSpec("vae_decoder", (latents,), (Port("sample", dtype, picture),))


def _vae_encoder(unet: UNetConfig, vae: VAEConfig | TinyVAEConfig, dtype: DType) -> NetworkSpec:
    picture = Port("sample", dtype, _picture(unet, vae.in_channels, vae.factor), like="picture")
    outputs = [Port("latent_sample", dtype, _picture(unet, vae.latent_channels, 1))]
    if not isinstance(vae, TinyVAEConfig):  # mean and log variance
        outputs.append(Port("latent_parameters", dtype, _picture(unet, 2 * vae.latent_channels, 1)))
    return NetworkSpec("vae_encoder", (picture,), tuple(outputs))
