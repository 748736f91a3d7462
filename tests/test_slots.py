"""fastldm/runtime/slots.py: many requests in one batch's buffers, each held against `denoise` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ops
import pytest
import torch
from counters import Launches, Nodes, Recorder
from named import NAMED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.networks import SD15, SDXL, TINY, with_random_weights
from fastldm.kernels import dispatch, use
from fastldm.kernels.step import StepState
from fastldm.models.config import UNetConfig
from fastldm.models.layers import channels_last
from fastldm.models.unet import UNet
from fastldm.planning import dry_run
from fastldm.runtime.batch import Batch, EagerBatch
from fastldm.runtime.denoise import Guidance, Inpainting, Run, denoise
from fastldm.runtime.graph import Graphs
from fastldm.runtime.noise import draw_step_noise
from fastldm.runtime.slots import ROWS, Slots, StaticBuffers, graph_rows, no_adapters
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import COLUMNS, make_table

DEVICE = ops.DEVICE
CHANNELS, HEIGHT, WIDTH = 4, 6, 5  # no two alike, none a power of two but one
SD = read_config(
    {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
GUIDED = Guidance(3.0)
RARE = {"clip": 0.8, "o": 0.1, "d_ratio": 0.5, "gm": 0.6, "gx": 0.2}


class Network:
    """In place of a U-Net: something of the latents, the row of the table, and the whole of a row's own text. wide: it
    learns variance, too, and has a channel that nobody reads."""

    def __init__(self, wide: bool = False) -> None:
        self.widths: list[int] = []
        self.wide = wide

    def step(
        self,
        model_input: Tensor,
        temb: Tensor,
        text: Sequence[Tensor],
        *,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        (states,) = text
        if kv_len is not None:
            seen = torch.arange(states.shape[1], device=model_input.device) < kv_len[:, None]
            states = states.masked_fill(~seen[..., None], 0.0)
        means = states.sum(1)[:, 0] / (states.shape[1] if kv_len is None else kv_len.clamp_min(1))
        if slots is not None:
            means = means[slots]
        self.widths.append(model_input.shape[0])
        text_mean = (means + temb[:, 0].float())[:, None, None, None]
        out = torch.tanh(
            model_input[:, :CHANNELS].float() + model_input[:, CHANNELS:].float().sum(1, keepdim=True) + text_mean
        )
        out = torch.cat((out, -out.flip(1), torch.full_like(out[:, :1], math.nan)), 1) if self.wide else out
        return channels_last(out.to(model_input.dtype))


def run_of(sampler: str, steps: int, batch: int = 1, guidance: Guidance = GUIDED, seed: int = 0, **options: Any) -> Run:
    """A seeded request. Options: tokens of its text (7), masked, extra (channels), own (for each row of the U-Net
    others), dtype, strength, and rare: numbers of the table that few samplers have."""
    g = torch.Generator().manual_seed(seed)
    table = make_table(SD, steps, sampler=sampler, eta=0.5, strength=options.get("strength", 1.0))
    shape, dtype = (batch, CHANNELS, HEIGHT, WIDTH), options.get("dtype", torch.float32)

    def normal(channels: int = CHANNELS) -> Tensor:
        return torch.randn(batch, channels, HEIGHT, WIDTH, generator=g).to(DEVICE)

    inpainting = extra = None
    if options.get("masked"):
        inpainting = Inpainting((normal(1)[:1] > 0).float(), normal(), normal())
    rows = batch * (2 if guidance.guided else 1)
    if options.get("extra"):
        count = 3 * batch if options.get("own") else batch
        extra = torch.randn(count, options["extra"], HEIGHT, WIDTH, generator=g).to(DEVICE, dtype)
    for name, value in options.get("rare", {}).items():
        table.rows[:, COLUMNS.index(name)] = value
    table = replace(table)  # which looks at its rows anew
    noises = draw_step_noise(table, shape, g, torch.float32, DEVICE)
    latents = normal() * table.init_noise_sigma
    text = torch.randn(rows, options.get("tokens", 7), 2, generator=g).to(DEVICE)
    temb = torch.randn(len(table), rows, 1, generator=g).to(DEVICE, dtype)
    return Run(table, latents, noises, guidance, inpainting, extra, dtype, temb, (text,))


def alone(run: Run, network: Any = None) -> Tensor:
    """What correct means: the loop of one request."""
    network, batch = network or Network(), run.batch

    def call(model_input: Tensor, i: int, branches: tuple[int, ...]) -> Tensor:
        texts = [list(run.guidance.texts)[branch] for branch in branches]
        rows = [(text if len(run.temb[i]) > batch else 0) * batch + k for text in texts for k in range(batch)]
        return network.step(model_input, run.temb[i][rows], [text[rows] for text in run.text_kv])

    return denoise(call, run)


def buffers(
    slots: int, rows: int, steps: int = 16, tokens: int = 14, extra: int = 0, dtype: torch.dtype = torch.float32
) -> StaticBuffers:
    state = StepState.empty(
        slots=slots,
        rows=rows,
        channels=CHANNELS,
        height=HEIGHT,
        width=WIDTH,
        steps=steps,
        draws=steps,
        extra_channels=extra,
        masked=True,
        dtype=dtype,
        device=DEVICE,
    )
    for t in (state.x, state.y, state.history, state.noise, state.init, state.init_noise, state.mask, state.u):
        t.fill_(float("nan"))  # what nobody wrote is not read
    return StaticBuffers(
        step=state,
        temb=torch.full((2 * slots, steps, 1), float("nan"), dtype=dtype, device=DEVICE),
        text=(torch.full((2 * slots, tokens, 2), float("nan"), device=DEVICE),),
        kv_len=torch.zeros(2 * slots, dtype=torch.int32, device=DEVICE),
        maps=torch.zeros(3, rows, dtype=torch.int32, device=DEVICE),
        adapters=no_adapters(rows, DEVICE),
    )


def finish(batch: Batch, runs: Sequence[Run], starts: Sequence[int] | None = None) -> list[Tensor]:
    """Each run joins at its turn and leaves when it is done; what each ends with."""
    starts, done, turn = starts or [0] * len(runs), {}, 0
    while len(done) < len(runs):
        for run, start in zip(runs, starts, strict=True):
            if start == turn:
                batch.admit(run)
        under_way = [run for run, start in zip(runs, starts, strict=True) if start <= turn and run not in done]
        if under_way:
            batch.step(under_way)
        for run in under_way:
            if run.done:
                done[run] = batch.latents(run)
                assert batch.release(run)() is None
        turn += 1
    return [done[run] for run in runs]


# Of every kind at once: other samplers, steps, guidance (none, at all steps, at some, rescaled), batches and texts.
MIXED: list[dict[str, Any]] = [
    {"sampler": "euler a", "steps": 5, "batch": 2, "guidance": Guidance(3.0, 0.5), "seed": 1},
    {"sampler": "dpm++ 2m", "steps": 7, "guidance": Guidance(), "tokens": 14, "seed": 2},
    {"sampler": "unipc", "steps": 6, "guidance": Guidance(4.0, 0.0, 0.3, 0.8), "tokens": 3, "seed": 3},
    {"sampler": "heun", "steps": 4, "masked": True, "strength": 0.8, "seed": 4},
    {"sampler": "dpm++ 2m sde karras", "steps": 5, "guidance": Guidance(), "seed": 5},
]
# Those whose network sees a picture behind the latents, of two in three rows; beside those that have two and one.
THIRD: list[dict[str, Any]] = [
    {"sampler": "euler a", "guidance": Guidance(5.0, image_scale=1.5), "batch": 2, "tokens": 9},
    {"sampler": "ddim", "guidance": Guidance(5.0, 0.4, 0.2, 0.9, image_scale=1.5), "tokens": 5},
    {"sampler": "dpm++ 2m", "guidance": Guidance(5.0, image_scale=1.0)},
    {"sampler": "heun", "guidance": Guidance(2.0, image_scale=2.0)},
    {"sampler": "unipc", "guidance": Guidance(2.0, image_scale=0.9)},
    {"sampler": "euler a", "guidance": Guidance(3.0, 0.5), "batch": 2},
]
THIRD = [{"steps": 5, "extra": 2, "own": True, "seed": k, **workload} for k, workload in enumerate(THIRD)]


@pytest.mark.parametrize("kind", ["eager", "slots", "graphs"])
@pytest.mark.parametrize("starts", [[0, 0, 0, 0, 0], [3, 0, 1, 2, 5]], ids=["together", "one-after-the-other"])
def test_all_kinds_of_requests_share_a_batch(kind: str, starts: list[int]) -> None:
    expected = [alone(run_of(**workload)) for workload in MIXED]
    runs = [run_of(**workload) for workload in MIXED]
    batch: Batch = EagerBatch(Network())  # type: ignore[arg-type]
    if kind != "eager":
        graphs = Graphs(Recorder()) if kind == "graphs" else None
        batch = Slots(Network(), buffers(slots=6, rows=12), graphs)  # type: ignore[arg-type]
    for got, reference in zip(finish(batch, runs, starts), expected, strict=True):
        assert ops.error(got, reference) < 2e-6


@pytest.mark.parametrize("kind", ["eager", "slots", "graphs", "kernel"])
def test_three_rows_share_a_batch_with_two(kind: str) -> None:
    expected = [alone(run_of(**workload)) for workload in THIRD]
    runs = [run_of(**workload) for workload in THIRD]
    batch: Batch = EagerBatch(Network())  # type: ignore[arg-type]
    if kind != "eager":
        graphs = Graphs(Recorder()) if kind == "graphs" else None
        batch = Slots(Network(), buffers(slots=8, rows=24, extra=2), graphs)  # type: ignore[arg-type]
    with use("triton") if kind == "kernel" else nullcontext():
        finished = finish(batch, runs, [1, 0, 0, 2, 3, 0])
    for got, reference in zip(finished, expected, strict=True):
        assert ops.error(got, reference) < (2e-5 if kind == "kernel" else 2e-6)


def test_slots_are_reused() -> None:
    """Two slots, eight requests: nothing of the last tenant is left."""
    requests = [{**workload, "batch": 1, "seed": k} for k, workload in enumerate([*MIXED, *reversed(MIXED)])]
    batch = Slots(Network(), buffers(slots=2, rows=4))  # type: ignore[arg-type]
    for first, second in zip(requests[::2], requests[1::2], strict=True):
        expected = [alone(run_of(**workload)) for workload in (first, second)]
        for got, reference in zip(
            finish(batch, [run_of(**workload) for workload in (first, second)]), expected, strict=True
        ):
            assert ops.error(got, reference) < 2e-6


@pytest.mark.parametrize("sampler", NAMED)
def test_kernel_ends_steps_like_the_reference(sampler: str) -> None:
    """On a GPU the end of a step is one kernel: here it runs in Triton's interpreter."""
    workload = {"sampler": sampler, "steps": 5, "batch": 2, "guidance": Guidance(5.0, 0.3, 0.0, 0.7)}
    expected = alone(run_of(**workload))
    with use("triton"):
        (got,) = finish(Slots(Network(), buffers(slots=2, rows=4)), [run_of(**workload)])  # type: ignore[arg-type]
    assert ops.error(got, expected) < 2e-5
    assert got.is_contiguous()


