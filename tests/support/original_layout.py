"""Single files in the original layout: their keys and shapes, and such files.

The layout is written down from its own code (ldm's openaimodel.py, model.py, attention.py and OpenCLIP's
transformer.py), not from the maps under test.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.loading.checkpoint import Checkpoint

Shapes = dict[str, tuple[int, ...]]


def _linear(key: str, out: int, in_channels: int, bias: bool = True) -> Shapes:
    return {f"{key}.weight": (out, in_channels)} | ({f"{key}.bias": (out,)} if bias else {})


def _conv(key: str, out: int, in_channels: int, size: int = 3) -> Shapes:
    return {f"{key}.weight": (out, in_channels, size, size), f"{key}.bias": (out,)}


def _norm(key: str, channels: int) -> Shapes:
    return {f"{key}.weight": (channels,), f"{key}.bias": (channels,)}


def _prefixed(prefix: str, *groups: Shapes) -> Shapes:
    return {f"{prefix}{key}": shape for shapes in groups for key, shape in shapes.items()}


def _res_block(in_channels: int, out: int, embedding: int) -> Shapes:
    shapes = (
        _norm("in_layers.0", in_channels)
        | _conv("in_layers.2", out, in_channels)
        | _linear("emb_layers.1", out, embedding)
    )
    shapes |= _norm("out_layers.0", out) | _conv("out_layers.3", out, out)
    return shapes | (_conv("skip_connection", out, in_channels, 1) if in_channels != out else {})


def _spatial_transformer(channels: int, depth: int, context: int, linear: bool, only_cross: bool = False) -> Shapes:
    def project(key: str) -> Shapes:
        return _linear(key, channels, channels) if linear else _conv(key, channels, channels, 1)

    def attention(key: str, width: int) -> Shapes:
        shapes = _linear(f"{key}.to_q", channels, channels, bias=False)
        shapes |= _linear(f"{key}.to_k", channels, width, bias=False) | _linear(
            f"{key}.to_v", channels, width, bias=False
        )
        return shapes | _linear(f"{key}.to_out.0", channels, channels)

    shapes = _norm("norm", channels) | project("proj_in")
    for i in range(depth):
        block = attention("attn1", context if only_cross else channels) | attention("attn2", context)
        block |= _linear("ff.net.0.proj", 8 * channels, channels) | _linear("ff.net.2", channels, 4 * channels)
        block |= _norm("norm1", channels) | _norm("norm2", channels) | _norm("norm3", channels)
        shapes |= _prefixed(f"transformer_blocks.{i}.", block)
    return shapes | project("proj_out")


def ldm_unet(
    channels: int,
    mult: tuple[int, ...],
    depth: tuple[int, ...],
    context: int,
    *,
    linear: bool = False,
    in_channels: int = 4,
    label: int | None = None,
    layers: int = 2,
    classes: int | None = None,
    only_cross: tuple[int, ...] = (),
) -> Shapes:
    """UNetModel of ldm and sgm. `depth`: transformer blocks at each level, 0 for none; those of the middle are one more
    number, if they are not those of the last level. only_cross: levels without self-attention."""
    embedding, skips, current = 4 * channels, [channels], channels
    shapes = _linear("time_embed.0", embedding, channels) | _linear("time_embed.2", embedding, embedding)
    if label is not None:
        shapes |= _linear("label_emb.0.0", embedding, label) | _linear("label_emb.0.2", embedding, embedding)
    if classes is not None:
        shapes["label_emb.weight"] = (classes, embedding)
    shapes |= _conv("input_blocks.0.0", channels, in_channels)
    block = 0
    for level, times in enumerate(mult):
        for _ in range(layers):
            block += 1
            shapes |= _prefixed(f"input_blocks.{block}.0.", _res_block(current, channels * times, embedding))
            current = channels * times
            if depth[level]:
                transformer = _spatial_transformer(current, depth[level], context, linear, level in only_cross)
                shapes |= _prefixed(f"input_blocks.{block}.1.", transformer)
            skips.append(current)
        if level != len(mult) - 1:
            block += 1
            shapes |= _conv(f"input_blocks.{block}.0.op", current, current)
            skips.append(current)
    shapes |= _prefixed("middle_block.0.", _res_block(current, current, embedding))
    shapes |= _prefixed("middle_block.1.", _spatial_transformer(current, depth[-1] or 1, context, linear))
    shapes |= _prefixed("middle_block.2.", _res_block(current, current, embedding))
    block = 0
    for level, times in reversed(list(enumerate(mult))):
        for i in range(layers + 1):
            prefix = f"output_blocks.{block}"
            shapes |= _prefixed(f"{prefix}.0.", _res_block(current + skips.pop(), channels * times, embedding))
            current = channels * times
            if depth[level]:
                transformer = _spatial_transformer(current, depth[level], context, linear, level in only_cross)
                shapes |= _prefixed(f"{prefix}.1.", transformer)
            if level and i == layers:
                shapes |= _conv(f"{prefix}.{2 if depth[level] else 1}.conv", current, current)
            block += 1
    shapes |= _norm("out.0", channels) | _conv("out.2", 4, channels)
    return _prefixed("model.diffusion_model.", shapes)


def cldm_controlnet(
    channels: int,
    mult: tuple[int, ...],
    depth: tuple[int, ...],
    context: int,
    *,
    linear: bool = False,
    label: int | None = None,
    hint: tuple[int, ...] = (16, 32, 96, 256),
) -> Shapes:
    """ControlNet of ControlNet's own cldm.py, without prefix."""
    unet = ldm_unet(channels, mult, depth, context, linear=linear, label=label)
    shapes = {key.removeprefix("model.diffusion_model."): shape for key, shape in unet.items()}
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith("out")}
    place, current = 0, 3
    for i, width in enumerate((*hint, channels)):
        if 0 < i < len(hint):  # the size is halved on the way to all but the first and the last width
            shapes |= _conv(f"input_hint_block.{place}", current, current)
            place += 2
        shapes |= _conv(f"input_hint_block.{place}", width, current)
        place, current = place + 2, width
    block = 0
    for level, times in enumerate(mult):
        widths = [channels * times] * (2 + (level != len(mult) - 1))
        for width in [channels, *widths] if level == 0 else widths:
            shapes |= _conv(f"zero_convs.{block}.0", width, width, 1)
            block += 1
    return shapes | _conv("middle_block_out.0", channels * mult[-1], channels * mult[-1], 1)


