"""IP-Adapters with random weights in their published layout, and CLIP image encoders to go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastldm.conditioning.image_encoder import ImageEncoder, Preprocessing
from fastldm.models.clip_vision import CLIPVision, VisionConfig

IMAGE_WIDTH, PROJECTED = 48, 20  # hidden and projected channels of the image encoder
HIDDEN = 40  # of the resampler
KINDS = ("base", "plus", "full")

State = dict[str, dict[str, Tensor]]


def state(unet: Any, kind: str = "base", seed: int = 0, tokens: int = 4) -> State:
    """As the trainers write it: {"image_proj": ..., "ip_adapter": ...}, for a U-Net of diffusers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, Tensor]:
        return {f"{name}.weight": random(rows, columns)} | ({f"{name}.bias": random(rows)} if bias else {})

    def norm(name: str, channels: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.2 * random(channels), f"{name}.bias": 0.2 * random(channels)}

    context = unet.config.cross_attention_dim
    if kind == "base":
        image = linear("proj", tokens * context, PROJECTED) | norm("norm", context)
    elif kind == "full":
        image = linear("proj.0", IMAGE_WIDTH, IMAGE_WIDTH) | linear("proj.2", context, IMAGE_WIDTH)
        image |= norm("proj.3", context)
    else:
        image = {"latents": random(1, tokens, HIDDEN)} | linear("proj_in", HIDDEN, IMAGE_WIDTH)
        image |= linear("proj_out", context, HIDDEN) | norm("norm_out", context)
        for k in range(4):  # diffusers knows four
            own = f"layers.{k}"
            image |= norm(f"{own}.0.norm1", HIDDEN) | norm(f"{own}.0.norm2", HIDDEN)
            image |= linear(f"{own}.0.to_q", 128, HIDDEN, False) | linear(f"{own}.0.to_kv", 256, HIDDEN, False)
            image |= linear(f"{own}.0.to_out", HIDDEN, 128, False) | norm(f"{own}.1.0", HIDDEN)
            image |= linear(f"{own}.1.1", 4 * HIDDEN, HIDDEN, False) | linear(f"{own}.1.3", HIDDEN, 4 * HIDDEN, False)
    kv = {}
    for k, name in enumerate(unet.attn_processors):  # self-attention has even numbers
        if name.endswith("attn2.processor"):
            channels = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            kv |= linear(f"{k}.to_k_ip", channels, context, False) | linear(f"{k}.to_v_ip", channels, context, False)
    return {"image_proj": image, "ip_adapter": kv}


def flat(content: State) -> dict[str, Tensor]:
    """As it is in a safetensors file."""
    return {f"{part}.{key}": tensor for part, tensors in content.items() for key, tensor in tensors.items()}


def image_encoder(seed: int = 5) -> Any:
    """17 hidden states of a picture of 32x32."""
    clip = tiny.peer("transformers")
    config = clip.CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        projection_dim=PROJECTED,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return tiny.seeded(lambda: clip.CLIPVisionModelWithProjection(config), seed)


def whole_clip(seed: int = 5, *, text: dict[str, Any] | None = None) -> Any:
    """transformers' CLIPModel, both encoders of it. text: other sizes of its text encoder."""
    clip = tiny.peer("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999, "max_position_embeddings": 77}
    config = clip.CLIPConfig(
        text_config={**sizes, **ends, **(text or {}), "projection_dim": PROJECTED},
        vision_config=image_encoder(seed).config.to_dict(),
        projection_dim=PROJECTED,
    )
    return tiny.seeded(lambda: clip.CLIPModel(config), seed)


def clip_folder(path: Path) -> Path:
    """A CLIPModel's, with its tokenizer."""
    whole_clip().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    tiny.peer("transformers").CLIPImageProcessor(size=32, crop_size=32).save_pretrained(path)
    return path


def own_image_encoder(seed: int = 5) -> ImageEncoder:
    """fastldm's, of the same weights."""
    peer = image_encoder(seed)
    config = VisionConfig.from_dict(peer.config.to_dict())
    with torch.device("meta"):
        model = CLIPVision(config)
    model.load_state_dict(peer.state_dict(), assign=True)
    return ImageEncoder(model.requires_grad_(False), Preprocessing(config.image_size, config.image_size), "here")


def folder(path: Path, unet: Any, *kinds: str) -> Path:
    """A folder as on the hub: files models/KIND.safetensors, and models/image_encoder."""
    models = path / "models"
    models.mkdir(parents=True)
    image_encoder().save_pretrained(models / "image_encoder")
    for k, kind in enumerate(kinds):
        save_file(flat(state(unet, kind, seed=k)), models / f"{kind}.safetensors")
    return path
