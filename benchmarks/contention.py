"""The time of an image on busy cores, or in a container with few of them, against a fair fraction of the cores.

    python -m benchmarks.contention                        the default model on PyTorch
    python -m benchmarks.contention --bundle DIR           and on the engines that run this bundle of it
    python -m benchmarks.contention --rounds 3 --keep      into the history of benchmarks/suite.py

Eight steps of the default model, in a process for each policy of threads that wait, in turns, where the machine is

    quiet      nothing else runs (the user has to ensure that)
    busy       two processes a core do nothing but count
    quota 1    a control group (root, cgroup v1 or v2) allows one CPU of all

Of C cores with L counting, T threads get T / (L + T) of the time when all are always ready: a picture takes (L + T) / C
times as long as on T of C quiet cores. That is the fair time, and the report is the ratio of the measured time to it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLICIES: dict[str, dict[str, str]] = {
    "fastldm": {},  # set by `import fastldm`
    "GNU's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
CHILD = """
import json, sys, time
import fastldm
from fastldm import heap
heap.keep()
model, backend, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipe = fastldm.Pipeline.from_pretrained(model, device="cpu", backend=backend)
pipe("a red apple", num_inference_steps=8, seed=0)
print(json.dumps([pipe("a red apple", num_inference_steps=8, seed=0).timings.total for _ in range(rounds)]))
"""


def image_seconds(model: str, backend: str, policy: str, images: int) -> float:
    """Seconds of an image, the median of `images` in one process after a warm-up."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = inherited | {"PYTHONPATH": str(ROOT)} | POLICIES[policy]
    command = [sys.executable, "-c", CHILD, model, backend, str(images)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return median(json.loads(done.stdout))


def _count() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    counting = [multiprocessing.Process(target=_count, daemon=True) for _ in range(processes)]
    for process in counting:
        process.start()
    time.sleep(0.2)
    try:
        yield
    finally:
        for process in counting:
            process.kill()
            process.join()


@contextlib.contextmanager
def quota(cpus: float) -> Iterator[None]:
    """Inside, this process and its children have a quota of so many CPUs. OSError where that is not allowed."""
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").is_file()
    parent = Path("/sys/fs/cgroup") if v2 else Path("/sys/fs/cgroup/cpu")
    group = parent / f"fastldm-{os.getpid()}"
    group.mkdir()
    try:
        if v2:
            (group / "cpu.max").write_text(f"{int(cpus * 100_000)} 100000")
        else:
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text(str(int(cpus * 100_000)))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            group.rmdir()


def measure(
    contenders: Sequence[tuple[str, str, str]], rounds: int, images: int, cores: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by situation and contender; all contenders are timed in every round."""
    load = 2 * cores
    situations = {"quiet": contextlib.nullcontext, f"busy with {load}": lambda: busy(load), "quota 1": lambda: quota(1)}
    results: dict[str, dict[str, list[float]]] = {}
    for situation, enter in situations.items():
        for _ in range(rounds):
            try:
                with enter():
                    for model, backend, policy in contenders:
                        seconds = image_seconds(model, backend, policy, images)
                        results.setdefault(situation, {}).setdefault(f"{backend}, {policy}", []).append(seconds)
                        print(f"{situation:16} {backend}, {policy}: {seconds:.3f} s", file=sys.stderr, flush=True)
            except OSError as error:
                print(f"{situation}: not measured, {error}", file=sys.stderr)
                break
    return results


def table(results: dict[str, dict[str, list[float]]], cores: int) -> list[dict[str, Any]]:
    """A row for each contender and situation: seconds, and their ratios to the quiet and to the fair time."""
    rows = []
    for situation, times in results.items():
        load = int(situation.split()[-1]) if situation.startswith("busy") else 0
        for name, samples in times.items():
            quiet = median(results["quiet"][name])
            fair = {"quiet": 1.0, "quota 1": float(cores)}.get(situation, (load + cores) / cores)
            slower = median(samples) / quiet
            rows.append(
                {"situation": situation, "contender": name, "seconds": median(samples), "slower": slower, "fair": fair}
                | {"of_fair": slower / fair, "samples": samples}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle of the default model: engines take their turns too")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender (default: 3)")
    parser.add_argument("--pictures", type=int, default=5, help="of each process, after one more (default: 5)")
    parser.add_argument("--keep", action="store_true", help="add the run to benchmarks/results")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    contenders = [("default", "torch", policy) for policy in POLICIES]
    if args.bundle is not None:
        contenders += [(str(args.bundle), backend, "fastldm") for backend in ("onnxruntime", "openvino")]
    rows = table(measure(contenders, args.rounds, args.pictures, cores), cores)
    print("| situation | threads that wait | seconds | times quiet | of the fair share |\n|---|---|---|---|---|")
    for row in rows:
        figures = f"{row['seconds']:.3f} | {row['slower']:.2f} | {row['of_fair']:.2f}"
        print(f"| {row['situation']} | {row['contender']} | {figures} |")
    if args.keep:
        import torch

        from benchmarks.suite import add_run
        from fastldm.system import machine

        seconds = {f"{row['situation']}: {row['contender']}": row["seconds"] for row in rows}
        header = {"command": "python -m benchmarks.contention", "machine": machine(torch.device("cpu"))}
        add_run("contention", {**header, "cores": cores, "seconds": seconds, "table": rows})


if __name__ == "__main__":
    main()
