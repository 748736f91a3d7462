"""Autoencoders against diffusers; decoding in pieces gives the same bits, and tiles do not show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kandinsky
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peer_networks import TOLERANCE, error, give, go_as_gpus_do, vae_of
from torch import Tensor, nn

import fastldm.models.vae as ours
from fastldm import CheckpointError, Pipeline
from fastldm.models import rescale_for_half
from fastldm.models.codebook import Codebook
from fastldm.models.config import TinyVAEConfig, VAEConfig
from fastldm.models.layers import GroupNorm
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder, decode_pieces, finish


def kl() -> AutoencoderKL:
    theirs = tiny.vae()
    vae = AutoencoderKL(VAEConfig.from_dict(theirs.config))
    vae.load_state_dict(theirs.state_dict())
    return vae


def taesd() -> TinyAutoencoder:
    theirs = tiny.tiny_vae()
    vae = TinyAutoencoder(TinyVAEConfig.from_dict(theirs.config))
    vae.load_state_dict(theirs.state_dict())
    return vae


both = pytest.mark.parametrize("make", [kl, taesd])


@both
def test_decoding_in_pieces_is_bitwise_decode(make: Callable[[], Any]) -> None:
    vae, z = make(), torch.randn(2, 4, 5, 6)
    # other work between the pieces: another decode, in step with the first
    pieces, rest = decode_pieces(vae, z), decode_pieces(vae, -z)
    count, most = 0, 0
    while True:
        calls: list[object] = []
        hooks = [
            m.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            for m in vae.modules()
            if not list(m.children())
        ]
        try:
            next(pieces)
        except StopIteration as done:
            image = done.value
            break
        finally:
            for hook in hooks:
                hook.remove()
        next(rest, None)
        count, most = count + 1, max(most, len(calls))
    assert torch.equal(image, vae.decode(z))
    assert count >= 13  # four levels of two resnets or more and three upsamplers, or TAESD's 19 layers
    assert most <= 8  # no piece is more than attention's norm and four products, or a resnet


@both
def test_sliced_decodes_each_image_alone(make: Callable[[], Any]) -> None:
    vae, z = make(), torch.randn(3, 4, 5, 6)
    assert torch.equal(finish(decode_pieces(vae, z, "sliced")), torch.cat([vae.decode(x) for x in z.split(1)]))


@both
def test_single_tile_equals_decode(make: Callable[[], Any]) -> None:
    vae, z = make(), torch.randn(1, 4, 8, 6)
    assert torch.equal(finish(decode_pieces(vae, z, "tiled", tile=8)), vae.decode(z))


@given(st.integers(1, 300), st.integers(4, 96), st.sampled_from([4, 8]))
def test_tile_weights_sum_to_one(size: int, tile: int, factor: int) -> None:
    total = torch.zeros(size * factor)
    for span, weights in ours._spans(size, tile, factor, torch.device("cpu")):
        assert span.stop - span.start == min(size, tile)  # all of one size: one shape for a GPU's plans
        assert weights.min() >= 0
        total[span.start * factor : span.stop * factor] += weights
    torch.testing.assert_close(total, torch.ones_like(total))


def test_tiles_without_statistics_are_exact() -> None:
    """TAESD normalises nothing, so all that is left is the edge of a tile, where convolutions saw zeros. They see 8
    latents around them at most, and next to nothing of those further than the 3 that do not count at a tile's edge."""
    vae, z = taesd(), torch.randn(2, 4, 60, 100)
    tiled, full = finish(decode_pieces(vae, z, "tiled", tile=48)), vae.decode(z)
    assert (tiled - full).abs().max() < 1e-2 * full.abs().max()


