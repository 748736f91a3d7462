"""Several steps, and whole pictures, as one network each: what a bundle has that was exported with --whole-picture.

A sampler is a table (samplers/table.py), so all its steps are one loop over the rows, whose body is the U-Net and the
formulas of kernels/step.py, and the table is an input: sampler, number of steps, strength and noise need no other
graph. Each image has a table of its own, and a call takes the rows that it is given, from the state that the last left:

    steps           latents, anchor, history, table, guidance, rescale, noises, mask, init, init_noise, temb_rows,
                    kv.0, kv.1, ... (for what reads something behind the latents: extra; InstructPix2Pix:
                    image_guidance) -> latents_out, anchor_out, history_out, norms
    whole_picture   input_ids, negative_ids (SDXL: input_ids_2, negative_ids_2, time_ids, negative_weight), timesteps,
                    decode, and of the above all from latents to extra -> the above, and image
                    (of what reads a picture: pixel_values; in place of a prompt: negative_image_embeds and no ids;
                    unCLIP, beside one: image_noise, image_noise_rates, noise_level)

    latents, anchor             (B, C, h, w) float32, as are all but temb_rows, kv, extra and what is int32; at the
                                start what the request starts from, and zeros
    history                     (B, 4 C, h, w), newest first; zeros at the start
    table, timesteps, guidance  (S, B, columns), (S, B), (S, B): the scale is 1 at rows that are not guided, and what
                                the time embedding reads where a model reads the scale itself
    image_guidance              (S, B): the image's scale of InstructPix2Pix, likewise
    rescale                     (B,): of guidance, 0 for none
    noises                      (S or 1, B, C, h, w): what rows add; one for all if no row adds any
    mask, init, init_noise      (B, 1, h, w), (B, C, h, w), (B, C, h, w): ones and zeros where all is painted
    extra                       (B, K, h, w): of InstructPix2Pix the image's latents
    temb_rows, kv               (S, R, W) and (R, T, 2 C'): of `time_rows` and `text_kv`; R is 2 B where guided, all
                                negatives first, else B. Of InstructPix2Pix R is 3 B where guided: the negatives without
                                the image, the negatives with it, the prompts
    negative_ids                (N, T): N is B where guided, else 0
    pixel_values                (B, 3, S, S): the image encoder's input, a picture for each image
    negative_image_embeds       (N, P): zeros, as diffusers has them
    image_noise                 (B, P): what unCLIP adds to a picture's vector; image_noise_rates (B, 2) and noise_level
                                (B,) as `image_normalizer` reads them
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
from fastldm.models.families import IMAGE_ENCODER, IMAGE_NORMALIZER
from fastldm.sizes import Axis

STEPS, WHOLE_PICTURE = "steps", "whole_picture"
FILES = {STEPS: "steps.onnx", WHOLE_PICTURE: "picture.onnx"}
HISTORY = 4
STATE = ("latents", "anchor", "history")

_COUNT = Axis("count", 0, 1, 1024)


def graph_specs(
    networks: Mapping[str, NetworkSpec], dtype: DType, columns: Sequence[str] = COLUMNS, *, edits: bool = False
) -> dict[str, NetworkSpec]:
    """Inputs and outputs of both, of a model whose split networks these are, for tables with these columns. edits:
    whether it is InstructPix2Pix, with three rows of the U-Net for an image."""
    step = networks["unet_step"]
    max_images = step.inputs[0].axes[0].most // (3 if edits else 2)
    images_axis = Axis("images", 1, 1, max_images)
    sample, temb, *kv = step.inputs
    (out,) = step.outputs
    channels, sides = out.shape[1], out.shape[2:]
    assert isinstance(channels, int)
    width = temb.shape[1]

    def floats(name: str, *shape: int | Axis, scale: float = 1.0) -> Port:
        return Port(name, "float32", shape, scale=scale)

    state = [
        floats("latents", images_axis, channels, *sides),
        floats("anchor", images_axis, channels, *sides),
        floats("history", images_axis, HISTORY * channels, *sides),
    ]
    tables = [
        floats("table", _COUNT, images_axis, len(columns), scale=0.3),
        floats("guidance", _COUNT, images_axis),
        Port("rescale", "float32", (images_axis,), below=1),
    ]
    if edits:
        tables.insert(2, floats("image_guidance", _COUNT, images_axis))
    rest = [
        floats("noises", Axis("draws", 1, 1, _COUNT.most), images_axis, channels, *sides),
        Port("mask", "float32", (images_axis, 1, *sides), below=1),
        floats("init", images_axis, channels, *sides),
        floats("init_noise", images_axis, channels, *sides),
    ]
    behind = int(str(sample.shape[1])) - channels
    if behind:
        rest.append(Port("extra", dtype, (images_axis, behind, *sides)))
    after = [replace(port, name=f"{port.name}_out") for port in state] + [floats("norms", _COUNT, images_axis)]
    rows = Port("temb_rows", dtype, (_COUNT, temb.shape[0], width))
    steps = NetworkSpec(STEPS, (*state, *tables, *rest, rows, *kv), tuple(after))

    negatives = Axis("negatives", 0, 1, max_images)
    texts = [networks[name] for name in ("text_encoder", "text_encoder_2") if name in networks]
    prompts = []
    for text, suffix in zip(texts, ("", "_2"), strict=False):
        ids = text.inputs[0]
        tokens = networks["text_kv"].inputs[0].axes[1]
        window = Axis("tokens", 1, tokens.best, tokens.best)
        prompts.append(replace(ids, name=f"input_ids{suffix}", shape=(images_axis, window)))
        prompts.append(replace(ids, name=f"negative_ids{suffix}", shape=(negatives, window)))
    if IMAGE_ENCODER in networks:
        (pixels,), (embeds,) = networks[IMAGE_ENCODER].inputs, networks[IMAGE_ENCODER].outputs
        prompts.append(replace(pixels, shape=(images_axis, *pixels.shape[1:])))
        if not texts:
            shape = (negatives, *embeds.shape[1:])
            prompts.append(replace(embeds, name="negative_image_embeds", shape=shape))
    if IMAGE_NORMALIZER in networks:
        names = {"noise": "image_noise", "rates": "image_noise_rates", "noise_level": "noise_level"}
        for port in networks[IMAGE_NORMALIZER].inputs[1:]:
            prompts.append(replace(port, name=names[port.name], shape=(images_axis, *port.shape[1:])))
    for ids in (port for port in networks["time_rows"].inputs if port.name == "time_ids"):
        prompts.append(replace(ids, shape=(temb.shape[0], *ids.shape[1:])))
        prompts.append(Port("negative_weight", "float32", (1,), below=1))
    prompts.append(Port("timesteps", "float32", (_COUNT, images_axis), below=1000))
    prompts += [
        replace(port, shape=(_COUNT, images_axis))
        for port in networks["time_rows"].inputs
        if port.name == "class_labels" and IMAGE_NORMALIZER not in networks
    ]
    prompts.append(Port("decode", "int32", (1,), below=2))
    # Without a decoder latents are pixels.
    shape = networks["vae_decoder"].outputs[0].shape if "vae_decoder" in networks else out.shape
    image = Port("image", "float32", (images_axis, *shape[1:]))
    whole = NetworkSpec(WHOLE_PICTURE, (*state, *prompts, *tables, *rest), (image, *after))
    return {STEPS: steps, WHOLE_PICTURE: whole}


def case_sizes(spec: NetworkSpec, fresh: bool) -> list[dict[str, int]]:
    """Sizes at which the steps are verified: an image that is guided, several, and without guidance."""
    axes = spec.axes

    def side(name: str, numerator: int, divisor: int) -> int:
        axis = axes[name]
        return max(axis.least, axis.best * numerator // divisor // axis.multiple_of * axis.multiple_of)

    guided = 3 if any(port.name == "image_guidance" for port in spec.inputs) else 2

    def sizes(images: int, branches: int, count: int, draws: int, height: int, width: int) -> dict[str, int]:
        counts = {"images": images, "batch": images * branches, "count": count, "draws": draws}
        return {**counts, "height": side("height", 1, height), "width": side("width", 1, width)}

    if fresh:
        return [sizes(1, 1, 1, 1, 4, 4), sizes(3, guided, 2, 2, 4, 2)]
    return [sizes(1, guided, 3, 1, 2, 2), sizes(2, guided, 2, 2, 2, 4), sizes(2, 1, 2, 1, 4, 4)]


def reference_steps(
    unet_step: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the steps compute, in PyTorch. unet_step: inputs of the network of that name -> its output in float32."""
    x, y, history = (inputs[name] for name in STATE)
    kv = {name: value for name, value in inputs.items() if name.startswith("kv.")}
    images, rows, norms, edits = len(x), inputs["temb_rows"].shape[1], [], "image_guidance" in inputs
    for i, numbers in enumerate(inputs["table"]):
        own = dict(zip(COLUMNS, numbers.T[..., None, None, None], strict=True))  # (B, 1, 1, 1) each
        u = x * own["c_in"]
        branches, behind = rows // images, [inputs["extra"]] if "extra" in inputs else []
        extras = [[torch.zeros_like(x) for x in behind] if edits and branches == 3 else behind, behind, behind]
        sample = torch.cat([torch.cat([u, *own], 1) for own in extras[:branches]])
        out = unet_step({"sample": sample, "temb_row": inputs["temb_rows"][i], **kv})
        if branches > 1:
            unguided, *of_image, guided = out.chunk(branches)
            scale = _column(inputs["guidance"][i])
            if edits:
                image_scale = _column(inputs["image_guidance"][i])
                out = unguided + scale * (guided - of_image[0]) + image_scale * (of_image[0] - unguided)
            else:
                out = unguided + scale * (guided - unguided)
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
