"""A checkpoint's description, and what it should run on here.

path or hub id -> Checkpoint (files and raw configs) -> Spec (configs and family) -> Networks (weights loaded)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastldm import engine, relatives, text, weights
from fastldm.config import Family, TextConfig, TinyVAEConfig, UNetConfig, VAEConfig, recognise
from fastldm.errors import InputError
from fastldm.models.clip import CLIPText
from fastldm.models.unet import UNet
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder
from fastldm.prepare import Prepared, prepare

if TYPE_CHECKING:
    from fastldm.export.spec import Axis

logger = logging.getLogger("fastldm")

DEFAULT_MODEL = Path(__file__).parent / "assets" / "default"


@dataclass(frozen=True)
class Spec:
    """What a model is, known before any of its weights are read."""

    checkpoint: weights.Checkpoint
    unet: UNetConfig
    vae: VAEConfig | TinyVAEConfig
    text: tuple[TextConfig, ...]
    family: Family

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained at."""
        height, width = self.unet.sample_size
        return width * self.vae.factor, height * self.vae.factor

    @property
    def parameters(self) -> int:
        """Numbers in all networks together."""
        with torch.device("meta"):
            networks: list[torch.nn.Module] = [UNet(self.unet), autoencoder(self.vae), *map(CLIPText, self.text)]
        return sum(p.numel() for network in networks for p in network.parameters())


def describe(
    path_or_id: str | os.PathLike[str] = "default",
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
) -> Spec:
    """What a diffusers folder, a hub id, a single-file checkpoint, an exported bundle or "default" holds. Loads no
    weights.

    Raises CheckpointError for anything that is not a model that fastldm can run, naming what it is instead.
    """
    if engine.is_bundle(path_or_id):
        return engine.describe(path_or_id)
    given = DEFAULT_MODEL if str(path_or_id) == "default" else path_or_id
    checkpoint = weights.open_checkpoint(
        given,
        variant=variant,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
        prediction_type=prediction_type,
    )
    return spec_of(checkpoint)


def spec_of(checkpoint: weights.Checkpoint) -> Spec:
    """The networks' descriptions from a checkpoint's raw config files."""
    parts = checkpoint.components
    vae = TinyVAEConfig if parts["vae"].config.get("_class_name") == "AutoencoderTiny" else VAEConfig
    source = f"{checkpoint.source}: unet"
    relatives.check_unet_keys(parts["unet"].config, source)
    unet = UNetConfig.from_dict(parts["unet"].config, source)
    autoencoder_config = vae.from_dict(parts["vae"].config, f"{checkpoint.source}: vae")
    relatives.check_channels(unet.in_channels, source, autoencoder_config.latent_channels)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    return Spec(
        checkpoint,
        unet,
        autoencoder_config,
        tuple(TextConfig.from_dict(parts[name].config, f"{checkpoint.source}: {name}") for name in encoders),
        recognise(unet, checkpoint.scheduler),
    )


def autoencoder(config: VAEConfig | TinyVAEConfig) -> AutoencoderKL | TinyAutoencoder:
    """The network for a config, its weights not set."""
    return TinyAutoencoder(config) if isinstance(config, TinyVAEConfig) else AutoencoderKL(config)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or a GPU where there is one, else the CPU. InputError where it does not exist here."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = torch.empty(0, device=chosen).device  # "cuda" is the current one of several, by its index
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"device {str(device)!r} cannot be used here ({reason}): try cpu, or see `fastldm doctor`"
        ) from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or what is fastest on `device`.

    On a GPU that is float16: bfloat16's rate and eight times finer. On a CPU it is bfloat16 where the processor
    multiplies it natively, else float32. float16 asked for on a CPU is replaced, with a warning: code written for a
    GPU runs as it is.
    """
    if isinstance(dtype, str):
        names = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.float16, torch.bfloat16)}
        if dtype.removeprefix("torch.") not in names:
            raise InputError(f"dtype is {dtype!r}: expected float32, float16 or bfloat16")
        dtype = names[dtype.removeprefix("torch.")]
    if device.type != "cpu":
        return dtype or torch.float16
    best = torch.bfloat16 if _native_bfloat16() else torch.float32
    if dtype == torch.float16:
        logger.warning("float16 is slow or missing on CPUs: running in %s", str(best).removeprefix("torch."))
        return best
    return dtype or best


def _native_bfloat16() -> bool:
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


@dataclass(frozen=True)
class Networks:
    """A model, loaded and prepared: what a pipeline runs."""

    unet: engine.Denoiser
    vae: engine.Autoencoder
    text_stages: tuple[text.TextStage, ...]
    prepared: Prepared
    device: torch.device
    dtype: torch.dtype
    """Of what goes into the U-Net and the autoencoder, and comes out."""
    backend: str = "torch"
    """What runs them: "torch" or one of `engine.BACKENDS`."""
    precision: str | None = None
    """What they compute in, where that is not `dtype`."""
    latents: Sequence[tuple[Axis, Axis]] = ()
    """The heights and widths of latents that they run with, each range of them, where those are limited."""


def load(
    spec: Spec, fill: Callable[[torch.nn.Module, str], Any], sharing: Mapping[str, torch.nn.Module] | None = None
) -> Networks:
    """The networks of a spec; `fill(module on meta, component name)` returns the module with its weights.

    sharing: modules whose weights those are, if they go on being used.
    """
    names = [name for name in ("text_encoder", "text_encoder_2") if name in spec.checkpoint.components]
    with torch.device("meta"):
        unet, vae, encoders = UNet(spec.unet), autoencoder(spec.vae), [CLIPText(one) for one in spec.text]
    stages = tuple(
        text.TextStage(spec.checkpoint.tokenizer(name.replace("text_encoder", "tokenizer")), fill(encoder, name))
        for name, encoder in zip(names, encoders, strict=True)
    )
    unet, vae = fill(unet, "unet"), fill(vae, "vae")
    networks = {"unet": unet, "vae": vae} | {name: stage.model for name, stage in zip(names, stages, strict=True)}
    weight = unet.conv_in.weight
    prepared = prepare(networks, (sharing or {}).values())
    return Networks(unet, vae, stages, prepared, device=weight.device, dtype=weight.dtype)
