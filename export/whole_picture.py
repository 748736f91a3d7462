"""Several steps, and whole pictures, composed as one ONNX graph each of a split bundle's, see `export.graphs`.

The weights stay in the files of those. What runs inside a loop, and in a browser:

- GroupNormalization is written as InstanceNormalization: OpenVINO does not run the former in a loop.
- No Split or Concat has more than six parts: WebGPU binds few buffers at once.
- Every name begins with its network's: bodies see the names around them.
- What a loop carries has a stated shape inside, and gets its shape back behind it: what follows needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fastldm.errors import BundleError
from fastldm.export.bundle import Bundle
from fastldm.export.graphs import HISTORY, STATE, STEPS
from fastldm.export.spec import NetworkSpec, Port
from fastldm.kernels.columns import COLUMNS
from fastldm.models.config import AutoencoderConfig, UNetConfig
from fastldm.models.families import IMAGE_ENCODER, IMAGE_NORMALIZER
from fastldm.sizes import Axis

_PARTS = 6
_ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}
_END = np.iinfo(np.int64).max


def write(bundle: Bundle, name: str) -> None:
    """Write a graph into a bundle's folder, where its networks are. BundleError for networks that cannot be
    composed."""
    used = ["unet_step"] if name == STEPS else [n for n in bundle.specs if n != "vae_encoder"]
    networks = {n: onnx.load(bundle.path(n), load_external_data=False) for n in used}
    vae = bundle.model.vae
    composer = Composer(networks, bundle.graphs[name], bundle.model.unet, vae)
    model = composer.steps() if name == STEPS else composer.picture()
    helper.set_model_props(model, {"columns": " ".join(COLUMNS), "latents_to_pixels": str(vae.factor)})
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", bundle.manifest["opset"]))
    model.ir_version = 10
    onnx.save(model, bundle.path(name))


class Composer:
    """One graph of several networks."""

    def __init__(
        self,
        networks: Mapping[str, ModelProto],
        spec: NetworkSpec,
        unet: UNetConfig,
        vae: AutoencoderConfig,
    ) -> None:
        """spec: of the graph."""
        self.networks, self.spec, self.unet, self.vae = networks, spec, unet, vae
        self.main = Nodes("main")
        self.inputs = {port.name: port.name for port in spec.inputs}
        self.branches = 3 if unet.edits else 2
        """Rows of the U-Net of a guided image."""

    def steps(self) -> ModelProto:
        """The steps alone."""
        kv = [port.name for port in self.spec.inputs if port.name.startswith("kv.")]
        self._loop("temb_rows", {name: name for name in kv}, self.main("Shape", "temb_rows", start=1, end=2))
        return self._model()

    def picture(self) -> ModelProto:
        """From token ids to an image."""
        main = self.main
        images, zero = main("Shape", "latents", start=0, end=1), main.constant([0])
        encoders = [name for name in ("text_encoder", "text_encoder_2") if name in self.networks]
        hidden, pooled, negative = [], "", "negative_ids" if encoders else "negative_image_embeds"
        # N: none where nothing is read that guidance could lead away from
        negatives = main("Shape", negative, start=0, end=1) if negative in self.inputs else zero
        embeds = ""
        if IMAGE_ENCODER in self.networks:
            encoder = self.networks[IMAGE_ENCODER]
            embeds = main.network(encoder, IMAGE_ENCODER, {"pixel_values": "pixel_values"})["image_embeds"]
        for name, suffix in zip(encoders, ("", "_2"), strict=False):
            ids = main("Concat", f"negative_ids{suffix}", f"input_ids{suffix}", axis=0)
            encoded = main.network(self.networks[name], name, {"input_ids": ids})
            states = [output for output in encoded if output.startswith("hidden_states.")]
            hidden.append(encoded[states[-1] if self.unet.needs_added else "last_hidden_state"])
            pooled = encoded.get("text_embeds", "")
        twice = main("Mul", negatives, main.constant([2])) if self.unet.edits else negatives
        rows = main("Add", images, twice)  # R
        if embeds and not hidden:  # a picture is a text of one token
            hidden.append(main("Unsqueeze", main("Concat", negative, embeds, axis=0), main.constant([1])))
        text = main("Concat", *hidden, axis=2) if len(hidden) > 1 else "".join(hidden)
        if self.unet.needs_added:  # negatives may be zeros
            kept = main("Expand", main.constant([1.0], np.float32), images)
            own = main("Concat", main("Expand", "negative_weight", negatives), kept, axis=0)  # (R,)
            weights = main("Cast", own, to=self._element("text_kv"))
            text = main("Mul", text, main("Reshape", weights, main.constant([-1, 1, 1])))
            pooled = main("Mul", pooled, main("Reshape", weights, main.constant([-1, 1])))
        kv = main.network(self.networks["text_kv"], "text_kv", {"encoder_hidden_states": text}) if text else {}

        def each_branch(value: str) -> str:
            """(N + B, ...) as (R, ...): of what edits, the negatives twice."""
            return main("Concat", main("Slice", value, zero, negatives, zero), value, axis=0)

        if self.unet.edits:
            kv = {name: each_branch(value) for name, value in kv.items()}
        # Time rows of S steps and R rows each: (S * R, W).
        count = main("Shape", "timesteps", start=0, end=1)
        flat = main.constant([-1])
        end, axis = main.constant([_END]), main.constant([1])

        def each_row(value: str) -> str:
            """(S, B) as (S * R,)."""
            copies = main("Concat", *[value] * self.branches, axis=1)
            start = main("Sub", main("Mul", images, main.constant([self.branches])), rows)
            return main("Reshape", main("Slice", copies, start, end, axis), flat)

        times, of_rows = {"timesteps": each_row("timesteps")}, {}
        if self.unet.needs_added:
            of_rows = {"text_embeds": pooled, "time_ids": "time_ids"}
        if self.unet.needs_vector:
            names = {"noise": "image_noise", "rates": "image_noise_rates", "noise_level": "noise_level"}
            model = self.networks[IMAGE_NORMALIZER]
            vector = main.network(model, IMAGE_NORMALIZER, {"image_embeds": embeds, **names})["class_labels"]
            width = main("Shape", vector, start=1, end=2)
            zeros = main("Cast", main.constant([0.0], np.float32), to=self._element("text_kv"))
            zeros = main("Expand", zeros, main("Concat", negatives, width, axis=0))
            of_rows["class_labels"] = main("Concat", zeros, vector, axis=0)
        for name, value in of_rows.items():
            value = each_branch(value) if self.unet.edits else value
            columns = main("Shape", value, start=1, end=2)
            repeated = main("Expand", value, main("Concat", count, rows, columns, axis=0))
            times[name] = main("Reshape", repeated, main("Concat", flat, columns, axis=0))
        if self.unet.needs_guidance:
            times["guidance"] = each_row("guidance")
        if self.unet.needs_class:
            times["class_labels"] = each_row("class_labels")
        temb = main.network(self.networks["time_rows"], "time_rows", times)["temb_rows"]
        width = main("Shape", temb, start=1, end=2)
        temb = main("Reshape", temb, main("Concat", count, rows, width, axis=0), allowzero=1)
        self._loop(temb, kv, rows)

        then, none = Nodes("decoder"), Nodes("none")
        scaled = "latents_out"
        if self.vae.latents_std:  # as `models.latents.unscaled`
            scaled = then("Mul", scaled, then.constant(_by_channel(self.vae.latents_std), np.float32))
        scaled = then("Div", scaled, then.constant(self.vae.scaling_factor, np.float32))
        if self.vae.latents_mean:
            scaled = then("Add", scaled, then.constant(_by_channel(self.vae.latents_mean), np.float32))
        decoded = scaled
        if "vae_decoder" in self.networks:
            element = self._element("vae_decoder")
            scaled = then("Cast", scaled, to=element) if element != TensorProto.FLOAT else scaled
            decoded = then.network(self.networks["vae_decoder"], "vae_decoder", {"latent_sample": scaled})["sample"]
            decoded = then("Cast", decoded, to=TensorProto.FLOAT) if element != TensorProto.FLOAT else decoded
        empty = none("ConstantOfShape", none.constant([0, 3, 1, 1]))
        branches = {
            "then_branch": helper.make_graph(then.nodes, "decoder", [], [_floats(decoded, ["B", 3, "H", "W"])]),
            "else_branch": helper.make_graph(none.nodes, "no decoder", [], [_floats(empty, [0, 3, 1, 1])]),
        }
        wanted = main("Cast", main("Squeeze", "decode", zero), to=TensorProto.BOOL)
        main.nodes.append(helper.make_node("If", [wanted], ["image"], name="decode", **branches))
        return self._model()

    def _element(self, network: str) -> int:
        """The type of what a network reads."""
        return int(self.networks[network].graph.input[0].type.tensor_type.elem_type)

    def _loop(self, temb_rows: str, kv: Mapping[str, str], rows: str) -> None:
        """The loop over the table. temb_rows: (S, R, W). kv: of the text, (R, T, 2C') each. rows: (1,), R."""
        main = self.main
        images = main("Shape", "latents", start=0, end=1)
        rescale = main("Reshape", "rescale", main.constant([-1, 1, 1, 1]))
        body = self._body(temb_rows, kv, images, rows, rescale)
        count = main("Squeeze", main("Shape", "table", start=0, end=1), main.constant([0]))
        *carried, norms = main.many("Loop", len(STATE) + 1, count, "", *STATE, body=body)
        shapes = [main("Shape", name) for name in STATE]
        for name, value, shape in zip(STATE, carried, shapes, strict=True):
            main.named(f"{name}_out", "Reshape", value, shape)
        main.named("norms", "Reshape", norms, main("Shape", "guidance"), allowzero=1)

    def _body(self, temb_rows: str, kv: Mapping[str, str], images: str, rows: str, rescale: str) -> GraphProto:
        """A row of the table: the U-Net, guidance, and the formulas of kernels/step.py."""
        g = Nodes("step")
        x, y, history = "x", "y", "h"
        channels, element = self.unet.out_channels, self._element("unet_step")
        half = element != TensorProto.FLOAT
        zero, end = g.constant([0]), g.constant([_END])
        i = g("Reshape", "iteration", g.constant([1]))

        def of_row(value: str) -> str:
            return g("Squeeze", g("Gather", value, i), zero)

        columns = g("Reshape", of_row("table"), g.constant([-1, len(COLUMNS), 1, 1]))
        numbers = dict(zip(COLUMNS, g.split(columns, [1] * len(COLUMNS), axis=1), strict=True))  # (B, 1, 1, 1) each

        def total(*terms: tuple[str, str]) -> str:
            products = [g("Mul", numbers[name], value) for name, value in terms]
            sum_ = products[0]
            for product in products[1:]:
                sum_ = g("Add", sum_, product)
            return sum_

        u = g("Mul", x, numbers["c_in"])
        u = g("Cast", u, to=element) if half else u
        copies = [u] * self.branches
        if "extra" in self.inputs:
            extras = ["extra"] * self.branches
            if self.unet.edits:  # the first branch does not see the image
                none = g("Cast", g.constant([0.0], np.float32), to=element)
                extras[0] = g("Expand", none, g("Shape", "extra"))
            copies = [g("Concat", own, extra, axis=1) for own, extra in zip(copies, extras, strict=True)]
        # R is B, or B for each branch: of all those rows the last R.
        first = g("Sub", g("Mul", images, g.constant([self.branches])), rows)
        sample = g("Slice", g("Concat", *copies, axis=0), first, end, zero)
        inputs = {"sample": sample, "temb_row": of_row(temb_rows), **kv}
        out = g.network(self.networks["unet_step"], "unet_step", inputs)["out_sample"]
        out = g("Cast", out, to=TensorProto.FLOAT) if half else out
        # Without negatives the first B rows are the prompts' too.
        unguided = g("Slice", out, zero, images, zero)
        guided = g("Slice", out, g("Sub", rows, images), end, zero)
        of_image = unguided
        if self.unet.edits:  # the branch before the last
            middle = g("Max", g("Sub", rows, g("Add", images, images)), zero)
            of_image = g("Slice", out, middle, g("Add", middle, images), zero)
        scale = g("Reshape", of_row("guidance"), g.constant([-1, 1, 1, 1]))
        mixed = g("Add", unguided, g("Mul", scale, g("Sub", guided, of_image)))
        if self.unet.edits:
            image_scale = g("Reshape", of_row("image_guidance"), g.constant([-1, 1, 1, 1]))
            mixed = g("Add", mixed, g("Mul", image_scale, g("Sub", of_image, unguided)))
        one = g.constant([1.0], np.float32)
        ratio = g("Div", _deviation(g, guided), _deviation(g, mixed))  # (B, 1, 1, 1)
        factor = g("Add", one, g("Mul", rescale, g("Sub", ratio, one)))
        factor = g("Where", g("Greater", rescale, g.constant([0.0], np.float32)), factor, one)
        out = g("Mul", mixed, factor)

        last = g("Sub", g("Shape", "noises", start=0, end=1), g.constant([1]))
        noise = g("Squeeze", g("Gather", "noises", g("Min", i, last)), zero)
        m = total(("p", x), ("q", out))
        ms = [m, *g.split(history, [channels] * HISTORY, axis=1)[:-1]]
        after = total(("a", x), ("a1", y), *((f"b{k}", ms[k]) for k in range(HISTORY)), ("d", noise))
        anchor = total(("e", x), ("e1", y), *((f"f{k}", ms[k]) for k in range(HISTORY)))
        known = total(("r", "init"), ("s", "init_noise"))
        after = g("Add", known, g("Mul", "mask", g("Sub", after, known)))
        newest = g("Concat", *ms, axis=1)
        shape, shapes = g("Shape", x), g("Shape", history)
        for value, name, size in ((after, "x_out", shape), (anchor, "y_out", shape), (newest, "h_out", shapes)):
            g.named(name, "Reshape", value, size)
        g.named("norm_out", "ReduceL1", after, g.constant([1, 2, 3]), keepdims=0)
        g.named("going_out", "Identity", "going")
        latents: list[int | str] = ["B", channels, "h", "w"]
        past: list[int | str] = ["B", HISTORY * channels, "h", "w"]
        head = [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        ]
        carried = [_floats("x", latents), _floats("y", latents), _floats("h", past)]
        outputs = [
            helper.make_tensor_value_info("going_out", TensorProto.BOOL, []),
            *[_floats("x_out", latents), _floats("y_out", latents), _floats("h_out", past), _floats("norm_out", ["B"])],
        ]
        return helper.make_graph(g.nodes, "step", [*head, *carried], outputs)

    def _model(self) -> ModelProto:
        weights = [_moved(tensor, name) for name, model in self.networks.items() for tensor in model.graph.initializer]
        inputs, outputs = ([_value(port) for port in side] for side in (self.spec.inputs, self.spec.outputs))
        return helper.make_model(helper.make_graph(self.main.nodes, self.spec.name, inputs, outputs, weights))


class Nodes:
    """Nodes in the making. Every name begins with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes = prefix, list[NodeProto]()

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        return self.many(op, 1, *inputs, **attributes)[0]

    def many(self, op: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        name = f"{self.prefix}/{op}_{len(self.nodes)}"
        outputs = [name if count == 1 else f"{name}.{k}" for k in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs

    def named(self, output: str, op: str, *inputs: str, **attributes: Any) -> None:
        """A node whose output has this name."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{self.prefix}/{output}", **attributes))

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        return self("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Parts of a value, by Splits of few outputs each."""
        if len(sizes) <= _PARTS:
            return self.many("Split", len(sizes), value, self.constant(list(sizes)), axis=axis)
        runs = _runs(sizes)
        parts = self.split(value, [sum(run) for run in runs], axis)
        return [own for part, run in zip(parts, runs, strict=True) for own in self._all(part, run, axis)]

    def _all(self, part: str, sizes: Sequence[int], axis: int) -> list[str]:
        return [part] if len(sizes) == 1 else self.split(part, sizes, axis)

    def concat(self, values: Sequence[str], axis: int) -> str:
        """Values side by side, by Concats of few inputs each."""
        while len(values) > _PARTS:
            runs = _runs(values)
            values = [run[0] if len(run) == 1 else self("Concat", *run, axis=axis) for run in runs]
        return self("Concat", *values, axis=axis)

    def network(self, model: ModelProto, name: str, inputs: Mapping[str, str]) -> dict[str, str]:
        """The nodes of another graph, on these values: the names of its outputs."""
        graph, renamed = model.graph, dict(inputs)
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for label in (*tensors, *(output for node in graph.node for output in node.output if output)):
            renamed[label] = f"{name}/{label}"
        for node in graph.node:
            if node.domain or any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute):
                raise BundleError(
                    f"{name} has {node.domain or 'a graph'} in {node.op_type}: export it without fused ops"
                )
            self._copy(node, name, renamed, tensors)
        return {value.name: renamed[value.name] for value in graph.output}

    def _copy(self, node: NodeProto, network: str, renamed: Mapping[str, str], tensors: Mapping[str, Any]) -> None:
        inputs, outputs = ([renamed[value] if value else "" for value in side] for side in (node.input, node.output))
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        part = Nodes(f"{network}/{node.name}")
        axis = attributes.get("axis", 0)
        if node.op_type == "GroupNormalization":
            dtype = helper.tensor_dtype_to_np_dtype(tensors[node.input[1]].data_type)
            result = _group_norm(part, *inputs, dtype=dtype, **attributes)
        elif node.op_type == "Concat" and len(inputs) > _PARTS:
            result = part.concat(inputs, axis)
        elif node.op_type == "Split" and len(outputs) > _PARTS:
            sizes = tensors.get(node.input[1]) if len(node.input) > 1 else None
            if sizes is None or sizes.external_data:
                raise BundleError(f"{network} has a Split of {len(outputs)} parts whose sizes are not known")
            parts = part.split(inputs[0], numpy_helper.to_array(sizes).tolist(), axis)
            self.nodes += part.nodes
            self.nodes += [helper.make_node("Identity", [own], [out]) for own, out in zip(parts, outputs, strict=True)]
            return
        else:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = part.prefix
            copy.input[:], copy.output[:] = inputs, outputs
            self.nodes.append(copy)
            return
        last = next(own for own in part.nodes if result in own.output)
        last.output[:] = [outputs[0]]
        self.nodes += part.nodes


