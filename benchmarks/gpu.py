"""All that needs a GPU, in one command each; from a bare checkout, with no network and nothing installed but torch,
triton and pytest.

    python -m benchmarks.gpu test      the kernels' tests on the device, then the small ones under compute-sanitizer
    python -m benchmarks.gpu bench     the ladder from eager to captured steps, then every op's benchmark, most
                                       important first; results in benchmarks/results/GPU
    python -m benchmarks.gpu peers --wheels DIR     the ladder with diffusers, eager and compiled, from wheels that were
                                       carried along: pip download -d DIR --no-deps diffusers transformers ...

`bench` goes on where it was stopped: an op whose kernel has not changed since its results were written is passed over.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPS = ("attention", "group_norm", "conv", "linear", "step", "geglu", "layer_norm")  # in this order
MARKED = re.compile(
    r"^import ops$|\bmark\.gpu\b", re.MULTILINE
)  # `ops` runs a kernel wherever there is a device for it
SANITIZED = ("geglu", "layer_norm", "step")  # the sanitizer is some hundred times slower: the cheapest tests


def suite() -> list[str]:
    """The files of tests that a GPU has a say in: those of the ops first, then each with a test that is marked gpu."""
    ops = [f"tests/test_{op}.py" for op in OPS]
    found = sorted(path for path in (ROOT / "tests").glob("test_*.py") if MARKED.search(path.read_text("utf-8")))
    return [*ops, *(name for path in found if (name := f"tests/{path.name}") not in ops)]


def test() -> int:
    failed = _pytest([sys.executable, "-m", "pytest", "-q", "-m", "not full", *suite()])
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit): kernels ran without it")
        return failed
    files = [f"tests/test_{op}.py" for op in SANITIZED]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
    return failed or _pytest([*command, "-m", "not full", "-k", "kernel", *files])


def _pytest(command: list[str]) -> int:
    print(" ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def bench(seconds: float, dtype: str, force: bool) -> int:
    from benchmarks.harness import RESULTS, machine

    deadline, failed = time.monotonic() + seconds, 0
    if force or not (RESULTS / machine() / f"ladder-{dtype}.json").exists():
        print("== ladder", flush=True)
        command = [sys.executable, "-m", "benchmarks.ladder", "--dtype", dtype]
        try:
            failed |= subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            print("ladder: stopped; --model takes one at a time")
    for op in OPS:
        if importlib.util.find_spec(f"benchmarks.{op}") is None:
            continue
        file = RESULTS / machine() / f"{op}-{dtype}.json"
        if not force and file.exists() and json.loads(file.read_text()).get("source") == source(op):
            print(f"{op}: {file} is of this very kernel; --force measures again")
            continue
        left = deadline - time.monotonic()
        if left < 20:
            print(f"{op}: no time left; the same command goes on from here")
            return failed or 1
        print(f"== {op}", flush=True)
        try:
            command = [sys.executable, "-m", f"benchmarks.{op}", "--dtype", dtype]
            failed |= subprocess.run(command, cwd=ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print(f"{op}: stopped after {left:.0f} s; the same command begins it again")
            return 1
    return failed


def peers(wheels: Path, dtype: str) -> int:
    """The ladder beside diffusers, which is installed next to the torch that is here and touches nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        found = sorted(map(str, wheels.glob("*.whl")))
        if not found:
            sys.exit(f"there are no wheels in {wheels}: pip download -d {wheels} --no-deps diffusers transformers ...")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
        subprocess.run([*pip, *found], check=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder])}
        command = [sys.executable, "-m", "benchmarks.ladder", "--dtype", dtype, "--compile"]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def source(op: str) -> str:
    """What an op's figures depend on, hashed."""
    files = [ROOT / "kernels" / name for name in (f"{op}.py", "dispatch.py", "tuned.json")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("test", "bench", "peers"))
    parser.add_argument("--wheels", type=Path, help="peers: the folder of their wheels")
    parser.add_argument("--seconds", type=float, default=470, help="bench: stop after so many (default: 470)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--force", action="store_true", help="bench: measure again what has results")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    if args.what == "peers":
        if args.wheels is None:
            parser.error("peers needs --wheels DIR")
        sys.exit(peers(args.wheels, args.dtype))
    sys.exit(test() if args.what == "test" else bench(args.seconds, args.dtype, args.force))


if __name__ == "__main__":
    main()
