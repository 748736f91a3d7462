"""All that needs a GPU, in one command each; from a bare checkout, with no network and nothing installed but torch,
triton and pytest.

    python -m benchmarks.gpu first --out DIR          what has to be learnt first, in two times six minutes: ceilings,
                                                      checks, the step, ops against their rivals, tests, pictures
    python -m benchmarks.gpu first --out DIR --half 1     the first half, worth having alone; then --half 2 --resume DIR
    python -m benchmarks.gpu first --out DIR --dry    the same on a CPU with tiny shapes, in two minutes: a rehearsal
    python -m benchmarks.gpu page DIR                 results that came back, into benchmarks/results/GPU
    python -m benchmarks.gpu test                     the tests on the device, then every op at its smallest shapes
                                                      under compute-sanitizer
    python -m benchmarks.gpu bench                    the ladder from eager to captured steps, then every op's
                                                      benchmark, most important first
    python -m benchmarks.gpu peers --wheels DIR       the ladder with diffusers, eager and compiled, from wheels that
                                                      were carried along: pip download -d DIR --no-deps diffusers ...

`first` writes results.jsonl, a row the moment that it is found, log.txt and tuned.json, and never ends because a stage
did. `bench` goes on where it was stopped: an op whose kernel has not changed since its results were written is passed
over.
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
    """Exit status 0 when all that there was time for ended well."""
    out: Path = args.out.resolve()
    where = first.Where(out, args.dry)
    if args.resume is not None and args.resume.resolve() != out:
        out.mkdir(parents=True, exist_ok=True)
        for name in (stages.RESULTS, stages.LOG, "tuned.json"):
            if (args.resume / name).is_file():
                shutil.copyfile(args.resume / name, out / name)
    seconds = args.seconds or (SECONDS if args.half else 2 * SECONDS)
    plan = [stage for stage in first.stages(where, args.half) if args.stage is None or stage.name in args.stage]
    try:
        ended = stages.run(plan, out, seconds, resume=args.resume is not None, say=lambda text: print(text, flush=True))
    except FileExistsError as error:
        sys.exit(str(error))
    print(gpu_report.text(stages.read(out)))
    return 0 if all(how == "done" for how in ended.values()) else 1


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
        before = json.loads(file.read_text()) if file.exists() else {}
        if not force and before.get("whole") and before.get("source") == source(name):
            print(f"{name}: {file} is of this very code; --force measures again")
            continue
        left = deadline - time.monotonic()
        if left < 20:
            print(f"{name}: no time left; the same command goes on from here")
            return failed or 1
        print(f"== {name}", flush=True)
        try:
            command = [sys.executable, "-m", f"benchmarks.{name}", "--dtype", dtype, "--results", str(folder)]
            failed |= subprocess.run(command, cwd=ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {left:.0f} s; what it had found is in {file}")
            failed = 1
    return failed


def peers(wheels: Path, dtype: str, results: Path | None) -> int:
    """The ladder beside diffusers, which is installed next to the torch that is here and touches nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        found = sorted(map(str, wheels.glob("*.whl")))
        if not found:
            sys.exit(f"there are no wheels in {wheels}: pip download -d {wheels} --no-deps diffusers transformers ...")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
        subprocess.run([*pip, *found], check=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder])}
        command = [sys.executable, "-m", "benchmarks.ladder", "--dtype", dtype, "--compile"]
        command += ["--results", str(results)] if results else []
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    one = commands.add_parser("first", help="what has to be learnt first")
    one.add_argument("--out", type=Path, required=True, help="folder for what is found; at most three files")
    one.add_argument("--seconds", type=float, help=f"stop after so many  [default: {SECONDS} a half]")
    one.add_argument("--half", type=int, choices=(1, 2), help="only this one  [default: both]")
    one.add_argument("--resume", type=Path, metavar="DIR", help="go on from what this folder has; it may be --out")
    one.add_argument("--stage", action="append", help="only this stage; may be repeated")
    one.add_argument("--dry", action="store_true", help="a rehearsal on a CPU: its figures mean nothing")

    one = commands.add_parser("stage", help="one stage, as `first` starts it")
    one.add_argument("name", choices=first.STAGES)
    one.add_argument("arguments", nargs="*")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--dry", action="store_true")

    one = commands.add_parser("page", help="results that came back, into benchmarks/results/GPU")
    one.add_argument("folder", type=Path)
    one.add_argument("--results", type=Path, default=RESULTS, help="where the folder of the GPU is made")

    commands.add_parser("test", help="the tests on the device")
    for name, said in (("bench", "the ladder and every op's benchmark"), ("peers", "the ladder with diffusers")):
        one = commands.add_parser(name, help=said)
        one.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
        one.add_argument("--results", type=Path, help="folder for the JSON  [default: benchmarks/results/GPU]")
    one.add_argument("--wheels", type=Path, required=True, help="the folder of the peers' wheels")
    one = commands.choices["bench"]
    one.add_argument("--seconds", type=float, default=470, help="stop after so many (default: 470)")
    one.add_argument("--force", action="store_true", help="measure again what has results")
    args = parser.parse_args()

    if args.what == "page":
        try:
            print(gpu_report.publish(args.folder, args.results))
        except FileNotFoundError as error:
            sys.exit(str(error))
        return
    if args.what == "first":
        sys.exit(run_first(args))
    if args.what == "stage":
        first.run_stage(args.name, args.arguments, first.Where(args.out, args.dry))
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    if args.what == "test":
        sys.exit(test())
    if args.what == "bench":
        sys.exit(bench(args.seconds, args.dtype, args.force, args.results))
    sys.exit(peers(args.wheels, args.dtype, args.results))


if __name__ == "__main__":
    main()
