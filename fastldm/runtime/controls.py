"""The ControlNets and T2I-Adapters of a loaded model, and what a request has of them.

    Controls     those that are attached, by name
    ControlSelection    those of a request, with its pictures and weights
    RunControl   a ControlNet in a run: its picture's embedding, time rows, keys and values, computed once
    RunFeatures  the features of all T2I-Adapters of a run, computed once

The list of controls may be changed by any thread; the networks are the worker's. A request keeps those that it was
submitted with.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastldm import image as images
from fastldm.adapters.control import Control
from fastldm.checks import show
from fastldm.device import send
from fastldm.errors import InputError
from fastldm.mask_crop import MaskCrop, mask_crop
from fastldm.metadata import control_unit
from fastldm.models.controlnet import ControlNet, ControlNetConfig
from fastldm.models.t2i_adapter import T2IAdapterConfig
from fastldm.models.unet import Residuals
from fastldm.request import MAX_CONTROLS, Request

_MAX_NAME = 190  # characters of a name that a file gives, without a number: requests and PNGs name it by at most 200


class Use(NamedTuple):
    """A control of a request."""

    name: str
    control: Control
    image: Any
    scale: float
    start: float = 0.0  # of a ControlNet, fractions of the steps
    end: float = 1.0

    @property
    def is_controlnet(self) -> bool:
        return isinstance(self.control.network.config, ControlNetConfig)

    def acts(self, row: int, rows: int) -> bool:
        """Whether it acts at a row of a table of so many; diffusers' rule, in floating point as there."""
        return self.scale != 0 and not (row / rows < self.start or (row + 1) / rows > self.end)


class ControlSelection(Mapping[str, Any]):
    """The controls of a request: a mapping of names to pictures. Never changes."""

    def __init__(self, uses: Sequence[Use], conditional: bool = False) -> None:
        """conditional: whether ControlNets act on conditional rows only."""
        self.uses, self.conditional = tuple(uses), conditional

    __eq__, __hash__ = object.__eq__, object.__hash__  # pictures are not compared

    def __getitem__(self, name: str) -> Any:
        return next(use.image for use in self.uses if use.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter([use.name for use in self.uses])

    def __len__(self) -> int:
        return len(self.uses)

    @property
    def configs(self) -> tuple[ControlNetConfig | T2IAdapterConfig, ...]:
        """Of their networks."""
        return tuple(use.control.network.config for use in self.uses)

    @property
    def units(self) -> list[str]:
        """For the parameters of an image."""
        mode = "ControlNet is more important" if self.conditional else "Balanced"
        return [
            control_unit(
                "none",
                use.name,
                use.control.short_hash,
                {"Weight": use.scale, "Guidance Start": use.start, "Guidance End": use.end, "Control Mode": mode},
            )
            for use in self.uses
        ]

    @property
    def multiple(self) -> int:
        """What width and height must be multiples of, in pixels."""
        return math.lcm(1, *(config.factor for config in self.configs if isinstance(config, T2IAdapterConfig)))

    def size(self, factor: int) -> tuple[int, int]:
        """(height, width) in pixels of the first picture, rounded down to what is possible with `factor` pixels per
        latent."""
        factor = math.lcm(factor, self.multiple)
        height, width = images.image_size(self.uses[0].image, "control_image")
        return max(height - height % factor, factor), max(width - width % factor, factor)


class Controls:
    """Those that are attached to a model, by name, in the order in which they were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attached: dict[str, Control] = {}

    @property
    def attached(self) -> dict[str, Control]:
        with self._lock:
            return dict(self._attached)

    def check_free(self, name: str) -> None:
        """InputError for a name that is taken."""
        _check_free(self.attached, name)

    def attach(self, name: str | None, control: Control) -> str:
        """Returns the name, by default the control's own, with a number behind it where that is taken. InputError for a
        name that is taken."""
        with self._lock:
            if len(self._attached) >= MAX_CONTROLS:
                raise InputError(f"{MAX_CONTROLS} controls are attached, the most there may be: detach some")
            if name is None:
                short = control.name[:_MAX_NAME]
                own = (short if k == 1 else f"{short}-{k}" for k in range(1, MAX_CONTROLS + 2))
                name = next(free for free in own if free not in self._attached)
            _check_free(self._attached, name)
            self._attached[name] = control
            return name

    def detach(self, names: Sequence[str] | None = None) -> None:
        """Some, or all. InputError for an unknown name, and none is detached."""
        with self._lock:
            names = list(self._attached) if names is None else names
            for name in names:
                _find(self._attached, name)
            for name in names:
                self._attached.pop(name, None)

    def complete(self, request: Request, xl: bool) -> Request:
        """The request with its controls, by name. xl: whether the model is SDXL.

        InputError for names that are not attached, and for numbers of pictures and weights that do not fit.
        """
        attached = self.attached
        if attached and request.control_image is None and _image_is_control(request):
            request = request.replace(control_image=request.image, image=None)
        if request.control_image is None:
            return request
        if isinstance(request.control_image, Mapping) and not request.control_image:
            return request.replace(control_image=None)
        if not attached:
            raise InputError("control_image was given, and no control is attached: attach_control attaches one")
        if request.controlnet_conditioning_scale is None:
            request = request.replace(controlnet_conditioning_scale=_default_scale(request, xl))
        chosen = _pictures(request.control_image, attached)
        controls = {name: _find(attached, name) for name in chosen}
        nets = [name for name, control in controls.items() if isinstance(control.network.config, ControlNetConfig)]
        rest = [name for name in controls if name not in nets]
        scales = _numbers(request, "controlnet_conditioning_scale", nets, attached)
        scales |= _numbers(request, "adapter_conditioning_scale", rest, attached)
        starts = _numbers(request, "control_guidance_start", nets, attached)
        ends = _numbers(request, "control_guidance_end", nets, attached)
        for name in nets:
            if starts[name] >= ends[name]:
                raise InputError(
                    f"control_guidance_start is {starts[name]:g} and control_guidance_end {ends[name]:g} for "
                    f"{show(name)}: expected start < end"
                )
        uses = [
            Use(name, control, chosen[name], scales[name], starts.get(name, 0.0), ends.get(name, 1.0))
            for name, control in controls.items()
        ]
        for use in uses:
            _check_count(use, request)
        # As diffusers, which asks the first of them.
        pooled = any(
            isinstance(config := controls[name].network.config, ControlNetConfig) and config.global_pool
            for name in nets[:1]
        )
        return request.replace(control_image=ControlSelection(uses, request.guess_mode or pooled))


def _image_is_control(request: Request) -> bool:
    """Whether `image` is what a ControlNet reads, as in diffusers' text to image with one."""
    return request.image is not None and request.strength is None and request.mask_image is None


def _default_scale(request: Request, xl: bool) -> float:
    """That of diffusers' ControlNet pipelines."""
    if request.image is None:
        return 1.0
    return 0.8 if request.mask_image is None else 1.0 if xl else 0.5


def _check_free(attached: Mapping[str, Control], name: str) -> None:
    if name in attached:
        raise InputError(f"a control named {show(name)} is attached: give another name, or detach_control it first")


def _find(attached: Mapping[str, Control], name: str) -> Control:
    if name not in attached:
        names = ", ".join(map(repr, attached)) or "none"
        raise InputError(f"there is no control named {show(name)}: attached are {names}")
    return attached[name]


def _pictures(given: Any, attached: Mapping[str, Control]) -> dict[str, Any]:
    """The pictures of `control_image` by name."""
    if isinstance(given, Mapping):
        return dict(given)
    if len(attached) == 1:
        return dict.fromkeys(attached, given)
    pictures = list(given) if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(picture, (list, tuple)) for picture in pictures):  # as in diffusers: for each prompt, of each
        lengths = {len(picture) if isinstance(picture, (list, tuple)) else 1 for picture in pictures}
        if lengths == {len(attached)}:
            return {name: [picture[k] for picture in pictures] for k, name in enumerate(attached)}
        pictures = []
    if len(pictures) != len(attached):
        raise InputError(
            f"control_image is {show(given)} for {len(attached)} attached controls: expected a list of a picture for "
            f"each, or a dictionary by name ({', '.join(map(repr, attached))})"
        )
    return dict(zip(attached, pictures, strict=True))


