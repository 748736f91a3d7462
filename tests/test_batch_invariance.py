"""An image is bitwise the one made alone, whatever shares its request or its batch: `batch_invariant`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ops
import pytest
import tiny
import torch
from sessions import from_threads, options, requests, tiny_pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.networks import SD15, SDXL
from fastldm import InputError, Pipeline, Session
from fastldm.kernels import dispatch
from fastldm.kernels.attention import attention
from fastldm.kernels.conv import conv2d, upsample_conv2d
from fastldm.kernels.group_norm import group_norm
from fastldm.kernels.layer_norm import layer_norm
from fastldm.kernels.linear import LINEAR, linear, linear_geglu
from fastldm.models.config import UNetConfig
from fastldm.planning import dry_run

DEVICE = ops.DEVICE


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return tiny_pipeline(DEVICE, getattr(torch, request.param))


@pytest.fixture
def session(pipe: Pipeline) -> Iterator[Session]:
    with Session(pipe, max_batch=8, batch_invariant=True) as session:
        yield session


def made_alone(pipe: Pipeline, query: dict[str, Any], k: int = 0) -> Any:
    """Image k of a request, in a request of its own."""
    with Session(pipe, batch_invariant=True) as session:
        single = query | {"num_images_per_prompt": 1, "seed": query["seed"] + k}
        return session.submit(**single).result(60).images


def test_requests_that_join_and_leave(pipe: Pipeline, session: Session) -> None:
    queries = requests(16, seed=2)
    for query, future in zip(queries, from_threads(session, queries), strict=True):
        images = future.result(120).images
        for k in range(query["num_images_per_prompt"]):
            assert (images[k : k + 1] == made_alone(pipe, query, k)).all()  # type: ignore[index]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_images_of_one_request(pipe: Pipeline, session: Session, count: int) -> None:
    query = options(seed=5, sampler="euler a", guidance_rescale=0.7, num_images_per_prompt=count)
    images = session.submit(**query).result(60).images
    for k in random.Random(count).sample(range(count), min(count, 3)):
        assert (images[k : k + 1] == made_alone(pipe, query, k)).all()  # type: ignore[index]


def test_prompts_of_unequal_length(pipe: Pipeline, session: Session) -> None:
    """Texts of one and of three windows, which share a batch by repeating the shorter."""
    prompts = ["a cat", "a cat " * 100, "a (shiny:1.4) dog"]
    negatives = ["", "dull", "grey " * 100]
    query = options(seed=0, prompt=prompts, negative_prompt=negatives)
    images = session.submit(**query).result(60).images
    for k, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = made_alone(pipe, options(seed=k, prompt=prompt, negative_prompt=negative))
        assert (images[k : k + 1] == alone).all()  # type: ignore[index]


def test_image_to_image_and_inpainting(pipe: Pipeline, session: Session) -> None:
    g = torch.Generator().manual_seed(0)
    starts, mask = torch.rand(3, 3, 64, 64, generator=g), (torch.rand(3, 1, 64, 64, generator=g) > 0.5).float()
    for masks in (None, mask):
        inputs = [{"image": starts}, {"image": starts[1:2]}]
        if masks is not None:
            inputs = [{"image": starts, "mask_image": masks}, {"image": starts[1:2], "mask_image": masks[1:2]}]
        query = options(seed=3, steps=4, strength=0.6)
        images = session.submit(**query, **inputs[0], num_images_per_prompt=3).result(60).images
        alone = session.submit(**query | {"seed": 4}, **inputs[1]).result(60).images
        assert (images[1:2] == alone).all()  # type: ignore[index]


def test_sdxl_and_its_callbacks() -> None:
    """Pooled texts and sizes; a callback sees the rows of all images and may change them."""
    tiny.peer("diffusers")
    xl = Pipeline.from_diffusers(tiny.pipeline("sdxl"), batch_invariant=True)
    seen: list[tuple[int, ...]] = []

    def callback(pipe: Pipeline, step: int, timestep: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tuple(tensors["prompt_embeds"].shape))
        return {"prompt_embeds": tensors["prompt_embeds"] * 1.1, "latents": tensors["latents"] * 0.9}

    query = options(steps=3, callback_on_step_end=callback)
    query["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    images = xl(**query | {"prompt": ["a cat", "a dog"]}).images
    assert [shape[0] for shape in seen] == [4, 4, 4]
    alone = xl(**query | {"prompt": "a dog", "seed": 1}).images
    assert (images[1:2] == alone).all()  # type: ignore[index]


def test_the_option_has_one_meaning_everywhere(pipe: Pipeline) -> None:
    assert not Session(pipe).batch_invariant
    with pytest.raises(InputError, match="batch_invariant is 'yes'"):
        Session(pipe, batch_invariant="yes")  # type: ignore[arg-type]
    default = Pipeline.default(batch_invariant=True)
    assert default.batch_invariant
    assert default.session.batch_invariant
    assert not Session(default, batch_invariant=False).batch_invariant
    with pytest.raises(AttributeError):
        default.batch_invariant = False  # type: ignore[misc]  # its session is made
    with pytest.raises(InputError, match="batch_invariant is 1"):
        Pipeline.default(batch_invariant=1)


# ------------------------------------------------------------------------------------------------------- on a GPU


class Launched(dispatch.Target):
    """A GPU that notes every kernel with its configuration."""

    def __init__(self) -> None:
        super().__init__(90)
        self.kernels: list[tuple[str, str]] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.kernels.append((kernel.fn.__name__, str(sorted(constants.items()))))


class Products(TorchDispatchMode):
    """The products of PyTorch, which its libraries compute as they like."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "cudnn", "scaled_dot_product", "linear", "norm")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen |= {name for product in self.NAMES if product in name}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("config", "size"), [(SD15, 64), (SD15, 36), (SDXL, 128)], ids=["sd1.5", "odd", "sdxl"])
