"""The networks against diffusers and transformers, on seeded random weights in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastldm.errors import CheckpointError, InputError
from fastldm.kernels import attention, conv, geglu, group_norm, layer_norm, linear
from fastldm.models import AddedConditions, AutoencoderKL, CLIPText, TinyAutoencoder, UNet, rescale_for_half
from fastldm.models.config import TextConfig, TinyVAEConfig, UNetConfig, VAEConfig
from fastldm.models.unet import guidance_embedding, timestep_embedding

pytestmark = pytest.mark.usefixtures("_no_grad")
TOLERANCE = 1e-5  # of 1e-4 allowed; 2e-6 was the most seen. A wrong eps in a norm shows only below 2e-5


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|"""
    assert ours.shape == theirs.shape
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def give(network: nn.Module, weights: dict[str, Tensor]) -> Any:
    return network.load_state_dict(weights, strict=True, assign=True) and network.eval()


@cache
def judge(name: str) -> UNet2DConditionModel:
    """A U-Net that no test changes."""
    return tiny.unet(name)


def unet_of(theirs: UNet2DConditionModel) -> UNet:
    """Our U-Net, built on meta, with the judge's own weights."""
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(theirs.config))
    return give(ours, theirs.state_dict())


def text_of(theirs: nn.Module) -> CLIPText:
    config = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    with torch.device("meta"):
        ours = CLIPText(TextConfig.from_dict(config))
    prefix = "" if hasattr(theirs, "text_model") else "text_model."
    return give(ours, {prefix + name: value for name, value in theirs.state_dict().items()})


def inputs(theirs: UNet2DConditionModel, height: int = 8, width: int = 8, seed: int = 0) -> dict[str, Any]:
    """Two rows that differ in all they hold: latents, time step, text, pooled text, sizes, guidance."""
    g = torch.Generator().manual_seed(seed)
    config = theirs.config
    context = config.cross_attention_dim
    given = {
        "sample": torch.randn(2, config.in_channels, height, width, generator=g),
        "timestep": torch.tensor([999, 20 + seed]),
        "encoder_hidden_states": torch.randn(2, 11, context, generator=g),
    }
    if config.addition_embed_type:
        sizes = torch.randint(0, 2048, (2, 6), generator=g).float()
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 24, generator=g), "time_ids": sizes}
    if config.time_cond_proj_dim:
        scale = torch.tensor([8.5, 2.0])  # a guidance scale of 8.5 enters the embedding as 7.5
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        given["timestep_cond"] = embed(None, scale - 1, embedding_dim=config.time_cond_proj_dim)
    return given


# ---------------------------------------------------------------------------------------------------------- U-Net


# Families that differ in their scheduler alone have one network.
NETWORKS = {str(config): name for name, config in reversed(tiny.UNETS.items())}.values()


@pytest.mark.parametrize("name", NETWORKS)
def test_unet_equals_diffusers(name: str) -> None:
    theirs = judge(name)
    ours = unet_of(theirs)
    # 8 x 8 is the families' own size; 9 x 7 is no multiple of any stride
    for height, width in ((8, 8), (9, 7)):
        given = inputs(theirs, height, width)
        assert error(ours(**given), theirs(**given).sample) < TOLERANCE


def test_a_scalar_or_fractional_timestep() -> None:
    theirs = judge("tiny-sd")
    ours, given = unet_of(theirs), inputs(theirs)
    for timestep in (7, 7.25, torch.tensor(31), torch.tensor([3.5, 998.75])):  # Karras and KDPM2 have fractions
        given["timestep"] = timestep
        assert error(ours(**given), theirs(**given).sample) < TOLERANCE


def test_two_sdxl_prompts_in_succession() -> None:
    theirs = judge("sdxl")
    ours = unet_of(theirs)
    rows = []
    for seed in (1, 2):  # other pooled text and sizes at the same time step: other rows, never those of before
        given = inputs(theirs, seed=seed)
        given["timestep"] = torch.tensor([500, 500])
        added = AddedConditions(**given["added_cond_kwargs"])
        rows.append(ours.time_rows(given["timestep"], added=added))
        out = ours.step(given["sample"], rows[-1], ours.cross_kv(given["encoder_hidden_states"]))
        assert error(out, theirs(**given).sample) < TOLERANCE
    assert error(rows[0], rows[1]) > 0.05


