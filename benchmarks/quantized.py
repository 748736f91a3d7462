"""What eight bits cost and save: sizes, pictures, named things, and the time of a step against both float precisions.

    python -m benchmarks.quantized FOLDER --data data.pt       the default model; the training pictures judge its things
    python -m benchmarks.quantized FOLDER --step BUNDLE        the step of any float32 bundle that was exported split

Of the default model: its float32 bundle and those of both modes, made as `fastldm export --quantize` makes them; the
PSNR of the gate's forty pictures; and for all its names, whether the picture's nearest training picture is of that name
(`benchmarks.default_model`). The gate: 40 dB in the mean, and one point of names.

Of a step: files in turns in one process, medians and minima, on OpenVINO and ONNX Runtime. Beside the modes, a file in
which all layers read eight bits, which is what a search of layers could gain at most: its pictures are not judged. With
--step the weights may be random, and what layers read is observed in steps of noise: times alone are of interest. The
size is two rows of --latents a side.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.default_model import Judge, Nearest, Pictures
from benchmarks.suite import machine_folder
from fastldm.errors import EngineError
from fastldm.export import quantize, writing
from fastldm.export.bundle import Bundle
from fastldm.export.engine import open_engine
from fastldm.export.spec import NetworkSpec, sample
from fastldm.loading import spec as loading
from fastldm.pipeline import Pipeline
from fastldm.profiling import quantized
from fastldm.system import machine

CPU = torch.device("cpu")
PRECISIONS = (("openvino", "bfloat16"), ("openvino", "float32"), ("onnxruntime", "float32"))


class Exported:
    """A bundle as `benchmarks.default_model` asks for pictures."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.pipe = Pipeline.from_pretrained(folder, backend=backend, device="cpu", dtype="float32")

    def generate(self, prompts: list[str], seeds: list[int], steps: int) -> Pictures:
        return np.asarray(self.pipe(prompt=prompts, seed=seeds, num_inference_steps=steps, output_type="np").images)

    def reconstruct(self, pictures: Pictures) -> Pictures:
        raise NotImplementedError


def default_bundles(folder: Path) -> dict[str, Bundle]:
    """The default model's, by mode, made where they are not there."""
    float32 = folder / "float32"
    found = {"float32": writing.export(loading.describe("default"), float32, source="default", split=True)}
    for mode in quantize.MODES:
        out = folder / mode
        found[mode] = Bundle.open(out) if out.exists() else quantized.make(found["float32"], out, mode, say=print)
    return found


def named(bundles: Mapping[str, Bundle], data: Path, backend: str) -> dict[str, float]:
    """The percentage of all names whose picture is nearest to a training picture of theirs."""
    loaded = torch.load(data)
    names = {i: f"a {concept['names'][0]}" for i, concept in enumerate(loaded["concepts"])}
    nearest = Nearest(loaded["pictures"].permute(0, 1, 3, 4, 2).numpy())
    rates = {}
    for mode, bundle in bundles.items():
        rates[mode] = Judge(Exported(bundle.folder, backend), nearest).gate(mode, 0, names).value
        print(f"{mode}: {rates[mode]:.2f}% of {len(names)} names", flush=True)
    return rates


def files(source: Path, spec: NetworkSpec, folder: Path, inputs: list[dict[str, torch.Tensor]]) -> dict[str, Path]:
    """A network's file in float, with weights in int8, with what convolutions read too, and with what all read."""
    weights, convolutions, everything = (folder / name / "model.onnx" for name in ("weights", "convolutions", "all"))
    if not everything.exists():
        ranges = quantize.observe(source, [{name: x.numpy() for name, x in own.items()} for own in inputs])
        layers = quantize.layers(onnx.load(source, load_external_data=False))
        graph = quantize.write_weights(source, weights.parent)
        for path, ops in ((convolutions, ("Conv",)), (everything, ("Conv", "MatMul"))):
            path.parent.mkdir()
            path.with_name("model.onnx_data").hardlink_to(weights.with_name("model.onnx_data"))
            values = {layer.value for layer in layers if layer.op in ops}
            onnx.save(quantize.with_activations(graph, {value: ranges[value] for value in values}), path)
    return {"float": source, "int8-weights": weights, "convolutions": convolutions, "all layers": everything}


def times(
    paths: Mapping[str, Path], spec: NetworkSpec, inputs: dict[str, torch.Tensor], runs: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of a step, in turns, by backend and precision and by file; and the ratio to the file in float."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for backend, precision in PRECISIONS:
        try:
            engines = {name: open_engine(backend, path, spec, precision=precision) for name, path in paths.items()}
        except EngineError as error:
            print(f"{backend} {precision}: {error}")
            continue
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for k in range(runs + 1):
            for name, engine in engines.items():
                start = perf_counter()
                engine(inputs)
                seconds[name] += [perf_counter() - start] if k else []
        rows = found[f"{backend} {precision}"] = {
            name: {
                "minimum": min(own),
                "median": median(own),
                "times as fast": median(a / b for a, b in zip(seconds["float"], own, strict=True)),
            }
            for name, own in seconds.items()
        }
        for name, row in rows.items():
            text = f"{row['minimum'] * 1e3:9.1f} {row['median'] * 1e3:9.1f} ms {row['times as fast']:6.2f} times"
            print(f"{backend:12}{precision:9} {name:14}{text}", flush=True)
        for engine in engines.values():
            engine.close()
        del engines
        gc.collect()
    return found


def step_of(bundle: Bundle, latents: int | None) -> tuple[Path, NetworkSpec, list[dict[str, torch.Tensor]]]:
    """The step's file and spec, and inputs of two rows."""
    spec = bundle.specs["unet_step"]
    sides = {"height": latents or spec.axes["height"].best, "width": latents or spec.axes["width"].best}
    return bundle.path("unet_step"), spec, [sample(spec, {"batch": 2, **sides}, seed=k) for k in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for bundles and files")
    parser.add_argument("--data", type=Path, help="data.pt of `benchmarks.train_default_model data`")
    parser.add_argument("--step", type=Path, metavar="BUNDLE", help="time the step of this bundle alone")
    parser.add_argument("--latents", type=int, help="the side of what a step is timed with  [default: the model's]")
    parser.add_argument("--backend", default="openvino", help="that makes the pictures of names")
    parser.add_argument("--runs", type=int, default=30)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"machine": machine(CPU)}
    if args.step:
        path, spec, inputs = step_of(Bundle.read(args.step), args.latents)
        paths = files(path, spec, args.folder / "step", inputs)
    else:
        bundles = default_bundles(args.folder)
        for mode in quantize.MODES:
            entry = bundles[mode].manifest["quantized"]
            record[mode] = {key: entry[key] for key in ("bytes", "psnr", "layers", "layers_with_activations")}
            print(f"{mode}: {quantized.summary(bundles[mode])}")
        if args.data:
            record["names"] = named(bundles, args.data, args.backend)
        path, spec, inputs = step_of(bundles["float32"], args.latents)
        paths = files(path, spec, args.folder / "step", inputs) | {"int8": bundles["int8"].path("unet_step")}
    record["bytes"] = {
        name: sum(file.stat().st_size for file in path.parent.glob("model.onnx*")) for name, path in paths.items()
    }
    record["step"] = times(paths, spec, inputs[0], args.runs)
    name = "quantized_step.json" if args.step else "quantized.json"
    (machine_folder(CPU) / name).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
