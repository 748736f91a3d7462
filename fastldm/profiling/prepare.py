"""A model exported once into fastldm's cache, verified and measured: what `fastldm prepare` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastldm.errors import EngineError, FastLDMError
from fastldm.export import auto, prepared, writing
from fastldm.export.backends import related, takes_several_steps
from fastldm.export.bundle import PICTURE, Bundle
from fastldm.export.graphs import FILES
from fastldm.export.verify import Check, verify
from fastldm.loading import spec as loading
from fastldm.profiling import backends

CPU = torch.device("cpu")


def prepare(
    model: str = "default",
    options: Mapping[str, Any] | None = None,
    *,
    backend_names: tuple[str, ...] = ("onnxruntime", "openvino"),
    say: Callable[[str], object] = lambda text: None,
) -> str:
    """Export a model, with the graph of a whole picture where it can have one, verify it on the installed backends, and
    measure these and PyTorch on this CPU. Returns what `backend="auto"` takes for the model from now on; what was
    prepared before, of the same weights, is measured anew.

    options: of `loading.describe`. say: gets a line for each thing that is done. Raises what `writing.export` raises.
    """
    options = dict(options or {})
    spec, source = loading.describe(model, **options), prepared.source_of(model)
    folder = prepared.folder_for(spec, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in options.items() if name in ("variant", "revision", "prediction_type")}
    kept["allow_pickle"] = bool(options.get("allow_pickle"))
    whole = writing.lacks_whole_picture(spec) is None
    form = {"split": True, "whole_picture": whole}
    bundle = writing.export(spec, folder, source=source, options=kept, **form, on_network=say)
    say(f"{folder}: exported")
    _measure(bundle, "torch", say)
    for backend in backend_names:
        try:
            problems = [check for check in verify(bundle, backend, model=spec) if check.problem]
        except EngineError as error:  # not installed
            say(f"{backend}: {error}")
            continue
        for name in [name for name in related(backend) if whole or name == backend]:
            several = takes_several_steps(name)
            wrong = [check.problem for check in problems if several or not _of_graphs(check, backend)]
            if wrong:
                say(f"{name} is not used, for it does not compute what PyTorch does: {wrong[0]}")
            else:
                say(f"{name}: every network and picture as PyTorch computes them")
                _measure(bundle, name, say)
    prepared.remember(spec, model, options, folder)
    return auto.fastest(bundle, CPU, pictures=prepared.PICTURES) or "torch"


def _of_graphs(check: Check, backend: str) -> bool:
    """Whether only the backend that takes several steps a call runs what was checked."""
    return check.network in FILES or (check.network == PICTURE and not check.sizes.endswith(f" on {backend}"))


def _measure(bundle: Bundle, backend: str, say: Callable[[str], object]) -> None:
    try:
        measured = backends.measure(bundle, backend, CPU)
    except FastLDMError as error:
        say(f"{backend} cannot be measured: {error}")
        return
    say(f"{backend} {measured.precision}: {measured.start_up:.2f} s to load, {measured.picture:.2f} s a picture")
