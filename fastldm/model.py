"""From a path or an id to a loaded model: a checkpoint on PyTorch, or a bundle on the fastest backend.

`fastldm.export` is imported only for bundles.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastldm import checks
from fastldm.device import choose_device, choose_dtype
from fastldm.errors import EngineError, InputError
from fastldm.export.backends import BACKENDS
from fastldm.export.engine import is_bundle
from fastldm.loading import spec as loading
from fastldm.loading.mapped import Mapped
from fastldm.loading.state import load_module
from fastldm.sizes import Axis
from fastldm.system import cache_root

Opened = tuple[loading.Spec, loading.LoadedModel, str, Mapped]
"""A model's spec, its networks, its name, and its mapped weight files."""


def describe(path_or_id: str | os.PathLike[str] = "default", **options: Any) -> loading.Spec:
    """Describe a checkpoint or a bundle; loads no weights. Options and errors as for `loading.spec.describe`, and
    BundleError for an invalid bundle."""
    loading.check_options(options)
    if is_bundle(path_or_id):
        return _read_bundle(path_or_id).model
    return loading.describe(path_or_id, **options)


def open_model(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    prepared: bool = True,
    **options: Any,
) -> Opened:
    """Load a model: see `Pipeline.from_pretrained` for arguments and errors. prepared: whether "auto" takes what
    `fastldm prepare` made of it."""
    checks.instance("path_or_id", path_or_id, (str, os.PathLike), 'a path, a hub id or "default"')
    checks.known(options, ("device", "dtype", "torch_dtype", "backend", *loading.OPTIONS))
    checks.instance("backend", backend, str, "auto or a backend's name")
    if device is not None:
        checks.instance("device", device, (str, torch.device), "a device, such as cpu or cuda:1")
    if dtype is not None:
        checks.instance("dtype", dtype, (str, torch.dtype), "float32, float16 or bfloat16")
    loading.check_options(options)
    device = choose_device(backend_device(backend, device))
    requested = path_or_id
    if prepared:
        path_or_id, backend = or_prepared(path_or_id, backend, device, dtype, **options)
    if path_or_id is not requested:
        return _open_bundle(path_or_id, backend, device, dtype)
    backend = choose_backend(backend, path_or_id, device, dtype)
    if is_bundle(path_or_id):
        unused = [name for name, value in options.items() if (value is None if name == "text_encoder" else value)]
        if unused:
            raise InputError(f"{', '.join(unused)}: not for a bundle, which was exported from one checkpoint")
        if backend != "torch":
            return _open_bundle(path_or_id, backend, device, dtype)
        from fastldm.export import networks

        source = networks.source(_read_bundle(path_or_id))
        path_or_id, options = source.model, source.options
    return _open_checkpoint(path_or_id, device, choose_dtype(dtype, device), options)


def model_name(path_or_id: str | os.PathLike[str]) -> str:
    """What a model is called: a bundle as the model that it was exported from, all else by the last part of its path or
    id."""
    if is_bundle(path_or_id):
        return str(_read_bundle(path_or_id).manifest["model"])
    return Path(str(path_or_id)).name


def backend_for(model: str, backend: str, *, on_torch: bool) -> str:
    """The backend to load a model on. on_torch: whether a bundle cannot do what is wanted: then a checkpoint runs on
    PyTorch, where it was prepared too."""
    return "torch" if backend == "auto" and on_torch and not is_bundle(model) else backend


