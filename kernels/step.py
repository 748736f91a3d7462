"""The end of a step: guidance, history, next latent, next anchor, mask blend, and the model input of the next step.

    out  = w0 * row0 + w1 * row1 + w2 * row2                           of up to three rows of the U-Net
    out *= 1 - phi + phi * std(row1) / std(out)                        where guidance is rescaled, phi > 0
    m    = p * x + q * out                                             history, newest first
    m    = clamp(m, -clip, clip)                                       where clip > 0; or thresholded, threshold.py
    x'   = a * x + a1 * y + sum_k b_k * m_(i-k)                        next latent
           + d * exp(d_ratio * (v + 1) / 2) * noise                    v: of row1, the channels behind the latents'
           + o * out + gx * (row1 - row0)
    y'   = e * x + e1 * y + sum_k f_k * m_(i-k)                        next anchor
    x'   = mask * x' + (1 - mask) * (r * init + s * noise0)            only where a mask is set
    u'   = c_in * x'                                                   next model input, once for each U-Net row

Row 0 is unguided, row 1 guided, and row 2 a third, where guidance has three. Classifier-free guidance is (1 - g, g, 0),
and a step without guidance (0, 1, 0): scales, intervals and their changes are numbers of the table.

The state is float32, (B, C, h, w), and a sampler is a table, whose columns are SAMPLER; `table_rows` adds what a
request decides, in the order of COLUMNS and EXTRA. `guide`, `step`, `blend` and `model_input` are these formulas for
one such row, on Python numbers: they define correct, and run on a CPU. Zero coefficients cost nothing: a DDIM step is
two multiply-adds.

On a GPU `end_step` does all of this for S slots at once, each at its own step of its own table, in one kernel:

- A program takes a block of pixels, all channels, of one slot. It reads the slot's counter, then the row of the table
  that the counter points at, one line of the cache; the row says what else there is to read. A term whose coefficient
  is 0 is a masked load, which moves nothing, so its memory may hold garbage. All loads that the row asks for are
  in flight together: the kernel is three waits long (counter, row, latents), which hide its arithmetic.
- All images are channels-last, as the network's are: a thread holds the same pixels of each of them, four channels at
  once (16 bytes of a state, 8 of the network), exchanges no value, and uses no shared memory. Other layouts work too,
  through shared memory.
- The history is a ring of four planes: m of row i lies in plane i % 4, nothing is shifted. It is written only where a
  later row reads it (column `keep`), the anchor only where the row changes it.
- The counter may change only when no program will read it any more. Each program of a slot, once all of its warps have
  read the counter (the barrier), adds 1 to `arrived`; the last one to arrive sets `arrived` back to 0 and the counter
  forward. Each program's read comes before its own arrival, and all arrivals before the change. No
  program waits for another, and the next launch starts after this one's end, so it reads both as they should be. (A
  second launch that adds 1 would be as safe, and costs a node of the graph and the drain between two kernels: about as
  much time as all of this kernel.)
- The host reads no value, no launch depends on one, and no sum crosses slots: a captured step serves all
  samplers, step counts and scales, and a slot's result does not depend on the rest.

Bytes, for N = C*h*w a slot and a model in 16 bits: out 4N, x read and written 8N, u' 4N, and 4N for each further term
of the row (DPM-Solver++ 2M: a plane read, a plane written). SD1.5 at 512x512: 16 N = 262 kB, 0.09 us at 3 TB/s,
so that the floor is the latency of a launch, three waits and an atomic, some 3 us. Where a slot rescales, the op of
guidance_rescale.py is launched before.

Over 500 lines, for an op is a file, however long: the functions that define a step are beside their kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastldm.kernels.columns import COLUMNS, EXTRA, RARE, SAMPLER, W0
from fastldm.kernels.dispatch import Config, Cost, Op, Verdict, cdiv, jit, launch, next_power_of_2, no
from fastldm.kernels.guidance_rescale import (
    GUIDANCE_RESCALE,
    at_least_float32,
    example_slots,
    pixels_supported,
    rescale_factor,
)
from fastldm.kernels.projection import Projections, project_rows
from fastldm.kernels.threshold import Thresholds, limit, threshold_rows

if TYPE_CHECKING:
    import triton.language as tl

BRANCHES = 3  # rows of the U-Net that a slot may have
ROW = 32  # floats between rows in device memory: 128 bytes, a line of the cache
RING = 4  # planes of history
NEVER = 2**31 - 1  # in `first_bad`


# ------------------------------------------------------------ the definition of correct, and what runs on a CPU


def guide(
    outs: Mapping[int, Tensor],
    weights: Sequence[float],
    rescale: float = 0.0,
    *,
    projected: Tensor | None = None,
) -> Tensor:
    """The sum of rows 0, 1 and 2 by their weights, of which the sum is 1. outs: row 1 and those whose weight is not 0,
    each (B, C, h, w); returns that in at least float32.

    `rescale` moves each sample's deviation back to that of row 1, where there is another:
    https://arxiv.org/abs/2305.08891, section 3.4. projected: in place of the sum, of `projection.project`.
    """
    if len(outs) == 1:
        return at_least_float32(outs[1])
    outs = {k: at_least_float32(out) for k, out in outs.items()}
    if projected is not None:
        mixed = projected
    elif 2 in outs:
        mixed = _sum(*((weights[k], out) for k, out in outs.items()))
    else:
        mixed = torch.lerp(outs[0], outs[1], weights[1])
    return mixed if rescale == 0.0 else mixed * rescale_factor(outs[1], mixed, rescale)


def model_input(x: Tensor, c_in: float, dtype: torch.dtype, copies: int, extra: Tensor | None = None) -> Tensor:
    """c_in * x in the model's dtype, `copies` times along the batch, `extra` channels behind (of an inpainting model):
    for each of the copies its own, or the same for all.
    """
    u = (x if c_in == 1.0 else x * c_in).to(dtype)
    u = u if copies == 1 else torch.cat((u,) * copies)
    if extra is None:
        return u
    return torch.cat((u, extra if len(extra) == len(u) else extra.repeat(copies, 1, 1, 1)), 1)


def step(
    row: Sequence[float],
    x: Tensor,
    y: Tensor | None,
    history: tuple[Tensor, ...],
    out: Tensor,
    noise: Tensor | None,
    *,
    depth: int = 4,
    difference: Tensor | None = None,
    variance: Tensor | None = None,
    threshold: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """One step: (x', y', history with m in front, at most `depth` long).

    x, out, noise: (B, C, h, w) float32; so are difference, row1 - row0, and variance, v, where the row reads them. y:
    None for samplers that read no anchor, and it stays None. threshold: of `threshold.limit`; m is thresholded, not
    clamped. Pure: nothing is written in place.
    """
    p, q, a, a1, b0, b1, b2, b3, d, e, e1, f0, f1, f2, f3 = row[1:16]
    clip, o, d_ratio, gx = row[W0 + len(EXTRA) - len(RARE) :][: len(RARE)]
    m = _sum((p, x), (q, out))
    if threshold is not None:
        own = limit(m, *threshold)[:, None, None, None]
        m = m.clamp(-own, own) / own
    elif clip:
        m = m.clamp(-clip, clip)
    history = (m, *history[: depth - 1])
    m0, m1, m2, m3 = [*history, None, None, None][:4]
    if d_ratio and noise is not None and variance is not None:
        noise = noise * (d_ratio * (variance + 1) / 2).exp()
    after = _sum(
        *((a, x), (a1, y), (b0, m0), (b1, m1), (b2, m2), (b3, m3), (d, noise), (o, out), (gx, difference)),
    )
    if y is not None:
        y = _sum((e, x), (e1, y), (f0, m0), (f1, m1), (f2, m2), (f3, m3))
    return after, y, history


def blend(row: Sequence[float], x: Tensor, mask: Tensor, init: Tensor, init_noise: Tensor) -> Tensor:
    """Where mask is 0, the initial image at the noise level of the next step; where it is 1, x."""
    return torch.lerp(_sum((row[16], init), (row[17], init_noise)), x, mask)


def _sum(*terms: tuple[float, Tensor | None]) -> Tensor:
    """The sum of c * t over terms whose coefficient is not 0."""
    total: Tensor | None = None
    for c, t in terms:
        if c == 0.0 or t is None:
            continue
        if total is None:
            total, owned = (t, False) if c == 1.0 else (t * c, True)
        elif owned:
            total.add_(t, alpha=c)
        else:
            total, owned = torch.add(total, t, alpha=c), True
    assert total is not None  # no row of a table has zeros alone
    return total


# -------------------------------------------------------------------------------------- slots, in device memory


class StepState(NamedTuple):
    """The tensors that the end of a step reads and writes, for S slots and R rows of the network. A slot is a request.

    All tensors are on the device, and written in place, never replaced: a captured step keeps reading them. A slot
    whose counter has reached its steps is idle: nothing of it is read or written. To start a slot, write its table, x,
    noise and rescale, 0 to counter, NEVER to first_bad, c_in * x to its rows of u, and then steps.
    """

    u: Tensor  # (R, C + K, h, w), the network's dtype: the next model input, of which the first C channels are written
    x: Tensor  # (S, C, h, w) float32, as are all states: the latent
    y: Tensor  # (S, C, h, w) the anchor
    history: Tensor  # (S, RING, C, h, w)
    noise: Tensor | None  # (S, D, C, h, w) all noise that a slot's rows add; None: no row adds any
    mask: Tensor | None  # (S, 1, h, w), 1 where to paint; None, as init and init_noise: no slot is masked
    init: Tensor | None  # (S, C, h, w) the latents of the initial image
    init_noise: Tensor | None  # (S, C, h, w) the noise at the start of the run
    table: Tensor  # (S, T, ROW) float32: each slot's `table_rows`
    counter: Tensor  # (S,) int32: the row of the table that comes next
    steps: Tensor  # (S,) int32: how many rows the slot's table has
    arrived: Tensor  # (S,) int32: the kernel's own, 0 between launches
    rescale: Tensor  # (S,) float32: phi, 0 for none
    factor: Tensor  # (S,) float32: multiplies guidance; written before each step where rescale is not 0
    rows: Tensor  # (S, BRANCHES) int32: the rows of `out` that are the slot's rows 0, 1, 2; -1 for those of weight 0
    next_rows: Tensor  # (S, BRANCHES) int32: the rows of u that get the next model input, -1 for none
    first_bad: Tensor  # (S,) int32: the first row after which x held NaN or infinity, else NEVER

    @staticmethod
    def empty(
        *,
        slots: int,
        rows: int,
        channels: int,
        height: int,
        width: int,
        steps: int,
        draws: int = 0,
        extra_channels: int = 0,
        masked: bool = False,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str,
    ) -> StepState:
        """The buffers of a bucket, all slots idle. steps, draws: the most that a slot's table has.

        channels_last: the memory format of u and of all states. With another one than that of the network's output, the
            kernel has to transpose.
        """

        def floats(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full(shape, value, device=device, dtype=torch.float32)

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, device=device, dtype=torch.int32)

        def images(*count: int, channels: int = channels, dtype: torch.dtype = torch.float32) -> Tensor:
            if channels_last:
                return torch.zeros(*count, height, width, channels, device=device, dtype=dtype).movedim(-1, -3)
            return torch.zeros(*count, channels, height, width, device=device, dtype=dtype)

        return StepState(
            u=images(rows, channels=channels + extra_channels, dtype=dtype),
            x=images(slots),
            y=images(slots),
            history=images(slots, RING),
            noise=images(slots, draws) if draws else None,
            mask=floats(slots, 1, height, width) if masked else None,
            init=images(slots) if masked else None,
            init_noise=images(slots) if masked else None,
            table=floats(slots, steps, ROW),
            counter=ints(slots),
            steps=ints(slots),
            arrived=ints(slots),
            rescale=floats(slots),
            factor=floats(slots, value=1.0),
            rows=ints(slots, BRANCHES, value=-1),
            next_rows=ints(slots, BRANCHES, value=-1),
            first_bad=ints(slots, value=NEVER),
        )


def table_rows(rows: Any, draws: Sequence[bool], weights: Sequence[Sequence[float]], masked: bool = False) -> Tensor:
    """A sampler's table, (T, len(SAMPLER)), as slots read it: (T, ROW), float32 or as `rows`, on the CPU. Columns
    behind COLUMNS are EXTRA:

    w0, w1, w2, gx: weights, (T, 4). masked: 1 where the mask is blended in. keep: 1 where a later row reads this row's
    m. draw: the index of this row's noise among the slot's. clip, o, d_ratio: of the table.
    """
    numbers = torch.as_tensor(rows)
    numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
    own = dict(zip(SAMPLER, numbers.T, strict=True))
    reads = [(numbers[:, COLUMNS.index(f"b{k}")] != 0) | (numbers[:, COLUMNS.index(f"f{k}")] != 0) for k in range(RING)]
    keep = torch.zeros(len(numbers), dtype=torch.bool)
    for k in range(1, RING):
        keep[:-k] |= reads[k][k:]
    mixing = torch.tensor(weights, dtype=numbers.dtype).reshape(-1, 4).T
    own |= dict(zip(("w0", "w1", "w2", "gx"), mixing, strict=True))
    own |= {"masked": torch.full_like(keep, masked), "keep": keep}
    own |= {"draw": (torch.tensor(draws, dtype=torch.float32).cumsum(0) - 1).clamp_min(0)}
    table = torch.zeros(len(numbers), ROW, dtype=numbers.dtype)
    for place, name in enumerate((*COLUMNS, *EXTRA)):
        table[:, place] = own[name]
    return table


# ------------------------------------------------------------- the op's reference, and where its kernel applies


def end_step_reference(
    out: Tensor,
    u: Tensor,
    x: Tensor,
    y: Tensor,
    history: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    init: Tensor | None,
    init_noise: Tensor | None,
    table: Tensor,
    counter: Tensor,
    steps: Tensor,
    arrived: Tensor,
    rescale: Tensor,
    factor: Tensor,
    rows: Tensor,
    next_rows: Tensor,
    first_bad: Tensor,
    rare: bool = False,
) -> None:
    """Slot after slot, by the functions above."""
    channels = x.shape[1]
    for slot, (i, end) in enumerate(zip(counter.tolist(), steps.tolist(), strict=True)):
        if i >= end:
            continue
        row = table[slot, i].tolist()
        own = dict(zip(EXTRA, row[W0:], strict=False))
        outs = {k: at_least_float32(out[r, None]) for k, r in enumerate(rows[slot].tolist()) if r >= 0}
        latents = {k: each[:, :channels] for k, each in outs.items()}
        model_output = _sum(*((own[f"w{k}"], branch) for k, branch in latents.items()))
        if rescale[slot] > 0 and (own["w0"] or own["w2"]):
            model_output = model_output * factor[slot]
        past = tuple(history[None, slot, (i - k) % RING] for k in range(1, RING))
        drawn = None if noise is None else noise[None, slot, int(own["draw"])]
        rest = {"variance": outs[1][:, channels : 2 * channels]} if own["d_ratio"] else {}
        rest |= {"difference": latents[1] - latents[0]} if own["gx"] else {}
        after, anchor, (m, *_) = step(row, x[None, slot], y[None, slot], past, model_output, drawn, **rest)
        if own["masked"] and mask is not None and init is not None and init_noise is not None:
            after = blend(row, after, mask[None, slot], init[None, slot], init_noise[None, slot])
        if not after.isfinite().all():
            first_bad[slot].clamp_(max=i)
        assert anchor is not None
        x[slot], y[slot] = after[0].clone(), anchor[0].clone()  # either may be a view of the other
        if own["keep"]:
            history[slot, i % RING] = m[0]
        if i + 1 < end:
            for r in next_rows[slot].tolist():
                if r >= 0:
                    u[r, :channels] = model_input(x[slot], float(table[slot, i + 1, 0]), u.dtype, 1)
        counter[slot] = i + 1


def supports(
    out: Tensor,
    u: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    init: Tensor | None = None,
    init_noise: Tensor | None = None,
    *slots: Tensor,
    rare: bool = False,
    **named: Tensor,
) -> Verdict:
    channels, height, width = x.shape[1:]
    layout = x.stride()[1:]
    if layout not in ((height * width, width, 1), (1, width * channels, channels)):
        return no(f"latents are neither contiguous nor channels-last: strides {tuple(x.stride())}")
    for image in (x, y, history, noise, init, init_noise):
        if image is None:
            continue
        if image.dtype != torch.float32:
            return no(f"a state is {image.dtype}, not float32")
        dense = image.stride(-4) == channels * height * width and image.stride(0) == image.numel() // len(image)
        if image.stride()[-3:] != layout or not dense:
            return no(f"states differ in layout, or have gaps: {tuple(x.stride())} and {tuple(image.stride())}")
    for each in (mask, *slots, *named.values()):
        if each is not None and not each.is_contiguous():
            return no(f"{tuple(each.shape)} with strides {tuple(each.stride())} is not contiguous")
    return pixels_supported(out) and pixels_supported(u[:, :channels])  # what lies behind stays as it is


def cost(out: Tensor, u: Tensor, x: Tensor, *_: object, **__: object) -> Cost:
    """The bytes that every row of a table moves; only the device knows which further terms a row has."""
    written = u.shape[0] * x[0].numel() * u.element_size()
    return Cost(flop=0, bytes=out.numel() * out.element_size() + 2 * x.numel() * x.element_size() + written)


def example_values(
    out: Tensor, u: Tensor, x: Tensor, *state: Tensor | None, **named: Tensor | None
) -> dict[str, Tensor]:
    """A row of DPM-Solver++ 2M at every step, with noise and mask where the state has them."""
    call = END_STEP.bind(out, u, x, *state, **named)
    slots, (_, steps, _) = len(x), call["table"].shape
    guided = len(out) >= 2 * slots
    row = dict.fromkeys((*COLUMNS, *EXTRA), 0.0)
    row |= {"c_in": 1.0, "p": 0.9, "q": -0.4, "a": 0.8, "b0": 0.3, "b1": -0.1, "e1": 1.0, "r": 0.7, "s": 0.7}
    row |= {
        "w0": -6.5 if guided else 0.0,
        "w1": 7.5 if guided else 1.0,
        "keep": 1.0,
        "d": float(call["noise"] is not None),
        "masked": float(call["mask"] is not None),
    }
    table = torch.zeros(slots, steps, ROW)
    table[..., : len(row)] = torch.tensor(list(row.values()))
    values = example_slots(slots, len(out), steps)
    values |= {"table": table, "next_rows": values["rows"], "arrived": torch.zeros(slots)}
    return values | {"first_bad": torch.full((slots,), NEVER)}


# ----------------------------------------------------------------------------------------------- configurations

SPACE = [{"PIXELS": pixels, "num_warps": warps} for pixels in (16, 32, 64, 128, 256, 512) for warps in (1, 2, 4, 8)]


def is_candidate(config: Config, out: Tensor, u: Tensor, x: Tensor, *_: object, **__: object) -> bool:
    """2 to 16 elements for each thread."""
    return 2 <= config["PIXELS"] * next_power_of_2(x.shape[1]) // (32 * config["num_warps"]) <= 16


def shape_class(out: Tensor, u: Tensor, x: Tensor, *_: object, **__: object) -> str:
    return f"c{x.shape[1]} p{next_power_of_2(x.shape[2] * x.shape[3])}"


def default(shape: str, arch: int) -> Config:
    """4 elements a thread, which is 16 bytes of the state at once. Programs of one warp, so that no warp waits for
    another (SD1.5 has 128 of them a slot, one for each multiprocessor), but of four where there would be thousands.
    """
    channels, pixels = (int(part[1:]) for part in shape.split())
    warps = 1 if pixels <= 4096 else 4
    return {"PIXELS": max(128 * warps // next_power_of_2(channels), 8), "num_warps": warps}


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def _term(c, offset, valid):
    """The tensor of a term with coefficient c: where c is 0, zeros, and nothing is read."""
    needed = valid & (c + tl.zeros(valid.shape, tl.float32) != 0.0)
    return tl.load(offset, needed, other=0.0)


@jit
def _lerp(start, end, weight):
    """torch.lerp: from the nearer end, so that both ends are exact."""
    span = end - start
    return tl.where(weight < 0.5, start + weight * span, end - (1.0 - weight) * span)


@jit
def _end_step_kernel(
    out,
    u,
    x,
    y,
    history,
    noise,
    mask,
    init,
    init_noise,
    table,
    counter,
    steps,
    arrived,
    rescale,
    factor,
    rows,
    next_rows,
    first_bad,
    pixels,
    capacity,
    draws,
    out_row,
    out_channel,
    u_row,
    u_channel,
    x_channel,
    OUT_PIXEL: tl.constexpr,  # known to the compiler, so that the channels of a pixel are loaded at once
    U_PIXEL: tl.constexpr,
    X_PIXEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    RARE: tl.constexpr,
):
    slot = tl.program_id(1).to(tl.int64)  # 64 bits: the noise of all slots may exceed 2^31 elements
    i = tl.load(counter + slot)
    end = tl.load(steps + slot)
    if i >= end:
        return

    # The row and the slot's settings, all loads in flight together. The row is in the order of COLUMNS and EXTRA.
    row = table + (slot * capacity + i) * 32
    p = tl.load(row + 1)
    q = tl.load(row + 2)
    a = tl.load(row + 3)
    a1 = tl.load(row + 4)
    b0 = tl.load(row + 5)
    b1 = tl.load(row + 6)
    b2 = tl.load(row + 7)
    b3 = tl.load(row + 8)
    d = tl.load(row + 9)
    e = tl.load(row + 10)
    e1 = tl.load(row + 11)
    f0 = tl.load(row + 12)
    f1 = tl.load(row + 13)
    f2 = tl.load(row + 14)
    f3 = tl.load(row + 15)
    w0 = tl.load(row + 18)
    w1 = tl.load(row + 19)
    masked = tl.load(row + 21)
    keep = tl.load(row + 22)
    next_c_in = tl.load(row + 32, i + 1 < end, other=0.0)
    unguided_row = tl.load(rows + 3 * slot).to(tl.int64)
    guided_row = tl.load(rows + 3 * slot + 1).to(tl.int64)
    next_unguided_row = tl.load(next_rows + 3 * slot).to(tl.int64)
    next_guided_row = tl.load(next_rows + 3 * slot + 1).to(tl.int64)
    level = tl.where(tl.load(rescale + slot) > 0.0, tl.load(factor + slot), 1.0)
    if RARE:
        w2 = tl.load(row + 20)
        clip = tl.load(row + 24)
        o = tl.load(row + 25)
        d_ratio = tl.load(row + 26)
        gx = tl.load(row + 27)
        third_row = tl.load(rows + 3 * slot + 2).to(tl.int64)
        next_third_row = tl.load(next_rows + 3 * slot + 2).to(tl.int64)

    moves = tl.abs(e) + tl.abs(e1 - 1.0) + tl.abs(f0) + tl.abs(f1) + tl.abs(f2) + tl.abs(f3)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, LANES)[None, :]
    valid = (pixel < pixels) & (channel < CHANNELS)
    size = CHANNELS * pixels
    offset = slot * size + channel * x_channel + pixel * X_PIXEL

    # The tensors of the row's terms, all loads in flight together.
    ring = history + slot * (3 * size) + offset  # 4 planes a slot
    x_now = tl.load(x + offset, valid, other=0.0)
    y_now = _term(tl.abs(a1) + moves * tl.abs(e1), y + offset, valid)
    m1 = _term(tl.abs(b1) + tl.abs(f1), ring + (i + 3) % 4 * size, valid)
    m2 = _term(tl.abs(b2) + tl.abs(f2), ring + (i + 2) % 4 * size, valid)
    m3 = _term(tl.abs(b3) + tl.abs(f3), ring + (i + 1) % 4 * size, valid)
    if noise is not None:
        draw = tl.load(row + 23).to(tl.int32)
        drawn = _term(d, noise + (slot * (draws - 1) + draw) * size + offset, valid)
    if mask is not None:
        r = tl.load(row + 16) * masked
        s = tl.load(row + 17) * masked
        image = _term(r, init + offset, valid)
        start_noise = _term(s, init_noise + offset, valid)
        weight = _term(masked, mask + slot * pixels + pixel + tl.zeros_like(channel), valid)
    out_at = out + channel * out_channel + pixel * OUT_PIXEL
    guided = tl.load(out_at + guided_row * out_row, valid, other=0.0).to(tl.float32)
    if RARE:
        unguided = _term(tl.abs(w0) + tl.abs(gx), out_at + unguided_row * out_row, valid).to(tl.float32)
        third = _term(w2, out_at + third_row * out_row, valid).to(tl.float32)
        variance = _term(d_ratio, out_at + CHANNELS * out_channel + guided_row * out_row, valid).to(tl.float32)
        model_output = w0 * unguided + w1 * guided + w2 * third
        model_output *= tl.where((w0 != 0.0) | (w2 != 0.0), level, 1.0)
    else:
        unguided = _term(w0, out_at + unguided_row * out_row, valid).to(tl.float32)
        model_output = (w0 * unguided + w1 * guided) * tl.where(w0 != 0.0, level, 1.0)

    m0 = p * x_now + q * model_output
    if RARE:
        m0 = tl.where(clip > 0.0, tl.minimum(tl.maximum(m0, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL), m0)
    x_next = a * x_now + a1 * y_now + b0 * m0 + b1 * m1 + b2 * m2 + b3 * m3
    if RARE:
        x_next += o * model_output + tl.where(gx != 0.0, gx * (guided - unguided), 0.0)
    y_next = e * x_now + e1 * y_now + f0 * m0 + f1 * m1 + f2 * m2 + f3 * m3
    if noise is not None:
        if RARE:
            drawn *= tl.exp(d_ratio * 0.5 * (variance + 1.0))
        x_next += d * drawn
    if mask is not None:
        x_next = tl.where(masked != 0.0, _lerp(r * image + s * start_noise, x_next, weight), x_next)
    bad = tl.max((~(tl.abs(x_next) < float("inf"))).to(tl.int32))
    u_next = (next_c_in * x_next).to(u.dtype.element_ty)

    # All warps of this program have read the counter. The last program to arrive here changes it.
    tl.debug_barrier()
    if tl.atomic_add(arrived + slot, 1) == tl.num_programs(0) - 1:
        tl.store(arrived + slot, 0)
        tl.store(counter + slot, i + 1)

    tl.store(x + offset, x_next, valid)
    if moves != 0.0:
        tl.store(y + offset, y_next, valid)
    if keep != 0.0:
        tl.store(ring + i % 4 * size, m0, valid)
    tl.atomic_min(first_bad + slot, i, bad != 0, sem="relaxed")

    # The next model input, for each row of the network that needs it.
    u_at = u + channel * u_channel + pixel * U_PIXEL
    pixels_written = tl.where(i + 1 < end, pixels, 0)  # none after the last row
    needed = pixel < tl.where(next_unguided_row >= 0, pixels_written, 0)
    tl.store(u_at + next_unguided_row * u_row, u_next, valid & needed)
    needed = pixel < tl.where(next_guided_row >= 0, pixels_written, 0)
    tl.store(u_at + next_guided_row * u_row, u_next, valid & needed)
    if RARE:
        needed = pixel < tl.where(next_third_row >= 0, pixels_written, 0)
        tl.store(u_at + next_third_row * u_row, u_next, valid & needed)


def end_step_triton(
    out: Tensor,
    u: Tensor,
    x: Tensor,
    y: Tensor,
    history: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    init: Tensor | None,
    init_noise: Tensor | None,
    table: Tensor,
    counter: Tensor,
    steps: Tensor,
    arrived: Tensor,
    rescale: Tensor,
    factor: Tensor,
    rows: Tensor,
    next_rows: Tensor,
    first_bad: Tensor,
    rare: bool = False,
) -> None:
    config = END_STEP.config(out, u, x)
    slots, channels, height, width = x.shape
    pixels = height * width
    launch(
        _end_step_kernel,
        (cdiv(pixels, config["PIXELS"]), slots),
        *(out, u, x, y, history, noise, mask, init, init_noise, table, counter, steps, arrived, rescale, factor),
        *(rows, next_rows, first_bad),
        *(pixels, table.shape[1], 1 if noise is None else noise.shape[1]),
        *(out.stride(0), out.stride(1), u.stride(0), u.stride(1), x.stride(1)),
        OUT_PIXEL=out.stride(3),
        U_PIXEL=u.stride(3),
        X_PIXEL=x.stride(3),
        CHANNELS=channels,
        LANES=next_power_of_2(channels),
        RARE=rare,
        **config,
    )


# ----------------------------------------------------------------------------------------------------------- op

END_STEP = Op(
    "end_step",
    reference=end_step_reference,
    triton=end_step_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
    mutates=("u", "x", "y", "history", "counter", "arrived", "first_bad"),
    example_values=example_values,
)


def end_step(
    out: Tensor,
    state: StepState,
    *,
    rescales: bool = False,
    rare: bool = False,
    thresholds: Thresholds | None = None,
    projections: Projections | None = None,
) -> None:
    """End one step of every slot that is not idle: x, y, history, counter and first_bad are updated, and u holds the
    input of the next step. In place, with no value read by the host; on a GPU one kernel, or two where a slot rescales.

    out: (R, C or more, h, w), the network's output for u, in its dtype, contiguous or channels-last: C channels, then
        C of learned variance where a slot reads them; channels beyond are not read. After a slot's last row its rows of
        u are unchanged.
    rescales: whether `state.rescale` is above 0 for any slot. rare: whether any row of a slot's table may have numbers
        in RARE, or a weight w2; else the kernel does not look. thresholds: where any slot has one; then rare.
        projections: where any slot is projected; its average is None where none has momentum.
    """
    if projections is not None:
        out = project_rows(out, state, projections)
    if rescales:
        latents = out[:, : state.x.shape[1]]
        GUIDANCE_RESCALE(latents, state.table, state.counter, state.steps, state.rescale, state.factor, state.rows)
    if thresholds is not None:
        threshold_rows(out, state, thresholds)
    END_STEP(out, *state, rare=rare)


def fuses(x: Tensor) -> bool:
    """Whether `end_step` runs the kernel for latents like x. If not, it waits for the device, and the functions above
    are to be called.
    """
    return bool(END_STEP.path(x, x, x))