@pytest.mark.parametrize(
    "options",
    [{"masked": True}, {"extra": 5, "dtype": torch.float16}, {"extra": 2, "own": True}, {"rare": RARE}],
    ids=["inpainting", "nine-channels", "channels-of-each-row", "rare"],
)
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0), Guidance(3.0, 0.0, 0.4, 0.8)], ids=str)
def test_kernel_ends_steps_with_options(options: dict[str, Any], guidance: Guidance) -> None:
    sampler, steps = ("euler a", 7) if "rare" in options else ("heun", 4)  # 7 rows
    workload = {"sampler": sampler, "steps": steps, "batch": 2, "guidance": guidance, **options}
    dtype, networks = options.get("dtype", torch.float32), [Network("rare" in options) for _ in range(2)]
    expected = alone(run_of(**workload), networks[0])
    with use("triton"):
        batch = Slots(networks[1], buffers(2, 4, extra=options.get("extra", 0), dtype=dtype))  # type: ignore[arg-type]
        (got,) = finish(batch, [run_of(**workload)])
    assert ops.error(got, expected) < (2e-3 if dtype == torch.float16 else 2e-5)


@pytest.mark.parametrize("kind", ["eager", "slots"])
def test_replaced_latents_are_copies(kind: str) -> None:
    def halve(i: int, t: float, x: Tensor) -> Tensor | None:
        return x * 0.5 if i in (1, 6) else None  # the last row's are the result

    neighbour = run_of("euler a", 9, seed=1)
    expected, beside = denoise_with(halve), alone(run_of("euler a", 9, seed=1))
    batch: Batch = EagerBatch(Network()) if kind == "eager" else Slots(Network(), buffers(2, 4))  # type: ignore[arg-type]
    run, seen = run_of("heun", 4), []
    for admitted in (run, neighbour):
        batch.admit(admitted)
    while not run.done:
        i = run.row
        batch.step([run, neighbour])
        seen.append(batch.latents(run))
        if i in (1, 6):
            batch.go_on_from(run, seen[-1] * 0.5)
    assert ops.error(batch.latents(run), expected) < 2e-6
    assert ops.error(seen[-1] * 0.5, expected) < 2e-6, "what was handed out does not change"
    batch.release(run)
    while not neighbour.done:
        batch.step([neighbour])
    assert ops.error(batch.latents(neighbour), beside) < 2e-6


