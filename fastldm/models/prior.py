"""The prior of unCLIP and Kandinsky: from a text to the vector of a picture of it, partially evaluated.

Its tokens are the text, the text's vector, the time, the noisy vector, and one whose output is the prediction (without
which it is the noisy vector's):

    text (num_embeddings) | vector | time | noisy | predicted

Attention is causal, so that what the first tokens are does not depend on the later ones. All but the last two are
computed at admission, as keys and values of each layer:

    kv = prior.cross_kv(encoder_hidden_states, proj_embedding, text_len)    # once per prompt
    rows = prior.time_rows(timesteps, kv, kv_len)                           # once per schedule and prompt
    out = prior.step(x, rows[i : i + 1], kv, kv_len=kv_len)                 # each step, of two tokens in place of 81

Parameter names are those of diffusers' PriorTransformer. Source: Ramesh et al. 2022, arXiv:2204.06125.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import CheckpointError, InputError
from fastldm.models.config_fields import LAYERS, WIDTH, only
from fastldm.models.embeddings import Sinusoids, TimeEmbedding
from fastldm.models.layers import Attention, Beside, LayerNorm, Layers, Linear, attention, parameter
from fastldm.reading import Field, Integer, Maybe, read_fields

_FIELDS = only(
    {
        "_class_name": ("PriorTransformer",),
        "added_emb_type": ("prd", None),
        "embedding_proj_norm_type": (None, "layer"),
        "encoder_hid_proj_type": ("linear", None),
        "norm_in_type": (None, "layer"),
        "time_embed_act_fn": ("silu", "gelu"),
    }
) | {
    "num_attention_heads": Field(WIDTH, 32),
    "attention_head_dim": Field(WIDTH, 64),
    "num_layers": Field(LAYERS, 20),
    "embedding_dim": Field(WIDTH, 768),
    "num_embeddings": Field(WIDTH, 77),
    "additional_embeddings": Field(Integer(0, 64), 4),
    "embedding_proj_dim": Field(Maybe(WIDTH), None),
    "clip_embed_dim": Field(Maybe(WIDTH), None),
    "time_embed_dim": Field(Maybe(WIDTH), None),
}


@dataclass(frozen=True)
class PriorConfig:
    """A prior (diffusers' PriorTransformer)."""

    channels: int
    heads: int
    layers: int
    tokens: int  # of a text
    text_dim: int  # channels of the text, and of the noisy vector
    vector_dim: int  # channels of the text's vector
    out_dim: int  # channels of the predicted vector
    norm_in: bool
    vector_norm: bool
    time_act: str
    time_dim: int  # channels within the time's embedding
    text_proj: bool  # whether the text is projected; else it has as many channels as the network
    predicted: bool  # whether there is a token for the prediction

    @property
    def time_channels(self) -> int:
        """Channels of a time row: its key and value in each layer."""
        return 2 * self.channels * self.layers

    @property
    def cross_widths(self) -> tuple[int, ...]:
        """Channels of the keys of a prompt in each layer."""
        return (self.channels,) * self.layers

    @property
    def latent_channels(self) -> int:
        """Of a vector as a batch has it, a picture of one channel, (1, 1, D)."""
        return 1

    in_channels = latent_channels
    self_attentions: ClassVar[tuple[str, ...]] = ()  # that can be perturbed

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> PriorConfig:
        """Read diffusers' prior/config.json; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _FIELDS, source)
        channels, width = values["num_attention_heads"] * values["attention_head_dim"], values["embedding_dim"]
        predicted, text_proj = values["added_emb_type"] is not None, values["encoder_hid_proj_type"] is not None
        if values["additional_embeddings"] != 3 + predicted:
            raise CheckpointError(
                f"{source}: 'additional_embeddings' is {values['additional_embeddings']}, expected {3 + predicted}, "
                "the tokens that follow the text"
            )
        if not text_proj and width != channels:
            raise CheckpointError(
                f"{source}: 'encoder_hid_proj_type' is None, and 'embedding_dim' {width}: expected {channels}, the "
                "network's channels, or a projection"
            )
        return cls(
            channels=channels,
            heads=values["num_attention_heads"],
            layers=values["num_layers"],
            tokens=values["num_embeddings"],
            text_dim=width,
            vector_dim=values["embedding_proj_dim"] or width,
            out_dim=values["clip_embed_dim"] or width,
            norm_in=values["norm_in_type"] is not None,
            vector_norm=values["embedding_proj_norm_type"] is not None,
            time_act=values["time_embed_act_fn"],
            time_dim=values["time_embed_dim"] or channels,
            text_proj=text_proj,
            predicted=predicted,
        )


class Prior(nn.Module):
    """The network of a PriorConfig."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.time_proj = Sinusoids(channels, flip_sin_to_cos=True, freq_shift=0)
        self.time_embedding = TimeEmbedding(channels, channels, act=config.time_act, hidden=config.time_dim)
        self.proj_in = Linear(config.text_dim, channels)
        self.embedding_proj_norm = LayerNorm(config.vector_dim) if config.vector_norm else None
        self.embedding_proj = Linear(config.vector_dim, channels)
        self.encoder_hidden_states_proj = Linear(config.text_dim, channels) if config.text_proj else None
        self.positional_embedding = parameter(1, config.tokens + 3 + config.predicted, channels)
        self.prd_embedding = parameter(1, 1, channels) if config.predicted else None
        self.transformer_blocks: Layers[PriorLayer] = Layers(
            PriorLayer(channels, config.heads) for _ in range(config.layers)
        )
        self.norm_in = LayerNorm(channels) if config.norm_in else None
        self.norm_out = LayerNorm(channels)
        self.proj_to_clip_embeddings = Linear(channels, config.out_dim)
        self.clip_mean, self.clip_std = parameter(1, config.out_dim), parameter(1, config.out_dim)
        self.beside = Beside()

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.proj_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return self.proj_in.weight.dtype

    def cross_kv(
        self, encoder_hidden_states: Tensor, proj_embedding: Tensor, text_len: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Keys and values of prompts in each layer: texts (B, T, D), their vectors (B, P), and text_len (B,) int32, the
        number of visible tokens, by default all -> tensors (B, 1 + T, 2C) = (k | v), the vector's and then the text's.

        Of these 1 + text_len are visible: that is `kv_len` below. InputError for another T than the config's.
        """
        tokens = self.config.tokens
        if encoder_hidden_states.shape[1] != tokens:
            raise InputError(f"the text has {encoder_hidden_states.shape[1]} tokens, and this prior reads {tokens}")
        vector = proj_embedding if self.embedding_proj_norm is None else self.embedding_proj_norm(proj_embedding)
        text = encoder_hidden_states
        if self.encoder_hidden_states_proj is not None:
            text = self.encoder_hidden_states_proj(text)
        text = self._placed(text, 0)
        vector = self._placed(self.embedding_proj(vector)[:, None], tokens)
        kv_len = None if text_len is None else (text_len + 1).int()
        kv = []
        for layer in self.transformer_blocks:
            # A visible token of the text comes before those that are not; the vector's follows them all.
            q, k, v = layer.attn1.qkv(layer.norm1(text))
            own, own_k, own_v = layer.attn1.qkv(layer.norm1(vector))
            k, v = torch.cat((own_k, k), dim=1), torch.cat((own_v, v), dim=1)
            kv.append(torch.cat((k, v), dim=2))
            if len(kv) == self.config.layers:  # what the last one makes nobody reads
                break
            text = layer.rest(text, attention(q, k[:, 1:], v[:, 1:], layer.attn1.heads, causal=True))
            vector = layer.rest(vector, attention(own, k, v, layer.attn1.heads, kv_len=kv_len))
        return tuple(kv)

    def time_rows(
        self,
        timesteps: Tensor,
        cross_kv: Sequence[Tensor],
        *,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Keys and values of the time in each layer: timesteps (R,) -> (R, S). The time reads the prompt: row r that of
        slots[r] in cross_kv, by default its own."""
        embedded = self.time_proj(timesteps).to(self.proj_in.weight.dtype)
        time = self._placed(self.time_embedding(embedded)[:, None], self.config.tokens + 1)
        kv_len = _chosen(kv_len, slots)
        rows = []
        for layer, kv in zip(self.transformer_blocks, cross_kv, strict=True):
            q, *own = layer.attn1.qkv(layer.norm1(time))
            rows += [own[0][:, 0], own[1][:, 0]]
            if len(rows) == 2 * self.config.layers:
                break
            k, v = (torch.cat(pair, dim=1) for pair in zip(own, _chosen(kv, slots).chunk(2, dim=2), strict=True))
            attended = attention(q, k, v, layer.attn1.heads, kv_len=None if kv_len is None else kv_len + 1)
            time = layer.rest(time, attended)
        return torch.cat(rows, dim=1)

    def step(
        self,
        model_input: Tensor,
        temb_row: Tensor,
        cross_kv: Sequence[Tensor],
        *,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network: noisy vectors (B, D), temb_row (B, S) of time_rows, cross_kv of B prompts -> the
        predicted vectors (B, out_dim), in the units of `clip_mean` and `clip_std`. Vectors may be pictures too, as
        batches have them: (B, 1, 1, D) -> (B, 1, 1, out_dim).

        kv_len (prompts,) int32: of the keys in cross_kv, how many are visible. slots (B,) int32: the prompt in cross_kv
        that each row reads, by default its own.
        """
        noisy = self.proj_in(model_input.flatten(1))[:, None]
        tokens = [noisy] if self.prd_embedding is None else [noisy, self.prd_embedding.expand_as(noisy)]
        x = self._placed(torch.cat(tokens, dim=1), self.config.tokens + 2)
        kv_len, count = _chosen(kv_len, slots), len(tokens)
        time = temb_row[:, None].chunk(2 * self.config.layers, dim=2)
        for i, (layer, kv) in enumerate(zip(self.transformer_blocks, cross_kv, strict=True)):
            q, *own = layer.attn1.qkv(layer.norm1(x))
            # The key of the predicted token comes first, for it alone reads that: token j all but the first few.
            k, v = (
                torch.cat((mine.flip(1), of_time, of_prompt), dim=1)
                for mine, of_time, of_prompt in zip(
                    own, time[2 * i : 2 * i + 2], _chosen(kv, slots).chunk(2, dim=2), strict=True
                )
            )
            heads = layer.attn1.heads
            attended = [
                attention(
                    q[:, j : j + 1],
                    k[:, count - 1 - j :],
                    v[:, count - 1 - j :],
                    heads,
                    kv_len=None if kv_len is None else kv_len + 2 + j,
                )
                for j in range(count)
            ]
            x = layer.rest(x, torch.cat(attended, dim=1))
        predicted = self.proj_to_clip_embeddings(self.norm_out(x[:, -1]))
        return predicted.view(*model_input.shape[:-1], -1)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """The full network with diffusers' arguments: hidden_states (B, D), timestep () or (B,), proj_embedding (B, P),
        encoder_hidden_states (B, T, D), attention_mask (B, T), which is true of the first tokens -> (B, out_dim).

        InputError for other masks. (Without one, diffusers' attention is not causal; its pipelines have one.)
        """
        visible = attention_mask.bool()
        text_len = visible.sum(dim=1, dtype=torch.int32)
        if not torch.equal(visible, torch.arange(visible.shape[1], device=visible.device) < text_len[:, None]):
            raise InputError("attention_mask is not true of the first tokens alone")
        kv, kv_len = self.cross_kv(encoder_hidden_states, proj_embedding, text_len), text_len + 1
        timesteps = torch.as_tensor(timestep, device=hidden_states.device).expand(hidden_states.shape[0])
        return self.step(hidden_states, self.time_rows(timesteps, kv, kv_len=kv_len), kv, kv_len=kv_len)

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Predicted vectors (B, out_dim) as those of CLIP's image encoder."""
        return prior_latents * self.clip_std + self.clip_mean

    def _placed(self, x: Tensor, first: int) -> Tensor:
        """Tokens (B, N, C) at their places, the first of which is given."""
        x = x + self.positional_embedding[:, first : first + x.shape[1]]
        return x if self.norm_in is None else self.norm_in(x)


class PriorNetwork(Protocol):
    """What replaces a Prior, as the networks of a bundle do."""

    beside: Beside

    @property
    def config(self) -> PriorConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def cross_kv(
        self, encoder_hidden_states: Tensor, proj_embedding: Tensor, text_len: Tensor | None = None
    ) -> tuple[Tensor, ...]: ...

    def time_rows(
        self,
        timesteps: Tensor,
        cross_kv: Sequence[Tensor],
        *,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor: ...

    def step(
        self, model_input: Tensor, temb_row: Tensor, cross_kv: Sequence[Tensor], *, kv_len: Tensor | None = None
    ) -> Tensor: ...

    def post_process_latents(self, prior_latents: Tensor) -> Tensor: ...


class PriorLayer(nn.Module):
    """Self-attention and a perceptron; diffusers' BasicTransformerBlock with GELU."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads, channels, bias=True)
        self.norm3 = LayerNorm(channels)
        self.ff = Perceptron(channels)

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (B, N, C) and what attention has of it -> the layer's output."""
        x = self.attn1.to_out[0](attended, residual=x)
        return self.ff(self.norm3(x), residual=x)


class Perceptron(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": Linear(channels, 4 * channels)})
        self.net = nn.ModuleDict({"0": first, "2": Linear(4 * channels, channels)})

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        first: Any = self.net["0"]
        return self.net["2"](F.gelu(first["proj"](x)), residual=residual)


def _chosen(x: Any, slots: Tensor | None) -> Any:
    """The entries of x for each row."""
    return x if x is None or slots is None else x[slots]
