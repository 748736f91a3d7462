"""One contender of a comparison, in a process of its own: loads, then works whenever it is told to.

    python -m fastldm.profiling.contender TASK

TASK: a compare.Task and a compare.Contender as JSON, all paths absolute. The working folder is its own, and
is deleted after it.

Reads lines: "run", or "save FILE". Writes a line of JSON for each, and one before when it is loaded. Peers are run as
their own documentation says: a pipeline of diffusers, optimum or OpenVINO GenAI; "onnxruntime" and "openvino" are
diffusers' pipeline with its networks replaced by sessions. All but diffusers read a bundle that was not split.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm import heap
from fastldm.profiling.compare import RANDOM, Contender, Task

Inference = Callable[[], Tensor]
_ALIVE: list[object] = []  # who owns the layouts that a network's weights are read in


def main() -> None:
    arguments = json.loads(sys.argv[1])
    task, contender = Task(**arguments["task"]), Contender(**arguments["contender"])
    heap.keep()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as fastldm.export does
    torch.set_num_threads(1 if task.model == RANDOM else task.threads)  # as many load side by side
    start = perf_counter()
    with torch.inference_mode():
        call = _MAKE[contender.name](task, contender)
        torch.set_num_threads(task.threads)
        _write(loaded=perf_counter() - start)
        output = torch.empty(0)
        for line in sys.stdin:
            command, _, path = line.strip().partition(" ")
            if command == "save":
                np.save(path, output.float().cpu().numpy())
                _write(saved=path)
                continue
            start = perf_counter()
            output = call()
            seconds = perf_counter() - start
            _write(seconds=seconds, peak=_peak())


def _peak() -> int:
    """The most bytes of memory that this process has had; 0 on Windows, which keeps no such count."""
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB


def _write(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _latents(task: Task, channels: int, factor: int) -> Tensor:
    """What all contenders start from: (batch, C, h, w), normal numbers of the task's seed."""
    shape = (task.batch, channels, task.height // factor, task.width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(task.seed))


def _inputs(task: Task, channels: int, width: int, factor: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one guided step: latents (2B, C, h, w), a timestep (1,), text (2B, T, D)."""
    generator = torch.Generator().manual_seed(task.seed)
    shape = (2 * task.batch, channels, task.height // factor, task.width // factor)
    text = (2 * task.batch, task.tokens, width)
    return torch.randn(shape, generator=generator), torch.tensor([500.0]), torch.randn(text, generator=generator)


SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": 8,
}


def _random_state(network: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights for a network on the meta device, the same for all who name and shape theirs alike, of a size that keeps
    activations near one. One block of numbers serves all, each from another place on: drawing as many takes minutes."""
    size = 1 << 20
    block = torch.randn(size, generator=torch.Generator().manual_seed(0)).repeat(2)
    state = {}
    for k, (name, p) in enumerate(sorted(network.state_dict().items())):
        count, start = p.numel(), -7919 * k % size
        values = block[start : start + min(count, size)] * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
        if "norm" in name and name.endswith("weight"):
            values += 1
        numbers = torch.empty(count, dtype=dtype)
        for piece in numbers.split(size):
            piece.copy_(values[: len(piece)])
        state[name] = numbers.reshape(p.shape)
    return state


def _random_fastldm(task: Task, dtype: torch.dtype) -> Inference:
    from fastldm.loading.prepare import prepare
    from fastldm.loading.state import load_module
    from fastldm.models.config import UNetConfig
    from fastldm.models.unet import UNet

    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(SD15, RANDOM))
    load_module(unet, _random_state(unet, dtype), dtype=dtype, source=RANDOM)
    _ALIVE.append(prepare({"unet": unet}))
    return _step(task, unet, dtype, 8)


def _step(task: Task, unet: Any, dtype: torch.dtype, factor: int) -> Inference:
    """A step of fastldm's, with what it computes once a request."""
    model_input, timestep, text = _inputs(task, unet.config.in_channels, unet.config.cross_attention_dim, factor)
    rows = unet.time_rows(timestep).expand(len(model_input), -1)
    model_input, kv = model_input.to(dtype), unet.cross_kv(text.to(dtype))

    def step() -> Tensor:
        return unet.step(model_input, rows, kv)

    return step


def _random_diffusers(dtype: torch.dtype) -> Any:
    import diffusers

    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel(**SD15)
    unet.load_state_dict(_random_state(unet, dtype), assign=True)
    unet.eval()
    if dtype == torch.bfloat16:
        unet.to(memory_format=torch.channels_last)
    return unet


def _fastldm(task: Task, contender: Contender) -> Inference:
    from fastldm.pipeline import Pipeline

    if task.model == RANDOM:
        return _random_fastldm(task, getattr(torch, contender.dtype))
    source = contender.bundle or task.model
    pipe = Pipeline.from_pretrained(source, device="cpu", dtype=contender.dtype, backend=contender.backend)
    if task.what == "step":
        _ALIVE.append(pipe)
        return _step(task, pipe.unet, pipe.dtype, pipe.vae.config.factor)
    latents = _latents(task, pipe.latent_channels, pipe.vae.config.factor)

    def picture() -> Tensor:
        images = pipe(
            [task.prompt] * task.batch,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            sampler=task.sampler,
            latents=latents,
            generator=torch.Generator().manual_seed(task.seed),
            output_type="pt",
        ).images
        assert isinstance(images, Tensor)
        return images.permute(0, 2, 3, 1)

    return picture


def _diffusers(task: Task, contender: Contender) -> Inference:
    if task.model == RANDOM:
        pipe, unet, factor = None, _random_diffusers(getattr(torch, contender.dtype)), 8
    else:
        pipe = _diffusers_pipeline(task, contender)
        unet, factor = pipe.unet, pipe.vae_scale_factor
    if contender.name == "diffusers-compile":
        unet.forward = torch.compile(unet.forward)
    if task.what == "picture":
        return _diffusers_picture(task, pipe)
    return _diffusers_step(task, unet, unet.dtype, factor)


def _diffusers_step(task: Task, unet: Any, dtype: torch.dtype, factor: int) -> Inference:
    model_input, timestep, text = _inputs(task, unet.config.in_channels, unet.config.cross_attention_dim, factor)
    model_input, text = model_input.to(dtype), text.to(dtype)
    return lambda: unet(model_input, timestep[0], text).sample


def _diffusers_pipeline(task: Task, contender: Contender) -> Any:
    import diffusers

    from fastldm.loading.spec import DEFAULT_MODEL

    is_bfloat16 = contender.dtype == "bfloat16"
    source = str(DEFAULT_MODEL) if task.model == "default" else task.model
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        source, torch_dtype=torch.bfloat16 if is_bfloat16 else torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = _scheduler(task, pipe.scheduler.config)
    if is_bfloat16:  # slower without: it is what its documentation advises
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def _scheduler(task: Task, config: Mapping[str, Any]) -> Any:
    """The task's, with what diffusers' pipelines change of a scheduler that they are made with."""
    import diffusers

    kind = getattr(diffusers, task.sampler)
    scheduler = kind.from_config(config)
    return kind.from_config({**config, "clip_sample": False}) if scheduler.config.get("clip_sample") else scheduler


def _diffusers_picture(task: Task, pipe: Any) -> Inference:
    latents = _latents(task, pipe.unet.config.in_channels, pipe.vae_scale_factor).to(pipe.dtype)

    def picture() -> Tensor:
        images = pipe(
            [task.prompt] * task.batch,
            height=task.height,
            width=task.width,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            latents=latents,
            generator=torch.Generator().manual_seed(task.seed),
            output_type="np",
        ).images
        return torch.from_numpy(images)

    return picture


Session = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def _engines(task: Task, contender: Contender) -> Inference:
    """diffusers' pipeline on sessions, without what others' pipelines add."""
    assert contender.bundle is not None
    folder = Path(contender.bundle)
    open_session = _onnxruntime if contender.name == "onnxruntime" else _openvino

    def session(name: str) -> Session:
        return open_session(folder / name / "model.onnx", contender.dtype, task.threads)

    unet = session("unet")
    if task.what == "step":
        latents, timestep, text = _inputs(task, *_sizes(folder))
        inputs = {"sample": latents, "timestep": timestep, "encoder_hidden_states": text}
        arrays = {name: x.numpy() for name, x in inputs.items()}
        return lambda: torch.from_numpy(unet(arrays)["out_sample"])
    pipe = _diffusers_pipeline(task, Contender("diffusers", "float32"))

    def unet_forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any) -> Any:
        time = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        inputs = {"sample": sample, "timestep": time, "encoder_hidden_states": encoder_hidden_states}
        out = torch.from_numpy(unet({name: x.numpy() for name, x in inputs.items()})["out_sample"])
        return _Output((out,))

    decoder, encoder = session("vae_decoder"), session("text_encoder")

    def decode(z: Tensor, return_dict: bool = True, **_: Any) -> Any:
        return (torch.from_numpy(decoder({"latent_sample": z.numpy()})["sample"]),)

    def encode(input_ids: Tensor, **_: Any) -> Any:
        return _Output(
            (torch.from_numpy(encoder({"input_ids": input_ids.numpy().astype(np.int32)})["last_hidden_state"]),)
        )

    pipe.unet.forward, pipe.vae.decode, pipe.text_encoder.forward = unet_forward, decode, encode
    return _diffusers_picture(task, pipe)


