"""Key names of the original Stability layout, converted to those of diffusers and transformers.

Each function takes a key without its prefix and returns the new names, () for a key to ignore and None for an unknown
one. `convert` then renames (and splits, transposes or flattens) the tensors. The maps follow diffusers'
`loaders/single_file_utils.py`, with which the tests compare them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

Names = tuple[str, ...]

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
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
_OPEN_CLIP_VISION = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    **{f"ln_pre.{end}": f"vision_model.pre_layrnorm.{end}" for end in ("weight", "bias")},
    **{f"ln_post.{end}": f"vision_model.post_layernorm.{end}" for end in ("weight", "bias")},
    "proj": "visual_projection.weight",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def unet_name(key: str, layers_per_block: int, label: str = "add_embedding") -> Names | None:
    """diffusers' name of a U-Net key without `model.diffusion_model.`: flat block numbers become level and layer.
    label: what reads the vector that is added to the time embedding."""
    stem, _, end = key.rpartition(".")  # end: weight or bias
    if stem in _UNET_ENDS:
        return (f"{_UNET_ENDS[stem]}.{end}".replace("add_embedding", label),)
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", stem):
        side, index, slot, rest = match[1], int(match[2]), int(match[3]), match[4]
        block, layer = divmod(index - 1 if side == "input" else index, layers_per_block + 1)
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


def controlnet_name(key: str, layers_per_block: int, last_hint: int) -> Names | None:
    """diffusers' name of a ControlNet key without `control_model.`: those of a U-Net's first half, zero convolutions,
    and the image's convolutions, at the even places up to `last_hint` (14) of a sequence with activations."""
    stem, _, end = key.rpartition(".")
    if match := re.fullmatch(r"zero_convs\.(\d+)\.0", stem):
        return (f"controlnet_down_blocks.{match[1]}.{end}",)
    if stem == "middle_block_out.0":
        return (f"controlnet_mid_block.{end}",)
    if match := re.fullmatch(r"input_hint_block\.(\d+)", stem):
        place = int(match[1])
        conv = {0: "conv_in", last_hint: "conv_out"}.get(place, f"blocks.{place // 2 - 1}")
        return (f"controlnet_cond_embedding.{conv}.{end}",) if place % 2 == 0 else None
    return unet_name(key, layers_per_block) if stem.startswith(("time_embed.", "label_emb.", "input_", "mid")) else None


def t2i_adapter_name(key: str, layers: int) -> Names | None:
    """diffusers' name of a T2I-Adapter key of the original layout. layers: of each block of a full adapter, which are
    numbered through there."""
    if re.fullmatch(r"conv_in\.(weight|bias)", key):
        return (f"adapter.{key}",)
    if match := re.fullmatch(r"body\.(\d+)\.(in_conv|out_conv)\.(weight|bias)", key):  # of a block, or its first layer
        block = int(match[1]) // layers
        return (f"adapter.body.{block}.{match[2]}.{match[3]}",) if int(match[1]) % layers == 0 else None
    if match := re.fullmatch(r"body\.(\d+)\.body\.(\d+)\.(block[12]\.(?:weight|bias))", key):  # light
        return (f"adapter.body.{match[1]}.resnets.{match[2]}.{match[3]}",)
    if match := re.fullmatch(r"body\.(\d+)\.(block[12]\.(?:weight|bias))", key):
        block, layer = divmod(int(match[1]), layers)
        return (f"adapter.body.{block}.resnets.{layer}.{match[2]}",)
    return None


def vae_name(key: str, levels: int) -> Names | None:
    """diffusers' name of a VAE key without `first_stage_model.`; the decoder's levels are numbered in reverse."""
    if key.startswith(("loss.", "model_ema.")):  # training state
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
        block = f"{side}.{match[1]}_blocks.{level}"
        if match[3] is None:
            return (f"{block}.{match[1]}samplers.0.conv.{end}",)
        return (f"{block}.resnets.{match[3]}.{_VAE_RESNET[match[4]]}.{end}",) if match[4] in _VAE_RESNET else None
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
    """transformers' name of a CLIP text key without its prefix: the same key, or () if it is no weight of the model."""
    if key.endswith("position_ids") or key.startswith(("logit_scale", "vision_model.", "visual_projection.")):
        return ()
    if key == "text_projection.weight":
        return (key,) if with_projection else ()
    name = f"text_model.{key.removeprefix('text_model.')}"  # missing in files from 2022
    if not name.startswith(("text_model.embeddings.", "text_model.encoder.", "text_model.final_layer_norm.")):
        return None
    return () if drops_last and is_dropped_layer(name) else (name,)


def is_dropped_layer(key: str) -> bool:
    """SD2 conditions on the output of OpenCLIP H's penultimate layer: like diffusers, drop layer 23 of 24."""
    return re.match(r"(transformer\.resblocks|(text_model\.)?encoder\.layers)\.23\.", key) is not None


def open_clip_name(key: str, *, with_projection: bool, drops_last: bool) -> Names | None:
    """transformers' name of an OpenCLIP text key without its prefix, or three names for a fused q, k, v."""
    if key in ("logit_scale", "attn_mask") or key.startswith("visual."):
        return ()
    if key in _OPEN_CLIP_ENDS:
        return (_OPEN_CLIP_ENDS[key],) if with_projection or key != "text_projection" else ()
    if drops_last and is_dropped_layer(key):
        return ()
    return _open_clip_block(key, "text_model")


