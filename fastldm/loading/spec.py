"""From a path or id to the description of a model, and from that to a loaded model.

path or hub id -> Checkpoint (files and raw configs) -> Spec (configs and family) -> LoadedModel (weights loaded)

Over 500 lines, for every kind of component is read here, and nowhere else. Whether they fit each other is in fit.py.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastldm import checks
from fastldm.checks import show
from fastldm.conditioning import text
from fastldm.conditioning.image_encoder import ImageEncoder, Preprocessing
from fastldm.conditioning.prior import PriorConfigs, TextPrior
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import relatives
from fastldm.loading.checkpoint import Checkpoint
from fastldm.loading.fit import check_fit, check_noise_levels
from fastldm.loading.formats import (
    INDEX,
    NOISING,
    PREPROCESSOR,
    PRIOR_SCHEDULER,
    PRIOR_TOKENIZER,
    SUPER_RESOLUTION_SCHEDULER,
)
from fastldm.loading.image_encoder import preprocessing_of
from fastldm.loading.open_checkpoint import open_checkpoint
from fastldm.loading.prepare import Prepared, prepare
from fastldm.models.clip import CLIPText
from fastldm.models.clip_vision import CLIPVision, Normalizer, VisionConfig
from fastldm.models.config import (
    AUTOENCODERS,
    PIXEL_SPACE,
    AutoencoderConfig,
    PixelResidualConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from fastldm.models.families import (
    DDIM_PIPELINE,
    GLIDE_PIPELINES,
    IF_PIPELINES,
    IMAGE_ENCODER,
    IMAGE_NORMALIZER,
    KANDINSKY_PIPELINES,
    KANDINSKY_PRIOR_PIPELINE,
    KARLO_PIPELINES,
    LATENT_UPSCALE_PIPELINE,
    PRIOR,
    PRIOR_TEXT_ENCODER,
    SUPER_RESOLUTION,
    SUPER_RESOLUTION_FAMILY,
    SUPER_RESOLUTION_PIPELINE,
    TEXT_ENCODERS,
    TEXT_PROJECTION,
    UPSCALE_PIPELINE,
    Family,
    encoder_names,
    recognise,
)
from fastldm.models.interfaces import Autoencoder, Denoiser
from fastldm.models.prior import Prior, PriorConfig
from fastldm.models.t5 import T5_WINDOW, T5Config
from fastldm.models.text_encoders import text_config, text_encoder
from fastldm.models.text_projection import TextProjection, TextProjectionConfig
from fastldm.models.unet import UNet
from fastldm.models.unet_config import VECTOR_TOKENS
from fastldm.models.vae import AutoencoderKL, PixelResidual, TinyAutoencoder
from fastldm.reading import Field, Flag, Integer, Maybe, check_path, read_fields
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.scheduler_config import SET_BY_PIPELINES, read_scheduler
from fastldm.sizes import Axis
from fastldm.system import ASSETS

logger = logging.getLogger("fastldm")

DEFAULT_MODEL = ASSETS / "default"
UPSCALER = ASSETS / "upscaler"
"""What enlarges the default model's pictures."""


@dataclass(frozen=True)
class PriorSpec:
    """The configs of unCLIP's or Kandinsky's prior, of what it reads, and its own sampling schedule."""

    model: PriorConfig
    text: TextConfig | None  # None: the model's own
    schedule: ScheduleConfig
    vision: VisionConfig | None = None
    """Of the image encoder of Kandinsky's."""

    @property
    def networks(self) -> PriorConfigs:
        """What they are of."""
        return (self.model, *(each for each in (self.text, self.vision) if each is not None))