def _runs(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[k : k + _PARTS] for k in range(0, len(items), _PARTS)]


def _by_channel(numbers: Sequence[float]) -> Any:
    return np.reshape(numbers, (1, -1, 1, 1))


def _group_norm(
    g: Nodes,
    x: str,
    scale: str,
    bias: str,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    dtype: Any = np.float32,
    **_: Any,
) -> str:
    """GroupNormalization as InstanceNormalization. dtype: of its weights."""
    grouped = g("Reshape", x, g.constant([0, num_groups, -1]))
    ones, zeros = g.constant(np.ones(num_groups), dtype), g.constant(np.zeros(num_groups), dtype)
    normed = g("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon)
    column = g.constant([-1, 1, 1])
    scaled = g("Mul", g("Reshape", normed, g("Shape", x)), g("Reshape", scale, column))
    return g("Add", scaled, g("Reshape", bias, column))


def _deviation(g: Nodes, x: str) -> str:
    """The standard deviation of each image, (B, 1, 1, 1): the ratio of two needs no correction."""
    axes = g.constant([1, 2, 3])
    centred = g("Sub", x, g("ReduceMean", x, axes))
    return g("Sqrt", g("ReduceMean", g("Mul", centred, centred), axes))


def _moved(tensor: TensorProto, network: str) -> TensorProto:
    """A weight, from where the graph lies."""
    moved = TensorProto()
    moved.CopyFrom(tensor)
    moved.name = f"{network}/{tensor.name}"
    for entry in moved.external_data:
        if entry.key == "location":
            entry.value = f"{network}/{entry.value}"
    return moved


def _value(port: Port) -> ValueInfoProto:
    shape = [size.name if isinstance(size, Axis) else size for size in port.shape]
    return helper.make_tensor_value_info(port.name, _ELEMENTS[port.dtype], shape)


def _floats(name: str, shape: Iterable[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
