"""U-Nets against diffusers, on seeded random weights in float32."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from peer_networks import TOLERANCE, error, give, go_as_gpus_do, inputs, judge, unet_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastldm.errors import InputError
from fastldm.kernels import dispatch
from fastldm.models import AddedConditions, UNet
from fastldm.models.config import UNetConfig
from fastldm.models.embeddings import guidance_embedding, timestep_embedding
from fastldm.models.unet import Reuse

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# Families that differ in their scheduler alone have one network.
NETWORKS = {str(config): name for name, config in reversed(tiny.UNETS.items())}.values()


@pytest.mark.parametrize("name", NETWORKS)
def test_unet_equals_diffusers(name: str) -> None:
    theirs = judge(name)
    ours = unet_of(theirs)
    # 8 x 8 is the families' own size; 9 x 7 is no multiple of any stride
    for height, width in ((8, 8), (9, 7)):
        arguments = inputs(theirs, height, width)
        assert error(ours(**arguments), theirs(**arguments).sample) < TOLERANCE


@pytest.mark.parametrize("name", ["sd1", "sdxl", "x4-upscaler"])
def test_gpus_way_through_the_network_equals_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases added ahead, products added to in place, and sums after convolutions left to the norms that read them."""
    go_as_gpus_do(monkeypatch)
    theirs = judge(name)
    arguments = inputs(theirs)
    seen: Counter[str] = Counter()
    with dispatch.observe(lambda op, args, kwargs: seen.update([op.name])):
        assert error(unet_of(theirs)(**arguments), theirs(**arguments).sample) < TOLERANCE
    assert seen["conv_group_norm"] > seen["group_norm"]