def _numbers(request: Request, field: str, names: Sequence[str], attached: Mapping[str, Control]) -> dict[str, float]:
    """A number for each of some controls of one kind."""
    value = getattr(request, field)
    if isinstance(value, Mapping):
        for name in value:
            _find(attached, name)
        for name in names:
            if name not in value:
                raise InputError(f"{field} has no number for {show(name)}: give one for each control of the request")
        return {name: value[name] for name in names}
    if isinstance(value, tuple):
        if names and len(value) != len(names):
            raise InputError(f"{field} has {len(value)} numbers for {len(names)} controls of this kind: give one each")
        return dict(zip(names, value, strict=False))
    return dict.fromkeys(names, value)


def _check_count(use: Use, request: Request) -> None:
    count, _, _ = images.measure(use.image, "control_image")
    if count not in (1, request.count, request.batch):
        raise InputError(
            f"control_image holds {count} pictures for {show(use.name)}: expected one, or one for each of "
            f"{request.count} prompts"
        )


# --- in a run ---


@dataclass(eq=False)
class RunControl:
    """A ControlNet in a run of B images."""

    network: ControlNet
    hint: Tensor  # (B, C, h, w): `ControlNet.hint`
    weights: Tensor  # (K,): of each residual
    acts: tuple[bool, ...]  # at each row of the table
    conditional: bool  # on conditional rows only
    temb: Tensor | None = None  # as of `denoise.Run`
    text_kv: tuple[Tensor, ...] = ()

    def reads(self, text: int) -> bool:
        """Whether rows with a text are controlled: 0 is the negative prompt's, 1 the prompt's."""
        return text == 1 or not self.conditional

    def image(self, k: int) -> RunControl:
        """That of one image, not conditioned."""
        return RunControl(self.network, self.hint[k : k + 1], self.weights, self.acts, self.conditional)


