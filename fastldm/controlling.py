"""ControlNets and T2I-Adapters of a loaded model, attached and detached while requests run: a part of `Pipeline`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from fastldm import checks
from fastldm.adapters.control import Control, read_control
from fastldm.errors import InputError
from fastldm.models.unet import UNet
from fastldm.runtime.stages import Stages
from fastldm.serving.session import Session

_OPTIONS = (
    *("variant", "allow_pickle", "revision", "cache_dir", "local_files_only"),
    *("subfolder", "weight_name", "global_pool_conditions"),
)


class ControlLoader:
    """What `Pipeline` has of controls."""

    stages: Stages

    @property
    def session(self) -> Session:
        """The pipeline's."""
        raise NotImplementedError

    @property
    def controls(self) -> dict[str, Control]:
        """The ControlNets and T2I-Adapters that are attached, by name."""
        return self.stages.controls.attached

    def attach_control(
        self, path_or_id: str | os.PathLike[str] | nn.Module, name: str | None = None, **options: Any
    ) -> str:
        """Attach a ControlNet or a T2I-Adapter (docs/controls.md says which): a diffusers folder, a hub id, a single
        file, or a loaded `ControlNetModel` or `T2IAdapter` of diffusers, which is copied. Returns its name, by default
        that of the file or folder. Requests from now on have it where they give a `control_image`.

        options: variant, allow_pickle, revision, cache_dir and local_files_only, as in `from_pretrained`; subfolder of
        a folder or repository, and weight_name, a single file in it; global_pool_conditions, as in diffusers' config,
        of a single file, which does not have it: true of the ControlNet "shuffle" alone.

        CheckpointError for a file that is damaged, of another kind, or for another model, saying for which; InputError
        for a name that is taken, and for a bundle.
        """
        stages, controls = self.stages, self.stages.controls
        if not isinstance(stages.unet, UNet):
            raise InputError(
                f"this pipeline runs a bundle on {stages.backend}, which takes no controls: load the model itself"
            )
        checks.known(options, _OPTIONS)
        if name is not None:
            controls.check_free(checks.short_text("name", name, "a control's name"))
        control = read_control(path_or_id, stages.spec, dtype=stages.dtype, **options)
        chosen = controls.free_name(control.name) if name is None else name
        # One thread drives the device.
        controls.attach(chosen, self.session.call(lambda: control.prepare(stages.device)))
        return chosen

    def detach_control(self, name: str | None = None) -> None:
        """Forget a control, or all; requests that were submitted with it keep it. InputError for an unknown name."""
        self.stages.controls.detach(None if name is None else [checks.short_text("name", name, "a control's name")])


def as_list(controls: Any) -> list[Any]:
    """None, one, or several; diffusers' MultiControlNetModel and MultiAdapter too."""
    for name in ("nets", "adapters"):
        controls = getattr(controls, name, controls)
    if isinstance(controls, (list, tuple, nn.ModuleList)):
        return list(controls)
    return [] if controls is None else [controls]
