"""models/ip_adapter.py and what a U-Net does with it, against diffusers' projections and attention processors."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import adapter_files
import ip_adapters
import pytest
import tiny
import torch
from counters import Launches
from torch import Tensor

from benchmarks.networks import SD15
from fastldm.adapters.ip_adapter import read_ip_adapter
from fastldm.kernels import dispatch
from fastldm.loading.adoption import adopt
from fastldm.models.interfaces import AddedConditions
from fastldm.models.ip_adapter import IPAdapter
from fastldm.models.unet import Pictures, UNet
from fastldm.planning import dry_run

FAMILIES = ("sd1", "sdxl", "bk-sdm", "ssd-1b")


def ours(unet: Any, family: str) -> UNet:
    config = adapter_files.spec(family).unet
    with torch.device("meta"):
        module = UNet(config)
    return adopt(module, unet)


def image_embeds(kind: str, count: int, seed: int = 0) -> Tensor:
    shape = (count, ip_adapters.PROJECTED) if kind == "base" else (count, 17, ip_adapters.IMAGE_WIDTH)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(unet: Any, rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    config = unet.config
    values: dict[str, Any] = {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": torch.randn(rows, 7, config.cross_attention_dim, generator=generator),
        "added_cond_kwargs": {},
    }
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        values["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, pooled, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * rows),
        }
    return values


def step(unet: UNet, values: dict[str, Any], pictures: list[Pictures], **more: Any) -> Tensor:
    added = values["added_cond_kwargs"]
    times = torch.full((len(values["sample"]),), 321)
    rows = unet.time_rows(times, added=AddedConditions(**added) if added else None)
    return unet.step(values["sample"], rows, unet.cross_kv(values["encoder_hidden_states"]), pictures=pictures, **more)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    with torch.no_grad():
        return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ip_adapters.KINDS)
def test_tokens_equal_diffusers(kind: str) -> None:
    unet = tiny.unet("sd1")
    content = ip_adapters.state(unet, kind, tokens=4 if kind == "base" else 6)
    network = read_ip_adapter(content, adapter_files.spec("sd1")).network
    unet._load_ip_adapter_weights([content])
    embeds = image_embeds(kind, 3)
    (expected,) = unet.encoder_hid_proj([embeds[:, None]])
    assert error(network.tokens(embeds), expected[:, 0]) < 1e-5


@pytest.mark.parametrize("kind", ip_adapters.KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_diffusers(family: str, kind: str) -> None:
    """Two adapters at once, one of them with three pictures, each with its scale; file ids are down, up, middle."""
    unet = tiny.unet(family)
    mine, values = ours(deepcopy(unet), family), inputs(unet, 2)
    plain = unet(**values).sample
    contents = [ip_adapters.state(unet, kind), ip_adapters.state(unet, "base", seed=1)]
    networks = [read_ip_adapter(content, adapter_files.spec(family)).network for content in contents]
    unet._load_ip_adapter_weights(contents)
    embeds, counts, scales = [image_embeds(kind, 6), image_embeds("base", 2)], (3, 1), (0.7, -0.4)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = list(scales)
    values["added_cond_kwargs"] |= {"image_embeds": [x.unflatten(0, (2, -1)) for x in embeds]}
    expected = unet(**values).sample
    del values["added_cond_kwargs"]["image_embeds"]
    pictures = [
        picture(network, own, count, scale)
        for network, own, count, scale in zip(networks, embeds, counts, scales, strict=True)
    ]
    assert error(step(mine, values, pictures), expected) < 1e-5
    assert error(plain, expected) > 0.01


def picture(network: IPAdapter, embeds: Tensor, count: int, scale: float) -> Pictures:
    """All pictures of a row are its tokens."""
    tokens = network.tokens(embeds).unflatten(0, (-1, count)).flatten(1, 2)
    return Pictures(network.kv(tokens, [scale] * len(network.attentions)), len(tokens))


def test_rows_without_pictures_are_as_they_were() -> None:
    unet = tiny.unet("sd1")
    mine, values = ours(unet, "sd1"), inputs(unet, 3)
    network = read_ip_adapter(ip_adapters.state(unet), adapter_files.spec("sd1")).network
    plain = step(mine, values, [])
    own = picture(network, image_embeds("base", 1), 1, 1.0)
    got = step(mine, values, [own])
    assert torch.equal(got[1:], plain[1:])
    assert error(got[:1], plain[:1]) > 0.01
    last = step(mine, values, [own._replace(first=2)])
    assert torch.equal(last[:2], plain[:2])
    assert error(last[2:], plain[2:]) > 0.01
    # By slots, as batches have them: one picture for two rows, and a slot whose length says that it has none.
    kv = tuple(torch.cat((torch.full_like(x, float("nan")), x)) for x in own.kv if x is not None)
    lengths, slots = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([1, 0, 1], dtype=torch.int32)
    got_by_slots = step(mine, values, [Pictures(kv, 3, 0, lengths, slots)])
    assert torch.allclose(got_by_slots[:1], got[:1], atol=1e-5)
    assert torch.allclose(got_by_slots[1:2], plain[1:2], atol=1e-5)
    assert error(got_by_slots[2:], plain[2:]) > 0.01


def test_a_scale_of_zero_computes_nothing() -> None:
    unet = tiny.unet("sd1")
    network = read_ip_adapter(ip_adapters.state(unet), adapter_files.spec("sd1")).network
    tokens = network.tokens(image_embeds("base", 1))
    layers = len(network.attentions)
    scales = [0.0 if k % 2 else 1.0 for k in range(layers)]
    kv = network.kv(tokens, scales)
    assert [x is None for x in kv] == [scale == 0 for scale in scales]
    mine, values = ours(unet, "sd1"), inputs(unet, 1)
    zeros = tuple(
        torch.zeros(1, 4, 2 * width) if x is None else x for x, width in zip(kv, network.config.widths, strict=True)
    )
    assert error(step(mine, values, [Pictures(kv, 1)]), step(mine, values, [Pictures(zeros, 1)])) < 1e-6


def test_a_gpu_takes_one_attention_more_per_layer() -> None:
    """Of its own kernel, by slots and lengths as in a batch; counted without a GPU."""

    def launches(rows: int) -> int:
        target, to = Launches(), {"device": "meta", "dtype": torch.float16}
        unet, widths = dry_run.network(SD15, torch.float16), SD15.cross_widths
        maps = torch.empty(2, 4, dtype=torch.int32, device="meta")
        lengths = torch.empty(8, dtype=torch.int32, device="meta")
        kv = tuple(torch.empty(8, 16, 2 * width, **to) for width in widths)  # type: ignore[call-overload]
        texts = [torch.empty(8, 77, 2 * width, **to) for width in widths]  # type: ignore[call-overload]
        model_input = torch.empty(4, 4, 64, 64, **to)  # type: ignore[call-overload]
        times = torch.empty(4, SD15.time_channels, **to)  # type: ignore[call-overload]
        pictures = [Pictures(kv, rows, 0, lengths, maps[0, :rows])] if rows else []
        with dispatch.targeting(target), torch.no_grad():
            unet.step(model_input, times, texts, kv_len=lengths, slots=maps[0], pictures=pictures)  # type: ignore
        return target.count

    assert launches(2) - launches(0) == len(SD15.cross_widths)
