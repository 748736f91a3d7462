"""Reading a ControlNet or a T2I-Adapter against a model: `read_control`.

Its weights are copied and checked before anything is returned: on any error nothing has changed, and nothing of the
result depends on the file afterwards. What a single file's shapes do not tell of a ControlNet (heads, groups, epsilon)
is as in the model's U-Net, whose encoder it is a copy of.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastldm import checks
from fastldm.adapters.family import family_of_unet
from fastldm.adapters.locate import find_shipped, find_weights, name_inside
from fastldm.adapters.read import check_keys, finite_copy, short_hash
from fastldm.checks import show
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import changes, hub, relatives
from fastldm.loading.checkpoint import Component
from fastldm.loading.diffusers_folder import weight_files
from fastldm.loading.formats import PathLike, choose_weights
from fastldm.loading.key_names import Names, controlnet_name, t2i_adapter_name
from fastldm.loading.prepare import Prepared, prepare
from fastldm.loading.spec import Spec, check_options
from fastldm.loading.state import load_module
from fastldm.loading.tensors import Shapes, read_shapes
from fastldm.models.config import Level, UNetConfig
from fastldm.models.controlnet import ControlNet, ControlNetConfig
from fastldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig, feature_places
from fastldm.reading import check_path, read_json

Config = ControlNetConfig | T2IAdapterConfig

_CLASSES: dict[str, type[Config]] = {"ControlNetModel": ControlNetConfig, "T2IAdapter": T2IAdapterConfig}
_READS = "fastldm reads ControlNetModel and T2IAdapter of Stable Diffusion 1, 2 and XL"
_OTHER_CLASSES = (
    (r"Union", "a ControlNet Union, which reads the kind of its picture"),
    (r"XS", "a ControlNet-XS, which shares its layers with the U-Net"),
    (r"Sparse", "a ControlNet for video"),
    (r"^Multi", "several in one: load each"),
    (r"ControlNet", "a ControlNet of another family"),
)
_OTHER_FILES = (  # the first match counts
    (r"^lllite_", "a ControlNet-LLLite"),
    (r"^lora_controlnet$", "a Control-LoRA, a ControlNet as the difference from a U-Net"),
    (r"^difference$", "a ControlNet as the difference from a model"),
    (r"spatial_feat_mapping\.", "the fuser of CoAdapters"),
    (r"(^|\.)(task_embedding$|control_add_embedding\.|spatial_ch_projs\.)", "a ControlNet Union (ControlNet++)"),
    (r"control_to_base|base_to_ctrl", "a ControlNet-XS"),
    (r"motion_modules\.", "a ControlNet for video"),
    (r"(^|\.)brushnet_", "BrushNet"),
    (r"(^|\.)style_embedding$", "a style adapter, which reads an image's tokens"),
    (
        r"(^|\.)(controlnet_x_embedder|controlnet_blocks|single_transformer_blocks|double_blocks|joint_blocks)\b"
        r"|^(model\.)?transformer_blocks\.",
        "a ControlNet for FLUX, Stable Diffusion 3 or another transformer",
    ),
)
_PREFIXES = ("control_model.", "controlnet.")
_GREY_OR_RGB = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}
"""Channels of a T2I-Adapter's first layer -> those of its pictures, and pixels per value in each direction."""


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet or a T2I-Adapter, read for a model. Compared and hashed by identity: a dictionary's key."""

    name: str
    """That of its file or folder, without its ending; of a module "controlnet" or "adapter"."""
    source: str
    """Its path."""
    short_hash: str | None
    """12 hexadecimal digits of SHA-256 over its tensors, as of adapters; None if it was in memory."""
    network: ControlNet | T2IAdapter
    prepared: Prepared | None = None
    """What lays out its weights, once it is attached."""

    def prepare(self, device: torch.device) -> Control:
        """The same on a device, its weights laid out."""
        network = self.network.to(device)
        return dataclasses.replace(self, prepared=prepare({self.name: network}))


@dataclass(frozen=True)
class _Found:
    """A file, folder or module that was recognised: its config, and its tensors, read when asked for."""

    config: Config
    source: str
    state: Callable[[], Mapping[str, Tensor]]
    file: Path | None
    name: str = ""


