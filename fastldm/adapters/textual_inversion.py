"""Reading files of textual inversion: the embeddings of a new token, one vector or several.

| written by | keys | the token |
|---|---|---|
| diffusers | one, the token itself | the key |
| AUTOMATIC1111, safetensors | `emb_params` | the file's name |
| AUTOMATIC1111, pickle | `string_to_param.*` | `name` |
| kohya and others, for SDXL | `clip_l` and `clip_g`, of the first and the second text encoder | the file's name |

Source of the formats: diffusers' loaders/textual_inversion.py, AUTOMATIC1111's modules/textual_inversion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm import checks
from fastldm.adapters.locate import find_weights
from fastldm.adapters.read import short_hash
from fastldm.checks import show
from fastldm.errors import CheckpointError, FastLDMError, InputError
from fastldm.loading.formats import PathLike
from fastldm.loading.tensors import is_pickle, read_pickle, read_shapes, read_tensors
from fastldm.models.config import TextConfig
from fastldm.reading import check_file

MAX_VECTORS = 1024
"""Limit for the vectors of a token: a window of the text encoder has room for 75."""
MAX_TOKEN = 200  # characters
_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")  # in a folder
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # of SDXL; its refiner has the second alone
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WIDTHS = {768: "SD 1.5, or SDXL's first text encoder", 1024: "SD 2", 1280: "SDXL's second text encoder"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A token's vectors, not yet those of a model."""

    source: str
    token: str | None
    """What the file says, or None."""
    vectors: Mapping[str, Tensor]
    """(V, D) float32, by "clip_l" and "clip_g"; "" if the file is for a single text encoder."""
    short_hash: str | None = None
    """12 hexadecimal digits of SHA-256 over its file, as of AUTOMATIC1111; None if it was in memory."""

    def rows(self) -> list[Embedding]:
        """Each vector as an embedding of its own, without a token. InputError if the encoders' numbers differ."""
        counts = {len(vectors) for vectors in self.vectors.values()}
        if len(counts) != 1:
            raise InputError(f"{self.source} has unequal numbers of vectors for its text encoders: give one token")
        return [
            replace(self, token=None, vectors={key: vectors[k : k + 1] for key, vectors in self.vectors.items()})
            for k in range(counts.pop())
        ]

    def fit(self, widths: Mapping[str, int], family: str, encoder: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The vectors in `dtype` by text encoder of a model, with widths by name. encoder: the only one that is meant;
        None for all that the file has vectors for, which is the first if it does not say. Of a file for SDXL's two,
        its refiner takes those of the second.

        CheckpointError for vectors of another width or for an encoder that the model does not have, and for numbers
        beyond `dtype`.
        """
        fitting, first = {}, next(iter(widths), "text_encoder")
        for key, vectors in self.vectors.items():
            name = _ENCODERS[key] if key else encoder or first
            other = key == "clip_l" and name not in widths and "clip_g" in self.vectors
            if other or encoder not in (None, name):
                continue
            width = vectors.shape[1]
            if width != widths.get(name):
                meant = f", which are for {_WIDTHS[width]}" if width in _WIDTHS else ""
                number = "first" if name == "text_encoder" else "second"
                expected = (
                    f"its text encoder has {widths[name]}" if name in widths else f"it has no {number} text encoder"
                )
                hint = ""
                if not key and name == first != "text_encoder_2" and width == widths.get("text_encoder_2"):
                    hint = ". For its second text encoder, pass text_encoder=pipe.text_encoder_2"
                raise CheckpointError(
                    f"{self.source} has vectors of {width} channels{meant}; the model is {family}: {expected}{hint}."
                )
            fitting[name] = vectors.to(dtype)
            if not bool(fitting[name].isfinite().all()):
                raise CheckpointError(f"{self.source} has numbers beyond {dtype}, in which the model is loaded.")
        if not fitting:
            raise CheckpointError(
                f"{self.source} has no vectors for this text encoder, only {', '.join(self.vectors)}."
            )
        return fitting


def read_textual_inversion(
    source: PathLike | Mapping[str, Tensor] | Tensor,
    *,
    allow_pickle: bool = False,
    **where: Any,
) -> Embedding:
    """Read a file, or what was read from one: a dict of tensors, or a tensor (D,) or (V, D).

    source: a file, the name of one that ships, or a folder or hub id of which `weight_name`, or
        learned_embeds.safetensors or .bin, is read.
        A pickle is read only with allow_pickle, and only its tensors and its name.
    where: subfolder, weight_name, revision, cache_dir and local_files_only, see `find_weights`.

    CheckpointError for a file that is damaged, no textual inversion, or has NaN, infinity, no vectors, or too many;
    InputError for a source of another type.
    """
    checks.flag("allow_pickle", allow_pickle)
    if isinstance(source, Tensor):
        return Embedding("the given tensor", None, {"": _vectors(source, "the given tensor", InputError)})
    if isinstance(source, Mapping):
        return _read(source, "the given dict", None, InputError)
    file = find_weights(source, kind="embedding", preferred=_NAMES, allow_pickle=allow_pickle, **where)
    check_file(file)
    return replace(_read_file(file, allow_pickle), short_hash=short_hash(file, whole=True))


def _read_file(file: Path, allow_pickle: bool) -> Embedding:
    if is_pickle(file):
        content = read_pickle(file, allow_pickle)
        if isinstance(content, Tensor):
            return Embedding(str(file), None, {"": _vectors(content, str(file))})
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} holds a {type(content).__name__}; a token's vectors were expected.")
        return _read(content, str(file), file.stem)
    shapes, _ = read_shapes(file, allow_pickle=False)
    if len(shapes) > len(_ENCODERS):
        raise _unknown(shapes, str(file))
    # Copies: the file is mapped, and may change.
    tensors = {key: tensor.clone() for key, tensor in read_tensors(file, None, allow_pickle=False).items()}
    return _read(tensors, str(file), file.stem)


def _read(
    content: Mapping[Any, Any], source: str, stem: str | None, error: type[FastLDMError] = CheckpointError
) -> Embedding:
    """stem: the file's, which is the token where none is stated."""
    if "string_to_param" in content:
        inner, name = content["string_to_param"], content.get("name")
        values = inner.values() if isinstance(inner, Mapping) else ()
        tensors = [tensor for tensor in values if isinstance(tensor, Tensor)]
        if len(tensors) != 1:
            raise error(f"{source} has {len(tensors)} tensors in 'string_to_param', expected one.")
        return Embedding(source, name if isinstance(name, str) else stem, {"": _vectors(tensors[0], source, error)})
    by_key = {key: tensor for key, tensor in content.items() if isinstance(tensor, Tensor)}
    if by_key.keys() and by_key.keys() <= {*_ENCODERS}:
        by_encoder = {key: _vectors(by_key[key], f"{source}: {key}", error) for key in _ENCODERS if key in by_key}
        return Embedding(source, stem, by_encoder)
    if len(by_key) != 1:
        raise _unknown(by_key, source, error)
    ((key, tensor),) = by_key.items()
    token = stem if key == "emb_params" else key if isinstance(key, str) else None
    return Embedding(source, token, {"": _vectors(tensor, source, error)})


def _unknown(keys: Mapping[Any, Any], source: str, error: type[FastLDMError] = CheckpointError) -> FastLDMError:
    some = ", ".join(show(key) for key in [*keys][:3])
    return error(
        f"{source} is no textual inversion: it has {len(keys):,} tensors{f', such as {some}' if some else ''}, and "
        "expected are a token's alone, emb_params, string_to_param, or clip_l and clip_g."
    )


def _vectors(tensor: Tensor, source: str, error: type[FastLDMError] = CheckpointError) -> Tensor:
    """(V, D) float32 of (D,) or (V, D)."""
    if tensor.dtype not in _FLOATS:
        raise error(f"{source} has vectors of dtype {tensor.dtype}, expected floating point.")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise error(f"{source} has vectors that are {'on the meta device' if tensor.is_meta else tensor.layout}.")
    shape = tuple(tensor.shape)
    if tensor.ndim not in (1, 2) or 0 in shape or (tensor.ndim == 2 and shape[0] > MAX_VECTORS):
        raise error(f"{source} has vectors of shape {shape}, expected (channels,) or (1 to {MAX_VECTORS}, channels).")
    vectors = tensor.detach().to("cpu", torch.float32, copy=True)
    if not bool(vectors.isfinite().all()):
        raise error(f"{source} has vectors with NaN or infinity.")
    return vectors if vectors.ndim == 2 else vectors[None]


def check_encoders(configs: Sequence[TextConfig]) -> None:
    """InputError for text encoders that textual inversion is not of."""
    for config in configs:
        if config.kind:
            raise InputError(
                f"textual inversion is of CLIP's and BERT's text encoders, and this model's is {config.kind}: describe "
                "it in the prompt, or train a LoRA"
            )


def check_token(token: Any, source: str | None = None) -> str:
    """A token that a prompt can have: printable, without spaces. InputError, or CheckpointError where a file (`source`)
    says it."""
    if isinstance(token, str) and 0 < len(token) <= MAX_TOKEN and token.isprintable() and " " not in token:
        return token
    if source is None:
        raise InputError(f"token is {show(token)}: expected a text without spaces, of at most {MAX_TOKEN} characters")
    raise CheckpointError(
        f"{source} calls its token {show(token)}, which is no text without spaces of at most {MAX_TOKEN} characters: "
        "pass token= with another."
    )
