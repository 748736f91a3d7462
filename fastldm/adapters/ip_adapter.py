"""Reading an IP-Adapter against a model: `read_ip_adapter`.

| kind | published as | the image encoder's output | tokens |
|---|---|---|---|
| base | ip-adapter_sd15, ip-adapter_sdxl, _light, _vit-G | the projected vector | 4 |
| plus | ip-adapter-plus, -plus-face, composition | the hidden states before the last layer | one of each query |
| full | ip-adapter-full-face | likewise | one of each hidden state |

A file has `image_proj.*` and `ip_adapter.N.to_k_ip.weight`. N is odd and counts the cross-attentions in the order in
which diffusers registers a U-Net's blocks: down, up, middle. Its tensors are copied and checked before anything is
returned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm import checks
from fastldm.adapters.family import family_of_context, family_of_spec
from fastldm.adapters.read import check_keys, finite_copy, short_hash
from fastldm.checks import show
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import relatives
from fastldm.loading.formats import PathLike
from fastldm.loading.spec import Spec
from fastldm.loading.state import load_module
from fastldm.loading.tensors import Shapes, read_shapes, read_tensors
from fastldm.models.clip_vision import VisionConfig
from fastldm.models.config import UNetConfig
from fastldm.models.ip_adapter import HEAD, IPAdapter, IPAdapterConfig
from fastldm.reading import check_path

_OTHER = (  # the first match counts
    (r"^image_proj\.perceiver_resampler\.", "an IP-Adapter FaceID Plus, which reads a face recogniser's vectors"),
    (r"^ip_adapter\.\d+\.to_[qkvout]+_lora\.", "an IP-Adapter FaceID"),
    (r"^image_proj\.time_in\.|^ip_adapter\.\d+\.norm_ip", "an IP-Adapter for Stable Diffusion 3"),
    (r"(^|\.)(double_blocks|ip_adapter_proj_model)\b", "an IP-Adapter for FLUX"),
    (r"^(.*\.)?id_encoder\.", "PhotoMaker or another encoder of identities"),
)
_LAYER = re.compile(r"layers\.(\d+)\.(?:0|attn)\.(norm1|norm2|to_q|to_kv|to_out)\.(weight|bias)")
_ATTENTION_PARTS = {
    "norm1": ("ln0",),
    "norm2": ("ln1",),
    "to_q": ("attn.to_q",),
    "to_kv": ("attn.to_k", "attn.to_v"),
    "to_out": ("attn.to_out.0",),
}
_FEED_FORWARD = (
    (re.compile(r"(layers\.\d+)\.1\.0\."), r"\1.ff.0."),
    (re.compile(r"(layers\.\d+)\.1\.1\."), r"\1.ff.1.net.0.proj."),
    (re.compile(r"(layers\.\d+)\.1\.3\."), r"\1.ff.1.net.2."),
)
_MAX_LAYERS = 64  # of a resampler; those published have 4


@dataclass(frozen=True, eq=False)
class ImageAdapter:
    """An IP-Adapter, read for a model. Compared and hashed by identity."""

    name: str
    """That of its file, without its ending."""
    source: str
    """Its path."""
    short_hash: str | None
    """12 hexadecimal digits of SHA-256 over its tensors, as of adapters; None if it was in memory."""
    network: IPAdapter


def read_ip_adapter(
    source: PathLike | Mapping[str, Any],
    spec: Spec,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> ImageAdapter:
    """Read an IP-Adapter for a model, its weights in the model's dtype on its device.

    source: a file, or its content, a dict of tensors, nested or by dotted names. allow_pickle: read a pickle, of which
        only tensors are loaded.

    InputError for a model whose levels have only_cross_attention. CheckpointError for a file that is damaged
    (truncated, NaN, too many tensors), of another kind, or for another model, saying for which.
    """
    checks.flag("allow_pickle", allow_pickle)
    _check_model(spec)
    file = None if isinstance(source, Mapping) else check_path(source, "pretrained_model_name_or_path")
    name = "the given dict" if file is None else str(file)
    tensors: Mapping[str, Tensor] = {}
    if isinstance(source, Mapping):
        tensors = _flat(source)
        shapes: Shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    else:
        assert file is not None
        shapes, _ = read_shapes(file, allow_pickle)
    check_keys(shapes, name)
    config, names = _recognise(shapes, spec, name)
    if file is not None:
        tensors = read_tensors(file, None, allow_pickle)
    state: dict[str, Tensor] = {}
    for key, own in names.items():
        parts = tensors[key].chunk(len(own)) if len(own) > 1 else (tensors[key],)
        for part_name, part in zip(own, parts, strict=True):
            state[part_name] = _copied(key, part, dtype, name)
    with torch.device("meta"):
        network = IPAdapter(config)
    load_module(network, state, dtype=dtype, device=device, source=name)
    return ImageAdapter(name if file is None else file.stem, name, None if file is None else short_hash(file), network)


def describe_ip_adapter(file: PathLike, spec: Spec, *, allow_pickle: bool = False) -> IPAdapterConfig:
    """The sizes of what `read_ip_adapter` would read, without weights; the same errors, but for those of numbers."""
    _check_model(spec)
    path = check_path(file, "file")
    shapes, _ = read_shapes(path, allow_pickle)
    check_keys(shapes, str(path))
    return _recognise(shapes, spec, str(path))[0]


def _check_model(spec: Spec) -> None:
    if (beyond := spec.unet.beyond_standard) is not None:
        raise InputError(f"{spec.checkpoint.source} has {beyond}: IP-Adapters are made for Stable Diffusion's networks")
    if any(level.only_cross for level in (*spec.unet.down, spec.unet.mid, *spec.unet.up)):
        raise InputError(
            f"{spec.checkpoint.source} has levels with only_cross_attention, as the x4 upscaler: IP-Adapters are made "
            "for models without"
        )


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a dict, or of one dict of each part in it, by dotted names."""
    flat = {}
    for key, value in content.items():
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        for own, tensor in inner:
            if isinstance(tensor, Tensor):
                flat[str(key) if own is None else f"{key}.{own}"] = tensor
    return flat


