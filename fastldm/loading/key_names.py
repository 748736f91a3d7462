"""The names of the original Stability layout as diffusers and transformers say them.

Each is a pure function of a key without its prefix; () is a key to leave alone, None an unknown one. `convert` then
renames (and splits, transposes or flattens) the tensors. The maps follow diffusers' `loaders/single_file_utils.py`,
their judge in the tests too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

Names = tuple[str, ...]

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_ENDS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def unet_name(key: str, layers_per_block: int) -> Names | None:
    """diffusers' name of a U-Net key without `model.diffusion_model.`: blocks count through there, by level here."""
    stem, _, end = key.rpartition(".")  # end: weight or bias
    if stem in _UNET_ENDS:
        return (f"{_UNET_ENDS[stem]}.{end}",)
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", stem):
        side, flat, slot, rest = match[1], int(match[2]), int(match[3]), match[4]
        block, layer = divmod(flat - 1 if side == "input" else flat, layers_per_block + 1)
        down_or_up = "down" if side == "input" else "up"
        if (side, rest) in (("input", "op"), ("output", "conv")):
            return (f"{down_or_up}_blocks.{block}.{down_or_up}samplers.0.conv.{end}",)
        if slot == 0 and rest in _UNET_RESNET:
            return (f"{down_or_up}_blocks.{block}.resnets.{layer}.{_UNET_RESNET[rest]}.{end}",)
        if slot == 1:
            return (f"{down_or_up}_blocks.{block}.attentions.{layer}.{rest}.{end}",)
    if match := re.fullmatch(r"middle_block\.([02])\.(.+)", stem):
        return (
            (f"mid_block.resnets.{int(match[1]) // 2}.{_UNET_RESNET[match[2]]}.{end}",)
            if match[2] in _UNET_RESNET
            else None
        )
    if stem.startswith("middle_block.1."):
        return (f"mid_block.attentions.0.{stem.removeprefix('middle_block.1.')}.{end}",)
    return None


def vae_name(key: str, levels: int) -> Names | None:
    """diffusers' name of a VAE key without `first_stage_model.`; the decoder's levels count the other way round."""
    if key.startswith(("loss.", "model_ema.")):  # what training left behind
        return ()
    stem, _, end = key.rpartition(".")
    if stem in ("quant_conv", "post_quant_conv"):
        return (key,)
    side, _, rest = stem.partition(".")
    if side not in ("encoder", "decoder"):
        return None
    if rest in ("conv_in", "conv_out"):
        return (key,)
    if rest == "norm_out":
        return (f"{side}.conv_norm_out.{end}",)
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(?:block\.(\d+)\.(\w+)|(?:down|up)sample\.conv)", rest):
        level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
        where = f"{side}.{match[1]}_blocks.{level}"
        if match[3] is None:
            return (f"{where}.{match[1]}samplers.0.conv.{end}",)
        return (f"{where}.resnets.{match[3]}.{_VAE_RESNET[match[4]]}.{end}",) if match[4] in _VAE_RESNET else None
    if match := re.fullmatch(r"mid\.block_([12])\.(\w+)", rest):
        return (
            (f"{side}.mid_block.resnets.{int(match[1]) - 1}.{_VAE_RESNET[match[2]]}.{end}",)
            if match[2] in _VAE_RESNET
            else None
        )
    if match := re.fullmatch(r"mid\.attn_1\.(\w+)", rest):
        return (
            (f"{side}.mid_block.attentions.0.{_VAE_ATTENTION[match[1]]}.{end}",) if match[1] in _VAE_ATTENTION else None
        )
    return None


def transformers_clip_name(key: str, *, with_projection: bool, drops_last: bool) -> Names | None:
    """transformers' own name of a CLIP text key without its prefix: the same, less what is no weight of the model."""
    if key.endswith("position_ids") or key.startswith(("logit_scale", "vision_model.", "visual_projection.")):
        return ()
    if key == "text_projection.weight":
        return (key,) if with_projection else ()
    name = f"text_model.{key.removeprefix('text_model.')}"  # files of 2022 lack it
    if not name.startswith(("text_model.embeddings.", "text_model.encoder.", "text_model.final_layer_norm.")):
        return None
    return () if drops_last and is_dropped_layer(name) else (name,)


def is_dropped_layer(key: str) -> bool:
    """SD2 conditions on the output of OpenCLIP H's last layer but one: diffusers drops layer 23 of 24, and so do we."""
    return re.match(r"(transformer\.resblocks|(text_model\.)?encoder\.layers)\.23\.", key) is not None


def open_clip_name(key: str, *, with_projection: bool, drops_last: bool) -> Names | None:
    """transformers' name, or three of them for a fused q, k, v, of an OpenCLIP text key without its prefix."""
    if key in ("logit_scale", "attn_mask") or key.startswith("visual."):
        return ()
    if key in _OPEN_CLIP_ENDS:
        return (_OPEN_CLIP_ENDS[key],) if with_projection or key != "text_projection" else ()
    if drops_last and is_dropped_layer(key):
        return ()
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
    if match is None:
        return None
    layer, end = f"text_model.encoder.layers.{match[1]}", match[3]
    if match[2] == "attn.in_proj":
        return tuple(f"{layer}.self_attn.{part}_proj.{end}" for part in "qkv")
    return (f"{layer}.{_OPEN_CLIP_BLOCK[match[2]]}.{end}",) if match[2] in _OPEN_CLIP_BLOCK else None


def convert(tensors: Mapping[str, Tensor], names: Mapping[str, Names]) -> dict[str, Tensor]:
    """Tensors under their new names: views of the old ones, save for the small transposed `text_projection`.

    A fused (3C, ...) q, k, v is split in three; the VAE's attention weights, 1x1 convolutions (C, C, 1, 1) there,
    become (C, C).
    """
    state: dict[str, Tensor] = {}
    for key, targets in names.items():
        tensor = tensors[key]
        if len(targets) == 3:
            state.update(zip(targets, tensor.chunk(3), strict=True))
        elif key.endswith("text_projection"):
            state[targets[0]] = tensor.T.contiguous()
        elif ".mid.attn_1." in key and tensor.ndim > 2:
            state[targets[0]] = tensor.flatten(1)
        else:
            state[targets[0]] = tensor
    return state
