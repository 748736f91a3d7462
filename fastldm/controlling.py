"""ControlNets and T2I-Adapters of a loaded model, attached and detached while requests run: a part of `Pipeline`."""

from __future__ import annotations

import inspect
import os
import re
import sys
from typing import Any

from torch import nn

from fastldm import checks
from fastldm.adapters.control import Control, read_control
from fastldm.errors import CheckpointError
from fastldm.loading import changes
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
        names = ", ".join(controls.attached) or "none"
        stages.need_torch(
            f"which has the controls that it was exported with ({names}) and takes no others: "
            "`fastldm export --control PATH`"
        )
        checks.known(options, _OPTIONS)
        if name is not None:
            controls.check_free(checks.short_text("name", name, "a control's name"))
        control = read_control(path_or_id, stages.spec, dtype=stages.dtype, **options)
        # One thread drives the device.
        return controls.attach(name, self.session.call(lambda: control.prepare(stages.device)))

    def detach_control(self, name: str | None = None) -> None:
        """Forget a control, or all; requests that were submitted with it keep it. InputError for an unknown name."""
        self.stages.controls.detach(None if name is None else [checks.short_text("name", name, "a control's name")])


def without_controls(pipe: Any) -> tuple[Any, list[Any]]:
    """A diffusers pipeline without its ControlNets or T2I-Adapters, which are given beside it; any other as it is.

    CheckpointError for one whose pictures are made by more than its class, its weights and its configs.
    """
    library, name = sys.modules.get("diffusers"), type(pipe).__name__
    controlled = re.fullmatch(r"(StableDiffusion(?:XL)?)(?:ControlNet|Adapter)((?:Img2Img|Inpaint)?Pipeline)", name)
    if library is None or controlled is None or not isinstance(pipe, library.DiffusionPipeline):
        return pipe, []
    # These convert pictures to RGB, as is always done here.
    differences = [one for one in changes.of_pipeline(pipe) if "image_processor.do_convert_rgb" not in one]
    if differences:
        raise CheckpointError(f"{name}: {changes.describe(differences)}")
    base = getattr(library, "".join(controlled.groups()))
    accepted = inspect.signature(base.__init__).parameters
    parts = {key: value for key, value in {**pipe.config, **pipe.components}.items() if key in accepted}
    own = (pipe.components.get(key) for key in ("controlnet", "adapter"))
    return base(**parts), [control for controls in own for control in as_list(controls)]


def as_list(controls: Any) -> list[Any]:
    """None, one, or several; diffusers' MultiControlNetModel and MultiAdapter too."""
    for name in ("nets", "adapters"):
        controls = getattr(controls, name, controls)
    if isinstance(controls, (list, tuple, nn.ModuleList)):
        return list(controls)
    return [] if controls is None else [controls]
