"""What a profile says: the time of an image stage by stage and op by op, how far each op is from what the machine can
do, and the one change that would help most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from fastldm.planning.timing import Ceilings

BUSY = 1.5
"""The slowest tenth of the images takes this many times as long as the fastest where other work keeps the machine
busy."""
OUTSIDE = "outside ops"

STAGES = {
    "check weights": "whether somebody changed them",
    "tokenise": "prompts to tokens, and their states to rows",
    "text": "the encoders",
    "conditions": "keys and values of the text, time rows of all steps",
    "noise": "the sampler's table, all noise",
    "admit": "into the batch",
    "step": "the U-Net and the sampler",
    "decode": "latents to pictures",
    "PNG": "pictures to files",
    "session": "what is left of the wall clock: queues, threads",
}
"""Spans whose time is their own, and what each is."""
NETWORKS = {"text": "text encoder", "conditions": "U-Net's once", "step": "U-Net", "decode": "VAE"}
"""Stages that run networks -> the names of those."""


@dataclass(frozen=True)
class Spread:
    """Statistics of a time that was measured repeatedly, in seconds."""

    median: float
    p90: float
    p99: float
    least: float
    most: float
    mean: float
    """Means of stages add up to that of the image; medians do not where a machine is busy."""
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        ordered = sorted(times)

        def at(fraction: float) -> float:
            position = fraction * (len(ordered) - 1)
            low = int(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(at(0.5), at(0.9), at(0.99), ordered[0], ordered[-1], fmean(ordered), len(ordered))


@dataclass(frozen=True)
class Stage:
    """A stage of an image. device: between two events on a GPU, None on a CPU."""

    name: str
    note: str
    host: Spread
    device: Spread | None

    @property
    def seconds(self) -> float:
        return (self.device or self.host).median


@dataclass(frozen=True)
class Row:
    """All calls of one op in one stage of an image; `OUTSIDE` is the stage's time outside ops, and an engine has one
    row for each network."""

    stage: str
    name: str
    calls: int
    seconds: float
    share: float  # of the stage
    flop: int
    bytes: int
    floor: float  # seconds: the least that the ceilings allow, call by call
    paths: dict[str, int]  # what served the calls, and why


@dataclass(frozen=True)
class Event:
    """A named range of the image that took the median time, for a trace."""

    name: str
    stage: str
    track: Literal["host", "device"]
    start: float  # seconds from the image's start
    seconds: float
    op: bool


@dataclass(frozen=True)
class Profile:
    about: dict[str, Any]
    """The workload and the machine."""
    first: dict[str, float]
    """Seconds that are spent once: "compile" is what the first image took longer than later ones, for kernels, plans
    and layouts, and on a GPU for the graph of its step; "capture" what the third did, for those of text and decoder."""
    wall: Spread
    """An image from its prompt to its file."""
    stages: tuple[Stage, ...]
    """They add up to `wall`, image by image."""
    step: Spread
    """Over all steps: the device's time on a GPU."""
    steps: tuple[Spread, ...]
    """Of each step."""
    rows: tuple[Row, ...]
    """Of all stages that run networks; the rows of a stage add up to it."""
    ceilings: Ceilings
    operations: dict[str, int]
    """Float operations of one evaluation of the U-Net for all rows of the batch: those of each step, and those that are
    computed once or never."""
    memory: dict[str, int]
    """Bytes, planned and measured."""
    events: tuple[Event, ...] = field(repr=False)

    def of(self, stage: str) -> list[Row]:
        """The rows of a stage, the slowest first."""
        return sorted((row for row in self.rows if row.stage == stage), key=lambda row: -row.seconds)

    def to_dict(self) -> dict[str, Any]:
        """All but the events, as plain data."""
        fields = {name: value for name, value in asdict(self).items() if name != "events"}
        return {**fields, "ceilings": self.ceilings._asdict(), "advice": self.advice}

    @property
    def advice(self) -> str:
        """The one change that would help most, in a sentence, with a remark where the machine was too busy to tell."""
        least, most = self.wall.least, self.wall.p90
        if most < BUSY * least:
            return f"{_advice(self)}."
        return (
            f"{_advice(self)} (but pictures took {1e3 * least:.0f} to {1e3 * most:.0f} ms: "
            "profile again when nothing else runs here)."
        )


def _advice(profile: Profile) -> str:
    """About the op or stage that loses most time: to its floor where it has one, all of it otherwise."""
    ops = [(row.seconds - row.floor, row.stage, row) for row in profile.rows]
    stages = [(stage.seconds, stage.name, None) for stage in profile.stages if stage.name not in NETWORKS]
    _, stage, row = max([*ops, *stages], key=lambda entry: entry[0])
    image = profile.wall.median
    if row is None:
        lost = next(seconds for seconds, name, _ in stages if name == stage)
        return f"Most is lost in {stage}, {percent(lost, image)} of a picture: {_HINTS[stage]}"
    text = f"Most is lost in {row.name} of {stage}, {percent(row.seconds, image)} of a picture"
    if row.floor:
        text += f" at {percent(row.floor, row.seconds)} of what this machine can do"
    return f"{text}: {_hint(profile, row)}"


def percent(part: float, total: float) -> str:
    return f"{100 * part / total:.0f}%"


def _hint(profile: Profile, row: Row) -> str:
    about = profile.about
    gpu, reasons = about["device"].startswith("cuda"), " ".join(row.paths)
    if about["backend"] != "torch":
        return "an engine's time is its own; fewer steps or a distilled model would help, or another --backend"
    if row.flop and about["dtype"] == "float32" != about["fastest_dtype"]:
        return f"--dtype {about['fastest_dtype']} makes such products faster here"
    if row.name == OUTSIDE:
        return f"much is spent between ops: more pictures at once (-n {2 * about['pictures']}) share it"
    if not gpu:
        return "on a CPU an engine fuses and packs what PyTorch runs op by op: fastldm export, then --backend openvino"
    if "triton is not installed" in reasons:
        return "its kernel is written in Triton: pip install triton"
    return "find its best launch configuration here, with fastldm tune"


_HINTS = {
    "check weights": "it is the price of noticing changed weights, which larger requests (-n) share",
    "tokenise": "shorter prompts have fewer windows",
    "noise": "noise is drawn on the CPU for all steps: a sampler that draws none needs less",
    "admit": "requests of more pictures (-n) share it",
    "PNG": "write JPEG or WebP files, or leave that to another thread",
    "session": "the host is busy with something else: stop that, or ask for more pictures at once (-n)",
}
