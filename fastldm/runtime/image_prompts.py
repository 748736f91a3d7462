"""IP-Adapters of a loaded model, and what a request has of them.

    ImagePrompts    those that are loaded, with the image encoder and the scales that requests have by default
    PictureUse      one of them in a request: its pictures and its scale in each cross-attention
    start_pictures  keys and values of a request, computed once

What is loaded may be changed by any thread; the networks are the worker's. A request keeps what it was submitted with.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm import checks
from fastldm.adapters.ip_adapter import ImageAdapter
from fastldm.adapters.selection import Weight, expand
from fastldm.conditioning.image_encoder import ImageEncoder, read_pictures
from fastldm.device import send
from fastldm.errors import InputError
from fastldm.kernels.dispatch import next_power_of_2
from fastldm.metadata import control_unit
from fastldm.models.config import UNetConfig
from fastldm.request import Request
from fastldm.runtime.denoise import PicturesKV

_LEAST_TOKENS = 16  # of a slot: four pictures of "base", one of "plus"
MAX_PICTURES = 64
"""Limit for the pictures of an adapter in a request, whose tokens every step attends to."""


class Loaded(NamedTuple):
    """What is loaded at one time."""

    adapters: tuple[ImageAdapter, ...] = ()
    weights: tuple[Weight, ...] = ()
    """What requests have that do not say: a number, or one by block."""
    encoder: ImageEncoder | None = None


@dataclass(frozen=True, eq=False)
class PictureUse:
    """An adapter in a request."""

    adapter: ImageAdapter
    scales: tuple[float, ...]
    """Of each cross-attention, in network order."""
    pixels: Tensor | None
    """(P, 3, S, S) float32: the image encoder's input, on the host."""
    embeds: Tensor | None
    """(1 or 2, P, D) or (1 or 2, P, L, D): its output, in place of pixels."""
    encoder: ImageEncoder | None
    unit: str = ""
    """For the parameters of an image."""


@dataclass(frozen=True, eq=False)
class PictureSelection:
    """The adapters of a request, with its pictures. Never changes."""

    uses: tuple[PictureUse, ...]

    @property
    def units(self) -> list[str]:
        """For the parameters of an image."""
        return [use.unit for use in self.uses]

    def released(self) -> ReleasedSelection:
        """The same for a result, which may be kept for long."""
        return ReleasedSelection(
            tuple((weakref.ref(use.adapter), replace(use, adapter=None, encoder=None)) for use in self.uses)  # type: ignore
        )


@dataclass(frozen=True, eq=False)
class ReleasedSelection:
    """A selection that does not hold its networks: a request that is done."""

    uses: tuple[tuple[weakref.ref[ImageAdapter], PictureUse], ...]

    @property
    def units(self) -> list[str]:
        """For the parameters of an image."""
        return [use.unit for _, use in self.uses]


class ImagePrompts:
    """The IP-Adapters of a model."""

    def __init__(self, config: UNetConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._loaded = Loaded()

    @property
    def loaded(self) -> Loaded:
        with self._lock:
            return self._loaded

    def replace(self, adapters: Sequence[ImageAdapter], encoder: ImageEncoder | None) -> None:
        """Load these in place of others, with scale 1."""
        with self._lock:
            self._loaded = Loaded(tuple(adapters), (1.0,) * len(adapters), encoder)

    def set_scale(self, scale: Weight | Sequence[Weight]) -> None:
        """The scale of requests that do not say: one for all adapters, or a list of one for each.

        InputError for other numbers of scales, and for blocks that the model does not have."""
        with self._lock:
            weights = _weights(scale, len(self._loaded.adapters), "scale")
            for weight in weights:
                cross_scales(weight, self._config)
            self._loaded = self._loaded._replace(weights=weights)

    def complete(self, request: Request, guided: bool) -> Request:
        """The request with its pictures read. guided: whether it needs a negative branch.

        InputError for pictures where no adapter is loaded, and for pictures, embeddings and scales that do not fit."""
        loaded = self.loaded
        given, embeds = request.ip_adapter_image, request.ip_adapter_image_embeds
        if isinstance(given, ReleasedSelection):
            again = []
            for reference, use in given.uses:
                adapter = reference()
                if adapter is None or adapter not in loaded.adapters or (use.embeds is None and not loaded.encoder):
                    raise InputError("the IP-Adapter of this request is not loaded any more")
                again.append(replace(use, adapter=adapter, encoder=loaded.encoder))
            given = PictureSelection(tuple(again))
        if isinstance(given, PictureSelection):  # of a request that was completed before
            for use in given.uses:
                if use.embeds is not None:
                    _check_embeds(use.embeds, use.adapter, guided)
            return request.replace(ip_adapter_image=given)
        if given is None and embeds is None:
            return request.replace(ip_adapter_scale=None)
        name = "ip_adapter_image" if embeds is None else "ip_adapter_image_embeds"
        if not loaded.adapters:
            raise InputError(f"{name} was given, and no IP-Adapter is loaded: load_ip_adapter loads one")
        scale = request.ip_adapter_scale
        weights = loaded.weights if scale is None else _weights(scale, len(loaded.adapters), "ip_adapter_scale")
        items = _each(given if embeds is None else list(embeds), len(loaded.adapters), name)
        uses = []
        for adapter, weight, item in zip(loaded.adapters, weights, items, strict=True):
            scales = cross_scales(weight, self._config)
            if item is None or not any(scales):
                continue
            pixels = embedded = None
            if embeds is not None:
                embedded = _check_embeds(item, adapter, guided)
            elif loaded.encoder is None:
                raise InputError(
                    "ip_adapter_image was given, and no image encoder was loaded: give ip_adapter_image_embeds, or "
                    "load_ip_adapter with image_encoder_folder"
                )
            else:
                pictures = read_pictures(item, "ip_adapter_image", MAX_PICTURES)
                pixels = loaded.encoder.pixels(pictures, "ip_adapter_image")
            uses.append(PictureUse(adapter, scales, pixels, embedded, loaded.encoder, _unit(adapter, weight)))
        selection = PictureSelection(tuple(uses)) if uses else None
        return request.replace(ip_adapter_image=selection, ip_adapter_image_embeds=None, ip_adapter_scale=None)

    def capacity(self, tokens: Sequence[int]) -> list[int]:
        """For each IP-Adapter of a slot, how many tokens to have room for: those of a run, and some for others' that
        may join."""
        loaded = [adapter.network.config.tokens for adapter in self.loaded.adapters]
        most = [max(pair) for pair in itertools.zip_longest(tokens, loaded, fillvalue=_LEAST_TOKENS)]
        return [token_room(count) for count in most]


def token_room(tokens: int) -> int:
    """For how many tokens a slot has room that has so many."""
    return next_power_of_2(max(tokens, _LEAST_TOKENS))


def _unit(adapter: ImageAdapter, weight: Weight) -> str:
    """AUTOMATIC1111 names the module by the image encoder. A weight by block has no place there."""
    config = adapter.network.config
    big = config.image_channels == (1280 if config.kind == "base" else 1664)
    encoder = "sdxl" if big else "sdxl_plus_vith" if config.context == 2048 else "sd15"
    settings = {} if isinstance(weight, Mapping) else {"Weight": float(weight)}
    return control_unit(f"ip-adapter_clip_{encoder}", adapter.name, adapter.short_hash, settings)


def start_pictures(request: Request, guided: bool, device: torch.device, dtype: torch.dtype) -> PicturesKV:
    """Keys and values of a completed request: for each adapter and cross-attention (1 or 2, T, 2C), of the negative
    branch, where guidance needs one, and of the pictures."""
    selection = request.ip_adapter_image
    if not isinstance(selection, PictureSelection):
        return ()
    result = []
    for use in selection.uses:
        network = use.adapter.network
        embeds = embeds_of(use, guided, device, dtype)
        tokens = network.tokens(embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])  # (branches, P, T, context)
        result.append(network.kv(tokens.flatten(1, 2), use.scales))
    return tuple(result)


