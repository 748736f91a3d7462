"""GLIDE from its paper (arXiv:2112.10741): files in its published layout with random weights, and a plain reference
that computes what such a file says, straight from its keys. No package of it installs here: nothing else judges.

The U-Net is ADM's (arXiv:2105.05233, appendix): residual blocks that resample both branches, scale and shift by the
time's embedding, and attention over the pixels; the text's states are more keys and values of it. Samplers are those of
arXiv:2102.09672 (learned variance, respaced timesteps) and arXiv:2010.02502.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
WORDS = ("Ġa", "Ġc", "Ġca", "Ġcat", "at", "re", "Ġre", "Ġred", "photo", "ph", "ot", "oto", "do", "dog", "Ġdog")
MERGES = (
    "Ġ a",
    "Ġ c",
    "Ġc a",
    "Ġca t",
    "a t",
    "r e",
    "Ġ re",
    "Ġre d",
    "p h",
    "o t",
    "ot o",
    "ph oto",
    "d o",
    "do g",
    "Ġ dog",
)
HEAD = 64


def _letters() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]


def vocabulary() -> dict[str, int]:
    """Bytes, a few words, and the end of a text, which pads."""
    return {token: k for k, token in enumerate([*_letters(), *WORDS, "<|endoftext|>"])}


def write_vocabulary(folder: Path) -> None:
    """`encoder.json` and `vocab.bpe`, as of GPT-2."""
    (folder / "encoder.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")


def token_ids(text: str) -> list[int]:
    """By GPT-2's rules: words with the space before them, whose bytes are joined pair by pair, the earliest merge
    first."""
    known, ranks = vocabulary(), {tuple(merge.split(" ")): k for k, merge in enumerate(MERGES)}
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    spelled = dict(zip(order, _letters(), strict=True))
    ids = []
    for word in re.findall(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text.lower()):
        parts = [spelled[byte] for byte in word.encode()]
        while True:
            pairs = [(ranks[pair], k) for k in range(len(parts) - 1) if (pair := (parts[k], parts[k + 1])) in ranks]
            if not pairs:
                break
            _, k = min(pairs)
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        ids += [known[part] for part in parts]
    return ids


@dataclass(frozen=True)
class Size:
    """Of a model: the published ones are Size(192, (1, 2, 3, 4), 3, (1, 2, 3)) and Size(192, (1, 1, 2, 2, 4, 4), 2,
    (3, 4, 5), 6), with 16 layers of 512 channels over 128 tokens."""

    channels: int = 64
    mult: tuple[int, ...] = (1, 2)
    layers: int = 1
    attends: tuple[int, ...] = (1,)  # levels
    inputs: int = 3
    text: int = 128
    text_layers: int = 2
    tokens: int = 16
    words: int = 256 + len(WORDS) + 1


BASE, UPSAMPLER = Size(), Size(inputs=6, mult=(1, 1, 1), attends=(2,))
PUBLISHED = {
    "base": Size(192, (1, 2, 3, 4), 3, (1, 2, 3), 3, 512, 16, 128, 50257),
    "upsample": Size(192, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 6, 512, 16, 128, 50257),
}


def shapes(size: Size = BASE) -> dict[str, tuple[int, ...]]:
    """The keys of a file and their shapes."""
    c, time = size.channels, 4 * size.channels
    out: dict[str, tuple[int, ...]] = {}

    def put(name: str, *weight: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = weight, weight[:1]

    def resnet(name: str, before: int, after: int) -> None:
        put(f"{name}.in_layers.0", before)
        put(f"{name}.in_layers.2", after, before, 3, 3)
        put(f"{name}.emb_layers.1", 2 * after, time)
        put(f"{name}.out_layers.0", after)
        put(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            put(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        put(f"{name}.norm", width)
        put(f"{name}.qkv", 3 * width, width, 1)
        put(f"{name}.encoder_kv", 2 * width, size.text, 1)
        put(f"{name}.proj_out", width, width, 1)

    put("time_embed.0", time, c)
    put("time_embed.2", time, time)
    put("input_blocks.0.0", c, size.inputs, 3, 3)
    block, width, skips = 1, c, [c]
    for level, times in enumerate(size.mult):
        for _ in range(size.layers):
            resnet(f"input_blocks.{block}.0", width, times * c)
            width = times * c
            if level in size.attends:
                attention(f"input_blocks.{block}.1", width)
            skips.append(width)
            block += 1
        if level + 1 < len(size.mult):
            resnet(f"input_blocks.{block}.0", width, width)
            skips.append(width)
            block += 1
    resnet("middle_block.0", width, width)
    attention("middle_block.1", width)
    resnet("middle_block.2", width, width)
    block = 0
    for level, times in reversed([*enumerate(size.mult)]):
        for k in range(size.layers + 1):
            resnet(f"output_blocks.{block}.0", width + skips.pop(), times * c)
            width = times * c
            if level in size.attends:
                attention(f"output_blocks.{block}.1", width)
            if level and k == size.layers:
                resnet(f"output_blocks.{block}.{1 + (level in size.attends)}", width, width)
            block += 1
    put("out.0", c)
    put("out.2", 6, c, 3, 3)
    for k in range(size.text_layers):
        name = f"transformer.resblocks.{k}"
        for norm in ("ln_1", "ln_2"):
            put(f"{name}.{norm}", size.text)
        put(f"{name}.attn.c_qkv", 3 * size.text, size.text)
        put(f"{name}.attn.c_proj", size.text, size.text)
        put(f"{name}.mlp.c_fc", 4 * size.text, size.text)
        put(f"{name}.mlp.c_proj", size.text, 4 * size.text)
    put("final_ln", size.text)
    put("transformer_proj", time, size.text)
    out["token_embedding.weight"] = (size.words, size.text)
    out["positional_embedding"] = out["padding_embedding"] = (size.tokens, size.text)
    return out


def state(size: Size = BASE, seed: int = 0) -> State:
    """Random weights, under which text, time and pixels all tell."""
    g, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(size).items():
        x = torch.randn(shape, generator=g)
        if name.endswith("bias"):
            x = 0.1 * x
        elif len(shape) == 1:
            x = 1 + 0.2 * x  # of a norm
        elif "embedding" not in name:
            x = x / math.prod(shape[1:]) ** 0.5
        weights[name] = x / 3 if name.startswith("out.2") else x  # a variance about as large as that of training
    return weights


def write(folder: Path, name: str, size: Size = BASE, seed: int = 0, *, pickled: bool = False) -> Path:
    """A file of random weights, with the vocabulary beside it."""
    write_vocabulary(folder)
    path = folder / (f"{name}.pt" if pickled else f"{name}.safetensors")
    torch.save(state(size, seed), path) if pickled else save_file(state(size, seed), path)
    return path


# -------------------------------------------------------------------------------------------------- the networks


def _linear(w: State, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return x @ weight.reshape(weight.shape[0], -1).T + w[f"{name}.bias"]


def _layer_norm(w: State, name: str, x: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _group_norm(w: State, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    x = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def _conv(w: State, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _heads(x: Tensor, parts: int) -> list[list[Tensor]]:
    """(B, N, heads * parts * 64) as its parts of each head, (B, N, 64)."""
    return [[*own.split(HEAD, -1)] for own in x.split(parts * HEAD, -1)]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / HEAD**0.5).softmax(-1) @ v


def read_text(w: State, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Texts as their states (B, T, D), and what is added to the time's embedding (B, 4C)."""
    tokens, padding = w["positional_embedding"], w["padding_embedding"]
    rows = []
    for text in ids:
        text = text[: len(tokens)]
        rows.append(torch.cat((w["token_embedding.weight"][text] + tokens[: len(text)], padding[len(text) :])))
    x = torch.stack(rows)
    for k in range(1 + max(int(name.split(".")[2]) for name in w if name.startswith("transformer.res"))):
        name = f"transformer.resblocks.{k}"
        heads = _heads(_linear(w, f"{name}.attn.c_qkv", _layer_norm(w, f"{name}.ln_1", x)), 3)
        x = x + _linear(w, f"{name}.attn.c_proj", torch.cat([_attend(*own) for own in heads], -1))
        hidden = F.gelu(_linear(w, f"{name}.mlp.c_fc", _layer_norm(w, f"{name}.ln_2", x)))
        x = x + _linear(w, f"{name}.mlp.c_proj", hidden)
    x = _layer_norm(w, "final_ln", x)
    return x, _linear(w, "transformer_proj", x[:, -1])


