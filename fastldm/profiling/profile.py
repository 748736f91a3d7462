"""Where the time of an image goes, stage by stage and op by op, and how far each is from what this machine can do.

    result = profile(Pipeline.default(), "a red apple")
    result.rows[0].name, result.advice             report.py and page.py make a table, a page and a trace of it

The images are made as any other, by a session, while a clock listens to the spans that the code reports. A few are not
counted, then some are, then some more in which each op is timed too: the overhead of watching ops is in no other
figure. A time is the host's, from a monotonic clock; on a GPU it is also that between two events of the stream, which
no host waits for before the image is done.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fastldm import image as images
from fastldm import spans
from fastldm.device import choose_dtype
from fastldm.kernels import dispatch
from fastldm.kernels.dispatch import Cost
from fastldm.models.vae import finish
from fastldm.pipeline import Pipeline
from fastldm.planning import dry_run, memory, timing
from fastldm.planning.timing import Ceilings
from fastldm.profiling.clock import Call, Clock, Span
from fastldm.profiling.results import NETWORKS, OUTSIDE, STAGES, Event, Profile, Row, Spread, Stage
from fastldm.request import Request, Result
from fastldm.runtime.complete import sampled
from fastldm.runtime.graph import WARM_UPS
from fastldm.serving.session import Session
from fastldm.system import machine

SECONDS = 10.0
"""Images are repeated for about so long where no number of rounds is given."""


@contextmanager
def _on_worker(session: Session, manager: AbstractContextManager[Any]) -> Iterator[None]:
    """Enters a context manager on the thread that does the session's work, for which alone it holds."""
    session.call(manager.__enter__)
    try:
        yield
    finally:
        session.call(lambda: manager.__exit__(None, None, None))


@dataclass(frozen=True)
class Trial:
    """One image's spans, and what follows from them."""

    wall: float
    spans: list[Span]
    result: Result

    def exclusive(self, device: bool) -> list[float]:
        """Seconds of each span without those of the spans inside it, nor the overhead of watching them."""
        full = {id(span): span.seconds(device) for span in self.spans}
        remaining = dict(full)
        for span in self.spans:
            if span.parent is not None:
                remaining[id(span.parent)] -= full[id(span)] if device else span.end - span.noticed
        return [remaining[id(span)] for span in self.spans]

    def stages(self, device: bool) -> dict[str, float]:
        seconds = dict.fromkeys(STAGES, 0.0)
        for span, own in zip(self.spans, self.exclusive(device), strict=True):
            seconds[span.stage] += own
        seconds["session"] = self.wall - sum(seconds.values())
        return seconds

    def steps(self, device: bool) -> list[float]:
        return [span.seconds(device) for span in self.spans if span.name == "step"]


def _trial(session: Session, request: Request, clock: Clock) -> Trial:
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