def test_lcm_reads_the_guidance_scale() -> None:
    theirs = judge("lcm")
    ours, given = unet_of(theirs), inputs(theirs)
    rows = ours.time_rows(given["timestep"], guidance=torch.tensor([8.5, 2.0]))
    out = ours.step(given["sample"], rows, ours.cross_kv(given["encoder_hidden_states"]))
    assert error(out, theirs(**given).sample) < TOLERANCE
    other = ours.time_rows(given["timestep"], guidance=torch.tensor([1.0, 1.0]))
    assert error(rows, other) > 0.01


def test_embeddings_are_bitwise_those_of_diffusers() -> None:
    steps = torch.tensor([0.0, 1.0, 37.5, 999.0])
    for channels, flip, shift in ((320, True, 0), (33, False, 1)):  # 33: an odd width is padded
        expected = get_timestep_embedding(steps, channels, flip_sin_to_cos=flip, downscale_freq_shift=shift)
        assert torch.equal(timestep_embedding(steps, channels, flip, shift), expected)
    scale = torch.tensor([1.0, 2.5, 8.5])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=256)
    assert torch.equal(guidance_embedding(scale, 256), expected)


def test_missing_conditions_are_named() -> None:
    with pytest.raises(InputError, match="guidance"):
        unet_of(judge("lcm")).time_rows(torch.tensor([1]))
    with pytest.raises(InputError, match="pooled text"):
        unet_of(judge("sdxl")).time_rows(torch.tensor([1]))


@pytest.mark.parametrize("name", ["sd1", "ssd-1b"])
def test_rows_of_a_schedule_give_what_forward_gives(name: str) -> None:
    theirs = judge(name)
    ours, given = unet_of(theirs), inputs(theirs)
    steps = torch.tensor([999, 666, 333, 0])
    added = None
    if "added_cond_kwargs" in given:
        added = AddedConditions(*(t[:1].expand(4, -1) for t in given["added_cond_kwargs"].values()))
        given["added_cond_kwargs"] = {name: t[:1] for name, t in given["added_cond_kwargs"].items()}
    rows = ours.time_rows(steps, added=added)
    given["sample"], given["encoder_hidden_states"] = given["sample"][:1], given["encoder_hidden_states"][:1]
    kv = ours.cross_kv(given["encoder_hidden_states"])
    for i, step in enumerate(steps):
        given["timestep"] = step
        assert error(ours.step(given["sample"], rows[i : i + 1], kv), ours(**given)) < 1e-5


def test_step_computes_only_what_changes_each_step() -> None:
    theirs = judge("sdxl")
    ours, given = unet_of(theirs), inputs(theirs)
    rows = ours.time_rows(given["timestep"], added=AddedConditions(**given["added_cond_kwargs"]))
    kv = ours.cross_kv(given["encoder_hidden_states"])
    expected = ours.step(given["sample"], rows, kv)
    fixed = ("time_embedding", "add_embedding", "time_emb_proj", "conv1.bias", "attn2.to_k", "attn2.to_v")
    for name, parameter in list(ours.named_parameters()):
        if any(part in name for part in fixed):
            owner, _, leaf = name.rpartition(".")
            setattr(ours.get_submodule(owner), leaf, nn.Parameter(torch.full_like(parameter, torch.nan)))
    assert torch.equal(ours.step(given["sample"], rows, kv), expected)


def test_activations_stay_channels_last() -> None:
    theirs = judge("sdxl")
    ours = unet_of(theirs)
    seen = []

    def check(module: nn.Module, _: Any, out: Tensor) -> None:
        if out.ndim == 4:
            seen.append(out.is_contiguous(memory_format=torch.channels_last))

    for module in ours.modules():
        module.register_forward_hook(check)
    ours(**inputs(theirs))
    assert len(seen) > 50
    assert all(seen)


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of all floating-point results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)}
        return out


