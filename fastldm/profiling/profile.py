"""Where the time of a picture goes, stage by stage and op by op, and how far each is from what this machine can do.

    made = profile(Pipeline.default(), "a red apple")
    made.rows[0].name, made.advice                 profile_report.py makes a table, a page and a trace of it

The pictures are made as anybody's are, by a session, while the pipeline's own functions are timed from around. A few
are not counted, then some are, then some more in which each op is timed too: what watching ops costs is in no other
figure. A time is the host's, from a clock that only goes forward; on a GPU it is also that between two events of the
stream, which no host waits for before the picture is done.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any, Literal

import torch

from fastldm import image as images
from fastldm.device import choose_dtype
from fastldm.kernels import dispatch, onednn
from fastldm.kernels.dispatch import Cost
from fastldm.models.vae import finish
from fastldm.pipeline import Pipeline
from fastldm.planning import dry, memory
from fastldm.planning.timing import Ceilings, ceilings
from fastldm.profiling.spans import Call, Clock, Span, replaced
from fastldm.request import Request, Result
from fastldm.runtime.graph import WARM_UPS
from fastldm.serving.session import Session
from fastldm.system import machine

SECONDS = 10.0
"""For about so long pictures are repeated, where no number of rounds is given."""
BUSY = 1.5
"""Times as long as the fastest picture that the slowest tenth takes where others' work keeps the machine busy."""
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
_FUNCTIONS = {  # of the pipeline's stages -> the stage that the time in it counts to, but for others' inside
    "prepare": "check weights",
    "_encode": "tokenise",
    "_conditions": "conditions",
    "_table": "noise",
    "_work": "noise",
    "new_batch": "admit",
}
_NETWORKS = {"text": "text encoder", "conditions": "U-Net's once", "step": "U-Net", "decode": "VAE"}


# ------------------------------------------------------------------------------------------------------- what is told