def _optimum(task: Task, contender: Contender) -> Inference:
    """optimum's pipeline on ONNX Runtime, which reads the bundle as it is."""
    import onnxruntime as ort
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = ort.SessionOptions()
    options.intra_op_num_threads = task.threads
    pipe = ORTStableDiffusionPipeline.from_pretrained(
        contender.bundle, provider="CPUExecutionProvider", session_options=options
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = _scheduler(task, pipe.scheduler.config)
    if task.what == "step":
        return _diffusers_step(task, pipe.unet, torch.float32, pipe.vae_scale_factor)
    return _diffusers_picture(task, pipe)


def _openvino_genai(task: Task, contender: Contender) -> Inference:
    """OpenVINO's pipeline, which has no Python between its steps. It wants models in OpenVINO's own format, time step
    and tokens of 64 bits, and a tokenizer that is a model too."""
    import openvino as ov
    import openvino_genai as genai
    from openvino.preprocess import PrePostProcessor
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    assert contender.bundle is not None
    bundle, folder = Path(contender.bundle), Path("openvino-genai").absolute()
    folder.mkdir()
    scheduler = json.loads((bundle / "scheduler" / "scheduler_config.json").read_text())
    _scheduler(task, scheduler).save_pretrained(folder / "scheduler")
    index = json.loads((bundle / "model_index.json").read_text())
    index |= {  # by whose classes it knows what kind of model this is
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("text_encoder", "unet", "vae_decoder"):
        model = ov.Core().read_model(bundle / name / "model.onnx")
        integers = {"unet": "timestep", "text_encoder": "input_ids"}
        if name in integers:
            changed = PrePostProcessor(model)
            changed.input(integers[name]).tensor().set_element_type(ov.Type.i64)
            model = changed.build()
        (folder / name).mkdir()
        ov.save_model(model, folder / name / "openvino_model.xml", compress_to_fp16=False)
        shutil.copy(bundle / name / "config.json", folder / name)
    tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(bundle / "tokenizer"))
    ov.save_model(tokenizer, folder / "tokenizer" / "openvino_tokenizer.xml")

    settings = _openvino_settings(contender.dtype, task.threads)
    if task.what == "step":
        unet = genai.UNet2DConditionModel(folder / "unet", "CPU", **settings)
        model_input, timestep, text = _inputs(task, *_sizes(bundle))
        unet.set_hidden_states("encoder_hidden_states", ov.Tensor(text.numpy()))
        inputs = ov.Tensor(model_input.numpy()), ov.Tensor(timestep.long().numpy())
        return lambda: torch.from_numpy(unet.infer(*inputs).data)

    pipe = genai.Text2ImagePipeline(folder, "CPU", **settings)
    channels, _, factor = _sizes(bundle)
    latents = _latents(task, channels, factor).numpy()

    class FixedNoise(genai.Generator):
        def randn_tensor(self, shape: Any) -> ov.Tensor:
            return ov.Tensor(latents.copy())  # which the pipeline scales in place

    def picture() -> Tensor:
        output = pipe.generate(
            task.prompt,
            num_images_per_prompt=task.batch,
            width=task.width,
            height=task.height,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            generator=FixedNoise(),
        )
        return torch.from_numpy(output.data) / 255

    return picture


class _Output(tuple):
    """One tensor as diffusers and transformers return it: the first of a tuple, and by its name."""

    @property
    def sample(self) -> Tensor:
        return self[0]

    last_hidden_state = sample


def _sizes(folder: Path) -> tuple[int, int, int]:
    """Of a bundle's U-Net: channels of its input, width of its text, pixels a latent."""
    unet, vae = (json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae_decoder"))
    return unet["in_channels"], unet["cross_attention_dim"], 2 ** (len(vae["block_out_channels"]) - 1)


def _onnxruntime(path: Path, dtype: str, threads: int) -> Session:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def _openvino(path: Path, dtype: str, threads: int) -> Session:
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", _openvino_settings(dtype, threads))
    names = [output.get_any_name() for output in compiled.outputs]
    return lambda inputs: dict(zip(names, compiled(inputs).values(), strict=True))


def _openvino_settings(dtype: str, threads: int) -> dict[str, Any]:
    import openvino as ov

    precision = ov.Type.bf16 if dtype == "bfloat16" else ov.Type.f32
    return {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}


_MAKE: dict[str, Callable[[Task, Contender], Inference]] = {
    "fastldm": _fastldm,
    "diffusers": _diffusers,
    "diffusers-compile": _diffusers,
    "onnxruntime": _engines,
    "openvino": _engines,
    "optimum": _optimum,
    "openvino-genai": _openvino_genai,
}


if __name__ == "__main__":
    main()
