"""Opening a model on disk or on a hub.

    path or id -> resolve -> open_diffusers or open_single_file -> Checkpoint -> Component.state -> load_module

A `Checkpoint` has the raw configs and no weights; `Component.state` maps the weights into memory, and `load_module`
assigns them to a network that was built on the meta device. Any problem with the files (a missing folder, a git-lfs
pointer, shapes of another family) becomes a CheckpointError that names it.
"""

from __future__ import annotations

from fastldm.errors import InputError
from fastldm.loading.checkpoint import Checkpoint
from fastldm.loading.diffusers_folder import open_diffusers
from fastldm.loading.formats import PathLike
from fastldm.loading.hub import resolve
from fastldm.loading.single_file import open_single_file


def open_checkpoint(
    path_or_id: PathLike,
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
    text_encoder: bool | None = True,
) -> Checkpoint:
    """Open a diffusers folder, a hub id or a single file. Reads no weights.

    Arguments and errors are those of `resolve`, `open_diffusers` and `open_single_file`; `prediction_type` is only for
    single files, which seldom state it.
    """
    path = resolve(
        path_or_id,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        variant=variant,
        allow_pickle=allow_pickle,
        text_encoder=text_encoder,
    )
    if path.is_dir():
        if prediction_type is not None:
            raise InputError(f"prediction_type is for single files; {path} has it in its scheduler_config.json.")
        return open_diffusers(path, variant, allow_pickle=allow_pickle, text_encoder=text_encoder)
    return open_single_file(path, prediction_type=prediction_type, allow_pickle=allow_pickle)
