"""The networks and sizes that kernels are compiled and timed at: published architectures, no weights.

for workload in WORKLOADS.values():
    for call in calls(workload, torch.float16): ...      # each op call, with shapes, strides and its count
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.kernels import dispatch
from fastldm.kernels.attention import attention
from fastldm.models.config import TextConfig, UNetConfig, VAEConfig
from fastldm.models.layers import Linear
from fastldm.planning import dry_run
from fastldm.profiling.contender import SD15 as _SD15
from fastldm.runtime.eight_bits import large_products, quantize, switched

_CROSS_DOWN, _DOWN, _CROSS_UP, _UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"

SD15 = UNetConfig.from_dict(_SD15, "SD1.5")
TINY = UNetConfig.from_dict(  # runs on any machine in milliseconds
    _SD15
    | {"block_out_channels": [16, 32, 48, 48], "sample_size": 8, "norm_num_groups": 8, "cross_attention_dim": 32}
    | {"attention_head_dim": 2},
    "tiny",
)
SD_TURBO = UNetConfig.from_dict(
    _SD15 | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "SD-Turbo",
)
SDXL = UNetConfig.from_dict(
    {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN],
        "up_block_types": [_CROSS_UP, _CROSS_UP, _UP],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "SDXL",
)
VAE = VAEConfig.from_dict(
    {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "VAE",
)
TINY_VAE = replace(VAE, channels=(16, 16, 16, 16), norm_groups=8, layers_per_block=1)
_CLIP: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_L = TextConfig.from_dict(_CLIP | {"num_hidden_layers": 12}, "CLIP-L")
TINY_CLIP = replace(CLIP_L, hidden=32, intermediate=64, heads=2, layers=2)
CLIP_H = TextConfig.from_dict(
    {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    | {"hidden_act": "gelu"},
    "OpenCLIP-H",
)
CLIP_G = TextConfig.from_dict(
    {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    | {"hidden_act": "gelu", "projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]},
    "OpenCLIP-bigG",
)


def in_eight_bits(unet: nn.Module, run: Callable[[], object], **least: int) -> Callable[[], None]:
    """The run with the network's large layers in fp8, which it has for as long. `least` as of `large_products`."""
    layers: list[Linear] = []
    for group, _ in large_products(unet, run, **least):
        quantize(group, 1.0)
        layers += group
    bits = [layer.eight_bits for layer in layers]
    for layer in layers:
        layer.eight_bits = None

    def eight() -> None:
        with switched(layers, bits):
            run()

    return eight


# name -> a function that runs the workload on the meta device in a dtype. U-Nets take one guided step: two rows.
WORKLOADS: dict[str, Callable[[torch.dtype], None]] = {
    "sd15-512 step": lambda dtype: dry_run.run_unet(SD15, height=64, width=64, rows=2, tokens=77, dtype=dtype),
    "sdxl-1024 step": lambda dtype: dry_run.run_unet(SDXL, height=128, width=128, rows=2, tokens=77, dtype=dtype),
    "sdxl-1024 step, fp8": lambda dtype: in_eight_bits(
        dry_run.network(SDXL, dtype),
        lambda: dry_run.run_unet(SDXL, height=128, width=128, rows=2, tokens=77, dtype=dtype),
    )(),
    "sd15-512 step, adapters": lambda dtype: dry_run.run_unet(
        SD15, height=64, width=64, rows=2, tokens=77, dtype=dtype, lora=True
    ),
    "sdxl-1024 step, adapters": lambda dtype: dry_run.run_unet(
        SDXL, height=128, width=128, rows=2, tokens=77, dtype=dtype, lora=True
    ),
    "vae-512 decode": lambda dtype: dry_run.run_decoder(VAE, height=64, width=64, batch=1, dtype=dtype),
    "vae-1024 decode": lambda dtype: dry_run.run_decoder(VAE, height=128, width=128, batch=1, dtype=dtype),
    "clip-l": lambda dtype: dry_run.run_text([CLIP_L], batch=2, dtype=dtype),
}
# The same for small machines and little time: every op, and attention at each kind of head dim.
SMALL: dict[str, Callable[[torch.dtype], None]] = {
    "tiny step": lambda dtype: dry_run.run_unet(TINY, height=8, width=8, rows=2, tokens=77, dtype=dtype),
    "tiny decode": lambda dtype: dry_run.run_decoder(TINY_VAE, height=4, width=4, batch=1, dtype=dtype),
    "tiny step, fp8": lambda dtype: in_eight_bits(
        dry_run.network(TINY, dtype),
        lambda: dry_run.run_unet(TINY, height=8, width=8, rows=2, tokens=77, dtype=dtype),
        least_weight=1,
        least_rows=64,
    )(),
    "tiny step, adapters": lambda dtype: dry_run.run_unet(
        TINY, height=8, width=8, rows=2, tokens=77, dtype=dtype, lora=True
    ),
    "heads": lambda dtype: _heads(dtype),
}


def _heads(dtype: torch.dtype) -> None:
    """Self- and cross-attention of 64 queries, at head dims that take one tile and two."""
    for dim in (40, 64, 80, 160):
        q = torch.empty(2, 64, dim, dtype=dtype, device="meta")
        for keys in (192, 77):
            kv = torch.empty(2, keys, dim, dtype=dtype, device="meta")
            attention(q, kv, kv, 1)


@dataclass(frozen=True)
class Meta:
    """A tensor's description."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), tuple(value.stride()), value.dtype)
        return value

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Call:
    """A call of an op, with descriptions of its tensors."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def arguments(self, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with new tensors on `device`, from the op's `example`."""

        def make(value: Any) -> Any:
            return value.make() if isinstance(value, Meta) else value

        args, kwargs = tuple(map(make, self.args)), {name: make(value) for name, value in self.kwargs}
        return (args, kwargs) if device == "meta" else dispatch.OPS[self.op].example(args, kwargs, device)

    @property
    def cost(self) -> dispatch.Cost:
        args, kwargs = self.arguments("meta")
        return dispatch.OPS[self.op].cost(*args, **kwargs)

    @property
    def shape_class(self) -> str:
        args, kwargs = self.arguments("meta")
        return dispatch.OPS[self.op].shape_class(*args, **kwargs)

    def __str__(self) -> str:
        tensors = [value for value in (*self.args, *(value for _, value in self.kwargs)) if isinstance(value, Meta)]
        return f"{self.op} " + " ".join("x".join(map(str, t.shape)) for t in tensors[:2])


def calls(workload: str, dtype: torch.dtype) -> Counter[Call]:
    """Each distinct op call of a workload on a GPU, with its count; 0 for those that it makes only where a library
    takes the place of a fused kernel.
    """
    counts: Counter[Call] = Counter()

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = tuple((name, Meta.of(value)) for name, value in sorted(kwargs.items()))
        counts[Call(op.name, tuple(map(Meta.of, args)), named)] += by_default

    with dispatch.targeting(dispatch.Target(90)), dispatch.observe(watch):
        by_default = 1
        (WORKLOADS | SMALL)[workload](dtype)
        by_default = 0
        for call in [call for call in counts if call.cost.flop]:
            args, kwargs = call.arguments("meta")
            with dispatch.use("torch"):
                dispatch.OPS[call.op].reference(*args, **kwargs)
    return counts


@torch.no_grad()
def with_random_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a network from the meta device to `device`, with seeded weights whose scale keeps activations near one."""
    network.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in network.named_parameters():
        p.normal_(0, p[0].numel() ** -0.5 if p.dim() > 1 else 0.1, generator=generator)
        if "norm" in name and name.endswith("weight"):
            p += 1
    return network
