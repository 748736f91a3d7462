"""What PyTorch says: a model's networks by the names of their spec, which is what is traced and what judges.

Networks        in one dtype, on the CPU, each loaded when it is asked for
Networks.run    one of them, tensors by name in and out
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastldm import loading, weights
from fastldm.export.spec import DType, specs
from fastldm.models.clip import CLIPText
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder, rescale_for_half

Named = Mapping[str, Tensor]


class Networks:
    """The networks of a model for export, on the CPU. dtype: of the weights; a float16 autoencoder is rescaled where
    its activations would leave the range."""

    def __init__(self, model: loading.Spec, dtype: DType, *, split: bool = False) -> None:
        self.specs = specs(model.unet, model.vae, model.text, dtype=dtype, split=split)
        self._model, self._dtype = model, dtype
        self._loaded: dict[str, nn.Module] = {}

    @staticmethod
    def part(name: str) -> str:
        """The component of the checkpoint that a network is made of."""
        if name.startswith("text_encoder"):
            return name
        return "vae" if name.startswith("vae") else "unet"

    def module(self, name: str) -> nn.Module:
        """The module that a network is, or is part of."""
        part = self.part(name)
        if part not in self._loaded:  # those of one part come one after the other, so one is held at a time
            self._loaded = {part: self._load(part)}
        return self._loaded[part]

    def _load(self, part: str) -> nn.Module:
        model = self._model
        with torch.device("meta"):
            if part == "unet":
                built: nn.Module = UNet(model.unet)
            elif part == "vae":
                built = loading.autoencoder(model.vae)
            else:
                built = CLIPText(model.text[1 if part.endswith("_2") else 0])
        component = model.checkpoint.components[part]
        dtype = getattr(torch, self._dtype)
        module = weights.load_module(built, component.state(), dtype=dtype, source=component.source)
        if dtype == torch.float16 and isinstance(module, AutoencoderKL) and module.config.force_upcast:
            rescale_for_half(module)
        return module

    @torch.no_grad()
    def run(self, name: str, inputs: Named) -> dict[str, Tensor]:
        """What PyTorch says: all inputs of the network's spec to all its outputs."""
        made = RUN[name](self.module(name), inputs)
        return {port.name: made[port.name] for port in self.specs[name].outputs}


# ------------------------------------------------------------------------------- networks by the names of their spec


def _text_encoder(model: CLIPText, inputs: Named) -> dict[str, Tensor]:
    ids, text = inputs["input_ids"], model.text_model
    states = [text.embeddings(ids)]
    for layer in text.encoder.layers:
        states.append(layer(states[-1]))
    last = text.final_layer_norm(states[-1])
    pooled = last[torch.arange(ids.shape[0]), model.ends(ids)]
    made = {"last_hidden_state": last, "pooler_output": pooled}
    if model.text_projection is not None:
        made["text_embeds"] = model.text_projection(pooled)
    made |= {f"hidden_states.{i}": state for i, state in enumerate(states[:-1])}
    return made | {f"clip_skip.{n}": text.final_layer_norm(states[-1 - n]) for n in range(1, len(states) - 1)}


def _added(inputs: Named) -> AddedConditions | None:
    return AddedConditions(inputs["text_embeds"], inputs["time_ids"]) if "time_ids" in inputs else None


def _unet(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    added = _added(inputs)
    out = unet(
        inputs["sample"],
        _one_each(inputs["timestep"], inputs["sample"]),
        inputs["encoder_hidden_states"],
        inputs.get("timestep_cond"),
        None if added is None else vars(added),
    )
    return {"out_sample": out}


def _one_each(timestep: Tensor, sample: Tensor) -> Tensor:
    """timestep (1 or B,) -> (B,). A trace takes two symbolic sizes for unequal, so there it is ONNX's own Expand."""
    if not torch.compiler.is_exporting():
        return timestep.expand(sample.shape[0])
    batch = torch.onnx.ops.symbolic("Shape", [sample], {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,))
    return torch.onnx.ops.symbolic("Expand", [timestep, batch], dtype=timestep.dtype, shape=(sample.shape[0],))


def _text_kv(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    return {f"kv.{i}": kv for i, kv in enumerate(unet.cross_kv(inputs["encoder_hidden_states"]))}


def _time_rows(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    rows = unet.time_rows(inputs["timesteps"], added=_added(inputs), guidance=inputs.get("guidance"))
    return {"temb_rows": rows}


def _unet_step(unet: UNet, inputs: Named) -> dict[str, Tensor]:
    kv = [tensor for name, tensor in inputs.items() if name.startswith("kv.")]
    return {"out_sample": unet.step(inputs["sample"], inputs["temb_row"], kv)}


def _vae_decoder(vae: AutoencoderKL | TinyAutoencoder, inputs: Named) -> dict[str, Tensor]:
    return {"sample": vae.decode(inputs["latent_sample"])}


def _vae_encoder(vae: AutoencoderKL | TinyAutoencoder, inputs: Named) -> dict[str, Tensor]:
    name = "latent_parameters" if isinstance(vae, AutoencoderKL) else "latent_sample"
    return {name: vae.encode(inputs["sample"])}


RUN: dict[str, Callable[..., dict[str, Tensor]]] = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder,
    "unet": _unet,
    "text_kv": _text_kv,
    "time_rows": _time_rows,
    "unet_step": _unet_step,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}
