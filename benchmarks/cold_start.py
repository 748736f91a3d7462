"""The cold start: `fastldm generate` with the default model, process start to PNG, and where the time goes.

    python -m benchmarks.cold_start

The full command is timed from outside, several times after a warm-up (so that files are in the cache); its stages are
timed in processes of their own that do the same with a timestamp after each stage. Medians are printed, and added to
the history of benchmarks/suite.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.suite import add_run
from fastldm.system import machine

ROOT = Path(__file__).resolve().parent.parent

PARTS = """
import json, sys, time
marks = [("start", float(sys.argv[1])), ("interpreter", time.time())]
from fastldm import heap
heap.keep()
import torch
marks.append(("import torch", time.time()))
from fastldm.image import save_result
from fastldm.pipeline import Pipeline
marks.append(("import fastldm", time.time()))
pipe = Pipeline.default()
marks.append(("load", time.time()))
result = pipe(sys.argv[2], seed=0)
marks.append(("picture", time.time()))
from pathlib import Path
save_result(result, [Path("part.png")], pipe.name)
marks.append(("write PNG", time.time()))
parts = {name: at - before for (_, before), (name, at) in zip(marks, marks[1:])}
timings = result.timings
parts |= {"  text": timings.text, "  steps": sum(timings.steps), "  decode": timings.decode}
print(json.dumps(parts))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each kind (default: 7)")
    args = parser.parse_args()

    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command_times: list[float] = []
    stage_times: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastldm", "generate", args.prompt, "--seed", "0", "-o", "a.png", "--force"]
        for run in range(args.runs + 1):
            start = time.time()
            subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
            elapsed = time.time() - start
            child = [sys.executable, "-c", PARTS, str(time.time()), args.prompt]
            output = subprocess.run(child, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout
            if run:  # the first only warms the file cache
                command_times.append(elapsed)
                stage_times.append(json.loads(output))

    series = {
        "whole command": command_times,
        **{name.strip(): [times[name] for times in stage_times] for name in stage_times[0]},
    }
    seconds = {name: [min(times), median(times), max(times)] for name, times in series.items()}
    for name, (low, mid, high) in seconds.items():
        print(f"{name:<16} median {mid:6.2f} s, {low:.2f} to {high:.2f} s in {args.runs} runs")
    command = f"fastldm generate {args.prompt!r}"
    add_run("cold-start", {"command": command, "machine": machine(torch.device("cpu")), "seconds": seconds})


if __name__ == "__main__":
    main()
