"""The networks of a bundle as drop-in replacements for PyTorch's, so that a pipeline works the same on engines.

Each class has the methods of the module that it replaces. A split U-Net caches the same as PyTorch's: keys and values
per prompt, time rows per schedule. A full U-Net computes both in each step: its "keys and values" are the text
embeddings, and its "rows" are all its other inputs, concatenated.

Over 500 lines, for what replaces the networks is one list, in the order in which `load` opens them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastldm import openmp, spans
from fastldm.adapters.control import Control
from fastldm.adapters.packing import DOWN, SCALE, UP, Packed
from fastldm.conditioning.image_encoder import ImageEncoder
from fastldm.conditioning.prior import TextPrior
from fastldm.conditioning.text import TextStage
from fastldm.device import choose_dtype
from fastldm.errors import BundleError, CheckpointError, InputError
from fastldm.export.backends import engines_of, takes_several_steps
from fastldm.export.bundle import Bundle, differing, identity
from fastldm.export.engine import Engine, is_bundle, open_engine
from fastldm.export.graphs import STEPS, WHOLE_PICTURE
from fastldm.export.reference import component
from fastldm.export.spec import Axis, NetworkSpec, named_controls
from fastldm.kernels.lora import Rows
from fastldm.loading import spec as loading
from fastldm.loading.formats import PRIOR_TOKENIZER
from fastldm.loading.prepare import prepare
from fastldm.models.clip_vision import VisionConfig
from fastldm.models.config import AutoencoderConfig, PixelResidualConfig, TextConfig, UNetConfig
from fastldm.models.controlnet import ControlNetConfig
from fastldm.models.embeddings import guidance_embedding
from fastldm.models.families import IMAGE_ENCODER, IMAGE_NORMALIZER, PRIOR, PRIOR_TEXT_ENCODER
from fastldm.models.interfaces import Autoencoder
from fastldm.models.layers import Beside
from fastldm.models.prior import PriorConfig
from fastldm.models.t2i_adapter import T2IAdapterConfig
from fastldm.models.unet import AddedConditions, Features, Residuals, add_rows
from fastldm.models.vae import Layer, PixelResidual


@dataclass(frozen=True)
class Source:
    """The model that a bundle was exported from: arguments of `loading.describe`."""

    model: str
    options: dict[str, Any]


def source(bundle: Bundle, *, check: bool = True) -> Source:
    """The model that a bundle was exported from. BundleError if it is not available; with `check`, which reads all of
    it, also if it has changed since."""
    model, folder = bundle.manifest["source"], bundle.folder
    if model is None:
        raise BundleError(f"{folder} was made of a model in memory, and PyTorch cannot read the bundle itself")
    if is_bundle(model):
        raise BundleError(f"{folder} was made of {model}, which is a bundle now, and PyTorch reads none")
    origin = Source(model, {key: value for key, value in bundle.manifest["options"].items() if value})
    try:
        spec = loading.describe(model, local_files_only=True, **origin.options)
    except (CheckpointError, InputError) as error:
        raise BundleError(
            f"{folder} was made of {model}, which is not here: PyTorch cannot read the bundle itself ({error})"
        ) from error
    differs = differing(bundle.manifest, identity(spec)) if check else []
    if differs:
        raise BundleError(
            f"{model} has changed since {folder} was made of it ({', '.join(differs)}): export it once more"
        )
    return origin


def latents(bundle: Bundle) -> list[tuple[Axis, Axis]]:
    """The allowed ranges of latent height and width."""
    return _latents([bundle.specs["unet_step" if bundle.manifest["split"] else "unet"]])


def _latents(specs: Sequence[NetworkSpec]) -> list[tuple[Axis, Axis]]:
    return [(spec.axes["height"], spec.axes["width"]) for spec in specs]


def precision(bundle: Bundle, backend: str, device: torch.device, dtype: str | torch.dtype | None) -> str:
    """The precision that a backend computes a bundle in: the requested one, by default the exported one, for OpenVINO
    the fastest on the device."""
    if engines_of(backend) == "openvino":
        fastest = dtype is None
        dtype = choose_dtype(dtype, device)
        if fastest and dtype == torch.bfloat16 and find_spec("openvino") is not None:
            from fastldm.export.openvino import has_bfloat16

            dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    return str(dtype or bundle.manifest["dtype"]).removeprefix("torch.")


def precision_of(network: str, computed: str) -> str:
    """The precision of one network, if the bundle is computed in `computed`. OpenVINO computes sinusoids in bfloat16
    too, where an angle of 1,000 has no fractional digits: time_rows, which runs once per schedule, stays float32, and
    with it a prior's step, a normalizer and the graph of a whole picture."""
    in_float32 = network.endswith("time_rows") or network in ("prior_step", IMAGE_NORMALIZER, WHOLE_PICTURE)
    return "float32" if in_float32 and computed == "bfloat16" else computed


