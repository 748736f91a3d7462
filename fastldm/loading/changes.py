"""What was changed in a loaded diffusers pipeline that neither its weights nor its configs say.

An adopted pipeline's networks are built anew, of its configs and weights. Whatever else decides its images would be
lost: a module of another class, a hook, a replaced method, an attribute such as a convolution's padding_mode. So each
network is compared with the one that its own class builds of its own config, and the scheduler with a new one of
as many steps; what differs is a change. What has no effect on an image is named here, not what has one.
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

_PACKAGES = ("torch", "diffusers", "transformers")
_WRAPPERS = ("huggingface_hub", "typing_extensions")  # decorators of those packages' methods
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # training, parameters, children, hooks: looked at one by one
_NO_EFFECT = frozenset(
    {
        "dropout",  # like a Dropout's p, none but in training
        "fused_projections",
        "gradient_checkpointing",
        "inplace",
        "name_or_path",
        "p",
        "tile_latent_min_size",  # of the autoencoder; `use_tiling` and `use_slicing` are honoured
        "tile_overlap_factor",
        "tile_sample_min_size",
        "upcast_attention",  # a float32 softmax, which every attention has here
        "upcast_softmax",
        "use_slicing",
        "use_tiling",
    }
)
_PROCESSORS = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)
"""Ways to compute the same attention."""
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""The same of transformers'."""
_FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
"""What `fuse_qkv_projections` adds to an attention, and what it is made of."""
_METHODS_WITHOUT_EFFECT = frozenset(
    {"check_inputs", "maybe_free_model_hooks", "progress_bar", "run_safety_checker", "set_progress_bar_config", "to"}
)
_IMAGE_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "image_processor": {},
    "mask_processor": {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True},
}
_STEPS = 4  # that both schedulers are set to

_CAUSES = (  # a pattern in a change, what it is, and what to do; the first that matches
    (r"\.[bs][12] is ", "FreeU", "call pipe.disable_freeu()"),
    (r"\.padding_mode is ", "a convolution that does not pad with zeros, as for seamless tiling", "set it to zeros"),
    (r"IPAdapter", "an IP-Adapter", "call pipe.unload_ip_adapter()"),
    (r"\bPAG", "perturbed-attention guidance", "call pipe.unet.set_default_attn_processor()"),
    (r"\bpeft\.|LoRA|lora", "a LoRA or another adapter", "call pipe.fuse_lora(), then pipe.unload_lora_weights()"),
    (r"\baccelerate\.", "accelerate's offloading", "call pipe.remove_all_hooks(), then pipe.to(device)"),
    (r"\bdiffusers\.hooks\.", "a hook of diffusers (caching, offloading, casting)", "load the pipeline without it"),
    (r"\btomesd\b|ToMe", "token merging", "call tomesd.remove_patch(pipe)"),
    (r"[Pp]arametri[sz]|(weight|spectral)_norm", "a weight made of others", "remove its parametrization"),
    (r"^scheduler\.", "a scheduler that is not its config", "set its config, or give timesteps or sigmas in the call,"),
    (r"bitsandbytes|torchao|quanto|quant|\bgguf\b", "quantised weights", "load the pipeline without quantisation"),
    (r"\btraining\b", "dropout, which draws at random", "call .eval() on it"),
    (r"AttnProcessor", "another way to compute attention", "call pipe.unet.set_default_attn_processor()"),
)


def told(changes: list[str]) -> str:
    """A sentence on changes, at least one: the first, what it is, and what to do."""
    first, *rest = changes
    unknown = ("", "a change beside its weights and configs", "undo it")
    _, cause, advice = next((row for row in _CAUSES if re.search(row[0], first)), unknown)
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{first}{more}: {cause}, which adoption would lose; {advice} first."


# --- Modules without what torch.compile and fusing add ---


def unwrapped(module: Any) -> Any:
    """The module that torch.compile was given, or any other as it is."""
    while type(module).__module__.startswith("torch._dynamo") and "_orig_mod" in getattr(module, "_modules", {}):
        module = module._modules["_orig_mod"]
    return module