@pytest.mark.parametrize("as_gpus_do", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "x4-upscaler"])
def test_a_row_reuses_deep_features(name: str, as_gpus_do: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, of which the first computes all. diffusers computes both, and what the second reuses is put there."""
    if as_gpus_do:
        go_as_gpus_do(monkeypatch)
    theirs, kept = tiny.unet(name), torch.randn(1, 32, 9, 7, generator=torch.Generator().manual_seed(1))
    theirs.up_blocks[-2].register_forward_hook(lambda *call: torch.cat((call[2][:1], kept)))
    arguments, ours = inputs(theirs, 9, 7), unet_of(theirs)
    added = AddedConditions(**arguments["added_cond_kwargs"]) if name == "sdxl" else None
    rows = ours.time_rows(arguments["timestep"], added=added, class_labels=arguments.get("class_labels"))
    deep: list[torch.Tensor] = []

    def exchange(computed: torch.Tensor | None) -> torch.Tensor:
        assert computed is not None
        deep.append(computed)
        return torch.cat((computed, kept))

    states = arguments["sample"], rows, ours.cross_kv(arguments["encoder_hidden_states"])
    expected = theirs(**arguments).sample
    assert error(ours.step(*states, reuse=Reuse(1, exchange)), expected) < TOLERANCE
    both = torch.cat((deep[0], kept))
    assert error(ours.step(*states, reuse=Reuse(0, lambda computed: both)), expected) < TOLERANCE


def test_scalar_and_fractional_timesteps_match_diffusers() -> None:
    theirs = judge("tiny-sd")
    ours, arguments = unet_of(theirs), inputs(theirs)
    for timestep in (7, 7.25, torch.tensor(31), torch.tensor([3.5, 998.75])):  # Karras and KDPM2 have fractions
        arguments["timestep"] = timestep
        assert error(ours(**arguments), theirs(**arguments).sample) < TOLERANCE


def test_all_text_is_read_at_admission() -> None:
    theirs = judge("x4-upscaler")
    ours, arguments = unet_of(theirs), inputs(theirs)
    rows = ours.time_rows(arguments["timestep"], class_labels=arguments["class_labels"])
    text = ours.cross_kv(arguments["encoder_hidden_states"])
    assert [kv.shape[2] // 2 for kv in text] == list(ours.config.cross_widths)
    cross = [name for name, module in ours.named_modules() if getattr(module, "only_cross", False)]
    assert 0 < len(cross) < len(text) / 2  # of the last level and the middle one each, of the rest two
    for name, parameter in list(ours.named_parameters()):
        if any(f"{layer}.attn{k}.to_{x}." in name for layer in cross for k in (1, 2) for x in "kv"):
            ours.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(parameter * torch.nan)
    assert error(ours.step(arguments["sample"], rows, text), theirs(**arguments).sample) < TOLERANCE


def test_successive_sdxl_prompts_match_diffusers() -> None:
    theirs = judge("sdxl")
    ours = unet_of(theirs)
    rows = []
    for seed in (1, 2):  # other pooled text and sizes at the same time step: other rows, never those of before
        arguments = inputs(theirs, seed=seed)
        arguments["timestep"] = torch.tensor([500, 500])
        added = AddedConditions(**arguments["added_cond_kwargs"])
        rows.append(ours.time_rows(arguments["timestep"], added=added))
        out = ours.step(arguments["sample"], rows[-1], ours.cross_kv(arguments["encoder_hidden_states"]))
        assert error(out, theirs(**arguments).sample) < TOLERANCE
    assert error(rows[0], rows[1]) > 0.05


def test_lcm_uses_guidance_scale() -> None:
    theirs = judge("lcm")
    ours, arguments = unet_of(theirs), inputs(theirs)
    rows = ours.time_rows(arguments["timestep"], guidance=torch.tensor([8.5, 2.0]))
    out = ours.step(arguments["sample"], rows, ours.cross_kv(arguments["encoder_hidden_states"]))
    assert error(out, theirs(**arguments).sample) < TOLERANCE
    changed = ours.time_rows(arguments["timestep"], guidance=torch.tensor([1.0, 1.0]))
    assert error(rows, changed) > 0.01


def test_embeddings_are_bitwise_diffusers() -> None:
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
    with pytest.raises(InputError, match="noise level"):
        unet_of(judge("x4-upscaler")).time_rows(torch.tensor([1]))


@pytest.mark.parametrize("name", ["sd1", "ssd-1b"])
def test_time_rows_and_step_equal_forward(name: str) -> None:
    theirs = judge(name)
    ours, arguments = unet_of(theirs), inputs(theirs)
    steps = torch.tensor([999, 666, 333, 0])
    added = None
    if "added_cond_kwargs" in arguments:
        added = AddedConditions(*(t[:1].expand(4, -1) for t in arguments["added_cond_kwargs"].values()))
        arguments["added_cond_kwargs"] = {name: t[:1] for name, t in arguments["added_cond_kwargs"].items()}
    rows = ours.time_rows(steps, added=added)
    arguments |= {name: arguments[name][:1] for name in ("sample", "encoder_hidden_states")}
    kv = ours.cross_kv(arguments["encoder_hidden_states"])
    for i, step in enumerate(steps):
        arguments["timestep"] = step
        assert error(ours.step(arguments["sample"], rows[i : i + 1], kv), ours(**arguments)) < 1e-5


def test_step_uses_no_cached_weights() -> None:
    theirs = judge("sdxl")
    ours, arguments = unet_of(theirs), inputs(theirs)
    rows = ours.time_rows(arguments["timestep"], added=AddedConditions(**arguments["added_cond_kwargs"]))
    kv = ours.cross_kv(arguments["encoder_hidden_states"])
    expected = ours.step(arguments["sample"], rows, kv)
    fixed = ("time_embedding", "add_embedding", "time_emb_proj", "conv1.bias", "attn2.to_k", "attn2.to_v")
    for name, parameter in list(ours.named_parameters()):
        if any(key in name for key in fixed):
            owner, _, leaf = name.rpartition(".")
            setattr(ours.get_submodule(owner), leaf, nn.Parameter(torch.full_like(parameter, torch.nan)))
    assert torch.equal(ours.step(arguments["sample"], rows, kv), expected)


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


def test_bfloat16_error_is_like_diffusers_without_float64() -> None:
    theirs = tiny.unet("sdxl")
    ours, arguments = unet_of(theirs), inputs(theirs)
    exact = theirs(**arguments).sample

    def to_bfloat16(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: value if key == "time_ids" else to_bfloat16(value) for key, value in value.items()}
        return value.bfloat16() if value.is_floating_point() else value

    arguments = {key: to_bfloat16(value) for key, value in arguments.items()}
    with Dtypes() as dtypes:
        out = ours.bfloat16()(**arguments)
    assert out.dtype == torch.bfloat16
    assert torch.float64 not in dtypes.seen
    assert error(out, exact) < 1.5 * error(theirs.bfloat16()(**arguments).sample, exact) + 2**-8


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
    arguments = inputs(theirs, 32, 32)
    assert error(unet_of(theirs)(**arguments), theirs(**arguments).sample) < TOLERANCE


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
def test_published_networks_have_their_parameters(name: str) -> None:
    config, parameters, channels = FULL_UNETS[name]
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict({"block_out_channels": [320, 640, 1280, 1280], **config}))
        added = AddedConditions(torch.empty(3, 1280), torch.empty(3, 6)) if unet.config.needs_added else None
        assert unet.time_rows(torch.empty(3), added=added).shape == (3, channels)
    assert sum(p.numel() for p in unet.parameters()) == parameters