@dataclass(frozen=True)
class Spread:
    """Of a time that was taken often, in seconds."""

    median: float
    p90: float
    p99: float
    least: float
    most: float
    mean: float
    """Of parts these add up to that of the whole; medians do not where a machine is busy."""
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        ordered = sorted(times)

        def at(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = int(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(at(0.5), at(0.9), at(0.99), ordered[0], ordered[-1], fmean(ordered), len(ordered))


@dataclass(frozen=True)
class Stage:
    """Of a picture. device: between two events on a GPU, None where the host's time is all there is."""

    name: str
    note: str
    host: Spread
    device: Spread | None

    @property
    def seconds(self) -> float:
        return (self.device or self.host).median


@dataclass(frozen=True)
class Row:
    """All calls of one op in one stage of a picture; `OUTSIDE` is the stage's time that no op had, and an engine has
    one row for a network."""

    stage: str
    name: str
    calls: int
    seconds: float
    share: float  # of the stage
    flop: int
    bytes: int
    floor: float  # seconds: what the ceilings allow at best, call by call
    paths: dict[str, int]  # which way the calls took, and why


@dataclass(frozen=True)
class Event:
    """A named range of the picture that took the median time, for a trace."""

    name: str
    stage: str
    track: Literal["host", "device"]
    began: float  # seconds from the picture's start
    seconds: float
    op: bool


@dataclass(frozen=True)
class Profile:
    about: dict[str, Any]
    """What was measured, on what."""
    first: dict[str, float]
    """Seconds that are spent once: "compile" is what the first picture took more than later ones, for kernels, plans
    and layouts, and on a GPU for the graph of its step; "capture" what the third did, for those of text and decoder."""
    wall: Spread
    """A picture from its prompt to its file."""
    stages: tuple[Stage, ...]
    """They add up to `wall`, picture by picture."""
    step: Spread
    """Of all steps alike: the device's time on a GPU."""
    steps: tuple[Spread, ...]
    """Of each step."""
    rows: tuple[Row, ...]
    """Of all stages that run networks; those of a stage add up to all of it."""
    ceilings: Ceilings
    operations: dict[str, int]
    """Float operations of one evaluation of the U-Net for all rows of the batch, by what becomes of them here."""
    memory: dict[str, int]
    """Bytes: what the plan says, and what was there."""
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
        """The one change that would help most, in a sentence, which says so where the machine was too busy to tell."""
        least, most = self.wall.least, self.wall.p90
        if most < BUSY * least:
            return f"{_advice(self)}."
        return (
            f"{_advice(self)} (but pictures took {1e3 * least:.0f} to {1e3 * most:.0f} ms: "
            "profile again when nothing else runs here)."
        )


# ------------------------------------------------------------------------------------------------------- one picture


@contextmanager
def _stages(pipe: Pipeline, clock: Clock) -> Iterator[None]:
    """Inside, what a session asks of the pipeline is timed."""
    own = {name: clock.around(stage, getattr(pipe.stages, name), stage) for name, stage in _FUNCTIONS.items()}
    new_batch, run = own["new_batch"], pipe.stages.run

    def with_timed_steps(*args: Any) -> Any:
        batch = new_batch(*args)
        batch.step, batch.admit = clock.around("step", batch.step), clock.around("admit", batch.admit, "admit")
        return batch

    def encoders(*args: Any) -> Any:
        inside = clock.inside
        tokenising = inside is not None and inside.name == "tokenise"
        return clock.around("text", run, "text")(*args) if tokenising else run(*args)

    own |= {"new_batch": with_timed_steps, "run": encoders, "decode": clock.pieces("decode", pipe.stages.decode)}
    with replaced(pipe.stages, **own):
        yield


@contextmanager
def _ops(pipe: Pipeline, clock: Clock) -> Iterator[None]:
    """Inside, ops are timed too, on a GPU one by one: its graphs are not used."""
    observing = dispatch.observe(clock.observe)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(replaced(pipe.stages, graphs=None))
        enter(replaced(clock, ahead=clock.gpu))
        enter(replaced(pipe.unet, step=clock.around("U-Net", pipe.unet.step)))
        enter(replaced(pipe.vae, decode=clock.around("VAE", pipe.vae.decode)))
        enter(replaced(onednn, product=clock.kept(onednn.product), convolve=clock.kept(onednn.convolve)))
        pipe.session.call(observing.__enter__)  # it holds for the thread that entered it: the one that works
        stack.callback(pipe.session.call, lambda: observing.__exit__(None, None, None))
        yield


@dataclass(frozen=True)
class Trial:
    """One picture's spans, and the time of its own that each had."""

    wall: float
    spans: list[Span]
    result: Result

    def alone(self, device: bool) -> list[float]:
        """Seconds of each span that no other inside it had, nor the watching of it."""
        own = {id(span): span.seconds(device) for span in self.spans}
        remaining = dict(own)
        for span in self.spans:
            if span.parent is not None:
                remaining[id(span.parent)] -= own[id(span)] if device else span.ended - span.noticed
        return [remaining[id(span)] for span in self.spans]

    def stages(self, device: bool) -> dict[str, float]:
        seconds = dict.fromkeys(STAGES, 0.0)
        for span, own in zip(self.spans, self.alone(device), strict=True):
            seconds[span.stage] += own
        seconds["session"] = self.wall - sum(seconds.values())
        return seconds

    def steps(self, device: bool) -> list[float]:
        return [span.seconds(device) for span in self.spans if span.name == "step"]


def _make(session: Session, request: Request, clock: Clock) -> Trial:
    clock.spans = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{k}.png") for k in range(request.batch)]
        start = perf_counter()
        result = session.submit(request).result()
        with clock.span("PNG"):
            images.save_result(result, paths, session.stages.name)
        wall = perf_counter() - start
    if clock.gpu:
        torch.cuda.synchronize(session.stages.device)
    return Trial(wall, clock.spans, result)


# --------------------------------------------------------------------------------------------------------- the profile


def profile(
    pipe: Pipeline,
    request: str | Request = "a red apple",
    *,
    rounds: int | None = None,
    first: dict[str, float] | None = None,
    **options: Any,
) -> Profile:
    """Make pictures and say where their time went. Nobody else should use the pipeline or the machine meanwhile.

    request: a prompt, or a whole Request; options are its other fields. Its seed is 0 unless it says another.
    rounds: pictures that count; as many as take ten seconds where it is None, at least 3 and at most 20.
    first: seconds that were spent before, by name, such as {"import": 2.1, "load": 0.8}; told with the first picture's.

    Raises what making the pictures raises.
    """
    asked = Request.of(request, {"seed": 0, **options} if isinstance(request, str) else options)
    completed = pipe.stages.complete(asked)
    clock, captures = Clock(pipe.device), pipe.stages.graphs is not None
    with ExitStack() as stack:
        if clock.gpu:
            stack.enter_context(torch.cuda.device(pipe.device))
            torch.cuda.reset_peak_memory_stats()
        stack.enter_context(_stages(pipe, clock))
        with Session(pipe) as session:
            early = [_make(session, asked, clock) for _ in range(WARM_UPS + 2 if captures else 2)]
            count = rounds or min(20, max(3, int(SECONDS / early[-1].wall)))
            plain = [_make(session, asked, clock) for _ in range(count)]
        with _ops(pipe, clock), Session(pipe) as session:
            watched = [_make(session, asked, clock) for _ in range(1 + min(count, 9))][1:]  # the first makes the batch
        dtype = getattr(torch, plain[-1].result.dtype)
        limits = pipe.session.call(lambda: ceilings(pipe.device, dtype))  # with the threads that the steps had

    wall = Spread.of([one.wall for one in plain])
    extra = {"compile": early[0]} | ({"capture": early[WARM_UPS]} if captures else {})
    steps = [one.steps(clock.gpu) for one in plain]
    rows = completed.batch * (2 if pipe.stages.guided(completed) else 1)
    return Profile(
        about=_about(pipe, plain[-1].result, rows),
        first={**(first or {}), **{name: max(0.0, one.wall - wall.median) for name, one in extra.items()}},
        wall=wall,
        stages=_told(plain, clock.gpu),
        step=Spread.of([seconds for times in steps for seconds in times]),
        steps=tuple(Spread.of(times) for times in zip(*steps, strict=True)),
        rows=_rows(pipe, completed, rows, watched, limits),
        ceilings=limits,
        operations=dry.operations(
            pipe.unet.config, rows=rows, tokens=pipe.text_stages[0].window, **_place(pipe, completed)
        ),
        memory=_memory(pipe, completed),
        events=_events(sorted(watched, key=lambda one: one.wall)[len(watched) // 2], clock.gpu),
    )


def _about(pipe: Pipeline, result: Result, rows: int) -> dict[str, Any]:
    asked = result.request
    return {
        "model": pipe.name,
        "backend": result.backend,
        "device": str(pipe.device),
        "dtype": result.dtype,
        "fastest_dtype": str(choose_dtype(None, pipe.device)).removeprefix("torch."),
        "width": asked.width,
        "height": asked.height,
        "pictures": asked.batch,
        "rows": rows,
        "steps": len(result.timings.steps),
        "sampler": asked.sampler,
        "guidance": asked.guidance_scale,
        "threads": pipe.session.call(torch.get_num_threads),  # those of the thread that took the steps
        "machine": machine(pipe.device),
    }


def _told(pictures: Sequence[Trial], gpu: bool) -> tuple[Stage, ...]:
    host = [one.stages(False) for one in pictures]
    device = [one.stages(True) for one in pictures] if gpu else []
    return tuple(
        Stage(
            name,
            note,
            Spread.of([seconds[name] for seconds in host]),
            Spread.of([seconds[name] for seconds in device]) if gpu else None,
        )
        for name, note in STAGES.items()
    )


def _rows(pipe: Pipeline, asked: Request, rows: int, pictures: Sequence[Trial], limits: Ceilings) -> tuple[Row, ...]:
    """Each span takes the median of its times in all pictures, which have the same spans."""
    gpu = pipe.device.type == "cuda"
    times = [median(each) for each in zip(*(one.alone(gpu) for one in pictures), strict=True)]
    spans = pictures[0].spans
    with_ops = {span.stage for span in spans if span.call is not None}
    calls: dict[tuple[str, str], list[tuple[float, Call]]] = {}
    for span, seconds in zip(spans, times, strict=True):
        if span.stage not in _NETWORKS:
            continue
        engine = span.stage not in with_ops
        call = span.call or Call(OUTSIDE, Cost(0, 0), "")
        if span.name == "step" and (engine or not gpu):
            call = Call("end_step", Cost(0, 0), "torch: the sampler's functions")
        elif engine and span.name != "decode":
            call = Call(_NETWORKS[span.stage], _whole(pipe, asked, rows, span), pictures[0].result.backend)
        calls.setdefault((span.stage, call.name), []).append((seconds, call))
    whole = {stage: sum(t for (of, _), some in calls.items() if of == stage for t, _ in some) for stage in _NETWORKS}
    return tuple(
        Row(
            stage,
            name,
            calls=len(some),
            seconds=(seconds := sum(t for t, _ in some)),
            share=seconds / whole[stage],
            flop=sum(call.cost.flop for _, call in some),
            bytes=sum(call.cost.bytes for _, call in some),
            floor=sum(limits.seconds(call.cost.flop, call.cost.bytes) for _, call in some),
            paths=dict(Counter(call.path for _, call in some if call.path)),
        )
        for (stage, name), some in calls.items()
    )


def _events(picture: Trial, gpu: bool) -> tuple[Event, ...]:
    start = picture.spans[0].began
    told = [
        Event(span.name, span.stage, "host", span.began - start, span.seconds(False), span.call is not None)
        for span in picture.spans
    ]
    if gpu:
        first = picture.spans[0].marks
        for span in picture.spans:
            assert first is not None
            assert span.marks is not None
            began = first[0].elapsed_time(span.marks[0]) / 1e3
            told.append(Event(span.name, span.stage, "device", began, span.seconds(True), span.call is not None))
    return tuple(told)


def _place(pipe: Pipeline, asked: Request) -> dict[str, int]:
    factor = pipe.vae.config.factor
    return {"height": int(asked.height or 0) // factor, "width": int(asked.width or 0) // factor}


def _whole(pipe: Pipeline, asked: Request, rows: int, span: Span) -> Cost:
    """What ours would have to do where an engine ran, whose ops are not seen."""
    place: dict[str, Any] = {**_place(pipe, asked), "dtype": pipe.dtype}
    tokens = pipe.text_stages[0].window
    if span.name == "U-Net":
        return dry.total(lambda: dry.step(pipe.unet.config, rows=rows, tokens=tokens, **place))
    if span.name == "VAE":
        return dry.total(lambda: dry.decode(pipe.vae.config, batch=asked.batch, **place))
    return Cost(0, 0)


# ------------------------------------------------------------------------------------------------------------- memory


def _memory(pipe: Pipeline, asked: Request) -> dict[str, int]:
    """Bytes as planned, and as they were. Of an engine PyTorch knows nothing."""
    if pipe.backend != "torch":
        return {}
    gpu = pipe.device.type == "cuda"
    made = memory.plan(
        memory.Workload.of_stages(
            pipe.stages,
            width=int(asked.width or 0),
            height=int(asked.height or 0),
            batch=asked.batch,
            guided=pipe.stages.guided(asked),
            steps=int(asked.num_inference_steps or 1),
            encode=asked.image is not None,
        )
    )
    if gpu:
        return {"planned": made.peak, "measured": torch.cuda.max_memory_reserved(pipe.device)}
    modules: list[Any] = [pipe.unet, pipe.vae, *(stage.model for stage in pipe.text_stages)]
    storages = [tensor.untyped_storage() for module in modules for tensor in module.parameters()]
    weights = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return {"planned": made.needed, "measured": sum(weights.values()) + _most_alive(pipe, asked)}


def _most_alive(pipe: Pipeline, asked: Request) -> int:
    """Of a picture, beside the weights, as PyTorch's profiler hears it from the allocator. One step is as any other."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as listening

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the session's thread has a pool of its own, and two fight for the cores
    try:  # in this thread: the profiler hears of no other
        with torch.no_grad(), listening(activities=[ProfilerActivity.CPU], profile_memory=True) as heard:
            run = pipe.stages.prepare(asked)
            batch = pipe.stages.new_batch(run, asked.batch)
            batch.admit(run)
            batch.step([run])
            finish(pipe.stages.decode(asked, run.work.table, batch.latents(run), batch.release(run)))
    finally:
        torch.set_num_threads(threads)
    alive = most = 0
    for event in heard.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


# ------------------------------------------------------------------------------------------------------------- advice


def _advice(made: Profile) -> str:
    """About whatever loses most time: to its floor where it has one, all of it otherwise."""
    ops = [(row.seconds - row.floor, row.stage, row.name, row) for row in made.rows]
    others = [(one.seconds, one.name, "", None) for one in made.stages if one.name not in _NETWORKS]
    lost, stage, name, row = max([*ops, *others], key=lambda one: one[0])
    whole = made.wall.median
    if row is None:
        return f"Most is lost in {stage}, {share(lost, whole)} of a picture: {_HINTS[stage]}"
    said = f"Most is lost in {name} of {stage}, {share(row.seconds, whole)} of a picture"
    if row.floor:
        said += f" at {share(row.floor, row.seconds)} of what this machine can do"
    return f"{said}: {_hint(made, row)}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%"


def _hint(made: Profile, row: Row) -> str:
    about = made.about
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
