"""What enters a U-Net at admission: the embedding of time, class and conditions, and the text as attention reads it.

Parameter names are those of diffusers' two U-Net classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.models.config import UNetConfig
from fastldm.models.interfaces import AddedConditions
from fastldm.models.layers import Conv, LayerNorm, Linear, attention, channels_last, parameter
from fastldm.models.unet_config import NOISE_LEVEL_CHANNELS, VECTOR_TOKENS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class Conditions(nn.Module):
    """The embeddings of a U-Net, of which each is there if its config says so."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, out = config.down[0].channels, config.time_embedding_dim
        self.time_proj: nn.Module
        if config.time_embedding_type == "fourier":
            self.time_proj, width = Fourier(out // 2, config.flip_sin_to_cos), out
        elif config.timesteps is not None:
            self.time_proj, width = ClassEmbedding(config.timesteps, channels), channels
        else:
            self.time_proj, width = Sinusoids(channels, config.flip_sin_to_cos, config.freq_shift), channels
        # UNet2DModel's embeddings have SiLU, whatever the resnets have.
        act = config.act_fn if config.conditional else "silu"
        post_act = config.timestep_post_act
        self.time_embedding = TimeEmbedding(width, out, config.time_cond_proj_dim, act=act, post_act=post_act)
        self.needs_added = config.needs_added
        self.add_embedding: nn.Module
        if config.needs_added:
            self.add_time_proj = Sinusoids(config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift)
            self.add_embedding = TimeEmbedding(config.addition_input_dim, out)
        elif config.addition_embed_type == "text":
            text_width = config.encoder_hid_dim or config.cross_attention_dim
            self.add_embedding = TextEmbedding(text_width, out, config.addition_heads)
        elif config.addition_embed_type is not None:
            image_width = config.encoder_hid_dim or 0
            hints = config.addition_embed_type == "image_hint"
            self.add_embedding = HintEmbedding(image_width, out) if hints else ImageEmbedding(image_width, out)
        self.needs_class = config.needs_class or config.class_embed_type is not None
        self.class_embedding: nn.Module
        if config.num_class_embeds is not None:
            self.class_embedding = ClassEmbedding(config.num_class_embeds, out)
        elif config.class_embed_type == "timestep":
            self.class_embedding = TimeEmbedding(width, out, act=act)
        elif config.class_input_dim is not None:
            self.class_embedding = TimeEmbedding(config.class_input_dim, out)
        self.encoder_hid_proj: nn.Module
        if config.encoder_hid_dim_type == "text_proj":
            self.encoder_hid_proj = Linear(config.encoder_hid_dim or 0, config.cross_attention_dim)
        elif config.encoder_hid_dim_type == "image_proj":
            self.encoder_hid_proj = ImageTokens(config.encoder_hid_dim or 0, config.cross_attention_dim)
        self.kinds = (config.addition_embed_type, config.class_embed_type, config.encoder_hid_dim_type)
        self.time_embedding_act = config.time_embedding_act

    def embed(
        self,
        timesteps: Tensor,
        *,
        added: AddedConditions | None = None,
        condition: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        text_embedding: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """The embedding (R, time_embedding_dim) of R rows. InputError for what is missing: see
        `UNet.time_rows`. condition: (R, time_cond_proj_dim). encoder_hidden_states: of R rows, or of the rows of
        one step, which are those of all; or text_embedding of R rows."""
        addition, class_type, _ = self.kinds
        dtype = self.time_embedding.linear_1.weight.dtype
        embedding = self.time_embedding(self.time_proj(timesteps).to(dtype), condition)
        if self.needs_class:
            if class_labels is None:
                raise InputError(
                    "this network reads a class (an upscaler's noise level, or unCLIP's picture): class_labels is None"
                )
            if class_type == "timestep":
                class_labels = self.time_proj(class_labels).to(dtype)
            elif class_type is not None:
                class_labels = class_labels.to(dtype)
            embedding = embedding + (class_labels if class_type == "identity" else self.class_embedding(class_labels))
        if self.needs_added:
            if added is None:
                raise InputError("this network (SDXL) reads pooled text and sizes: got None, expected R rows of each")
            sizes = self.add_time_proj(added.time_ids.flatten())
            sizes = sizes.unflatten(0, added.time_ids.shape).flatten(1)  # (R, 6 * addition_time_embed_dim)
            embedding = embedding + self.add_embedding(torch.cat((added.text_embeds, sizes), dim=1).to(dtype))
        elif addition == "text":
            if text_embedding is None:
                if encoder_hidden_states is None:
                    raise InputError("this network (IF) reads text with the time: encoder_hidden_states is None")
                pooled = self.text_embedding(encoder_hidden_states)
                text_embedding = pooled.repeat(len(embedding) // len(pooled), 1)
            embedding = embedding + text_embedding
        elif addition is not None:
            if image_embeds is None:
                raise InputError("this network (Kandinsky) reads a picture's vector: image_embeds is None")
            embedding = embedding + self.add_embedding(image_embeds.to(dtype))
        return embedding if self.time_embedding_act is None else ACTIVATIONS[self.time_embedding_act](embedding)

    def text_embedding(self, encoder_hidden_states: Tensor) -> Tensor:
        """What `embed` adds of texts (B, T, D), of a network that `pools_text`: (B, time_embedding_dim)."""
        return self.add_embedding(encoder_hidden_states)

    def read(self, encoder_hidden_states: Tensor) -> Tensor:
        """What the text encoder makes, (B, T, encoder_hid_dim), or a picture's vector (B, encoder_hid_dim), as
        attention reads it: (B, T, D). Without a projection it is that already."""
        return encoder_hidden_states if self.kinds[2] is None else self.encoder_hid_proj(encoder_hidden_states)


class TimeEmbedding(nn.Module):
    """Two linear layers over an embedded number; diffusers' TimestepEmbedding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        condition_channels: int | None = None,
        *,
        act: str = "silu",
        post_act: str | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = Linear(in_channels, hidden or out_channels)
        self.linear_2 = Linear(hidden or out_channels, out_channels)
        self.cond_proj = None if condition_channels is None else Linear(condition_channels, in_channels, bias=False)
        self.act, self.post_act = act, post_act

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition.to(x.dtype))
        x = self.linear_2(ACTIVATIONS[self.act](self.linear_1(x)))
        return x if self.post_act is None else ACTIVATIONS[self.post_act](x)


class ClassEmbedding(nn.Module):
    """A vector for each class, or whole timestep; torch's Embedding without its initialisation."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.weight = parameter(classes, channels)

    def forward(self, class_labels: Tensor) -> Tensor:
        return F.embedding(class_labels.int(), self.weight)


class TextEmbedding(nn.Module):
    """A text (B, T, D) pooled by attention of its mean: (B, channels); diffusers' TextTimeEmbedding."""

    def __init__(self, width: int, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(channels)
        self.pool = AttentionPooling(width, heads)
        self.proj = Linear(width, channels)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class AttentionPooling(nn.Module):
    """One query, the mean of the text and a position, over itself and the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.positional_embedding = parameter(1, width)
        self.q_proj, self.k_proj, self.v_proj = Linear(width, width), Linear(width, width), Linear(width, width)
        self.heads = heads

    def forward(self, text: Tensor) -> Tensor:
        mean = text.mean(dim=1, keepdim=True) + self.positional_embedding  # (B, 1, D)
        text = torch.cat((mean, text), dim=1)
        return attention(self.q_proj(mean), self.k_proj(text), self.v_proj(text), self.heads)[:, 0]


class ImageEmbedding(nn.Module):
    """A picture's vector (B, D) in the time embedding; diffusers' ImageTimeEmbedding."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.image_proj = Linear(width, channels)
        self.image_norm = LayerNorm(channels)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.image_norm(self.image_proj(image_embeds))


class HintEmbedding(ImageEmbedding):
    """The same, and convolutions from a map to the channels that are read behind the latents; diffusers'
    ImageHintTimeEmbedding."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(width, channels)
        widths, strides = (3, 16, 16, 32, 32, 96, 96, 256, 4), (1, 1, 2, 1, 2, 1, 2, 1)
        convs = [Conv(widths[k], widths[k + 1], stride=strides[k]) for k in range(len(strides))]
        self.input_hint_block = nn.ModuleDict({str(2 * k): conv for k, conv in enumerate(convs)})  # SiLU between

    def hint(self, image: Tensor) -> Tensor:
        """A map (B, 3, H, W) -> (B, 4, H / 8, W / 8)."""
        first, *rest = self.input_hint_block.values()
        x = first(channels_last(image))
        for conv in rest:
            x = conv(F.silu(x))
        return x


class ImageTokens(nn.Module):
    """A picture's vector (B, D) as 32 tokens of a text; diffusers' ImageProjection."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.image_embeds = Linear(width, VECTOR_TOKENS * context)
        self.norm = LayerNorm(context)

    def forward(self, image_embeds: Tensor) -> Tensor:
        vector = image_embeds.to(self.image_embeds.weight.dtype)
        return self.norm(self.image_embeds(vector).unflatten(1, (VECTOR_TOKENS, -1)))


class Fourier(nn.Module):
    """Sinusoids of trained frequencies; diffusers' GaussianFourierProjection without its logarithm. float32."""

    def __init__(self, frequencies: int, flip_sin_to_cos: bool) -> None:
        super().__init__()
        self.weight = parameter(frequencies)
        self.flip_sin_to_cos = flip_sin_to_cos

    def forward(self, x: Tensor) -> Tensor:
        angle = x.float()[:, None] * self.weight.float()[None] * 2 * math.pi
        pair = (angle.cos(), angle.sin()) if self.flip_sin_to_cos else (angle.sin(), angle.cos())
        return torch.cat(pair, dim=-1)


class Sinusoids(nn.Module):
    """`timestep_embedding` as a module; float32 in networks of any dtype."""

    def __init__(self, channels: int, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.channels, self.flip_sin_to_cos, self.freq_shift = channels, flip_sin_to_cos, freq_shift

    def forward(self, x: Tensor) -> Tensor:
        return timestep_embedding(x, self.channels, self.flip_sin_to_cos, self.freq_shift)


class GuidanceSinusoids(nn.Module):
    """`guidance_embedding` as a module; float32 too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, guidance: Tensor) -> Tensor:
        return guidance_embedding(guidance, self.channels)


# Both embeddings have diffusers' order of operations: at an angle of 1,000, the last bit of a frequency makes 1e-4.


def timestep_embedding(timesteps: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of (N,) numbers: (N, channels) in float32. Formula: Ho et al. 2020, arXiv:2006.11239."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angle = timesteps.float()[:, None] * torch.exp(exponent / (half - freq_shift))
    pair = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(pair, dim=1), (0, channels % 2))


def pooled_condition(pooled: Tensor) -> Tensor:
    """The latent x2 upscaler's `timestep_cond` (R, 128 + P) of pooled text (R, P): before it cosines and sines of a
    noise level, which is 0. Source: diffusers' StableDiffusionLatentUpscalePipeline."""
    level = pooled.new_zeros(len(pooled), NOISE_LEVEL_CHANNELS)
    level[:, : NOISE_LEVEL_CHANNELS // 2] = 1
    return torch.cat((level, pooled), dim=1)


def guidance_embedding(guidance: Tensor, channels: int) -> Tensor:
    """Sinusoids of (N,) guidance scales: (N, channels) in float32. Formula: diffusers' LCM pipeline."""
    half = channels // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=guidance.device) * -step)
    angle = ((guidance.float() - 1) * 1000)[:, None] * frequency
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=1), (0, channels % 2))
