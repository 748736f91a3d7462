"""`fastldm doctor`: the machine, the device and the kernels that a model would run on, and the extras."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastldm import openmp
from fastldm.errors import FastLDMError
from fastldm.system import cache_root
from fastldm.version import __version__

if TYPE_CHECKING:
    import torch

    from fastldm.loading.spec import Spec

# extra -> its purpose, and its distributions
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("export to ONNX and run it with ONNX Runtime on a CPU", ("onnx", "onnxscript", "onnxruntime")),
    "onnx-gpu": ("the same with ONNX Runtime's CUDA provider", ("onnx", "onnxscript", "onnxruntime-gpu")),
    "openvino": ("run exported models with OpenVINO, the fastest on Intel and AMD CPUs", ("openvino",)),
    "tensorrt": ("build and run TensorRT-RTX engines", ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings")),
    "depth": ("estimate the depth of a picture, for depth to image", ("transformers",)),
    "test": ("the tests, held against diffusers and transformers", ("pytest", "diffusers", "transformers")),
}


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def examine(model: str = "default", arch: str | None = None) -> dict[str, Any]:
    """The content of `fastldm doctor`'s report, as plain data. Loads no weights.

    arch: a GPU such as "sm_90" to report the paths of ops for, in place of this machine.
    """
    import torch

    from fastldm.device import choose_device, choose_dtype
    from fastldm.model import describe

    device = choose_device(None)
    dtype = choose_dtype(None, device) if arch is None else torch.float16
    extras = {
        name: {"brings": brings, "missing": [d for d in distributions if version_of(d) is None]}
        for name, (brings, distributions) in EXTRAS.items()
    }
    problems = []
    if version_of("onnxruntime") and version_of("onnxruntime-gpu"):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall onnxruntime onnxruntime-gpu, then install the extra you want (onnx or onnx-gpu)"
        )
    if version_of("triton") is None:
        problems.append("triton is not installed: everything runs, on PyTorch's own kernels")
    spec = describe(model)
    adapters = _adapters(problems)
    return {
        "fastldm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cpu": {"threads": openmp.threads(), "capability": torch.backends.cpu.get_cpu_capability()},
        "gpus": [
            f"{torch.cuda.get_device_name(k)} (sm_{''.join(map(str, torch.cuda.get_device_capability(k)))}, "
            f"{torch.cuda.get_device_properties(k).total_memory / 2**30:.0f} GiB)"
            for k in range(torch.cuda.device_count())
        ],
        "model": {
            "name": model,
            "family": spec.family.name,
            "parameters": spec.parameters,
            "runs on": str(device),
            "dtype": str(choose_dtype(None, device)).removeprefix("torch."),
        },
        "ops": {"on": arch or str(device), "dtype": str(dtype).removeprefix("torch."), **op_paths(spec, dtype, arch)},
        "adapters": {"ship": adapters, "beside the weights": op_paths(spec, dtype, arch, lora=True)},
        "extras": extras,
        "cache": str(cache_root()),
        "problems": problems,
    }


def _adapters(problems: list[str]) -> dict[str, list[str]]:
    """The names of the adapters that ship, by kind; each is read for the default model, and what fails is a problem."""
    import torch

    from fastldm.adapters.control import read_control
    from fastldm.adapters.locate import Kind, shipped
    from fastldm.adapters.read import read_adapter
    from fastldm.adapters.textual_inversion import read_textual_inversion
    from fastldm.model import describe

    spec = describe("default")

    def embedding(path: Path) -> None:
        widths = {name: text.hidden for name, text in zip(spec.encoder_names, spec.text, strict=True)}
        read_textual_inversion(path).fit(widths, "small", None, torch.float32)

    readers: dict[Kind, Callable[[Path], object]] = {
        "lora": lambda path: read_adapter(path, spec),
        "embedding": embedding,
        "control": lambda path: read_control(path, spec),
    }
    for kind, read in readers.items():
        for name, path in shipped(kind).items():
            try:
                read(path)
            except FastLDMError as error:
                problems.append(f"--{kind} {name}, which ships, cannot be read: {error}")
    return {kind: list(shipped(kind)) for kind in readers}


def op_paths(spec: Spec, dtype: torch.dtype, arch: str | None, *, lora: bool = False) -> dict[str, Any]:
    """The path of each op of a request, from a dry run at the model's default size: path -> op -> reason -> calls.
    lora: of the layers that have adapters beside their weights, alone."""
    import torch

    from fastldm.kernels import dispatch
    from fastldm.planning import dry_run
    from fastldm.planning.warm import parse_arch

    if arch is None and not torch.cuda.is_available():
        return {"triton": {}, "torch": {"all": {"tensors are on the CPU": 1}}}
    here = torch.cuda.current_device
    on_gpu = dispatch.Target(dispatch.device_capability(here()) if arch is None else parse_arch(arch))
    calls: dict[str, dict[str, Counter[str]]] = {"triton": {}, "torch": {}}

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        verdict = op.path(*args, **kwargs)
        reasons = calls["triton" if verdict else "torch"].setdefault(op.name, Counter())
        reasons[verdict.reason] += 1

    latents: dict[str, Any] = {
        "height": spec.own_size[1] // spec.vae.factor,
        "width": spec.own_size[0] // spec.vae.factor,
    }
    with dispatch.targeting(on_gpu), dispatch.observe(watch):
        dry_run.run_unet(spec.unet, rows=2, tokens=spec.window, dtype=dtype, **latents, lora=lora)
        if lora:
            return {path: {name: own for name, own in ops.items() if "lora" in name} for path, ops in calls.items()}
        dry_run.run_text(spec.encoders, batch=1, dtype=dtype)
        dry_run.run_decoder(spec.vae, batch=1, dtype=dtype, **latents)
    return calls


def _op_lines(ops: dict[str, Any]) -> Iterator[str]:
    if not ops["triton"]:
        reasons = {reason for calls in ops["torch"].values() for reason in calls}
        yield f"all run PyTorch's own kernels: {'; '.join(sorted(reasons))}"
        return
    for name, reasons in sorted(ops["triton"].items()):
        yield f"{name:<16} triton  {sum(reasons.values())} calls"
    for name, reasons in sorted(ops["torch"].items()):
        for reason, count in sorted(reasons.items()):
            yield f"{name:<16} torch   {count} calls: {reason}"


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    model, cpu, ops = report["model"], report["cpu"], report["ops"]
    lines = [
        f"fastldm {report['fastldm']}, Python {report['python']}, torch {report['torch']}, "
        f"triton {report['triton'] or 'not installed'}",
        f"{report['platform']}",
        f"CPU      {cpu['threads']} threads, {cpu['capability']}",
        *(f"GPU      {gpu}" for gpu in report["gpus"] or ["none that torch sees"]),
        f"cache    {report['cache']}",
        f"model    {model['name']}: {model['family']}, {model['parameters'] / 1e6:.0f} M parameters, "
        f"would run on {model['runs on']} in {model['dtype']}",
        "",
        f"ops of one guided step, text and decode in {ops['dtype']} on {ops['on']}",
        *(f"  {line}" for line in _op_lines(ops)),
        "",
        "adapters of the default model, which ship",
        *(f"  --{kind:<9} {', '.join(names)}" for kind, names in report["adapters"]["ship"].items() if names),
        "layers with an adapter beside their weights, where requests with different ones share a step",
        *(f"  {line}" for line in _op_lines(report["adapters"]["beside the weights"])),
        "",
        "extras (pip install 'fastldm[NAME]')",
    ]
    for name, extra in report["extras"].items():
        state = "missing " + ", ".join(extra["missing"]) if extra["missing"] else "installed"
        lines.append(f"  {name:<9} {extra['brings']}: {state}")
    lines += ["", *(f"! {problem}" for problem in report["problems"])] if report["problems"] else []
    return "\n".join(lines)
