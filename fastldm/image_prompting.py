"""What looks at pictures on a loaded model, which requests may be running on: IP-Adapters, by diffusers' names, and the
CLIP model that ranks candidates. A part of `Pipeline`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastldm import checks
from fastldm.adapters.ip_adapter import ImageAdapter, image_encoder_fits, read_ip_adapter
from fastldm.adapters.locate import find_weights
from fastldm.adapters.selection import Weight
from fastldm.conditioning.image_encoder import ImageEncoder
from fastldm.errors import CheckpointError, InputError
from fastldm.loading.image_encoder import FILES, read_image_encoder
from fastldm.loading.ranker import find_ranker
from fastldm.loading.spec import check_options
from fastldm.reading import check_path
from fastldm.request import MAX_ADAPTERS, Request, picture_scale
from fastldm.runtime.image_prompts import PictureSelection, embeds_of
from fastldm.runtime.stages import Stages
from fastldm.serving.session import Session

Source = str | os.PathLike[str] | Mapping[str, Any]


class IPAdapterLoader:
    """What `Pipeline` has of IP-Adapters. All of it may be called while requests run: each keeps what it was submitted
    with."""

    stages: Stages

    @property
    def session(self) -> Session:
        """The pipeline's."""
        raise NotImplementedError

    @property
    def image_encoder(self) -> Any:
        """CLIP's image encoder: the model's, if it reads pictures, or the one that IP-Adapters read; else None."""
        encoder = self.stages.image_encoder or self.stages.image_prompts.loaded.encoder
        return None if encoder is None else encoder.model

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Source | Sequence[Source],
        subfolder: str | Sequence[str] | None = None,
        weight_name: str | Sequence[str] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        *,
        allow_pickle: bool = False,
        **where: Any,
    ) -> None:
        """Load an IP-Adapter, or a list of them, in place of those that were, with scale 1. Requests then may have
        `ip_adapter_image`.

        pretrained_model_name_or_path_or_dict: a file, a folder or a hub id with `subfolder` and `weight_name`, or a
            dict of tensors, or lists of those, where one folder may serve several weight_name. The kinds that are read
            are in adapters/ip_adapter.py.
        image_encoder_folder: of the image encoder, in the same subfolder, or with a "/" in the folder itself. None for
            none: requests then give `ip_adapter_image_embeds`.
        allow_pickle: whether pickles are read. where: revision, cache_dir and local_files_only.

        CheckpointError for a file that is damaged, of another kind, or for another model, saying for which; InputError
        for a bundle, and for arguments that do not fit. On an error, those that were loaded stay.
        """
        self.stages.need_torch("whose attention takes no pictures: load the model with backend='torch'")
        checks.known(where, ("revision", "cache_dir", "local_files_only"))
        check_options(where)
        checks.flag("allow_pickle", allow_pickle)
        options = {**where, "allow_pickle": allow_pickle}
        sources = _lists(pretrained_model_name_or_path_or_dict, subfolder, weight_name)
        adapters, encoder = [], None
        for source, inside, name in sources:
            if isinstance(source, Mapping):
                file: Any = source
            else:
                file = find_weights(source, subfolder=inside, weight_name=name, **options)
            adapters.append(read_ip_adapter(file, self.stages.spec, dtype=self.stages.dtype, allow_pickle=allow_pickle))
        if image_encoder_folder is not None:
            checks.short_text("image_encoder_folder", image_encoder_folder, "a folder's name, or None")
            encoder = self._image_encoder(adapters, sources[0], image_encoder_folder, options)

        def install() -> None:
            for adapter in adapters:
                adapter.network.to(self.stages.device)
            if encoder is not None:
                encoder.model.to(self.stages.device)
            self.stages.image_prompts.replace(adapters, encoder)

        self.session.call(install)

    def unload_ip_adapter(self) -> None:
        """Forget all IP-Adapters and the image encoder; requests that were submitted with them keep them."""
        self.stages.image_prompts.replace((), None)

    def load_ranker(self, path_or_id: str | os.PathLike[str], *, allow_pickle: bool = False, **where: Any) -> None:
        """Rank `candidates` of requests by a CLIP model in place of the model's own image encoder, if it has one.

        path_or_id: a CLIPModel of transformers with its tokenizer, a folder, or a hub id such as
            openai/clip-vit-large-patch14.
        allow_pickle: whether pickles are read. where: revision, cache_dir and local_files_only.

        CheckpointError for what is missing, damaged or of another kind.
        """
        checks.known(where, ("revision", "cache_dir", "local_files_only"))
        check_options(where)
        checks.flag("allow_pickle", allow_pickle)
        ranking, path = self.stages.ranking, find_ranker(path_or_id, allow_pickle=allow_pickle, **where)
        ranking.loaded = ranking.read(path, self.stages.text_stages, allow_pickle=allow_pickle)

    def set_ip_adapter_scale(self, scale: Weight | Sequence[Weight]) -> None:
        """How strongly IP-Adapters act in requests that do not say (`ip_adapter_scale`): a number, or by block

            {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}

        where what is not named has 0; or a list of one for each adapter. InputError for blocks that the model does not
        have, and for other numbers of scales."""
        self.stages.image_prompts.set_scale(picture_scale("scale", scale))

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: None = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """The image encoder's output of pictures, for `ip_adapter_image_embeds`: for each adapter (2, P, D) or (2, P,
        L, D), negatives first, or (1, ...) without guidance, on the pipeline's device. Scales are not part of it.

        The other arguments are diffusers': embeddings need no preparing, and one row serves all images of a prompt."""
        if ip_adapter_image_embeds is not None:
            raise InputError("ip_adapter_image_embeds was given: pass it in the request as it is")
        checks.whole("num_images_per_prompt", num_images_per_prompt, 1, 1)
        guided = checks.flag("do_classifier_free_guidance", do_classifier_free_guidance)
        stages = self.stages
        request = Request("", ip_adapter_image=ip_adapter_image, ip_adapter_scale=1.0)
        selection = stages.image_prompts.complete(request, guided).ip_adapter_image
        if not isinstance(selection, PictureSelection):
            raise InputError("ip_adapter_image is None: expected a picture")
        return self.session.call(
            lambda: [embeds_of(use, guided, stages.device, stages.dtype) for use in selection.uses]
        )

    def _image_encoder(
        self, adapters: Sequence[ImageAdapter], source: tuple[Any, str | None, str | None], name: str, options: Any
    ) -> ImageEncoder:
        """That which is loaded, if it fits, or of a folder beside the first adapter."""
        encoder = self.stages.image_prompts.loaded.encoder
        if encoder is None or not all(image_encoder_fits(adapter, encoder.model.config) for adapter in adapters):
            path, inside, _ = source
            if isinstance(path, Mapping):
                raise InputError(
                    "a dict has no image encoder beside it: pass image_encoder_folder=None, or give a path"
                )
            folder = encoder_folder(path, inside, name, options)
            encoder = read_image_encoder(
                folder, self.stages.dtype, preprocessing=False, allow_pickle=options["allow_pickle"]
            )
        for adapter in adapters:
            if not image_encoder_fits(adapter, encoder.model.config):
                config = encoder.model.config
                raise CheckpointError(
                    f"{adapter.source} reads {adapter.network.config.image_channels} channels of an image encoder, and "
                    f"{encoder.source} makes {config.projection_dim} (projected) and {config.hidden} (hidden)."
                )
        return encoder


