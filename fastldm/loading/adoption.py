"""Adopting a loaded diffusers pipeline: its description, and its weights without a copy.

    pipe -> describe_diffusers -> Checkpoint -> networks on the meta device -> adopt

Changes that are neither in its weights nor in its configs are either supported (compiled and fused modules, removed
layers of a text encoder) or refused by name (changes.py), never dropped.
"""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any, TypeVar

import torch
from torch import nn

from fastldm.conditioning.depth import DepthEstimator
from fastldm.device import DTYPES
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import changes
from fastldm.loading.checkpoint import Checkpoint, Component, TokenizerFiles
from fastldm.loading.formats import (
    DEPTH,
    NOISING,
    PRIOR_SCHEDULER,
    SCHEDULERS,
    SUPER_RESOLUTION_SCHEDULER,
    TOKENIZERS,
    Config,
    component_classes,
    named_config,
)
from fastldm.loading.state import fit_names
from fastldm.models.families import IMAGE_ENCODER, component_name, network_classes
from fastldm.samplers.scheduler_config import SET_LATER

logger = logging.getLogger("fastldm")

Module = TypeVar("Module", bound=nn.Module)


def describe_diffusers(pipe: Any) -> Checkpoint:
    """Describe a loaded diffusers pipeline. Its components have configs and no files: `adopt` takes their weights.

    Raises InputError for anything but a diffusers pipeline, and CheckpointError for one that fastldm cannot run as it
    is: of another class, changed beyond weights and configs, or in several dtypes or devices. `pipe` is unchanged.
    """
    library = sys.modules.get("diffusers")
    if library is None or not isinstance(pipe, library.DiffusionPipeline):
        raise InputError(f"pipe is a {type(pipe).__name__}: expected a loaded diffusers pipeline")
    source = type(pipe).__name__
    loaded = {name: changes.unwrapped(component) for name, component in pipe.components.items()}
    listed = {
        name: (None, None) if component is None else ("", type(component).__name__)
        for name, component in loaded.items()
    }
    index = {**pipe.config, **listed, "_class_name": source}
    classes = component_classes(index, source)
    if hasattr(pipe, "pag_applied_layers"):
        index["pag_applied_layers"] = pipe.pag_applied_layers
    loaded = {component_name(source, name): component for name, component in loaded.items()}
    networks = {name: loaded[name] for name in classes if name in network_classes(source)}
    tokenizers = {name: loaded[name] for name in classes if name in TOKENIZERS}
    _check_unchanged(pipe, loaded, networks, tokenizers, source)
    _check_kinds(networks, source)
    if loaded.get("safety_checker") is not None:
        logger.warning("%s: its safety checker is not run: images are not filtered", source)
    if getattr(pipe, "watermark", None) is not None or loaded.get("watermarker") is not None:
        logger.warning("%s: its invisible watermark is not written", source)

    components = {}
    for name, module in networks.items():
        raw = _raw_config(module)
        components[name] = Component(name, classes[name], named_config(raw, classes[name]), (), f"{source}: {name}")
    files = {name: TokenizerFiles(None, loaded=tokenizer) for name, tokenizer in tokenizers.items()}
    schedulers = {name: _scheduler_config(loaded[name]) for name in SCHEDULERS if name in classes}
    depth = None
    if loaded.get(DEPTH) is not None:
        depth = DepthEstimator((loaded[DEPTH], loaded["feature_extractor"]))
    reads = IMAGE_ENCODER in classes and loaded.get("feature_extractor") is not None
    preprocessor = loaded["feature_extractor"].to_dict() if reads else {}
    noising = next((schedulers[name] for name in NOISING if name in schedulers), None)
    more: dict[str, Any] = {"loaded": True, "preprocessor": preprocessor, "depth": depth}
    more["prior_scheduler"] = schedulers.get(PRIOR_SCHEDULER)
    more["super_res_scheduler"] = schedulers.get(SUPER_RESOLUTION_SCHEDULER)
    return Checkpoint(source, components, schedulers["scheduler"], files, index, noising, **more)


