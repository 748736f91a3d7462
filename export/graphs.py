"""Several steps, and whole pictures, as one network each: what a bundle has that was exported with --whole-picture.

A sampler is a table (samplers/table.py), so all its steps are one loop over the rows, whose body is the U-Net and the
formulas of kernels/step.py, and the table is an input: sampler, number of steps, strength and noise need no other
graph. Each image has a table of its own, and a call takes the rows that it is given, from the state that the last left:

    steps           latents, anchor, history, table, guidance, rescale, noises, mask, init, init_noise, temb_rows,
                    kv.0, kv.1, ... (for inpainting: extra) -> latents_out, anchor_out, history_out, norms
    whole_picture   input_ids, negative_ids (SDXL: input_ids_2, negative_ids_2, time_ids, negative_weight), timesteps,
                    decode, and of the above all from latents to init_noise -> the above, and image

    latents, anchor             (B, C, h, w) float32, as are all but temb_rows, kv, extra and what is int32; at the
                                start what the request starts from, and zeros
    history                     (B, 4 C, h, w), newest first; zeros at the start
    table, timesteps, guidance  (S, B, columns), (S, B), (S, B): the scale is 1 at rows that are not guided, and what
                                the time embedding reads where a model reads the scale itself
    rescale                     (B,): of guidance, 0 for none
    noises                      (S or 1, B, C, h, w): what rows add; one for all if no row adds any
    mask, init, init_noise      (B, 1, h, w), (B, C, h, w), (B, C, h, w): ones and zeros where all is painted
    temb_rows, kv               (S, R, W) and (R, T, 2 C'): of `time_rows` and `text_kv`; R is 2 B where guided, all
                                negatives first, else B
    negative_ids                (N, T): N is B where guided, else 0
    negative_weight             (1,): 0 for negatives that are zeros, else 1
    decode                      (1,): 1 for an image, 0 for none, which is (0, 3, 1, 1)
    image                       (B, 3, H, W), in about -1..1
    norms                       (S, B): the sum of the latents' magnitudes after each row; not finite where they are not

Of a table they read the columns of kernels/step.py. A sampler that uses others is refused by their names.

The files, steps.onnx and picture.onnx, lie in the bundle's folder, for their weights are those of the split networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastldm.export.spec import DATA, DType, NetworkSpec, Port
from fastldm.kernels.columns import COLUMNS
from fastldm.sizes import Axis

STEPS, WHOLE_PICTURE = "steps", "whole_picture"
FILES = {STEPS: "steps.onnx", WHOLE_PICTURE: "picture.onnx"}
HISTORY = 4
STATE = ("latents", "anchor", "history")
MAX_IMAGES = 8  # of a call: sixteen rows, as of the U-Net

_IMAGES = Axis("images", 1, 1, MAX_IMAGES)
_COUNT = Axis("count", 0, 1, 1024)


def graph_specs(
    networks: Mapping[str, NetworkSpec], dtype: DType, columns: Sequence[str] = COLUMNS
) -> dict[str, NetworkSpec]:
    """Inputs and outputs of both, of a model whose split networks these are, for tables with these columns."""
    step, text_kv = networks["unet_step"], networks["text_kv"]
    sample, temb, *kv = step.inputs
    (out,) = step.outputs
    channels, sides = out.shape[1], out.shape[2:]
    assert isinstance(channels, int)
    width = temb.shape[1]

    def floats(name: str, *shape: int | Axis, scale: float = 1.0) -> Port:
        return Port(name, "float32", shape, scale=scale)

    state = [
        floats("latents", _IMAGES, channels, *sides),
        floats("anchor", _IMAGES, channels, *sides),
        floats("history", _IMAGES, HISTORY * channels, *sides),
    ]
    tables = [
        floats("table", _COUNT, _IMAGES, len(columns), scale=0.3),
        floats("guidance", _COUNT, _IMAGES),
        Port("rescale", "float32", (_IMAGES,), below=1),
    ]
    rest = [
        floats("noises", Axis("draws", 1, 1, _COUNT.most), _IMAGES, channels, *sides),
        Port("mask", "float32", (_IMAGES, 1, *sides), below=1),
        floats("init", _IMAGES, channels, *sides),
        floats("init_noise", _IMAGES, channels, *sides),
    ]
    behind = int(str(sample.shape[1])) - channels  # of an inpainting model
    if behind:
        rest.append(Port("extra", dtype, (_IMAGES, behind, *sides)))
    after = [replace(port, name=f"{port.name}_out") for port in state] + [floats("norms", _COUNT, _IMAGES)]
    rows = Port("temb_rows", dtype, (_COUNT, temb.shape[0], width))
    steps = NetworkSpec(STEPS, (*state, *tables, *rest, rows, *kv), tuple(after))

    texts = [networks[name] for name in ("text_encoder", "text_encoder_2") if name in networks]
    prompts = []
    for text, suffix in zip(texts, ("", "_2"), strict=False):
        ids = text.inputs[0]
        tokens = text_kv.inputs[0].axes[1]
        window = Axis("tokens", 1, tokens.best, tokens.best)
        prompts.append(replace(ids, name=f"input_ids{suffix}", shape=(_IMAGES, window)))
        negatives = Axis("negatives", 0, 1, MAX_IMAGES)
        prompts.append(replace(ids, name=f"negative_ids{suffix}", shape=(negatives, window)))
    for ids in (port for port in networks["time_rows"].inputs if port.name == "time_ids"):
        prompts.append(replace(ids, shape=(temb.shape[0], *ids.shape[1:])))
        prompts.append(Port("negative_weight", "float32", (1,), below=1))
    prompts.append(Port("timesteps", "float32", (_COUNT, _IMAGES), below=1000))
    prompts += [
        replace(port, shape=(_COUNT, _IMAGES)) for port in networks["time_rows"].inputs if port.name == "class_labels"
    ]
    prompts.append(Port("decode", "int32", (1,), below=2))
    (sampled,) = networks["vae_decoder"].outputs
    image = Port("image", "float32", (_IMAGES, *sampled.shape[1:]))
    whole = NetworkSpec(WHOLE_PICTURE, (*state, *prompts, *tables, *rest), (image, *after))
    return {STEPS: steps, WHOLE_PICTURE: whole}


def case_sizes(spec: NetworkSpec, fresh: bool) -> list[dict[str, int]]:
    """Sizes at which the steps are verified: an image that is guided, several, and without guidance."""
    axes = spec.axes

    def side(name: str, numerator: int, divisor: int) -> int:
        axis = axes[name]
        return max(axis.least, axis.best * numerator // divisor // axis.multiple_of * axis.multiple_of)

    def sizes(images: int, rows: int, count: int, draws: int, height: int, width: int) -> dict[str, int]:
        counts = {"images": images, "batch": rows, "count": count, "draws": draws}
        return {**counts, "height": side("height", 1, height), "width": side("width", 1, width)}

    if fresh:
        return [sizes(1, 1, 1, 1, 4, 4), sizes(3, 6, 2, 2, 4, 2)]
    return [sizes(1, 2, 3, 1, 2, 2), sizes(2, 4, 2, 2, 2, 4), sizes(2, 2, 2, 1, 4, 4)]


def reference_steps(
    unet_step: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the steps compute, in PyTorch. unet_step: inputs of the network of that name -> its output in float32."""
    x, y, history = (inputs[name] for name in STATE)
    kv = {name: value for name, value in inputs.items() if name.startswith("kv.")}
    images, rows, norms = len(x), inputs["temb_rows"].shape[1], []
    for i, numbers in enumerate(inputs["table"]):
        own = dict(zip(COLUMNS, numbers.T[..., None, None, None], strict=True))  # (B, 1, 1, 1) each
        u = x * own["c_in"]
        u = torch.cat([u, inputs["extra"]], 1) if "extra" in inputs else u
        sample = torch.cat([u] * (rows // images))
        out = unet_step({"sample": sample, "temb_row": inputs["temb_rows"][i], **kv})
        if rows > images:
            unguided, guided = out.chunk(2)
            out = unguided + _column(inputs["guidance"][i]) * (guided - unguided)
            deviations = [each.std((1, 2, 3), keepdim=True) for each in (guided, out)]
            out = out * (1 + _column(inputs["rescale"]) * (deviations[0] / deviations[1] - 1))
        m = own["p"] * x + own["q"] * out
        ms = [m, *history.chunk(HISTORY, 1)[:-1]]
        noise = inputs["noises"][min(i, len(inputs["noises"]) - 1)]
        after = own["a"] * x + own["a1"] * y + sum(own[f"b{k}"] * ms[k] for k in range(HISTORY)) + own["d"] * noise
        y = own["e"] * x + own["e1"] * y + sum(own[f"f{k}"] * ms[k] for k in range(HISTORY))
        known = own["r"] * inputs["init"] + own["s"] * inputs["init_noise"]
        x, history = known + inputs["mask"] * (after - known), torch.cat(ms, 1)
        norms.append(x.abs().sum((1, 2, 3)))
    stacked = torch.stack(norms) if norms else torch.zeros(0, images)
    return {"latents_out": x, "anchor_out": y, "history_out": history, "norms": stacked}


def _column(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def weight_files(path: Path, network: str) -> list[Path]:
    """The files beside a network's graph that hold its weights; those that are in the graph are in none."""
    if network == STEPS:
        files = [path.with_name("unet_step") / DATA]
    elif network == WHOLE_PICTURE:
        files = sorted(path.parent.glob(f"*/{DATA}"))
    else:
        files = [path.with_name(f"{path.name}_data")]
    return [file for file in files if file.is_file()]
