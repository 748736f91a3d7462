"""The memory plan of a request: bytes by name, before anything is allocated.

Over 500 lines, for what a request is to memory, its plan, and what would fit in its place are read together.
"""

from __future__ import annotations

import bisect
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastldm import checks
from fastldm.adapters.selection import Selection
from fastldm.errors import InputError, OutOfMemory
from fastldm.gradients import CLIPGuidance
from fastldm.kernels import onednn
from fastldm.kernels.dispatch import Target, device_capability, targeting
from fastldm.models.clip_vision import Normalizer, VisionConfig
from fastldm.models.config import (
    AutoencoderConfig,
    PixelResidualConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from fastldm.models.controlnet import ControlNet, ControlNetConfig
from fastldm.models.t2i_adapter import T2IAdapter
from fastldm.models.vae import Decode
from fastldm.planning import beside as besides
from fastldm.planning import dry_run
from fastldm.planning.allocator import MIB, CUDAHeap, Heap, record
from fastldm.planning.beside import NOTHING, Beside
from fastldm.request import MAX_IMAGES, MAX_SIDE, MAX_STEPS, Request
from fastldm.runtime.complete import start_latents
from fastldm.runtime.controls import ControlSelection
from fastldm.runtime.denoise import Guidance
from fastldm.runtime.slots import StaticBuffers

if TYPE_CHECKING:
    from fastldm.loading.spec import Spec
    from fastldm.runtime.stages import Stages


@dataclass(frozen=True)
class Workload:
    """A request as seen by memory and device. Plans are cached by it."""

    unet: UNetConfig
    vae: AutoencoderConfig
    text: tuple[TextConfig | VisionConfig, ...]
    height: int  # of the latents
    width: int
    batch: int
    guided: bool  # whether there are negatives
    dtype: torch.dtype
    arch: int  # 90 for sm_90, 0 for a CPU
    steps: int = 30
    tokens: int = 77  # of a text
    decode: Decode = "whole"
    encode: bool = False  # whether it starts from an image
    slots: int = 0  # of the bucket; 0: one for each image
    rows: int = 0  # of the U-Net; 0: as many as the request needs
    backend: str = "torch"
    precision: torch.dtype | None = None  # of an engine, where that is not `dtype`, a bundle's
    attached: tuple[dry_run.ControlConfig, ...] = ()  # what buffers have room for
    controls: tuple[dry_run.ControlConfig, ...] = ()  # those of the request
    pictures: tuple[int, ...] = ()  # tokens of each IP-Adapter that a slot may have
    reuse: bool = False  # whether deep features are kept
    originals: int = 0  # bytes of the weights that adapters will be merged into, which are copied before
    third: bool = False  # whether guidance has another branch than the prompt's and the negative's
    gradient: bool = False  # whether it goes through the networks: CLIP guidance
    perturbed: tuple[int, ...] = ()  # places of the self-attentions that are, in a third branch
    averages: bool = False  # whether projected guidance has momentum
    repainted: bool = False  # whether an asymmetric decoder reads picture and mask
    beside: Beside = NOTHING  # what runs beside the model's own networks

    @property
    def step_rows(self) -> int:
        """Rows of the U-Net in a step of the request."""
        return self.batch * (1 + self.guided + self.third)

    @property
    def texts(self) -> int:
        """How many there are."""
        return self.batch * (1 + self.guided)

    @classmethod
    def of_spec(
        cls, spec: Spec, *, width: int, height: int, batch: int, dtype: torch.dtype, arch: int, **overrides: Any
    ) -> Workload:
        """For a model that is not loaded. width, height: of the images, in pixels. overrides: further fields."""
        checks.whole("batch", batch, 1, MAX_IMAGES, "pictures")
        checks.whole("steps", overrides.get("steps", 1), 1, MAX_STEPS, "steps")
        for name, size in (("width", width), ("height", height)):
            if checks.whole(name, size, 0, MAX_SIDE, "pixels") == 0 or size % spec.vae.factor:
                raise InputError(f"{name} is {size}: expected a positive multiple of {spec.vae.factor} for this model")
        guided = spec.family.guidance_scale > 1 and not spec.unet.needs_guidance
        defaults = {"guided": guided, "steps": spec.family.num_inference_steps, "tokens": spec.window}
        defaults |= {"third": guided, "encode": True} if spec.unet.edits else {}
        defaults |= {"encode": True} if spec.unet.enlarges_latents else {}
        shape: dict[str, Any] = {
            "height": height // spec.vae.factor,
            "width": width // spec.vae.factor,
            "batch": batch,
        }
        options = {"beside": NOTHING, **defaults, **overrides}
        options["beside"] = replace(options["beside"], once=(*options["beside"].once, *spec.beside))
        return cls(spec.unet, spec.vae, spec.encoders, **shape, dtype=dtype, arch=arch, **options)

    @classmethod
    def of_stages(cls, stages: Stages, *, width: int, height: int, batch: int, **overrides: Any) -> Workload:
        """For a loaded model, on its device; `guided` must be among the overrides."""
        arch = device_capability(stages.device.index or 0) if stages.device.type == "cuda" else 0
        configs: tuple[TextConfig | VisionConfig, ...] = tuple(stage.model.config for stage in stages.text_stages)
        configs += (stages.image_encoder.model.config,) if stages.image_encoder else ()
        factor = stages.vae.config.factor
        options: dict[str, Any] = {"height": height // factor, "width": width // factor, "batch": batch}
        options = {**options, "tokens": stages.spec.window, **overrides}
        options |= {"backend": stages.backend, "precision": getattr(torch, stages.precision)}
        options["pictures"] = tuple(stages.image_prompts.capacity([]))
        options.setdefault("beside", Beside.of_stages(stages))
        return cls(stages.unet.config, stages.vae.config, configs, dtype=stages.dtype, arch=arch, **options)

    @classmethod
    def of_request(cls, stages: Stages, request: Request, *, ranked: int = 0, **overrides: Any) -> Workload:
        """For a completed request of a loaded model, with its adapters and controls as they are now. ranked: how many
        candidates it is a part of are ranked at a time. overrides: further fields."""
        controls, adapters = request.control_image, request.adapters
        options: dict[str, Any] = {
            "width": int(request.width or 0),
            "height": int(request.height or 0),
            "batch": request.batch,
            "guided": stages.guided(request),
            "steps": int(request.num_inference_steps or 1),
            "decode": stages.decoder.mode,
            "encode": request.image is not None
            and (stages.spec.unet.enlarges_latents or not stages.spec.unet.upscales)
            and start_latents(request, stages.latent_channels) is None,
            "attached": tuple(control.network.config for control in stages.controls.attached.values()),
            "controls": controls.configs if isinstance(controls, ControlSelection) else (),
            "reuse": request.reuse > 1,
            "originals": stages.adapters.missing(adapters) if isinstance(adapters, Selection) else 0,
            "gradient": isinstance(request.gradient, CLIPGuidance),
            **of_guidance(stages.guidance(request)),
            "repainted": request.mask_image is not None and is_conditioned(stages.vae.config),
            "beside": Beside.of_request(stages, request, ranked),
        }
        return cls.of_stages(stages, **{**options, **overrides})


def of_guidance(guidance: Guidance) -> dict[str, Any]:
    """Fields of a workload: what guidance has beyond the prompt's and the negative prompt's branch."""
    perturbed = guidance.pag_layers if guidance.perturbs else ()
    return {"third": guidance.has_third, "perturbed": perturbed, "averages": guidance.averages}


def is_conditioned(vae: AutoencoderConfig) -> bool:
    """Whether it has a decoder that reads what is repainted."""
    return isinstance(vae, VAEConfig) and vae.conditioned


class Line(NamedTuple):
    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a request on the device, in bytes, by name.

    weights, buffers and libraries are resident; phases follow each other, each with its peak. cached: memory held
    beyond that, free blocks of PyTorch's allocator, or on a CPU weights in a second layout. Activations are PyTorch's:
    engines do not report theirs, and were seen to take up to several times as much. On a CPU, buffers are tensors of
    the same content that belong to the requests, and temporaries within an op (attention's scores of a block) are not
    planned: some hundred KiB a thread.
    """

    workload: Workload
    weights: tuple[Line, ...]
    buffers: tuple[Line, ...]
    libraries: tuple[Line, ...]
    phases: tuple[Line, ...]
    cached: Line

    @property
    def resident(self) -> int:
        """Bytes of weights, buffers and libraries."""
        return sum(line.bytes for line in (*self.weights, *self.buffers, *self.libraries))

    @property
    def needed(self) -> int:
        """The least memory that the request can run in: under pressure the allocator releases what is only cached."""
        return self.resident + max(line.bytes for line in self.phases)

    @property
    def peak(self) -> int:
        """The memory that the process takes from the device."""
        return self.needed + self.cached.bytes

    @property
    def loading(self) -> int:
        """The fraction of `needed` that is allocated once the model is loaded, in bytes."""
        return sum(line.bytes for line in self.weights)

    def fits(self, free: int) -> bool:
        """Whether `free` bytes are enough for model and request."""
        return self.needed <= free

    def remedies(self, free: int) -> Iterator[MemoryPlan]:
        """Plans that would fit, each with one change to the workload, or with several if one is not enough."""
        workload = self.workload
        on_torch = workload.backend == "torch"
        repainted = workload.repainted  # which is decoded picture by picture, and as a whole
        possible: list[tuple[Decode, bool]] = [
            ("sliced", workload.batch > 1 and not repainted),
            ("tiled", on_torch and not repainted),
        ]
        decodes = [mode for mode, helps in possible if helps]
        # Pixels in float32 are needed in any case.
        pixels = 12 * workload.batch * workload.height * workload.width * workload.vae.factor**2
        smaller = decodes if workload.decode == "whole" and pixels < free else []
        changes: list[dict[str, Any]] = [{"decode": mode} for mode in smaller]
        if workload.dtype == torch.float32 and on_torch:
            changes.append({"dtype": torch.float16 if workload.arch else torch.bfloat16})
        plans = [plan(replace(workload, **change)) for change in changes]
        fewer = _largest_batch(workload, free)
        plans = [candidate for candidate in (*plans, fewer) if candidate is not None and candidate.fits(free)]
        if not plans:
            last = _largest_batch(replace(workload, **{k: v for change in changes for k, v in change.items()}), free)
            plans = [] if last is None else [last]
        yield from plans

    def advice(self, free: int) -> str:
        """The changes that would make it fit, as text."""
        ways = [difference(self.workload, candidate.workload) for candidate in self.remedies(free)]
        return ", or ".join(ways) or "a smaller size, or a device with more memory"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        workload = self.workload
        fields = ("batch", "guided", "third", "averages", "arch", "steps", "tokens", "decode", "encode", "backend")
        factor = workload.vae.factor
        return {
            "workload": {
                "width": workload.width * factor,
                "height": workload.height * factor,
                "dtype": str(workload.dtype).removeprefix("torch."),
                **{name: getattr(workload, name) for name in fields},
            },
            **{
                component: [line._asdict() for line in getattr(self, component)]
                for component in ("weights", "buffers", "libraries", "phases")
            },
            "cached": self.cached._asdict(),
            **{name: getattr(self, name) for name in ("resident", "needed", "peak")},
        }


def check(workload: Workload, free: int, label: str) -> None:
    """`refuse`, without a plan where the upper bound fits: the first plan in a process takes a second (for PyTorch's
    meta device imports its compiler), later ones some tenths.
    """
    if workload.gradient or upper_bound(workload) > free:
        refuse(plan(workload), free, label)


def upper_bound(workload: Workload) -> int:
    """More bytes than a request takes besides the weights: two to three times as many."""
    unet, vae, rows = workload.unet, workload.vae, workload.step_rows
    width = vae.out_channels
    if not isinstance(vae, PixelResidualConfig):
        width = (
            vae.decoder_width if isinstance(vae, TinyVAEConfig) else max(*vae.channels[:2], *vae.decoder_channels[:2])
        )
    latents = workload.height * workload.width
    tokens = workload.tokens + sum(workload.pictures)
    text = 2 * tokens * sum(unet.cross_widths) + 2 * workload.steps * unet.time_channels
    numbers = 8 * workload.batch * latents * vae.factor**2 * width + 64 * rows * latents * unet.down[0].channels
    slots = workload.slots or workload.batch
    for control in (*workload.attached, *workload.controls):
        if isinstance(control, ControlNetConfig):
            numbers += (
                2 * slots * (2 * workload.tokens * sum(control.cross_widths) + workload.steps * control.time_channels)
            )
        numbers += 64 * (rows + slots) * latents * unet.down[0].channels
        numbers += 128 * workload.batch * latents * vae.factor**2
    if workload.reuse:
        numbers += (3 * slots + 1 + rows) * latents * unet.deep_channels
    if workload.averages:
        numbers += (slots + rows) * latents * 2 * unet.out_channels
    noise = 4 * workload.batch * workload.steps * latents * unet.latent_channels
    beside = workload.originals + workload.beside.upper_bound(workload.batch)
    return 256 * MIB + beside + workload.dtype.itemsize * (numbers + 4 * rows * text) + 2 * noise


def refuse(plan: MemoryPlan, free: int, label: str) -> None:
    """Raise OutOfMemory where a request does not fit besides the weights, which are loaded. free: bytes, besides them.

    label: such as "4 pictures of 1024x1024".
    """
    needed = plan.needed - plan.loading
    if needed > free:
        advice = plan.advice(free + plan.loading)
        raise OutOfMemory(
            f"{label} need {size(needed)} beside the weights, and {size(free)} are free: ask for {advice}"
        )


def size(count: int) -> str:
    """Bytes as text, in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / MIB:.1f} MiB"


def free_bytes(device: torch.device) -> int | None:
    """Free memory, with what PyTorch caches; None where the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        match = re.search(
            r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()
        )  # with cached files, which can be dropped
        return int(match[1]) * 1024 if match else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def used_bytes(device: torch.device) -> int | None:
    """What this process has of a device's memory; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


@functools.lru_cache(maxsize=64)
def plan(workload: Workload) -> MemoryPlan:
    """The plan, from a dry run of each phase: some tenths of a second, and none for a cached one."""
    with targeting(Target(workload.arch)):
        networks = _networks(workload)
        beside = workload.beside.networks(workload.dtype, workload.arch)
        buffers = StaticBuffers.empty(
            workload.unet,
            slots=workload.slots or workload.batch,
            rows=workload.rows or workload.step_rows,
            height=workload.height,
            width=workload.width,
            tokens=workload.tokens,
            steps=workload.steps,
            dtype=workload.dtype,
            device="meta",
            controls=[network for network in networks.values() if isinstance(network, ControlNet)],
            features=any(isinstance(network, T2IAdapter) for network in networks.values()),
            pictures=workload.pictures,
            reuse=workload.reuse,
            averages=workload.averages,
        )
        traces = {name: record(work()) for name, work in _phases(workload).items()}

    heap = CUDAHeap() if workload.arch else Heap()
    all_networks = {**networks, **beside}
    weights = [Line(name, heap.hold(_storages(network.parameters()))) for name, network in all_networks.items()]
    derived = heap.hold(_storages(tensor for network in all_networks.values() for tensor in network.buffers()))
    if derived:
        weights.append(Line("made of weights", derived, "phases of the convolutions that enlarge"))
    held = tuple(Line(name, heap.hold(_storages(tensors)), _FIELDS.get(name, "")) for name, tensors in _fields(buffers))
    if workload.originals:
        copies = heap.hold([workload.originals])
        held += (Line("originals", copies, "weights that adapters are merged into, as they were"),)
    if workload.repainted:
        pixels = workload.batch * workload.height * workload.width * workload.vae.factor**2 * workload.dtype.itemsize
        held += (Line("repainted", heap.hold([3 * pixels, pixels]), "pictures and masks, which the decoder reads"),)
    libraries = _libraries(workload.arch)
    heap.hold([line.bytes for line in libraries])
    phases = tuple(Line(name, heap.run(trace), _PHASES[name]) for name, trace in traces.items())
    if workload.backend != "torch":
        size = sum(p.numel() for network in networks.values() for p in network.parameters())
        cached_bytes = size * (workload.precision or workload.dtype).itemsize
        cached = Line(
            "cached",
            cached_bytes,
            f"weights in {workload.backend}'s own layout; its activations may take more than these",
        )
    elif workload.arch:
        cached = Line("cached", heap.held - heap.peak, "free blocks and the remainders of segments")
    else:
        cached_bytes = sum(p.nbytes for p in networks["U-Net"].parameters() if onednn.worth_caching(p))
        cached = Line(
            "cached", cached_bytes, "weights of the U-Net in oneDNN's layout, at most: of layers with few pixels"
        )
    return MemoryPlan(workload, tuple(weights), held, libraries, phases, cached)


_FIELDS = {
    "u": "the U-Net's input",
    "x": "latents",
    "y": "anchors",
    "history": "the history of multistep samplers",
    "noise": "the noise of all steps",
    "table": "the samplers' tables",
    "temb": "time rows of all steps",
    "text": "keys and values of every cross-attention",
    "controls": "pictures, keys and values, and time rows of ControlNets",
    "features": "of T2I-Adapters",
    "adapters": "pages and scales of each row",
    "pictures": "keys and values of the pictures of IP-Adapters",
    "perturbed": "self-attentions of each row that are",
    "thresholds": "of slots with dynamic thresholding",
    "projections": "of slots with adaptive projected guidance",
    "deep": "features of the U-Net's deep part, from step to step",
}
_PHASES = {
    "text": "prompts and negative prompts, through the encoders",
    "conditions": "keys and values of the texts, time rows of all steps",
    "control": "pictures of ControlNets and T2I-Adapters, through their own first layers",
    "step": "activations of the U-Net, and of the request's ControlNets",
    "gradient": "CLIP guidance: what U-Net and decoder keep for the way back, the image encoder apart",
    "encode": "the image to start from",
    "decode": "latents to pictures",
    **besides.PHASES,
}


def _phases(workload: Workload) -> dict[str, Callable[[], dry_run.DryRun]]:
    shape: dict[str, Any] = {"height": workload.height, "width": workload.width, "dtype": workload.dtype}
    times = 2 if workload.unet.enlarges_latents else 1
    small = {**shape, "height": workload.height // times, "width": workload.width // times}
    text: dict[str, Any] = {"rows": workload.texts, "tokens": workload.tokens}
    step: dict[str, Any] = {**shape, **text, "rows": workload.step_rows, "controls": workload.controls}
    step |= {name: getattr(workload, name) for name in ("reuse", "perturbed", "averages")}
    phases: dict[str, Callable[[], dry_run.DryRun]] = {
        "text": lambda: dry_run.text(workload.text, batch=workload.texts, dtype=workload.dtype),
        "conditions": lambda: dry_run.conditions(workload.unet, steps=workload.steps, dtype=workload.dtype, **text),
        "encode": lambda: dry_run.encode(workload.vae, batch=workload.batch, **small),
        "control": lambda: _controls(workload),
        "step": lambda: dry_run.step(workload.unet, **step),
        "gradient": lambda: dry_run.gradient(
            workload.unet, workload.vae, batch=workload.batch, tokens=workload.tokens, **shape
        ),
        "decode": lambda: dry_run.decode(
            workload.vae, batch=workload.batch, mode=workload.decode, repainted=workload.repainted, **shape
        ),
    }
    factor = workload.vae.factor
    beside: dict[str, Any] = {"dtype": workload.dtype, "arch": workload.arch, "guided": workload.guided}
    beside |= {"size": (workload.width * factor, workload.height * factor), "batch": workload.batch}
    phases |= workload.beside.phases(workload.text, **beside)
    wanted = {"encode": workload.encode, "control": bool(workload.controls), "gradient": workload.gradient}
    left_out = [name for name, applies in wanted.items() if not applies]
    return {name: work for name, work in phases.items() if name not in left_out}


def _controls(workload: Workload) -> dry_run.DryRun:
    """All of them, one after the other."""
    factor = workload.vae.factor
    shape: dict[str, Any] = {"height": workload.height * factor, "width": workload.width * factor}
    runs = [
        dry_run.control(config, batch=workload.batch, dtype=workload.dtype, **shape) for config in workload.controls
    ]
    return lambda: [run() for run in runs]


def _networks(workload: Workload) -> dict[str, nn.Module]:
    kinds = ["text" if isinstance(config, TextConfig) else "image" for config in workload.text]
    names = ["U-Net", "VAE", *(f"{kind} encoder {i}" for i, kind in enumerate(kinds, 1))]
    names += [f"control {i}" for i in range(1, len(workload.attached) + 1)]
    configs: list[dry_run.Config] = [workload.unet, workload.vae, *workload.text, *workload.attached]
    networks = {name: dry_run.network(config, workload.dtype) for name, config in zip(names, configs, strict=True)}
    if workload.unet.needs_vector:
        with torch.device("meta"):
            networks["image normalizer"] = Normalizer((workload.unet.class_input_dim or 0) // 2).to(workload.dtype)
    return networks


def _storages(tensors: Iterable[Tensor]) -> list[int]:
    """The sizes of the storages of some tensors, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return list({storage._cdata: storage.nbytes() for storage in storages}.values())


def _fields(buffers: StaticBuffers) -> Iterator[tuple[str, list[Tensor]]]:
    for name, field in (*buffers.step._asdict().items(), *buffers._asdict().items()):
        if isinstance(field, Tensor):
            yield name, [field]
        elif name in ("text", "adapters", "thresholds", "projections") and field:
            yield name, [tensor for tensor in field if tensor is not None]
        elif name == "features" and field:
            yield name, list(field)
        elif name == "controls" and field:
            own = [(control.hint, control.weights, control.temb, *control.text) for control in field]
            yield name, [tensor for tensors in own for tensor in tensors]
        elif name == "pictures" and field:
            yield name, [tensor for own in field for tensor in (*own.kv, own.kv_len)]


def _libraries(arch: int) -> tuple[Line, ...]:
    """Workspaces of libraries."""
    if not arch:
        return ()
    setting = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    pairs = re.findall(r":(\d+):(\d+)", setting or (":4096:8" if arch >= 90 else ":4096:2:16:8"))
    cublas = sum(int(kib) * int(count) for kib, count in pairs) * 1024
    source = f"CUBLAS_WORKSPACE_CONFIG={setting}" if setting else f"PyTorch's default for sm_{arch}"
    return (
        Line("cuBLAS", cublas, f"{source}, for one stream"),
        Line("cuBLASLt", 0, "PyTorch lends it cuBLAS's"),
        Line("cuDNN", 64 * MIB, "an allowance: its plans take from none to some tens of MiB, for one convolution"),
    )


def _largest_batch(workload: Workload, free: int) -> MemoryPlan | None:
    """The plan for the most images, fewer than requested, that fit."""

    def fewer(batch: int) -> MemoryPlan:
        return plan(replace(workload, batch=batch, slots=0, rows=0))

    count = bisect.bisect_left(range(1, workload.batch), True, key=lambda batch: not fewer(batch).fits(free))
    return fewer(count) if count else None


def difference(workload: Workload, candidate: Workload) -> str:
    """The changes from a workload to a candidate, as text."""
    changes = []
    if candidate.batch != workload.batch:
        changes.append(f"{candidate.batch} picture{'s' * (candidate.batch > 1)} at once")
    if candidate.decode != workload.decode:
        changes.append(f"{candidate.decode} decode")
    if candidate.dtype != workload.dtype:
        changes.append(str(candidate.dtype).removeprefix("torch."))
    return " with ".join(changes)
