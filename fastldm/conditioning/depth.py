"""Depth maps for networks that read one: a caller's, or what the checkpoint's own network estimates of a picture.

Source: `prepare_depth_map` of diffusers' StableDiffusionDepth2ImgPipeline.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import CheckpointError, EngineError

if TYPE_CHECKING:
    from PIL.Image import Image


FOLDERS = ("depth_estimator", "feature_extractor")


class DepthEstimator:
    """transformers' DPTForDepthEstimation with its image processor, loaded when a map is first needed, in float32."""

    def __init__(self, source: Path | tuple[Any, Any]) -> None:
        """source: the folder of depth_estimator/ and feature_extractor/, or both loaded, of an adopted pipeline."""
        self.source = source

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        if not isinstance(self.source, Path):
            return self.source
        try:
            from transformers import DPTForDepthEstimation, DPTImageProcessor
        except ImportError:
            raise EngineError("transformers estimates depth: pip install 'fastldm[depth]', or give depth_map") from None
        network, processor = (self.source / name for name in FOLDERS)
        options: dict[str, Any] = {"local_files_only": True}
        try:
            return (
                DPTForDepthEstimation.from_pretrained(network, use_safetensors=True, **options).eval(),
                DPTImageProcessor.from_pretrained(processor, **options),
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{network} does not load: {reason}. Give depth_map to do without") from error

    def save(self, folder: Path) -> None:
        """Write its two folders into another. CheckpointError for one without safetensors."""
        if not isinstance(self.source, Path):
            for name, part in zip(FOLDERS, self.source, strict=True):
                part.save_pretrained(folder / name)
            return
        network, processor = (self.source / name for name in FOLDERS)
        weights = sorted(network.glob("model*.safetensors*"))
        if not weights:
            raise CheckpointError(f"{network} has no model.safetensors, which a bundle takes with it")
        for path in (network / "config.json", *weights, processor / "preprocessor_config.json"):
            target = folder / path.parent.name
            target.mkdir(exist_ok=True)
            shutil.copyfile(path, target / path.name)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image], device: torch.device) -> Tensor:
        """Pictures of one size as maps (n, H, W) in float32, larger where it is nearer, of the estimator's own size."""
        network, processor = self._parts
        pixels = processor(images=list(pictures), return_tensors="pt").pixel_values
        weight = next(network.parameters())
        return network.to(device)(pixels.to(device, weight.dtype)).predicted_depth.float()


def normalised(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (n, H, W) as the network reads them: (n, 1, h, w), resized by bicubic interpolation, each from -1 (far) to 1
    (near); a flat one is -1."""
    depth = F.interpolate(depth[:, None].float(), size=size, mode="bicubic", align_corners=False)
    low, high = (extreme(depth, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    return 2 * (depth - low) / (high - low).clamp(min=1e-12) - 1