def full_controlnet(family: str) -> Shapes:
    """The keys and shapes of published files; "sdxl" in the same layout."""
    if family == "sdxl":
        return cldm_controlnet(320, (1, 2, 4), (0, 2, 10), 2048, linear=True, label=2816)
    context = {"sd1": 768, "sd2": 1024}[family]
    return cldm_controlnet(320, (1, 2, 4, 4), (1, 1, 1, 0), context, linear=family == "sd2")


def ldm_vae(channels: int, mult: tuple[int, ...] = (1, 2, 4, 4), latent: int = 4, layers: int = 2) -> Shapes:
    """AutoencoderKL of ldm."""

    def block(in_channels: int, out: int) -> Shapes:
        shapes = (
            _norm("norm1", in_channels)
            | _conv("conv1", out, in_channels)
            | _norm("norm2", out)
            | _conv("conv2", out, out)
        )
        return shapes | (_conv("nin_shortcut", out, in_channels, 1) if in_channels != out else {})

    def mid_block(width: int) -> Shapes:
        attention = _norm("norm", width)
        for name in ("q", "k", "v", "proj_out"):
            attention |= _conv(name, width, width, 1)
        shapes = _prefixed("mid.block_1.", block(width, width)) | _prefixed("mid.attn_1.", attention)
        return shapes | _prefixed("mid.block_2.", block(width, width))

    top, current = channels * mult[-1], channels
    encoder = _conv("conv_in", channels, 3)
    for level, times in enumerate(mult):
        for i in range(layers):
            encoder |= _prefixed(f"down.{level}.block.{i}.", block(current, channels * times))
            current = channels * times
        if level != len(mult) - 1:
            encoder |= _conv(f"down.{level}.downsample.conv", current, current)
    encoder |= mid_block(top) | _norm("norm_out", top) | _conv("conv_out", 2 * latent, top)
    decoder, current = _conv("conv_in", top, latent) | mid_block(top), top
    for level, times in reversed(list(enumerate(mult))):
        for i in range(layers + 1):
            decoder |= _prefixed(f"up.{level}.block.{i}.", block(current, channels * times))
            current = channels * times
        if level:
            decoder |= _conv(f"up.{level}.upsample.conv", current, current)
    decoder |= _norm("norm_out", channels) | _conv("conv_out", 3, channels)
    outer = _conv("quant_conv", 2 * latent, 2 * latent, 1) | _conv("post_quant_conv", latent, latent, 1)
    return _prefixed("first_stage_model.", _prefixed("encoder.", encoder), _prefixed("decoder.", decoder), outer)