def tensors(module: nn.Module, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, as `state_dict` has them of a module neither compiled nor fused."""
    module = unwrapped(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield f"{path}{name}", tensor.detach()
    for name, child in module._modules.items():
        if child is not None and not (name in _FUSED and _is_fused(module, name)):
            yield from tensors(child, f"{path}{name}.")


def _is_fused(module: nn.Module, name: str) -> bool:
    """Whether child `name` is what fusing its siblings' weights makes, or is left from that and not used."""
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


def text_depth(module: Any) -> int:
    """How many layers a CLIP text encoder runs; its last may have been taken away, the older way of clip skip."""
    return len(getattr(module, "text_model", module).encoder.layers)


# --- Methods ---


def _is_stock(cls: type) -> bool:
    """Whether a class is one of the packages' own, under its own name."""
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
    """Beginnings of the packages' paths, and the paths of what is one file."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (*_PACKAGES, *_WRAPPERS)]
    return tuple(file.removesuffix("__init__.py") for file in files if file)


def _is_stock_code(function: FunctionType) -> bool:
    """By the file that it was read from, for decorators pass a function's other names on."""
    file = function.__code__.co_filename
    standard = file.startswith(os.__file__.removesuffix("os.py")) and "-packages" not in file
    return file.startswith(_stock_paths()) or standard or file == "<string>"  # those that dataclasses write


def _of_class(cls: type) -> Iterator[str]:
    """Methods that were replaced in a class or in what it inherits from."""
    if not _is_stock(cls):
        yield f"{cls.__module__}.{cls.__qualname__} is no class of {', '.join(_PACKAGES)}"
        return
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                if not _is_stock_code(function):  # its name may be what a decorator passed on
                    yield f"{base.__name__}.{name} comes from {function.__code__.co_filename}"
            elif callable(value) and not isinstance(value, type) and type(value).__module__ != "builtins":
                yield f"{base.__name__}.{name} is {_qualified(value)}"


def _of_methods(path: str, owner: Any) -> Iterator[str]:
    """Methods that an object has in place of its class's, unless they are those, compiled."""
    for name, value in vars(owner).items():
        method = getattr(type(owner), name, None)
        if isinstance(method, FunctionType | MethodType):
            while hasattr(value, "_torchdynamo_orig_callable"):
                value = value._torchdynamo_orig_callable
            if getattr(value, "__self__", None) is not owner or value.__func__ is not method:
                yield f"{path}.{name} is {_qualified(value)}"


# --- Networks ---


def of_network(path: str, module: Any) -> Iterator[str]:
    """What differs in a network of diffusers or transformers from what its class builds of its config."""
    module = unwrapped(module)
    classes = {type(part) for part in module.modules()} if isinstance(module, nn.Module) else {type(module)}
    classes |= {type(part.processor) for part in module.modules() if hasattr(part, "processor")}
    replaced = [change for cls in sorted(classes, key=str) if _is_stock(cls) for change in _of_class(cls)]
    yield from dict.fromkeys(replaced)
    if not _is_stock(type(module)):
        yield f"{path} is a {_qualified(module)}"
        return
    # What differs whatever the config says goes first, for the config may say it too and then builds nothing.
    for name, part in module.named_modules():
        if hasattr(part, "processor") and not _is_stock_processor(part.processor):
            yield f"{path}.{name}.processor is a {_qualified(part.processor)}"
    attention = getattr(module.config, "_attn_implementation", None)
    if attention not in _ATTENTIONS:
        yield f"{path}.config._attn_implementation is {_shown(attention)}"
    try:
        reference = _reference(module)
    except Exception as error:  # of any config
        yield f"{path} has a config that builds no {type(module).__name__} ({' '.join(str(error).split())[:80]})"
        return
    yield from _compare(path, module, reference)


def _is_stock_processor(processor: Any) -> bool:
    return _is_stock(type(processor)) and type(processor).__name__ in _PROCESSORS


def _reference(module: Any) -> nn.Module:
    cls = type(module)
    with torch.device("meta"):
        if cls.__module__.startswith("diffusers."):
            arguments = inspect.signature(cls.__init__).parameters
            return cls(**{name: value for name, value in module.config.items() if name in arguments})
        config = copy.deepcopy(module.config)
        config.num_hidden_layers = text_depth(module)
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
    """Hooks of the forward pass. transformers has some of its own, that look and change nothing."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if (offloading := vars(module).get("_hf_hook")) is not None:
        hooks.append(offloading)
    hooks += getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values()
    for hook in hooks:
        if not _qualified(hook).startswith("transformers."):
            yield f"{path} has the hook {_qualified(hook)}"


def _of_attributes(path: str, module: nn.Module, expected: Mapping[str, Any]) -> Iterator[str]:
    """Public attributes that are not what they should be; those that begin with _ are bookkeeping."""
    cls: Any = type(module)
    read = _read_names(cls)
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE or name.startswith("_") or name in _NO_EFFECT or name == "processor":
            continue
        if callable(getattr(cls, name, None)):
            continue  # a method: looked at as such
        if name not in expected and name not in read:
            continue  # a note of somebody's, which the class does not read
        # a patched class builds its convolutions with any padding
        default = "zeros" if name == "padding_mode" else expected.get(name)
        if not _is_same(value, default):
            yield f"{path}.{name} is {_shown(value)}"
    rate = module.p if isinstance(module, _DropoutNd) else vars(module).get("dropout")
    if module.training and isinstance(rate, float) and rate > 0:
        yield f"{path} is in training mode with dropout {rate}"


@functools.cache
def _read_names(cls: Any) -> frozenset[str]:
    """Names and texts in the code that runs a network: forward, encode and decode, and the methods that they call."""
    names: set[str] = set()
    waiting = ["forward", "encode", "decode"]
    while waiting:
        method: Any = getattr(cls, waiting.pop(), None)
        codes = [getattr(inspect.unwrap(method), "__code__", None)]
        while codes:
            code = codes.pop()
            if code is not None:
                codes += [const for const in code.co_consts if isinstance(const, CodeType)]
                found = {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}
                waiting += found - names
                names |= found
    return frozenset(names)


def _is_same(value: Any, right: Any) -> bool:
    if isinstance(value, bool | int | float | str | tuple | list | dict | set | None):
        return bool(value == right)
    return value is right if callable(value) else type(value) is type(right)


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


# --- All else ---


def of_scheduler(scheduler: Any) -> Iterator[str]:
    """What differs in a scheduler from a new one of its class and config, once both are set to the same steps."""
    replaced = [*_of_class(type(scheduler)), *_of_methods("scheduler", scheduler)]
    yield from replaced
    if replaced:
        return
    arguments = inspect.signature(type(scheduler).__init__).parameters
    config = {name: value for name, value in scheduler.config.items() if name in arguments}
    try:
        new, *used_before = (type(scheduler)(**config) for _ in range(3))
        new.set_timesteps(_STEPS)
        for other, calls in zip(used_before, (1, None), strict=True):  # interrupted, and run to the end
            _take_steps(other, calls)
            other.set_timesteps(_STEPS)
    except (
        Exception
    ):  # of a config that diffusers itself cannot run; what is wrong with it is an error where it is read
        return
    used = copy.deepcopy(scheduler)
    used.set_timesteps(_STEPS)
    for name, value in vars(used).items():
        expected = vars(new).get(name)
        changed_by_steps = any(not _is_close(vars(other).get(name), expected) for other in used_before)
        if not (name == "_internal_dict" or changed_by_steps or _is_close(value, expected)):
            yield f"scheduler.{name} is not what the scheduler's config says"


def _take_steps(scheduler: Any, calls: int | None) -> None:
    """So many steps of a scheduler, or all, with its input in place of a network's output."""
    scheduler.set_timesteps(_STEPS)
    x = torch.ones(1, 1, 2, 2)
    with torch.random.fork_rng(devices=[]):
        for t in scheduler.timesteps[:calls]:
            x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample


def _is_close(value: Any, right: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray) or isinstance(right, Tensor | np.ndarray):
        if value is None or right is None:
            return False
        a, b = (torch.as_tensor(x).detach().cpu().double().numpy() for x in (value, right))
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)
    if isinstance(value, list | tuple) and isinstance(right, list | tuple):
        return len(value) == len(right) and all(map(_is_close, value, right))
    if isinstance(value, float) and isinstance(right, float):
        return bool(np.isclose(value, right, rtol=1e-5, atol=1e-8, equal_nan=True))
    return _is_same(value, right)


