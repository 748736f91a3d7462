"""DeepFloyd IF on tiny random parts: T5's tokenizer and encoder, and diffusers' pipelines of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from other_networks import network
from pairs import close, generator
from PIL import Image

from fastldm import Pipeline

Options = dict[str, Any]
PROMPT, NEGATIVE = "A photo of squirrels, eating!", "a dog"
EMBEDS = {"prompt_embeds": torch.randn(1, 77, 40, generator=generator(1)), "prompt": None}

PIECES = ("▁a", "▁photo", "▁of", "▁cat", "▁dog", "▁", "s", "▁squ", "ir", "rel", "ing", "▁eat", ",", ".", "!", "(", ")")
T5_WIDTH = 40  # of the U-Nets' encoder_hid_dim
T5 = {
    "d_model": T5_WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}


def t5_pieces() -> list[tuple[str, float]]:
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzé0123456789:'\""]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return special + [(piece, -2.0 - 0.01 * k) for k, piece in enumerate(PIECES)] + letters[:]


def t5_tokenizer(**options: Any) -> Any:
    return tiny.peer("transformers").T5Tokenizer(vocab=t5_pieces(), extra_ids=0, **options)


def spiece(path: Path, characters: bytes = b"") -> None:
    """The same pieces as a file of sentencepiece, written by hand: a protocol buffer."""
    import struct

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(data)) + data

    message = b""
    for piece, score in t5_pieces():
        kind = b"\x18\x03" if piece.startswith("<") else b""  # type = 3, as an enum
        message += field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + kind)
    path.write_bytes(message + field(3, field(1, b"nmt_nfkc") + (field(2, characters) if characters else b"")))


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def t5(seed: int = 0, **changes: Any) -> Any:
    library = tiny.peer("transformers")
    config = library.T5Config(**{"vocab_size": len(t5_pieces()), **T5, **changes})
    model = tiny.seeded(lambda: library.T5EncoderModel(config), seed)
    model.shared.weight.data *= 3
    return model


def scheduler(**options: Any) -> Any:
    """As published: a variance of the network, and thresholds."""
    published = {
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5,
    }
    return tiny.peer("diffusers").DDPMScheduler(**{**published, **options})


def first_stage(seed: int = 0, **replaced: Any) -> Any:
    """diffusers' IFPipeline."""
    return _quiet(tiny.peer("diffusers").IFPipeline(**{**_parts(seed), "unet": network("if-1", seed), **replaced}))


def _parts(seed: int) -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5(seed + 1),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }


def super_resolution(seed: int = 0, **replaced: Any) -> Any:
    """diffusers' IFSuperResolutionPipeline."""
    own = {"unet": network("if-2", seed), "image_noising_scheduler": scheduler()}
    parts = {**_parts(seed), **own, **replaced}
    return _quiet(tiny.peer("diffusers").IFSuperResolutionPipeline(**parts))


def of_class(name: str, pipe: Any) -> Any:
    """Another of diffusers' IF pipelines with the parts of one, such as "IFImg2ImgPipeline"."""
    cls = getattr(tiny.peer("diffusers"), name)
    return _quiet(cls(**pipe.components, requires_safety_checker=False))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(ours: Pipeline, theirs: Any, **options: Any) -> None:
    """Compares the pictures of our pipeline with those of diffusers' one. generator: "list" is one for each picture."""
    many = options.pop("generator", None) == "list"
    options = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "np", **options}
    before = {name: value.clone() for name, value in options.items() if isinstance(value, torch.Tensor)}

    def draws() -> Any:
        return [generator(1), generator(2)] if many else generator()

    made = ours(**options, generator=draws()).images
    close(made, theirs(**{**options, **before}, generator=draws(), clean_caption=False).images)


def picture(seed: int = 0, width: int = 8, height: int = 8) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
