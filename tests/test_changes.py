"""Changes in a loaded diffusers pipeline: each kind is named, and adoption refuses it.

diffusers judges: an adopted pipeline would make other images than the changed one, so that it is not adopted, and an
error of one line names the change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adopted import dropout_in_eval, image, same_image, small_pipeline
from diffusers.models import attention_processor
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D
from named import EXCHANGEABLE
from torch import Tensor, nn

from fastldm import Pipeline
from fastldm.errors import CheckpointError
from fastldm.loading import changes

Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def original() -> Any:
    return small_pipeline()


@pytest.fixture
def pipe(original: Any) -> Any:
    return deepcopy(original)


def _circular_method(pipe: Any) -> None:
    def pad_around(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    pipe.unet.conv_in._conv_forward = pad_around.__get__(pipe.unet.conv_in, nn.Conv2d)


class _Doubled(attention_processor.AttnProcessor2_0):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return 2 * super().__call__(*args, **options)


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class _MyUNet(diffusers.UNet2DConditionModel):
    pass


class PNDMScheduler(diffusers.PNDMScheduler):
    """Another's scheduler, under the name of diffusers'."""


def _wrap_forward(pipe: Any) -> None:
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **options: forward(*args, **options)


def _drop_out(pipe: Any) -> None:
    dropout_in_eval(pipe)
    pipe.unet.train()


def _fuse_then_change(pipe: Any) -> None:
    pipe.fuse_qkv_projections()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv.weight.data.mul_(2)


def _normalize_text(pipe: Any) -> None:
    from tokenizers import normalizers

    pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("wall", "cat")


def _quantise(pipe: Any) -> None:
    pipe.text_encoder = torch.ao.quantization.quantize_dynamic(pipe.text_encoder, {nn.Linear}, dtype=torch.qint8)


def _time_steps(pipe: Any) -> None:
    set_timesteps = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(steps + 1, device=device)


REFUSED: dict[str, tuple[Change, str]] = {
    "FreeU": (
        lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.5, 1.6),
        r"unet\.up_blocks\.0\.s1 is 0\.9 \(and 11 more\): FreeU, which adoption would lose; call pipe\.disable_freeu",
    ),
    "circular padding": (
        lambda pipe: setattr(pipe.vae.decoder.conv_in, "padding_mode", "circular"),
        r"vae\.decoder\.conv_in\.padding_mode is 'circular'.*seamless tiling",
    ),
    "circular padding by method": (_circular_method, r"unet\.conv_in\._conv_forward is .*pad_around"),
    "an attention processor": (
        lambda pipe: pipe.unet.set_attn_processor(_Doubled()),
        r"attn1\.processor is a test_changes\._Doubled \(and \d+ more\)",
    ),
    "attention guidance left on": (
        lambda pipe: setattr(
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1,
            "processor",
            attention_processor.PAGCFGIdentitySelfAttnProcessor2_0(),
        ),
        "perturbed-attention guidance",
    ),
    "a hook": (
        lambda pipe: pipe.unet.mid_block.register_forward_hook(lambda module, args, output: 2 * output),
        r"unet\.mid_block has the hook test_changes\.<lambda>",
    ),
    "a hook before": (
        lambda pipe: pipe.vae.decoder.register_forward_pre_hook(lambda module, args: args),
        r"vae\.decoder has the hook",
    ),
    "another forward": (_wrap_forward, r"unet\.forward is test_changes\._wrap_forward\.<locals>"),
    "a subclass": (lambda pipe: setattr(pipe.unet, "__class__", _MyUNet), "unet is a _MyUNet"),
    "another activation": (lambda pipe: setattr(pipe.unet, "conv_act", nn.ReLU()), r"unet\.conv_act is a .*ReLU, not"),
    "another eps": (lambda pipe: setattr(pipe.unet.conv_norm_out, "eps", 0.1), r"unet\.conv_norm_out\.eps is 0\.1"),
    "another scale": (
        lambda pipe: setattr(pipe.unet.mid_block.resnets[0], "output_scale_factor", 2.0),
        r"resnets\.0\.output_scale_factor is 2\.0",
    ),
    "no middle": (lambda pipe: setattr(pipe.unet, "mid_block", None), r"unet\.mid_block is missing"),
    "a module more": (lambda pipe: setattr(pipe.unet, "extra", nn.Linear(2, 2)), r"unet\.extra is a .*Linear that its"),
    "dropout": (_drop_out, r"is in training mode with dropout 0\.5.*call \.eval\(\)"),
    "a parametrization": (
        lambda pipe: nn.utils.parametrize.register_parametrization(pipe.unet.conv_in, "weight", _Twice()),
        r"unet\.conv_in is a .*ParametrizedConv2d, not a Conv2d",
    ),
    "weight norm": (lambda pipe: nn.utils.weight_norm(pipe.unet.conv_in), r"unet\.conv_in has the hook .*WeightNorm"),
    "quantised layers": (_quantise, r"k_proj is a torch\.ao\.nn\.quantized.*quantised weights"),
    "fused, then changed": (_fuse_then_change, r"attn1\.to_qkv is a"),
    "layerwise casting": (
        lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "LayerwiseCastingHook.*a hook of diffusers",
    ),
    "positions": (
        lambda pipe: pipe.text_encoder.embeddings.position_ids.add_(1).clamp_(max=76),
        r"text_encoder\.embeddings\.position_ids is not 0, 1, 2",
    ),
    "attention of the text": (
        lambda pipe: setattr(pipe.text_encoder.config, "_attn_implementation_internal", "mine"),
        r"text_encoder\.config\._attn_implementation is 'mine'",
    ),
    "alphas": (
        lambda pipe: setattr(pipe.scheduler, "alphas_cumprod", pipe.scheduler.alphas_cumprod**1.2),
        r"scheduler\.alphas_cumprod differs from the scheduler's config",
    ),
    "the last alpha": (
        lambda pipe: setattr(pipe.scheduler, "final_alpha_cumprod", torch.tensor(0.9)),
        r"scheduler\.final_alpha_cumprod differs",
    ),
    "timesteps": (_time_steps, r"scheduler\.set_timesteps is test_changes\._time_steps"),
    "another's scheduler": (
        lambda pipe: setattr(pipe, "scheduler", PNDMScheduler.from_config(pipe.scheduler.config)),
        r"test_changes\.PNDMScheduler is no class of",
    ),
    "prompts": (
        lambda pipe: setattr(pipe, "encode_prompt", lambda *args: args),
        r"pipe\.encode_prompt is test_changes",
    ),
    "pictures": (
        lambda pipe: pipe.image_processor.register_to_config(do_normalize=False),
        r"pipe\.image_processor\.do_normalize is False",
    ),
    "a normalizer": (_normalize_text, r"tokenizer\.backend_tokenizer\.normalizer is Replace"),
    "a float64 autoencoder": (lambda pipe: pipe.vae.double(), r"float32 on cpu \(unet, text_encoder\), float64 on cpu"),
    "a half layer": (lambda pipe: pipe.unet.conv_in.half(), r"float16 on cpu \(unet\), float32 on cpu \(unet, vae"),
    "weights on meta": (lambda pipe: pipe.unet.to("meta"), r"float32 on meta \(unet\)"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_change_is_refused_by_name(pipe: Any, change: str) -> None:
    make, message = REFUSED[change]
    make(pipe)
    with pytest.raises(CheckpointError, match=message) as caught:
        Pipeline.from_diffusers(pipe)
    text = str(caught.value)
    assert text.startswith("StableDiffusionPipeline")
    assert "\n" not in text
    assert len(text) < 500


def test_refused_pipeline_is_unchanged(pipe: Any) -> None:
    before = {name: tensor.data_ptr() for name, tensor in pipe.unet.state_dict().items()}
    pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
    changed = image(pipe)
    with pytest.raises(CheckpointError):
        Pipeline.from_diffusers(pipe)
    assert {name: tensor.data_ptr() for name, tensor in pipe.unet.state_dict().items()} == before
    assert np.array_equal(image(pipe), changed)
    pipe.disable_freeu()
    assert same_image(pipe)


@pytest.mark.parametrize(
    ("owner", "name"), [(CrossAttnUpBlock2D, "forward"), (nn.Conv2d, "_conv_forward"), (nn.Conv2d, "__init__")]
)
def test_patched_class_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def patched(*args: Any, **options: Any) -> Any:
        return method(*args, **options)

    monkeypatch.setattr(owner, name, patched)
    with pytest.raises(CheckpointError, match=rf"{owner.__name__}\.{name} comes from .*test_changes\.py"):
        Pipeline.from_diffusers(pipe)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        ("peft.tuners.lora.layer.Linear", "a LoRA or another adapter.*pipe.unload_lora_weights"),
        ("bitsandbytes.nn.modules.Linear8bitLt", "quantised weights"),
        ("torchao.quantization.Int8Linear", "quantised weights"),
        ("tomesd.patch.ToMeBlock", "token merging.*tomesd.remove_patch"),
        ("somebody.else.Linear", "a change outside its weights and configs"),
    ],
)
def test_layers_of_other_packages_are_refused_by_name(pipe: Any, cls: str, reason: str) -> None:
    module, _, name = cls.rpartition(".")
    foreign = type(name, (nn.Linear,), {"__module__": module})
    pipe.unet.time_embedding.linear_1.__class__ = foreign
    with pytest.raises(CheckpointError, match=rf"time_embedding\.linear_1 is a {cls}, not a Linear: {reason}"):
        Pipeline.from_diffusers(pipe)


def test_offloading_is_refused(pipe: Any) -> None:
    hook = type("AlignDevicesHook", (), {"__module__": "accelerate.hooks"})
    pipe.unet._hf_hook = hook()
    with pytest.raises(CheckpointError, match=r"unet has the hook accelerate\.hooks.*call pipe\.remove_all_hooks"):
        Pipeline.from_diffusers(pipe)


@pytest.mark.parametrize("name", [name for name in EXCHANGEABLE if hasattr(diffusers, name)])
def test_used_schedulers_are_no_change(name: str) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, name)(**config)
    assert list(changes.of_scheduler(scheduler)) == []
    for calls in (None, 1, 2, 3, 5):
        scheduler.set_timesteps(6)
        x = torch.ones(1, 4, 2, 2)
        for t in scheduler.timesteps[:calls]:
            x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
        assert list(changes.of_scheduler(scheduler)) == [], calls
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()
    scheduler.alphas_cumprod[-1] = 0
    assert "scheduler.alphas_cumprod differs from the scheduler's config" in changes.of_scheduler(scheduler)