def test_bfloat16_is_as_good_as_diffusers_and_never_float64() -> None:
    theirs = tiny.unet("sdxl")
    ours, given = unet_of(theirs), inputs(theirs)
    exact = theirs(**given).sample

    def half(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: value if key == "time_ids" else half(value) for key, value in value.items()}
        return value.bfloat16() if value.is_floating_point() else value

    given = {key: half(value) for key, value in given.items()}
    with Dtypes() as dtypes:
        out = ours.bfloat16()(**given)
    assert out.dtype == torch.bfloat16
    assert torch.float64 not in dtypes.seen
    assert error(out, exact) < 1.5 * error(theirs.bfloat16()(**given).sample, exact) + 2**-8


@pytest.mark.full
def test_sd1_at_full_size_equals_diffusers() -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    generator = torch.Generator().manual_seed(0)
    weights = {
        # of the size that keeps activations near one, or the comparison would be of noise
        name: torch.randn(p.shape, generator=generator).mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
        for name, p in theirs.state_dict().items()
    }
    weights |= {name: value + 1 for name, value in weights.items() if "norm" in name and name.endswith("weight")}
    give(theirs, weights)
    given = inputs(theirs, 32, 32)
    assert error(unet_of(theirs)(**given), theirs(**given).sample) < TOLERANCE


# Parameters and time-row channels of the published networks, from their configs on the hub.
FULL_UNETS: dict[str, tuple[dict[str, Any], int, int]] = {
    "SD 1.5": ({"cross_attention_dim": 768}, 859_520_964, 20_160),
    "SD 2.1": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        865_910_724,
        20_160,
    ),
    "SDXL": (
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": [tiny.DOWN, tiny.CROSS_DOWN, tiny.CROSS_DOWN],
            "up_block_types": [tiny.CROSS_UP, tiny.CROSS_UP, tiny.UP],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
        13_760,
    ),
}


@pytest.mark.parametrize("name", FULL_UNETS)
def test_the_published_networks_have_their_size(name: str) -> None:
    config, parameters, channels = FULL_UNETS[name]
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict({"block_out_channels": [320, 640, 1280, 1280], **config}))
        added = AddedConditions(torch.empty(3, 1280), torch.empty(3, 6)) if unet.config.needs_added else None
        assert unet.time_rows(torch.empty(3), added=added).shape == (3, channels)
    assert sum(p.numel() for p in unet.parameters()) == parameters


# ----------------------------------------------------------------------------------------------------- autoencoders


def vae_of(theirs: nn.Module) -> AutoencoderKL:
    with torch.device("meta"):
        ours = AutoencoderKL(VAEConfig.from_dict(theirs.config))
    return give(ours, theirs.state_dict())


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
    picture = torch.rand(2, 3, 40, 24) * 2 - 1
    assert error(ours.encode(picture), theirs.encode(picture).latent_dist.parameters) < TOLERANCE
    latents = torch.randn(2, ours.config.latent_channels, 5, 7)
    assert error(ours.decode(latents), theirs.decode(latents).sample) < TOLERANCE
    assert ours.config.factor == 8


def test_tiny_vae_equals_diffusers() -> None:
    theirs = tiny.tiny_vae()
    with torch.device("meta"):
        ours = TinyAutoencoder(TinyVAEConfig.from_dict(theirs.config))
    give(ours, theirs.state_dict())
    picture, latents = torch.rand(2, 3, 40, 24) * 2 - 1, 3 * torch.randn(2, 4, 5, 7)
    assert error(ours.encode(picture), theirs.encode(picture).latents) < TOLERANCE
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


