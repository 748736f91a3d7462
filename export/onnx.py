"""Networks to ONNX files: traced, cleaned, checked.

    Networks            a model's networks in one dtype, each loaded when it is asked for
    Networks.run        a network as its spec says, tensors by name in and out: what is traced and what judges
    write               one network as a folder: model.onnx, and beside it model.onnx_data with the weights

Exported is what the U-Net, autoencoder and text encoders compute with PyTorch's own ops. All that depends on weights
alone (projections side by side, transposes) is computed here and not each time a session starts. The same weights and
versions give the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from fastldm import loading, weights
from fastldm.errors import BundleError, InputError
from fastldm.export import fused
from fastldm.export.spec import Axis, DType, NetworkSpec, sample, specs
from fastldm.kernels import observe, use
from fastldm.kernels.dispatch import instead
from fastldm.models.clip import CLIPText
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder, rescale_for_half

OPSETS = (21, 23)
"""21: GroupNormalization and Gelu are single nodes. 23: Attention too, which not all backends know."""
MODEL, DATA = "model.onnx", "model.onnx_data"
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
        made = _RUN[name](self.module(name), inputs)
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


_RUN: dict[str, Callable[..., dict[str, Tensor]]] = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder,
    "unet": _unet,
    "text_kv": _text_kv,
    "time_rows": _time_rows,
    "unet_step": _unet_step,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}


# ----------------------------------------------------------------------------------------------------------- writing


class _Traced(nn.Module):
    """A network with the inputs and outputs of its spec in order: what a trace wants."""

    def __init__(self, networks: Networks, name: str) -> None:
        super().__init__()
        self.network = networks.module(name)
        self._spec, self._run = networks.specs[name], _RUN[name]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = (port.name for port in self._spec.inputs)
        made = self._run(self.network, dict(zip(names, inputs, strict=True)))
        return tuple(made[port.name] for port in self._spec.outputs)


def write(networks: Networks, name: str, folder: Path, *, opset: int = 21, fused_ops: bool = False) -> None:
    """Trace a network and write it into `folder`, which is made. Raises BundleError for a graph that is not as it
    should be, InputError for an opset that is not in OPSETS.

    fused_ops: GroupNorm with SiLU, attention and GEGLU are one node each, see `export.fused`.
    """
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}: expected {' or '.join(map(str, OPSETS))}")
    spec = networks.specs[name]
    with instead(fused.stand_ins() if fused_ops else {}):
        model = _trace(_Traced(networks, name), spec, opset)
    _clean(model, spec)
    fused.add_functions(model, opset)
    check_graph(model, networks, name, opset)
    folder.mkdir(parents=True)
    ir.save(model, folder / MODEL, external_data=DATA)


def trace_sizes(spec: NetworkSpec) -> dict[str, int]:
    """Small, for they are run; no two alike and none of them one, for a trace takes that for a rule."""
    units = {"batch": 2, "height": 2, "width": 3, "steps": 3, "rows": 5}
    return {name: count * spec.axes[name].multiple_of for name, count in units.items() if name in spec.axes}


def _trace(module: nn.Module, spec: NetworkSpec, opset: int) -> ir.Model:
    dims: dict[str, object] = {}

    def dim(axis: Axis) -> object:
        if axis.name not in dims:
            # A bound is a rule for the trace too. Only the positions of a text have one.
            most = axis.most if axis.name == "tokens" else None
            dims[axis.name] = axis.multiple_of * torch.export.Dim(axis.name, min=1, max=most)
        return dims[axis.name]

    shapes = tuple({i: dim(axis) for i, axis in port.axes.items()} for port in spec.inputs)
    with use("torch"), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            tuple(sample(spec, trace_sizes(spec)).values()),
            input_names=[port.name for port in spec.inputs],
            output_names=[port.name for port in spec.outputs],
            dynamic_shapes=(shapes,),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on itself (no torchvision, renamed axes) are no news to who exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _clean(model: ir.Model, spec: NetworkSpec) -> None:
    """Fold what depends on weights alone, name the axes as the spec does, and drop what is about this machine."""
    unlimited = 1 << 62
    onnxscript.optimizer.fold_constants(model, input_size_limit=unlimited, output_size_limit=unlimited)
    onnxscript.optimizer.optimize(model, input_size_limit=unlimited, output_size_limit=unlimited)
    for value, port in zip((*model.graph.inputs, *model.graph.outputs), (*spec.inputs, *spec.outputs), strict=True):
        value.shape = ir.Shape([_dimension(size) if isinstance(size, Axis) else size for size in port.shape])
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.doc_string = spec.name, None


def _dimension(axis: Axis) -> str:
    return axis.name if axis.multiple_of == 1 else f"{axis.multiple_of}*{axis.name}"


_TAKEN_APART = ("InstanceNormalization", "Erf", "ReduceMean")  # what a norm or a GELU becomes where it is not one node


def check_graph(model: ir.Model, networks: Networks, name: str, opset: int) -> None:
    """BundleError unless each GroupNorm and GELU of the network is one node, and at opset 23 or with fused ops each
    attention: backends have kernels for these, and none for what they are made of."""
    called: Counter[str] = Counter()
    inputs = sample(networks.specs[name], trace_sizes(networks.specs[name]) | {"steps": 1})
    with use("torch"), observe(lambda op, args, kwargs: called.update([op.name])):
        networks.run(name, inputs)
    module = networks.module(name)
    gelus = module.config.layers if isinstance(module, CLIPText) and module.config.act == "gelu" else 0
    wanted = dict.fromkeys(_TAKEN_APART, 0) | {
        "GroupNormalization": called["group_norm"],
        "Gelu": called["linear_geglu"] + gelus,
    }
    if opset >= 23 or model.functions:
        wanted["Attention"] = called["attention"]
    counts = Counter(fused.heart(node) for node in model.graph.all_nodes())
    for op, count in wanted.items():
        if counts[op] != count:
            raise BundleError(
                f"{name}: the traced graph has {counts[op]} {op} nodes, expected {count}: "
                f"torch {torch.__version__} traces it otherwise than the versions that fastldm was tested with"
            )
