"""All that needs a GPU, in one command each; from a bare checkout, with no network and nothing installed but torch,
triton and pytest.

    python -m benchmarks.gpu first --out DIR          the most important measurements, twice six minutes: ceilings,
                                                      checks, the step, ops against their rivals, tests, images
    python -m benchmarks.gpu first --out DIR --half 1     the first half, useful alone; then --half 2 --resume DIR
    python -m benchmarks.gpu first --out DIR --dry    the same on a CPU with tiny shapes, in two minutes: a rehearsal
    python -m benchmarks.gpu page DIR                 results of another machine, into benchmarks/results/GPU
    python -m benchmarks.gpu test                     the tests on the device, then every op at its smallest shapes
                                                      under compute-sanitizer
    python -m benchmarks.gpu bench                    the ladder from eager to captured steps, then every op's
                                                      benchmark, most important first
    python -m benchmarks.gpu peers --wheels DIR       the ladder with diffusers, eager and compiled, from local wheels:
                                                      pip download -d DIR --no-deps diffusers ...

`first` writes results.jsonl, row by row, log.txt and tuned.json, and continues after a stage that failed. `bench`
continues where it was stopped: an op whose kernel has not changed since its results were written is skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import first, gpu_report, stages

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 350  # of a half of `first`


def run_first(args: argparse.Namespace) -> int:
    """Exit status 0 when all stages are done."""
    out: Path = args.out.resolve()
    context = first.Context(out, args.dry)
    if args.resume is not None and args.resume.resolve() != out:
        out.mkdir(parents=True, exist_ok=True)
        for name in (stages.RESULTS, stages.LOG, "tuned.json"):
            if (args.resume / name).is_file():
                shutil.copyfile(args.resume / name, out / name)
    seconds = args.seconds or (SECONDS if args.half else 2 * SECONDS)
    plan = [stage for stage in first.stages(context, args.half) if args.stage is None or stage.name in args.stage]
    try:
        ended = stages.run(plan, out, seconds, resume=args.resume is not None, say=lambda text: print(text, flush=True))
    except FileExistsError as error:
        sys.exit(str(error))
    print(gpu_report.text(stages.read(out)))
    return 0 if all(status == "done" for status in ended.values()) else 1


def test() -> int:
    failed = _run([sys.executable, "-m", "pytest", "-q", "-m", "not full", *first.suite()])
    tool = first.sanitizer()
    if shutil.which(tool) is None:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit): kernels ran without it")
        return failed
    with tempfile.TemporaryDirectory() as out:
        stage = [sys.executable, "-m", "benchmarks.gpu", "stage", "smallest", "--out", out]
        return failed or _run([tool, "--tool", "memcheck", "--error-exitcode", "9", *stage])


def _run(command: list[str]) -> int:
    print(" ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def bench(seconds: float, dtype: str, force: bool, results: Path | None) -> int:
    from benchmarks.harness import machine, source

    folder = results or RESULTS / machine()
    deadline, failed = time.monotonic() + seconds, 0
    for name in ("ladder", *first.op_modules()):
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            continue
        file = folder / f"{name}-{dtype}.json"
        previous = json.loads(file.read_text()) if file.exists() else {}
        if not force and previous.get("whole") and previous.get("source") == source(name):
            print(f"{name}: {file} is of this code; --force measures again")
            continue
        remaining = deadline - time.monotonic()
        if remaining < 20:
            print(f"{name}: no time left; the same command continues from here")
            return failed or 1
        print(f"== {name}", flush=True)
        try:
            command = [sys.executable, "-m", f"benchmarks.{name}", "--dtype", dtype, "--results", str(folder)]
            failed |= subprocess.run(command, cwd=ROOT, timeout=remaining).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {remaining:.0f} s; its results so far are in {file}")
            failed = 1
    return failed


def peers(wheels: Path, dtype: str, results: Path | None) -> int:
    """The ladder with diffusers, which is installed into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files:
            sys.exit(f"there are no wheels in {wheels}: pip download -d {wheels} --no-deps diffusers transformers ...")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
        subprocess.run([*pip, *files], check=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder])}
        command = [sys.executable, "-m", "benchmarks.ladder", "--dtype", dtype, "--compile"]
        command += ["--results", str(results)] if results else []
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = commands.add_parser("first", help="the most important measurements")
    sub.add_argument("--out", type=Path, required=True, help="folder for the results; at most three files")
    sub.add_argument("--seconds", type=float, help=f"stop after so many  [default: {SECONDS} a half]")
    sub.add_argument("--half", type=int, choices=(1, 2), help="only this half  [default: both]")
    sub.add_argument(
        "--resume", type=Path, metavar="DIR", help="continue from the results in this folder; it may be --out"
    )
    sub.add_argument("--stage", action="append", help="only this stage; may be repeated")
    sub.add_argument("--dry", action="store_true", help="a rehearsal on a CPU: its figures mean nothing")

    sub = commands.add_parser("stage", help="one stage, as `first` runs it")
    sub.add_argument("name", choices=first.STAGES)
    sub.add_argument("arguments", nargs="*")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--dry", action="store_true")

    sub = commands.add_parser("page", help="results of another machine, into benchmarks/results/GPU")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--results", type=Path, default=RESULTS, help="parent of the GPU's folder")

    commands.add_parser("test", help="the tests on the device")
    for name, text in (("bench", "the ladder and every op's benchmark"), ("peers", "the ladder with diffusers")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
        sub.add_argument("--results", type=Path, help="folder for the JSON  [default: benchmarks/results/GPU]")
    sub.add_argument("--wheels", type=Path, required=True, help="the folder of the peers' wheels")
    sub = commands.choices["bench"]
    sub.add_argument("--seconds", type=float, default=470, help="stop after so many  [default: 470]")
    sub.add_argument("--force", action="store_true", help="measure again what has results")
    args = parser.parse_args()

    if args.command == "page":
        try:
            print(gpu_report.publish(args.folder, args.results))
        except FileNotFoundError as error:
            sys.exit(str(error))
        return
    if args.command == "first":
        sys.exit(run_first(args))
    if args.command == "stage":
        first.run_stage(args.name, args.arguments, first.Context(args.out, args.dry))
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    if args.command == "test":
        sys.exit(test())
    if args.command == "bench":
        sys.exit(bench(args.seconds, args.dtype, args.force, args.results))
    sys.exit(peers(args.wheels, args.dtype, args.results))


if __name__ == "__main__":
    main()