def of_tokenizer(path: str, tokenizer: Any) -> Iterator[str]:
    """What differs in a tokenizer but for its vocabulary, merges and added tokens, from a new one of its class."""
    replaced = [*_of_class(type(tokenizer)), *_of_methods(path, tokenizer)]
    yield from replaced
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if replaced or backend is None:
        return
    try:
        new = type(tokenizer)().backend_tokenizer
    except Exception:  # a class that builds none without files
        return
    for name in ("normalizer", "pre_tokenizer"):
        if getattr(backend, name).__getstate__() != getattr(new, name).__getstate__():
            yield f"{path}.backend_tokenizer.{name} is {_shown(getattr(backend, name))}"
    if backend.model.dropout:
        yield f"{path}.backend_tokenizer.model.dropout is {backend.model.dropout}"


def of_pipeline(pipe: Any) -> Iterator[str]:
    """What differs in a pipeline itself, its components apart."""
    yield from _of_class(type(pipe))
    for change in _of_methods("pipe", pipe):
        if change.split(" is ")[0].removeprefix("pipe.") not in _METHODS_WITHOUT_EFFECT:
            yield change
    for name, options in _IMAGE_PROCESSORS.items():
        processor = getattr(pipe, name, None)
        if processor is None:
            continue
        yield from _of_class(type(processor))
        yield from _of_methods(f"pipe.{name}", processor)
        for key, parameter in inspect.signature(type(processor).__init__).parameters.items():
            value = processor.config.get(key, parameter.default)
            if not key.startswith("vae_") and key != "self" and value != options.get(key, parameter.default):
                yield f"pipe.{name}.{key} is {_shown(value)}"