def read_control(
    path: PathLike | nn.Module,
    spec: Spec,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Control:
    """Read a ControlNet or a T2I-Adapter for a model, its weights in the model's dtype on its device.

    path: a folder as diffusers' `save_pretrained` writes it, a hub id, a single file in diffusers' or the original
        layout, the name of one that ships, or a loaded `ControlNetModel` or `T2IAdapter` of diffusers, of which a copy
        is made.
    options: variant, allow_pickle, as in `Pipeline.from_pretrained`. subfolder: of the folder or repository.
        weight_name: a single file in it. revision, cache_dir, local_files_only: of a hub id. global_pool_conditions:
        whether a ControlNet's residuals are means over all pixels, which a single file does not state: of those
        published, true of "shuffle" alone.

    CheckpointError for what is damaged (truncated, NaN), is of another kind, or does not fit the model, with the model
    that it is for.
    """
    found = _find(path, spec, **options)
    config, source = found.config, found.source
    with torch.device("meta"):
        network = ControlNet(config) if isinstance(config, ControlNetConfig) else T2IAdapter(config)
    state = {
        name: finite_copy(name, tensor, dtype, source, device) if tensor.is_floating_point() else tensor
        for name, tensor in found.state().items()
    }
    load_module(network, state, dtype=dtype, device=device, source=source)
    if found.file is None:
        return Control("controlnet" if isinstance(network, ControlNet) else "adapter", source, None, network)
    return Control(found.name, source, short_hash(found.file), network)


def describe_control(path: PathLike, spec: Spec, **options: Any) -> Config:
    """The config of what `read_control` would read, without its weights; the same errors, but for those of numbers."""
    return _find(path, spec, **options).config


def _find(
    path: PathLike | nn.Module,
    spec: Spec,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    global_pool_conditions: bool = False,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
) -> _Found:
    checks.flag("allow_pickle", allow_pickle)
    checks.flag("global_pool_conditions", global_pool_conditions)
    where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    check_options({"variant": variant, **where})
    if isinstance(path, nn.Module):
        found = _of_module(path)
    else:
        folder_or_file = _locate(path, weight_name, subfolder, variant, allow_pickle, **where)
        if folder_or_file.is_dir():
            found = _of_folder(folder_or_file, variant, allow_pickle)
        else:
            found = _of_file(folder_or_file, spec, allow_pickle, global_pool_conditions)
        found = dataclasses.replace(found, name=_name(path, folder_or_file))
    check_fits(found.config, spec, found.source)
    return found


def _name(path: Any, folder_or_file: Path) -> str:
    """A file's without its ending; a folder's, or a repository's without its owner's."""
    return folder_or_file.stem if folder_or_file.is_file() else Path(str(path)).name


# --- Where it comes from ---


def _locate(
    path_or_id: PathLike,
    weight_name: str | None,
    subfolder: str | None,
    variant: str | None,
    allow_pickle: bool,
    **where: Any,
) -> Path:
    """A folder or a file here; what is needed of a hub repository is downloaded."""
    path = check_path(path_or_id, "path")
    if weight_name is not None:
        return find_weights(path, weight_name=weight_name, subfolder=subfolder, **where)
    inside = "" if subfolder is None else f"{name_inside('subfolder', subfolder, path)}/"
    if not path.exists() and not hub.is_id(str(path_or_id)):
        path = find_shipped("control", path_or_id)
    if path.exists():
        return path / inside

    def choose(files: list[str]) -> list[str]:
        names = [file.removeprefix(inside) for file in files if file.startswith(inside)]
        repository = Path(f"{path_or_id}/{inside}")
        weights = choose_weights({repository.name: names}, variant, allow_pickle, str(repository.parent))
        return [inside + name for name in ("config.json", *weights[repository.name].names)]

    return hub.find_files(str(path_or_id), choose, **where)[0].parent


def _of_module(module: Any) -> _Found:
    library = sys.modules.get("diffusers")
    name = type(module).__name__
    if library is None or not isinstance(module, library.ModelMixin):
        raise InputError(f"the control is a {name}: expected a path, or a ControlNetModel or T2IAdapter of diffusers")
    module = changes.unwrapped(module)
    name = type(module).__name__
    source = f"the given {name}"
    config = read_config({**module.config, "_class_name": name}, source)
    differences = list(changes.of_network("controlnet", module))
    if differences:
        raise CheckpointError(f"{source}: {changes.describe(differences)}")
    return _Found(config, source, lambda: dict(changes.tensors(module)), None)


def _of_folder(folder: Path, variant: str | None, allow_pickle: bool) -> _Found:
    source = str(folder)
    raw = read_json(folder / "config.json")
    config = read_config(raw, str(folder / "config.json"))
    names = {path.name for path in folder.iterdir()}
    weights = choose_weights({folder.name: names}, variant, allow_pickle, str(folder.parent))[folder.name]
    files = weight_files(folder, weights)
    component = Component("controlnet", raw["_class_name"], raw, files, source, allow_pickle=allow_pickle)
    return _Found(config, source, component.state, files[0])


def read_config(raw: Mapping[str, Any], source: str) -> Config:
    """The config of diffusers' config.json. CheckpointError for what is neither, or is built differently."""
    name = raw.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        label = next((f": {label}" for pattern, label in _OTHER_CLASSES if re.search(pattern, str(name))), "")
        raise CheckpointError(f"{source}: '_class_name' is {show(name)}{label}. {_READS}.")
    return _CLASSES[name].from_dict(raw, source)


def _of_file(file: Path, spec: Spec, allow_pickle: bool, global_pool: bool) -> _Found:
    source = str(file)
    shapes, _ = read_shapes(file, allow_pickle)
    check_keys(shapes, source)
    if label := relatives.first_match(_OTHER_FILES, shapes):
        raise CheckpointError(f"{source} is {label}. {_READS}.")
    names = _names(shapes, source)
    named = {name: shapes[key] for key, (name,) in names.items()}
    try:
        if any(name.startswith("adapter.") for name in named):
            config: Config = _t2i_config(named)
        else:
            config = _controlnet_config(named, spec.unet, global_pool)
    except (KeyError, IndexError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{source} is built as no ControlNet or T2I-Adapter: {reason}.") from error
    component = Component("controlnet", "", {}, (file,), source, names, allow_pickle)
    return _Found(config, source, component.state, file)


def _names(shapes: Shapes, source: str) -> dict[str, Names]:
    """The keys of a ControlNet or T2I-Adapter in a file, each with diffusers' name. CheckpointError for other files."""
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in shapes)), "")
    keys = [key[len(prefix) :] for key in shapes if key.startswith(prefix)]
    rename: Callable[[str], Names | None]
    if "controlnet_cond_embedding.conv_in.weight" in keys or any(key.startswith("adapter.body.") for key in keys):
        rename = lambda key: (key,)  # noqa: E731
    elif "input_hint_block.0.weight" in keys:
        layers = min(_numbers(keys, r"input_blocks\.(\d+)\.0\.op\.weight"), default=1 + len(keys)) - 1
        last = max(_numbers(keys, r"input_hint_block\.(\d+)\."))
        rename = lambda key: controlnet_name(key, layers, last)  # noqa: E731
    elif "body.0.block1.weight" in keys or "body.0.body.0.block1.weight" in keys:
        light = "body.0.in_conv.weight" in keys
        layers = 1 if light else min(_numbers(keys, r"body\.(\d+)\.in_conv\."), default=2)
        rename = lambda key: t2i_adapter_name(key, layers)  # noqa: E731
    else:
        label = relatives.adapter_label(shapes) or relatives.first_match(relatives.LONE_COMPONENTS, shapes)
        reason = f"it is {label}" if label else f"its keys are like {show(min(shapes, default='(none)'))}"
        raise CheckpointError(f"{source} is no ControlNet or T2I-Adapter: {reason}. {_READS}.")
    names = {}
    for key in keys:
        renamed = rename(key)
        if renamed is None:
            raise CheckpointError(f"{source} holds {show(key)}, which no ControlNet or T2I-Adapter has. {_READS}.")
        names[prefix + key] = renamed
    return names


