"""Bundles in eight bits, judged by their pictures: `fastldm export --quantize`, and a part of `fastldm verify`.

A bundle is made of another, in float32, in which the U-Net's network becomes one in eight bits (`export.quantize`):

    int8-weights    its weights alone: the file is a quarter, and what is multiplied are floats
    int8            also what its layers read: all convolutions, and of the linear layers those that rounding changes
                    least, as many as leave pictures of a few prompts a decibel above the gate

One step errs by a percent, and pictures are spoiled by less where errors add up over steps, so that the gate is of
pictures: the mean PSNR over 40 prompts that had no part in that, after eight steps, against the bundle in float32, must
be 40 dB. Those pictures lie in the bundle (goldens/quantized.safetensors), and `check` makes them anew on any backend.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, NamedTuple

import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastldm.checks import choice
from fastldm.errors import BundleError, EngineError, InputError
from fastldm.export import manifest as manifests
from fastldm.export import networks, quantize, whole_picture
from fastldm.export.bundle import PICTURE, QUANTIZED, Bundle
from fastldm.export.cache import hash_files
from fastldm.export.engine import MANIFEST, Engine, open_engine
from fastldm.export.engines import FOLDER as ENGINES
from fastldm.export.graphs import WHOLE_PICTURE
from fastldm.export.parity import FACTOR, Difference, difference, worst
from fastldm.export.quantize import MODES, Range
from fastldm.export.spec import DATA, NetworkSpec
from fastldm.export.verify import Goldens, fixed_image
from fastldm.image import to_pixels
from fastldm.request import Request
from fastldm.runtime.complete import sample_request
from fastldm.runtime.stages import Stages
from fastldm.system import machine

CPU = torch.device("cpu")
GATE = 40.0  # dB, of the mean
MARGIN = 1.0  # dB above it, in the search
STEPS = 8
MAX_SIDE = 256  # pixels: pictures of the gate are no larger
_RUNS = 11
_CEILING = 100.0  # dB, of equal pictures
_OF_A_STEP, _OF_SEVERAL = 1.5, 3.0
"""How much of what the eight bits themselves change another computation may have: it changes as much, and what falls to
the other side of a rounding, which in pictures of several steps adds up differently."""

_CALIBRATION = ("a red apple", "a cat", "a house", "a bicycle")
_SEARCH = ("a banana", "a dog", "a castle", "a guitar", "a tree", "a bus", "a pizza", "an owl")
_THINGS = """
strawberry pear lemon pineapple watermelon tomato carrot broccoli potato mushroom bread hamburger cookie egg
horse cow pig mouse rabbit elephant lion bear monkey fish butterfly snake turtle octopus whale frog rose
sunflower rainbow snowflake mountain car train airplane rocket umbrella
"""
PROMPTS = tuple(f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in _THINGS.split())
"""Of the gate: plain things, which every model can draw."""


class Quality(NamedTuple):
    """The PSNR of pictures against float32, in dB."""

    mean: float
    worst: float

    def __str__(self) -> str:
        return f"mean {self.mean:.1f} dB, worst {self.worst:.1f}"


def make(bundle: Bundle, out: Path, mode: str, say: Callable[[str], object] = lambda text: None) -> Bundle:
    """Write a bundle in eight bits into a new folder. bundle: the same model's, in float32. say: gets a line for each
    thing that is done.

    InputError for a bundle that cannot be, and if `out` exists; BundleError if its pictures do not pass the gate: then
    nothing is written. It takes some 1,100 steps of the U-Net.
    """
    check_options(mode, out, bundle.manifest)
    partial = out.with_name(f".{out.name}.eight")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        entry = _write(bundle, partial, mode, say)
        quality = Quality(**entry["psnr"])
        if quality.mean < GATE:
            raise BundleError(
                f"in eight bits ({mode}) pictures are not the model's any more: {quality} against float32, and the "
                f"gate is a mean of {GATE:g} dB{'' if mode == MODES[0] else f': {MODES[0]} changes less'}"
            )
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(out)


def check_options(mode: str, out: Path, options: Mapping[str, Any]) -> None:
    """InputError for a mode that does not exist, a folder that does, or options of an export, or of a manifest, that
    eight bits do not go with."""
    if out.exists():
        raise InputError(f"{out} exists: give the bundle another name, or remove it")
    choice("quantize", mode, MODES)
    for name in ("fused_ops", "adapter_rank", "controls", QUANTIZED):
        if options.get(name):
            raise InputError(f"quantize does not go with {name}: leave one of them out")
    if options.get("dtype", "float32") != "float32":
        raise InputError(f"quantize starts from float32, not from {options['dtype']}: leave dtype out")


def summary(bundle: Bundle) -> str:
    """What a bundle's manifest says of its eight bits, in a line."""
    entry = bundle.manifest[QUANTIZED]
    before, after = (size / 2**20 for size in entry["bytes"])
    times = [f"{a / b:.2f} times as fast on {name}" for name, (a, b) in entry["seconds"].items()]
    text = f"in eight bits ({entry['mode']}): {Quality(**entry['psnr'])}; {before:.0f} to {after:.0f} MiB"
    return "; ".join(
        [f"{text}, {entry['layers_with_activations']} of {entry['layers']} layers read eight bits", *times]
    )


