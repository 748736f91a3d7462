"""What fp8 changes of a model's pictures, beside what the dtype changes that it usually runs in.

    python -m benchmarks.eight_bits                           the default model, all its linear layers in fp8: a minute
    python -m benchmarks.eight_bits -m ./sdxl --device cuda   a model as `Pipeline.enable_fp8` takes it

For each prompt: the RMSE, in levels of 255, between the picture in float32 and the one with fp8 (sums and the rest
float32 too), and between that in float32 and that in bfloat16. The gate: fp8 differs by 10 levels in the mean, 28 dB.
e4m3 has four significant bits and bfloat16 eight, so that some ten times bfloat16's difference is to be expected. The
default model's layers are too small to gain by fp8, and are taken here to judge the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.suite import machine_folder
from fastldm.pipeline import Pipeline
from fastldm.request import Request
from fastldm.runtime import eight_bits
from fastldm.system import machine

PROMPTS = (
    *("a red apple", "a cat", "a sailboat", "a house", "a 3d robot", "a noto rocket", "a pizza", "a bicycle"),
    *("a tree", "a guitar", "a snowflake", "a train", "a mushroom", "a 3d key", "a noto penguin", "an umbrella"),
)
GATE = 10.0  # levels


def pictures(pipe: Pipeline) -> NDArray[np.float32]:
    made = [pipe(prompt, seed=k, output_type="np").images for k, prompt in enumerate(PROMPTS)]
    return np.concatenate([np.asarray(images, np.float32) for images in made])


def levels(made: NDArray[np.float32], exact: NDArray[np.float32]) -> list[float]:
    """The RMSE of each picture, in levels of 255."""
    return [255 * float(np.sqrt(np.square(a - b).mean())) for a, b in zip(made, exact, strict=True)]


def measure(pipe: Pipeline, model: str) -> dict[str, Any]:
    """pipe: the model in float32, which has fp8 on afterwards."""
    exact = pictures(pipe)
    least = {"least_weight": 1, "least_rows": 1} if model == "default" else {}
    request = pipe.stages.complete(Request(prompt=PROMPTS[0], seed=100))
    layers = pipe.session.call(lambda: eight_bits.enable(pipe.stages, request, **least))
    eight = levels(pictures(pipe), exact)
    half = levels(pictures(Pipeline.from_pretrained(model, device=pipe.device, dtype="bfloat16")), exact)
    row: dict[str, Any] = {"layers": layers, "prompts": len(PROMPTS)}
    for name, values in (("fp8", eight), ("bfloat16", half)):
        row[name] = {f.__name__: round(f(values), 2) for f in (mean, median, max)}
    return row | {"ratio of means": round(mean(eight) / mean(half), 2), "gate": GATE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="default")
    parser.add_argument("--device")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype="float32")
    row = measure(pipe, args.model)
    print(json.dumps(row, indent=1))
    record = {"machine": machine(pipe.device), "model": pipe.name, **row}
    (machine_folder(pipe.device) / "eight_bits.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(row["fp8"]["mean"] > GATE)


if __name__ == "__main__":
    main()