def denoise_with(on_step: Any) -> Tensor:
    run, network = run_of("heun", 4), Network()
    call = lambda model_input, i, guided: network.step(model_input, run.temb[i], run.text_kv)  # noqa: E731
    return denoise(call, run, on_step=on_step)


@pytest.mark.parametrize("kind", ["eager", "slots"])
def test_waiting_runs_do_not_move(kind: str) -> None:
    """A request whose caller has not answered sits out steps that others take."""
    requests = [{"sampler": "dpm++ 2m", "steps": 6, "seed": k} for k in range(2)]
    expected = [alone(run_of(**workload)) for workload in requests]
    first, second = (run_of(**workload) for workload in requests)
    batch: Batch = EagerBatch(Network()) if kind == "eager" else Slots(Network(), buffers(2, 4))  # type: ignore[arg-type]
    batch.admit(first)
    batch.admit(second)
    for turn in range(12):
        batch.step([first, second][turn % 2 :][:1])
    for run, reference in zip((first, second), expected, strict=True):
        assert ops.error(batch.latents(run), reference) < 2e-6


@pytest.mark.parametrize("kind", ["eager", "slots"])
def test_nan_stays_in_its_own_request(kind: str) -> None:
    """One network call in six gives NaN for the first run alone; the first bad row is recorded, and nobody else's."""

    class Broken(Network):
        def step(self, model_input: Tensor, temb: Tensor, *rest: Any, **lengths: Any) -> Tensor:
            out = super().step(model_input, temb, *rest, **lengths)
            if len(self.widths) == 4:
                out[:2] = float("nan")  # the rows of the first run
            return out

    first, second = run_of("heun", 4, seed=0), run_of("heun", 4, seed=1)
    expected = alone(run_of("heun", 4, seed=1))
    batch: Batch = EagerBatch(Broken()) if kind == "eager" else Slots(Broken(), buffers(2, 4))  # type: ignore[arg-type]
    for run in (first, second):
        batch.admit(run)
    while not second.done:
        batch.step([first, second])
    assert ops.error(batch.latents(second), expected) < 2e-6
    assert batch.release(first)() == 3
    assert batch.release(second)() is None

    first = run_of("heun", 4)
    first.latents[0, 0, 0, 0] = float("inf")
    batch.admit(first)
    assert batch.release(first)() == -1, "the start was bad already"