@dataclass(eq=False)
class RunFeatures:
    """The features of all T2I-Adapters in a run of B images."""

    levels: tuple[Tensor, ...]  # (B, C, h, w)
    acts: tuple[bool, ...]  # at each row of the table

    def image(self, k: int) -> RunFeatures:
        """Those of one image."""
        return RunFeatures(tuple(level[k : k + 1] for level in self.levels), self.acts)


Ranges = tuple[tuple[int, int], ...]
"""Rows of a U-Net, each from the first to before the last."""


def start_controls(
    request: Request, rows: int, *, dtype: torch.dtype, device: torch.device, one_by_one: bool
) -> tuple[tuple[RunControl, ...], RunFeatures | None]:
    """What a completed request has of its controls, for a table of so many rows: pictures read, embeddings and features
    computed, not conditioned yet. one_by_one: each picture by itself."""
    selection = request.control_image
    if not isinstance(selection, ControlSelection):
        return (), None
    size = (int(request.height or 0), int(request.width or 0))
    crop = mask_crop(request)
    nets: list[RunControl] = []
    features: tuple[Tensor, ...] = ()
    for use in selection.uses:
        network: Any = use.control.network
        grey = not use.is_controlnet and network.config.image_channels == 1
        picture = use.image if crop is None else crop.cut(_whole_picture(use.image, crop))
        pixels = send(images.load_control(picture, size, grey=grey), device, dtype)
        batches = pixels.split(1) if one_by_one else [pixels]
        if use.is_controlnet:
            hint = _per_image(torch.cat([network.hint(batch) for batch in batches]), request)
            weights = send(_weights(network, use.scale, selection.conditional), device, dtype)
            acts = tuple(use.acts(row, rows) for row in range(rows))
            nets.append(RunControl(network, hint, weights, acts, selection.conditional))
        elif use.scale != 0:
            levels = zip(*[network(batch) for batch in batches], strict=True)
            features = _sum(features, [use.scale * _per_image(torch.cat(level), request) for level in levels])
    last = int(rows * request.adapter_conditioning_factor)
    acts = tuple(row < last for row in range(rows))
    return tuple(nets), RunFeatures(features, acts) if features and last else None


def _whole_picture(source: Any, crop: MaskCrop) -> Image.Image:
    """A control's picture, of which the same part is read as of `image`. InputError if it has another size."""
    if not images.is_picture(source):
        raise InputError(
            f"control_image is a {type(source).__name__}: expected one PIL image or a path, with padding_mask_crop"
        )
    picture = images.load_picture(source, "control_image")
    if picture.size != crop.image.size:
        (w, h), (width, height) = picture.size, crop.image.size
        raise InputError(f"control_image is {w}x{h}: expected {width}x{height} as image, with padding_mask_crop")
    return picture


def _sum(features: tuple[Tensor, ...], more: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of lists of unlike length."""
    longer, shorter = (features, more) if len(features) >= len(more) else (more, features)
    return (*(a + b for a, b in zip(longer, shorter, strict=False)), *longer[len(shorter) :])


def _per_image(x: Tensor, request: Request) -> Tensor:
    """One for all, one for each prompt, or one for each image, as one for each image."""
    return x.repeat_interleave(request.batch // len(x), 0) if len(x) < request.batch else x


def _weights(network: ControlNet, scale: float, guess: bool) -> Tensor:
    """(K,) of K residuals: the scale, in guess mode times factors from a tenth for the first to 1."""
    count = len(network.config.unet.skip_channels) + 1
    factors = torch.logspace(-1, 0, count) if guess and not network.config.global_pool else torch.ones(count)
    return scale * factors


def evaluate(
    network: ControlNet,
    model_input: Tensor,
    ranges: Sequence[tuple[int, int]],
    weights: Tensor,
    *inputs: Any,
    deep: int | None = None,
    **texts: Any,
) -> Iterator[Residuals]:
    """One call of a ControlNet for rows of a U-Net in ascending ranges (begin, end): model_input (R, C, h, w) and what
    follows it in `ControlNet.step` of these rows, weights (R, K). deep: how many rows of the U-Net, the first ones,
    compute all, by default all do."""
    latents = model_input[:, : network.config.unet.in_channels]  # not what a model for inpainting reads beside them
    if deep is not None:
        texts["deep"] = sum(max(0, min(last, deep) - first) for first, last in ranges)
    skips, mid, *_ = network.step(latents, *inputs, **texts)
    begin, weights = 0, weights.T
    for first, last in ranges:
        part = slice(begin, begin + last - first)  # of what is deep, as much as there is
        yield Residuals(tuple(skip[part] for skip in skips), mid[part], weights[:, part], first)
        begin = part.stop


def joined(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges in order, with those that follow each other as one."""
    merged: list[tuple[int, int]] = []
    for first, last in ranges:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return tuple(merged)