def _copied(key: str, tensor: Tensor, dtype: torch.dtype, source: str) -> Tensor:
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        raise CheckpointError(f"{source}: {show(key)} is {show(tensor)}, expected floating point numbers.")
    return finite_copy(key, tensor, dtype, source)


# --- What it is ---


def _recognise(shapes: Shapes, spec: Spec, source: str) -> tuple[IPAdapterConfig, dict[str, tuple[str, ...]]]:
    """The config of a file, and for each of its keys the name, or the names, of it in `IPAdapter`."""
    image = {key.removeprefix("image_proj."): shape for key, shape in shapes.items() if key.startswith("image_proj.")}
    kvs = {key: shape for key, shape in shapes.items() if key.startswith("ip_adapter.")}
    label = relatives.first_match(_OTHER, shapes)
    if label is None and "norm.weight" in image and "proj.0.weight" in image:
        label = "an IP-Adapter FaceID"
    if label is None and not (image and kvs):
        label = relatives.adapter_label(shapes) or f"its keys are like {show(min(shapes, default='(none)'))}"
        raise CheckpointError(f"{source} is no IP-Adapter: {'it is ' * label.startswith('a')}{label}.")
    if label is not None:
        raise CheckpointError(
            f"{source} is {label}: fastldm reads IP-Adapters base, plus and full face of SD and SDXL."
        )
    try:
        config, renamed = _projection(image, spec.unet)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{source} is built as no IP-Adapter: {reason}.") from error
    _check_fits(config, kvs, spec, source)
    order = _file_order(spec.unet)
    names = {f"image_proj.{key}": tuple(f"image_proj.{name}" for name in renamed.get(key, (key,))) for key in image}
    for key in kvs:
        match = re.fullmatch(r"ip_adapter\.(\d{1,4})\.(to_[kv]_ip\.weight)", key)
        index = (int(match[1]) - 1) // 2 if match and int(match[1]) % 2 else len(order)
        if match is None or index >= len(order):
            raise CheckpointError(f"{source} holds {show(key)}, which no IP-Adapter of this model has.")
        names[key] = (f"attentions.{order[index]}.{match[2]}",)
    _check_shapes(config, names, shapes, source)
    return config, names


