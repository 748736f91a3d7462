"""Reading an adapter's file against a model: `read_adapter`.

The file is read once, copied and checked before anything is returned: on any error nothing has changed, and nothing of
the result depends on the file afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fastldm import checks
from fastldm.adapters.build import build_change
from fastldm.adapters.family import family_of_keys, family_of_spec
from fastldm.adapters.forms import Change
from fastldm.adapters.key_formats import COMPONENTS, UNSUPPORTED, KeyGroup, group_keys, recognise_adapter
from fastldm.adapters.module_tensors import Alpha, Misfit, Tensors
from fastldm.adapters.peft_config import CONFIG_FILE, PeftConfig, configs_of_header, read_config
from fastldm.adapters.targets import Modules, Target, modules_of
from fastldm.checks import show
from fastldm.errors import CheckpointError
from fastldm.loading import relatives
from fastldm.loading.formats import PathLike
from fastldm.loading.spec import Spec
from fastldm.loading.tensors import Shapes, read_shapes, read_tensors
from fastldm.reading import check_file, check_path, read_json

logger = logging.getLogger("fastldm")

MAX_KEYS = 30_000
"""Limit for tensors in a file: SDXL's 794 layers and 300 norms, with eight tensors each, have 9,000."""
_MAX_KEY = 400  # characters of a name
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # alpha, on_input


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's file, read for a model. Compared and hashed by identity: a dictionary's key."""

    name: str
    """The file's, without its ending."""
    source: str
    """Its path."""
    key_format: str
    """The name of its key format (key_formats.FORMATS)."""
    short_hash: str
    """12 hexadecimal digits of SHA-256 over its tensors without the header, as A1111 shows it in pictures' metadata; of
    a pickle over the file."""
    changes: Mapping[Target, Change]
    """By component and path of the module."""
    left: tuple[str, ...]
    """What was not used, with strict=False: keys, and modules with the reason."""

    @property
    def rank(self) -> int | None:
        """The largest rank of all changes; None if none has one."""
        return max((change.rank for change in self.changes.values() if change.rank is not None), default=None)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that it changes."""
        return tuple(name for name in COMPONENTS if any(target.component == name for target in self.changes))


def read_adapter(path: PathLike, spec: Spec, *, strict: bool = True, allow_pickle: bool = False) -> Adapter:
    """Read the file of a LoRA or one of its relatives (forms.py) for a model. No weights of the model are read.

    path: a safetensors file, or, with allow_pickle=True, a pickle of which only tensors are loaded.
    strict: every tensor of the file must fit a module; else a file of which a part fits is read, and a warning and
        `Adapter.left` say what was left. A file of which nothing fits is an error either way.

    CheckpointError for a file that is damaged (truncated, factors that do not join, NaN, an alpha that is not above 0,
    too many tensors), for a form that is not implemented, and for one that does not fit, with the number of modules
    that do and the model that it is for.
    """
    file = check_path(path, "path")
    checks.flag("strict", strict)
    checks.flag("allow_pickle", allow_pickle)
    source = str(file)
    unet = spec.unet
    others = {"a UNet2DModel": not unet.conditional, "GLIDE's": unet.adds_pooled, "unCLIP's": unet.needs_projection}
    for network in (name for name, applies in others.items() if applies):
        raise CheckpointError(
            f"{source}: adapters are of networks that diffusers loads some for, and that of {spec.checkpoint.source} "
            f"is {network}."
        )
    shapes, metadata = read_shapes(file, allow_pickle)
    check_keys(shapes, source)
    key_format = recognise_adapter(shapes)
    if key_format is None:
        label = relatives.adapter_label(shapes)
        first = show(min(shapes, default="(none)"))
        reason = f"it is {label}" if label not in (None, "a LoRA") else f"its keys are like {first}"
        raise CheckpointError(f"{source} is no LoRA or relative of a LoRA that fastldm reads: {reason}.")

    groups, unread = group_keys(shapes, key_format)
    _check_supported(groups, source)
    tensors = _read_finite(file, shapes, allow_pickle, source)
    configs = _configs(file, key_format.name, metadata, source)
    changes, misfits = _fit(groups, tensors, modules_of(spec), configs, source)
    if misfits or unread or not changes:
        problem = _describe(groups, changes, misfits, unread, shapes, spec, source)
        if strict or not changes:
            raise CheckpointError(problem)
        logger.warning("%s", problem)
    return Adapter(
        name=file.stem,
        source=source,
        key_format=key_format.name,
        short_hash=short_hash(file),
        changes=MappingProxyType(changes),
        left=(*(f"{name}: {reason}" for name, reason in misfits.items()), *unread),
    )


def check_keys(shapes: Shapes, source: str) -> None:
    """CheckpointError for names and shapes that no file of weights has, and for too many of them."""
    if len(shapes) > MAX_KEYS:
        raise CheckpointError(f"{source} has {len(shapes):,} tensors, expected at most {MAX_KEYS:,} in an adapter.")
    for key, shape in shapes.items():
        if len(key) > _MAX_KEY or not key.isprintable():
            raise CheckpointError(f"{source} has a tensor named {show(key)}, which is no name of a module.")
        if 0 in shape:
            raise CheckpointError(f"{source}: {show(key)} has shape {shape}, which is empty.")


def finite_copy(
    key: str, tensor: Tensor, dtype: torch.dtype, source: str, device: torch.device | str = "cpu"
) -> Tensor:
    """A copy in a dtype, of which nothing depends on the file. CheckpointError for NaN and infinity, which may be in
    that dtype alone."""
    copied = tensor.detach().to(device, dtype, copy=True)
    if not bool(copied.isfinite().all()):
        raise CheckpointError(f"{source}: {show(key)} holds NaN or infinity in {dtype}.".replace("torch.", ""))
    return copied


def merged_numbers(adapters: Iterable[Adapter], spec: Spec) -> int:
    """How many weights of a model adapters are merged into, together; each is copied before."""
    modules, numbers = modules_of(spec).modules, 0
    changed: dict[Target, set[str]] = {}
    for adapter in adapters:
        for target, change in adapter.changes.items():
            forms = {"weight": change.weight, "bias": change.bias}
            changed.setdefault(target, set()).update(leaf for leaf, form in forms.items() if form is not None)
    for target, leaves in changed.items():
        shape = modules[target].weight
        numbers += math.prod(shape) * ("weight" in leaves) + shape[0] * ("bias" in leaves)
    return numbers


def _check_supported(groups: Sequence[KeyGroup], source: str) -> None:
    for group in groups:
        for name, key in group.keys.items():
            if name in UNSUPPORTED:
                raise CheckpointError(
                    f"{source} has {show(key)}: it is {UNSUPPORTED[name]}, which fastldm does not read."
                )


def _read_finite(file: Path, shapes: Shapes, allow_pickle: bool, source: str) -> dict[str, Tensor]:
    """All tensors, copied from the mapped file, whose content may change later. CheckpointError for other dtypes than
    those of weights, and for NaN and infinity."""
    tensors = {key: tensor.clone() for key, tensor in read_tensors(file, None, allow_pickle).items()}
    if tensors.keys() != shapes.keys():
        raise CheckpointError(f"{source} changed while it was read.")
    for key, tensor in tensors.items():
        if tensor.dtype not in _FLOATS and not (tensor.numel() == 1 and tensor.dtype in _INTEGERS):
            raise CheckpointError(f"{source}: {show(key)} has dtype {tensor.dtype}, expected floating point.")
        if not bool(tensor.float().isfinite().all()):  # in float32, in which it will be used
            raise CheckpointError(f"{source}: {show(key)} holds NaN or infinity.")
    return tensors


def _configs(file: Path, key_format: str, metadata: Mapping[str, str], source: str) -> dict[str, PeftConfig]:
    """What peft's config states, by component."""
    if key_format == "diffusers":
        return configs_of_header(metadata, COMPONENTS, source)
    if key_format != "peft":
        return {}
    beside = file.parent / CONFIG_FILE
    if not beside.is_file():
        raise CheckpointError(f"{source} was saved by peft, which keeps alpha in {CONFIG_FILE}: put that beside it.")
    check_file(beside)
    return dict.fromkeys(COMPONENTS, read_config(read_json(beside), str(beside)))


