"""Depth maps for networks that read one: a caller's, or what the checkpoint's own network estimates of a picture.

Source: `prepare_depth_map` of diffusers' StableDiffusionDepth2ImgPipeline.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import CheckpointError, EngineError
from fastldm.reading import read_json

if TYPE_CHECKING:
    from PIL.Image import Image


FOLDERS = ("depth_estimator", "feature_extractor")


@dataclass(frozen=True)
class DepthConfig:
    """The sizes of a depth estimator, as JSON: those of the network, and how pictures are prepared for it."""

    model: str
    processor: str
    dtype: torch.dtype = torch.float32

    def network(self) -> Any:
        """transformers' DPTForDepthEstimation on the meta device. EngineError without transformers."""
        network, _ = _classes()
        with torch.device("meta"):
            return network(network.config_class.from_dict(json.loads(self.model))).to(self.dtype).eval()

    def input_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(3, H, W) of its input for a picture of (width, height) pixels."""
        from PIL import Image

        processor = _classes()[1].from_dict(json.loads(self.processor))
        return tuple(processor(images=[Image.new("RGB", size)], return_tensors="pt").pixel_values.shape[1:])


def _classes() -> tuple[Any, Any]:
    try:
        from transformers import DPTForDepthEstimation, DPTImageProcessor
    except ImportError:
        raise EngineError("transformers estimates depth: pip install 'fastldm[depth]', or give depth_map") from None
    return DPTForDepthEstimation, DPTImageProcessor


class DepthEstimator:
    """transformers' DPTForDepthEstimation with its image processor, loaded when a map is first needed, in float32."""

    def __init__(self, source: Path | tuple[Any, Any]) -> None:
        """source: the folder of depth_estimator/ and feature_extractor/, or both loaded, of an adopted pipeline."""
        self.source = source

    @cached_property
    def config(self) -> DepthConfig:
        """Its sizes, without weights."""
        if not isinstance(self.source, Path):
            network, processor = self.source
            dtype = next(network.parameters()).dtype
            return DepthConfig(network.config.to_json_string(use_diff=False), processor.to_json_string(), dtype)
        model = read_json(self.source / "depth_estimator" / "config.json")
        processor = read_json(self.source / "feature_extractor" / "preprocessor_config.json")
        return DepthConfig(json.dumps(model), json.dumps(processor))

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        if not isinstance(self.source, Path):
            return self.source
        model, preparing = _classes()
        network, processor = (self.source / name for name in FOLDERS)
        options: dict[str, Any] = {"local_files_only": True}
        try:
            return (
                model.from_pretrained(network, use_safetensors=True, **options).float().eval(),
                preparing.from_pretrained(processor, **options),
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