def test_a_failed_step_moves_no_run() -> None:
    class Failing(Network):
        def step(self, *args: Any, **lengths: Any) -> Tensor:
            out = super().step(*args, **lengths)
            if len(self.widths) == 3:
                raise RuntimeError("injected")
            return out

    for kind in (EagerBatch, lambda network: Slots(network, buffers(2, 4))):
        run, expected = run_of("unipc", 5), alone(run_of("unipc", 5))
        batch = kind(Failing())  # type: ignore[operator, arg-type]
        batch.admit(run)
        batch.step([run])
        batch.step([run])
        with pytest.raises(RuntimeError, match="injected"):
            batch.step([run])
        assert run.row == 2
        while not run.done:
            batch.step([run])
        assert ops.error(batch.latents(run), expected) < 2e-6


def test_each_row_reads_its_own_text() -> None:
    """A real network: texts of 5 and 9 tokens, guided and not, by slot and length in device memory."""
    with torch.device("meta"):
        unet = UNet(TINY)
    with_random_weights(unet, torch.device("cpu"), torch.float32)
    held = StaticBuffers.empty(
        unet.config, slots=3, rows=6, height=8, width=8, tokens=9, steps=4, dtype=torch.float32, device="cpu"
    )

    def run(seed: int, tokens: int, batch: int, guidance: Guidance) -> Run:
        g = torch.Generator().manual_seed(seed)
        table = make_table(SD, 4, sampler="ddim")
        text = torch.randn(batch * (2 if guidance.scale > 1 else 1), tokens, 32, generator=g)
        temb = unet.time_rows(torch.from_numpy(table.timesteps))[:, None]
        latents = torch.randn(batch, 4, 8, 8, generator=g)
        return Run(table, latents, [None] * 4, guidance, temb=temb, text_kv=unet.cross_kv(text))

    def runs() -> list[Run]:
        return [run(1, 9, 1, Guidance(3.0)), run(2, 5, 2, Guidance())]

    with torch.no_grad():
        alone = [finish(EagerBatch(unet), [single])[0] for single in runs()]
        for batch in (EagerBatch(unet), Slots(unet, held)):
            for got, reference in zip(finish(batch, runs(), [1, 0]), alone, strict=True):
                assert ops.error(got, reference) < 5e-6