def _fit(
    groups: Sequence[KeyGroup],
    tensors: Mapping[str, Tensor],
    modules: Modules,
    configs: Mapping[str, PeftConfig],
    source: str,
) -> tuple[dict[Target, Change], dict[str, str]]:
    """The changes of the modules that a file's groups name, and for the rest why they fit none."""
    changes: dict[Target, Change] = {}
    misfits: dict[str, str] = {}
    for group in groups:
        reason = "the model has no such module"
        for component in group.components:
            target = modules.find(component, group.module)
            if target is None:
                continue
            if target in changes:
                reason = f"the file changes {target} twice"
                continue
            own = Tensors({name: tensors[key] for name, key in group.keys.items()}, f"{source}: {show(group.module)}")
            alpha = configs[component].alpha(group.module) if component in configs else Alpha()
            try:
                changes[target] = build_change(own, modules.modules[target], alpha)
                break
            except Misfit as misfit:
                reason = str(misfit)
        else:
            misfits[group.module] = reason
    return changes, misfits


def _describe(
    groups: Sequence[KeyGroup],
    changes: Mapping[Target, Change],
    misfits: Mapping[str, str],
    unread: Sequence[str],
    shapes: Shapes,
    spec: Spec,
    source: str,
) -> str:
    """What fits and what does not, in a line."""
    theirs, ours = family_of_keys(shapes), family_of_spec(spec)
    text = f"{source}: {len(changes)} of {len(groups)} modules fit"
    if misfits and theirs is not None and theirs != ours:
        text += f": this file is for {theirs}, the model is {ours}"
    if misfits:
        name, reason = next(iter(misfits.items()))
        text += f". The first that does not is {show(name)}: {reason}"
    if unread:
        text += f". Tensors that belong to no module: {len(unread):,}, such as {show(unread[0])}"
    return f"{text}. strict=False reads the rest." if changes else f"{text}."


def short_hash(file: Path, *, whole: bool = False) -> str:
    """As `Adapter.short_hash` says. whole: with the header, as A1111 does for textual inversion. CheckpointError if the
    file cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            head = b"" if whole else stream.read(9)
            # As A1111: the 8 bytes of the header's length and the header are left out.
            stream.seek(8 + int.from_bytes(head[:8], "little") if head[8:] == b"{" else 0)
            while block := stream.read(2**20):
                digest.update(block)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    return digest.hexdigest()[:12]
