"""The key names of adapter files: a pure function for each format, from a key to the module and the tensor it names.

`recognise_adapter` chooses the format by FORMATS; to add one, add a function and its row. `group_keys` then collects
the tensors of each module.

| format | keys |
|---|---|
| kohya | `lora_unet_`, `lora_te_`, `lora_te1_`, `lora_te2_` + path with "_" + `.lora_down.weight`, `.alpha`, ... Also LCM-, TCD- and Hyper-SD-LoRA |
| lycoris | `lycoris_` + path with "_" + the same tensors; the component is not stated |
| diffusers | `unet.`, `text_encoder.`, `text_encoder_2.` or nothing + path + `.lora_A.weight`, `.lora.down.weight`, `.lora_linear_layer.down.weight`, `_lora.down.weight` of a processor, ... |
| peft | `base_model.model.` + path + `.lora_A.weight`, ..., with adapter_config.json beside the file |

Paths with "_" are diffusers' or those of the original layout (targets.py).
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class Key(NamedTuple):
    """What a key of a file names."""

    components: tuple[str, ...]
    """The component, or those it may be in where the file does not say."""
    module: str
    """The module's path as the file spells it."""
    tensor: str
    """The tensor's name, the same in all formats: `lora_down`, `alpha`, `hada_w1_a`, ... (TENSORS)."""


TENSORS: dict[str, str] = {
    **{f"lora_{name}.weight": f"lora_{name}" for name in ("down", "up", "mid")},
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    **{name: name for name in ("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale")},
    "weight": "ia3",
    "on_input": "on_input",
}
"""The ends of keys after a module's name, and our names of those tensors."""

UNSUPPORTED = {
    "lora_embedding_A": "a LoRA of an embedding",
    "lora_embedding_B": "a LoRA of an embedding",
    "oft_diag": "an early form of OFT, which lycoris-lora replaced by `oft_blocks`",
    "oft_R.weight": "peft's OFT",
    "boft_R": "peft's BOFT",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "q_layer.weight": "T-LoRA",
    "p_layer.weight": "T-LoRA",
    "lambda_layer": "T-LoRA",
}
"""The ends of keys of forms that are not implemented."""


def read_kohya_key(key: str) -> Key | None:
    """`lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight`"""
    name, _, tensor = key.partition(".")
    for prefix, component in _KOHYA.items():
        if name.startswith(prefix):
            return Key((component,), name[len(prefix) :], TENSORS.get(tensor, tensor))
    return None


_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}


def read_lycoris_key(key: str) -> Key | None:
    """`lycoris_down_blocks_0_resnets_0_conv1.hada_w1_a`"""
    name, _, tensor = key.partition(".")
    if not name.startswith("lycoris_"):
        return None
    return Key(COMPONENTS, name.removeprefix("lycoris_"), TENSORS.get(tensor, tensor))


_ENDS = {
    **{f".lora_{letter}.weight": f"lora_{name}" for letter, name in (("A", "down"), ("B", "up"))},
    **{f".lora_{letter}.default.weight": f"lora_{name}" for letter, name in (("A", "down"), ("B", "up"))},
    **{f"{stem}.{name}.weight": f"lora_{name}" for stem in (".lora", ".lora_linear_layer") for name in ("down", "up")},
    **{f"_lora.{name}.weight": f"lora_{name}" for name in ("down", "up")},
    ".lora_B.bias": "lora_up_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    "_lora.alpha": "alpha",
    ".lora.alpha": "alpha",
    ".lora_linear_layer.alpha": "alpha",
    **{f".{end}": name for end, name in TENSORS.items() if name not in ("ia3", "on_input")},
    **{f".{end}": end for end in UNSUPPORTED},
}
_LONGEST_FIRST = sorted(_ENDS, key=len, reverse=True)
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def read_diffusers_key(key: str) -> Key | None:
    """`unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight`"""
    end = next((end for end in _LONGEST_FIRST if key.endswith(end)), None)
    if end is None:
        return None
    module = key[: -len(end)]
    components: tuple[str, ...] = COMPONENTS
    for name in COMPONENTS:
        if module.startswith(f"{name}."):
            components, module = (name,), module[len(name) + 1 :]
            break
    module = module.replace(".processor.", ".")
    head, _, last = module.rpartition(".")
    if head.endswith(".self_attn"):  # a text encoder's, with a U-Net's names
        module = f"{head}.{_OLD_TEXT_NAMES.get(last, last)}"
    return Key(components, module, _ENDS[end])


def read_peft_key(key: str) -> Key | None:
    """`base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight`"""
    return read_diffusers_key(key.removeprefix(_PEFT)) if key.startswith(_PEFT) else None


_PEFT = "base_model.model."


class KeyFormat(NamedTuple):
    """A format of key names: a pattern of which one key is enough, and the function that reads a key."""

    name: str
    pattern: str
    read: Callable[[str], Key | None]


FORMATS = (  # the first match counts
    KeyFormat("kohya", r"lora_(unet|te|te1|te2)_", read_kohya_key),
    KeyFormat("lycoris", r"lycoris_", read_lycoris_key),
    KeyFormat("peft", r"base_model\.model\..*\.lora_[AB]\.", read_peft_key),
    KeyFormat(
        "diffusers", r".*[._]lora(\.|_A\.|_B\.|_linear_layer\.|_down\.|_up\.|_magnitude_vector)", read_diffusers_key
    ),
)


def recognise_adapter(keys: Iterable[str]) -> KeyFormat | None:
    """The format of a file's keys, or None for a file of something else."""
    keys = list(keys)
    for entry in FORMATS:
        match = re.compile(entry.pattern).match
        if any(match(key) for key in keys):
            return entry
    return None


@dataclass
class KeyGroup:
    """The keys of one module."""

    components: tuple[str, ...]
    module: str
    keys: dict[str, str] = field(default_factory=dict)
    """Our names of the tensors, each with its key in the file."""


def group_keys(keys: Collection[str], key_format: KeyFormat) -> tuple[list[KeyGroup], list[str]]:
    """The modules that a file names, in its order, and the keys that name none. A second key for the same tensor of a
    module is one of those."""
    groups: dict[tuple[tuple[str, ...], str], KeyGroup] = {}
    rest = []
    for key in keys:
        read = key_format.read(key)
        if read is None or not read.module:
            rest.append(key)
            continue
        group = groups.setdefault(read[:2], KeyGroup(read.components, read.module))
        if group.keys.setdefault(read.tensor, key) != key:
            rest.append(key)
    return list(groups.values()), rest
