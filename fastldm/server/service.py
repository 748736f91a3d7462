"""What all dialects share: a request is admitted, watched, answered or cancelled, and its pictures become files."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from fastldm.errors import Cancelled, FastLDMError, InputError
from fastldm.image import decode_image, encode_image, result_parameters
from fastldm.request import Request, Result
from fastldm.runtime.complete import fitted
from fastldm.server.errors import ApiError, api_error, retry_after, stopping
from fastldm.server.metrics import Metrics
from fastldm.server.models import Model, Models
from fastldm.server.settings import MIB, Settings
from fastldm.server.store import Store
from fastldm.serving.generation import Generation, Progress

T = TypeVar("T")

logger = logging.getLogger("fastldm.server")

FORMATS = {"png": ("PNG", "image/png"), "jpeg": ("JPEG", "image/jpeg"), "webp": ("WEBP", "image/webp")}


@dataclass(eq=False)
class Work:
    """A request under way, by its id."""

    id: str
    owner: str
    """Whose it is: the key's short name, or nobody's."""
    model: Model
    generation: Generation
    created: float
    ended: asyncio.Future[Any]
    """Done when the generation is. Cancelling it cancels that."""
    preview: Image.Image | None = None
    """The last that there was."""
    watchers: set[asyncio.Queue[Progress]] = field(default_factory=set)
    following: asyncio.Task[None] | None = None
    dialect: str = ""
    interrupted: bool = False

    @property
    def steps(self) -> tuple[int, int]:
        """How many are done, and how many there are."""
        done = self.generation.steps_done
        return done, done + self.generation.steps_left

    def follow(self) -> None:
        """Hand each step to the watchers, and keep its preview. Where nobody wants any, no step wakes the loop, which
        the steps would wait for."""
        if self.following is None:
            self.following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for step in self.generation.async_progress():
            if step.preview is not None:
                self.preview = step.preview[0]
            for queue in self.watchers:
                queue.put_nowait(step)


@dataclass(frozen=True)
class Files:
    """The pictures of a result as files."""

    result: Result
    contents: tuple[bytes, ...]
    texts: tuple[str, ...]
    """The parameters of each, as in a PNG."""


class Service:
    """One server: its models, its open requests, and what it keeps for clients."""

    def __init__(self, settings: Settings, models: Models) -> None:
        self.settings, self.models = settings, models
        self.metrics = Metrics(models)
        self.kept = Store(int(settings.max_kept * MIB), settings.keep)
        self.open: dict[str, Work] = {}
        self._arriving: Counter[str] = Counter()  # by key: those that are being submitted
        self.started = int(time.time())
        self.draining = self.warm = self._stopped = False
        self._until = math.inf  # when draining ends
        # zlib and libjpeg release the lock that Python's threads share.
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "fastldm encode")
        self._submitting = ThreadPoolExecutor(4, "fastldm submit")

    # --- a request

    async def submit(
        self,
        id: str,
        owner: str,
        model: str | None,
        arguments: Mapping[str, Any],
        *,
        priority: float = 0,
        deadline: float | None = None,
        previews: int = 0,
        dialect: str = "openai",
        refiner: str | None = None,
        upscalers: Sequence[str] = (),
    ) -> Work:
        """Queue a request with fields of `fastldm.Request`. refiner: the model that goes on. upscalers: those that
        enlarge the images. id: the HTTP request's.
        previews: how many of its steps have one. ApiError, or what `Session.submit` raises."""
        async with AsyncExitStack() as stack:
            found = await stack.enter_async_context(self.models.use(model, arguments.get("adapters") or ()))
            second = None if refiner is None else await stack.enter_async_context(self.models.use(refiner))
            enlarging = [await stack.enter_async_context(self.models.use(name)) for name in upscalers]
            if self.draining:
                raise stopping()
            assert found.session is not None
            assert found.pipe is not None
            spec, reads_picture = found.pipe.stages.spec, found.pipe.family.reads_picture
            unet = spec.unet
            if dialect == "a1111":  # whose front ends send all, as its models read the one or the other
                from_noise = unet.edits or unet.upscales or reads_picture
                unread = ["image_guidance_scale"] * (not unet.edits) + ["strength"] * from_noise
                unread += ["guidance_scale"] * (not spec.conditioned)
                own_size = unet.upscales or bool(spec.follows)
                unread += ["width", "height"] * (own_size or (spec.fits_pictures and "image" in arguments))
                arguments = {name: value for name, value in arguments.items() if name not in unread}
            own_size = unet.upscales or reads_picture or spec.fits_pictures
            if isinstance(image := arguments.get("image"), Image.Image) and not own_size:
                arguments = {**size_of(image), **arguments}
            if arguments.get("prompt") is None:
                if found.reads["prompt"]:
                    raise InputError("prompt is missing: this model reads one, which may be empty")
                arguments = {**arguments, "prompt": ""}
            request = self._checked(found, arguments, enlarging)
            self._check_room(owner)
            self._arriving[owner] += 1
            try:
                # In a thread: what does not fit is told how it would, from a dry run of a second.
                options: dict[str, Any] = {"priority": priority, "deadline": deadline, "preview": previews, "id": id}
                options["refiner"] = None if second is None else second.session
                options["upscalers"] = [each.session for each in enlarging] or None
                submit = partial(found.session.submit, request, **options)
                generation = await asyncio.get_running_loop().run_in_executor(self._submitting, submit)
            finally:
                self._arriving[owner] -= 1
            ended = asyncio.wrap_future(generation)
            work = Work(id, owner, found, generation, time.time(), ended, dialect=dialect)
            self.open[id] = work
            ended.add_done_callback(lambda _: self._end(work))
            if previews:
                work.follow()
            if self._stopped:  # meanwhile
                generation.cancel()
            return work

    def _check_room(self, owner: str) -> None:
        """ApiError where a key has too many requests open, or too many wait."""
        open_ = sum(work.owner == owner for work in self.open.values()) + self._arriving[owner]
        if owner and open_ >= self.settings.max_per_key:
            code, message = "too_many_requests", f"{open_} requests of this key are open already: wait for one"
        elif (waiting := self.models.waiting + self._arriving.total()) >= self.settings.max_queue:
            code, message = "queue_full", f"{waiting} requests wait already: try again later"
        else:
            return
        raise ApiError(429, message, code, kind="rate_limit_error", headers=retry_after(self._next_free()))

    def _checked(self, model: Model, arguments: Mapping[str, Any], upscalers: Sequence[Model] = ()) -> Request:
        """InputError for what the server does not allow."""
        settings = self.settings
        request = Request(**arguments)
        height, width = model.size
        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(request, name) or "")) > settings.max_prompt:
                raise InputError(f"{name} has {length} characters: expected at most {settings.max_prompt}")
        assert model.pipe is not None
        steps = request.num_inference_steps or model.pipe.stages.family.num_inference_steps
        if steps > settings.max_steps:
            own = "" if request.num_inference_steps else ", the model's own number"
            raise InputError(f"num_inference_steps is {steps}{own}: expected at most {settings.max_steps}")
        if (request.prior_num_inference_steps or 0) > settings.max_steps:
            raise InputError(
                f"prior_num_inference_steps is {request.prior_num_inference_steps}: expected at most "
                f"{settings.max_steps}"
            )
        if request.batch > settings.max_n:
            name = "n" if request.candidates is None else "best_of"
            raise InputError(f"{name} is {request.batch}: expected at most {settings.max_n}")
        for name in ("hires_steps", "super_res_num_inference_steps"):
            if (getattr(request, name) or 0) > settings.max_steps:
                raise InputError(f"{name} is {getattr(request, name)}: expected at most {settings.max_steps}")
        if isinstance(request.image, Image.Image) and (times := model.pipe.stages.spec.enlarges) > 1:
            height, width = request.image.height * times, request.image.width * times
        spec = model.pipe.stages.spec
        start = request.original_image if spec.unet.upscales else request.image
        if spec.fits_pictures and start is not None:
            height, width = fitted(start, "image", spec.unet.sample_size)
        tall, wide = request.height or height, request.width or width
        scales = (
            request.hires_scale or 1.0,
            (request.hires_height or tall) / tall,
            (request.hires_width or wide) / wide,
        )
        size = int(wide * max(scales)), int(tall * max(scales))
        options = request.upscaler_options or {}
        each = [options] * len(upscalers) if isinstance(options, Mapping) else options
        for upscaler, wanted in zip(upscalers, each, strict=False):  # of other numbers the session says so
            assert upscaler.pipe is not None
            before, spec = spec, upscaler.pipe.stages.spec
            size = spec.enlarged(size, before.default_size)
            if (steps := wanted.get("num_inference_steps") or spec.family.num_inference_steps) > settings.max_steps:
                raise InputError(
                    f"num_inference_steps of {upscaler.name} is {steps}: expected at most {settings.max_steps}"
                )
        if (pixels := math.prod(size)) > settings.max_pixels:
            raise InputError(f"width times height is {pixels}: expected at most {settings.max_pixels} pixels")
        return request

    def _next_free(self) -> float | None:
        """Seconds until a request leaves the queues, about: what all take, by how many there are."""
        stats = [model.session.stats() for model in self.models.loaded if model.session is not None]
        open_, times = sum(s.waiting + s.running for s in stats), [s.remaining for s in stats]
        if not open_ or None in times:
            return None
        return sum(time or 0.0 for time in times) / open_

    def _end(self, work: Work) -> None:
        self.open.pop(work.id, None)
        work.ended.cancelled() or work.ended.exception()  # so that asyncio knows that somebody looked

    async def files(
        self,
        work: Work,
        format: str = "png",
        quality: int | None = None,
        *,
        change: Callable[[Image.Image], Image.Image] | None = None,
    ) -> Files:
        """The pictures when they are done, as files; whatever the generation raises. change: of each picture before.
        Cancelling the task that waits cancels the request."""
        try:
            result = await self._result(work)
            start = time.perf_counter()
            texts = result_parameters(result, work.model.name)
            kind = FORMATS[format][0]

            def encode(image: Image.Image, text: str) -> bytes:
                changed = image if change is None else change(image)
                return encode_image(changed, kind, text, quality=quality, compress_level=1)

            pairs = zip(result.images, texts, strict=True)
            contents = await asyncio.gather(*(self.in_pool(encode, image, text) for image, text in pairs))
        except BaseException as error:
            if isinstance(error, Exception):
                self.metrics.failed(work.model.name, api_error(error, work.id).code)
            else:
                self.metrics.failed(work.model.name, "disconnected")
            raise
        generation = work.generation
        queued = generation.prepare_start - generation.submitted
        self.metrics.done(work.model.name, queued, result, time.perf_counter() - start)
        return Files(result, tuple(contents), tuple(texts))

    async def _result(self, work: Work) -> Result:
        """Of a generation. One that was cancelled is an error of the request, and no cancelling of who waits for it."""
        try:
            await asyncio.wait([work.ended])
        except asyncio.CancelledError:
            work.generation.cancel()
            raise
        try:
            return work.generation.result(0)
        except (Cancelled, CancelledError):
            if self._stopped:
                raise stopping() from None
            raise

    async def while_connected(self, receive: Receive, work: Work, waiting: Awaitable[T], *, detach: bool = False) -> T:
        """What is waited for, while the client is there: when it goes, the request is cancelled, unless `detach`, and
        ClientDisconnect raised."""
        task, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not detach:
                work.generation.cancel()
                await asyncio.wait([task])
                task.cancelled() or task.exception()  # which nobody is there to be told
                raise ClientDisconnect
            return await task
        except asyncio.CancelledError:
            if not detach:
                work.generation.cancel()
            raise
        finally:
            gone.cancel()

    async def in_pool(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """function(...), in a thread of the pool for pictures."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *arguments, **options))

    async def picture(self, content: bytes, name: str) -> Image.Image:
        """A picture that a client sent, decoded off the loop and off the worker. InputError for what is none, or too
        large."""
        return await self.in_pool(decode_image, content, name, self.settings.max_input_pixels)

    async def preview(self, work: Work) -> str | None:
        """The last preview of a request as a PNG in base64, if there is one; the next step has another."""
        work.generation.ask_preview()
        work.follow()
        if work.preview is None:
            return None
        return base64.b64encode(await self.in_pool(encode_image, work.preview, "PNG", compress_level=1)).decode()

    def of_owner(self, owner: str) -> list[Work]:
        """The open requests of a key, the oldest first."""
        return sorted((work for work in self.open.values() if work.owner == owner), key=lambda work: work.created)

    async def warm_up(self) -> None:
        """A request for each model that is loaded, so that no client waits for what the first one prepares."""
        for model in self.models.loaded:
            assert model.pipe is not None
            try:
                await asyncio.to_thread(model.pipe.warmup, batches=(self.settings.max_batch, 1))
                if model.pipe.stages.ranking.loaded is not None and model.reads["prompt"]:
                    await asyncio.to_thread(model.pipe.warmup, candidates=self.settings.max_batch)
            except FastLDMError as error:
                logger.warning("%s could not be warmed up: %s", model.name, error)
        self.warm = True

    # --- the end

    def stop(self) -> None:
        """Take no more requests, and give those under way `Settings.drain` seconds."""
        if not self.draining:
            self.draining, self._until = True, time.monotonic() + self.settings.drain

    def stop_now(self) -> None:
        """Cancel what is under way."""
        self.stop()
        self._until, self._stopped = 0.0, True
        for work in [*self.open.values()]:
            work.generation.cancel()

    async def drain(self) -> None:
        """Wait for the requests under way; cancel what is left then."""
        self.stop()
        if self.open:
            under_way = [work.ended for work in self.open.values()]
            await asyncio.wait(under_way, timeout=max(0.0, self._until - time.monotonic()))
        self.stop_now()
        await asyncio.to_thread(partial(self.models.close, cancel=True))
        for pool in (self._pool, self._submitting):
            pool.shutdown(wait=False, cancel_futures=True)


def size_of(image: Image.Image) -> dict[str, int]:
    """The size of what is made from a picture that was sent: its own, in steps that all models take."""
    return {"width": max(8, image.width // 8 * 8), "height": max(8, image.height // 8 * 8)}


def decoded(text: str, name: str) -> bytes:
    """Of base64, with or without `data:image/png;base64,` before it. URLs are refused: nothing is fetched."""
    if text.startswith(("http://", "https://")):
        raise InputError(f"{name} is a URL: expected base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name} is not base64") from None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