@pytest.mark.parametrize("exponent", [-3, -7])
def test_rescaling_for_half_is_exact(exponent: int) -> None:
    theirs = tiny.vae("sdxl")
    ours = vae_of(theirs)
    shared = ours.decoder.conv_in.weight.data_ptr(), theirs.decoder.conv_in.weight.clone()
    picture, latents = torch.rand(2, 3, 40, 24) * 2 - 1, torch.randn(2, 4, 5, 7)
    moments, decoded = ours.encode(picture), ours.decode(latents)
    rescale_for_half(ours, exponent)
    assert torch.equal(ours.encode(picture), moments)
    assert torch.equal(ours.decode(latents), decoded)
    assert theirs.decoder.conv_in.weight.data_ptr() == shared[0]
    assert torch.equal(theirs.decoder.conv_in.weight, shared[1])  # the judge shares its weights with ours


def test_a_rescaled_vae_stays_in_float16_range() -> None:
    ours = vae_of(tiny.vae("sdxl"))
    ours.decoder.conv_in.weight = nn.Parameter(ours.decoder.conv_in.weight * 1e5)  # as SDXL's, beyond 65504
    latents = torch.randn(1, 4, 4, 4)
    exact = ours.decode(latents)
    assert largest_activation(ours, lambda: ours.decode(latents)) > 2**16
    rescale_for_half(ours)
    assert largest_activation(ours, lambda: ours.decode(latents)) < 2**16
    assert error(ours.half().decode(latents.half()), exact) < 1e-2


# ------------------------------------------------------------------------------------------------------------ text


def token_ids(eos: int = tiny.VOCABULARY - 1) -> Tensor:
    """Three texts of different length, padded with end-of-text tokens as SD1 pads."""
    ids = torch.randint(3, tiny.VOCABULARY - 2, (3, 16), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((1, 9, 15)):
        ids[row, length:] = eos
    return ids


@pytest.mark.parametrize("kind", ["l", "h", "bigg"])
def test_text_encoder_equals_transformers(kind: str) -> None:
    theirs = tiny.text_encoder(kind)
    ours, ids = text_of(theirs), token_ids()
    expected = theirs(ids, output_hidden_states=True)
    hidden, pooled = ours(ids)
    assert error(hidden, expected.last_hidden_state) < TOLERANCE
    if kind == "bigg":
        assert error(pooled, expected.text_embeds) < TOLERANCE
    else:
        assert pooled is None
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    for skip in (1, 2):  # as diffusers: clip_skip = 1 is hidden_states[-2], normalised for SD1 and SD2, raw for SDXL
        raw, still = ours(ids, skip=skip, final_norm=False)
        assert error(raw, expected.hidden_states[-1 - skip]) < TOLERANCE
        assert error(ours(ids, skip=skip)[0], norm(expected.hidden_states[-1 - skip])) < TOLERANCE
        assert pooled is None or torch.equal(still, pooled)


@pytest.mark.parametrize("eos", [2, 500])
def test_pooled_text_is_the_first_end_of_text(eos: int) -> None:
    theirs = tiny.text_encoder("bigg", eos_token_id=eos)
    ids = token_ids(eos=tiny.VOCABULARY - 1 if eos == 2 else eos)  # 2 stands for the highest id in old configs
    assert error(text_of(theirs)(ids)[1], theirs(ids).text_embeds) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "heads": 12}, 123_060_480),
        ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "heads": 16}, 340_387_840),
        (
            {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "heads": 20, "p": 1280},
            694_659_840,
        ),
    ],
    ids=["L", "H", "bigG"],
)
def test_the_published_text_encoders_have_their_size(config: dict[str, Any], parameters: int) -> None:
    config = {**config, "num_attention_heads": config["heads"]}
    if "p" in config:
        config |= {"projection_dim": config["p"], "architectures": ["CLIPTextModelWithProjection"]}
    with torch.device("meta"):
        text = CLIPText(TextConfig.from_dict(config))
    assert sum(p.numel() for p in text.parameters()) == parameters


# --------------------------------------------------------------------------------------------------------- configs

UNET, VAE = dict(tiny.unet("sd1").config), dict(tiny.vae().config)
TINY_VAE, TEXT = dict(tiny.tiny_vae().config), tiny.text_encoder("l").config.to_dict()