# ---- how much is sent, run and captured


def test_graph_rows_rounds_up() -> None:
    assert [graph_rows(rows) for rows in range(1, 18)] == [
        *(1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24),
    ]
    assert graph_rows(16) == ROWS[-1]


def test_unguided_slots_cost_one_row() -> None:
    network = Network()
    batch = Slots(network, buffers(4, 8))  # type: ignore[arg-type]
    guided, unguided = run_of("ddim", 4, guidance=Guidance(3.0, 0.0, 0.0, 0.5)), run_of("ddim", 4, guidance=Guidance())
    finish(batch, [guided, unguided])
    assert network.widths == [3, 3, 2, 2], "two rows while it is guided, then one, and one of the other"


def test_one_graph_serves_samplers_scales_and_prompts() -> None:
    """Two rows are captured once, whoever they are of; a slot in other buffers is captured anew."""
    driver = Recorder()
    graphs = Graphs(driver)
    batch = Slots(Network(), buffers(2, 4), graphs)  # type: ignore[arg-type]
    for k, sampler in enumerate(["ddim", "euler a", "unipc", "dpm++ 2m karras"]):
        workload = {"sampler": sampler, "steps": 3 + k, "guidance": Guidance(2.0 + k), "tokens": 7 + k, "seed": k}
        expected = alone(run_of(**workload))
        (got,) = finish(batch, [run_of(**workload)])
        assert ops.error(got, expected) < 2e-6
    assert driver.calls.count("capture") == 1
    assert driver.calls.count("replay") == 3 + 4 + 5 + 6 - 2, "all steps but the two that warm up"
    finish(batch, [run_of("ddim", 3, guidance=Guidance()) for _ in range(2)])
    assert driver.calls.count("capture") == 1, "two unguided requests are two rows too"
    batch.close()
    assert graphs.bytes == 0
    assert driver.calls[-2:] == ["destroy", "trim"]


