"""The alpha of each module as peft's config states it: in the header of a file that diffusers saved
(`lora_adapter_metadata`), or in an adapter_config.json beside a file that peft saved.

Without it such a file would be read at the wrong strength, since its keys hold no alpha.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastldm.adapters.module_tensors import Alpha
from fastldm.checks import show
from fastldm.errors import CheckpointError
from fastldm.reading import Either, Field, Flag, MapOf, Maybe, Number, Text, read_fields

METADATA = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
_MAX_HEADER = 2**20  # characters of the JSON in a header
_ALPHA = Number(0, 1e9)  # 0 is refused where a module has it

_FIELDS = {
    "peft_type": Field(Maybe(Text(40)), None),
    "lora_alpha": Field(Maybe(_ALPHA), None),
    "alpha_pattern": Field(Maybe(MapOf(_ALPHA, 0, 20_000)), None),
    "use_rslora": Field(Flag(), False),
    "use_qalora": Field(Flag(), False),
    "bias": Field(Maybe(Text(40)), None),
    "init_lora_weights": Field(Maybe(Either(Flag(), Text(40))), None),
}
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to start a LoRA after which the model's own weights are not those of its checkpoint."""


@dataclass(frozen=True)
class PeftConfig:
    """What the config of a component states."""

    lora_alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def alpha(self, module: str) -> Alpha:
        """Of a module by its path: its own by the first pattern that matches, else all modules'."""
        own = (value for pattern, value in self.alpha_pattern.items() if _matches(pattern, module))
        return Alpha(next(own, self.lora_alpha), self.use_rslora)


def read_config(config: Mapping[str, Any], source: str) -> PeftConfig:
    """One component's. CheckpointError for values that are not of their kind, or that state what is not implemented."""
    values = read_fields(config, _FIELDS, source)
    start = values["init_lora_weights"]
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{source}: 'init_lora_weights' is {show(start)}: this adapter belongs to weights that were changed when "
            "its training began. Convert it to a plain LoRA with peft's path_initial_model_for_weight_conversion."
        )
    for key, neutral in (("peft_type", ("LORA", None)), ("bias", ("none", None)), ("use_qalora", (False,))):
        if values[key] not in neutral:
            raise CheckpointError(f"{source}: {key!r} is {show(values[key])}; fastldm implements {neutral[0]!r}")
    for pattern in values["alpha_pattern"] or ():
        _literal(pattern, source)
    return PeftConfig(values["lora_alpha"], values["alpha_pattern"] or {}, values["use_rslora"])


def configs_of_header(metadata: Mapping[str, str], components: Sequence[str], source: str) -> dict[str, PeftConfig]:
    """By component, from a safetensors header; empty where it has none. A header without names of components
    (`save_lora_adapter`) is that of all."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    at = f"{source}: {METADATA!r} of its header"
    try:
        content = json.loads(text) if len(text) <= _MAX_HEADER else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{at} is {show(text)}, expected a JSON object of at most {_MAX_HEADER:,} characters")
    named = {
        component: {
            key[len(component) + 1 :]: value for key, value in content.items() if key.startswith(f"{component}.")
        }
        for component in components
    }
    if not any(named.values()):
        named = dict.fromkeys(components, content)
    return {component: read_config(values, f"{at} ({component})") for component, values in named.items() if values}


def _literal(pattern: str, source: str) -> tuple[str, bool]:
    """The path in a pattern, and whether it is a full one ("^"). peft's patterns are regular expressions: a hostile one
    runs for ever, and trainers write paths, so that nothing else is read."""
    path = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not path.replace(".", "").replace("_", "").isalnum():
        raise CheckpointError(
            f"{source}: 'alpha_pattern' has the pattern {show(pattern)}; fastldm reads paths of modules there, no "
            "regular expressions"
        )
    return path, pattern.startswith("^")


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern is a module's path, or, if it is not tied to the start, an end of it."""
    path, is_full = _literal(pattern, "")
    return module == path or (not is_full and module.endswith(f".{path}"))
