"""Draws docs/samplers.md: every sampler and schedule by its names in other programs, from the code.

python docs/samplers.py
"""

from __future__ import annotations

from pathlib import Path

from fastldm.metadata import SCHEDULE_LABELS
from fastldm.samplers.classes import SCHEDULERS
from fastldm.samplers.names import REFUSED, REFUSED_SCHEDULES, SAMPLERS, resolve_sampler, schedules_of
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.spacing import SCHEDULES
from fastldm.samplers.table import make_table

PAGE = Path(__file__).with_suffix(".md")
# As ComfyUI's KSampler and AUTOMATIC1111's list write them; `resolve_sampler` reads each.
COMFYUI = (
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp"),
    *("heun", "heunpp2", "dpm_2", "dpm_2_ancestral"),
    *("lms", "dpm_fast", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp"),
    *("dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp"),
    *("dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
    *("dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm"),
    *("ipndm", "deis", "res_multistep", "res_multistep_cfg_pp"),
    *("res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp"),
    *("er_sde", "seeds_2", "sa_solver", "ddim"),
    *("uni_pc", "uni_pc_bh2"),
)
AUTOMATIC1111 = (
    *("DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler"),
    *("LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM"),
)
COMFYUI_SCHEDULES = {
    **{kind: kind.replace(" ", "_") for kind in ("normal", "simple", "sgm uniform", "ddim uniform", "kl optimal")},
    **{kind: kind for kind in ("karras", "exponential", "beta")},
    **dict.fromkeys(("ays", "ays xl"), "AlignYourStepsScheduler (node)"),
}
INTRODUCTION = """# Samplers and schedules

Written by `python docs/samplers.py` from the code. A name may be any of a row's, in any case, with any spaces and
punctuation, and after it one of the schedules: `"DPM++ 2M Karras"`, `"dpmpp_2m karras"` and `"dpm++ 2m karras"` are
one. Without a schedule the noise levels are those that the model's own `scheduler_config.json` asks for.

**Models.** A model in EDM's preconditioning (EDMEulerScheduler, EDMDPMSolverMultistepScheduler: Playground 2.5) takes
each sampler that steps from noise level to noise level, with its own levels, `karras`, `exponential` or `beta`; those
on timesteps of training are refused. A consistency model (CMStochasticIterativeScheduler) has its own sampler alone,
and UnCLIPScheduler is read as it is.

**Who draws.** Noise of a step is drawn by the request's `seed` or `generator`, in diffusers' order, for `dpm++ sde`
too, whose two calls share one Brownian motion. diffusers' DPMSolverSDEScheduler takes that motion from
`noise_sampler_seed` and never from the generator: a request with `noise_sampler_seed`, or a model whose files have
it, draws it so too, from torchsde (`pip install fastldm[brownian]`). Everywhere else it is refused.

**Churn.** `s_churn`, `s_tmin`, `s_tmax` and `s_noise` are of `euler`, as diffusers' `step` has them: the network is
called before the noise is added. AUTOMATIC1111's, which adds it before the call, is refused by its endpoint.

**Inversion.** `ddim inverse` and `dpm++ 2m inverse` go from a picture to its noise: give `image` with `strength=1`
and `output_type="latent"`, and what comes back as `latents`.
"""


def samplers() -> str:
    """The table of samplers."""
    lines = [
        "| sampler | ComfyUI | AUTOMATIC1111 | diffusers | calls a step | draws | schedules |",
        "|---|---|---|---|---|---|---|",
    ]
    config = read_config({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
    for name, sampler in SAMPLERS.items():
        others = [
            ", ".join(f"`{other}`" for other in known if resolve_sampler(other).name == name)
            for known in (COMFYUI, AUTOMATIC1111)
        ]
        own = f"{sampler.class_name}" if sampler.class_name in SCHEDULERS else ""
        options = ", ".join(f"{key} {value}" for key, value in sampler.options.items()) if own else ""
        table = make_table(config, 8, sampler=name, eta=1.0)
        calls = table.index.count(4)  # a step in the middle
        kinds = (
            "all" if set(schedules_of(name)) >= {"karras", *SCHEDULES} else ", ".join(schedules_of(name)) or "its own"
        )
        kinds = "all but karras, exponential, beta" if kinds == ", ".join(SCHEDULES) else kinds
        shown = f"{own} ({options})" if options else own
        lines.append(f"| `{name}` | {' | '.join(others)} | {shown} | {calls} | {_draws(name, table.draws)} | {kinds} |")
    others = [name for name, entry in SCHEDULERS.items() if not entry.names]
    lines += ["", f"Of models' files alone, or by their class's name: {', '.join(others)}."]
    return "\n".join(lines)


def _draws(name: str, draws: tuple[bool, ...]) -> str:
    if not any(draws):
        return ""
    takes_eta = not any(make_table(read_config({"_class_name": "DDIMScheduler"}), 8, sampler=name).draws)
    return "with `eta`" if takes_eta else "yes"


def schedules() -> str:
    """The table of schedules."""
    lines = ["| schedule | ComfyUI | AUTOMATIC1111 | diffusers |", "|---|---|---|---|"]
    for kind, label in SCHEDULE_LABELS.items():
        key = f"`use_{kind}_sigmas`" if kind in ("karras", "exponential", "beta") else ""
        comfyui = COMFYUI_SCHEDULES[kind]
        lines.append(f"| `{kind}` | `{comfyui}` | `{label}` | {key} |")
    lines += [
        "",
        "`Uniform` of AUTOMATIC1111 is `normal`. `ays` is of SD1 and 2, and of SDXL's models the levels for XL.",
    ]
    return "\n".join(lines)


def refused() -> str:
    """The tables of what is refused."""
    lines = ["| refused by name | why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in (*REFUSED.items(), *REFUSED_SCHEDULES.items())]
    return "\n".join(lines)


def page() -> str:
    parts = [INTRODUCTION, samplers(), "\n## Schedules\n", schedules(), "\n## What is not here\n", refused()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
