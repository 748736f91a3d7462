"""GLIDE's files (arXiv:2112.10741): U-Net and text transformer in one, without prefixes and configuration, such as
`base.pt` and `upsample.pt` of December 2021.

All is derived from keys and shapes, but for the published numbers of sampling. Heads have 64 channels, and the size of
an image is four times two to the power of the number of levels, as in all of GLIDE's models.
"""

from __future__ import annotations

import numpy as np

from fastldm.errors import CheckpointError, InputError
from fastldm.loading.formats import Config
from fastldm.loading.key_names import HEAD, glide_text_name, glide_unet_name
from fastldm.loading.layout import Layout, component, count
from fastldm.loading.tensors import Shapes
from fastldm.models.config import GLIDE_TEXT
from fastldm.models.families import GLIDE_PIPELINE, GLIDE_UPSAMPLER

_TEXT = ("transformer", "token_embedding", "positional_embedding", "padding_embedding", "final_ln", "unemb")
_INPAINTING = {7: "inpainting", 10: "inpainting at 256x256"}
"""GLIDE's other models, by the number of input channels."""
NOISE_SCALE = 0.997  # of the upsampler's start, which its authors' example has


def is_glide(shapes: Shapes) -> bool:
    """Whether a file is one of GLIDE's, from its keys."""
    return {"transformer_proj.weight", "token_embedding.weight", "input_blocks.0.0.weight"} <= shapes.keys()


def glide_layout(shapes: Shapes, *, source: str, prediction_type: str | None = None) -> Layout:
    """The layout of one of GLIDE's files. CheckpointError for one that is built differently, and for its models for
    inpainting, whose samplers set the denoised image where it is known. InputError for a `prediction_type` but
    "epsilon"."""
    if prediction_type not in (None, "epsilon"):
        raise InputError(f"prediction_type is {prediction_type!r}: {source} is GLIDE, which predicts epsilon")
    channels = shapes["input_blocks.0.0.weight"][1]
    if channels in _INPAINTING:
        raise CheckpointError(
            f"{source} is GLIDE for {_INPAINTING[channels]}, of {channels} input channels, whose sampler sets the "
            "denoised image where it is known, which no table of fastldm does: base.pt and upsample.pt run"
        )
    try:
        unet = _unet_config(shapes)
        text = _text_config(shapes)
    except (KeyError, IndexError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{source} looks like GLIDE but is built differently: {reason}.") from error
    of_text = {key: shape for key, shape in shapes.items() if key.startswith(_TEXT)}
    of_unet = {key: shape for key, shape in shapes.items() if key not in of_text}
    layers = unet["layers_per_block"]
    components = {
        "unet": component(unet, of_unet, "", lambda key: glide_unet_name(key, layers), source, family="GLIDE"),
        "text_encoder": component(text, of_text, "", glide_text_name, source, family="GLIDE"),
    }
    enlarges = channels == 6
    used = {key for own in components.values() for key in own.names}
    return Layout(
        components=components,
        scheduler=_upsampling() if enlarges else _sampling("DDPMScheduler", "squaredcos_cap_v2"),
        low_res_scheduler=None,
        pad_tokens={"tokenizer": None},
        index={"_class_name": GLIDE_UPSAMPLER if enlarges else GLIDE_PIPELINE},
        ignored=[key for key in shapes if key not in used],
    )


def _unet_config(shapes: Shapes) -> Config:
    """UNet2DConditionModel's config. KeyError or ValueError for another network's shapes."""
    blocks, outputs = (count(shapes, rf"{side}_blocks\.(\d+)\.") for side in ("input", "output"))
    levels = 1 + sum(
        any(f"output_blocks.{i}.{slot}.in_layers.2.weight" in shapes for slot in (1, 2)) for i in range(outputs)
    )
    if outputs != blocks or blocks % levels or blocks == levels:
        raise ValueError(f"it has {blocks} input_blocks, {outputs} output_blocks and {levels} levels")
    layers = blocks // levels - 1

    def level(side: str, first: int, length: int) -> tuple[int, bool]:
        """Channels, and whether there is attention."""
        names = [f"{side}_blocks.{i}" for i in range(first, first + length)]
        kinds = {(shapes[f"{n}.0.in_layers.2.weight"][0], f"{n}.1.qkv.weight" in shapes) for n in names}
        if len(kinds) > 1:
            raise ValueError(f"its {side}_blocks {first} to {first + length - 1} differ")
        return kinds.pop()

    down = [level("input", 1 + i * (layers + 1), layers) for i in range(levels)]
    up = [level("output", i * (layers + 1), layers + 1) for i in range(levels)]
    if up != down[::-1]:
        raise ValueError("its decoder does not mirror its encoder")
    time, width = shapes["time_embed.0.weight"]
    if width != down[0][0]:
        raise ValueError(f"its time has {width} channels, and its first level {down[0][0]}")
    kinds = ["SimpleCrossAttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" for _, attends in down]
    scales = shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * down[-1][0]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": HEAD,
        "block_out_channels": [channels for channels, _ in down],
        "class_embed_type": "identity",
        "cross_attention_dim": shapes["middle_block.1.encoder_kv.weight"][1],
        "down_block_types": kinds,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "layers_per_block": layers,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": shapes["out.2.weight"][0],
        "resnet_time_scale_shift": "scale_shift" if scales else "default",
        "sample_size": 2 ** (levels + 2),
        "time_embedding_dim": time,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
    }


def _text_config(shapes: Shapes) -> Config:
    vocabulary, hidden = shapes["token_embedding.weight"]
    positions, _ = shapes["positional_embedding"]
    if shapes["padding_embedding"] != (positions, hidden):
        raise ValueError(f"its padding_embedding is {shapes['padding_embedding']}, expected {(positions, hidden)}")
    return {
        "architectures": [GLIDE_TEXT],
        "hidden_size": hidden,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "max_position_embeddings": positions,
        "model_type": "glide_text",
        "num_attention_heads": max(1, hidden // HEAD),
        "num_hidden_layers": count(shapes, r"transformer\.resblocks\.(\d+)\."),
        "projection_dim": shapes["transformer_proj.weight"][0],
        "vocab_size": vocabulary,
    }


def _sampling(class_name: str, betas: str) -> Config:
    return {
        "_class_name": class_name,
        "beta_end": 0.02,
        "beta_schedule": betas,
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "linspace",
        "variance_type": "learned_range",
    }


def _upsampling() -> Config:
    """That of the upsampler: DDIM, by the timesteps that its authors call fast27, where 27 are asked for."""
    return _sampling("DDIMScheduler", "linear") | {
        "noise_scale": NOISE_SCALE,
        "own_timesteps": fast27(),
        "set_alpha_to_one": True,
        "use_clipped_model_output": True,
    }


def fast27(trained: int = 1000) -> list[int]:
    """Descending timesteps: 10, 10, 3, 2 and 2 of five equal parts, with the ends of each, but for the last timestep,
    which is two earlier."""
    parts = np.arange(trained).reshape(5, -1)
    times = [
        part[np.linspace(0, len(part) - 1, steps).round().astype(int)]
        for part, steps in zip(parts, (10, 10, 3, 2, 2), strict=True)
    ]
    return [trained - 3, *np.concatenate(times)[:-1][::-1].tolist()]
