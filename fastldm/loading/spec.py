"""From a path or id to the description of a model, and from that to a loaded model.

path or hub id -> Checkpoint (files and raw configs) -> Spec (configs and family) -> LoadedModel (weights loaded)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastldm import checks
from fastldm.checks import show
from fastldm.conditioning import text
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import relatives
from fastldm.loading.checkpoint import Checkpoint
from fastldm.loading.formats import INDEX
from fastldm.loading.open_checkpoint import open_checkpoint
from fastldm.loading.prepare import Prepared, prepare
from fastldm.models.clip import CLIPText
from fastldm.models.config import TextConfig, TinyVAEConfig, UNetConfig, VAEConfig
from fastldm.models.families import TEXT_ENCODERS, Family, recognise
from fastldm.models.interfaces import Autoencoder, Denoiser
from fastldm.models.unet import UNet
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder
from fastldm.reading import Field, Flag, Maybe, check_path, read_fields
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.scheduler_config import SET_BY_PIPELINES, read_scheduler
from fastldm.sizes import Axis
from fastldm.system import ASSETS

DEFAULT_MODEL = ASSETS / "default"


@dataclass(frozen=True)
class Spec:
    """The configs of a model's networks and its sampling schedule, read before any weights."""

    checkpoint: Checkpoint
    unet: UNetConfig
    vae: VAEConfig | TinyVAEConfig
    text: tuple[TextConfig, ...]
    family: Family
    schedule: ScheduleConfig

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained with."""
        height, width = self.unet.sample_size
        return width * self.vae.factor, height * self.vae.factor

    @property
    def parameters(self) -> int:
        """Total number of parameters of all networks."""
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
    """Describe a diffusers folder, a hub id, a single-file checkpoint or "default". Loads no weights.

    Raises CheckpointError for anything that is not a model fastldm can run, saying what it is instead.
    """
    options: dict[str, Any] = {
        "variant": variant,
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "allow_pickle": allow_pickle,
        "prediction_type": prediction_type,
    }
    check_options(options)
    path = DEFAULT_MODEL if str(path_or_id) == "default" else path_or_id
    return spec_of(open_checkpoint(path, **options))


OPTIONS = ("variant", "revision", "cache_dir", "local_files_only", "allow_pickle", "prediction_type")
"""Names of the options of `describe`."""


def check_options(options: Mapping[str, Any]) -> None:
    """InputError for an option of `describe` that is of the wrong type or names nothing."""
    for name, value in options.items():
        if name in ("local_files_only", "allow_pickle"):
            checks.flag(name, value)
        elif value is None:
            continue
        elif name == "cache_dir":
            check_path(value, name)
        elif not (isinstance(value, str) and 0 < len(value) < 256 and value.isprintable()):
            raise InputError(f"{name} is {show(value)}: expected a name, or None")


_INDEX = {
    "force_zeros_for_empty_prompt": Field(Flag(), False),
    "is_cosxl_edit": Field(Maybe(Flag()), False),
    "requires_aesthetics_score": Field(Flag(), False),
}


def spec_of(checkpoint: Checkpoint) -> Spec:
    """Read a checkpoint's raw configs and check that they fit each other.

    CheckpointError for what is not implemented, for invalid values, and for components that do not fit each other.
    """
    index = read_fields(checkpoint.index, _INDEX, f"{checkpoint.source}: {INDEX}")
    pipeline = None if checkpoint.loaded else checkpoint.index.get("_class_name")
    schedule = read_scheduler(checkpoint.scheduler, pipeline, checkpoint.config_source("scheduler"))

    configs = {name: component.config for name, component in checkpoint.components.items()}
    sources = {name: checkpoint.config_source(name) for name in configs}
    relatives.check_unet_keys(configs["unet"], sources["unet"])
    unet = UNetConfig.from_dict(_with_size(configs["unet"], pipeline), sources["unet"])
    vae_class = TinyVAEConfig if configs["vae"].get("_class_name") == "AutoencoderTiny" else VAEConfig
    vae = vae_class.from_dict(configs["vae"], sources["vae"])
    relatives.check_channels(
        unet.in_channels, sources["unet"], vae.latent_channels, checkpoint.index.get("_class_name")
    )
    names = [name for name in TEXT_ENCODERS if name in configs]
    text = tuple(TextConfig.from_dict(configs[name], sources[name]) for name in names)
    unet = replace(unet, added_ids=5 if index["requires_aesthetics_score"] else 6)
    _check_fit(unet, vae, text, names, checkpoint.source)
    return Spec(checkpoint, unet, vae, text, recognise(unet, checkpoint.scheduler), schedule)


def _with_size(config: Mapping[str, Any], pipeline: str | None) -> Mapping[str, Any]:
    """A U-Net's config with sample_size as diffusers' pipelines of SD 1 and 2 set it: early files have 32 for 64."""
    size, version = config.get("sample_size"), str(config.get("_diffusers_version", ""))
    if pipeline in SET_BY_PIPELINES and re.match(r"0\.[0-8]\.", version) and isinstance(size, int) and 0 < size < 64:
        return {**config, "sample_size": 64}
    return config


def _check_fit(
    unet: UNetConfig, vae: VAEConfig | TinyVAEConfig, text: Sequence[TextConfig], names: Sequence[str], source: str
) -> None:
    """CheckpointError if components belong to different models: each would load, but not work with the others."""

    def check(fits: bool, problem: str) -> None:
        if not fits:
            raise CheckpointError(f"{source}: {problem}: its components are not of one model")

    text_channels, latent_channels = [encoder.hidden for encoder in text], vae.latent_channels
    check(
        sum(text_channels) == unet.cross_attention_dim,
        f"the U-Net reads text of {unet.cross_attention_dim} channels ('cross_attention_dim'), "
        f"and {' + '.join(map(str, text_channels))} come from the text encoder{'s' * (len(text) > 1)} ('hidden_size')",
    )
    check(
        unet.out_channels == latent_channels,
        f"the U-Net makes {unet.out_channels} channels ('out_channels'), and the VAE's latents have {latent_channels} "
        "('latent_channels')",
    )
    check(
        vae.in_channels == vae.out_channels == 3,
        f"the VAE reads images of {vae.in_channels} channels ('in_channels') and makes {vae.out_channels} "
        "('out_channels'), expected 3",
    )
    pooled = text[-1].projection_dim
    if not unet.needs_added:
        check(
            len(text) == 1 and pooled is None,
            "the U-Net reads no pooled text ('addition_embed_type'), and a text encoder returns one",
        )
        return
    check(
        "text_encoder_2" in names, "the U-Net reads pooled text ('addition_embed_type'), and there is no text_encoder_2"
    )
    check(
        pooled is not None,
        "the U-Net reads pooled text ('addition_embed_type'), and text_encoder_2 is no CLIPTextModelWithProjection",
    )
    refiner = unet.added_ids == 5
    sizes = (unet.addition_input_dim - (pooled or 0)) / unet.addition_time_embed_dim
    check(
        sizes == unet.added_ids,
        f"the U-Net's added embedding has {unet.addition_input_dim} channels "
        f"('projection_class_embeddings_input_dim'), expected {pooled} of pooled text ('projection_dim') and "
        f"{unet.added_ids} x {unet.addition_time_embed_dim} of sizes ('addition_time_embed_dim')"
        f"{', as of the XL refiner, which requires_aesthetics_score' * refiner}"
        f"{', not 5 x as in the XL refiner' * (sizes == 5)}",
    )


def autoencoder(config: VAEConfig | TinyVAEConfig) -> AutoencoderKL | TinyAutoencoder:
    """The autoencoder of a config, its weights not set."""
    return TinyAutoencoder(config) if isinstance(config, TinyVAEConfig) else AutoencoderKL(config)


@dataclass(frozen=True)
class LoadedModel:
    """A model's networks, loaded and prepared to run."""

    unet: Denoiser
    vae: Autoencoder
    text_stages: tuple[text.TextStage, ...]
    prepared: Prepared
    device: torch.device
    dtype: torch.dtype
    """The dtype of the inputs and outputs of the U-Net and the autoencoder."""
    backend: str = "torch"
    """What runs the networks: "torch" or a name in export.backends.BACKENDS."""
    precision: str | None = None
    """What they compute in, if that is not `dtype`."""
    latents: Sequence[tuple[Axis, Axis]] = ()
    """The allowed ranges of latent height and width; empty if every size is allowed."""
    packed: Mapping[str, Any] = field(default_factory=dict)
    """Of a bundle that takes adapters, where the networks read their factors: `adapters.packing.Packed` by name."""
    controls: Mapping[str, Any] = field(default_factory=dict)
    """Of a bundle, those that were exported with it: `adapters.control.Control` by name."""
    steps: Any = None
    """Where a bundle's backend takes several steps a call, its engine of them: see `export.graphs`."""