def openai_clip(prefix: str, width: int, layers: int, vocabulary: int = 49408) -> Shapes:
    """transformers 4's CLIPTextModel, as ldm's FrozenCLIPEmbedder holds it, with its position_ids buffer."""
    shapes: Shapes = {"embeddings.position_ids": (1, 77), "embeddings.token_embedding.weight": (vocabulary, width)}
    shapes |= {"embeddings.position_embedding.weight": (77, width)} | _norm("final_layer_norm", width)
    for i in range(layers):
        layer = _norm("layer_norm1", width) | _norm("layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer |= _linear(f"self_attn.{name}", width, width)
        layer |= _linear("mlp.fc1", 4 * width, width) | _linear("mlp.fc2", width, 4 * width)
        shapes |= _prefixed(f"encoder.layers.{i}.", layer)
    return _prefixed(f"{prefix}text_model.", shapes)


def open_clip(prefix: str, width: int, layers: int, vocabulary: int = 49408) -> Shapes:
    """open_clip's text transformer, as FrozenOpenCLIPEmbedder holds it."""
    shapes: Shapes = {"positional_embedding": (77, width), "text_projection": (width, width), "logit_scale": ()}
    shapes |= {"token_embedding.weight": (vocabulary, width)} | _norm("ln_final", width)
    for i in range(layers):
        layer: Shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        layer |= _linear("attn.out_proj", width, width) | _norm("ln_1", width) | _norm("ln_2", width)
        layer |= _linear("mlp.c_fc", 4 * width, width) | _linear("mlp.c_proj", width, 4 * width)
        shapes |= _prefixed(f"transformer.resblocks.{i}.", layer)
    return _prefixed(prefix, shapes)


def open_clip_vision(prefix: str, width: int, layers: int, patch: int, size: int, projected: int) -> Shapes:
    """open_clip's image transformer, as FrozenOpenCLIPImageEmbedder holds it: of the text half, only the transformer is
    left out."""
    visual: Shapes = {"class_embedding": (width,), "proj": (width, projected)}
    visual |= {"positional_embedding": (1 + (size // patch) ** 2, width), "conv1.weight": (width, 3, patch, patch)}
    visual |= _norm("ln_pre", width) | _norm("ln_post", width)
    blocks = {key: shape for key, shape in open_clip("", width, layers, 1).items() if key.startswith("transformer.")}
    text = {key: shape for key, shape in open_clip("", projected, 1).items() if not key.startswith("transformer.")}
    return _prefixed(prefix, _prefixed("visual.", visual, blocks), text)


@torch.no_grad()
def as_open_clip(state: dict[str, Tensor], pixels: Tensor, heads: int, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The vectors of pictures, as OpenCLIP's VisionTransformer computes them."""
    state = {key.removeprefix("embedder.model.visual."): x for key, x in state.items() if ".visual." in key}

    def norm(name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    conv = state["conv1.weight"]
    x = nn.functional.conv2d(pixels, conv, stride=conv.shape[-1]).flatten(2).mT
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], 1) + state["positional_embedding"]
    x = norm("ln_pre", x)
    for k in range(1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer."))):
        block = f"transformer.resblocks.{k}"
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        own = {key.removeprefix(f"{block}.attn."): w for key, w in state.items() if key.startswith(f"{block}.attn.")}
        attention.load_state_dict(own)
        y = norm(f"{block}.ln_1", x)
        x = x + attention(y, y, y, need_weights=False)[0]
        hidden = nn.functional.linear(
            norm(f"{block}.ln_2", x), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"]
        )
        x = x + nn.functional.linear(
            act(hidden), state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"]
        )
    return norm("ln_post", x[:, 0]) @ state["proj"]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


SCHEDULE_BUFFERS: Shapes = dict.fromkeys(("betas", "alphas_cumprod", "posterior_variance"), (1000,))


def full_size(family: str) -> Shapes:
    """The keys and shapes of the published files."""
    in_channels = 9 if family.endswith("-inpaint") else 5 if family.endswith("-depth") else 4
    name = family.removesuffix("-inpaint").removesuffix("-depth")
    if family == "sd2-unclip":
        unet = ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, linear=True, label=2048)
        embedder = open_clip_vision("embedder.model.", 1280, 32, 14, 224, 1024)
        return full_size("sd2") | unet | embedder | {"noise_augmentor.betas": (1000,)}
    if family.endswith("-depth"):
        return (
            full_size(name)
            | ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, linear=True, in_channels=5)
            | {"depth_model.model.scratch.layer1_rn.weight": (256, 256, 3, 3)}
        )
    if name == "sd1":
        unet = ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 768, in_channels=in_channels)
        return unet | ldm_vae(128) | openai_clip("cond_stage_model.transformer.", 768, 12) | SCHEDULE_BUFFERS
    if name == "sd2":
        unet = ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, linear=True, in_channels=in_channels)
        return unet | ldm_vae(128) | open_clip("cond_stage_model.model.", 1024, 24) | SCHEDULE_BUFFERS
    if name == "sdxl-refiner":
        unet = ldm_unet(384, (1, 2, 4, 4), (0, 4, 4, 0, 4), 1280, linear=True, label=2560, in_channels=in_channels)
        return unet | ldm_vae(128) | open_clip("conditioner.embedders.0.model.", 1280, 32)
    if name == "x4":
        levels: dict[str, Any] = {"linear": True, "in_channels": 7, "classes": 1000, "only_cross": (1, 2)}
        unet = ldm_unet(256, (1, 2, 2, 4), (0, 1, 1, 1), 1024, **levels)
        clip = open_clip("cond_stage_model.model.", 1024, 24)
        return unet | ldm_vae(128, (1, 2, 4)) | clip | SCHEDULE_BUFFERS | {"low_res_model.betas": (1000,)}
    unet = ldm_unet(320, (1, 2, 4), (0, 2, 10), 2048, linear=True, label=2816, in_channels=in_channels)
    texts = openai_clip("conditioner.embedders.0.transformer.", 768, 12)
    return unet | ldm_vae(128) | texts | open_clip("conditioner.embedders.1.model.", 1280, 32)


def small(family: str, vocabulary: int = 99) -> Shapes:
    """The same structure with narrow layers: 64 channels, so that SD2's and SDXL's heads of 64 divide them."""
    vae = ldm_vae(32, (1, 2))
    if family == "sd1":
        clip = openai_clip("cond_stage_model.transformer.", 64, 2, vocabulary)
        return ldm_unet(64, (1, 2, 2), (1, 1, 0), 64) | vae | clip
    if family == "sd2":
        clip = open_clip("cond_stage_model.model.", 64, 24, vocabulary)
        return ldm_unet(64, (1, 2), (1, 0), 64, linear=True) | vae | clip
    if family == "sd1-edit":
        return small("sd1", vocabulary) | ldm_unet(64, (1, 2, 2), (1, 1, 0), 64, in_channels=8)
    if family == "sd2-depth":
        estimator = {"depth_model.model.scratch.layer1_rn.weight": (4, 4, 3, 3)}
        return small("sd2", vocabulary) | ldm_unet(64, (1, 2), (1, 0), 64, linear=True, in_channels=5) | estimator
    if family == "sd2-unclip":
        unet = ldm_unet(64, (1, 2), (1, 0), 64, linear=True, label=2 * 24)
        return small("sd2", vocabulary) | unet | open_clip_vision("embedder.model.", 160, 2, 8, 32, 24)
    if family == "sdxl-refiner":
        unet = ldm_unet(64, (1, 2, 2), (0, 2, 0, 2), 128, linear=True, label=128 + 5 * 32)
        return unet | vae | open_clip("conditioner.embedders.0.model.", 128, 3, vocabulary)
    if family == "x4":
        clip = open_clip("cond_stage_model.model.", 64, 24, vocabulary)
        levels: dict[str, Any] = {"linear": True, "in_channels": 7, "classes": 400, "only_cross": (1,)}
        return ldm_unet(64, (1, 2, 2), (0, 1, 1), 64, **levels) | ldm_vae(32, (1, 2, 2)) | clip
    clips = openai_clip("conditioner.embedders.0.transformer.", 64, 2, vocabulary)
    clips |= open_clip("conditioner.embedders.1.model.", 128, 3, vocabulary)
    return ldm_unet(64, (1, 2), (0, 2), 192, linear=True, label=128 + 6 * 32) | vae | clips


def write_sparse(path: Path, shapes: Shapes) -> None:
    """A float16 safetensors file of zeros that takes no room on disk, so that full-size files can be opened."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def converted_by_diffusers(state: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    from diffusers.loaders import single_file_utils as conversion

    components = checkpoint.components
    converted_states = {
        "unet": conversion.convert_ldm_unet_checkpoint(
            dict(state), {"num_class_embeds": None, **components["unet"].config}
        ),
        "vae": conversion.convert_ldm_vae_checkpoint(dict(state), components["vae"].config),
    }
    for name, component in components.items():
        if name == "image_normalizer":  # as its `stable_unclip_image_noising_components` makes it
            from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

            converted_states[name] = dict(StableUnCLIPImageNormalizer(**component.config).state_dict())
        if not name.startswith("text"):
            continue
        if component.config["hidden_act"] == "quick_gelu":
            converted = conversion.convert_ldm_clip_checkpoint(dict(state))
        else:
            place = 1 if "text_encoder" in components else 0  # the refiner has the second alone
            prefix = "cond_stage_model.model." if name == "text_encoder" else f"conditioner.embedders.{place}.model."
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=component.config["hidden_size"]))
            converted = conversion.convert_open_clip_checkpoint(model, dict(state), prefix=prefix)
        converted_states[name] = {key: value for key, value in converted.items() if not key.endswith("position_ids")}
    return converted_states


SD_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
