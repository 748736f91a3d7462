"""A batch on a GPU: each slot holds an image of some request, and the full step is a captured graph.

The buffers of a bucket keep their addresses (`StaticBuffers`), and small integer maps in device memory say which slot
and which text each row of the U-Net is, and which rows a slot has. So one graph for each number of rows serves every
mix of requests: with guidance and without, of any sampler, step count, prompt and seed, each at its own step. Maps are
sent when a request comes, goes or changes between guided and unguided, and at no other step; between two steps the host
only replays.

Over 500 lines, for what the buffers hold, what writes them and the step that reads them are one agreement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm import spans
from fastldm.device import send, send_numbers, to_host
from fastldm.kernels import dispatch
from fastldm.kernels.dispatch import cdiv, next_power_of_2
from fastldm.kernels.lora import Rows, ScaledPages
from fastldm.kernels.projection import Projections
from fastldm.kernels.step import BRANCHES, NEVER, StepState, end_step, table_rows
from fastldm.kernels.threshold import Thresholds
from fastldm.models.config import UNetConfig
from fastldm.models.controlnet import ControlNet
from fastldm.models.layers import channels_last
from fastldm.models.prior import Prior, PriorConfig
from fastldm.models.t2i_adapter import feature_places
from fastldm.models.unet import Features, Pictures, Residuals, Reuse, UNet
from fastldm.runtime.controls import Ranges, evaluate, joined
from fastldm.runtime.denoise import Branches, Run
from fastldm.runtime.graph import Graphs
from fastldm.runtime.pages import OF_A_ROW

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # the numbers of U-Net rows that graphs have; above, multiples of eight
FEATURES = -1  # among indices of ControlNets: T2I-Adapters ...
PICTURES = -2  # ... and IP-Adapters, the first of a run; -3 is the second, and so on
Acting = tuple[int, ...]
Arranged = tuple[Run, Branches, list[Acting], ScaledPages, bool]
IN_FLIGHT = 2  # steps that the device may be behind the host: progress, cancelling and joining stay prompt


def graph_rows(rows: int) -> int:
    """The smallest number of rows that graphs have, of at least `rows`."""
    return next((count for count in ROWS if count >= rows), 8 * cdiv(rows, 8))


def step_capacity(steps: int) -> int:
    """How many steps a slot has room for: a power of two, so that few sizes of buffers serve all requests."""
    return max(64, next_power_of_2(steps))


class ControlBuffers(NamedTuple):
    """What the steps of a bucket read for one ControlNet; its texts' lengths are the U-Net's."""

    network: ControlNet
    hint: Tensor  # (S, C, h, w): `ControlNet.hint`
    weights: Tensor  # (S, K): of each residual
    temb: Tensor  # (2S, steps, channels)
    text: tuple[Tensor, ...]  # of each cross-attention (2S, T, 2C)


class PictureBuffers(NamedTuple):
    """What they read for one IP-Adapter of each slot."""

    kv: tuple[Tensor, ...]  # of each cross-attention (2S, T, 2C): `IPAdapter.kv`
    kv_len: Tensor  # (2S,) int32: the tokens of each


class StaticBuffers(NamedTuple):
    """All that the steps of a bucket read and write: S slots, R rows of the U-Net, texts of up to T tokens.

    Allocated once, written in place and never replaced: captured steps go on reading them. A slot has two texts, the
    negative prompt's (2 * slot) and the prompt's (2 * slot + 1), of which its up to three rows of the U-Net read one.
    """

    step: StepState  # latents, anchor, history, model input, noise, tables, counters, guidance, row maps
    temb: Tensor  # (2S, steps, channels) the network's dtype: `UNet.time_rows` of each text and step
    text: tuple[Tensor, ...]  # of each cross-attention (2S, T, 2C): `UNet.cross_kv`
    kv_len: Tensor  # (2S,) int32: the tokens of each text
    maps: Tensor  # (3, R) int32: of each U-Net row its text, its slot, and the first of its text's rows in temb
    adapters: Rows  # of each U-Net row, (R, OF_A_ROW)
    controls: tuple[ControlBuffers, ...] = ()
    features: tuple[Tensor, ...] = ()  # of T2I-Adapters, (S, C, h, w) for each place where the U-Net adds some
    pictures: tuple[PictureBuffers, ...] = ()
    deep: Tensor | None = None  # (3S + 1, C, h, w): deep features of each slot's rows, and of rows that keep none
    perturbed: Tensor | None = None  # (L, R) bool: of each self-attention the U-Net rows in which it is perturbed
    thresholds: Thresholds | None = None  # of slots that are thresholded dynamically
    projections: Projections | None = None  # of slots with adaptive projected guidance
    deep_index: Tensor | None = None  # (2, R) int64: where each U-Net row keeps them, if it computes all, and has them

    @staticmethod
    def empty(
        config: UNetConfig | PriorConfig,
        *,
        slots: int,
        rows: int,
        height: int,
        width: int,
        tokens: int,
        steps: int,
        dtype: torch.dtype,
        device: torch.device | str,
        controls: Sequence[ControlNet] = (),
        features: bool = False,
        pictures: Sequence[int] = (),
        reuse: bool = False,
        averages: bool = False,
    ) -> StaticBuffers:
        """height, width: of the latents. steps: the most that a slot's table has, and the most that it draws. controls:
        ControlNets that slots may have. features: whether there may be T2I-Adapters. pictures: of each IP-Adapter that
        a slot may have, the most tokens. reuse: whether slots may reuse deep features. averages: whether they may have
        projected guidance with momentum."""
        channels, latent_width = config.latent_channels, width
        unet: Any = config  # what a prior has not is of controls, features and reuse, which it never has
        to: dict[str, Any] = {"dtype": dtype, "device": device}

        def texts(widths: Sequence[int], tokens: int = tokens) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(2 * slots, tokens, 2 * width, **to) for width in widths)

        def lengths() -> Tensor:
            return torch.zeros(2 * slots, dtype=torch.int32, device=device)

        def images(width: int, stride: int = 1, count: int = slots) -> Tensor:
            return channels_last(torch.zeros(count, width, cdiv(height, stride), cdiv(latent_width, stride), **to))

        return StaticBuffers(
            step=StepState.empty(
                slots=slots,
                rows=rows,
                channels=channels,
                height=height,
                width=width,
                steps=steps,
                draws=steps,
                extra_channels=config.in_channels - channels,
                masked=True,
                dtype=dtype,
                device=device,
            ),
            temb=torch.zeros(2 * slots, steps, config.time_channels, **to),
            text=texts(config.cross_widths),
            kv_len=lengths(),
            maps=torch.zeros(3, rows, dtype=torch.int32, device=device),
            adapters=no_adapters(rows, device),
            controls=tuple(
                ControlBuffers(
                    network,
                    hint=images(unet.down[0].channels),
                    weights=torch.zeros(slots, len(unet.skip_channels) + 1, **to),
                    temb=torch.zeros(2 * slots, steps, network.config.time_channels, **to),
                    text=texts(network.config.cross_widths),
                )
                for network in controls
            ),
            features=tuple(images(*place) for place in feature_places(unet)) if features else (),
            pictures=tuple(PictureBuffers(texts(config.cross_widths, count), lengths()) for count in pictures),
            deep=images(unet.deep_channels, count=BRANCHES * slots + 1) if reuse else None,
            perturbed=torch.zeros(len(config.self_attentions), rows, dtype=torch.bool, device=device),
            thresholds=Thresholds(
                torch.full((slots,), -1.0, device=device),
                torch.ones(slots, device=device),
                torch.ones(slots, steps, device=device),
            ),
            projections=Projections.empty(images(channels).float() if averages else None, slots, device),
            deep_index=torch.zeros(2, rows, dtype=torch.int64, device=device) if reuse else None,
        )


def no_adapters(rows: int, device: torch.device | str) -> Rows:
    """Of so many rows of the U-Net."""
    pages = torch.zeros(rows, OF_A_ROW, dtype=torch.int32, device=device)
    return Rows(pages, torch.zeros(rows, OF_A_ROW, dtype=torch.float32, device=device))


class Slots:
    """A `Batch` in static buffers."""

    def __init__(
        self, unet: UNet | Prior, buffers: StaticBuffers, graphs: Graphs | None = None, *, batch_invariant: bool = False
    ) -> None:
        """graphs: None runs every step eagerly. batch_invariant: whether a row of the U-Net is computed the same
        whatever the others are and however many, by kernels that do not depend on it."""
        self.unet, self.buffers, self.graphs = unet, buffers, graphs
        self.batch_invariant = batch_invariant
        self._free = list(range(buffers.step.x.shape[0]))
        self._slots: dict[Run, list[int]] = {}
        self._index: dict[Run, Tensor] = {}  # the slots again, (B,) int64 on the device
        self._started_finite: dict[Run, Tensor] = {}
        # The runs that the maps are for, and of each which rows are guided and controlled, its adapters, and whether it
        # computes all, if some do.
        self._arranged: list[Arranged] = []
        self._controlled: dict[int, Ranges] = {}  # rows by index of a ControlNet in the buffers; FEATURES: of features
        self._in_flight: list[torch.cuda.Event] = []
        self._networks = {control.network: (k, control) for k, control in enumerate(buffers.controls)}

    def holds(self, run: Run) -> bool:
        """Whether a run fits into these buffers, were they empty."""
        state = self.buffers.step
        return (
            run.gradient is None  # a captured step calls no function
            and run.batch <= state.x.shape[0]
            and graph_rows(run.max_rows) <= state.u.shape[0]
            and len(run.table) <= state.table.shape[1]
            and all(run.tokens <= text.shape[1] for text in self.buffers.text)
            and all(control.network in self._networks for image in (run.images or (run,)) for control in image.controls)
            and (run.features is None or len(self.buffers.features) > 0)
            and (self.buffers.deep is not None or not run.reuses)
            and (self._average is not None or not run.guidance.averages)
            and len(run.picture_tokens) <= len(self.buffers.pictures)
            and all(
                tokens <= own.kv[0].shape[1]
                for tokens, own in zip(run.picture_tokens, self.buffers.pictures, strict=False)
            )
        )

    @property
    def _average(self) -> Tensor | None:
        """See `Projections`."""
        return None if self.buffers.projections is None else self.buffers.projections.average

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        step, temb, text, kv_len, maps, adapters, controls, features, pictures, *rest = self.buffers
        others = [t for each in rest if each is not None for t in ((each,) if isinstance(each, Tensor) else each)]
        own = [t for control in controls for t in (control.hint, control.weights, control.temb, *control.text)]
        own += [t for each in pictures for t in (*each.kv, each.kv_len)]
        tensors = (*step, temb, *text, kv_len, maps, *adapters[:2], *own, *features, *others)
        return sum(t.nbytes for t in tensors if t is not None)

    # --- coming and going

    @torch.no_grad()
    def admit(self, run: Run) -> None:
        """Copy a run into free slots, one for each of its images."""
        step = self.buffers.step
        slots = self._slots[run] = [self._free.pop(0) for _ in range(run.batch)]
        index = self._index[run] = send_numbers(slots, torch.int64, step.x.device)
        copies = [(step.x, run.latents)]
        noises = [noise for noise in run.noises if noise is not None]
        copies += [(step.noise[:, k], noise) for k, noise in enumerate(noises)]
        if run.inpainting is not None:
            mask = run.inpainting.mask.expand(run.batch, -1, -1, -1)
            copies += [(step.mask, mask), (step.init, run.inpainting.init), (step.init_noise, run.inpainting.noise)]
        for control in run.controls:
            buffers = self._networks[control.network][1]
            weights = control.weights.expand(run.batch, -1)
            copies += [(buffers.hint, control.hint), (buffers.weights, weights)]
        if run.features is not None:
            levels = run.features.levels
            copies += zip(self.buffers.features, levels, strict=False)
            for level in self.buffers.features[len(levels) :]:
                level.index_fill_(0, index, 0)
        for buffer, values in copies:
            buffer.index_copy_(0, index, values.to(buffer.dtype))
        # Idle until its first step: no steps yet.
        for buffer, number in ((step.y, 0), (step.counter, 0), (step.steps, 0), (step.first_bad, NEVER)):
            buffer.index_fill_(0, index, number)
        if self.buffers.thresholds is not None:
            self.buffers.thresholds.limits.index_fill_(0, index, 1)
        if self._average is not None:
            self._average.index_fill_(0, index, 0)
        self._condition(run)
        finite = run.latents.isfinite().all()
        self._started_finite[run] = finite if run.extra is None else finite & run.extra.isfinite().all()

    def _condition(self, run: Run) -> None:
        """Write a run's conditioning and its guidance into its slots."""
        step, temb, text, kv_len, *_ = self.buffers
        slots, index, table = self._slots[run], self._index[run], run.table
        rows = table_rows(table.rows, table.draws, run.table_weights, run.inpainting is not None)
        step.table[:, : len(table)].index_copy_(0, index, send(rows, index.device).expand(run.batch, -1, -1))
        step.rescale.index_fill_(0, index, run.guidance.rescales)
        if self.buffers.thresholds is not None:
            ratio, most = table.threshold or (-1.0, 1.0)
            self.buffers.thresholds.ratio.index_fill_(0, index, ratio)
            self.buffers.thresholds.most.index_fill_(0, index, most)
        if self.buffers.projections is not None:
            self.buffers.projections.set(index, run.guidance.projection)
        # Negatives come first among the run's texts; where it has none, the slots' own are never read.
        count = run.text_kv[0].shape[0] // run.batch if run.text_kv else 1
        texts = [2 * slot + text for text in (0, 1)[2 - count :] for slot in slots]
        text_index = send_numbers(texts, torch.int64, index.device)
        states = [(temb, run.temb, text, run.text_kv)]
        for control in run.controls:
            buffers = self._networks[control.network][1]
            states.append((buffers.temb, control.temb, buffers.text, control.text_kv))
        for buffer, rows_of_time, layers, text_kv in states:
            assert rows_of_time is not None
            time_rows = rows_of_time.movedim(0, 1).expand(len(texts), -1, -1)  # (texts, steps, channels)
            buffer[:, : len(table)].index_copy_(0, text_index, time_rows.to(buffer.dtype))
            for layer, kv in zip(layers, text_kv, strict=True):
                layer[:, : kv.shape[1]].index_copy_(0, text_index, kv.to(layer.dtype))
        if run.text_len is not None:
            kv_len.index_copy_(0, text_index, run.text_len)
        elif run.text_kv:
            kv_len.index_fill_(0, text_index, run.text_kv[0].shape[1])
        for tokens, picture, own in zip(run.picture_tokens, run.pictures, self.buffers.pictures, strict=False):
            own.kv_len.index_fill_(0, text_index, tokens)
            for buffer, picture_kv in zip(own.kv, picture, strict=True):
                if picture_kv is None:  # adds nothing: attention to zeros
                    buffer[:, :tokens].index_fill_(0, text_index, 0)
                else:
                    own_rows = picture_kv[-len(texts) :]  # a callback may have taken the negatives away
                    buffer[:, :tokens].index_copy_(0, text_index, own_rows.to(buffer.dtype))

    @torch.no_grad()
    def recondition(self, run: Run) -> None:
        self._condition(run)
        self._arranged = []  # it may have other rows

    def latents(self, run: Run) -> Tensor:
        # Slots need not lie side by side, so this is a copy.
        return self.buffers.step.x.index_select(0, self._index[run]).contiguous()

    def go_on_from(self, run: Run, latents: Tensor) -> None:
        x = self.buffers.step.x
        x.index_copy_(0, self._index[run], send(latents, x.device, x.dtype))
        self._arranged = []  # the model input has to be written anew

    def release(self, run: Run) -> Callable[[], int | None]:
        slots, index, finite = self._slots.pop(run), self._index.pop(run), self._started_finite.pop(run)
        verdict = to_host(torch.stack((finite.int(), self.buffers.step.first_bad.index_select(0, index).min())))
        self._free += slots
        self._arranged = []

        def first_bad() -> int | None:
            started_finite, row = verdict.tolist()
            return -1 if not started_finite else None if row == NEVER else row

        return first_bad

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.forget(id(self.buffers))

    # --- a step

    @torch.no_grad()
    def step(self, runs: Sequence[Run]) -> str:
        deep_rows = sum(run.batch * len(run.branches) for run in runs if run.computes_all)
        total_rows = sum(run.batch * len(run.branches) for run in runs)
        mixed = 0 < deep_rows < total_rows  # else no map depends on it
        arranged = [
            (
                run,
                run.branches,
                [self._acting(run, text) for text in run.guidance.texts],
                run.beside,
                run.computes_all or not mixed,
            )
            for run in runs
        ]
        if arranged != self._arranged:
            self._arrange(arranged)
            self._arranged = arranged
        rows, deep = graph_rows(total_rows), None
        if any(run.reuses for run in runs):
            deep = graph_rows(deep_rows) if deep_rows else 0
        rescales = any(len(run.branches) > 1 and run.guidance.rescales > 0 for run in runs)
        controlled, beside = tuple(self._controlled.items()), any(run.beside for run in runs)
        rare = any(run.rare for run in runs)
        perturbed = tuple(sorted({layer for run in runs for layer in run.perturbed}))
        thresholds = any(run.table.threshold is not None for run in runs)
        projected = [run.guidance for run in runs if len(run.branches) > 1 and run.guidance.projection is not None]
        projections, averages = bool(projected), any(guidance.averages for guidance in projected)
        options = (rows, rescales, controlled, beside, deep, rare, perturbed, thresholds, projections, averages)
        body = partial(self.body, *options)
        # A graph reads tensors by address, so which buffers they are is part of the key.
        key = (id(self.buffers), *options)
        replayed = self.graphs is not None and self.graphs.run(key, body)
        if self.graphs is None:
            body()
        for run in runs:
            run.advance()
        self._pace()
        return "cuda graph" if replayed else "torch"

    def body(
        self,
        rows: int,
        rescales: bool,
        controlled: Sequence[tuple[int, Ranges]] = (),
        beside: bool = False,
        deep: int | None = None,
        rare: bool = False,
        perturbed: Sequence[int] = (),
        thresholds: bool = False,
        projections: bool = False,
        averages: bool = False,
    ) -> None:
        """The full step, of fixed shapes and addresses: the host sees none of its values. controlled: which rows of the
        U-Net have what control. beside: whether any row has adapters beside the weights. deep: how many rows, the first
        ones, compute all of the U-Net; None: all do, and nothing is kept. rare: as for `end_step`. perturbed: the
        self-attentions that are in any row. thresholds, projections, averages: whether any slot is thresholded, is
        projected, with momentum."""
        state = self.buffers.step
        invariant = dispatch.batch_invariant() if self.batch_invariant else nullcontext()
        pages, scales, _ = self.buffers.adapters
        adapters = self.unet.beside.having(Rows(pages[:rows], scales[:rows])) if beside else nullcontext()
        with spans.span("U-Net"), invariant, adapters:
            options: dict[str, Any] = {}
            for index, ranges in controlled:
                if index == FEATURES:
                    options["features"] = self._features(ranges)
                elif index <= PICTURES:
                    options.setdefault("pictures", []).extend(self._pictures(PICTURES - index, ranges))
                else:
                    own = self._residuals(self.buffers.controls[index], ranges, deep)
                    options.setdefault("residuals", []).extend(own)
            if perturbed:
                masks = self.buffers.perturbed
                assert masks is not None
                options["perturbed"] = {layer: masks[layer, :rows] for layer in perturbed}
            if deep is not None:
                options["reuse"] = Reuse(deep, partial(self._exchange, rows))
            text, time_rows = self._states(self.buffers.maps[:, :rows], self.buffers.temb)
            options |= {"kv_len": self.buffers.kv_len, "slots": text}
            out = self.unet.step(state.u[:rows], time_rows, self.buffers.text, **options)
        numbers: dict[str, Any] = {"thresholds": self.buffers.thresholds if thresholds else None}
        if projections and (slots := self.buffers.projections) is not None:
            numbers["projections"] = slots if averages else slots._replace(average=None)
        end_step(out, state, rescales=rescales, rare=rare, **numbers)

    def _states(self, maps: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """The text of each row, and its time row."""
        text, slot, first = maps
        return text, temb.flatten(0, 1).index_select(0, first + self.buffers.step.counter.index_select(0, slot))

    def _exchange(self, rows: int, computed: Tensor | None) -> Tensor:
        """See `Reuse`."""
        kept, index = self.buffers.deep, self.buffers.deep_index
        assert kept is not None
        assert index is not None
        if computed is not None:
            kept.index_copy_(0, index[0, : len(computed)], computed)
        return _images(kept, index[1, :rows])

    def _residuals(self, control: ControlBuffers, ranges: Ranges, deep: int | None) -> Iterator[Residuals]:
        maps = torch.cat([self.buffers.maps[:, first:last] for first, last in ranges], dim=1)
        model_input = torch.cat([self.buffers.step.u[first:last] for first, last in ranges])
        text, time_rows = self._states(maps, control.temb)
        weights, hint = control.weights.index_select(0, maps[1]), _images(control.hint, maps[1])
        options: dict[str, Any] = {"kv_len": self.buffers.kv_len, "slots": text, "deep": deep}
        return evaluate(control.network, model_input, ranges, weights, time_rows, control.text, hint, **options)

    def _features(self, ranges: Ranges) -> list[Features]:
        slots = [self.buffers.maps[1, first:last] for first, last in ranges]
        return [
            Features(tuple(_images(level, index) for level in self.buffers.features), first)
            for index, (first, _) in zip(slots, ranges, strict=True)
        ]

    def _pictures(self, k: int, ranges: Ranges) -> Iterator[Pictures]:
        """Of the k-th IP-Adapter of those rows."""
        kv, kv_len = self.buffers.pictures[k]
        for first, last in ranges:
            yield Pictures(kv, last - first, first, kv_len, self.buffers.maps[0, first:last])

    def _acting(self, run: Run, text: int) -> Acting:
        """What acts on rows with a text at a run's next step: indices of ControlNets in the buffers, FEATURES, and
        PICTURES or less."""
        acting = [
            self._networks[control.network][0]
            for control in run.controls
            if control.acts[run.row] and control.reads(text)
        ]
        if run.features is not None and run.features.acts[run.row]:
            acting.append(FEATURES)
        acting += [PICTURES - k for k in range(len(run.pictures))]
        return tuple(sorted(acting))

    def _arrange(self, arranged: Sequence[Arranged]) -> None:
        """Assign rows to runs, send the maps, and write the model input where it now belongs."""
        state, temb = self.buffers.step, self.buffers.temb
        capacity, device = temb.shape[1], temb.device
        slot_rows = [[-1] * BRANCHES for _ in range(state.x.shape[0])]  # of each slot, by branch
        ends = [0] * len(slot_rows)  # idle, but for those of these runs
        texts: list[int] = []
        c_in: list[float] = []
        adapters: list[ScaledPages] = []
        places: list[int] = []  # of deep features
        keeps: list[int] = []
        perturbed: list[tuple[int, ...]] = []
        # Rows that compute all come first. Those with the same controls lie side by side: few ranges, and graphs that
        # know them by their numbers of rows.
        entries = [
            (not computes_all, not acting[branch], acting[branch], run, branch)
            for run, branches, acting, _, computes_all in arranged
            for branch in branches
        ]
        ranges: dict[int, list[tuple[int, int]]] = {}
        for reuses, _, acting, run, branch in sorted(entries, key=lambda entry: entry[:3]):
            for index in acting:
                ranges.setdefault(index, []).append((len(texts), len(texts) + run.batch))
            for slot in self._slots[run]:
                slot_rows[slot][branch] = len(texts)
                ends[slot] = len(run.table)
                texts.append(2 * slot + run.guidance.texts[branch])
                adapters.append(run.beside)
                perturbed.append(run.perturbed if branch == 2 else ())
                places.append(BRANCHES * slot + branch)
                keeps.append(BRANCHES * len(slot_rows) if reuses else places[-1])
                c_in.append(float(run.table.rows[run.row][0]))
        self._controlled = {index: joined(ranges[index]) for index in sorted(ranges)}
        padding = [0] * (self.buffers.maps.shape[1] - len(texts))
        slots = [text // 2 for text in texts]
        maps = [texts + padding, slots + padding, [text * capacity for text in texts] + padding]
        self.buffers.maps.copy_(send_numbers(maps, torch.int32, device))
        if self.buffers.deep_index is not None:  # what padding rows compute is nobody's
            keeps += [BRANCHES * len(slot_rows)] * len(padding)
            self.buffers.deep_index.copy_(send_numbers([keeps, places + padding], torch.int64, device))
        if any(adapters):
            for k, buffer in enumerate(self.buffers.adapters[:2]):
                numbers = [[page[k] for page in row] + [0] * (OF_A_ROW - len(row)) for row in adapters]
                buffer[: len(numbers)] = send_numbers(numbers, buffer.dtype, device)
        if any(perturbed) and self.buffers.perturbed is not None:
            layers = range(len(self.buffers.perturbed))
            masks = [[layer in own for own in perturbed] for layer in layers]
            self.buffers.perturbed[:, : len(perturbed)] = send_numbers(masks, torch.bool, device)
        state.rows.copy_(send_numbers(slot_rows, torch.int32, device))
        state.next_rows.copy_(state.rows)
        state.steps.copy_(send_numbers(ends, torch.int32, device))

        used, channels = len(texts), state.x.shape[1]
        scales = send_numbers(c_in, torch.float32, device)
        latents = state.x.index_select(0, self.buffers.maps[1, :used])
        state.u[:used, :channels] = latents * scales[:, None, None, None]
        for run, branches, *_ in arranged:
            extra = run.extra_of(branches)
            if extra is not None:
                parts = extra.split(run.batch)  # of each branch, or one for all
                for n, branch in enumerate(branches):
                    for slot, own in zip(self._slots[run], parts[n % len(parts)], strict=True):
                        state.u[slot_rows[slot][branch], channels:] = own

    def _pace(self) -> None:
        """Wait until the device is no more than IN_FLIGHT steps behind."""
        if self.buffers.temb.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self._in_flight.append(event)
            if len(self._in_flight) > IN_FLIGHT:
                self._in_flight.pop(0).synchronize()


def _images(x: Tensor, index: Tensor) -> Tensor:
    """x (S, C, h, w)[index], in channels-last memory as x."""
    return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