def unet(w: State, x: Tensor, t: float, text: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, C, H, W) at a timestep -> (B, 6, H, W): noise, and what says its variance."""
    states, pooled = text
    channels = w["time_embed.0.weight"].shape[1]
    angle = t * torch.exp(-math.log(10000) * torch.arange(channels // 2) / (channels // 2))
    time = _linear(w, "time_embed.0", torch.cat((angle.cos(), angle.sin())).to(x.dtype))
    time = _linear(w, "time_embed.2", F.silu(time)) + pooled

    def resnet(name: str, x: Tensor, resample: Callable[[Tensor], Tensor]) -> Tensor:
        h = resample(F.silu(_group_norm(w, f"{name}.in_layers.0", x)))
        h, x = _conv(w, f"{name}.in_layers.2", h), resample(x)
        scale, shift = _linear(w, f"{name}.emb_layers.1", F.silu(time))[..., None, None].chunk(2, 1)
        h = F.silu(_group_norm(w, f"{name}.out_layers.0", h) * (1 + scale) + shift)
        skip = f"{name}.skip_connection"
        return (_conv(w, skip, x) if f"{skip}.weight" in w else x) + _conv(w, f"{name}.out_layers.3", h)

    def attention(name: str, x: Tensor) -> Tensor:
        pixels = _group_norm(w, f"{name}.norm", x).flatten(2).mT
        own, added = _heads(_linear(w, f"{name}.qkv", pixels), 3), _heads(_linear(w, f"{name}.encoder_kv", states), 2)
        heads = [
            _attend(q, torch.cat((text_k, k), 1), torch.cat((text_v, v), 1))
            for (q, k, v), (text_k, text_v) in zip(own, added, strict=True)
        ]
        return x + _linear(w, f"{name}.proj_out", torch.cat(heads, -1)).mT.reshape(x.shape)

    def block(name: str, x: Tensor, resampled: int | None = None) -> Tensor:
        """All layers of a block; the one at `resampled` changes the size."""
        for slot in range(3):
            if f"{name}.{slot}.in_layers.0.weight" in w:
                change = (_half if "input" in name else _twice) if slot == resampled else torch.clone
                x = resnet(f"{name}.{slot}", x, change)
            elif f"{name}.{slot}.qkv.weight" in w:
                x = attention(f"{name}.{slot}", x)
        return x

    blocks = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("input_blocks"))
    ups = {k: slot for k in range(blocks) for slot in (1, 2) if f"output_blocks.{k}.{slot}.in_layers.0.weight" in w}
    each = blocks // (len(ups) + 1)  # blocks of a level
    x = _conv(w, "input_blocks.0.0", x)
    skips = [x]
    for k in range(1, blocks):
        x = block(f"input_blocks.{k}", x, 0 if k % each == 0 else None)
        skips.append(x)
    x = block("middle_block", x)
    for k in range(blocks):
        x = block(f"output_blocks.{k}", torch.cat((x, skips.pop()), 1), ups.get(k))
    return _conv(w, "out.2", F.silu(_group_norm(w, "out.0", x)))


def _half(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _twice(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


# -------------------------------------------------------------------------------------------------- the samplers


def _bars(schedule: str) -> np.ndarray:
    """What is left of the image, squared, at each timestep of training."""
    if schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    signal = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    return np.cumprod([1 - min(1 - signal[k + 1] / signal[k], 0.999) for k in range(1000)])


Draw = Callable[[], Tensor]


def sample_base(w: State, prompts: list[str], negative: str, scale: float, times: list[int], draw: Draw) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1: ancestral sampling with the network's variance, guided away from a text. draw:
    the start, and then the noise of each step."""
    bars = _bars("cosine")
    text, none = read_text(w, [token_ids(p) for p in prompts]), read_text(w, [token_ids(negative)] * len(prompts))
    x = draw().double()
    for i, t in enumerate(times):
        now, after = bars[t], bars[times[i + 1]] if i + 1 < len(times) else 1.0
        out = unet(w, x.float(), t, text).double()
        epsilon, v = out.chunk(2, 1)
        if scale > 1:
            away = unet(w, x.float(), t, none).double()[:, :3]
            epsilon = away + scale * (epsilon - away)
        x0 = ((x - (1 - now) ** 0.5 * epsilon) / now**0.5).clamp(-1, 1)
        beta = 1 - now / after
        mean = (after**0.5 * beta * x0 + (now / after) ** 0.5 * (1 - after) * x) / (1 - now)
        if i + 1 == len(times):
            return mean.float()
        share = (v + 1) / 2
        small = (1 - after) / (1 - now) * beta
        log_variance = share * math.log(beta) + (1 - share) * math.log(small)
        x = mean + (log_variance / 2).exp() * draw().double()
    raise AssertionError("no timesteps")


def enlarge(w: State, prompts: list[str], small: Tensor, size: int, times: list[int], draw: Draw) -> Tensor:
    """The upsampler's pictures, by DDIM without noise; small (B, 3, h, w) in -1..1."""
    bars, text = _bars("linear"), read_text(w, [token_ids(p) for p in prompts])
    low = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    x = 0.997 * draw().double()
    for i, t in enumerate(times):
        now, after = bars[t], bars[times[i + 1]] if i + 1 < len(times) else 1.0
        epsilon = unet(w, torch.cat((x.float(), low), 1), t, text).double()[:, :3]
        x0 = ((x - (1 - now) ** 0.5 * epsilon) / now**0.5).clamp(-1, 1)
        epsilon = (x - now**0.5 * x0) / (1 - now) ** 0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * epsilon
    return x.float()