def or_prepared(
    path_or_id: str | os.PathLike[str],
    backend: str,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> tuple[str | os.PathLike[str], str]:
    """What "auto" takes for a model: the bundle in the cache that `fastldm prepare` made of it, and that one's fastest
    backend; else the model and the backend as they are."""
    # Where nothing was prepared, nothing more is imported.
    there = backend == "auto" and device.type == "cpu" and (cache_root() / "prepared").is_dir()
    if not there or is_bundle(path_or_id):
        return path_or_id, backend
    from fastldm.export import prepared

    return prepared.find(str(path_or_id), options, device, dtype) or (path_or_id, backend)


def _open_bundle(
    path: str | os.PathLike[str], backend: str, device: torch.device, dtype: str | torch.dtype | None
) -> Opened:
    """BundleError for a file that was changed since the export, before anything is run."""
    from fastldm.export import networks
    from fastldm.export.bundle import Bundle

    folder = Path(path).expanduser()
    mapped = Mapped(folder.rglob("*.onnx*") if device.type == "cpu" else ())  # which engines map too
    bundle = Bundle.open(folder)
    return bundle.model, networks.load(bundle, backend, device, dtype), bundle.manifest["model"], mapped


def _open_checkpoint(
    path_or_id: str | os.PathLike[str], device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]
) -> Opened:
    spec, mapped = loading.describe(path_or_id, **options), Mapped()

    def fill(module: torch.nn.Module, name: str) -> Any:
        nonlocal mapped
        component = spec.checkpoint.components[name]
        files = Mapped(component.files)
        state = component.state(to_prepare=True)
        if device.type == "cpu" and any(tensor.dtype == dtype for tensor in state.values()):
            mapped |= files  # else all tensors are copied
        return load_module(module, state, dtype=dtype, device=device, source=component.source)

    networks = loading.load(spec, fill)
    return spec, networks, model_name(path_or_id), mapped


def backend_device(backend: str, device: str | torch.device | None) -> str | torch.device | None:
    """The default device of a backend, if `device` is None: OpenVINO runs on the CPU, even if there is a GPU."""
    only_cpu = backend in BACKENDS and BACKENDS[backend].devices == ("cpu",)
    return "cpu" if device is None and only_cpu else device


def choose_backend(
    backend: str, path: str | os.PathLike[str], device: torch.device, dtype: str | torch.dtype | None = None
) -> str:
    """The backend for the model at a path: the requested one, or for "auto" PyTorch, if it is no bundle.

    For a bundle, "auto" is the fastest backend for loading and generating an image, as `fastldm verify` measured on
    this machine; without measurements, the first installed one of OpenVINO and ONNX Runtime, on a GPU of TensorRT, if
    engines were built ahead of time, and ONNX Runtime. Only backends that compute in `dtype` are considered. Nothing is
    exported, built or measured here.

    Raises InputError for an unknown backend, and for one that runs only bundles if this is none; EngineError if none is
    installed.
    """
    if backend not in ("auto", "torch", *BACKENDS):
        raise InputError(f"backend is {backend!r}: expected auto, torch, {', '.join(BACKENDS)}")
    if not is_bundle(path):
        if backend in BACKENDS:
            raise InputError(f"{backend} runs bundles, and {path} is none: `fastldm export -m {path} OUT` makes one")
        return "torch"
    if backend != "auto":
        return backend
    from fastldm.export import auto

    return auto.choose(_read_bundle(path), device, dtype)


def latents(path: str | os.PathLike[str]) -> list[tuple[Axis, Axis]]:
    """The allowed ranges of latent height and width of a bundle."""
    from fastldm.export import networks

    return networks.latents(_read_bundle(path))


def precisions(
    path: str | os.PathLike[str], backend: str, device: torch.device, dtype: str | torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that a bundle was exported in, and the one that a backend would compute in."""
    from fastldm.export import networks

    bundle = _read_bundle(path)
    computed = networks.precision(bundle, backend, device, dtype)
    return getattr(torch, bundle.manifest["dtype"]), getattr(torch, computed)


def need_exporter() -> None:
    """EngineError if the packages for exporting are not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise EngineError(f"{', '.join(missing)} is not installed: pip install 'fastldm[onnx]'")


def _read_bundle(path: str | os.PathLike[str]) -> Any:
    """A bundle, without comparing its files with their hashes. BundleError if its manifest is invalid."""
    from fastldm.export.bundle import Bundle

    return Bundle.read(Path(path).expanduser())
