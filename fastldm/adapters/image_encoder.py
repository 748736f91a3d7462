"""CLIP's image encoder, which IP-Adapters read: transformers' CLIPVisionModelWithProjection, from a folder.

Its input is prepared as diffusers' pipelines do: by transformers' CLIPImageProcessor, with CLIP's own mean and
deviation, at the encoder's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastldm.errors import CheckpointError, EngineError, InputError
from fastldm.reading import check_file

FILES = ("config.json", "model.safetensors")


class ImageEncoder:
    """Pictures -> vectors or hidden states."""

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        self.model, self.processor, self.source = model, processor, source

    @property
    def size(self) -> int:
        """Height and width in pixels of its input."""
        return int(self.model.config.image_size)

    def pixels(self, pictures: Sequence[Image.Image] | Tensor) -> Tensor:
        """Its input (P, 3, S, S) float32, on the host. A tensor is one already: InputError for another size."""
        if isinstance(pictures, Tensor):
            if tuple(pictures.shape[2:]) != (self.size, self.size):
                raise InputError(
                    f"ip_adapter_image is a tensor of shape {tuple(pictures.shape)}, which is the image encoder's own "
                    f"input: expected (pictures, 3, {self.size}, {self.size}), or a picture in another form"
                )
            return pictures.detach().to("cpu", torch.float32, copy=True)
        return self.processor(list(pictures), return_tensors="pt").pixel_values.float()

    @torch.no_grad()
    def embeds(self, pixels: Tensor, hidden: bool) -> Tensor:
        """(P, 3, S, S) -> the projected vectors (P, D), or the hidden states before the last layer (P, L, D)."""
        if hidden:
            return self.model(pixels, output_hidden_states=True).hidden_states[-2]
        return self.model(pixels).image_embeds


def read_image_encoder(folder: Path, dtype: torch.dtype, *, allow_pickle: bool = False) -> ImageEncoder:
    """Read an image encoder from a folder of transformers, in `dtype` on the host.

    CheckpointError for a folder that is missing, damaged or of another kind; EngineError without transformers.
    """
    check_file(folder / FILES[0])
    try:
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
    except ImportError as error:
        raise EngineError(
            "an IP-Adapter's image encoder needs transformers, which is not installed: pip install transformers, or "
            "pass image_encoder_folder=None and give ip_adapter_image_embeds"
        ) from error
    options: dict[str, Any] = {"use_safetensors": None if allow_pickle else True, "local_files_only": True}
    try:
        with _without_bar():
            load: Any = CLIPVisionModelWithProjection.from_pretrained
            model, report = load(str(folder), dtype=dtype, output_loading_info=True, **options)
        size = model.config.image_size
        processor = CLIPImageProcessor(size=size, crop_size=size)
    except Exception as error:  # foreign code, on files with any content
        raise CheckpointError(f"{folder} is no image encoder of CLIP: {_first_line(error)}") from error
    wrong = [*report["missing_keys"], *report.get("mismatched_keys", ())]
    if wrong:
        raise CheckpointError(
            f"{folder} is no image encoder of CLIP: it lacks {len(wrong)} tensors, such as {wrong[0]}."
        )
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity in {dtype}.".replace("torch.", ""))
    return ImageEncoder(model, processor, str(folder))


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers draws one for each model that it loads."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
