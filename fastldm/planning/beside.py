"""What runs beside a model's own networks, in a memory plan: what ranks and what estimates depth, and IP-Adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastldm.adapters.ip_adapter import ImageAdapter
from fastldm.conditioning.depth import DepthConfig
from fastldm.conditioning.image_encoder import ImageEncoder, Preprocessing
from fastldm.conditioning.ranking import PICTURES, RankerConfig
from fastldm.models.clip_vision import VisionConfig
from fastldm.models.config import TextConfig
from fastldm.models.ip_adapter import IPAdapter, IPAdapterConfig
from fastldm.models.prior import PriorConfig
from fastldm.models.text_projection import TextProjectionConfig
from fastldm.planning import dry_run
from fastldm.request import Request
from fastldm.runtime.image_prompts import PictureSelection, PictureUse, start_pictures
from fastldm.runtime.prior import STEPS

if TYPE_CHECKING:
    from fastldm.runtime.stages import Stages

PHASES = {
    "depth": "the depth of the image, by what the checkpoint has for that",
    "image prompts": "pictures of IP-Adapters, through the image encoder",
    "prior": "what the prior computes of texts and times, and a step of it",
    "rank": "candidates, by the CLIP model that ranks them",
}
_DEPTH_BOUND = 2**29  # bytes of activations a picture, of DPT at 384 pixels


@dataclass(frozen=True)
class Beside:
    """The sizes of what is loaded, and how much of it a request uses. Plans are cached by it."""

    ranker: RankerConfig | None = None
    ranked: int = 0
    """Candidates that are ranked at a time; none where the request has none."""
    depth: DepthConfig | None = None
    """Of a request whose depth is estimated."""
    adapters: tuple[IPAdapterConfig, ...] = ()
    encoder: VisionConfig | None = None
    """That IP-Adapters read."""
    prompts: tuple[int, ...] = ()
    """Pictures of each IP-Adapter that are encoded."""
    once: tuple[PriorConfig | TextConfig | VisionConfig | TextProjectionConfig, ...] = ()
    """unCLIP's prior or Kandinsky's, with the encoders that it reads, and text projection: `Spec.beside`."""

    @classmethod
    def of_stages(cls, stages: Stages) -> Beside:
        """What a model has loaded."""
        ranker, loaded = stages.ranking.loaded, stages.image_prompts.loaded
        return cls(
            ranker=None if ranker is None else ranker.config,
            adapters=tuple(adapter.network.config for adapter in loaded.adapters),
            encoder=None if loaded.encoder is None else loaded.encoder.model.config,
            once=stages.spec.beside or (() if stages.prior is None else stages.prior.loaded.configs),
        )

    @classmethod
    def of_request(cls, stages: Stages, request: Request, ranked: int) -> Beside:
        """Of a completed request. ranked: as of the field."""
        own, estimated = cls.of_stages(stages), stages.spec.unet.reads_depth and request.depth_map is None
        depth = stages.spec.checkpoint.depth if estimated else None
        selection = request.ip_adapter_image
        uses = selection.uses if isinstance(selection, PictureSelection) else ()
        counts = {use.adapter: 0 if use.pixels is None else len(use.pixels) for use in uses}
        return cls(
            ranker=own.ranker,
            ranked=ranked,
            depth=None if depth is None else depth.config,
            adapters=own.adapters,
            encoder=own.encoder,
            once=own.once,
            prompts=tuple(counts.get(adapter, 0) for adapter in stages.image_prompts.loaded.adapters),
        )

    def networks(self, dtype: torch.dtype, arch: int) -> dict[str, nn.Module]:
        """All of them, without weights, by name. dtype: of the model's."""
        networks: dict[str, nn.Module] = {}
        if self.ranker is not None:
            own = self.ranker_dtype(dtype, arch)
            networks["ranker's image encoder"] = dry_run.network(self.ranker.vision, own)
            if self.ranker.text is not None:
                networks["ranker's text encoder"] = dry_run.network(self.ranker.text, own)
            if self.ranker.projection is not None:
                rows, columns = self.ranker.projection
                networks["ranker's projection"] = nn.Linear(columns, rows, bias=False, dtype=own, device="meta")
        if self.depth is not None:
            networks["depth estimator"] = self.depth.network()
        for number, config in enumerate(self.adapters, 1):
            networks[f"IP-Adapter {number}"] = dry_run.network(config, dtype)
        if self.encoder is not None:
            networks["IP-Adapters' image encoder"] = dry_run.network(self.encoder, dtype)
        names = {PriorConfig: "prior", TextConfig: "prior's text encoder", TextProjectionConfig: "text projection"}
        names |= {VisionConfig: "prior's image encoder"}
        networks |= {names[type(config)]: dry_run.network(config, dtype) for config in self.once}
        return networks

    @staticmethod
    def ranker_dtype(dtype: torch.dtype, arch: int) -> torch.dtype:
        """A CPU ranks in float32."""
        return dtype if arch else torch.float32

    def phases(
        self, texts: Sequence[object], *, size: tuple[int, int], batch: int, guided: bool, dtype: torch.dtype, arch: int
    ) -> dict[str, Callable[[], dry_run.DryRun]]:
        """What a request does with them, by names of PHASES. texts: the model's own text encoders. size: (width,
        height) of the pictures in pixels."""
        phases: dict[str, Callable[[], dry_run.DryRun]] = {}
        if (depth := self.depth) is not None:
            phases["depth"] = lambda: _depth(depth, size, batch)
        if any(self.prompts) and self.encoder is not None:
            phases["image prompts"] = lambda: self._prompts(guided, dtype)
        for config in self.once:
            if isinstance(config, PriorConfig):
                phases["prior"] = functools.partial(self._prior, config, batch, dtype)
        if self.ranker is not None and self.ranked:
            own = next((config for config in texts if isinstance(config, TextConfig)), None)
            phases["rank"] = lambda: self._rank(own, dtype, arch)
        return phases

    def _prompts(self, guided: bool, dtype: torch.dtype) -> dry_run.DryRun:
        assert self.encoder is not None
        side = self.encoder.image_size
        model = dry_run.network(self.encoder, dtype)
        encoder = ImageEncoder(model, Preprocessing(side, side), "")  # type: ignore[arg-type]
        uses = []
        for config, count in self._used():
            network = dry_run.network(config, dtype)
            assert isinstance(network, IPAdapter)
            pixels = torch.empty(count, 3, side, side, device="meta")
            scales = (1.0,) * len(config.widths)
            uses.append(PictureUse(ImageAdapter("", "", None, network), scales, pixels, None, encoder))
        request = Request("", ip_adapter_image=PictureSelection(tuple(uses)))
        return torch.no_grad()(lambda: start_pictures(request, guided, torch.device("meta"), dtype))

    def _prior(self, config: PriorConfig, batch: int, dtype: torch.dtype) -> dry_run.DryRun:
        """By the defaults: 25 steps, and guided; Kandinsky's makes the vectors of negative prompts too."""
        encoders = [each for each in self.once if isinstance(each, TextConfig | VisionConfig)]
        texts = dry_run.text(encoders, batch=1, dtype=dtype)
        rows = 2 * batch * (1 + any(isinstance(each, VisionConfig) for each in encoders))
        prior = dry_run.prior(config, rows=rows, steps=STEPS, dtype=dtype)
        return lambda: (texts(), prior())

    def _rank(self, text: TextConfig | None, dtype: torch.dtype, arch: int) -> dry_run.DryRun:
        """One text, and so many pictures at a time."""
        assert self.ranker is not None
        own = self.ranker_dtype(dtype, arch)
        read, to = (text, dtype) if self.ranker.text is None else (self.ranker.text, own)
        texts = None if read is None else dry_run.text([read], batch=1, dtype=to)
        encoder, side = dry_run.network(self.ranker.vision, own), self.ranker.vision.image_size

        def run() -> None:
            if texts is not None:
                texts()
            encoder(torch.empty(min(self.ranked, PICTURES), 3, side, side, device="meta"))

        return torch.no_grad()(run)

    def upper_bound(self, batch: int) -> int:
        """More bytes than their activations take."""
        encoders = [(self.encoder, 2 * sum(self.prompts))]
        if self.ranker is not None:
            encoders.append((self.ranker.vision, min(self.ranked, PICTURES)))
        numbers = sum(
            count * (1 + config.patches) * (12 * config.hidden + 3 * config.intermediate) + 6 * config.image_size**2
            for config, count in encoders
            if config is not None
        )
        tokens = sum(prompts * max(config.tokens, 1) * sum(config.widths) for config, prompts in self._used())
        return 4 * (numbers + 8 * tokens) + (batch * _DEPTH_BOUND if self.depth is not None else 0)

    def _used(self) -> list[tuple[IPAdapterConfig, int]]:
        """Each with pictures, and how many."""
        return [(config, count) for config, count in zip(self.adapters, self.prompts, strict=False) if count]


NOTHING = Beside()


def _depth(config: DepthConfig, size: tuple[int, int], batch: int) -> dry_run.DryRun:
    network, shape = config.network(), config.input_shape(size)
    pixels = torch.empty((batch, *shape), dtype=config.dtype, device="meta")
    return torch.no_grad()(lambda: network(pixels).predicted_depth.float())
