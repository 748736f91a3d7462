"""An image's generation parameters as text that other tools read too, in the form of AUTOMATIC1111's `parameters`.

    a red apple
    Negative prompt: worm
    Steps: 8, Sampler: DDIM, CFG scale: 2.5, Seed: 3, Size: 64x64, Model: "apples, v2", Version: fastldm 0.1.0

A value with a comma, a colon, a quote or a line break is a JSON string, as in AUTOMATIC1111. So is a prompt that would
otherwise be read as one of the other lines: nothing in a prompt or in a model's name can forge a field, and the text
reads back as the same request. Readers without support for quoted prompts show the JSON string.

Adapters are named with the short hashes of their files, as AUTOMATIC1111 and its extension for ControlNets do:

    Lora hashes: "sketch: 0f5d2b1c9a3e", TI hashes: "<smiley>: fff5d51ab655"
    ControlNet 0: "Module: none, Model: shape [ba21023c7054], Weight: 0.8, Guidance Start: 0, Guidance End: 1, ..."
    ControlNet 1: "Module: ip-adapter_clip_sd15, Model: ip-adapter_sd15 [32cd8f7f01ab], Weight: 0.6"

Commas and colons, which part the items of such a list, are left out of names, as there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastldm import checks
from fastldm.errors import InputError

if TYPE_CHECKING:
    from fastldm.request import Request

_NEGATIVE = "Negative prompt:"
_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_LABELS = {
    **{name: name.upper() for name in ("ddpm", "ddim", "plms", "dpm2", "lms", "deis", "lcm", "tcd")},
    **{name: name.upper() for name in ("dpm++ 2m", "dpm++ 2m sde", "dpm++ 3m", "dpm++ 3m sde", "dpm++ 2s", "dpm++ 3s")},
    **{"dpm++ sde": "DPM++ SDE", "dpm++ 2s a": "DPM++ 2S a", "heun++ 2": "Heun++ 2", "ipndm": "IPNDM"},
    **{"dpm++ 2m sde heun": "DPM++ 2M SDE Heun", "dpm fast": "DPM fast", "sa solver": "SA Solver"},
    **{"ddim inverse": "DDIM Inverse", "dpm++ 2m inverse": "DPM++ 2M Inverse", "dpm++ 3m inverse": "DPM++ 3M Inverse"},
    **{"er sde": "ER SDE", "seeds 2": "SEEDS 2", "gradient estimation": "Gradient Estimation"},
    **{"euler cfg++": "Euler CFG++", "euler a cfg++": "Euler a CFG++", "dpm++ 2m cfg++": "DPM++ 2M CFG++"},
    **{
        "ddim cfg++": "DDIM CFG++",
        "dpm++ 2s a cfg++": "DPM++ 2S a CFG++",
        "res multistep cfg++": "Res Multistep CFG++",
    },
    **{"res multistep a cfg++": "Res Multistep a CFG++", "gradient estimation cfg++": "Gradient Estimation CFG++"},
    **{"res multistep": "Res Multistep", "res multistep a": "Res Multistep a"},
    **{"euler": "Euler", "euler a": "Euler a", "heun": "Heun", "dpm2 a": "DPM2 a", "unipc": "UniPC"},
}
SCHEDULE_LABELS = {
    **{kind: kind.capitalize() for kind in ("karras", "exponential", "beta", "simple", "normal")},
    **{"sgm uniform": "SGM Uniform", "ddim uniform": "DDIM", "kl optimal": "KL Optimal"},
    **{"ays": "Align Your Steps", "ays xl": "Align Your Steps XL"},
}
"""How AUTOMATIC1111 writes what is at the end of a sampler's name."""
_MIN_FIELDS = 3  # of the last line; a line with fewer is the end of a prompt
# Line breaks of any convention and invisible characters, except line feed, which prompts may contain.
_UNSAFE = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def parameters_text(
    request: Request,
    seed: int | None,
    model: str,
    extra: dict[str, str] | None = None,
    *,
    picture: int = 0,
    embeddings: Mapping[str, str] | None = None,
) -> str:
    """The parameters of image number `picture` of a completed request. seed: None if a caller's generator or latents
    were used. model: its name. extra: further fields. embeddings: of tokens of textual inversion the short hashes, as
    `Result.embeddings`; those that this image's texts have are named."""
    lines = [_prompt(_nth(request.prompt, picture, request.kept) or "")]
    negative = _nth(request.negative_prompt, picture, request.kept)
    if negative is not None:
        lines.append(f"{_NEGATIVE} {_prompt(negative)}")
    size = f"{request.width}x{request.height}" if request.width and request.height else None
    sampler, kind = split_sampler(request.sampler)
    values: dict[str, Any] = {
        "Steps": request.num_inference_steps,
        "Sampler": sampler,
        "Schedule type": kind,
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": size,
        "Model": model,
        "Denoising strength": request.strength if request.image is not None else request.hires_strength,
        # AUTOMATIC1111 counts from 1, diffusers from 0.
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,
    }
    hashes: dict[str, str] = getattr(request.adapters, "hashes", {})  # of a completed request
    if hashes:
        values["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in hashes.items())
    if request.adapters:
        values["Lora weights"] = json.dumps(dict(request.adapters), ensure_ascii=False)
    texts = [_nth(getattr(request, name), picture, request.kept) or "" for name in _TEXTS]
    tokens = [token for token in embeddings or {} if any(token.casefold() in text.casefold() for text in texts)]
    if embeddings and tokens:
        values["TI hashes"] = ", ".join(f"{_item(token)}: {embeddings[token]}" for token in tokens)
    units = [*getattr(request.control_image, "units", ()), *getattr(request.ip_adapter_image, "units", ())]
    values |= {f"ControlNet {k}": unit for k, unit in enumerate(units)}
    for name, (label, _) in _FIELDS.items():
        value = _as_tuple(getattr(request, name))
        if name.endswith("prompt_2"):
            value = _nth(value, picture, request.kept)
        if name == "upscaler_options" and value is not None:
            value = json.dumps(value, ensure_ascii=False)
        if name == "class_labels" and isinstance(value, tuple):  # one for each image
            value = value[picture]
        values[label] = None if value == _as_tuple(type(request).__dataclass_fields__[name].default) else value
    values |= extra or {}
    lines.append(", ".join(f"{key}: {_value(value)}" for key, value in values.items() if value is not None))
    return "\n".join(lines)


def parse_parameters(text: str) -> tuple[Request, dict[str, str]]:
    """The request of an image from text of `parameters_text` or AUTOMATIC1111, and the remaining fields by name.

    The request has no images, latents and embeddings; the weights of controls, by name, and of IP-Adapters are in it,
    and their lines, which name the files, remain. InputError for an invalid value of a field.
    """
    from fastldm.request import Request

    lines, fields = _lines_and_fields(text)
    kinds = {label.lower(): kind for kind, label in SCHEDULE_LABELS.items()} | {"automatic": ""}
    if (kind := fields.get("Schedule type", "").lower()) in kinds and "Sampler" in fields:
        fields["Sampler"] = f"{_unlabelled(fields['Sampler'])} {kinds[kind]}".rstrip()
        del fields["Schedule type"]
    negative_at = next((k for k, line in enumerate(lines) if line.lstrip().startswith(_NEGATIVE)), None)
    arguments: dict[str, Any] = {"prompt": _unquoted("\n".join(lines[:negative_at]))}
    if negative_at is not None:
        negative = "\n".join(lines[negative_at:]).lstrip().removeprefix(_NEGATIVE)
        arguments["negative_prompt"] = _unquoted(negative.removeprefix(" "))
    readers = _READERS | {label: (name, read) for name, (label, read) in _FIELDS.items()}
    for label in [label for label in fields if label in readers]:
        name, read = readers[label]
        value = fields.pop(label)
        try:
            arguments[name] = read(value)
        except (ValueError, RecursionError):
            raise InputError(f"the image's parameters have {label}: {checks.show(value)}, which is invalid") from None
    arguments |= _weights_of_units(fields)
    if any(name.startswith("hires_") for name in arguments) and "strength" in arguments:
        arguments["hires_strength"] = arguments.pop("strength")
    if "size" in arguments:
        arguments["width"], arguments["height"] = arguments.pop("size")
    return Request(**arguments), fields


def control_unit(module: str, model: str, short_hash: str | None, settings: Mapping[str, Any]) -> str:
    """A unit of AUTOMATIC1111's extension for ControlNets. module: what prepares its picture there. settings: further
    items, such as {"Weight": 1.0}."""
    digest = f" [{short_hash}]" if short_hash else ""
    items = {"Module": module, "Model": _item(model) + digest, **settings}
    return ", ".join(
        f"{name}: {value:g}" if isinstance(value, float) else f"{name}: {value}" for name, value in items.items()
    )


def _weights_of_units(fields: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a request from those of units that have the items of `control_unit`; others have none."""
    weights: dict[str, float] = {}
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    of_pictures: list[float] = []
    for label in [label for label in fields if re.fullmatch(r"ControlNet \d{1,4}", label)]:
        items = dict(item.split(": ", 1) for item in fields[label].split(", ") if ": " in item)
        name = re.sub(r" \[[0-9a-f]+\]$", "", items.get("Model", ""))
        if not name or "Weight" not in items:
            continue
        try:
            weight = float(items["Weight"])
            if items.get("Module", "").startswith("ip-adapter"):
                of_pictures.append(weight)
                continue
            weights[name] = weight
            starts[name], ends[name] = (
                float(items.get(f"Guidance {key}", default)) for key, default in (("Start", 0), ("End", 1))
            )
        except ValueError:
            raise InputError(
                f"the image's parameters have {label}: {checks.show(fields[label])}, which is invalid"
            ) from None
    found: dict[str, Any] = {"ip_adapter_scale": of_pictures} if of_pictures else {}
    if weights:
        found |= {"controlnet_conditioning_scale": weights, "adapter_conditioning_scale": weights}
    if any(starts.values()):
        found["control_guidance_start"] = starts
    if any(end != 1 for end in ends.values()):
        found["control_guidance_end"] = ends
    return found


def _item(name: str) -> str:
    """A name as an item of a list in a field."""
    return re.sub(r"[,:]", "", name)


def fields_of(text: str) -> dict[str, str]:
    """The fields by name of text that `parse_parameters` takes, as they are."""
    return _lines_and_fields(text)[1]


def _lines_and_fields(text: str) -> tuple[list[str], dict[str, str]]:
    """The lines of the prompts, and the fields of the last line, if it has any."""
    *lines, last = text.rstrip("\n").split("\n")
    fields = _fields(last)
    return (lines, fields) if len(fields) >= _MIN_FIELDS else ([*lines, last], {})


def sampler_label(name: str) -> str:
    """A sampler's name as AUTOMATIC1111 writes it: "DPM++ 2M" for "dpm++ 2m"; what it does not know as it is."""
    return _LABELS.get(name, name)


def split_sampler(sampler: str | None) -> tuple[str | None, str | None]:
    """AUTOMATIC1111's name of a sampler, and apart from it how its sigmas are spaced, if it says."""
    for kind in sorted(SCHEDULE_LABELS, key=len, reverse=True):
        if sampler is not None and sampler.endswith(f" {kind}"):
            return sampler_label(sampler.removesuffix(f" {kind}")), SCHEDULE_LABELS[kind]
    return None if sampler is None else sampler_label(sampler), None


def _unlabelled(label: str) -> str:
    return next((name for name, known in _LABELS.items() if known == label), label)


def _nth(texts: str | Sequence[str] | None, picture: int, each: int) -> str | None:
    """The text of one image of a batch: a single text is for all images, each text of a list for `each` images."""
    return texts if texts is None or isinstance(texts, str) else texts[picture // each]


def _prompt(text: str) -> str:
    forges = any(line.strip().startswith((_NEGATIVE, "Steps:")) for line in text.split("\n"))
    return _quoted(text) if forges or _UNSAFE.search(text) or text[:1] == '"' == text[-1:] else text


def _as_tuple(value: Any) -> Any:
    """Lists, arrays and tensors of numbers as tuples; other values unchanged."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_value(item) for item in value)
    if isinstance(value, float):  # with all digits; 7 for 7.0
        text = repr(float(value)).removesuffix(".0")
    else:
        text = str(value)
    needs_no_quotes = text and text == text.strip() and not re.search(r'[,:"\\\n]', text) and not _UNSAFE.search(text)
    return text if needs_no_quotes else _quoted(text)


def _quoted(text: str) -> str:
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


def _unquoted(text: str) -> str:
    if text[:1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text  # a prompt that starts with a quote


def _fields(line: str) -> dict[str, str]:
    fields, position = {}, 0
    while position < len(line):
        if match := _FIELD.match(line, position):
            fields[match[1]] = _unquoted(match[2].strip())
            position = match.end()
        else:
            position = line.find(",", position) + 1 or len(line)
    return fields


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(width), int(height)


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError
    return text == "True"


def _list_of(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(read(item) for item in text.split())


def _number(text: str) -> float | int:
    return float(text) if re.search(r"[.einEIN]", text) else int(text)


def _weights(text: str) -> dict[str, Any]:
    weights = json.loads(text)
    if not isinstance(weights, dict):
        raise ValueError
    return weights


def _upscaler_options(text: str) -> Any:
    options = json.loads(text)
    return tuple(options) if isinstance(options, list) else options


_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("num_inference_steps", int),
    "Sampler": ("sampler", _unlabelled),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Size": ("size", _size),
    "Denoising strength": ("strength", float),
    "Lora weights": ("adapters", _weights),
    "Clip skip": ("clip_skip", lambda text: max(int(text) - 1, 0)),
}
# Fields of Request that are written if they differ from their default: label and reader.
_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "prompt_2": ("Prompt 2", str),
    "negative_prompt_2": ("Negative prompt 2", str),
    "image_guidance_scale": ("Image CFG scale", float),
    "pag_scale": ("PAG scale", float),
    "pag_adaptive_scale": ("PAG adaptive scale", float),
    "pag_applied_layers": ("PAG layers", _list_of(str)),
    "apg_rescale": ("APG rescale", float),
    "apg_eta": ("APG eta", float),
    "clip_guidance_scale": ("CLIP guidance scale", float),
    "apg_momentum": ("APG momentum", float),
    "use_original_formulation": ("Original CFG formulation", _truth),
    "guidance_rescale": ("Guidance rescale", float),
    "guidance_interval": ("Guidance interval", _list_of(float)),
    "refiner_switch_at": ("Refiner switch at", float),
    "hires_scale": ("Hires upscale", float),
    "hires_height": ("Hires height", int),
    "hires_width": ("Hires width", int),
    "hires_steps": ("Hires steps", int),
    "hires_upscaler": ("Hires upscaler", str),
    "upscaler_options": ("Upscaler options", _upscaler_options),
    "denoising_start": ("Denoising start", float),
    "denoising_end": ("Denoising end", float),
    "eta": ("Eta", float),
    "padding_mask_crop": ("Padding mask crop", int),
    "noise_sampler_seed": ("Noise sampler seed", int),
    "s_churn": ("Sigma churn", float),
    "s_tmin": ("Sigma tmin", float),
    "s_tmax": ("Sigma tmax", float),
    "s_noise": ("Sigma noise", float),
    "reuse": ("Reuse", int),
    "noise_level": ("Noise level", int),
    "class_labels": ("Class", int),
    "prior_num_inference_steps": ("Prior steps", int),
    "prior_guidance_scale": ("Prior CFG scale", float),
    "super_res_num_inference_steps": ("Super-resolution steps", int),
    "timesteps": ("Timesteps", _list_of(_number)),
    "sigmas": ("Sigmas", _list_of(float)),
    "aesthetic_score": ("Aesthetic score", float),
    "negative_aesthetic_score": ("Negative aesthetic score", float),
    "literal_prompt": ("Literal prompt", _truth),
    "original_size": ("Original size", _list_of(int)),
    "crops_coords_top_left": ("Crop top left", _list_of(int)),
    "target_size": ("Target size", _list_of(int)),
    "negative_original_size": ("Negative original size", _list_of(int)),
    "negative_crops_coords_top_left": ("Negative crop top left", _list_of(int)),
    "negative_target_size": ("Negative target size", _list_of(int)),
}
