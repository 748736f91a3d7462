"""The modules of a model that adapters change, and the names that files have for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from fastldm.loading.key_names import unet_name
from fastldm.loading.spec import Spec
from fastldm.models.clip import Embedding
from fastldm.models.config import TextConfig, UNetConfig
from fastldm.models.embeddings import ClassEmbedding
from fastldm.models.text_encoders import text_encoder
from fastldm.models.unet import UNet


class Target(NamedTuple):
    """A module of a model."""

    component: str
    """"unet", "text_encoder" or "text_encoder_2"."""
    module: str
    """Its dotted path in the component, which is that of diffusers or transformers."""

    def __str__(self) -> str:
        return f"{self.component}.{self.module}"


@dataclass(frozen=True)
class Module:
    """What an adapter must fit."""

    weight: tuple[int, ...]
    """(out, in), (out, in, kh, kw), or (channels,) of a norm."""
    bias: bool


@dataclass(frozen=True)
class Modules:
    """All linear layers, convolutions and norms of a model's U-Net and text encoders."""

    modules: Mapping[Target, Module]
    layers_per_block: int | None
    """Of the U-Net, if it is the same on all levels, as the original layout numbers its blocks."""
    _names: Mapping[tuple[str, str], Target]

    def find(self, component: str, name: str) -> Target | None:
        """The module that a file calls `name`, with "_" or "." between the parts of its path, or None.

        It may be a path of diffusers or transformers, of the original layout (`input_blocks_1_1_proj_in`), or without
        `text_model.`.
        """
        flat = name.replace(".", "_")
        for spelled in (flat, f"text_model_{flat}", f"{flat}_0"):  # the last: `to_out` of `to_out.0`
            if target := self._names.get((component, spelled)):
                return target
        if component == "unet" and self.layers_per_block is not None:
            return self._names.get((component, from_original(flat, self.layers_per_block) or ""))
        return None


_ORIGINAL_HEAD = re.compile(r"(input_blocks|output_blocks)_(\d{1,4})_([012])_(.+)|middle_block_([012])_(.+)")
_ORIGINAL_REST = re.compile(r"(in_layers|out_layers|emb_layers)_(\d)")
_ORIGINAL_ENDS = {
    "time_embed_0": "time_embed.0",
    "time_embed_2": "time_embed.2",
    "label_emb_0_0": "label_emb.0.0",
    "label_emb_0_2": "label_emb.0.2",
    "input_blocks_0_0": "input_blocks.0.0",
    "out_0": "out.0",
    "out_2": "out.2",
}


def from_original(name: str, layers_per_block: int) -> str | None:
    """diffusers' path with "_" for "." of a U-Net's module in the original layout, spelled so too; None for others."""
    dotted = _ORIGINAL_ENDS.get(name)
    if dotted is None:
        match = _ORIGINAL_HEAD.fullmatch(name)
        if match is None:
            return None
        rest = _ORIGINAL_REST.sub(r"\1.\2", match[4] or match[6])
        side = f"{match[1]}.{match[2]}.{match[3]}" if match[1] else f"middle_block.{match[5]}"
        dotted = f"{side}.{rest}"
    names = unet_name(f"{dotted}.weight", layers_per_block)
    return names[0].removesuffix(".weight").replace(".", "_") if names else None


def modules_of(spec: Spec) -> Modules:
    """The modules of a model, from its configs: no weights are read. Of text encoders CLIP's alone, as in diffusers."""
    texts = zip(spec.encoder_names, spec.text, strict=True)
    return of_configs(spec.unet, tuple((name, text) for name, text in texts if not text.kind))


@lru_cache(maxsize=4)
def of_configs(unet: UNetConfig, texts: tuple[tuple[str, TextConfig], ...]) -> Modules:
    """The same from the configs of the U-Net and the named text encoders."""
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"unet": UNet(unet)} | {name: text_encoder(config) for name, config in texts}
    modules = {
        Target(component, path): Module(tuple(module.weight.shape), getattr(module, "bias", None) is not None)
        for component, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and not isinstance(module, Embedding | ClassEmbedding)
    }
    depths = {len(level.depths) for level in unet.down}
    names = {(target.component, target.module.replace(".", "_")): target for target in modules}
    return Modules(modules, depths.pop() if len(depths) == 1 else None, names)