def encoder_folder(path: Any, inside: str | None, name: str, options: Mapping[str, Any]) -> Path:
    """The local folder of an image encoder; of a hub id, its files are fetched."""
    local = check_path(path, "pretrained_model_name_or_path")
    if local.is_file():
        path, inside = local.parent, None
    subfolder = name if "/" in name or inside is None else f"{inside}/{name}"
    config = find_weights(path, subfolder=subfolder, weight_name=FILES[0], **options)
    if not local.exists():
        find_weights(path, subfolder=subfolder, weight_name=FILES[1], **options)
    return config.parent


def _lists(source: Any, subfolder: Any, weight_name: Any) -> list[tuple[Any, str | None, str | None]]:
    """Source, subfolder and file of each adapter; one source or subfolder serves several files."""
    names = list(weight_name) if isinstance(weight_name, (list, tuple)) else [weight_name]
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    folders = list(subfolder) if isinstance(subfolder, (list, tuple)) else [subfolder]
    count = max(len(names), len(sources))
    for label, items in (("weight_name", names), ("the list of paths", sources), ("subfolder", folders)):
        if len(items) not in (1, count) or not items:
            raise InputError(f"{label} has {len(items)} items for {count} IP-Adapters: give one, or one each")
    if count > MAX_ADAPTERS:
        raise InputError(f"{count} IP-Adapters were given: expected at most {MAX_ADAPTERS}")
    each = [items * (count // len(items)) for items in (sources, folders, names)]
    return list(zip(*each, strict=True))