def profile(
    pipe: Pipeline,
    request: str | Request | None = None,
    *,
    rounds: int | None = None,
    first: dict[str, float] | None = None,
    **options: Any,
) -> Profile:
    """Make images and report where their time went. Nobody else should use the pipeline or the machine meanwhile.

    request: a prompt, or a full Request; options are its other fields. By default of what the
    model reads, such as a red apple. Its seed is 0 unless it has another.
    rounds: images that count; as many as take ten seconds where it is None, at least 3 and at most 20.
    first: seconds that were spent before, by name, such as {"import": 2.1, "load": 0.8}; for `Profile.first`.

    Raises what making the images raises.
    """
    options = options if isinstance(request, Request) else {"seed": 0, **options}
    request = sampled(pipe.stages.spec, request, options)
    completed = pipe.stages.complete(request)
    on_torch = pipe.backend == "torch"
    workload = memory.Workload.of_request(pipe.stages, completed) if on_torch else None  # before weights are copied
    clock, captures = Clock(pipe.device, STAGES), pipe.stages.graphs is not None
    with ExitStack() as stack:
        if clock.gpu:
            stack.enter_context(torch.cuda.device(pipe.device))
            torch.cuda.reset_peak_memory_stats()
        stack.enter_context(_on_worker(pipe.session, spans.listen(clock)))
        with Session(pipe) as session:
            warm_up = [_trial(session, request, clock) for _ in range(WARM_UPS + 2 if captures else 2)]
            count = rounds or min(20, max(3, int(SECONDS / warm_up[-1].wall)))
            trials = [_trial(session, request, clock) for _ in range(count)]
        clock.detailed = True
        with (
            pipe.stages.eager(),
            _on_worker(pipe.session, dispatch.observe(clock.observe)),
            Session(pipe) as session,
        ):
            watched = [_trial(session, request, clock) for _ in range(1 + min(count, 9))][1:]  # the first makes a batch
        dtype = getattr(torch, trials[-1].result.dtype)
        measured = pipe.session.call(lambda: timing.ceilings(pipe.device, dtype))  # with the threads that the steps had

    wall = Spread.of([trial.wall for trial in trials])
    slower = {"compile": warm_up[0]} | ({"capture": warm_up[WARM_UPS]} if captures else {})
    steps = [trial.steps(clock.gpu) for trial in trials]
    guidance = pipe.stages.guidance(completed)
    rows = completed.batch * (1 + guidance.guided + guidance.has_third)
    return Profile(
        about=_about(pipe, trials[-1].result, rows),
        first={**(first or {}), **{name: max(0.0, trial.wall - wall.median) for name, trial in slower.items()}},
        wall=wall,
        stages=_stages(trials, clock.gpu),
        step=Spread.of([seconds for times in steps for seconds in times]),
        steps=tuple(Spread.of(times) for times in zip(*steps, strict=True)),
        rows=_rows(pipe, completed, rows, watched, measured),
        ceilings=measured,
        operations=dry_run.operations(
            pipe.unet.config, rows=rows, tokens=pipe.stages.spec.window, **_latent_size(pipe, completed)
        ),
        memory={} if workload is None else _memory(pipe, completed, workload),
        events=_events(sorted(watched, key=lambda trial: trial.wall)[len(watched) // 2], clock.gpu),
    )


def _about(pipe: Pipeline, result: Result, rows: int) -> dict[str, Any]:
    request = result.request
    return {
        "model": pipe.name,
        "backend": result.backend,
        "device": str(pipe.device),
        "dtype": result.dtype,
        "fastest_dtype": str(choose_dtype(None, pipe.device)).removeprefix("torch."),
        "width": request.width,
        "height": request.height,
        "pictures": request.batch,
        "rows": rows,
        "steps": len(result.timings.steps),
        "sampler": request.sampler,
        "guidance": request.guidance_scale,
        "adapters": dict(request.adapters or {}),
        "adapted": result.adapters,
        "controls": list(request.control_image or ()),
        "threads": pipe.session.call(torch.get_num_threads),  # those of the thread that took the steps
        "machine": machine(pipe.device),
    }


def _stages(trials: Sequence[Trial], gpu: bool) -> tuple[Stage, ...]:
    host = [trial.stages(False) for trial in trials]
    device = [trial.stages(True) for trial in trials] if gpu else []
    return tuple(
        Stage(
            name,
            note,
            Spread.of([seconds[name] for seconds in host]),
            Spread.of([seconds[name] for seconds in device]) if gpu else None,
        )
        for name, note in STAGES.items()
    )


def _rows(pipe: Pipeline, request: Request, rows: int, trials: Sequence[Trial], ceilings: Ceilings) -> tuple[Row, ...]:
    """Each span takes the median of its times in all trials, which have the same spans."""
    gpu = pipe.device.type == "cuda"
    times = [median(each) for each in zip(*(trial.exclusive(gpu) for trial in trials), strict=True)]
    with_ops = {span.stage for span in trials[0].spans if span.call is not None}
    calls: dict[tuple[str, str], list[tuple[float, Call]]] = {}
    for span, seconds in zip(trials[0].spans, times, strict=True):
        if span.stage not in NETWORKS:
            continue
        engine = span.stage not in with_ops
        call = span.call or Call(OUTSIDE, Cost(0, 0), "")
        if span.name == "step" and (engine or not gpu):
            call = Call("end_step", Cost(0, 0), "torch: the sampler's functions")
        elif engine and span.name != "decode":
            call = Call(NETWORKS[span.stage], _network_cost(pipe, request, rows, span), trials[0].result.backend)
        calls.setdefault((span.stage, call.name), []).append((seconds, call))
    totals = {name: sum(t for (stage, _), own in calls.items() if stage == name for t, _ in own) for name in NETWORKS}
    return tuple(
        Row(
            stage,
            name,
            calls=len(own),
            seconds=(seconds := sum(t for t, _ in own)),
            share=seconds / totals[stage],
            flop=sum(call.cost.flop for _, call in own),
            bytes=sum(call.cost.bytes for _, call in own),
            floor=sum(ceilings.seconds(call.cost.flop, call.cost.bytes) for _, call in own),
            paths=dict(Counter(call.path for _, call in own if call.path)),
        )
        for (stage, name), own in calls.items()
    )


def _events(trial: Trial, gpu: bool) -> tuple[Event, ...]:
    start = trial.spans[0].start
    events = [
        Event(span.name, span.stage, "host", span.start - start, span.seconds(False), span.call is not None)
        for span in trial.spans
    ]
    if gpu:
        first = trial.spans[0].events
        for span in trial.spans:
            assert first is not None
            assert span.events is not None
            offset = first[0].elapsed_time(span.events[0]) / 1e3
            events.append(Event(span.name, span.stage, "device", offset, span.seconds(True), span.call is not None))
    return tuple(events)


def _latent_size(pipe: Pipeline, request: Request) -> dict[str, int]:
    factor = pipe.vae.config.factor
    return {"height": int(request.height or 0) // factor, "width": int(request.width or 0) // factor}


def _network_cost(pipe: Pipeline, request: Request, rows: int, span: Span) -> Cost:
    """What our own network would have to compute where an engine ran, whose ops are not seen."""
    shape: dict[str, Any] = {**_latent_size(pipe, request), "dtype": pipe.dtype}
    tokens = pipe.stages.spec.window
    if span.name == "U-Net":
        return dry_run.total(lambda: dry_run.step(pipe.unet.config, rows=rows, tokens=tokens, **shape))
    if span.name == "VAE":
        return dry_run.total(lambda: dry_run.decode(pipe.vae.config, batch=request.batch, **shape))
    return Cost(0, 0)


def _memory(pipe: Pipeline, request: Request, workload: memory.Workload) -> dict[str, int]:
    """Bytes as planned, and as they were."""
    planned = memory.plan(workload)
    if pipe.device.type == "cuda":
        return {"planned": planned.peak, "measured": torch.cuda.max_memory_reserved(pipe.device)}
    modules: list[Any] = [pipe.unet, pipe.vae, *(stage.model for stage in pipe.text_stages)]
    modules += [control.network for control in pipe.controls.values()]
    storages = [tensor.untyped_storage() for module in modules for tensor in module.parameters()]
    weights = {storage.data_ptr(): storage.nbytes() for storage in storages}
    held = sum(weights.values()) + pipe.stages.adapters.nbytes
    return {"planned": planned.needed, "measured": held + _peak(pipe, request)}


def _peak(pipe: Pipeline, request: Request) -> int:
    """The most bytes alive of an image, beside the weights, as PyTorch's profiler counts allocations. One step is taken
    for all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the session's thread has a pool of its own, and two compete for the cores
    try:  # in this thread: the profiler sees no other
        with torch.no_grad(), torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            request, _ = pipe.stages.with_vectors(request)
            run = pipe.stages.prepare(request)
            batch = pipe.stages.new_batch(run, request.batch)
            batch.admit(run)
            batch.step([run])
            finish(pipe.stages.decode(request, run, batch.latents(run), batch.release(run)))
    finally:
        torch.set_num_threads(threads)
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
