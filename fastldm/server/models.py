"""The models of a server: by name, each a Session, all on the one worker of the device."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastldm.adapters.locate import find_weights
from fastldm.device import choose_device, choose_dtype
from fastldm.errors import CheckpointError, InputError, OutOfMemory
from fastldm.export.engine import is_bundle
from fastldm.kernels.dispatch import device_capability
from fastldm.loading.ranker import find_ranker
from fastldm.model import backend_device, backend_for, describe
from fastldm.pipeline import Pipeline
from fastldm.planning import cascade, memory
from fastldm.planning.beside import Beside
from fastldm.priors import KandinskyPrior, describe_prior
from fastldm.runtime.complete import sample_request
from fastldm.server.errors import ApiError
from fastldm.server.settings import Settings
from fastldm.serving.session import MAX_QUEUE, Session

if TYPE_CHECKING:
    from pathlib import Path

    from fastldm.conditioning.ranking import Ranker

logger = logging.getLogger("fastldm.server")


@dataclass(eq=False)
class Model:
    """A model by the name that clients know it by; loaded while it has a session."""

    name: str
    path: str
    pipe: Pipeline | None = None
    session: Session | None = None
    used: int = 0  # when it was last asked for, counted
    users: int = 0  # requests that are about to be submitted

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that it was made for."""
        assert self.pipe is not None
        width, height = self.pipe.stages.spec.default_size
        return height, width

    @property
    def reads(self) -> dict[str, Any]:
        """What its requests have, for clients that ask: {} of a model that is not loaded."""
        if self.pipe is None:
            return {}
        stages = self.pipe.stages
        spec, unet = stages.spec, stages.spec.unet
        needed = sample_request(spec, 64, 64)
        image = "needed" if "image" in needed else "optional"
        if spec.prior is not None:  # which starts from noise
            image = "none"
        from_noise = unet.edits or unet.upscales or stages.family.reads_picture or image == "none"
        return {
            "prompt": bool(needed["prompt"]) or (unet.reads_image_embeds and stages.prior is not None),
            "guidance": spec.conditioned,
            "image": image,
            "strength": not from_noise,
            "classes": (unet.num_class_embeds or 0) if unet.needs_label else 0,
            "noise_level": None if spec.low_res is None else spec.max_noise_level,
            "enlarges": spec.enlarges,
        }

    @property
    def enlarges(self) -> int:
        """How many times as wide its picture is as the one that it reads; 1 of models that enlarge none, and of those
        that are not loaded."""
        return 1 if self.pipe is None else self.pipe.stages.spec.enlarges

    @property
    def idle(self) -> bool:
        """Whether it is loaded, and has nothing to do."""
        stats = None if self.session is None or self.users else self.session.stats()
        return stats is not None and not stats.running + stats.waiting


