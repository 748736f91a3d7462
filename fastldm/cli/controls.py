"""Controls on the command line: `--control FILE:SCALE --control-image FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastldm.errors import InputError

if TYPE_CHECKING:
    from fastldm.pipeline import Pipeline


def check(controls: Sequence[tuple[str, float]], pictures: Sequence[str]) -> None:
    """Before a model is loaded. InputError for controls without pictures, and for pictures that cannot be read."""
    from fastldm.image import measure

    if len(controls) != len(pictures):
        raise InputError("--control and --control-image go together: give one picture for each control")
    for picture in pictures:
        measure(picture, "--control-image")


def attach(
    pipe: Pipeline, controls: Sequence[tuple[str, float]], pictures: Sequence[str], *, allow_pickle: bool = False
) -> dict[str, Any]:
    """Attach controls. Returns the fields of a request that reads these pictures with them. Of a bundle they are named:
    it has those that it was exported with."""
    bundled = {} if pipe.backend == "torch" else pipe.controls
    names = [
        source if source in bundled else pipe.attach_control(source, allow_pickle=allow_pickle)
        for source, _ in controls
    ]
    if not names:
        return {}
    scales = dict(zip(names, (scale for _, scale in controls), strict=True))
    return {
        "control_image": dict(zip(names, pictures, strict=True)),
        "controlnet_conditioning_scale": scales,
        "adapter_conditioning_scale": scales,
    }