@pytest.mark.parametrize(
    ("read", "config", "key", "value"),
    [
        (UNetConfig, UNET, "_class_name", "UNet3DConditionModel"),
        (UNetConfig, UNET, "act_fn", "gelu"),
        (UNetConfig, UNET, "addition_embed_type", "image"),
        (UNetConfig, UNET, "attention_type", "gated"),
        (UNetConfig, UNET, "center_input_sample", True),
        (UNetConfig, UNET, "class_embed_type", "projection"),
        (UNetConfig, UNET, "num_class_embeds", 1000),
        (UNetConfig, UNET, "conv_in_kernel", 1),
        (UNetConfig, UNET, "cross_attention_norm", "layer_norm"),
        (UNetConfig, UNET, "dual_cross_attention", True),
        (UNetConfig, UNET, "down_block_types", ["SimpleCrossAttnDownBlock2D"] * 4),
        (UNetConfig, UNET, "encoder_hid_dim_type", "text_proj"),
        (UNetConfig, UNET, "mid_block_scale_factor", 1.4),
        (UNetConfig, UNET, "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        (UNetConfig, UNET, "num_attention_heads", 8),
        (UNetConfig, UNET, "only_cross_attention", [True, True, True, False]),
        (UNetConfig, UNET, "resnet_time_scale_shift", "scale_shift"),
        (UNetConfig, UNET, "time_embedding_type", "fourier"),
        (UNetConfig, UNET, "timestep_post_act", "silu"),
        (VAEConfig, VAE, "_class_name", "AsymmetricAutoencoderKL"),
        (VAEConfig, VAE, "act_fn", "mish"),
        (VAEConfig, VAE, "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        (VAEConfig, VAE, "latents_mean", [0.0, 0.0, 0.0, 0.0]),
        (TinyVAEConfig, TINY_VAE, "act_fn", "gelu"),
        (TinyVAEConfig, TINY_VAE, "upsampling_scaling_factor", 3),
        (TinyVAEConfig, TINY_VAE, "encoder_block_out_channels", [16, 16, 32, 32]),
        (TextConfig, TEXT, "hidden_act", "gelu_new"),
        (TextConfig, TEXT, "model_type", "t5"),
        (TextConfig, TEXT, "architectures", ["CLIPVisionModel"]),
        (TextConfig, TEXT, "use_attention_mask", True),
    ],
)
def test_what_would_change_the_network_is_refused_by_name(
    read: Any, config: dict[str, Any], key: str, value: Any
) -> None:
    read.from_dict(config)
    with pytest.raises(CheckpointError) as refused:
        read.from_dict({**config, key: value}, source="somewhere/config.json")
    told = value[0] if isinstance(value, list) else value
    assert "somewhere/config.json" in str(refused.value)
    assert key in str(refused.value)
    assert str(told) in str(refused.value)


def test_irrelevant_keys_are_ignored_and_missing_ones_named() -> None:
    config = {**UNET, "dropout": 0.3, "upcast_attention": True, "_diffusers_version": "9", "something_new": 1}
    assert UNetConfig.from_dict(config) == UNetConfig.from_dict(UNET)
    for read, key in (
        (UNetConfig, "block_out_channels"),
        (VAEConfig, "block_out_channels"),
        (TextConfig, "hidden_size"),
    ):
        with pytest.raises(CheckpointError, match=key):
            read.from_dict({})
    with pytest.raises(CheckpointError, match=r"'hidden_size' 32 .* 'num_attention_heads' 5"):
        TextConfig.from_dict({**TEXT, "num_attention_heads": 5})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers_per_block": [2, 2]}, "'layers_per_block' has 2 entries, expected 4"),
        ({"attention_head_dim": 5}, "16 channels do not divide into 'attention_head_dim' 5"),
        ({"norm_num_groups": 5}, "16 channels do not divide into 'norm_num_groups' 5"),
        ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "reverse_transformer_layers_per_block"),
        (
            {"transformer_layers_per_block": [[1], 1, 1, 1], "reverse_transformer_layers_per_block": [1] * 4},
            "2 resnets",
        ),
    ],
)
def test_contradictions_in_a_unet_config_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        UNetConfig.from_dict({**UNET, **changes})