def photograph(height: int, width: int) -> Tensor:
    """(1, 3, height, width) in -1..1, like one in what matters: a bright and even side, a dark and busy one, edges."""
    busy = F.interpolate(torch.randn(1, 3, height // 4, width // 4), size=(height, width), mode="bicubic")
    across = torch.linspace(1, -1, width)
    x = 0.5 * across + 0.25 * busy * (1 - across) / 2
    x[:, :, height // 3 : height // 2, width // 4 : width // 2] *= -1
    return x.clamp(-1, 1)


def extra_steps(tiled: Tensor, untiled: Tensor, tile: int, factor: int) -> Tensor:
    """By how much more than the untiled picture the tiled one steps, in levels of 255, across each column where a tile
    begins or ends, and beyond what it does across the columns around it."""
    difference = 127.5 * (tiled - untiled)
    steps = (difference[..., 1:] - difference[..., :-1]).abs().mean((0, 1, 2))
    size = tiled.shape[3] // factor
    ends = {e for span, _ in ours._spans(size, tile, factor, tiled.device) for e in (span.start, span.stop)} - {0, size}
    columns = [end * factor - 1 for end in ends]
    return torch.stack([steps[c] - steps[c - 8 : c + 9].median() for c in columns])


@pytest.fixture(scope="module")
def trained() -> tuple[AutoencoderKL, Tensor, Tensor]:
    """The default model's autoencoder, latents of a picture, and the picture that it decodes whole."""
    vae = Pipeline.default(device="cpu", dtype="float32").vae
    assert isinstance(vae, AutoencoderKL)
    torch.manual_seed(0)
    z = vae.encode(photograph(192, 320)).chunk(2, dim=1)[0]  # (1, 4, 48, 80)
    return vae, z, vae.decode(z)


TILE = 32  # of latents of 48 x 80: two tiles by three


def test_tiles_have_no_visible_borders(trained: tuple[AutoencoderKL, Tensor, Tensor]) -> None:
    vae, z, full = trained
    tiled = finish(decode_pieces(vae, z, "tiled", tile=TILE))
    # The same statistics, and no tiles: what is left is what the tiles do. Half a level is not seen by rounding.
    x, statistics = finish(ours._in_turn(vae.low(), z)), []
    small = F.interpolate(x, size=(TILE, TILE), mode="nearest-exact")
    finish(ours._in_turn(vae.high(ours._recording(statistics)), small))
    untiled = finish(ours._in_turn(vae.high(ours._sharing(iter(statistics))), x))
    assert 127.5 * (tiled - untiled).abs().max() < 0.5
    # Against the whole picture, which has other statistics: no step at a border is a level higher than around it.
    assert extra_steps(tiled, full, TILE, vae.config.factor).max() < 1
    assert 127.5 * (tiled - full).abs().mean() < 5  # measured: see `decode_pieces`


def test_tiles_need_shared_statistics(
    trained: tuple[AutoencoderKL, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, z, full = trained
    shared = finish(decode_pieces(vae, z, "tiled", tile=TILE))
    monkeypatch.setattr(ours, "_sharing", lambda statistics: GroupNorm.__call__)
    own = finish(decode_pieces(vae, z, "tiled", tile=TILE))
    assert (own - full).abs().mean() > 2 * (shared - full).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_statistics_match_group_norm(trained: tuple[AutoencoderKL, Tensor, Tensor], dtype: torch.dtype) -> None:
    """Recorded ones are those that GroupNorm itself finds, in float32: normalising by them changes roundings alone."""
    torch.manual_seed(0)
    layer = GroupNorm(4, 16, 1e-6).to(dtype)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    x, shift = (3 + 2 * torch.randn(1, 16, 9, 7)).to(dtype), torch.randn(1, 16).to(dtype)
    statistics: list[tuple[Tensor, Tensor]] = []
    ours._recording(statistics)(layer, x, silu=True, shift=shift)
    (mean, variance), moved = statistics[0], (x + shift[:, :, None, None]).double().unflatten(1, (4, 4))
    torch.testing.assert_close(mean.double()[::4], moved.mean((0, 2, 3, 4)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(variance.double()[::4], moved.var((0, 2, 3, 4), correction=0), atol=1e-4, rtol=1e-4)
    got = ours._sharing(iter(statistics))(layer, x, silu=True, shift=shift)
    assert got.dtype == dtype
    expected = layer.double()(x.double(), silu=True, shift=shift.double())
    assert (got - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mid_block_add_attention": False, "layers_per_block": 2},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "shift_factor": 0.1},
    ],
    ids=["sd", "no attention", "no quant convs"],
)
def test_vae_equals_diffusers(changes: dict[str, Any]) -> None:
    theirs = tiny.vae(**changes)
    ours = vae_of(theirs)
    image = torch.rand(2, 3, 40, 24) * 2 - 1
    assert error(ours.encode(image), theirs.encode(image).latent_dist.parameters) < TOLERANCE
    latents = torch.randn(2, ours.config.latent_channels, 5, 7)
    assert error(ours.decode(latents), theirs.decode(latents).sample) < TOLERANCE
    assert ours.config.factor == 8


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vq_embed_dim": 5, "latent_channels": 4, "mid_block_add_attention": False, "lookup_from_codebook": True},
        {"num_vq_embeddings": 4100, "block_out_channels": (8, 16, 24, 24), "layers_per_block": 2},
    ],
    ids=["f4", "codes of another width", "codes in three parts"],
)
def test_vq_model_equals_diffusers(changes: dict[str, Any]) -> None:
    if levels := len(changes.get("block_out_channels", ())):
        types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
        changes = {**changes, **types}
    theirs = tiny.vq(**changes)
    ours = vae_of(theirs)
    image = torch.rand(2, 3, 40, 24) * 2 - 1
    encoded = theirs.encode(image).latents
    assert not ours.config.moments
    assert error(ours.encode(image), encoded) < TOLERANCE
    latents = torch.randn(2, ours.config.latent_channels, 5, 7)
    for z in (encoded, latents):
        indices = theirs.quantize(z)[2][2]
        assert ours.quantize is not None
        assert torch.equal(ours.quantize.nearest(z).flatten(), indices.flatten())
        assert len(indices.unique()) > 2
        assert error(ours.decode(z), theirs.decode(z).sample) < TOLERANCE
    assert ours.config.factor == image.shape[2] // encoded.shape[2]


@pytest.fixture(scope="module")
def movq() -> Any:
    """Of factor 4, whose norms read the latents much."""
    theirs = tiny.vq(**kandinsky.movq_blocks(32, 32, 64))
    for name, parameter in theirs.named_parameters():
        if "conv_y" in name or "conv_b" in name:
            parameter.data *= 5
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("takes_nearest", [True, False])
def test_movq_equals_diffusers(movq: Any, takes_nearest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose decoder's norms read the codes, or the latents as they are."""
    ours = AutoencoderKL(replace(vae_of(movq).config, takes_nearest=takes_nearest))
    ours.load_state_dict(movq.state_dict())
    image = torch.rand(2, 3, 40, 24) * 2 - 1
    encoded = movq.encode(image).latents
    assert error(ours.encode(image), encoded) < TOLERANCE
    for z in (encoded, torch.randn(2, 4, 5, 7)):
        expected = movq.decode(z, force_not_quantize=not takes_nearest).sample
        assert error(ours.decode(z), expected) < TOLERANCE
        assert torch.equal(finish(decode_pieces(ours, z)), ours.decode(z))
    go_as_gpus_do(monkeypatch)
    assert error(ours.decode(z), expected) < TOLERANCE


@torch.no_grad()
def test_movq_in_tiles_is_like_movq(movq: Any) -> None:
    """Each tile's norms read the latents of its own place."""
    ours = vae_of(movq)
    z = torch.randn(1, 4, 20, 24)
    assert torch.equal(finish(decode_pieces(ours, z, "tiled", tile=24)), ours.decode(z))
    whole, tiled = ours.decode(z), finish(decode_pieces(ours, z, "tiled", tile=16))
    elsewhere = ours.decode(z.roll(4, 3))
    assert (tiled - whole).abs().mean() < 0.1 * (elsewhere - whole).abs().mean()


def test_movq_of_other_widths_is_refused() -> None:
    config = {**tiny.vq().config, "_class_name": "VQModel", "norm_type": "spatial", "block_out_channels": (32, 64, 96)}
    with pytest.raises(CheckpointError, match="'block_out_channels' has 8, expected multiples of 32"):
        VAEConfig.from_dict({**config, "block_out_channels": (8, 32, 64)})
    with pytest.raises(CheckpointError, match="'vq_embed_dim' is 5 and 'latent_channels' 3"):
        VAEConfig.from_dict({**config, "vq_embed_dim": 5})
    attention = {**kandinsky.movq_blocks(32, 32, 64), "down_block_types": ["AttnDownEncoderBlock2D"] * 3}
    with pytest.raises(CheckpointError, match=r"'down_block_types\[0\]' is 'AttnDownEncoderBlock2D'; .* resolution of"):
        VAEConfig.from_dict({**config, **attention})
    with pytest.raises(CheckpointError, match="'norm_type' is 'spatial'"):
        VAEConfig.from_dict({**tiny.vae().config, "norm_type": "spatial"})


def test_nearest_code_is_the_first_of_equals() -> None:
    codes = Codebook(5000, 2)
    codes.embedding.weight.data = torch.full((5000, 2), 3.0)
    codes.embedding.weight.data[[70, 71, 4500]] = torch.tensor([1.0, 2.0])
    assert codes.nearest(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)).tolist() == [[70]]


@torch.no_grad()
def test_tiny_vae_equals_diffusers() -> None:
    theirs = tiny.tiny_vae()
    with torch.device("meta"):
        ours = TinyAutoencoder(TinyVAEConfig.from_dict(theirs.config))
    give(ours, theirs.state_dict())
    image, latents = torch.rand(2, 3, 40, 24) * 2 - 1, 3 * torch.randn(2, 4, 5, 7)
    assert error(ours.encode(image), theirs.encode(image).latents) < TOLERANCE
    assert error(ours.decode(latents), theirs.decode(latents).sample) < TOLERANCE
    assert ours.config.factor == 8


def largest_activation(network: nn.Module, run: Callable[[], Tensor]) -> float:
    """The largest magnitude that any layer of the network puts out while it runs."""
    largest = [0.0]
    hooks = [
        module.register_forward_hook(lambda _, __, out: largest.append(out.abs().max().item()))
        for module in network.modules()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return max(largest)


@torch.no_grad()
@pytest.mark.parametrize("exponent", [-3, -7])
def test_rescaling_for_float16_is_exact(exponent: int) -> None:
    theirs = tiny.vae("sdxl")
    ours = vae_of(theirs)
    shared = ours.decoder.conv_in.weight.data_ptr(), theirs.decoder.conv_in.weight.clone()
    image, latents = torch.rand(2, 3, 40, 24) * 2 - 1, torch.randn(2, 4, 5, 7)
    moments, decoded = ours.encode(image), ours.decode(latents)
    rescale_for_half(ours, exponent)
    assert torch.equal(ours.encode(image), moments)
    assert torch.equal(ours.decode(latents), decoded)
    assert theirs.decoder.conv_in.weight.data_ptr() == shared[0]
    assert torch.equal(theirs.decoder.conv_in.weight, shared[1])  # the judge shares its weights with ours


@torch.no_grad()
def test_rescaled_vae_stays_in_float16_range() -> None:
    ours = vae_of(tiny.vae("sdxl"))
    ours.decoder.conv_in.weight = nn.Parameter(ours.decoder.conv_in.weight * 1e5)  # as SDXL's, beyond 65504
    latents = torch.randn(1, 4, 4, 4)
    exact = ours.decode(latents)
    assert largest_activation(ours, lambda: ours.decode(latents)) > 2**16
    rescale_for_half(ours)
    assert largest_activation(ours, lambda: ours.decode(latents)) < 2**16
    assert error(ours.half().decode(latents.half()), exact) < 1e-2
