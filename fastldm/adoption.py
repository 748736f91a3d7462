"""A loaded diffusers pipeline, taken over: what it is, and its weights without a copy.

pipe -> describe_diffusers -> Checkpoint -> networks on the meta device -> adopt
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from fastldm import loading, weights
from fastldm.errors import CheckpointError

Module = TypeVar("Module", bound=nn.Module)


def describe_diffusers(pipe: Any) -> weights.Checkpoint:
    """What a loaded diffusers pipeline is. Its components have configs but no files: `adopt` takes their weights.

    Raises CheckpointError for a pipeline that fastldm cannot run.
    """
    source = type(pipe).__name__
    index = {**pipe.config, "_class_name": source}
    classes = weights.component_classes(index, source)
    components = {}
    for name in classes:
        if name in weights.NETWORK_CLASSES:
            config = getattr(pipe, name).config
            raw = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            components[name] = weights.Component(
                name, classes[name], weights.named_config(raw, classes[name]), (), f"{source}: {name}"
            )
    # What its author left to the class's defaults is left to the next class's too, as diffusers' `from_config` does.
    defaults = ("_use_default_values", *pipe.scheduler.config.get("_use_default_values", ()))
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if key not in defaults}
    scheduler["_class_name"] = type(pipe.scheduler).__name__
    tokenizers = {
        name: weights.TokenizerFiles(None, loaded=getattr(pipe, name)) for name in weights.TOKENIZERS if name in classes
    }
    return weights.Checkpoint(source, components, scheduler, tokenizers, index, loaded=True)


def adopt(module: Module, other: nn.Module) -> Module:
    """Give `module`, built on the meta device, the weights of a loaded diffusers or transformers module, not copied.

    Both modules then share storage: what is written into one's weights in place is seen by the other. Dtype and device
    stay; `other` is unchanged. Raises CheckpointError as `load_module` does, and for weights that are not all in one
    dtype on one device (offloaded, quantised).
    """
    source, state = f"the given {type(other).__name__}", other.state_dict()
    fitted = weights.fit_names(module, state, source)
    kinds = {(state[key].dtype, state[key].device) for key in fitted.values()}
    if len(kinds) != 1 or any(device.type == "meta" or dtype not in loading.DTYPES for dtype, device in kinds):
        shown = ", ".join(sorted(f"{dtype} on {device}".removeprefix("torch.") for dtype, device in kinds))
        raise CheckpointError(
            f"{source[0].upper()}{source[1:]} has weights in {shown}; they must be float32, float16 or bfloat16, in "
            "one dtype on one device. Undo offloading or quantisation first."
        )
    module.load_state_dict({name: state[key] for name, key in fitted.items()}, assign=True)
    return module.requires_grad_(False).eval()
