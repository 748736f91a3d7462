"""Changes of a loaded diffusers pipeline that are neither in its weights nor in its configs.

Adoption builds a pipeline's networks from its configs and weights. Everything else that affects its images would be
lost: a module of another class, a hook, a replaced method, an attribute such as a convolution's padding_mode. So each
network is compared with a new one of its class and config, and the scheduler with a new one that has run as many steps;
every difference is a change, unless it is listed here as having no effect on an image.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastldm.conditioning.tokenizer import BERT_OPTIONS
from fastldm.models.families import KANDINSKY_PIPELINES, LATENT_UPSCALE_PIPELINE, UPSCALE_PIPELINE

_PACKAGES = ("torch", "diffusers", "transformers")
_WRAPPERS = ("huggingface_hub", "typing_extensions")  # decorators of those packages' methods
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # training, parameters, children, hooks: compared separately
_NO_EFFECT = frozenset(
    {
        "dropout",  # like a Dropout's p: no effect except in training
        "fused_projections",
        "gradient_checkpointing",
        "inplace",
        "name_or_path",
        "p",
        "tile_latent_min_size",  # of the autoencoder; adoption applies `use_tiling` and `use_slicing`
        "tile_overlap_factor",
        "tile_sample_min_size",
        "upcast_attention",  # a float32 softmax, as in all attention of fastldm
        "upcast_softmax",
        "use_slicing",
        "use_tiling",
    }
)
_PROCESSORS = frozenset(
    {
        "AttnAddedKVProcessor",
        "AttnAddedKVProcessor2_0",
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnAddedKVProcessor",
        "SlicedAttnProcessor",
        "XFormersAttnAddedKVProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)
"""Implementations of the same attention."""
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""The same for transformers' text encoders."""
_FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
"""Projections that `fuse_qkv_projections` adds to an attention, and the projections that they replace."""
_METHODS_WITHOUT_EFFECT = frozenset(
    {"check_inputs", "maybe_free_model_hooks", "progress_bar", "run_safety_checker", "set_progress_bar_config", "to"}
)
_IMAGE_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "image_processor": {},
    "mask_processor": {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True},
}
_STEPS = 4  # of the schedulers that are compared

_CAUSES = (  # pattern in a change, cause, advice; the first match counts
    (r"\.[bs][12] is ", "FreeU", "call pipe.disable_freeu()"),
    (r"\.padding_mode is ", "a convolution that does not pad with zeros, as for seamless tiling", "set it to zeros"),
    (r"IPAdapter", "an IP-Adapter", "call pipe.unload_ip_adapter(), and load_ip_adapter of what is adopted"),
    (r"\bPAG", "perturbed-attention guidance", "call pipe.unet.set_default_attn_processor()"),
    (r"\bpeft\.|LoRA|lora", "a LoRA or another adapter", "call pipe.fuse_lora(), then pipe.unload_lora_weights()"),
    (r"\baccelerate\.", "accelerate's offloading", "call pipe.remove_all_hooks(), then pipe.to(device)"),
    (r"\bdiffusers\.hooks\.", "a hook of diffusers (caching, offloading, casting)", "load the pipeline without it"),
    (r"\btomesd\b|ToMe", "token merging", "call tomesd.remove_patch(pipe)"),
    (r"[Pp]arametri[sz]|(weight|spectral)_norm", "a weight computed from others", "remove its parametrization"),
    (
        r"^scheduler\.",
        "a scheduler that differs from its config",
        "set its config, or pass timesteps or sigmas to the call,",
    ),
    (r"bitsandbytes|torchao|quanto|quant|\bgguf\b", "quantised weights", "load the pipeline without quantisation"),
    (r"\btraining\b", "dropout, which draws at random", "call .eval() on it"),
    (r"AttnProcessor", "another implementation of attention", "call pipe.unet.set_default_attn_processor()"),
)


def describe(changes: list[str]) -> str:
    """A sentence on one or more changes: the first of them, its cause, and what to do."""
    first, *rest = changes
    unknown = ("", "a change outside its weights and configs", "undo it")
    _, cause, advice = next((row for row in _CAUSES if re.search(row[0], first)), unknown)
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{first}{more}: {cause}, which adoption would lose; {advice} first."


# --- Modules without torch.compile's wrapper and fused projections ---


def unwrapped(module: Any) -> Any:
    """The module inside torch.compile's wrapper; any other module unchanged."""
    while type(module).__module__.startswith("torch._dynamo") and "_orig_mod" in getattr(module, "_modules", {}):
        module = module._modules["_orig_mod"]
    return module


