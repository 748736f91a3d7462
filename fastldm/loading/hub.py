"""From a hub id or a path to a local path: the files that fastldm needs are downloaded to huggingface_hub's cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastldm.errors import CheckpointError
from fastldm.loading.formats import (
    DEPTH,
    INDEX,
    PREPROCESSOR,
    SCHEDULERS,
    TOKENIZER_FILES,
    TOKENIZERS,
    Config,
    PathLike,
    choose_weights,
    component_classes,
    listed_classes,
    without_text,
)
from fastldm.models.families import IMAGE_ENCODER, WEIGHTLESS, folder_name, network_classes
from fastldm.reading import check_path, read_json

logger = logging.getLogger("fastldm")


def resolve(
    path_or_id: PathLike,
    *,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    allow_pickle: bool = False,
    text_encoder: bool | None = True,
) -> Path:
    """The local path of a model. A path that exists is returned unchanged, without network access.

    Otherwise "owner/name" is a hub id: the files that fastldm needs of that repository (configs, tokenizers, and each
    network's weights in one variant and one format) are downloaded to huggingface_hub's cache, or only looked up there
    if `local_files_only` or HF_HUB_OFFLINE is set. text_encoder: as of `open_diffusers`.

    Raises CheckpointError for a path that does not exist, and for all errors of the hub.
    """
    path = check_path(path_or_id, "path_or_id")
    if path.exists():
        return path
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link that leads nowhere, or to itself.")
    text = str(path_or_id)
    if not is_id(text):
        raise CheckpointError(
            f"{text} does not exist here. Give a model folder, a .safetensors file, or a hub id (owner/name)."
        )
    return _from_hub(text, revision, cache_dir, local_files_only, variant, allow_pickle, text_encoder)


def is_id(text: str) -> bool:
    """Whether a text has the form of a hub id, "owner/name"."""
    is_file = text.endswith((".safetensors", ".ckpt", ".bin", ".pt"))
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)) and not is_file


def find_files(
    repo: str,
    choose: Callable[[list[str]], Sequence[str]],
    *,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
) -> list[Path]:
    """Files of a hub repository, downloaded to huggingface_hub's cache, or only looked up there if `local_files_only`
    or HF_HUB_OFFLINE is set. choose: their names among those that there are.

    CheckpointError for what is no hub id, and for all errors of the hub.
    """
    if not is_id(repo):
        raise CheckpointError(f"{repo} does not exist here. Give a file, a folder, or a hub id (owner/name).")
    import huggingface_hub
    from huggingface_hub import constants

    cache = None if cache_dir is None else os.fspath(cache_dir)
    with _hub_errors(repo, revision, offline := local_files_only or constants.HF_HUB_OFFLINE):
        if offline:
            snapshot = Path(
                huggingface_hub.snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True)
            )
            names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        else:
            names = _names(repo, revision)
    chosen = choose(names)
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache, "local_files_only": offline}
    with _hub_errors(repo, revision, offline):
        return [Path(huggingface_hub.hf_hub_download(repo, name, **options)) for name in chosen]


def _names(repo: str, revision: str | None) -> list[str]:
    """The files of a repository."""
    import huggingface_hub

    siblings = huggingface_hub.model_info(repo, revision=revision, timeout=10).siblings or []
    return [file.rfilename for file in siblings]


def _from_hub(
    repo: str,
    revision: str | None,
    cache_dir: PathLike | None,
    local_files_only: bool,
    variant: str | None,
    allow_pickle: bool,
    text_encoder: bool | None,
) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    cache = None if cache_dir is None else os.fspath(cache_dir)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    with _hub_errors(repo, revision, offline):
        index_file = huggingface_hub.hf_hub_download(
            repo, INDEX, revision=revision, cache_dir=cache, local_files_only=offline
        )
    snapshot = Path(index_file).parent
    index, commit = read_json(snapshot / INDEX), snapshot.name  # later downloads use the same commit
    index = without_text(index) if text_encoder is None else index
    if not offline:
        try:
            names = _names(repo, commit)
        except Exception as error:  # as in _hub_errors
            logger.warning("%s: the hub cannot be reached (%s); trying the local cache", repo, error)
            offline = True
    if offline:
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.glob("*/*")]
        _needed_files(index, names, variant, allow_pickle, source=f"{repo} in the local hub cache")
        return snapshot
    needed = _needed_files(index, names, variant, allow_pickle, source=repo)
    with _hub_errors(repo, revision, offline):
        return Path(huggingface_hub.snapshot_download(repo, revision=commit, cache_dir=cache, allow_patterns=needed))


def _needed_files(
    index: Config, names: Collection[str], variant: str | None, allow_pickle: bool, source: str
) -> list[str]:
    """The files of a repository that loading reads."""
    classes = component_classes(index, source)
    folders = {name: folder_name(index.get("_class_name"), name) for name in classes}
    files_of = {
        name: {path.removeprefix(f"{own}/") for path in names if path.startswith(f"{own}/") and path.count("/") == 1}
        for name, own in folders.items()
    }
    known = network_classes(index.get("_class_name"))
    networks = {name: files_of[name] for name in classes if name in known and classes[name] not in WEIGHTLESS}
    selected = choose_weights(networks, variant, allow_pickle, source)
    needed = [INDEX, *(f"{folders[name]}/scheduler_config.json" for name in SCHEDULERS if name in classes)]
    for name in classes:
        if name in known:
            weights = selected[name].names if name in selected else ()
            needed += [f"{folders[name]}/{file}" for file in ("config.json", *weights)]
        elif name in TOKENIZERS:
            needed += [f"{name}/{file}" for file in TOKENIZER_FILES if file in files_of[name]]
    if DEPTH in listed_classes(index):
        inside = (f"{DEPTH}/", "feature_extractor/")
        needed += [name for name in names if name.startswith(inside) and name.endswith((".json", ".safetensors"))]
    if IMAGE_ENCODER in classes:
        needed.append(f"{folder_name(index.get('_class_name'), PREPROCESSOR[0])}/{PREPROCESSOR[1]}")
    return needed


@contextmanager
def _hub_errors(repo: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Turn the hub client's errors into CheckpointErrors; those of its HTTP library differ by version: `Exception`."""
    from huggingface_hub import errors

    location = f"{repo} at revision {revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        reason = f"{repo} is gated: accept its conditions on its page, then log in with `hf auth login`."
        raise CheckpointError(reason) from error
    except errors.RepositoryNotFoundError as error:
        reason = (
            f"There is no folder {repo} here and no such model on the hub; if it is private, log in: `hf auth login`."
        )
        raise CheckpointError(reason) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the hub.") from error
    except errors.LocalEntryNotFoundError as error:
        if offline:
            reason = "the hub was not used, as local_files_only or HF_HUB_OFFLINE is set"
        else:
            reason = "the hub cannot be reached"
        raise CheckpointError(
            f"{location} is neither a folder here nor in the local hub cache, and {reason}."
        ) from error
    except errors.EntryNotFoundError as error:
        reason = f"{location} has no {INDEX}: it is not a diffusers pipeline. Files in it can be opened by their path."
        raise CheckpointError(reason) from error
    except Exception as error:
        raise CheckpointError(f"{location} cannot be downloaded from the hub: {error}") from error