def adopt(module: Module, other: nn.Module) -> Module:
    """Assign the weights of `other`, a loaded diffusers or transformers module, to `module`, built on the meta device.

    Both modules then share storage: in-place changes of one are seen by the other. Dtype and device stay, and `other`
    is unchanged. Raises CheckpointError as `load_module` does, and for weights that are not all in one dtype on one
    device (offloaded, quantised).
    """
    other = changes.unwrapped(other)
    source, state = f"the given {type(other).__name__}", dict(changes.tensors(other))
    fitted = fit_names(module, state, source)
    _check_kinds({"": other}, source)
    module.load_state_dict({name: state[key] for name, key in fitted.items()}, assign=True)
    return module.requires_grad_(False).eval()


def _check_unchanged(
    pipe: Any, loaded: dict[str, Any], networks: dict[str, Any], tokenizers: dict[str, Any], source: str
) -> None:
    differences = list(changes.of_pipeline(pipe))
    for name in SCHEDULERS:
        if loaded.get(name) is not None:
            differences += changes.of_scheduler(loaded[name])
    for name, module in networks.items():
        differences += changes.of_network(name, module)
    for name, tokenizer in tokenizers.items():
        differences += changes.of_tokenizer(name, tokenizer)
    if differences:
        raise CheckpointError(f"{source}: {changes.describe(differences)}")


def _check_kinds(networks: dict[str, nn.Module], source: str) -> None:
    """Raise CheckpointError if not all weights are floating point, in one dtype on one device."""
    kinds: dict[str, list[str]] = {}
    usable = True
    for name, module in networks.items():
        tensors = list(changes.tensors(module))
        dtypes = [tensor.dtype for key, tensor in tensors if not _stays_in_float32(module, key, tensor)]
        for key, tensor in tensors:
            usable &= tensor.dtype in DTYPES and tensor.device.type != "meta"
            dtype = dtypes[0] if dtypes and _stays_in_float32(module, key, tensor) else tensor.dtype
            names = kinds.setdefault(f"{dtype} on {tensor.device}".removeprefix("torch."), [])
            if name not in names:
                names.append(name)
    if len(kinds) != 1 or not usable:
        listed = ", ".join(f"{kind} ({', '.join(names)})".removesuffix(" ()") for kind, names in sorted(kinds.items()))
        raise CheckpointError(
            f"{source[0].upper()}{source[1:]} has weights in {listed}; they must be float32, float16 or bfloat16, all "
            "in one dtype on one device. Undo offloading or quantisation first, or call pipe.to(device, dtype)."
        )


def _stays_in_float32(module: nn.Module, key: str, tensor: torch.Tensor) -> bool:
    """Whether transformers loads a tensor in float32 whatever it loads the others in: T5's `wo`, whose products
    float16 does not hold."""
    names = getattr(module, "_keep_in_fp32_modules", None) or ()
    return tensor.dtype == torch.float32 and not {*key.split(".")}.isdisjoint(names)


def _scheduler_config(scheduler: Any) -> Config:
    """Without the values that are the class's defaults: as in diffusers' `from_config`, another class has its own. What
    was one until a pipeline set it is named as such, for this class alone has it."""
    arguments = inspect.signature(type(scheduler).__init__).parameters
    defaults = scheduler.config.get("_use_default_values", ())
    changed = [key for key in defaults if key in arguments and scheduler.config[key] != arguments[key].default]
    left_out = {"_use_default_values", *defaults} - {*changed}
    config = {key: value for key, value in scheduler.config.items() if key not in left_out}
    return {**config, "_class_name": type(scheduler).__name__, **({SET_LATER: changed} if changed else {})}


def _raw_config(module: Any) -> Config:
    """A network's config as in its config.json."""
    if not hasattr(module.config, "to_dict"):
        return dict(module.config)
    return {**module.config.to_dict(), "num_hidden_layers": changes.encoder_depth(module)}