def test_maps_are_sent_only_on_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.runtime import slots

    sent: list[int] = []
    send = slots.send_numbers
    monkeypatch.setattr(slots, "send_numbers", lambda *args: sent.append(1) or send(*args))
    batch = Slots(Network(), buffers(2, 4))  # type: ignore[arg-type]
    run = run_of("ddim", 8, guidance=Guidance(3.0, 0.0, 0.5, 1.0))
    batch.admit(run)
    counts = []
    while not run.done:
        before = len(sent)
        batch.step([run])
        counts.append(len(sent) > before)
    assert counts == [True, False, False, False, True, False, False, False]


def test_holds_checks_every_buffer() -> None:
    batch = Slots(Network(), buffers(slots=2, rows=4, steps=8, tokens=10))  # type: ignore[arg-type]
    assert batch.holds(run_of("ddim", 8, batch=2, tokens=10))
    assert not batch.holds(run_of("ddim", 9))
    assert not batch.holds(run_of("ddim", 8, tokens=11))
    assert not batch.holds(run_of("ddim", 8, batch=3, guidance=Guidance()))


class Watched(TorchDispatchMode):
    """Every operator that runs, and the devices of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.add(func.overloadpacket.__name__)
        self.devices |= {t.device.type for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize(
    "config",
    [SD15, SDXL, replace(TINY, in_channels=9)],
    ids=["sd1.5", "sdxl", "inpainting"],
)
def test_a_step_can_be_captured(config: UNetConfig) -> None:
    """Traced with no storage and a GPU's choices: no value is read, nothing comes from the host or goes to it, and no
    memory is asked for but by the operators themselves.
    """
    with torch.device("meta"):
        unet = UNet(config)
    held = StaticBuffers.empty(
        config, slots=2, rows=4, height=16, width=16, tokens=77, steps=4, dtype=torch.float16, device="meta", reuse=True
    )
    batch = Slots(unet.half(), held)
    with dispatch.targeting(dispatch.Target(90)), Watched() as watched, torch.no_grad():
        for deep in (None, 0, 2, 4):
            batch.body(4, True, deep=deep)
    assert watched.devices == {"meta"}
    assert not watched.ops & {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2", "masked_select"}


def test_a_step_launches_few_kernels() -> None:
    """A node of a graph costs about a microsecond. The aim is 400: 16 residuals that cuBLAS leaves to a kernel of their
    own, and 30 that cuDNN does, are those too many until the tuned table takes kernels with an epilogue.
    """
    launches = Launches()
    with dispatch.targeting(launches):
        step = dry_run.step(SD15, height=64, width=64, rows=2, tokens=77, dtype=torch.float16)
        with Nodes() as nodes:
            step()
    assert 300 < nodes.count + launches.count <= 381


def test_a_step_that_reuses_launches_a_third() -> None:
    counts = {}
    with torch.device("meta"):
        unet = UNet(SD15).half()
    sizes: dict[str, Any] = {"slots": 1, "rows": 2, "height": 64, "width": 64, "tokens": 77, "steps": 1}
    held = StaticBuffers.empty(SD15, **sizes, dtype=torch.float16, device="meta", reuse=True)
    for deep in (2, 0):
        launches = Launches()
        with dispatch.targeting(launches), Nodes() as nodes, torch.no_grad():
            Slots(unet, held).body(2, False, deep=deep)
        counts[deep] = nodes.count + launches.count
    assert counts[0] < 0.36 * counts[2]


def test_nbytes_counts_every_buffer() -> None:
    held = buffers(2, 4)
    fields = [t for t in (*held.step, *held) if isinstance(t, Tensor)] + [*held.text, *held.adapters[:2]]
    assert Slots(Network(), held).nbytes == sum(t.numel() * t.element_size() for t in fields)  # type: ignore[arg-type]