def _projection(image: Shapes, unet: UNetConfig) -> tuple[IPAdapterConfig, dict[str, tuple[str, ...]]]:
    """The config, and the names of those keys that have others."""
    widths = unet.cross_widths
    if "proj.weight" in image:
        rows, channels = image["proj.weight"]
        (context,) = image["norm.weight"]
        config = IPAdapterConfig("base", channels, context, widths, tokens=rows // context)
        return config, {key: (key.replace("proj.", "image_embeds."),) for key in image if key.startswith("proj.")}
    if "proj.3.weight" in image:
        channels, (context,) = image["proj.0.weight"][1], image["proj.3.weight"]
        parts = {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"}
        config = IPAdapterConfig("full", channels, context, widths, tokens=0)
        return config, {
            key: (f"{part}{key.removeprefix(start)}",)
            for key in image
            for start, part in parts.items()
            if key.startswith(f"{start}.")
        }
    _, queries, hidden = image["latents"]
    renamed = {key: _resampler_names(key) for key in image}
    by_name = {name: image[key] for key, names in renamed.items() for name in names}
    depth = 1 + max(int(match[1]) for key in image if (match := re.match(r"layers\.(\d{1,4})\.", key)))
    if depth > _MAX_LAYERS:
        raise ValueError(f"it has {depth} layers, expected at most {_MAX_LAYERS}")
    inner = by_name["layers.0.attn.to_q.weight"][0]
    if inner % HEAD:
        raise ValueError(f"its attention has {inner} channels, expected heads of {HEAD}")
    config = IPAdapterConfig(
        "plus",
        image["proj_in.weight"][1],
        image["proj_out.weight"][0],
        widths,
        tokens=queries,
        hidden=hidden,
        heads=inner // HEAD,
        depth=depth,
        feed_forward=by_name["layers.0.ff.1.net.0.proj.weight"][0],
    )
    return config, renamed


def _resampler_names(key: str) -> tuple[str, ...]:
    if match := _LAYER.fullmatch(key):
        return tuple(f"layers.{match[1]}.{part}.{match[3]}" for part in _ATTENTION_PARTS[match[2]])
    for pattern, replacement in _FEED_FORWARD:
        if pattern.match(key):
            return (pattern.sub(replacement, key),)
    return (key,)


def _file_order(unet: UNetConfig) -> list[int]:
    """For the cross-attentions in a file's order, the index of each in network order."""
    down, middle, up = (
        sum(depth or 0 for level in levels for depth in level.depths) for levels in (unet.down, (unet.mid,), unet.up)
    )
    return [*range(down), *range(down + middle, down + middle + up), *range(down, down + middle)]


def _check_fits(config: IPAdapterConfig, kvs: Shapes, spec: Spec, source: str) -> None:
    """CheckpointError if it is for another model, by the text's channels and the number of cross-attentions."""
    theirs, ours = family_of_context(config.context), family_of_spec(spec)
    count, expected = len(kvs) / 2, len(spec.unet.cross_widths)
    if config.context == spec.unet.cross_attention_dim and count == expected:
        return
    what = f"this IP-Adapter is for {theirs}" if theirs not in (None, ours) else "this IP-Adapter is for another U-Net"
    raise CheckpointError(
        f"{source}: {what}, the model is {ours}: it has {count:g} attentions of {config.context} channels, the model "
        f"{expected} of {spec.unet.cross_attention_dim}."
    )


def _check_shapes(config: IPAdapterConfig, names: Mapping[str, tuple[str, ...]], shapes: Shapes, source: str) -> None:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in IPAdapter(config).state_dict().items()}
    for key, own in names.items():
        for name in own:
            if name not in expected:
                raise CheckpointError(f"{source} holds {show(key)}, which no IP-Adapter has.")
        full = (sum(expected[name][0] for name in own), *expected[own[0]][1:])
        if shapes[key] != full:
            raise CheckpointError(f"{source}: {show(key)} has shape {shapes[key]}, expected {full}.")
    missing = expected.keys() - {name for own in names.values() for name in own}
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} tensors, such as {min(missing)}.")


def image_encoder_fits(adapter: ImageAdapter, config: VisionConfig) -> bool:
    """Whether a CLIP image encoder, by its config, makes what an adapter reads."""
    channels = config.projection_dim if adapter.network.config.kind == "base" else config.hidden
    return channels == adapter.network.config.image_channels
