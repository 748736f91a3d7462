"""Compiling a model's kernels before its first request, for GPUs that this machine need not have.

A Docker build, which has no GPU, runs `fastldm warm --arch sm_90`; the container's first request then compiles nothing.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastldm.conditioning.prior import PriorConfigs
from fastldm.conditioning.ranking import RankerConfig
from fastldm.errors import InputError
from fastldm.loading.spec import Spec
from fastldm.planning import dry_run
from fastldm.planning.beside import Beside
from fastldm.request import Request
from fastldm.runtime.guidance import perturbed_layers
from fastldm.runtime.slots import graph_rows

ARCH_NAMES = "sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120"


def parse_arch(arch: str) -> int:
    """ "sm_90" -> 90. InputError for anything that kernels are not compiled for."""
    from fastldm.kernels.compile import ARCHS

    number = arch.removeprefix("sm_")
    if not number.isdigit() or int(number) not in ARCHS:
        raise InputError(f"arch is {arch!r}: expected {ARCH_NAMES}")
    return int(number)


def warm(
    spec: Spec,
    arch: str,
    *,
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int] = (1,),
    dtype: torch.dtype = torch.float16,
    lora: bool = False,
    controls: Sequence[dry_run.ControlConfig] = (),
    pag: bool = False,
    apg_momentum: bool = False,
    ranker: RankerConfig | None = None,
    prior: PriorConfigs = (),
    on_kernel: Callable[[str], None] | None = None,
) -> int:
    """Compile every kernel that requests of these sizes, (width, height) in pixels, and batches launch on `arch`.

    The result is in Triton's cache (TRITON_CACHE_DIR, else ~/.triton/cache), for the same versions of fastldm, torch
    and Triton. lora: with those of adapters beside the weights. controls: with those of each of these. pag: with those
    of perturbed-attention guidance, in the middle block. apg_momentum: with those of projected guidance with momentum.
    ranker: with those of ranking the pictures. prior: with those of one that is attached. on_kernel is called
    with each kernel's name when it is compiled. Returns the number of kernels.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("there is nothing to warm: triton is not installed; pip install triton")
    from fastldm.kernels.compile import Ahead, Compiled
    from fastldm.kernels.dispatch import targeting

    def on_compiled(compiled: Compiled) -> None:
        if on_kernel is not None:
            on_kernel(compiled.kernel)

    factor = spec.vae.factor
    for width, height in sizes:
        if width % factor or height % factor or width <= 0 or height <= 0:
            raise InputError(f"size is {width}x{height}: expected positive multiples of {factor}")
    ahead = Ahead(parse_arch(arch), on_compiled)
    guided = spec.family.guidance_scale > 1 and not spec.unet.needs_guidance
    perturbed = perturbed_layers(Request(""), spec.unet) if pag else ()
    # What samplers, guidance and thresholding make of the step's last kernel: few or all columns of a table, and what
    # the network's output is in.
    ends: list[dict[str, Any]] = [{"rare": True}]
    ends += [{"rare": rare, "averages": True} for rare in (False, True)] if apg_momentum else []
    with targeting(ahead):
        dry_run.run_text(spec.encoders, batch=1, dtype=dtype)
        if spec.projection is not None:
            dry_run.run_projection(spec.projection, rows=1 + guided, tokens=spec.window, dtype=dtype)
        for batch in batches:
            beside = Beside(ranker=ranker, ranked=batch, once=prior or (spec.prior.networks if spec.prior else ()))
            own = {"guided": guided, "size": spec.own_size, "batch": batch, "dtype": dtype, "arch": ahead.arch}
            for phase in beside.phases(spec.text, **own).values():
                phase()()
        for width, height in sizes:
            h, w = height // factor, width // factor
            for batch in batches:
                most = 1 + guided + (pag or (guided and spec.unet.edits))
                for rows in (graph_rows(batch * branches) for branches in range(1, most + 1)):
                    shape: dict[str, Any] = {"height": h, "width": w, "rows": rows, "tokens": spec.window}
                    sets = [(), *((control,) for control in controls)]
                    for adapted, acting in itertools.product((False, True) if lora else (False,), sets):
                        dry_run.run_unet(spec.unet, **shape, dtype=dtype, controls=acting, lora=adapted)
                    for end in ends:
                        dry_run.run_unet(spec.unet, **shape, dtype=dtype, perturbed=perturbed, **end)
                for control in controls:
                    dry_run.control(control, height=height, width=width, batch=batch, dtype=dtype)()
                dry_run.run_decoder(spec.vae, height=h, width=w, batch=batch, dtype=dtype)
                if spec.unet.enlarges_latents or not spec.unet.upscales:
                    small = {"height": h // spec.enlarges, "width": w // spec.enlarges}
                    dry_run.run_encoder(spec.vae, **small, batch=batch, dtype=dtype)
    return len(ahead.compiled)


def cache_folder() -> Path:
    """Triton's cache of compiled kernels."""
    selected = os.environ.get("TRITON_CACHE_DIR")
    return Path(selected) if selected else Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache"