def _numbers(keys: list[str], pattern: str) -> list[int]:
    """What the pattern's group matches."""
    return [int(match[1]) for key in keys if (match := re.match(pattern, key))]


def _count(keys: list[str], pattern: str) -> int:
    """How many numbers the pattern's group matches: 0, 1 and so on, or ValueError."""
    numbers = {*_numbers(keys, pattern)}
    if numbers and max(numbers) >= len(numbers):
        raise ValueError(f"its keys of the form {pattern} leave out numbers")
    return len(numbers)


def _controlnet_config(shapes: Shapes, unet: UNetConfig, global_pool: bool) -> ControlNetConfig:
    """The config of a ControlNet from the shapes of diffusers' names; the rest is the U-Net's. KeyError or ValueError
    if it is built differently."""
    names = list(shapes)

    def depth(attention: str) -> int | None:
        if f"{attention}.norm.weight" not in shapes:
            return None
        return _count(names, rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\.")

    contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    context = contexts.pop() if contexts else unet.cross_attention_dim
    down = []
    for i in range(_count(names, r"down_blocks\.(\d+)\.")):
        block, heads = f"down_blocks.{i}", unet.down[min(i, unet.levels - 1)].heads
        resnets = range(_count(names, rf"{re.escape(block)}\.resnets\.(\d+)\."))
        width = shapes[f"{block}.resnets.0.conv1.weight"][0]
        down.append(Level(width, heads, context, tuple(depth(f"{block}.attentions.{k}") for k in resnets)))
    middle = depth("mid_block.attentions.0")
    mid = Level(down[-1].channels, unet.down[-1].heads, context, (None,) if middle is None else (middle, None))
    has_added = "add_embedding.linear_1.weight" in shapes
    hints = "controlnet_cond_embedding"
    sizes = range(1, _count(names, rf"{hints}\.blocks\.(\d+)\."), 2)
    first = shapes[f"{hints}.conv_in.weight"]
    encoder = dataclasses.replace(
        unet,
        in_channels=shapes["conv_in.weight"][1],
        down=tuple(down),
        mid=mid,
        time_embedding_dim=shapes["time_embedding.linear_1.weight"][0],
        time_cond_proj_dim=None,
        addition_embed_type="text_time" if has_added else None,
        addition_input_dim=shapes["add_embedding.linear_1.weight"][1] if has_added else 0,
    )
    hint_channels = (first[0], *(shapes[f"{hints}.blocks.{k}.weight"][0] for k in sizes))
    return ControlNetConfig(encoder, first[1], hint_channels, bgr=False, global_pool=global_pool)


def _t2i_config(shapes: Shapes) -> T2IAdapterConfig:
    """The same of a T2I-Adapter."""
    names = list(shapes)
    blocks = range(_count(names, r"adapter\.body\.(\d+)\."))
    layers = _count(names, r"adapter\.body\.0\.resnets\.(\d+)\.")
    light = "adapter.body.0.out_conv.weight" in shapes
    first = shapes["adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"][1]
    if first not in _GREY_OR_RGB:
        raise ValueError(f"its first layer reads {first} channels, expected one of {', '.join(map(str, _GREY_OR_RGB))}")
    last = "out_conv" if light else "resnets.0.block1"
    channels = tuple(shapes[f"adapter.body.{k}.{last}.weight"][0] for k in blocks)
    image_channels, factor = _GREY_OR_RGB[first]
    kind = "light_adapter" if light else "full_adapter_xl" if factor == 16 else "full_adapter"
    return T2IAdapterConfig(kind, image_channels, channels, layers, factor)


# --- Whether it fits ---


def check_fits(config: Config, spec: Spec, source: str) -> None:
    """CheckpointError if a control is for another model, saying for which."""
    theirs: tuple[str | None, ...]
    if (beyond := spec.unet.beyond_standard) is not None:
        raise CheckpointError(
            f"{source}: controls are made for Stable Diffusion's networks, and {spec.checkpoint.source} has {beyond}."
        )
    if isinstance(config, ControlNetConfig):
        kind, theirs, problem = "ControlNet", (family_of_unet(config.unet),), _controlnet_misfit(config, spec)
    else:
        kind, problem = "T2I-Adapter", _t2i_misfit(config, spec)
        theirs = ("SDXL",) if config.kind == "full_adapter_xl" else ("SD 1.5", "SD 2")
    if problem is None:
        return
    ours, names = family_of_unet(spec.unet), [name for name in theirs if name is not None]
    if ours is not None and names and ours not in names:
        raise CheckpointError(f"{source}: this {kind} is for {' or '.join(names)}, the model is {ours}: {problem}.")
    raise CheckpointError(f"{source}: this {kind} does not fit the model: {problem}.")


def _controlnet_misfit(config: ControlNetConfig, spec: Spec) -> str | None:
    theirs, ours = config.unet, spec.unet
    widths = [[(level.channels, len(level.depths)) for level in unet.down] for unet in (theirs, ours)]
    added = (theirs.addition_input_dim, theirs.addition_time_embed_dim)
    for fits, problem in (
        (widths[0] == widths[1], f"its levels have {_levels(theirs)}, and the U-Net's {_levels(ours)}"),
        (
            theirs.cross_attention_dim == ours.cross_attention_dim or not config.cross_widths,
            f"it reads text of {theirs.cross_attention_dim} channels, and the model's has {ours.cross_attention_dim}",
        ),
        (
            not theirs.needs_added or added == (ours.addition_input_dim, ours.addition_time_embed_dim),
            "it reads pooled text and sizes that the model's U-Net does not",
        ),
        (
            theirs.in_channels == spec.vae.latent_channels,
            f"it reads latents of {theirs.in_channels} channels, and the model's have {spec.vae.latent_channels}",
        ),
        (
            config.factor == spec.vae.factor,
            f"it has a latent for each {config.factor} pixels, and the model for each {spec.vae.factor}",
        ),
        (config.image_channels == 3, f"it reads pictures of {config.image_channels} channels, expected 3"),
    ):
        if not fits:
            return problem
    return None


def _levels(unet: UNetConfig) -> str:
    return ", ".join(f"{level.channels} channels x {len(level.depths)}" for level in unet.down)


def _t2i_misfit(config: T2IAdapterConfig, spec: Spec) -> str | None:
    if config.image_channels not in (1, 3):
        return f"it reads pictures of {config.image_channels} channels, expected 1 or 3"
    places = [(channels, spec.vae.factor * stride) for channels, stride in feature_places(spec.unet)]
    features = list(zip(config.channels, config.strides, strict=True))
    if len(features) <= len(places) and features == places[: len(features)]:
        return None
    return f"its features have (channels, pixels a value) {features}, and the U-Net takes {places}"