def tensors(module: nn.Module, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, as in the `state_dict` of the module before compiling and fusing."""
    module = unwrapped(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield f"{path}{name}", tensor.detach()
    for name, child in module._modules.items():
        if child is not None and not (name in _FUSED and _is_fused(module, name)):
            yield from tensors(child, f"{path}{name}.")


def _is_fused(module: nn.Module, name: str) -> bool:
    """Whether child `name` is the fusion of its siblings' current weights, or is no longer used."""
    sources = [module._modules.get(source) for source in _FUSED[name]]
    if any(source is None for source in sources):
        return False
    if not type(getattr(module, "processor", None)).__name__.startswith("Fused"):
        return True
    fused = module._modules[name]
    return all(
        torch.equal(getattr(fused, leaf), torch.cat([getattr(source, leaf) for source in sources]))
        for leaf in ("weight", "bias")
        if getattr(fused, leaf) is not None
    )


def encoder_depth(module: Any) -> int:
    """How many layers an encoder of CLIP has; the last ones of a text encoder may have been removed, the older form of
    clip skip."""
    if hasattr(module, "model"):  # LDMBert
        return len(module.model.layers)
    if hasattr(getattr(module, "encoder", None), "block"):  # T5
        return len(module.encoder.block)
    inner = getattr(module, "text_model", None) or getattr(module, "vision_model", module)
    return len(inner.encoder.layers)


# --- Methods ---


def _is_stock(cls: type) -> bool:
    """Whether a class is defined by one of the packages, under its own name."""
    return (
        cls.__module__.partition(".")[0] in _PACKAGES
        and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
    )


def _qualified(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


@functools.cache
def _stock_paths() -> tuple[str, ...]:
    """Path prefixes of the packages, and the paths of single-file modules."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (*_PACKAGES, *_WRAPPERS)]
    return tuple(file.removesuffix("__init__.py") for file in files if file)


def _is_stock_code(function: FunctionType) -> bool:
    """Whether a function is defined in a package or in the standard library, by the file of its code: decorators copy
    all other names."""
    file = function.__code__.co_filename
    standard = file.startswith(os.__file__.removesuffix("os.py")) and "-packages" not in file
    return file.startswith(_stock_paths()) or standard or file == "<string>"  # methods of dataclasses


def _of_class(cls: type) -> Iterator[str]:
    """Methods that were replaced in a class or in its base classes."""
    if not _is_stock(cls):
        yield f"{cls.__module__}.{cls.__qualname__} is no class of {', '.join(_PACKAGES)}"
        return
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                if not _is_stock_code(function):  # its __module__ may have been copied by a decorator
                    yield f"{base.__name__}.{name} comes from {function.__code__.co_filename}"
            elif callable(value) and not isinstance(value, type) and type(value).__module__ != "builtins":
                yield f"{base.__name__}.{name} is {_qualified(value)}"


def _of_methods(path: str, owner: Any) -> Iterator[str]:
    """Methods of its class that an object overrides, except by their compiled form."""
    for name, value in vars(owner).items():
        method = getattr(type(owner), name, None)
        if isinstance(method, FunctionType | MethodType):
            while hasattr(value, "_torchdynamo_orig_callable"):
                value = value._torchdynamo_orig_callable
            if getattr(value, "__self__", None) is not owner or value.__func__ is not method:
                yield f"{path}.{name} is {_qualified(value)}"


# --- Networks ---


def of_network(path: str, module: Any) -> Iterator[str]:
    """Differences between a network of diffusers or transformers and a new one of its class and config."""
    module = unwrapped(module)
    classes = {type(part) for part in module.modules()} if isinstance(module, nn.Module) else {type(module)}
    classes |= {type(part.processor) for part in module.modules() if hasattr(part, "processor")}
    replaced = [change for cls in sorted(classes, key=str) if _is_stock(cls) for change in _of_class(cls)]
    yield from dict.fromkeys(replaced)
    if not _is_stock(type(module)):
        yield f"{path} is a {_qualified(module)}"
        return
    # Checked before building from the config, which fails if the config has the change too.
    for name, part in module.named_modules():
        if hasattr(part, "processor") and not _is_stock_processor(part.processor):
            yield f"{path}.{name}.processor is a {_qualified(part.processor)}"
    attention = getattr(module.config, "_attn_implementation", None)
    if attention not in _ATTENTIONS:
        yield f"{path}.config._attn_implementation is {_show(attention)}"
    try:
        reference = _reference(module)
    except Exception as error:  # depends on the config
        yield f"{path} has a config that no {type(module).__name__} has ({' '.join(str(error).split())[:80]})"
        return
    yield from _compare(path, module, reference)


def _is_stock_processor(processor: Any) -> bool:
    return _is_stock(type(processor)) and type(processor).__name__ in _PROCESSORS


def _reference(module: Any) -> nn.Module:
    cls = type(module)
    with torch.device("meta"):
        if not hasattr(module.config, "to_dict"):  # diffusers' own
            arguments = inspect.signature(cls.__init__).parameters
            return cls(**{name: value for name, value in module.config.items() if name in arguments})
        config = copy.deepcopy(module.config)
        config.num_hidden_layers = encoder_depth(module)
        return cls(config)


def _compare(path: str, module: Any, reference: nn.Module) -> Iterator[str]:
    if unwrapped(module) is not module:
        yield from _of_hooks(path, module)
        module = unwrapped(module)
    if type(module) is not type(reference):
        yield f"{path} is a {_qualified(type(module))}, not a {type(reference).__name__}"
        return
    yield from _of_hooks(path, module)
    yield from _of_methods(path, module)
    yield from _of_attributes(path, module, vars(reference))
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            yield f"{path}.{name} is a {_qualified(type(parameter))}: quantised, or spread over devices"
    for name, buffer in module._buffers.items():
        if name not in reference._buffers:
            yield f"{path}.{name} is a buffer that its config does not build"
        elif name == "position_ids" and buffer is not None and buffer.flatten().tolist() != [*range(buffer.numel())]:
            yield f"{path}.{name} is not 0, 1, 2 and so on"
    for name in dict.fromkeys((*reference._modules, *module._modules)):
        child, expected = module._modules.get(name), reference._modules.get(name)
        if child is None and expected is not None:
            yield f"{path}.{name} is missing"
        elif child is not None and expected is None:
            if not (name in _FUSED and _is_fused(module, name)):
                yield f"{path}.{name} is a {_qualified(type(child))} that its config does not build"
        elif child is not None and expected is not None:
            yield from _compare(f"{path}.{name}", child, expected)


def _of_hooks(path: str, module: nn.Module) -> Iterator[str]:
    """Hooks of the forward pass, except those of transformers, which only record outputs."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if (offloading := vars(module).get("_hf_hook")) is not None:
        hooks.append(offloading)
    hooks += getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values()
    for hook in hooks:
        if not _qualified(hook).startswith("transformers."):
            yield f"{path} has the hook {_qualified(hook)}"


def _of_attributes(path: str, module: nn.Module, expected: Mapping[str, Any]) -> Iterator[str]:
    """Public attributes with unexpected values; private ones do not affect images."""
    cls: Any = type(module)
    read = _read_names(cls)
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE or name.startswith("_") or name in _NO_EFFECT or name == "processor":
            continue
        if callable(getattr(cls, name, None)):
            continue  # a method: compared by _of_methods
        if name not in expected and name not in read:
            continue  # an added attribute that the class does not read
        # "zeros" even if the reference differs: a patched class may build convolutions with any padding
        default = "zeros" if name == "padding_mode" else expected.get(name)
        if not _is_same(value, default):
            yield f"{path}.{name} is {_show(value)}"
    rate = module.p if isinstance(module, _DropoutNd) else vars(module).get("dropout")
    if module.training and isinstance(rate, float) and rate > 0:
        yield f"{path} is in training mode with dropout {rate}"


@functools.cache
def _read_names(cls: Any) -> frozenset[str]:
    """Names and string constants in forward, encode and decode, and in the methods that they call."""
    names: set[str] = set()
    queue = ["forward", "encode", "decode"]
    while queue:
        method: Any = getattr(cls, queue.pop(), None)
        codes = [getattr(inspect.unwrap(method), "__code__", None)]
        while codes:
            code = codes.pop()
            if code is not None:
                codes += [const for const in code.co_consts if isinstance(const, CodeType)]
                used = {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}
                queue += used - names
                names |= used
    return frozenset(names)


def _is_same(value: Any, expected: Any) -> bool:
    if isinstance(value, bool | int | float | str | tuple | list | dict | set | None):
        return bool(value == expected)
    return value is expected if callable(value) else type(value) is type(expected)


def _show(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


# --- Schedulers, tokenizers and pipelines ---


def of_scheduler(scheduler: Any) -> Iterator[str]:
    """Differences between a scheduler and a new one of its class and config, both set to the same number of steps."""
    replaced = [*_of_class(type(scheduler)), *_of_methods("scheduler", scheduler)]
    yield from replaced
    if replaced:
        return
    arguments = inspect.signature(type(scheduler).__init__).parameters
    config = {name: value for name, value in scheduler.config.items() if name in arguments}
    try:
        new, *stepped = (type(scheduler)(**config) for _ in range(3))
        new.set_timesteps(_STEPS)
        for previous, calls in zip(stepped, (1, None), strict=True):  # interrupted, and run to the end
            _take_steps(previous, calls)
            previous.set_timesteps(_STEPS)
    except Exception:  # a config that diffusers itself cannot run: reading it raises an error
        return
    used = copy.deepcopy(scheduler)
    used.set_timesteps(_STEPS)
    for name, value in vars(used).items():
        expected = vars(new).get(name)
        changed_by_steps = any(not _is_close(vars(other).get(name), expected) for other in stepped)
        if not (name == "_internal_dict" or changed_by_steps or _is_close(value, expected)):
            yield f"scheduler.{name} differs from the scheduler's config"


def _take_steps(scheduler: Any, calls: int | None) -> None:
    """Take `calls` steps of a scheduler, or all, with its input as the model output."""
    scheduler.set_timesteps(_STEPS)
    x = torch.ones(1, 1, 2, 2)
    with torch.random.fork_rng(devices=[]):
        for t in scheduler.timesteps[:calls]:
            x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample


def _is_close(value: Any, expected: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray) or isinstance(expected, Tensor | np.ndarray):
        if value is None or expected is None:
            return False
        a, b = (torch.as_tensor(x).detach().cpu().double().numpy() for x in (value, expected))
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(_is_close, value, expected))
    if isinstance(value, float) and isinstance(expected, float):
        return bool(np.isclose(value, expected, rtol=1e-5, atol=1e-8, equal_nan=True))
    return _is_same(value, expected)


def of_tokenizer(path: str, tokenizer: Any) -> Iterator[str]:
    """Differences between a tokenizer and a new one of its class, except in vocabulary, merges and added tokens."""
    replaced = [*_of_class(type(tokenizer)), *_of_methods(path, tokenizer)]
    yield from replaced
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if replaced or backend is None:
        return
    try:
        options = {name: getattr(tokenizer, name) for name in BERT_OPTIONS if hasattr(tokenizer, name)}
        new = type(tokenizer)(**options).backend_tokenizer
    except Exception:  # a class that needs files
        return
    # T5's normaliser is of its files.
    for name in ("pre_tokenizer",) if type(tokenizer).__name__ == "T5Tokenizer" else ("normalizer", "pre_tokenizer"):
        if getattr(backend, name).__getstate__() != getattr(new, name).__getstate__():
            yield f"{path}.backend_tokenizer.{name} is {_show(getattr(backend, name))}"
    if getattr(backend.model, "dropout", None):  # of byte pairs
        yield f"{path}.backend_tokenizer.model.dropout is {backend.model.dropout}"


def of_pipeline(pipe: Any) -> Iterator[str]:
    """Changes of a pipeline itself, without its components."""
    yield from _of_class(type(pipe))
    for change in _of_methods("pipe", pipe):
        if change.split(" is ")[0].removeprefix("pipe.") not in _METHODS_WITHOUT_EFFECT:
            yield change
    bicubic = type(pipe).__name__ in (UPSCALE_PIPELINE, LATENT_UPSCALE_PIPELINE, KANDINSKY_PIPELINES[1])
    own: dict[str, Any] = {"resample": "bicubic"} if bicubic else {}
    own |= {"reducing_gap": 1} if type(pipe).__name__ == KANDINSKY_PIPELINES[1] else {}
    for name, options in _IMAGE_PROCESSORS.items():
        processor = getattr(pipe, name, None)
        if processor is None or name in pipe.components:  # of Kandinsky's prior it prepares what nothing reads
            continue
        yield from _of_class(type(processor))
        yield from _of_methods(f"pipe.{name}", processor)
        for key, parameter in inspect.signature(type(processor).__init__).parameters.items():
            value = processor.config.get(key, parameter.default)
            if not key.startswith("vae_") and key != "self" and value != {**options, **own}.get(key, parameter.default):
                yield f"pipe.{name}.{key} is {_show(value)}"