class Models:
    """Loads models, and hands out their sessions."""

    def __init__(self, settings: Settings, pipelines: Mapping[str, Pipeline] | None = None) -> None:
        """pipelines: those that are loaded already, by name. CheckpointError for an adapter, or a ranker, that there is
        not."""
        self._settings = settings
        self._loras: dict[str, Path] = {
            name: find_weights(path, kind="lora", allow_pickle=settings.allow_pickle)
            for name, path in settings.loras.items()
        }
        self._ranker_folder: Path | None = None
        if settings.ranker is not None:
            self._ranker_folder = find_ranker(settings.ranker, allow_pickle=settings.allow_pickle)
        self._ranker: Ranker | None = None
        self._prior: KandinskyPrior | None = None
        self._by_name = {name: Model(name, path) for name, path in settings.models.items()}
        self._counter, self._loading = 0, asyncio.Lock()
        for name, pipe in (pipelines or {}).items():
            self._take(self._by_name[name], pipe)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._by_name.values())

    @property
    def default(self) -> Model:
        """The first: for requests that name none."""
        return next(iter(self))

    @property
    def loaded(self) -> list[Model]:
        return [model for model in self if model.session is not None]

    @property
    def waiting(self) -> int:
        """Requests in all queues."""
        return sum(model.session.waiting for model in self.loaded if model.session is not None)

    def load(self) -> None:
        """Load all, before the server listens; raises what loading raises."""
        for model in self:
            if model.session is None:
                self._open(model)

    @asynccontextmanager
    async def use(self, name: str | None, adapters: Iterable[str] = ()) -> AsyncIterator[Model]:
        """A model by name, loaded, and not unloaded inside; None is the default. adapters: of which those of the
        settings are loaded too. ApiError for an unknown name, and what loading raises."""
        name = self.default.name if name is None else name
        if name not in self._by_name:
            known = ", ".join(map(repr, self._by_name))
            message = f"there is no model {name[:200]!r}: this server has {known}"
            raise ApiError(404, message, "model_not_found", param="model")
        model = self._by_name[name]
        self._counter += 1
        model.used = self._counter
        model.users += 1
        try:
            if model.session is None or self._missing(model, adapters):
                async with self._loading:  # one at a time: each counts on the memory that is free
                    await self._open_in_room(model)
                    for adapter in self._missing(model, adapters):
                        await asyncio.to_thread(self._load_lora, model, adapter)
            yield model
        finally:
            model.users -= 1

    def _missing(self, model: Model, adapters: Iterable[str]) -> list[str]:
        """Those that are loaded by their first request, and are not yet."""
        if self._settings.load == "start" or model.pipe is None:
            return []
        loaded = model.pipe.adapters
        return [name for name in adapters if name in self._loras and name not in loaded]

    def unload_lora(self, model: str, name: str) -> None:
        """Make room; requests that were submitted with it still have it."""
        pipe = self._by_name[model].pipe
        if pipe is not None and name in pipe.adapters:
            pipe.delete_adapters(name)

    async def _open_in_room(self, model: Model) -> None:
        """Load a model; where memory is short, without those that have nothing to do, the longest unused first."""
        while model.session is None:
            try:
                await asyncio.to_thread(self._open, model)
            except OutOfMemory:
                idle = [other for other in self if other.idle]
                if not idle:
                    raise
                other = min(idle, key=lambda other: other.used)
                logger.info("unloading %s", other.name)
                session, other.session, other.pipe = other.session, None, None  # for the loop: nobody gets it any more
                assert session is not None
                await asyncio.to_thread(session.close)
                del session
                gc.collect()

    def _open(self, model: Model) -> None:
        settings = self._settings
        logger.info("loading %s", model.name)
        self._check_room(model)
        adapted = bool(self._loras or settings.controls)
        pipe = Pipeline.from_pretrained(
            model.path,
            device=settings.device,
            dtype=settings.dtype,
            backend=backend_for(model.path, settings.backend, on_torch=adapted),
            allow_pickle=settings.allow_pickle,
        )
        self._take(model, pipe)

    def _check_room(self, model: Model) -> None:
        """OutOfMemory for a model that does not fit beside those that are loaded, with a picture of its own size."""
        device = choose_device(backend_device(self._settings.backend, self._settings.device))
        free = memory.free_bytes(device)
        if free is None or is_bundle(model.path):  # an engine does not say what it takes
            return
        spec = describe(model.path, allow_pickle=self._settings.allow_pickle)
        width, height = spec.own_size
        arch = device_capability(device.index or 0) if device.type == "cuda" else 0
        dtype = choose_dtype(self._settings.dtype, device)
        shape: dict[str, Any] = {"batch": 1, "dtype": dtype, "arch": arch}
        options: dict[str, Any] = {}
        if spec.unet.reads_image_embeds and self._settings.prior is not None and self._prior is None:
            where = {"allow_pickle": self._settings.allow_pickle}
            options["beside"] = Beside(once=describe_prior(self._settings.prior, spec.unet, **where))
        workload = memory.Workload.of_spec(spec, width=width, height=height, **shape, **options)
        plan = cascade.of_model(spec, model.name, workload, **shape)
        if not plan.fits(free):
            needed, there = memory.size(plan.needed), memory.size(free)
            raise OutOfMemory(f"model {model.name} needs {needed} for a picture, and {there} are free")

    def _take(self, model: Model, pipe: Pipeline) -> None:
        pipe.disable_lora()  # only for requests that name them
        for name, path in self._settings.controls.items():
            try:
                pipe.attach_control(path, name, allow_pickle=self._settings.allow_pickle)
            except (CheckpointError, InputError) as error:
                logger.info("%s is not for %s: %s", name, model.name, error)
        if self._ranker_folder is not None:
            self._load_ranker(pipe)
        if pipe.stages.spec.unet.reads_image_embeds and self._settings.prior is not None:
            if self._prior is None:  # all decoders share one
                placed = {"device": pipe.device, "dtype": pipe.dtype, "allow_pickle": self._settings.allow_pickle}
                self._prior = KandinskyPrior.from_pretrained(self._settings.prior, **placed)
            pipe.attach_prior(self._prior)
        # The server bounds all queues together, so that no session's own bound is met before.
        model.pipe, model.session = pipe, Session(pipe, max_batch=self._settings.max_batch, max_queue=MAX_QUEUE)
        if self._settings.load == "start":
            for name in self._loras:
                self._load_lora(model, name)

    def _load_lora(self, model: Model, name: str) -> None:
        assert model.pipe is not None
        options = {"adapter_name": name, "allow_pickle": self._settings.allow_pickle}
        try:
            model.pipe.load_lora_weights(self._loras[name], **options)  # type: ignore[arg-type]
        except (CheckpointError, InputError) as error:
            logger.info("%s is not for %s: %s", name, model.name, error)

    def _load_ranker(self, pipe: Pipeline) -> None:
        """All models share one, unless it reads the text encoder of each."""
        assert self._ranker_folder is not None
        if self._ranker is None or self._ranker.text is None:
            pipe.load_ranker(self._ranker_folder, allow_pickle=self._settings.allow_pickle)
            self._ranker = pipe.stages.ranking.loaded
        pipe.stages.ranking.loaded = self._ranker

    def close(self, *, cancel: bool) -> None:
        """Take no more requests; wait for those under way, or cancel them."""
        for model in self.loaded:
            if model.session is not None:
                model.session.close(cancel=cancel)