def per_image(pictures: PicturesKV, batch: int) -> PicturesKV:
    """The rows of so many images, all negatives first."""
    if batch == 1:
        return pictures
    return tuple(
        tuple(None if kv is None else kv.repeat_interleave(batch, dim=0) for kv in layers) for layers in pictures
    )


def embeds_of(use: PictureUse, guided: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The image encoder's output (1 or 2, P, D) or (1 or 2, P, L, D), the negative branch first: for "base" zeros, else
    the encoder's of empty pictures."""
    if use.embeds is not None:
        return send(use.embeds[-2 if guided else -1 :], device, dtype)
    assert use.encoder is not None
    assert use.pixels is not None
    hidden = use.adapter.network.config.kind != "base"
    pixels = send(use.pixels, device, dtype)
    embeds = use.encoder.embeds(pixels, hidden)
    if not guided:
        return embeds[None]
    negative = use.encoder.embeds(torch.zeros_like(pixels), hidden) if hidden else torch.zeros_like(embeds)
    return torch.stack((negative, embeds))


def cross_scales(weight: Weight, config: UNetConfig) -> tuple[float, ...]:
    """The scale of each cross-attention, in network order: a number for all, or diffusers' dictionary by block, such as
    {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}}; what it does not name has 0."""
    if not isinstance(weight, Mapping):
        return (float(weight),) * len(config.cross_widths)
    scales = expand({"unet": {"down": 0.0, "mid": 0.0, "up": 0.0, **weight}}, config, "IP-Adapter")
    sides = [("down_blocks.{}", config.down), ("mid_block", (config.mid,)), ("up_blocks.{}", config.up)]
    return tuple(
        scales.get(f"unet.{name.format(i)}.attentions.{k}", 0.0)
        for name, levels in sides
        for i, level in enumerate(levels)
        for k, depth in enumerate(depth for depth in level.depths if depth is not None)
        for _ in range(depth)
    )


def _weights(scale: Weight | Sequence[Weight], count: int, name: str) -> tuple[Weight, ...]:
    """One for each adapter."""
    weights: tuple[Any, ...] = tuple(scale) if isinstance(scale, (list, tuple)) else (scale,) * count
    if len(weights) != count:
        raise InputError(f"{name} has {len(weights)} items for {count} IP-Adapters: give one, or one each")
    return weights


def _each(given: Any, count: int, name: str) -> list[Any]:
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(items) != count:
        what = "picture, or list of its pictures," if name == "ip_adapter_image" else "tensor"
        more = ", so several pictures for one are [[a, b]]" if name == "ip_adapter_image" else ""
        raise InputError(f"{name} is a list of {len(items)} for {count} IP-Adapters: give a {what} for each{more}")
    return items


def _check_embeds(item: Any, adapter: ImageAdapter, guided: bool) -> Tensor:
    config, name = adapter.network.config, "ip_adapter_image_embeds"
    shape = (None, None, config.image_channels) if config.kind == "base" else (None, None, None, config.image_channels)
    embeds = checks.finite(name, checks.tensor(name, item, shape)).detach()
    if len(embeds) > 2 or len(embeds) < 1 + guided or embeds.shape[1] > MAX_PICTURES:
        rows = "2 rows, of which the first is negative," if guided else "1 row"
        raise InputError(
            f"{name} has shape {tuple(embeds.shape)}: expected {rows} of up to {MAX_PICTURES} pictures in the first two"
        )
    return embeds