def test_a_gpu_takes_the_same_kernels_for_any_rows(config: UNetConfig, size: int) -> None:
    """Own kernels alone, whose configurations do not depend on how many rows there are."""

    def launched(rows: int) -> list[tuple[str, str]]:
        target = Launched()
        with dispatch.targeting(target), dispatch.batch_invariant(), Products() as products:
            dry_run.step(config, height=size, width=size, rows=rows, tokens=77, dtype=torch.float16)()
        assert not products.seen
        return target.kernels

    expected = launched(2)
    assert len(expected) > 300
    for rows in (1, 3, 8, 16):
        assert launched(rows) == expected


def _inputs() -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """Each op that sums, as a function of its first argument."""
    g = torch.Generator().manual_seed(0)

    def of(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, torch.float16 if DEVICE == "cuda" else torch.float32)

    def channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    weight, gated, filters, latent = of(64, 512), of(64, 64), channels_last(of(16, 32, 3, 3)), of(16, 4, 3, 3)
    scale, shift, key = of(64), of(64), of(1, 40, 64)
    return {
        "linear": (lambda x: linear(x, weight), (32, 512)),
        "linear_geglu": (lambda x: linear_geglu(x, gated), (32, 64)),
        "conv2d": (lambda x: conv2d(channels_last(x), filters, padding=1), (32, 6, 6)),
        "conv2d of a latent": (lambda x: conv2d(channels_last(x), latent, padding=1), (4, 6, 6)),
        "upsample_conv2d": (lambda x: upsample_conv2d(channels_last(x), filters, None, (12, 12)), (32, 6, 6)),
        "to an odd size": (lambda x: upsample_conv2d(channels_last(x), filters, None, (11, 12)), (32, 6, 6)),
        "attention": (lambda x: attention(x, *(key.expand(len(x), -1, -1).contiguous(),) * 2, 2), (40, 64)),
        "group_norm": (lambda x: group_norm(channels_last(x), 8, scale, shift, 1e-5, silu=True), (64, 6, 6)),
        "layer_norm": (lambda x: layer_norm(x, scale, shift, 1e-5), (20, 64)),
    }


@pytest.mark.parametrize("name", _inputs())
def test_a_row_does_not_depend_on_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # the interpreter's products are numpy's, whose BLAS on some processors looks at other rows
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("...ij,...jk->...ik", a, b, dtype=dtype))
    function, shape = _inputs()[name]
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    x = x.to(DEVICE, torch.float16 if DEVICE == "cuda" else torch.float32)
    with dispatch.use("triton"), dispatch.batch_invariant(), torch.no_grad():
        together = function(x)
        for rows in ([0], [3, 1], [4, 4, 4]):
            assert torch.equal(function(x[rows].clone()), together[rows])


def test_splits_are_those_of_one_row() -> None:
    x, weight = (torch.empty(*shape, device="meta", dtype=torch.float16) for shape in ((16, 64, 1280), (1280, 1280)))
    with dispatch.targeting(dispatch.Target(90)):
        default = [LINEAR.config(x[:rows], weight) for rows in (1, 16)]
        with dispatch.batch_invariant():
            invariant = [LINEAR.config(x[:rows], weight) for rows in (1, 16)]
    assert default[0] != default[1], "the case that the option is for"
    assert invariant == [default[0], default[0]]


def test_what_a_library_would_compute_is_refused() -> None:
    x, weight = (torch.empty(*shape, device="meta", dtype=torch.float16) for shape in ((2, 64, 12), (8, 12)))
    with (
        dispatch.targeting(dispatch.Target(90)),
        dispatch.batch_invariant(),
        pytest.raises(dispatch.NotBatchInvariant, match="linear is not batch-invariant here: 12 input channels"),
    ):
        linear(x, weight)
