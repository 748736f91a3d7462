"""What model an adapter file is for, as far as its keys show: for the message when it does not fit."""

from __future__ import annotations

import re

from fastldm.loading.relatives import first_match
from fastldm.loading.spec import Spec
from fastldm.loading.tensors import Shapes
from fastldm.models.config import UNetConfig

_CONTEXTS = {768: "SD 1.5", 1024: "SD 2", 1280: "the SDXL refiner", 2048: "SDXL"}
"""By the channels of the text that cross-attention reads."""

_KEYS = (  # the first match counts
    (r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]", "FLUX or another transformer"),
    (r"(^|[._])joint_(transformer_)?blocks[._]|^transformer\.|^lora_transformer_", "SD 3 or another transformer"),
    (r"(^|[._])motion_modules[._]", "AnimateDiff"),
)
_XL = (  # where no cross-attention tells SDXL from its refiner
    (r"^lora_te2_|^text_encoder_2\.|label_emb|add_embedding", "SDXL"),
    # Only SDXL's transformers have more than one block.
    (r"(attentions[._]\d+|(put_blocks|block)[._]\d+([._]\d+)?)[._]transformer_blocks[._][1-9]", "SDXL"),
)
_CROSS = re.compile(r"attn2[._](?:processor\.)?to_[kv](?:_lora)?\.(?:lora_down|lora_A|lora\.down|down|diff|b2)\b")


def family_of_keys(shapes: Shapes) -> str | None:
    """The family of models that a file is for, or None if its keys do not tell."""
    widths = {shape[1] for key, shape in shapes.items() if len(shape) >= 2 and _CROSS.search(key)}
    context = _CONTEXTS.get(widths.pop()) if len(widths) == 1 else None
    return first_match(_KEYS, shapes) or context or first_match(_XL, shapes)


def family_of_context(channels: int) -> str | None:
    """The same of what reads text of so many channels."""
    return _CONTEXTS.get(channels)


def family_of_unet(unet: UNetConfig) -> str | None:
    """The same of a U-Net, or of what has its encoder."""
    if unet.needs_added:
        return "the SDXL refiner" if unet.added_ids == 5 else "SDXL"
    return _CONTEXTS.get(unet.cross_attention_dim)


def family_of_spec(spec: Spec) -> str:
    """The same of a model."""
    return family_of_unet(spec.unet) or f"of the family {spec.family.name}"