def load(
    bundle: Bundle,
    backend: str,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    opened: Callable[[str], Engine] | None = None,
) -> loading.LoadedModel:
    """Load the networks of a bundle on a backend.

    dtype: to compute in, by default the fastest; only OpenVINO has a choice, float32 or bfloat16.
    opened: returns the engine of a network, in place of the backend.

    The image encoder and controls are opened on first use: most pipelines never need them.
    """
    if bundle.quantized and backend == "tensorrt":
        raise InputError(
            f"{bundle.folder} is in eight bits, which TensorRT has others of: export it without --quantize"
        )
    spec, computed = bundle.model, precision(bundle, backend, device, dtype)
    options: dict[str, Any] = {"device": device, "threads": openmp.threads()}

    stored = getattr(torch, bundle.manifest["dtype"])
    packed = {name: Packed(layout, stored, device) for name, layout in bundle.layouts.items()}

    def engine(name: str) -> Engine:
        own = {**options, "precision": precision_of(name, computed), "hashes": bundle.hashes(name)}
        return open_engine(backend, bundle.path(name), bundle.spec(name), **own)

    def network(name: str) -> Network:
        if opened is not None:
            return Network(opened(name), packed.get(name))
        if steps is not None and name == "unet_step":  # the graph holds it
            return Network(LaterEngine(bundle.specs[name], lambda: engine(name)))
        return Network(engine(name), packed.get(name))

    steps = None
    if takes_several_steps(backend):
        if not bundle.graphs:
            raise InputError(f"{bundle.folder} has no graph for {backend}: export it with --whole-picture")
        steps = engine(STEPS)

    names = [name for name in ("text_encoder", "text_encoder_2") if name in bundle.specs]
    stages = tuple(
        TextStage(
            spec.checkpoint.tokenizer(name.replace("text_encoder", "tokenizer")),
            ExportedText(config, device, network(name)),
        )
        for name, config in zip(names, spec.text, strict=True)
    )
    if bundle.manifest["split"]:
        of_text = {name: network(name) for name in ("text_kv", "text_time") if name in bundle.specs}
        unet: ExportedUNet = SplitUNet(spec.unet, network("time_rows"), network("unet_step"), **of_text)
    else:
        unet = FullUNet(spec.unet, network("unet"))
    vae: Autoencoder
    if isinstance(spec.vae, PixelResidualConfig):
        vae = PixelResidual(spec.vae)
    else:
        vae = ExportedAutoencoder(spec.vae, network("vae_decoder"), lambda: network("vae_encoder"))
    image_encoder = None
    if spec.vision is not None and spec.preprocessing is not None:
        normalizer: Any = ExportedNormalizer(network(IMAGE_NORMALIZER)) if IMAGE_NORMALIZER in bundle.specs else None
        vision: Any = ExportedVision(spec.vision, network(IMAGE_ENCODER))
        image_encoder = ImageEncoder(vision, spec.preprocessing, str(bundle.folder), normalizer)
    prior = None
    if spec.prior is not None and spec.prior.text is not None:
        text = ExportedText(spec.prior.text, device, network(PRIOR_TEXT_ENCODER))
        of_prior = {part: network(f"{PRIOR}_{part}") for part in ("kv", "step", "vectors")}
        model = ExportedPrior(spec.prior.model, device, stored, of_prior)
        stage = TextStage(spec.checkpoint.tokenizer(PRIOR_TOKENIZER), text)
        prior = TextPrior(stage, model, spec.prior.schedule, ExportedNormalizer(network(IMAGE_NORMALIZER)))
    controls = {}
    entries = bundle.manifest.get("controls", ())
    for entry, (name, config) in zip(entries, named_controls(bundle.controls).items(), strict=True):
        parts = {part: functools.partial(network, part) for part in bundle.specs if component(part) == name}
        kind = ExportedControlNet if isinstance(config, ControlNetConfig) else ExportedT2IAdapter
        exported: Any = kind(config, {part.removeprefix(f"{name}_"): opening for part, opening in parts.items()})
        controls[entry["name"]] = Control(entry["name"], str(bundle.folder), entry["short_hash"], exported)
    return loading.LoadedModel(
        unet,
        vae,
        stages,
        prepare({}),
        device=device,
        dtype=stored,
        backend=backend,
        precision=computed,
        latents=unet.latents,
        packed=packed,
        controls=controls,
        steps=steps,
        image_encoder=image_encoder,
        prior=prior,
    )


class LaterEngine:
    """An engine that is opened when it is first needed."""

    def __init__(self, spec: NetworkSpec, opening: Callable[[], Engine]) -> None:
        self.specs, self._opening = (spec,), opening

    @cached_property
    def _engine(self) -> Engine:
        return self._opening()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._engine(inputs)

    def close(self) -> None:
        if "_engine" in vars(self):
            self._engine.close()


class Network:
    """An engine that takes any number of rows, in several calls if needed. packed: the factors of adapters that it
    reads, which are not among the inputs of a call."""

    def __init__(self, engine: Engine, packed: Packed | None = None) -> None:
        self.specs, self._engine, self.packed = engine.specs, engine, packed
        self.inputs = tuple(port for port in self.specs[0].inputs if packed is None or port.name not in (DOWN, UP))
        self._max_rows = min(spec.inputs[0].axes[0].most for spec in self.specs)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """All inputs of the spec, each of R rows, in any floating point dtype -> all outputs, of R rows."""
        factors = {} if self.packed is None else {DOWN: self.packed.down, UP: self.packed.up}
        converted = {port.name: inputs[port.name].to(port.torch_dtype) for port in self.inputs}
        rows = next(iter(converted.values())).shape[0]
        chunks = [
            self._engine({name: x[start : start + self._max_rows] for name, x in converted.items()} | factors)
            for start in range(0, rows, self._max_rows)
        ]
        if len(chunks) == 1:
            return chunks[0]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def only(self, **inputs: Tensor) -> Tensor:
        """The output of a network with a single output."""
        (output,) = self(**inputs).values()
        return output


class ExportedText:
    """Replaces models.clip.CLIPText."""

    def __init__(self, config: TextConfig, device: torch.device, network: Network) -> None:
        self.config, self.device, self._network = config, device, network

    def __call__(self, input_ids: Tensor, skip: int = 0, final_norm: bool = True) -> tuple[Tensor, Tensor | None]:
        outputs = self._network(input_ids=input_ids)
        if not final_norm:
            name = f"hidden_states.{self.config.layers - skip}"
        else:
            name = f"clip_skip.{skip}" if skip else "last_hidden_state"
        return outputs[name], outputs.get("pooler_output" if self.config.pools else "text_embeds")


class ExportedVision:
    """Replaces models.clip_vision.CLIPVision, without hidden states."""

    def __init__(self, config: VisionConfig, network: Network) -> None:
        self.config, self._network = config, network

    def __call__(self, pixels: Tensor) -> Tensor:
        return self._network.only(pixel_values=pixels)


class ExportedNormalizer:
    """Replaces models.clip_vision.Normalizer."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, embeds: Tensor, noise: Tensor, rates: Tensor, level: Tensor) -> Tensor:
        return self._network.only(image_embeds=embeds, noise=noise, rates=rates, noise_level=level)


class ExportedPrior:
    """Replaces models.prior.Prior. The time is read in each step: its "rows" are the times."""

    def __init__(
        self, config: PriorConfig, device: torch.device, dtype: torch.dtype, networks: Mapping[str, Network]
    ) -> None:
        """networks: by the ends of their names."""
        self.config, self.device, self.dtype, self._networks = config, device, dtype, networks
        self.beside = Beside()

    def cross_kv(
        self, encoder_hidden_states: Tensor, proj_embedding: Tensor, text_len: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        count, tokens = encoder_hidden_states.shape[:2]
        visible = torch.full((count,), tokens, device=self.device) if text_len is None else text_len
        text = {"encoder_hidden_states": encoder_hidden_states, "proj_embedding": proj_embedding, "text_len": visible}
        outputs = self._networks["kv"](**text)
        return tuple(outputs[f"kv.{i}"] for i in range(len(outputs)))

    def time_rows(
        self,
        timesteps: Tensor,
        cross_kv: Sequence[Tensor],
        *,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        return timesteps[:, None]

    def step(
        self, model_input: Tensor, temb_row: Tensor, cross_kv: Sequence[Tensor], *, kv_len: Tensor | None = None
    ) -> Tensor:
        count, keys = cross_kv[0].shape[:2]
        visible = torch.full((count,), keys, device=self.device) if kv_len is None else kv_len
        text = {"kv_len": visible, **{f"kv.{i}": kv for i, kv in enumerate(cross_kv)}}
        made = self._networks["step"].only(hidden_states=model_input.flatten(1), timestep=temb_row[:, 0], **text)
        return made.view(*model_input.shape[:-1], -1)

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        return self._networks["vectors"].only(prior_latents=prior_latents)


class ExportedAutoencoder:
    """Replaces models.vae.AutoencoderKL or TinyAutoencoder, without tiled decoding."""

    def __init__(self, config: AutoencoderConfig, decoder: Network, open_encoder: Callable[[], Network]) -> None:
        self.config, self._decoder, self._open_encoder = config, decoder, open_encoder

    @cached_property
    def _encoder(self) -> Network:
        return self._open_encoder()

    def encode(self, x: Tensor) -> Tensor:
        outputs = self._encoder(sample=x)
        return outputs.get("latent_parameters", outputs["latent_sample"])

    def decode(self, z: Tensor) -> Tensor:
        with spans.span("VAE"):
            return self._decoder.only(latent_sample=z)

    def decoding(self) -> list[Layer]:
        return [self.decode]


class ExportedUNet(ABC):
    """Replaces models.unet.UNet."""

    def __init__(self, config: UNetConfig, step: Network, text: str) -> None:
        """step: the network that runs in each step. text: its input with the axis of tokens, if it reads a text."""
        self.config, self._step, self.beside = config, step, Beside()
        self._tokens = next((port.axes[1] for port in step.inputs if port.name == text and 1 in port.axes), None)
        self.latents = _latents(step.specs)

    @abstractmethod
    def time_rows(
        self,
        timesteps: Tensor,
        *,
        added: AddedConditions | None = None,
        guidance: Tensor | None = None,
        **conditions: Tensor | None,
    ) -> Tensor:
        """As `models.unet.UNet.time_rows`."""

    def cross_kv(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Of a text, or of vectors of pictures (B, D): as `models.unet.UNet.cross_kv`."""
        tokens = encoder_hidden_states.shape[1]
        if self._tokens is not None and tokens > self._tokens.most:
            raise InputError(
                f"the text has {tokens} tokens and this bundle takes {self._tokens.most}: shorten the prompt, or run "
                "on PyTorch"
            )
        return self._cross_kv(encoder_hidden_states)

    @abstractmethod
    def _cross_kv(self, hidden: Tensor) -> tuple[Tensor, ...]: ...

    def _inputs(
        self, model_input: Tensor, residuals: Sequence[Residuals], features: Sequence[Features]
    ) -> dict[str, Tensor]:
        """What the rows of the call under way have beside latents, time and text."""
        return {}

    @abstractmethod
    def _evaluate(self, inputs: Mapping[str, Tensor], kv: Sequence[Tensor]) -> Tensor:
        """inputs: sample, temb_row, and what `_inputs` gives."""

    def step(
        self,
        model_input: Tensor,
        temb_row: Tensor,
        cross_kv: Sequence[Tensor],
        *,
        kv_len: Tensor | None = None,
        residuals: Sequence[Residuals] = (),
        features: Sequence[Features] = (),
    ) -> Tensor:
        inputs = {"sample": model_input, "temb_row": temb_row, **self._inputs(model_input, residuals, features)}
        return _by_length(lambda x, kv: {"out": self._evaluate(x, kv)}, inputs, cross_kv, kv_len)["out"]


class SplitUNet(ExportedUNet):
    """The U-Net of a bundle that was exported with --split."""

    def __init__(
        self,
        config: UNetConfig,
        time_rows: Network,
        unet_step: Network,
        text_kv: Network | None = None,
        text_time: Network | None = None,
    ) -> None:
        """text_kv, text_time: of what reads a text, and of what reads it with the time."""
        super().__init__(config, unet_step, "kv.0")
        self._text_kv, self._text_time, self._time_rows = text_kv, text_time, time_rows
        self._zeros: dict[str, Tensor] = {}

    def time_rows(
        self,
        timesteps: Tensor,
        *,
        added: AddedConditions | None = None,
        guidance: Tensor | None = None,
        **conditions: Tensor | None,
    ) -> Tensor:
        text = conditions.pop("encoder_hidden_states", None)
        if text is not None and self._text_time is not None:  # of the rows of one step
            pooled = self._text_time.only(encoder_hidden_states=text)
            conditions["text_embedding"] = pooled.repeat(len(timesteps) // len(pooled), 1)
        conditions |= {"guidance": guidance, **({} if added is None else vars(added))}
        inputs = {name: x for name, x in conditions.items() if x is not None}
        return self._time_rows.only(timesteps=timesteps, **inputs)

    def _cross_kv(self, hidden: Tensor) -> tuple[Tensor, ...]:
        assert self._text_kv is not None
        (port,) = self._text_kv.inputs
        outputs = self._text_kv(**{port.name: hidden})
        return tuple(outputs[f"kv.{i}"] for i in range(len(outputs)))

    def _inputs(
        self, model_input: Tensor, residuals: Sequence[Residuals], features: Sequence[Features]
    ) -> dict[str, Tensor]:
        rows, _, height, width = model_input.shape
        inputs = self._scales(rows, model_input.device)
        spec, sizes = self._step.specs[0], {"batch": rows, "height": height, "width": width}
        for port in self._step.inputs:
            kind, _, number = port.name.partition(".")
            if kind not in ("residual", "feature"):
                continue
            shape, k = spec.shape(port, sizes), int(number)
            if not (residuals if kind == "residual" else features):  # rows without read zeros
                if port.name not in self._zeros or self._zeros[port.name].shape != shape:
                    self._zeros[port.name] = torch.zeros(shape, dtype=port.torch_dtype, device=model_input.device)
                inputs[port.name] = self._zeros[port.name]
                continue
            inputs[port.name] = total = torch.zeros(shape, dtype=port.torch_dtype, device=model_input.device)
            for own in residuals if kind == "residual" else ():
                weight = None if own.weights is None else own.weights[k]
                add_rows(total, (*own.skips, own.mid)[k], own.first or 0, weight)
            for levels, first in features if kind == "feature" else ():
                if k < len(levels):
                    add_rows(total, levels[k], first or 0)
        return inputs

    def _scales(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Of adapters."""
        packed = self._step.packed
        if packed is None:
            return {}
        scales = torch.zeros(rows, packed.rank)
        for start, stop, places in self.beside.rows.groups or () if isinstance(self.beside.rows, Rows) else ():
            for number, scale in places:
                scales[start:stop, number - 1] = scale  # number 0 is none
        return {SCALE: scales.to(device)}

    def _evaluate(self, inputs: Mapping[str, Tensor], kv: Sequence[Tensor]) -> Tensor:
        return self._step.only(**inputs, **{f"kv.{i}": x for i, x in enumerate(kv)})


class FullUNet(ExportedUNet):
    """The U-Net as one network, as in other exporters' bundles."""

    def __init__(self, config: UNetConfig, unet: Network) -> None:
        super().__init__(config, unet, "encoder_hidden_states")
        names = ("timestep", "class_labels", "timestep_cond", "time_ids", "text_embeds")
        texts = ("encoder_hidden_states", "image_embeds")
        self._text = next((port.name for port in unet.inputs if port.name in texts), None)
        widths = {port.name: port.shape[1:] for port in unet.inputs}
        self._numbers = [name for name in names if widths.get(name) == ()]  # one for each row
        self._row_columns = {name: int(*widths[name]) if widths[name] else 1 for name in names if name in widths}

    def time_rows(
        self,
        timesteps: Tensor,
        *,
        added: AddedConditions | None = None,
        guidance: Tensor | None = None,
        **conditions: Tensor | None,
    ) -> Tensor:
        columns = {name: x for name, x in conditions.items() if x is not None} | {"timestep": timesteps}
        if guidance is not None and self.config.time_cond_proj_dim is not None:
            columns["timestep_cond"] = guidance_embedding(guidance, self.config.time_cond_proj_dim)
        if added is not None:
            columns |= vars(added)
        # A text or a picture's vector that enters with the time is what each step reads anyway.
        rows = [columns[name].reshape(len(timesteps), -1).float() for name in self._row_columns]
        return torch.cat(rows, dim=1)

    def _cross_kv(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return (hidden if hidden.ndim == 3 else hidden[:, None],)

    def _evaluate(self, inputs: Mapping[str, Tensor], kv: Sequence[Tensor]) -> Tensor:
        columns = inputs["temb_row"].split(list(self._row_columns.values()), dim=1)
        row = dict(zip(self._row_columns, columns, strict=True))
        row |= {name: row[name].flatten() for name in self._numbers}
        if self._text:
            row[self._text] = kv[0] if self._text == "encoder_hidden_states" else kv[0][:, 0]
        return self._step.only(sample=inputs["sample"], **row)


def _by_length(
    run: Callable[[Mapping[str, Tensor], Sequence[Tensor]], dict[str, Tensor]],
    inputs: Mapping[str, Tensor],
    text: Sequence[Tensor],
    kv_len: Tensor | None,
) -> dict[str, Tensor]:
    """Outputs of rows of inputs and texts. Exported attention has no masks: texts of equal length are run together."""
    if kv_len is None:
        return run(inputs, text)
    groups = [(int(n), (kv_len == n).nonzero().flatten()) for n in kv_len.unique()]
    parts = [run({k: x[rows] for k, x in inputs.items()}, [kv[rows, :n] for kv in text]) for n, rows in groups]
    back = torch.cat([rows for _, rows in groups]).argsort()
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


# ------------------------------------------------------------------------------------------------------- controls


class _Parts:
    """Networks that are opened on first use, by the ends of their names."""

    def __init__(self, config: Any, parts: Mapping[str, Callable[[], Network]]) -> None:
        self.config, self._parts = config, parts
        self._opened: dict[str, Network] = {}

    def _network(self, name: str) -> Network:
        if name not in self._opened:
            self._opened[name] = self._parts[name]()
        return self._opened[name]


class ExportedControlNet(_Parts):
    """Replaces models.controlnet.ControlNet."""

    config: ControlNetConfig

    @property
    def needs_added(self) -> bool:
        return self.config.unet.needs_added

    def hint(self, image: Tensor) -> Tensor:
        return self._network("hint").only(image=image)

    def time_rows(self, timesteps: Tensor, *, added: AddedConditions | None = None) -> Tensor:
        return self._network("time_rows").only(timesteps=timesteps, **({} if added is None else vars(added)))

    def cross_kv(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        outputs = self._network("text_kv")(encoder_hidden_states=encoder_hidden_states)
        return tuple(outputs[f"kv.{i}"] for i in range(len(outputs)))

    def step(
        self,
        model_input: Tensor,
        temb_row: Tensor,
        cross_kv: Sequence[Tensor],
        hint: Tensor,
        *,
        kv_len: Tensor | None = None,
    ) -> Residuals:
        def run(inputs: Mapping[str, Tensor], text: Sequence[Tensor]) -> dict[str, Tensor]:
            return self._network("step")(**inputs, **{f"kv.{i}": kv for i, kv in enumerate(text)})

        inputs = {"sample": model_input, "temb_row": temb_row, "hint": hint}
        outputs = _by_length(run, inputs, cross_kv, kv_len)
        *skips, mid = (outputs[f"residual.{k}"] for k in range(len(outputs)))
        return Residuals(tuple(skips), mid)


class ExportedT2IAdapter(_Parts):
    """Replaces models.t2i_adapter.T2IAdapter."""

    config: T2IAdapterConfig

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        (name,) = self._parts
        outputs = self._network(name)(image=image)
        return tuple(outputs[f"feature.{k}"] for k in range(len(outputs)))
