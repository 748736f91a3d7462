"""The names of samplers, and their spellings in other programs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastldm.checks import show
from fastldm.errors import InputError
from fastldm.samplers.classes import CLASSES, SIGMA_KINDS
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.spacing import SCHEDULES, on_lambdas, on_sigmas


@dataclass(frozen=True)
class Sampler:
    """A sampler by name: its scheduler class, and the options that the name sets. Other options stay the
    checkpoint's.
    """

    name: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS: dict[str, Sampler] = {
    name: Sampler(name, class_name, options)
    for class_name, entry in CLASSES.items()
    for name, options in entry.names.items()
}


def _normalized(name: str) -> str:
    """A name in lower case, without punctuation and the prefixes and suffixes of other programs."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
    return re.sub(r"^sample|scheduler$|gpu$", "", letters).replace("ancestral", "a")


_LOOKUP = {
    **{_normalized(name): Sampler(name, name) for name in CLASSES},
    **{_normalized(name): sampler for name, sampler in SAMPLERS.items()},
    **{
        _normalized(alias): Sampler(next(iter(entry.names)), class_name, options)
        for class_name, entry in CLASSES.items()
        for alias, options in entry.aliases.items()
    },
}


_SUFFIXES = {
    **{_normalized(kind): kind for kind in ("karras", "exponential", "beta", *SCHEDULES)},
    **{"alignyoursteps": "ays", "alignyourstepsxl": "ays xl", "ddim": "ddim uniform", "uniform": "normal"},
}


REFUSED = {
    "dpm adaptive": "it chooses each step's length by the error of the last one",
    "CosineDPMSolverMultistepScheduler": "its third order raises in diffusers, and its schedule is of audio models",
    "Restart": "it returns to more noise between its steps, and no table of it is built",
    "sa_solver_pece": "it calls the network twice a step, at the predicted latent and at the corrected: take sa solver",
    "seeds_3": "of the SEEDS methods, that of two calls a step is built: take seeds 2",
    "exp_heun_2_x0": "of the SEEDS methods, that with noise is built: take seeds 2",
    "exp_heun_2_x0_sde": "its second stage is at the step's end; seeds 2 has it in the middle",
    "ipndm_v": "its weights for unequal steps are not built: take ipndm",
}
"""Samplers of other programs, and why they are not here."""
REFUSED_SCHEDULES = {
    "gits": "its noise levels are published under no licence that lets a program have them",
    "polyexponential": "with its rho of 1 it is exponential: write that",
    "linear quadratic": "its levels are those of flow matching models, another family",
    "ays svd": "its levels are those of Stable Video Diffusion, a model for video",
    "ays 32": "its authors publish ten steps, and interpolate others: take ays, with any number of steps",
    "ays if": "fastldm has the published levels of Stable Diffusion 1.5 and XL alone",
}
"""Schedules of other programs, and why they are not here."""
_REFUSED = {_normalized(name): reason for name, reason in REFUSED.items()}
_REFUSED_SUFFIXES = {
    _normalized(spelled): (kind, reason)
    for kind, reason in REFUSED_SCHEDULES.items()
    for spelled in (kind, kind.replace("ays", "align your steps"))
}


def schedules_of(name: str) -> tuple[str, ...]:
    """What may be at the end of a sampler's name: how its noise levels are spaced."""
    entry = CLASSES[resolve_sampler(name).class_name]
    own = tuple(kind for kind in ("karras", "exponential", "beta") if SIGMA_KINDS[kind] in entry.keys)
    return own + (SCHEDULES if entry.spacing in (on_sigmas, on_lambdas) else ())


def resolve_sampler(name: str) -> Sampler:
    """The sampler that a user means.

    fastldm's names, other programs' ("DPM++ 2M Karras", "k_euler_a", "dpmpp_2m_sde_gpu") and diffusers' class
    names, in any case, with any spaces and punctuation. "karras", "exponential", "beta" or one of `spacing.SCHEDULES`
    at the end sets the sigmas; otherwise they stay the checkpoint's.

    Raises InputError for an unknown name, and for sigmas that the sampler does not support.
    """
    normalized = _normalized(name)
    suffix, base, sampler = "", normalized, _LOOKUP.get(normalized) or _LOOKUP.get(normalized.removeprefix("k"))
    if sampler is None:
        suffix = max((suffix for suffix in _SUFFIXES if normalized.endswith(suffix)), key=len, default="")
        base = normalized.removesuffix(suffix)
        sampler = _LOOKUP.get(base) or _LOOKUP.get(base.removeprefix("k"))
    if sampler is None and (reason := _REFUSED.get(base) or _REFUSED.get(base.removeprefix("k"))):
        raise InputError(f"sampler {show(name)} is not supported: {reason}.")
    if sampler is None and (kind := next((kind for kind in _REFUSED_SUFFIXES if normalized.endswith(kind)), None)):
        name_of, reason = _REFUSED_SUFFIXES[kind]
        raise InputError(f"schedule {name_of!r} of sampler {show(name)} is not supported: {reason}.")
    if sampler is None:
        suggestions = difflib.get_close_matches(base, _LOOKUP, 1, 0.5)
        hint = f" Did you mean {_LOOKUP[suggestions[0]].name!r}?" if suggestions else ""
        raise InputError(
            f"unknown sampler {show(name)}.{hint} There are: {', '.join(SAMPLERS)}; diffusers' class names; and these "
            f"with 'karras', 'exponential', 'beta', {', '.join(map(repr, SCHEDULES))} at the end where they take other "
            "sigmas."
        )
    if not suffix:
        return sampler
    kind = _SUFFIXES[suffix]
    if kind not in schedules_of(sampler.name):
        raise InputError(f"sampler {name!r}: {sampler.class_name} takes no {kind} sigmas, here as in diffusers.")
    only: dict[str, Any] = {key: candidate == kind for candidate, key in SIGMA_KINDS.items()}
    only["schedule"] = kind if kind in SCHEDULES else ""
    return replace(sampler, name=f"{sampler.name} {kind}", options={**sampler.options, **only})


def for_xl(name: str) -> str:
    """A sampler's name for SDXL, which has aligned steps of its own."""
    sampler = resolve_sampler(name)
    return f"{sampler.name} xl" if sampler.options.get("schedule") == "ays" else name


def is_cfg_pp(name: str | None) -> bool:
    """Whether a sampler's guidance is CFG++: guided at every scale, and meant for scales from 0 to about 1."""
    return name is not None and CLASSES[resolve_sampler(name).class_name].cfg_pp


def sampler_name(config: ScheduleConfig) -> str:
    """The name of a configuration: the last matching one of SAMPLERS, or its class."""
    class_name = CLASSES[config.class_name].like or config.class_name
    matches = [class_name]
    for name, sampler in SAMPLERS.items():
        if sampler.class_name == class_name and all(getattr(config, k) == v for k, v in sampler.options.items()):
            matches.append(name)
    return f"{matches[-1]} {config.sigma_kind}".rstrip()
