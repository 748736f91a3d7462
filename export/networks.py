"""The networks of a bundle in the places of PyTorch's, so that a pipeline on engines is the same pipeline.

Each class has the methods of the module that it stands for. A split U-Net caches what PyTorch's does: text to keys and
values once a prompt, time steps to rows once a schedule. For a whole one, which computes both at each step, "keys and
values" are the text itself, and a "row" is all else that it reads, side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastldm import openmp, spans
from fastldm.conditioning.text import TextStage
from fastldm.device import choose_dtype
from fastldm.errors import BundleError, CheckpointError, InputError
from fastldm.export.bundle import Bundle, differing, identity
from fastldm.export.engine import Engine, is_bundle, open_engine
from fastldm.export.spec import Axis, NetworkSpec
from fastldm.loading import spec as loading
from fastldm.loading.prepare import prepare
from fastldm.models.config import TextConfig, TinyVAEConfig, UNetConfig, VAEConfig
from fastldm.models.unet import AddedConditions, guidance_embedding
from fastldm.models.vae import Layer


@dataclass(frozen=True)
class Source:
    """The model that a bundle was made of: what `loading.describe` takes to find it."""

    model: str
    options: dict[str, Any]


def source(bundle: Bundle, *, check: bool = True) -> Source:
    """Where the model lies that a bundle was made of. BundleError where it is not there any more; with `check`, which
    reads all of it, also where anything of it is different by now."""
    given, folder = bundle.manifest["source"], bundle.folder
    if given is None:
        raise BundleError(f"{folder} was made of a model in memory, and PyTorch cannot read the bundle itself")
    if is_bundle(given):
        raise BundleError(f"{folder} was made of {given}, which is a bundle by now, and PyTorch reads none")
    found = Source(given, {key: value for key, value in bundle.manifest["options"].items() if value})
    try:
        model = loading.describe(given, local_files_only=True, **found.options)
    except (CheckpointError, InputError) as error:
        raise BundleError(
            f"{folder} was made of {given}, which is not here: PyTorch cannot read the bundle itself ({error})"
        ) from error
    differs = differing(bundle.manifest, identity(model)) if check else []
    if differs:
        raise BundleError(
            f"{given} has changed since {folder} was made of it ({', '.join(differs)}): export it once more"
        )
    return found


def latents(bundle: Bundle) -> list[tuple[Axis, Axis]]:
    """Heights and widths that the U-Net runs with."""
    return _latents([bundle.specs["unet_step" if bundle.manifest["split"] else "unet"]])


def _latents(specs: Sequence[NetworkSpec]) -> list[tuple[Axis, Axis]]:
    return [(spec.axes["height"], spec.axes["width"]) for spec in specs]


def precision(bundle: Bundle, backend: str, device: torch.device, dtype: str | torch.dtype | None) -> str:
    """What a backend computes a bundle in: what it was exported in, if nothing else is asked for; OpenVINO in what is
    fastest on the device."""
    if backend == "openvino":
        fastest = dtype is None
        dtype = choose_dtype(dtype, device)
        if fastest and dtype == torch.bfloat16 and find_spec("openvino") is not None:
            from fastldm.export.openvino import has_bfloat16

            dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    return str(dtype or bundle.manifest["dtype"]).removeprefix("torch.")


def precision_of(network: str, computed: str) -> str:
    """What one network is computed in where others are in `computed`. OpenVINO takes the sinusoids of a network in
    bfloat16 too, where an angle of 1,000 has no digits left: time_rows, once a schedule, is float32 instead."""
    return "float32" if network == "time_rows" and computed == "bfloat16" else computed


def load(
    bundle: Bundle,
    backend: str,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    opened: Callable[[str], Engine] | None = None,
) -> loading.LoadedModel:
    """The networks of a bundle on a backend.

    dtype: to compute in; the best where it is None. Only OpenVINO has a choice, float32 or bfloat16.
    opened: gives the engine of a network, in place of the backend.

    The encoder of pictures is opened when it is first asked for: most never do.
    """
    spec, computed = bundle.model, precision(bundle, backend, device, dtype)
    options: dict[str, Any] = {"device": device, "threads": openmp.threads()}

    def network(name: str) -> Network:
        if opened is not None:
            return Network(opened(name))
        options["precision"] = precision_of(name, computed)
        return Network(
            open_engine(backend, bundle.path(name), bundle.specs[name], hashes=bundle.hashes(name), **options)
        )

    names = [name for name in ("text_encoder", "text_encoder_2") if name in bundle.specs]
    stages = tuple(
        TextStage(
            spec.checkpoint.tokenizer(name.replace("text_encoder", "tokenizer")),
            ExportedText(config, device, network(name)),
        )
        for name, config in zip(names, spec.text, strict=True)
    )
    if bundle.manifest["split"]:
        parts = [network(name) for name in ("text_kv", "time_rows", "unet_step")]
        unet: ExportedUNet = SplitUNet(spec.unet, *parts)
    else:
        unet = WholeUNet(spec.unet, network("unet"))
    vae = ExportedAutoencoder(spec.vae, network("vae_decoder"), lambda: network("vae_encoder"))
    return loading.LoadedModel(
        unet,
        vae,
        stages,
        prepare({}),
        device=device,
        dtype=getattr(torch, bundle.manifest["dtype"]),
        backend=backend,
        precision=computed,
        latents=unet.latents,
    )


class Network:
    """An engine for any number of rows."""

    def __init__(self, engine: Engine) -> None:
        self.specs, self._engine = engine.specs, engine
        self.inputs = self.specs[0].inputs
        self._most = min(spec.inputs[0].axes[0].most for spec in self.specs)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """All inputs of the spec, each of R rows, in any floating point dtype -> all outputs, of R rows."""
        given = {port.name: inputs[port.name].to(port.torch_dtype) for port in self.inputs}
        rows = next(iter(given.values())).shape[0]
        parts = [
            self._engine({name: x[start : start + self._most] for name, x in given.items()})
            for start in range(0, rows, self._most)
        ]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def only(self, **inputs: Tensor) -> Tensor:
        """The output of a network that has one."""
        (output,) = self(**inputs).values()
        return output


class ExportedText:
    """models.clip.CLIPText."""

    def __init__(self, config: TextConfig, device: torch.device, network: Network) -> None:
        self.config, self.device, self._network = config, device, network

    def __call__(self, input_ids: Tensor, skip: int = 0, final_norm: bool = True) -> tuple[Tensor, Tensor | None]:
        outputs = self._network(input_ids=input_ids)
        if not final_norm:
            name = f"hidden_states.{self.config.layers - skip}"
        else:
            name = f"clip_skip.{skip}" if skip else "last_hidden_state"
        return outputs[name], outputs.get("text_embeds")


class ExportedAutoencoder:
    """models.vae.AutoencoderKL or TinyAutoencoder, but for what their tiles need."""

    def __init__(
        self, config: VAEConfig | TinyVAEConfig, decoder: Network, open_encoder: Callable[[], Network]
    ) -> None:
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
    """models.unet.UNet."""

    def __init__(self, config: UNetConfig, step: Network, text: str) -> None:
        """step: runs at each step. text: its input that has the axis of tokens."""
        self.config, self._step = config, step
        self._tokens = next(port.axes[1] for port in step.inputs if port.name == text)
        self.latents = _latents(step.specs)

    @abstractmethod
    def time_rows(
        self, timesteps: Tensor, *, added: AddedConditions | None = None, guidance: Tensor | None = None
    ) -> Tensor: ...

    def cross_kv(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        tokens, most = encoder_hidden_states.shape[1], self._tokens.most
        if tokens > most:
            raise InputError(
                f"the text has {tokens} tokens and this bundle takes {most}: shorten the prompt, or run on PyTorch"
            )
        return self._cross_kv(encoder_hidden_states)

    @abstractmethod
    def _cross_kv(self, hidden: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def _evaluate(self, u: Tensor, row: Tensor, kv: Sequence[Tensor]) -> Tensor: ...

    def step(self, u: Tensor, temb_row: Tensor, cross_kv: Sequence[Tensor], *, kv_len: Tensor | None = None) -> Tensor:
        if kv_len is None:
            return self._evaluate(u, temb_row, cross_kv)
        # An exported attention reads every key that it is given: rows with texts of one length are run together.
        out = u.new_empty((u.shape[0], self.config.out_channels, *u.shape[2:]))
        for tokens in kv_len.unique().tolist():
            rows = (kv_len == tokens).nonzero().flatten()
            out[rows] = self._evaluate(u[rows], temb_row[rows], [kv[rows, :tokens] for kv in cross_kv])
        return out


class SplitUNet(ExportedUNet):
    """Of a bundle exported with --split."""

    def __init__(self, config: UNetConfig, text_kv: Network, time_rows: Network, unet_step: Network) -> None:
        super().__init__(config, unet_step, "kv.0")
        self._text_kv, self._time_rows = text_kv, time_rows

    def time_rows(
        self, timesteps: Tensor, *, added: AddedConditions | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        given = {"timesteps": timesteps, **({} if added is None else vars(added))}
        return self._time_rows.only(**given, **({} if guidance is None else {"guidance": guidance}))

    def _cross_kv(self, hidden: Tensor) -> tuple[Tensor, ...]:
        made = self._text_kv(encoder_hidden_states=hidden)
        return tuple(made[f"kv.{i}"] for i in range(len(made)))

    def _evaluate(self, u: Tensor, row: Tensor, kv: Sequence[Tensor]) -> Tensor:
        return self._step.only(sample=u, temb_row=row, **{f"kv.{i}": one for i, one in enumerate(kv)})


class WholeUNet(ExportedUNet):
    """As other exporters have it too."""

    def __init__(self, config: UNetConfig, unet: Network) -> None:
        super().__init__(config, unet, "encoder_hidden_states")
        names = ("timestep", "timestep_cond", "time_ids", "text_embeds")
        ports = {port.name: port for port in unet.inputs}
        self._row = {name: 1 if name == "timestep" else ports[name].shape[1] for name in names if name in ports}

    def time_rows(
        self, timesteps: Tensor, *, added: AddedConditions | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        parts = {"timestep": timesteps[:, None]}
        if guidance is not None and self.config.time_cond_proj_dim is not None:
            parts["timestep_cond"] = guidance_embedding(guidance, self.config.time_cond_proj_dim)
        if added is not None:
            parts |= vars(added)
        return torch.cat([parts[name].float() for name in self._row], dim=1)

    def _cross_kv(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return (hidden,)

    def _evaluate(self, u: Tensor, row: Tensor, kv: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(self._row, row.split(list(self._row.values()), dim=1), strict=True))
        parts["timestep"] = parts["timestep"].flatten()
        return self._step.only(sample=u, encoder_hidden_states=kv[0], **parts)