# ------------------------------------------------------------------------------------------------------------ ops


def test_ops_are_their_formulas() -> None:
    x, skip = torch.randn(2, 10, 5, 3), torch.randn(2, 14, 5, 3)  # groups of 6: one straddles the seam
    shift, weight, bias = torch.randn(2, 24), torch.randn(24), torch.randn(24)
    y = (torch.cat((x, skip), 1) + shift[:, :, None, None]).double().reshape(2, 4, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, correction=0) + 1e-3).sqrt()
    y = y.reshape(2, 24, 5, 3) * weight[:, None, None] + bias[:, None, None]
    out = group_norm.group_norm(x, 4, weight, bias, 1e-3, silu=True, shift=shift, skip=skip)
    assert error(out, y * y.sigmoid()) < 1e-5

    q, kv = torch.randn(2, 7, 24), torch.randn(2, 5, 48)
    k, v = kv.chunk(2, dim=-1)  # halves of one packed tensor
    for scale, causal in ((None, False), (0.1, False), (None, True)):
        heads = [t.double().reshape(2, -1, 3, 8).transpose(1, 2) for t in (q, k, v)]
        scores = heads[0] @ heads[1].mT * (scale or 8**-0.5)
        if causal:
            scores += torch.full((7, 5), -torch.inf).triu(1)
        expected = (scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(2, 7, 24)
        assert error(attention.attention(q, k, v, 3, scale=scale, causal=causal), expected) < 1e-5

    a, b = q.double().chunk(2, dim=-1)
    assert error(geglu.geglu(q), a * b * (1 + torch.erf(b / 2**0.5)) / 2) < 1e-5
    y = (q - q.mean(-1, keepdim=True)) / (q.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias
    assert error(layer_norm.layer_norm(q, weight, bias, 1e-5), y) < 1e-5
    residual, w = torch.randn(2, 7, 6), torch.randn(6, 24)
    assert error(linear.linear(q, w, bias[:6], residual=residual), q @ w.T + bias[:6] + residual) < 1e-5


@pytest.mark.parametrize("size", [(10, 6), (9, 6)], ids=["twice", "a skip connection's odd size"])
def test_convolutions_are_their_formulas(size: tuple[int, int]) -> None:
    x, weight, bias = torch.randn(2, 4, 5, 3), torch.randn(6, 4, 3, 3), torch.randn(6)
    rows, columns = (torch.arange(n) * m // n for n, m in zip(size, (5, 3), strict=True))
    large = F.pad(x[:, :, rows][..., columns], (1, 1, 1, 1))
    windows = large.unfold(2, 3, 1).unfold(3, 3, 1)  # (2, 4, H, W, 3, 3)
    expected = torch.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
    assert error(conv.upsample_conv2d(x, weight, bias, size), expected) < 1e-5

    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)
    expected = torch.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
    residual = torch.randn_like(expected)
    out = conv.conv2d(x, weight, bias, stride=2, padding=1, residual=residual)
    assert error(out, expected + residual) < 1e-5


# ------------------------------------------------------------------------------------------------- what a model costs


def test_building_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    UNet(UNetConfig.from_dict(tiny.UNETS["sdxl"]))
    AutoencoderKL(VAEConfig.from_dict(VAE))
    CLIPText(TextConfig.from_dict(TEXT))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_networks_import_nothing_heavy() -> None:
    code = f"""
import sys, torch
from fastldm.models.config import UNetConfig
from fastldm.models import UNet
with torch.inference_mode():
    unet = UNet(UNetConfig.from_dict({tiny.UNETS["tiny-sd"]!r}))
    unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 32))
print([name for name in ("torch._dynamo", "triton", "transformers", "diffusers") if name in sys.modules])
"""
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr
