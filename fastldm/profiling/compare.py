"""fastldm beside what one would otherwise pick: the same weights and inputs, in processes that take turns.

Each contender (contender.py) is a process of its own, so that threads, caches and settings of one are not another's.
All keep their heap, as the fastldm command does (heap.py): where malloc does as it likes, diffusers' float32 step of
SD1.5 takes a third longer in some processes than in others. All are loaded, have run once and are compared with the
first before anything is timed. Then they work one after the other, in an order that turns round, and each round gives a
ratio to the first: other work on the machine slows all of a round alike. Where memory does not hold all at once they
come in groups, each with the first. Those that draw random weights load side by side, for that is no load that anybody
waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np
import torch

from fastldm.errors import EngineError, InputError
from fastldm.export.backends import BACKENDS, takes_several_steps
from fastldm.planning import memory
from fastldm.system import CHECKOUT

RANDOM = "random SD1.5"
"""SD1.5's U-Net at its full size with seeded random weights: no file is read, and a step costs what it costs."""


@dataclass(frozen=True)
class Task:
    """What every contender does."""

    model: str  # a diffusers folder, "default", or RANDOM
    what: Literal["step", "picture"]  # one guided evaluation of the U-Net, or prompt to picture
    width: int  # in pixels
    height: int
    sampler: str  # a scheduler's class name in diffusers
    steps: int
    guidance: float
    threads: int
    prompt: str = "a red apple"
    batch: int = 1  # pictures
    tokens: int = 77  # of the step's text
    seed: int = 0


@dataclass(frozen=True)
class Contender:
    name: str  # see contender.py
    dtype: str
    backend: str = "torch"  # of fastldm
    bundle: str | None = None
    note: str = ""  # "split"
    python: str | None = None  # the interpreter that runs it, this one when None

    def __str__(self) -> str:
        backend = f" on {self.backend}" if self.name == "fastldm" else ""
        return " ".join(filter(None, [f"{self.name}{backend}", self.note, self.dtype]))


@dataclass(frozen=True)
class Row:
    """What a contender did. Times in seconds."""

    contender: Contender
    seconds: tuple[float, ...]  # of each round
    ratios: tuple[float, ...]  # of each round, how many times faster than the first contender
    load: float | None  # None where others were loading too
    first: float  # the first run, compilation included
    peak: int  # bytes of memory
    difference: float | None  # max |x - first's| / max |first's|, or of 1 for pictures; None where it is not finite
    wrong: bool
    failure: str = ""

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The quarter and three quarters of the rounds' ratios."""
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without this machine's paths."""
        bundle = self.contender.bundle and Path(self.contender.bundle).name
        contender = {**asdict(self.contender), "bundle": bundle, "title": str(self.contender)}
        del contender["python"]
        row = {**asdict(self), "contender": contender}
        return row if self.failure else {**row, "median": self.median, "ratio": self.ratio, "spread": self.spread}


# Relative errors of a step, absolute ones of a picture in 0..1: float32 sums in another order. What bfloat16 may do to
# a picture depends on steps and prompt; a wrong picture is half of all levels off, or more.
TOLERANCES = {("step", "float32"): 1e-3, ("picture", "float32"): 2 / 255}
BFLOAT16_TOLERANCES = {"step": 0.1, "picture": 0.35}


def compare(
    task: Task, contenders: Sequence[Contender], rounds: int, on_event: Callable[[str], object] = lambda text: None
) -> list[Row]:
    """Rows in the order of the contenders, the first of which all are compared with.

    on_event: told what happens, in words. Raises EngineError where the first contender cannot run.
    """
    first, *remaining = contenders
    rows: dict[Contender, Row] = {}
    free = memory.free_bytes(torch.device("cpu"))
    while True:
        with ExitStack() as stack:
            count = _side_by_side(task, [first, *remaining], free)
            started, remaining = [first, *remaining[: count - 1]], remaining[count - 1 :]
            group = [stack.enter_context(_running(task, contender, on_event)) for contender in started]
            for process in group:
                process.wait(alone=count == 1)
            for process in group:
                process.warm_up()
            base = group[0]
            _check(base)
            while remaining and (len(group) == 1 or _has_room(free, group)):
                group.append(stack.enter_context(_running(task, remaining.pop(0), on_event)))
                group[-1].wait()
                group[-1].warm_up()
            for turn in range(rounds):
                for process in group[:: -1 if turn % 2 else 1]:
                    process.run()
                    _check(base)
                on_event(f"round {turn + 1} of {rounds}")
            expected = base.output()
            for process in group:
                rows.setdefault(process.contender, process.row(base, expected, task))
        if not remaining:
            return [rows[contender] for contender in contenders]


def _side_by_side(task: Task, contenders: Sequence[Contender], free: int | None) -> int:
    """How many of these load at once, one at least."""
    if task.model != RANDOM:
        return 1
    totals = accumulate(_random_bytes(contender) for contender in contenders)
    return max(1, sum(free is None or needed <= free for needed in totals))


def _random_bytes(contender: Contender) -> int:
    """What a contender takes of random weights: 860 million, ours also in the layout of its kernels, and a step."""
    weights = 860_000_000 * (4 if contender.dtype == "float32" else 2)
    return weights * (2 if contender.name == "fastldm" else 1) + 10**9


def _check(base: _Process) -> None:
    """Whoever dies is out and the others go on, but for the first, without which there is no ratio."""
    if base.failure:
        raise EngineError(f"{base.contender} cannot run: {base.failure}")


def _has_room(free: int | None, running: Sequence[_Process]) -> bool:
    """Whether one more fits, half as large again as the largest of these, into what was free before there was any.

    What is free now says less: the system calls pages of mapped weights free, and reads them anew for each run.
    """
    peaks = [process.peak for process in running]
    return free is None or free - sum(peaks) > 1.5 * max(peaks)


class _Process:
    def __init__(self, task: Task, contender: Contender, folder: Path) -> None:
        self.contender, self._folder = contender, folder
        self.seconds: list[float] = []
        self.load: float | None = 0.0
        self.first, self.peak, self.failure = 0.0, 0, ""
        arguments = json.dumps({"task": asdict(task), "contender": asdict(contender)})
        root = str(CHECKOUT)
        environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._errors = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            [contender.python or sys.executable, "-m", "fastldm.profiling.contender", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=folder,
        )

    def wait(self, *, alone: bool = True) -> None:
        """Until it has loaded, alone or beside others."""
        with self._failing():
            loaded = self._reply()["loaded"]
            self.load = loaded if alone else None

    def warm_up(self) -> None:
        """Two runs that do not count: buffers of the second run are not those of the first."""
        self.run()
        self.run()
        self.first = self.seconds[0] if self.seconds else 0.0
        self.seconds.clear()

    def run(self) -> None:
        """Unless it has failed."""
        if self.failure:
            return
        with self._failing():
            reply = self._ask("run")
            self.seconds.append(reply["seconds"])
            self.peak = reply["peak"]

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            self.failure = str(error)

    def output(self) -> np.ndarray:
        path = self._folder / "output.npy"
        self._ask(f"save {path}")
        return np.load(path)

    def row(self, base: _Process, expected: np.ndarray, task: Task) -> Row:
        if self.failure:
            return Row(self.contender, (), (), 0, 0, 0, None, True, self.failure)
        output = self.output()
        scale = float(np.abs(expected).max()) if task.what == "step" else 1.0
        comparable = output.shape == expected.shape and bool(np.isfinite(output).all())
        difference = float(np.abs(output - expected).max()) / scale if comparable else None
        allowed = TOLERANCES.get((task.what, self.contender.dtype), BFLOAT16_TOLERANCES[task.what])
        return Row(
            self.contender,
            tuple(self.seconds),
            tuple(theirs / ours for theirs, ours in zip(base.seconds, self.seconds, strict=True)),
            self.load,
            self.first,
            self.peak,
            difference,
            difference is None or difference > allowed,
        )

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what follows says why
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        """The next line of JSON; a library's own remarks on stdout are passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        status = self._process.wait()
        if status < 0:
            raise EngineError(f"it was killed by signal {-status}: was there too little memory?")
        self._errors.seek(0)
        message = self._errors.read().strip().splitlines() or [f"exit status {status}"]
        raise EngineError(message[-1])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def _running(task: Task, contender: Contender, on_event: Callable[[str], object]) -> Iterator[_Process]:
    on_event(f"loading {contender}")
    with tempfile.TemporaryDirectory() as folder:
        process = _Process(task, contender, Path(folder))
        try:
            yield process
        finally:
            process.close()


PEERS = ("diffusers", "diffusers-compile", "onnxruntime", "openvino", "optimum", "openvino-genai")
OF_A_BUNDLE = PEERS[2:]
"""Peers that run what `fastldm export` wrote without --split."""


def contenders(
    peers: Sequence[str],
    bundles: Sequence[str],
    dtypes: Sequence[str],
    backend: str = "all",
    pythons: Mapping[str, str] | None = None,
) -> list[Contender]:
    """The peers and fastldm on everything that these bundles run on, each in each of the dtypes it has.

    backend: of fastldm; "all" is every one of a CPU.
    peers: some of PEERS; the first is what all others are compared with, in float32. Raises InputError for a peer that
    needs a bundle that was not split where there is none.
    pythons: peer -> an interpreter that has it, where that is not this one.
    """
    from fastldm.export.bundle import Bundle

    folders = [Path(bundle).expanduser().absolute() for bundle in bundles]
    manifests = {str(folder): Bundle.read(folder).manifest for folder in folders}
    requirements = {"split": False, "dtype": "float32", "fused_ops": False}
    unsplit = next((path for path, manifest in manifests.items() if requirements.items() <= manifest.items()), None)
    result = []
    for peer in peers:
        if peer in OF_A_BUNDLE and unsplit is None:
            raise InputError(f"{peer} runs a bundle: give one that was exported in float32 without --split as --bundle")
        contender = Contender(
            peer, "float32", bundle=unsplit if peer in OF_A_BUNDLE else None, python=(pythons or {}).get(peer)
        )
        as_exported = peer in ("onnxruntime", "optimum")  # ONNX Runtime computes in what it reads
        result += [replace(contender, dtype=dtype) for dtype in (dtypes[:1] if as_exported else dtypes)]
    result += [Contender("fastldm", dtype) for dtype in dtypes]
    for bundle, manifest in manifests.items():
        note = "split" if manifest["split"] else "whole"
        for name, entry in BACKENDS.items():
            if "cpu" in entry.devices and (manifest.get("graphs") or not takes_several_steps(name)):
                computed = dtypes if entry.any_dtype else [manifest["dtype"]]
                result += [Contender("fastldm", dtype, name, bundle, note) for dtype in computed]
    return [contender for contender in result if contender.name != "fastldm" or backend in ("all", contender.backend)]