def open_clip_vision_name(key: str) -> Names | None:
    """transformers' name of a key of OpenCLIP's, or OpenAI's, image encoder; () for those of the text beside it."""
    if not key.startswith("visual."):
        return ()
    key = key.removeprefix("visual.")
    return (_OPEN_CLIP_VISION[key],) if key in _OPEN_CLIP_VISION else _open_clip_block(key, "vision_model")


def _open_clip_block(key: str, root: str) -> Names | None:
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
    if match is None:
        return None
    layer, end = f"{root}.encoder.layers.{match[1]}", match[3]
    if match[2] == "attn.in_proj":
        return tuple(f"{layer}.self_attn.{letter}_proj.{end}" for letter in "qkv")
    return (f"{layer}.{_OPEN_CLIP_BLOCK[match[2]]}.{end}",) if match[2] in _OPEN_CLIP_BLOCK else None


_LDM_BERT_LAYER = {
    "self_attn_layer_norm": "layer_norm1",
    "final_layer_norm": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    **{name: name for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")},
}
_LDM_BERT_ENDS = {
    "model.embed_tokens": "text_model.embeddings.token_embedding",
    "model.embed_positions": "text_model.embeddings.position_embedding",
    "model.layer_norm": "text_model.final_layer_norm",
}


def ldm_bert_name(key: str) -> Names | None:
    """The name of a key of diffusers' LDMBertModel in models/clip.py, which has its layers."""
    stem, _, end = key.rpartition(".")
    if stem == "to_logits":  # of its training
        return ()
    if stem in _LDM_BERT_ENDS:
        return (f"{_LDM_BERT_ENDS[stem]}.{end}",)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if match is None or match[2] not in _LDM_BERT_LAYER:
        return None
    return (f"text_model.encoder.layers.{match[1]}.{_LDM_BERT_LAYER[match[2]]}.{end}",)


HEAD = 64
"""Channels of GLIDE's heads, of each of which queries, keys and values lie side by side."""
_INTERLEAVED = re.compile(r"(?:qkv|encoder_kv)\.(?:weight|bias)")
_GLIDE_ATTENTION = {
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "encoder_kv": ("add_k_proj", "add_v_proj"),
    "proj_out": ("to_out.0",),
}
_GLIDE_TEXT_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "padding_embedding": "text_model.embeddings.padding_embedding.weight",
    **{f"final_ln.{end}": f"text_model.final_layer_norm.{end}" for end in ("weight", "bias")},
    **{f"transformer_proj.{end}": f"text_projection.{end}" for end in ("weight", "bias")},
}
_GLIDE_TEXT_BLOCK = {
    "attn.c_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.out_proj",),
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}


def glide_unet_name(key: str, layers_per_block: int) -> Names | None:
    """diffusers' names of a key of GLIDE's U-Net, which is ADM's: resnets resize, and attention adds keys of the text
    (SimpleCrossAttnDownBlock2D)."""
    stem, _, end = key.rpartition(".")
    match = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d)\.(.+)", stem)
    if match is None:
        return unet_name(key, layers_per_block)
    side, slot, rest = match[1], int(match[3]), match[4]
    place, layer = "mid_block", 0
    if side is not None:
        block, layer = divmod(int(match[2]) - (side == "input"), layers_per_block + 1)
        place = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if rest in _GLIDE_ATTENTION:
        return tuple(f"{place}.attentions.{layer}.{name}.{end}" for name in _GLIDE_ATTENTION[rest])
    if rest in _UNET_RESNET and side == "input" and layer == layers_per_block:
        return (f"{place}.downsamplers.0.{_UNET_RESNET[rest]}.{end}",)
    if rest in _UNET_RESNET and side == "output" and slot > 0:
        return (f"{place}.upsamplers.0.{_UNET_RESNET[rest]}.{end}",)
    return unet_name(key, layers_per_block)


def glide_text_name(key: str) -> Names | None:
    """The names of a key of GLIDE's text transformer in models/glide.py; () for the words that it was trained to
    predict."""
    if key in _GLIDE_TEXT_ENDS:
        return (_GLIDE_TEXT_ENDS[key],)
    if key.startswith("unemb."):
        return ()
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None or match[2] not in _GLIDE_TEXT_BLOCK:
        return None
    layer = f"text_model.encoder.layers.{match[1]}"
    return tuple(f"{layer}.{name}.{match[3]}" for name in _GLIDE_TEXT_BLOCK[match[2]])


def convert(tensors: Mapping[str, Tensor], names: Mapping[str, Names]) -> dict[str, Tensor]:
    """Tensors by their new names: views of the old ones, except for CLIP's small projections, which are transposed.

    A fused (3C, ...) q, k, v is split in three, GLIDE's head by head; weights of convolutions over tokens, (C, C, 1),
    become (C, C); the VAE's attention weights, stored as 1x1 convolutions
    (C, C, 1, 1), become (C, C).
    """
    state: dict[str, Tensor] = {}
    for key, targets in names.items():
        tensor = tensors[key]
        if tensor.ndim == 3:
            tensor = tensor.flatten(1)
        if _INTERLEAVED.search(key):
            heads = tensor.reshape(-1, len(targets), HEAD, *tensor.shape[1:])
            state.update({name: heads[:, k].flatten(0, 1) for k, name in enumerate(targets)})
        elif len(targets) == 3:
            state.update(zip(targets, tensor.chunk(3), strict=True))
        elif key.endswith(("text_projection", ".visual.proj")):
            state[targets[0]] = tensor.T.contiguous()
        elif ".mid.attn_1." in key and tensor.ndim > 2:
            state[targets[0]] = tensor.flatten(1)
        else:
            state[targets[0]] = tensor
    return state