def check(bundle: Bundle, backend: str, device: torch.device, dtype: str | torch.dtype | None = None) -> Quality:
    """Make the pictures of the gate on a backend and compare them with those in float32, which the bundle has.
    BundleError if they do not pass, or are not there."""
    entry = bundle.manifest["quantized"]
    try:
        expected = load_file(bundle.goldens(QUANTIZED))["pictures"]  # (P, 3, H, W) uint8
    except (OSError, KeyError, SafetensorError) as error:
        raise BundleError(f"{bundle.folder} has no pictures of its gate ({error}): export the model again") from error
    stages = Stages(bundle.model, networks.load(bundle, backend, device, dtype), bundle.manifest["model"])
    quality = _quality(_pictures(stages, entry["prompts"]), expected)
    if quality.mean < GATE:
        raise BundleError(
            f"in eight bits on {backend} pictures are not the model's: {quality} against float32, and the gate is a "
            f"mean of {GATE:g} dB"
        )
    return quality


# ------------------------------------------------------------------------------------------------------- making it


def _write(bundle: Bundle, partial: Path, mode: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Write the bundle into `partial`. Returns what its manifest says of it."""
    name = "unet_step" if bundle.manifest["split"] else "unet"
    source, old = bundle.path(name), Goldens.read(bundle, name)
    replaced = {bundle.path(graph) for graph in bundle.graphs}
    replaced |= {source, source.with_name(DATA), bundle.folder / MANIFEST, bundle.folder / ENGINES}
    shutil.copytree(bundle.folder, partial, ignore=lambda at, names: [n for n in names if Path(at, n) in replaced])
    made = replace(bundle, folder=partial)

    say("pictures in float32 ...")
    watched, stages = _watched(bundle, name)
    with watched:
        _pictures(stages, _CALIBRATION)
        calibration = [inputs for inputs, _ in watched.calls]
        watched.calls.clear()
        for options in ({}, {"num_images_per_prompt": 2, "width": _side(stages, 1, 2)}):
            stages.make(_request(stages, _SEARCH[0], 0, num_inference_steps=2, **options))
        cases = [watched.calls[k] for k in (0, 1, -1)]
    expected = {prompts: _pictures(stages, prompts) for prompts in (_SEARCH, PROMPTS)}
    del watched, stages

    say(f"{name} in eight bits ...")
    graph = quantize.write_weights(source, partial / name)
    layers, chosen = quantize.layers(onnx.load(source, load_external_data=False)), list[str]()
    if mode == "int8":
        feeds = ({key: x.numpy() for key, x in inputs.items()} for inputs in calibration)
        ranges = quantize.observe(source, feeds)

        def search_quality(values: Sequence[str]) -> float:
            _activations(graph, ranges, values, made.path(name))
            return _quality(_pictures(_watched(made, name)[1], _SEARCH), expected[_SEARCH]).mean

        chosen = _search(layers, ranges, search_quality, say)
        _activations(graph, ranges, chosen, made.path(name))

    for each in bundle.graphs:
        whole_picture.write(made, each)

    say(f"{len(PROMPTS)} pictures, compared ...")
    _write_goldens(made, name, replace(old, cases=cases))
    stages = _watched(made, name)[1]
    quality = _quality(_pictures(stages, PROMPTS), expected[PROMPTS])
    say(str(quality))
    save_file({"pictures": expected[PROMPTS]}, made.goldens(QUANTIZED))
    del stages
    entry = {
        "mode": mode,
        "networks": [name],
        "layers": len(layers),
        "layers_with_activations": sum(layer.value in chosen for layer in layers),
        "bytes": [sum(path.stat().st_size for path in folder.iterdir()) for folder in (source.parent, partial / name)],
        "prompts": list(PROMPTS),
        "psnr": quality._asdict(),
        "seconds": _seconds(bundle.specs[name], source, made.path(name), calibration[0]),
        "machine": str(machine(CPU)["name"]),
    }
    files = {
        path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_files(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    head = {key: value for key, value in bundle.manifest.items() if key not in ("files", "sha256", "format")}
    manifests.write(partial, {**head, QUANTIZED: entry, "files": files})
    return entry


def _activations(graph: onnx.ModelProto, ranges: Mapping[str, Range], values: Iterable[str], path: Path) -> None:
    onnx.save(quantize.with_activations(graph, {value: ranges[value] for value in values}), path)


def _search(
    layers: Sequence[quantize.Layer],
    ranges: Mapping[str, Range],
    quality: Callable[[Sequence[str]], float],
    say: Callable[[str], object],
) -> list[str]:
    """What is read in eight bits: by convolutions all, and of the rest, those with the least noise first, as many as
    leave pictures above the gate."""
    convolutions = {layer.value for layer in layers if layer.op == "Conv"}
    rest = sorted({layer.value for layer in layers} - convolutions, key=lambda value: ranges[value].noise)
    first = sorted(convolutions)
    low, high, count = 0, len(rest) + 1, len(rest)
    while high - low > max(1, len(rest) // 16):
        found = quality([*first, *rest[:count]])
        say(f"{len(first)} + {count} of {len(rest)}: {found:.1f} dB")
        low, high = (count, high) if found >= GATE + MARGIN else (low, count)
        count = (low + high) // 2
    return [*first, *rest[:low]]


def _write_goldens(made: Bundle, name: str, goldens: Goldens) -> None:
    """Of a bundle with a network in eight bits, what another computation of it may differ by: of that network, and of
    all that it is a part of."""
    for network in (name, *made.graphs):
        engine = open_engine("onnxruntime", made.path(network), made.spec(network))

        def run(inputs: dict[str, Tensor], network: str = network, engine: Engine = engine) -> dict[str, Tensor]:
            outputs = engine(inputs)
            return {PICTURE: to_pixels(outputs["image"], "pt")} if network == WHOLE_PICTURE else outputs

        if network == name:
            _with_error(made, network, goldens, run, _OF_A_STEP)
        else:
            _with_error(made, network, Goldens.read(made, network), run, _OF_SEVERAL)
        engine.close()
    stages = _watched(made, name)[1]
    picture = Goldens.read(made, PICTURE)
    _with_error(made, PICTURE, picture, lambda inputs: {PICTURE: fixed_image(stages, inputs)}, _OF_SEVERAL)


def _with_error(
    made: Bundle, name: str, goldens: Goldens, run: Callable[[dict[str, Tensor]], dict[str, Tensor]], factor: float
) -> None:
    """Write goldens with so much of the error that the eight bits themselves have, added to that of each precision."""
    own: dict[str, Difference] = {}
    for inputs, expected in goldens.cases:
        actual = run(inputs)
        for key, x in expected.items():
            own[key] = worst(own.get(key, Difference.none()), difference(actual[key], x))
    sound = {
        precision: {key: _sum(own[key], rounding, factor) for key, rounding in errors.items()}
        for precision, errors in goldens.sound.items()
    }
    made.goldens(name).write_bytes(replace(goldens, sound=sound).to_bytes())


def _sum(own: Difference, rounding: Difference, factor: float) -> Difference:
    added = [a * factor / FACTOR + b for a, b in zip(own.values(), rounding.values(), strict=True)]
    added[2] = min(own.psnr, rounding.psnr)
    return Difference(*added)


def _seconds(spec: NetworkSpec, before: Path, after: Path, inputs: dict[str, Tensor]) -> dict[str, list[float]]:
    """The medians of a step in float and in eight bits, in turns, by backend and precision, of those installed."""
    found = {}
    for backend, precision in (("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")):
        try:
            engines = [open_engine(backend, path, spec, precision=precision) for path in (before, after)]
        except EngineError:  # not installed, or no bfloat16 on this CPU
            continue
        times: list[list[float]] = [[], []]
        for k in range(_RUNS):
            for engine, own in zip(engines, times, strict=True):
                start = perf_counter()
                engine(inputs)
                if k:
                    own.append(perf_counter() - start)
        found[f"{backend} {precision}"] = [median(own) for own in times]
        for engine in engines:
            engine.close()
        gc.collect()
    return found


# -------------------------------------------------------------------------------------------------------- pictures


class _Watched:
    """An engine, opened when it is first run, that keeps its inputs and outputs inside a `with`."""

    def __init__(self, path: Path, spec: NetworkSpec) -> None:
        self.specs, self._recording = (spec,), False
        self._engine = open_engine("onnxruntime", path, spec)
        self.calls: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._engine(inputs)
        if self._recording:
            self.calls.append(({key: x.clone() for key, x in inputs.items()}, outputs))
        return outputs

    def __enter__(self) -> _Watched:
        self._recording = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._recording = False

    def close(self) -> None:
        self._engine.close()


def _watched(bundle: Bundle, name: str) -> tuple[_Watched, Stages]:
    """A bundle's stages on ONNX Runtime, and the engine of a network among them."""
    watched = _Watched(bundle.path(name), bundle.specs[name])

    def opened(network: str) -> Engine:
        return watched if network == name else open_engine("onnxruntime", bundle.path(network), bundle.specs[network])

    loaded = networks.load(bundle, "onnxruntime", CPU, opened=opened)
    return watched, Stages(bundle.model, loaded, bundle.manifest["model"])


def _side(stages: Stages, axis: int, divisor: int = 1) -> int:
    """A picture's height (axis 0) or width (1) in pixels: the model's own, MAX_SIDE at most, or a part of it."""
    own, factor = stages.latents[0][axis], stages.vae.config.factor
    latent = min(own.best, MAX_SIDE // factor) // divisor // own.multiple_of * own.multiple_of
    return factor * max(latent, own.least)


def _request(stages: Stages, prompt: str, seed: int, **options: Any) -> Request:
    height, width = _side(stages, 0), _side(stages, 1)
    shared: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": STEPS, **options}
    shared |= sample_request(stages.spec, shared["height"], shared["width"], prompt)
    return Request(**{"seed": seed, "output_type": "pt", **shared})


def _pictures(stages: Stages, prompts: Sequence[str]) -> Tensor:
    """A picture of each, from the seed of its place: (P, 3, H, W) uint8."""
    made = [stages.make(_request(stages, prompt, seed)) for seed, prompt in enumerate(prompts)]
    return (torch.cat(made).float().cpu() * 255).round().to(torch.uint8)


def _quality(actual: Tensor, expected: Tensor) -> Quality:
    """Of pictures (P, 3, H, W) in uint8."""
    squares = (actual.double() - expected.double()).square().mean((1, 2, 3)) / 255**2
    decibels = [min(_CEILING, -10 * math.log10(max(square, 1e-10))) for square in squares.tolist()]
    return Quality(mean(decibels), min(decibels))