def load(
    spec: Spec, fill: Callable[[torch.nn.Module, str], Any], sharing: Mapping[str, torch.nn.Module] | None = None
) -> LoadedModel:
    """Build the networks of a spec; `fill(module on meta, component name)` returns the module with its weights.

    sharing: by component name, the modules of an adopted pipeline, which keep sharing the weights.
    """
    names = [name for name in TEXT_ENCODERS if name in spec.checkpoint.components]
    with torch.device("meta"):
        unet, vae, encoders = UNet(spec.unet), autoencoder(spec.vae), [CLIPText(config) for config in spec.text]
    tokenizers = [spec.checkpoint.tokenizer(name.replace("text_encoder", "tokenizer")) for name in names]
    for name, tokenizer, config in zip(names, tokenizers, spec.text, strict=True):
        if tokenizer.size > config.vocab:
            raise CheckpointError(
                f"{spec.checkpoint.source}: the tokenizer has ids up to {tokenizer.size - 1}, and {name} has "
                f"{config.vocab} embeddings ('vocab_size'): its components are not of one model"
            )
    stages = tuple(
        text.TextStage(tokenizer, fill(encoder, name))
        for name, encoder, tokenizer in zip(names, encoders, tokenizers, strict=True)
    )
    unet, vae = fill(unet, "unet"), fill(vae, "vae")
    networks = {"unet": unet, "vae": vae} | {name: stage.model for name, stage in zip(names, stages, strict=True)}
    weight = unet.conv_in.weight
    prepared = prepare(networks, (sharing or {}).values())
    return LoadedModel(unet, vae, stages, prepared, device=weight.device, dtype=weight.dtype)