@dataclass(frozen=True)
class Spec:
    """The configs of a model's networks and its sampling schedule, read before any weights."""

    checkpoint: Checkpoint
    unet: UNetConfig
    vae: AutoencoderConfig
    text: tuple[TextConfig, ...]
    family: Family
    schedule: ScheduleConfig
    low_res: ScheduleConfig | None = None
    """The schedule of the noise that is added to a small picture that is read, or to the vector of a picture."""
    max_noise_level: int = 0
    """The highest level of that noise."""
    vision: VisionConfig | None = None
    """Of a model that reads a picture, in place of a prompt or beside it."""
    preprocessing: Preprocessing | None = None
    prior: PriorSpec | None = None
    """Of unCLIP that makes the vector of a picture of a text."""
    projection: TextProjectionConfig | None = None
    """Of unCLIP's decoder, what makes of texts and vectors what it reads."""
    follows: tuple[Spec, ...] = ()
    """The networks of the same checkpoint that go on with the pictures, one after the other: the first enlarges them,
    and each of the rest takes the last step of the one before."""
    component: str = "unet"
    """Which component of the checkpoint its U-Net is."""

    @property
    def encoders(self) -> tuple[TextConfig | VisionConfig, ...]:
        """What makes the conditioning."""
        return (*self.text, *([self.vision] if self.vision else []))

    @property
    def conditioned(self) -> bool:
        """Whether a request says what images show, by texts, pictures or their vectors: there is guidance by it."""
        return bool(self.encoders) or self.unet.reads_image_embeds or self.unet.pools_text

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """The components that its text encoders are."""
        return encoder_names(self.text) if self.projection is None else TEXT_ENCODERS[: len(self.text)]

    @property
    def beside(self) -> tuple[PriorConfig | TextConfig | VisionConfig | TextProjectionConfig, ...]:
        """The networks beside U-Net, autoencoder and encoders, which run once a request."""
        networks = self.prior.networks if self.prior else ()
        return networks if self.projection is None else (*networks, self.projection)

    @property
    def not_exported(self) -> str | None:
        """What no bundle holds of it, for errors."""
        if self.projection is not None:
            return "a text projection makes what its U-Net reads, and is not exported"
        if any(type(text) not in (TextConfig, T5Config) for text in self.text):
            return "its text encoder is not one that a bundle holds: run it on PyTorch"
        return None

    @property
    def enlarges(self) -> int:
        """How many times as wide the image is as the picture that is read; 1 of models that enlarge none."""
        if isinstance(self.vae, PixelResidualConfig):
            return self.vae.upscale_factor
        if self.unet.enlarges_latents:
            return 2
        return self.vae.factor if self.unet.upscales else 1

    def enlarged(self, size: tuple[int, int], own: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of what it makes, as an upscaler, of an image of `size`, by a model whose own size is
        `own`."""
        times = min(self.default_size) / min(own) if self.unet.resizes else self.enlarges
        return int(size[0] * times), int(size[1] * times)

    @property
    def picture_multiple(self) -> int:
        """What a small picture's sides are made a multiple of, in pixels, before it is read: as in diffusers 32 of
        latent diffusion's super-resolution; 1 where the autoencoder alone asks for one."""
        return 32 if self.family.name == "ldm-super-resolution" else 1

    @property
    def fits_pictures(self) -> bool:
        """Whether a picture to start from is resized so that its shorter side is as long as the model's own, as with
        diffusers' pipelines of DeepFloyd IF, which makes pixels and no latents."""
        return self.unet.pools_text

    @property
    def window(self) -> int:
        """Tokens of a text, with those that Karlo makes of a vector; 1 of models that read a picture in its place, or
        none; 32 that Kandinsky makes of one."""
        if self.unet.reads_image_embeds:
            return VECTOR_TOKENS
        if self.unet.pools_text:  # with or without an encoder of its own
            return T5_WINDOW
        of_vector = 0 if self.projection is None else self.projection.tokens
        return of_vector + self.text[0].max_position if self.text else 1

    @property
    def own_size(self) -> tuple[int, int]:
        """Width and height in pixels that its U-Net was trained with."""
        height, width = self.unet.sample_size
        return width * self.vae.factor, height * self.vae.factor

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained with, of what follows if anything does."""
        return self.follows[-1].own_size if self.follows else self.own_size

    @property
    def parameters(self) -> int:
        """Total number of parameters of all networks."""
        with torch.device("meta"):
            networks: list[torch.nn.Module] = [UNet(self.unet), autoencoder(self.vae), *map(text_encoder, self.text)]
            networks += [CLIPVision(self.vision)] if self.vision else []
            networks += [Normalizer((self.unet.class_input_dim or 0) // 2)] if self.unet.needs_vector else []
            networks += [built(config) for config in self.beside]
        own = sum(p.numel() for network in networks for p in network.parameters())
        return own + sum(each.parameters for each in self.follows)


def enlarged_size(name: str, spec: Spec) -> tuple[int, int] | None:
    """(width, height) that UPSCALER makes of the pictures of a model, by its name; None where it enlarges none."""
    if name != "default" or spec.family.name != "small" or not UPSCALER.is_dir():
        return None
    (width, height), times = spec.default_size, describe(UPSCALER).enlarges
    return width * times, height * times


def describe(
    path_or_id: str | os.PathLike[str] = "default",
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
    text_encoder: bool | None = True,
) -> Spec:
    """Describe a diffusers folder, a hub id, a single-file checkpoint, "default" or "upscaler". Loads no weights.
    text_encoder: None leaves out that of DeepFloyd IF's super-resolution, which then reads `prompt_embeds`, or the text
    of what it is the upscaler of.

    Raises CheckpointError for anything that is not a model fastldm can run, saying what it is instead.
    """
    options: dict[str, Any] = {
        "variant": variant,
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "allow_pickle": allow_pickle,
        "prediction_type": prediction_type,
        "text_encoder": text_encoder,
    }
    check_options(options)
    path = DEFAULT_MODEL if str(path_or_id) == "default" else path_or_id
    if str(path_or_id) == UPSCALER.name and UPSCALER.is_dir() and not Path(path_or_id).exists():
        path = UPSCALER
    return spec_of(open_checkpoint(path, **options))


OPTIONS = ("variant", "revision", "cache_dir", "local_files_only", "allow_pickle", "prediction_type", "text_encoder")
"""Names of the options of `describe`."""


def check_options(options: Mapping[str, Any]) -> None:
    """InputError for an option of `describe` that is of the wrong type or names nothing."""
    for name, value in options.items():
        if name in ("local_files_only", "allow_pickle"):
            checks.flag(name, value)
        elif value is None:
            continue
        elif name == "text_encoder":
            if value is not True:
                raise InputError(f"text_encoder is {show(value)}: expected None, which leaves it out")
        elif name == "cache_dir":
            check_path(value, name)
        elif not (isinstance(value, str) and 0 < len(value) < 256 and value.isprintable()):
            raise InputError(f"{name} is {show(value)}: expected a name, or None")


_INDEX = {
    "force_zeros_for_empty_prompt": Field(Flag(), False),
    "is_cosxl_edit": Field(Maybe(Flag()), False),
    "requires_aesthetics_score": Field(Flag(), False),
    "max_noise_level": Field(Integer(0, 10**5), 350),
}


def spec_of(checkpoint: Checkpoint) -> Spec:
    """Read a checkpoint's raw configs and check that they fit each other.

    CheckpointError for what is not implemented, for invalid values, and for components that do not fit each other.
    """
    index = read_fields(checkpoint.index, _INDEX, f"{checkpoint.source}: {INDEX}")
    pipeline = None if checkpoint.loaded else checkpoint.index.get("_class_name")
    named = checkpoint.index.get("_class_name")
    scheduler = checkpoint.scheduler
    if named == DDIM_PIPELINE:  # which makes a DDIMScheduler of any
        scheduler = {**scheduler, "_class_name": "DDIMScheduler"}
    if named == LATENT_UPSCALE_PIPELINE:
        scheduler = _preconditioned(scheduler, checkpoint.config_source("scheduler"))
    schedule = read_scheduler(scheduler, pipeline, checkpoint.config_source("scheduler"))

    if named == KANDINSKY_PRIOR_PIPELINE:
        raise CheckpointError(
            f"{checkpoint.source} is a {named}, which makes vectors and no picture: load it with fastldm.KandinskyPrior"
        )
    configs = {name: component.config for name, component in checkpoint.components.items()}
    sources = {name: checkpoint.config_source(name) for name in configs}
    relatives.check_unet_keys(configs["unet"], sources["unet"], named)
    unet = UNetConfig.from_dict(_with_size(configs["unet"], pipeline), sources["unet"])
    relatives.check_standard(unet, sources["unet"], named)
    vae: AutoencoderConfig = PIXEL_SPACE
    if "vae" in configs:
        vae_class = AUTOENCODERS.get(str(configs["vae"].get("_class_name")), VAEConfig)
        vae = vae_class.from_dict(_with_scale(configs["vae"], named, pipeline, sources["vae"]), sources["vae"])
    if named in KANDINSKY_PIPELINES and isinstance(vae, VAEConfig):
        vae = replace(vae, takes_nearest=False)
    relatives.check_channels(
        unet.in_channels,
        sources["unet"],
        vae.latent_channels,
        named,
        needs_class=unet.needs_class,
        reads_text=unet.reads_text,
    )
    low_res = None
    if checkpoint.low_res_scheduler is not None:
        source = checkpoint.config_source(NOISING[IMAGE_NORMALIZER in configs or "vae" not in configs])
        low_res = read_scheduler(checkpoint.low_res_scheduler, None, source)
    check_noise_levels(unet, low_res, index["max_noise_level"], checkpoint.source)
    names = [name for name in TEXT_ENCODERS if name in configs]
    text = tuple(text_config(configs[name], sources[name]) for name in names)
    vision = preprocessing = None
    if IMAGE_ENCODER in configs:
        vision = VisionConfig.from_dict(configs[IMAGE_ENCODER], sources[IMAGE_ENCODER])
        preprocessing = preprocessing_of(vision, checkpoint.preprocessor, f"{checkpoint.source}: {PREPROCESSOR[1]}")
    projection = None
    if TEXT_PROJECTION in configs:
        projection = TextProjectionConfig.from_dict(configs[TEXT_PROJECTION], sources[TEXT_PROJECTION])
    prior = _prior_of(checkpoint, configs, sources) if PRIOR in configs else None
    # Of the next: as diffusers' schedulers recognise a variance that the network makes beside its prediction.
    learned = schedule.raw.get("variance_type") == "learned_range" or named in (*IF_PIPELINES, *KANDINSKY_PIPELINES)
    learns = unet.out_channels == 2 * vae.latent_channels and learned
    unet = replace(unet, added_ids=5 if index["requires_aesthetics_score"] else 6, learns_variance=learns)
    if named == LATENT_UPSCALE_PIPELINE:
        unet, text = replace(unet, enlarges_latents=True), tuple(replace(each, pools=True) for each in text)
    unet = replace(unet, adds_pooled=named in GLIDE_PIPELINES)
    check_fit(unet, vae, text, names, checkpoint.source, vision, None if prior is None else prior.model, projection)
    if schedule.variance_type == "learned_range" and not unet.learns_variance:
        raise CheckpointError(
            f"{checkpoint.config_source('scheduler')}: variance_type is 'learned_range', and the U-Net makes "
            f"{unet.out_channels} channels ('out_channels'): expected as many again, the variance"
        )
    family = recognise(unet, checkpoint.scheduler, named, reads_picture=vision is not None)
    highest = 0 if low_res is None else index["max_noise_level"]
    if (unet.needs_vector or unet.resizes) and low_res is not None:
        highest = low_res.num_train_timesteps - 1
    follows: tuple[Spec, ...] = ()
    if named in KARLO_PIPELINES:
        _need_unclip_scheduler(schedule, checkpoint.config_source("scheduler"), named)
        follows = _super_resolution(checkpoint)
    more: dict[str, Any] = {"projection": projection, "follows": follows}
    return Spec(checkpoint, unet, vae, text, family, schedule, low_res, highest, vision, preprocessing, prior, **more)


def _need_unclip_scheduler(schedule: ScheduleConfig, source: str, pipeline: Any) -> None:
    """CheckpointError for another, which diffusers' pipeline cannot step."""
    if schedule.class_name != "UnCLIPScheduler":
        raise CheckpointError(f"{source} is a {schedule.class_name}: a {pipeline} has an UnCLIPScheduler")


def _super_resolution(checkpoint: Checkpoint) -> tuple[Spec, ...]:
    """Those of SUPER_RESOLUTION. CheckpointError for what is not implemented, and where they do not fit each other."""
    raw, scheduler = checkpoint.super_res_scheduler or {}, checkpoint.config_source(SUPER_RESOLUTION_SCHEDULER)
    schedule = read_scheduler(raw, None, scheduler)
    _need_unclip_scheduler(schedule, scheduler, checkpoint.index.get("_class_name"))
    learns, latents = schedule.variance_type == "learned_range", PIXEL_SPACE.latent_channels
    expected = 2 * latents, latents * (1 + learns)
    own = replace(checkpoint, scheduler=raw, preprocessor={}, prior_scheduler=None)
    specs: list[Spec] = []
    for name in SUPER_RESOLUTION:
        source = checkpoint.config_source(name)
        unet = UNetConfig.from_dict(checkpoint.components[name].config, source)
        if (unet.in_channels, unet.out_channels) != expected or unet.reads_text:
            raise CheckpointError(
                f"{source} has {unet.in_channels} input channels ('in_channels') and makes {unet.out_channels} "
                f"('out_channels'): expected {expected[0]}, pixels and those of a small picture, and {expected[1]}, "
                f"with the scheduler's 'variance_type' {schedule.variance_type!r}"
            )
        if unet.needs_class or unet.class_embed_type is not None:
            raise CheckpointError(f"{source} reads a class, and enlarges a picture: nothing says of which class it is")
        unet = replace(unet, resizes_by="bicubic", learns_variance=learns)
        if specs and unet.sample_size != specs[0].unet.sample_size:
            raise CheckpointError(
                f"{source}: 'sample_size' is {unet.sample_size}, expected {specs[0].unet.sample_size}, that of "
                f"{specs[0].component}, whose last step it takes"
            )
        specs.append(Spec(own, unet, PIXEL_SPACE, (), SUPER_RESOLUTION_FAMILY, schedule, component=name))
    return tuple(specs)


def _prior_of(checkpoint: Checkpoint, configs: Mapping[str, Any], sources: Mapping[str, str]) -> PriorSpec:
    """CheckpointError for what is not implemented, and for parts that do not fit each other."""
    model = PriorConfig.from_dict(configs[PRIOR], sources[PRIOR])
    encoder = PRIOR_TEXT_ENCODER if PRIOR_TEXT_ENCODER in configs else TEXT_ENCODERS[0]
    text = TextConfig.from_dict(configs[encoder], sources[encoder])
    source, pipeline = checkpoint.config_source(PRIOR_SCHEDULER), checkpoint.index.get("_class_name")
    schedule = read_scheduler(checkpoint.prior_scheduler or {}, None, source)
    if pipeline in KARLO_PIPELINES:
        _need_unclip_scheduler(schedule, source, pipeline)
    elif schedule.class_name == "UnCLIPScheduler":
        raise CheckpointError(
            f"{source} is an UnCLIPScheduler, whose steps diffusers' StableUnCLIPPipeline takes for steps of one: give "
            "DDPMScheduler.from_config of it, as its documentation does"
        )
    fits = model.text_dim == text.hidden == model.out_dim and model.vector_dim == text.projection_dim
    if not fits or model.tokens != text.max_position:
        raise CheckpointError(
            f"{checkpoint.source}: the prior reads {model.tokens} tokens of {model.text_dim} channels and a vector of "
            f"{model.vector_dim}, and makes one of {model.out_dim}; {encoder} makes {text.max_position} of "
            f"{text.hidden}, and a vector of {text.projection_dim}: its components are not of one model"
        )
    return PriorSpec(model, text if encoder == PRIOR_TEXT_ENCODER else None, schedule)


def _with_scale(config: Mapping[str, Any], named: Any, pipeline: str | None, source: str) -> Mapping[str, Any]:
    """A VAE's config with scaling_factor as diffusers' upscalers set it, whatever the file has: latent diffusion's
    super-resolution has none, nor has Kandinsky. named: the pipeline's class, also where `pipeline` is None, as of a
    loaded one."""
    if named in (SUPER_RESOLUTION_PIPELINE, *KANDINSKY_PIPELINES):
        return {**config, "scaling_factor": 1.0}
    if pipeline != UPSCALE_PIPELINE or config.get("scaling_factor") == 0.08333:
        return config
    logger.info("%s: scaling_factor is 0.08333, as in diffusers' %s", source, pipeline)
    return {**config, "scaling_factor": 0.08333}


def _preconditioned(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The scheduler of the latent x2 upscaler. Its pipeline computes the denoised latents itself, as in table 1 of
    arXiv:2206.00364 with times log(sigma) / 4, and has the scheduler take them as they are: of the U-Net's output with
    the opposite sign, this is v-prediction."""
    name, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if name != "EulerDiscreteScheduler" or prediction not in ("sample", "original_sample"):
        raise CheckpointError(
            f"{source} is {show(name)} with 'prediction_type' {show(prediction)}: a {LATENT_UPSCALE_PIPELINE} has an "
            "EulerDiscreteScheduler with 'sample', for it computes denoised latents itself"
        )
    return {**config, "prediction_type": "v_prediction", "timestep_type": "continuous"}


def _with_size(config: Mapping[str, Any], pipeline: str | None) -> Mapping[str, Any]:
    """A U-Net's config with sample_size as diffusers' pipelines of SD 1 and 2 set it: early files have 32 for 64."""
    size, version = config.get("sample_size"), str(config.get("_diffusers_version", ""))
    if pipeline in SET_BY_PIPELINES and re.match(r"0\.[0-8]\.", version) and isinstance(size, int) and 0 < size < 64:
        return {**config, "sample_size": 64}
    return config


def autoencoder(config: AutoencoderConfig) -> AutoencoderKL | TinyAutoencoder | PixelResidual:
    """The autoencoder of a config, its weights not set."""
    if isinstance(config, PixelResidualConfig):
        return PixelResidual(config)
    return TinyAutoencoder(config) if isinstance(config, TinyVAEConfig) else AutoencoderKL(config)


def built(config: PriorConfig | TextConfig | VisionConfig | TextProjectionConfig) -> torch.nn.Module:
    """The network of one of `Spec.beside`, its weights not set."""
    if isinstance(config, TextConfig):
        return text_encoder(config)
    if isinstance(config, VisionConfig):
        return CLIPVision(config)
    return Prior(config) if isinstance(config, PriorConfig) else TextProjection(config)


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
    image_encoder: ImageEncoder | None = None
    """Of a model that reads a picture."""
    prior: TextPrior | None = None
    """Of one that makes the vector of a picture of a text."""
    projection: TextProjection | None = None
    """Of unCLIP's decoder."""
    follows: tuple[LoadedModel, ...] = ()
    """As of `Spec.follows`."""


def load(
    spec: Spec, fill: Callable[[torch.nn.Module, str], Any], sharing: Mapping[str, torch.nn.Module] | None = None
) -> LoadedModel:
    """Build the networks of a spec; `fill(module on meta, component name)` returns the module with its weights.

    sharing: by component name, the modules of an adopted pipeline, which keep sharing the weights.
    """
    names = spec.encoder_names
    with torch.device("meta"):
        unet, vae, encoders = UNet(spec.unet), autoencoder(spec.vae), [text_encoder(config) for config in spec.text]
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
    unet, vae = fill(unet, spec.component), vae if isinstance(vae, PixelResidual) else fill(vae, "vae")
    networks = {"unet": unet, "vae": vae} | {name: stage.model for name, stage in zip(names, stages, strict=True)}
    image_encoder = None
    if spec.vision is not None and spec.preprocessing is not None:
        with torch.device("meta"):
            vision = CLIPVision(spec.vision)
        networks[IMAGE_ENCODER] = vision = fill(vision, IMAGE_ENCODER)
        normalizer = None
        if spec.unet.needs_vector:
            with torch.device("meta"):
                normalizer = Normalizer(spec.vision.projection_dim)
            networks[IMAGE_NORMALIZER] = normalizer = fill(normalizer, IMAGE_NORMALIZER)
        image_encoder = ImageEncoder(vision, spec.preprocessing, spec.checkpoint.source, normalizer)
    prior = projection = None
    if spec.prior is not None:
        with torch.device("meta"):
            model = Prior(spec.prior.model)
        networks[PRIOR], stage, normalizer = fill(model, PRIOR), stages[0], None
        if spec.prior.text is not None:
            with torch.device("meta"):
                encoder, normalizer = CLIPText(spec.prior.text), Normalizer(spec.prior.model.out_dim)
            networks[PRIOR_TEXT_ENCODER] = fill(encoder, PRIOR_TEXT_ENCODER)
            networks[IMAGE_NORMALIZER] = normalizer = fill(normalizer, IMAGE_NORMALIZER)
            stage = text.TextStage(spec.checkpoint.tokenizer(PRIOR_TOKENIZER), networks[PRIOR_TEXT_ENCODER])
        prior = TextPrior(stage, networks[PRIOR], spec.prior.schedule, normalizer)
    if spec.projection is not None:
        with torch.device("meta"):
            projection = TextProjection(spec.projection)
        networks[TEXT_PROJECTION] = projection = fill(projection, TEXT_PROJECTION)
    weight = unet.conv_in.weight
    prepared = prepare(networks, (sharing or {}).values())
    to: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    more: dict[str, Any] = {"image_encoder": image_encoder, "prior": prior, "projection": projection}
    more["follows"] = tuple(load(each, fill, sharing) for each in spec.follows)
    return LoadedModel(unet, vae, stages, prepared, **to, **more)
