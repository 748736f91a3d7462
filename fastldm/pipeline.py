"""What users load and call: a prompt to a picture.

A call submits a request to the pipeline's session (serving/), whose worker takes it through the stages of the loaded
model (runtime/stages.py).
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from fastldm import checks, openmp
from fastldm.adapters.selection import Selection
from fastldm.adapting import Adapting
from fastldm.cascading import CascadeLoader
from fastldm.controlling import ControlLoader, as_list, without_controls
from fastldm.errors import CheckpointError, InputError
from fastldm.image_prompting import IPAdapterLoader
from fastldm.loading import adoption
from fastldm.loading import spec as loading
from fastldm.loading.mapped import Mapped
from fastldm.loading.ranker import find_ranker
from fastldm.model import need_exporter, open_model
from fastldm.models.families import (
    IMAGE_ENCODER,
    IMAGE_NORMALIZER,
    KANDINSKY_COMBINED,
    PRIOR,
    PRIOR_TEXT_ENCODER,
    folder_name,
)
from fastldm.priors import KandinskyPrior
from fastldm.reading import check_path
from fastldm.request import MAX_IMAGES, MAX_SIDE, Request, Result
from fastldm.runtime import eight_bits
from fastldm.runtime.complete import sample_request, sampled
from fastldm.runtime.graph import WARM_UPS
from fastldm.runtime.stages import Stages
from fastldm.serving.callback import Calls, CallState, Steered, StepCallback, tensor_names
from fastldm.serving.generation import Progress
from fastldm.serving.session import Session
from fastldm.textual_inversion import TextualInversionLoader

Prompt = str | Sequence[str] | Request | None


def _of_stages(name: str, doc: str) -> Any:
    """An attribute that a pipeline has from its stages."""
    return property(
        lambda pipe: getattr(pipe.stages, name), lambda pipe, value: setattr(pipe.stages, name, value), doc=doc
    )


class Pipeline(Steered, Adapting, CascadeLoader, ControlLoader, TextualInversionLoader, IPAdapterLoader):
    """A loaded model, ready to be called, by several threads at once too."""

    name = _of_stages("name", "What the model is called: its folder's name, as a rule.")
    unet = _of_stages("unet", "The U-Net, or the engine in its place.")
    vae = _of_stages("vae", "The autoencoder, likewise.")
    text_stages = _of_stages("text_stages", "Tokenizer and text encoder; two of each for SDXL.")
    schedule = _of_stages("schedule", "The training schedule, and the sampler that the model asks for.")
    family = _of_stages("family", "The defaults of models of this kind, for what a request leaves open.")
    zero_negative = _of_stages("zero_negative", "Whether zeros stand for a negative prompt that is not given.")
    device = _of_stages("device", "Where it runs.")
    dtype = _of_stages("dtype", "Of the inputs and outputs of the U-Net and the autoencoder.")
    backend = _of_stages("backend", 'What runs the networks: "torch", "onnxruntime", "openvino" or "tensorrt".')
    precision = _of_stages("precision", 'What they compute in: "float32", "float16" or "bfloat16".')
    batch_invariant = property(lambda pipe: pipe.stages.batch_invariant, doc="Whether an image is bitwise as alone.")
    latent_channels = _of_stages("latent_channels", "Channels of a latent: 4 for Stable Diffusion.")

    def __init__(
        self,
        spec: loading.Spec,
        networks: loading.LoadedModel,
        name: str,
        mapped: Mapped | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        """Most callers want `from_pretrained`, `from_single_file`, `from_diffusers` or `default`. mapped: files that
        the networks' weights lie in. batch_invariant: as in `from_pretrained`."""
        self.stages = Stages(spec, networks, name, mapped)
        self.stages.batch_invariant = batch_invariant
        self._session = Session(self.stages)
        self.calls = Calls()
        self.stages.enlarged_size = loading.enlarged_size(name, spec)
        if self.stages.enlarged_size is not None:
            self.stages.enlarger = functools.cache(self._open_enlarger)
        openmp.rest()  # this thread has loaded the networks

    def _open_enlarger(self) -> Stages:
        dtype = self.dtype if self.backend == "torch" else None
        return Stages(*open_model(loading.UPSCALER, device=self.device, dtype=dtype, backend="torch"))

    # --- loading

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        batch_invariant: bool = False,
        controlnet: Any = None,
        adapter: Any = None,
        ranker: str | os.PathLike[str] | None = None,
        refiner: Any = None,
        prior: Any = None,
        upscaler: Any = None,
        **where: Any,
    ) -> Pipeline:
        """A pipeline from a diffusers folder, a hub id, a .safetensors file, a bundle that `fastldm export` wrote, or
        "default".

        device: a GPU where there is one, else the CPU. dtype (or torch_dtype): what is fastest there, see
        `device.choose_dtype`; of a bundle, ONNX Runtime and TensorRT compute in what it was exported in.
        backend: what runs the networks: "torch", or for a bundle "onnxruntime", "openvino" or "tensorrt"; for one of
        --whole-picture also "onnxruntime-graph" or "openvino-graph", which take several steps a call. "auto" is
        PyTorch, and for a bundle, or a model that `fastldm prepare` has prepared, what was measured to be fastest on
        this machine, see `model.choose_backend`.
        batch_invariant: whether an image is bitwise the one that its seed and prompt make alone, whatever else is in
        its request, or in requests that join and leave its batch. On a CPU each image then has its own calls of the
        networks; on a GPU steps share theirs, by kernels that do not depend on the number of rows.
        controlnet, adapter: a ControlNet and a T2I-Adapter to attach, or lists of them: what `attach_control` takes.
        ranker: a CLIP model that ranks `candidates`: what `load_ranker` takes.
        refiner: what `attach_refiner` takes, to be loaded with the same device, dtype, backend and `where`.
        prior: what `attach_prior` takes, for Kandinsky 2.2, likewise.
        upscaler: what `attach_upscaler` takes, or a list of such, one after the other, likewise.
        where: variant, revision, cache_dir, local_files_only, allow_pickle, prediction_type and text_encoder, see
            `loading.describe`.

        Raises CheckpointError for what is not a model that fastldm can run, InputError for a device or dtype there
        is not, BundleError for a bundle that is damaged, EngineError for a backend that is not installed or cannot
        run it.
        """
        if torch_dtype is not None:
            checks.instance("torch_dtype", torch_dtype, (str, torch.dtype), "float32, float16 or bfloat16")
        if dtype is not None and torch_dtype is not None:
            raise InputError("dtype and torch_dtype were both given: give one of them")
        dtype = torch_dtype if dtype is None else dtype
        checks.flag("batch_invariant", batch_invariant)
        options = {
            name: value for name, value in where.items() if name in ("allow_pickle", "cache_dir", "local_files_only")
        }
        if ranker is not None:  # a mistake is found before the model is loaded
            loading.check_options(options)
            ranker = find_ranker(ranker, **options)
        alone = controlnet is None and adapter is None  # a bundle has its own, and takes no other
        model = open_model(path_or_id, device=device, dtype=dtype, backend=backend, prepared=alone, **where)
        if where.get("text_encoder", True) is None and model[0].text:
            raise InputError("text_encoder is None: only DeepFloyd IF's super-resolution goes without its own")
        pipe = cls(*model, batch_invariant=batch_invariant)
        for control in (*as_list(controlnet), *as_list(adapter)):
            pipe.attach_control(control, **options)
        if ranker is not None:
            pipe.load_ranker(ranker, **options)
        if refiner is not None:
            pipe.attach_refiner(
                refiner, device=device, dtype=dtype, backend=backend, batch_invariant=batch_invariant, **where
            )
        if prior is not None:
            pipe.attach_prior(prior, **options)
        for each in as_list(upscaler):
            pipe.attach_upscaler(each, device=device, dtype=dtype, batch_invariant=batch_invariant, **where)
        return pipe

    @classmethod
    def from_single_file(cls, path: str | os.PathLike[str], **options: Any) -> Pipeline:
        """From one .safetensors file in the original Stability layout; options as in `from_pretrained`."""
        if not check_path(path, "path").is_file():
            raise CheckpointError(f"there is no file {str(path)!r}; a folder or a hub id is for from_pretrained")
        return cls.from_pretrained(path, **options)

    @classmethod
    def default(cls, **options: Any) -> Pipeline:
        """The small model of everyday things in emoji style that ships inside; options as in `from_pretrained`."""
        return cls.from_pretrained("default", **options)

    @classmethod
    def from_diffusers(cls, pipe: Any, *, batch_invariant: bool = False) -> Pipeline:
        """Adopts a loaded diffusers pipeline: Stable Diffusion 1, 2 or XL, for text, image to image or inpainting, with
        ControlNets or T2I-Adapters too, which are copied, or for image variations.

        The weights are shared, not copied: what changes in one changes in the other. Device and dtype stay as they are.
        Compiled and fused networks are taken as what they are made of, and tiled or sliced decoding goes on.
        batch_invariant: as in `from_pretrained`.

        Raises InputError for what is no diffusers pipeline, and CheckpointError for one whose pictures are made by more
        than its class, its weights and its configs: by FreeU, hooks, adapters, replaced methods, changed layers.
        """
        checks.flag("batch_invariant", batch_invariant)
        if type(pipe).__name__ in KANDINSKY_COMBINED:
            adopted = cls.from_diffusers(pipe.decoder_pipe, batch_invariant=batch_invariant)
            adopted.attach_prior(KandinskyPrior.from_diffusers(pipe.prior_pipe))
            return adopted
        pipe, controls = without_controls(pipe)
        spec = loading.spec_of(adoption.describe_diffusers(pipe))
        components = {
            name: getattr(pipe, folder_name(type(pipe).__name__, name)) for name in spec.checkpoint.components
        }
        networks = loading.load(spec, lambda module, name: adoption.adopt(module, components[name]), components)
        adopted = cls(spec, networks, type(pipe).__name__, batch_invariant=batch_invariant)
        vae = components.get("vae")
        if getattr(vae, "use_tiling", False):
            adopted.enable_vae_tiling()
        elif getattr(vae, "use_slicing", False):
            adopted.enable_vae_slicing()
        for control in controls:
            adopted.attach_control(control)
        return adopted

    @property
    def refiner(self) -> Pipeline | None:
        """The model that goes on where this one stops, if one is attached."""
        return self._refiner

    @property
    def upscalers(self) -> tuple[Pipeline, ...]:
        """The models that enlarge this one's images, one after the other."""
        return self._upscalers

    def _beside(self, source: Any, options: dict[str, Any], *, shares_text: bool = False) -> Pipeline:
        if isinstance(source, Pipeline):
            return source
        placed = {"device": self.device, "dtype": self.dtype if self.backend == "torch" else None}
        placed |= {name: value for name, value in options.items() if value is not None}
        if not shares_text:
            return Pipeline.from_pretrained(source, **placed)
        batch_invariant = placed.pop("batch_invariant", False)
        return Pipeline(*open_model(source, **placed, text_encoder=None), batch_invariant=batch_invariant)

    # --- a call

    @overload
    def __call__(self, prompt: Prompt = None, *, return_dict: Literal[False], **options: Any) -> tuple[Any, ...]: ...

    @overload
    def __call__(self, prompt: Prompt = None, *, return_dict: Literal[True] = True, **options: Any) -> Result: ...

    def __call__(
        self,
        prompt: Prompt = None,
        *,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Result | tuple[Any, ...]:
        """Generate images. Calls from several threads share the model: those of one size take their steps together.

        prompt: a text, a list of texts, or a `Request`.
        options: the other fields of `Request`, which documents them; they replace those of a `Request` that is passed.
        callback_on_step_end: called as (pipeline, step, timestep, tensors) after every step, in this thread; may return
            a dict of changed ones, may set `_guidance_scale`, `_guidance_rescale` or `_interrupt` of the pipeline as
            with diffusers, see callback.py, and may raise `Cancelled` to stop the call.
        callback_on_step_end_tensor_inputs: the tensors that it gets: latents (B, C, h, w) float32, prompt_embeds
            (B or, guided, 2B, T, D), negative_prompt_embeds, and with SDXL add_text_embeds and add_time_ids.
        progress: draw a bar on stderr.
        return_dict: False returns a tuple whose first item is the images, as diffusers' pipelines do.

        Raises InputError for an argument that cannot be used, OutOfMemory, NonFinite, and whatever the callback raises.
        """
        request = Request.of(prompt, options)
        checks.flag("progress", progress), checks.flag("return_dict", return_dict)
        callback, xl = callback_on_step_end, self.unet.config.needs_added
        names = () if callback is None else tensor_names(callback, callback_on_step_end_tensor_inputs, xl)
        generation = self.session.submit_request(request, waits_for_answer=callback is not None)
        try:
            with self.calls.open(generation):
                if progress or callback is not None:
                    call = CallState(generation, self.unet.config.needs_guidance)
                    steps, before = generation.progress(), 0
                    for step in _with_bar(steps) if progress else steps:
                        if callback is not None and step.latents is None:  # a prior's, which callbacks do not count
                            before += 1
                        elif callback is not None:
                            step = replace(step, step=step.step - before, steps=step.steps - before)
                            with self.calls.entered(call):
                                generation.answer(call.call(self, callback, names, step))
                result = generation.result()
        except BaseException:  # Ctrl-C too
            generation.cancel()
            raise
        if return_dict:
            return result
        alone = xl or self.family.by_class  # others of diffusers say whether they found something unsafe
        return (result.images,) if alone else (result.images, None)

    @property
    def session(self) -> Session:
        """The session of this pipeline's calls; `Session(pipe, ...)` makes one with other limits."""
        return self._session

    def warmup(
        self, sizes: Sequence[tuple[int, int]] | None = None, batches: Sequence[int] = (1,), **options: Any
    ) -> None:
        """Prepare what the first request would wait for: kernels, plans, and on a GPU the graphs.

        sizes: (width, height) in pixels, the model's own when None. batches: images per request. options: other fields
        of Request, such as guidance_scale=1. The largest goes first: its memory then serves the rest.
        """
        spec = self.stages.spec
        sizes = [spec.default_size] if sizes is None else checks.listed("sizes", sizes, 1000, "sizes (width, height)")
        sizes = [checks.pair(f"sizes[{k}]", size, 1, MAX_SIDE, "(width, height)") for k, size in enumerate(sizes)]
        counts = checks.listed("batches", batches, 1000, "numbers of pictures")
        counts = [checks.whole(f"batches[{k}]", count, 1, MAX_IMAGES, "pictures") for k, count in enumerate(counts)]
        workloads = [(width, height, count) for width, height in sizes for count in counts]
        # A step is captured after two; so are text and decoder, which run once a request.
        repeats = WARM_UPS + 1 if self.stages.graphs is not None else 1
        # Of UnCLIP's schedule, from the last timestep to the first, there are two steps or more.
        steps = max(repeats, 2) if spec.schedule.class_name == "UnCLIPScheduler" else repeats
        if self.refiner is not None:
            self.refiner.warmup([(width, height) for width, height in sizes], counts, **options)
            options["refiner_switch_at"] = 1.0
        if self.upscalers:
            options.setdefault("upscaler_options", {"num_inference_steps": repeats})
        prior = self.stages.prior is not None
        options |= {"prior_num_inference_steps": max(2, repeats)} if prior else {}
        shared = {"num_inference_steps": steps, "output_type": "pt", "seed": 0}
        for width, height, count in sorted(workloads, key=math.prod, reverse=True):
            sample = sample_request(self.stages.spec, height, width, prior=prior)
            for _ in range(repeats):
                self(**{**shared, **sample, **options}, width=width, height=height, num_images_per_prompt=count)

    def weights_changed(self) -> list[str]:
        """Update what was derived from weights that have been replaced or changed since. Returns their names.

        Each request does so before it starts; after a call of this, those under way use the new weights from their next
        step on.
        Raises InputError for a parameter of another shape, dtype or device.
        """
        stages = (self.stages, *self.stages.follows)
        return self.session.call(lambda: [name for each in stages for name in each.prepared.weights_changed()])

    def export(self, out: str | os.PathLike[str], **options: Any) -> Path:
        """Write the model as a bundle, with the weights that it has now, adopted, merged or edited ones too, with its
        active adapters merged, with the tokens of textual inversion, and with its controls, unless split=False. Returns
        the bundle's folder. Requests wait until it is written.

        options: dtype ("float32" or "float16"), opset, split, whole_picture, fused_ops and adapter_rank, see
        `fastldm.export.writing.export`, whose errors these are. InputError for a pipeline that itself runs a bundle,
        and while requests with other adapters are under way.
        """
        self.stages.need_torch("which has no weights to export: copy it")
        if eight_bits.is_on(self.stages):
            raise InputError("fp8 is on, and is not exported: call disable_fp8 first")
        if (reason := self.stages.spec.not_exported) is not None:
            raise InputError(f"{self.stages.name}: {reason}")
        self.weights_changed()
        need_exporter()
        selection = self.stages.adapters.select(None)
        return self.session.call(lambda: self._export(Path(out).expanduser(), selection, options))

    def _export(self, out: Path, selection: Selection, options: dict[str, Any]) -> Path:
        """On the worker's thread, which would merge other requests' adapters meanwhile."""
        from fastldm.export import bundle, writing

        modules: dict[str, Any] = {"unet": self.unet, "vae": self.vae}
        spec = self.stages.spec
        if (encoder := self.stages.image_encoder) is not None:
            modules |= {IMAGE_ENCODER: encoder.model, IMAGE_NORMALIZER: encoder.normalizer}
        if spec.prior is not None and self.stages.prior is not None:
            prior = self.stages.prior.loaded
            modules |= {PRIOR: prior.model, PRIOR_TEXT_ENCODER: prior.text.model, IMAGE_NORMALIZER: prior.normalizer}
        for name, stage in self.stages.encoders.items():
            modules[name] = stage.model
            if stage.added:
                spec, modules[name] = bundle.with_tokens(spec, name, stage)
        with self.stages.adapters.applied(selection):
            model = bundle.in_memory(spec, modules)
            controls = {} if options.get("split") is False else self.controls
            more = {"adapters": selection.record(), "controls": controls}
            options = {"source": None, "name": self.name, **more, **options}
            return writing.export(model, out, **options).folder

    def enable_fp8(self, prompt: Prompt = None, **options: Any) -> int:
        """Multiply by the U-Net's large linear layers in eight bits (e4m3), which GPUs of Ada and later do at twice the
        rate. Returns how many layers do; `disable_fp8` goes back.

        Inputs are scaled by what they are in all steps of one request, which is made first: prompt and options as of a
        call; by default a red apple, or what else the model reads. Requests that are under way go on as they were. Off
        by default: pictures differ a little, and how much faster it is has not been measured. On a CPU it computes the
        same pictures, more slowly.
        InputError for a GPU without such units, a bundle, and a model whose layers are too small to gain.
        """
        request = sampled(self.stages.spec, prompt, options)
        return self.session.call(lambda: eight_bits.enable(self.stages, self.stages.complete(request)))

    def disable_fp8(self) -> None:
        """Multiply by all layers in the model's dtype again."""
        self.session.call(lambda: eight_bits.disable(self.stages))

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """InputError: FreeU (arXiv:2309.11497) filters the U-Net's skip connections by a Fourier transform in each of
        its steps, which fastldm's steps do not have. The arguments are diffusers'."""
        raise InputError(
            f"enable_freeu({s1!r}, {s2!r}, {b1!r}, {b2!r}) is not supported: FreeU takes a Fourier transform of "
            "the skip connections in each step, which fastldm's step has not: leave it out, or call diffusers' pipeline"
        )

    def disable_freeu(self) -> None:
        """There is no FreeU."""

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in tiles: less memory for a difference that is not visible, see `decode_pieces`.

        InputError for a bundle: an exported decoder does not give the statistics that tiles share.
        """
        if self.backend != "torch":
            raise InputError(f"{self.backend} cannot decode in tiles: decode sliced or whole, or run on backend torch")
        self.stages.decoder.mode = "tiled"

    def enable_vae_slicing(self) -> None:
        """Decode a batch picture by picture: less memory, the same pictures."""
        self.stages.decoder.mode = "sliced"

    def disable_vae_tiling(self) -> None:
        """Decode in one go, as by default."""
        self.stages.decoder.mode = "whole"

    disable_vae_slicing = disable_vae_tiling


def _call_signature() -> inspect.Signature:
    """What `help(pipe.__call__)` and editors show: the call's own arguments, and every field of Request."""
    own = inspect.signature(Pipeline.__call__, eval_str=False)
    fields = inspect.signature(Request).parameters.values()
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in fields if p.name not in own.parameters]
    return own.replace(parameters=[*named, *added])


Pipeline.__call__.__signature__ = _call_signature()  # type: ignore[attr-defined]


def _with_bar(steps: Iterator[Progress]) -> Iterator[Progress]:
    """The steps, and a bar on stderr of those that are done."""
    from tqdm import tqdm

    with tqdm(unit="step", leave=False) as bar:
        for step in steps:
            yield step
            bar.total = step.steps
            bar.update()
