"""kernels/float32.py: what libraries are told about float32 on a GPU, and that nobody else's settings change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import ops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels import dispatch, float32
from fastldm.kernels.attention import attention_reference
from fastldm.kernels.conv import conv2d_torch, upsample_conv2d_torch
from fastldm.kernels.dispatch import Target
from fastldm.kernels.linear import linear_torch

backends = torch.backends
READ: dict[str, Callable[[], Any]] = {
    "all": lambda: backends.fp32_precision,
    "matmul": lambda: backends.cuda.matmul.fp32_precision,
    "conv": lambda: backends.cudnn.conv.fp32_precision,
    "rnn": lambda: backends.cudnn.rnn.fp32_precision,
    "older matmul": lambda: backends.cuda.matmul.allow_tf32,
    "older convolution": lambda: backends.cudnn.allow_tf32,
    "older precision": torch.get_float32_matmul_precision,
}
SET: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "newer": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, all": lambda: setattr(backends, "fp32_precision", "tf32"),
    "newer, CUDA": lambda: torch._C._set_fp32_precision_setter("cuda", "all", "tf32"),
    "both, apart": lambda: [torch.set_float32_matmul_precision("high"), SET["ieee"]()],
    "ieee": lambda: setattr(backends.cuda.matmul, "fp32_precision", "ieee"),
}


def settings() -> dict[str, Any]:
    """All that can be asked; the older ones raise where the newer ones say what they cannot."""

    def read(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except RuntimeError:
            return "raises"

    return {name: read(function) for name, function in READ.items()}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    names = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")]
    before = {name: torch._C._get_fp32_precision_getter(*name) for name in names}
    yield
    torch.set_float32_matmul_precision("highest")
    for name, value in before.items():
        torch._C._set_fp32_precision_setter(*name, value)


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "_may_round", lambda x: x.dtype == torch.float32)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: linear_torch(x.flatten(1), torch.ones(3, 64, dtype=x.dtype)),
    "attention": lambda x: attention_reference(*[x.flatten(1).unflatten(1, (8, 8))] * 3, 2),
    "conv2d": lambda x: conv2d_torch(x, torch.ones(3, 4, 3, 3, dtype=x.dtype), padding=1),
    "upsample_conv2d": lambda x: upsample_conv2d_torch(x, torch.ones(3, 4, 3, 3, dtype=x.dtype), None, 8, 8),
    "the same by phases": lambda x: upsample_conv2d_torch(
        x, torch.ones(3, 4, 3, 3, dtype=x.dtype), None, 8, 8, torch.ones(4, 3, 4, 4, dtype=x.dtype)
    ),
}


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("setting", SET)
def test_no_product_is_launched_in_tf32(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any setting of the process, which is the same afterwards."""
    SET[setting]()
    before, precisions = settings(), []

    def watched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: (
            precisions.append(backends.cuda.matmul.fp32_precision) or function(*args, **kwargs)
        )

    for product in ("linear", "scaled_dot_product_attention"):
        monkeypatch.setattr(F, product, watched(getattr(F, product)))
    for refused in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, refused, lambda *_, **__: pytest.fail("it multiplies as cudnn.allow_tf32 says"))
    x = torch.randn(1, 4, 4, 4)
    with mock.patch.object(torch, "_convolution", wraps=torch._convolution) as library:
        got = CALLS[name](x)
    monkeypatch.undo()
    assert ops.error(got, CALLS[name](x.double())) < 1e-6
    assert all(call.args[12] is False for call in library.call_args_list)  # allow_tf32
    assert bool(library.call_args_list) != bool(precisions), "it is one or the other"
    assert "tf32" not in precisions
    assert settings() == before


def test_other_dtypes_and_devices_are_unchanged() -> None:
    torch.set_float32_matmul_precision("high")
    for x in (torch.zeros(1), torch.zeros(1, dtype=torch.float16), torch.zeros(1, device="meta")):
        with float32.products(x):
            assert backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.usefixtures("_on_a_gpu")
def test_the_last_thread_restores_the_setting() -> None:
    torch.set_float32_matmul_precision("high")
    x, entered, leave = torch.zeros(1), threading.Event(), threading.Event()

    def leave_last() -> None:
        with float32.products(x):
            entered.set()
            assert leave.wait(10)

    thread = threading.Thread(target=leave_last)
    thread.start()
    assert entered.wait(10)
    with float32.products(x):
        assert backends.cuda.matmul.fp32_precision == "ieee"
    assert backends.cuda.matmul.fp32_precision == "ieee", "the other thread is still inside"
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "high"
    assert backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("_on_a_gpu")
def test_a_concurrent_setting_is_kept() -> None:
    torch.set_float32_matmul_precision("high")
    with float32.products(torch.zeros(1)):
        torch.set_float32_matmul_precision("highest")
        backends.cuda.matmul.fp32_precision = "none"
    assert settings()["matmul"] == "none"


def test_kernels_with_products_refuse_float32_on_a_gpu() -> None:
    x, image = (
        torch.empty(64, 64, device="meta"),
        torch.empty(1, 64, 8, 8, device="meta").to(memory_format=torch.channels_last),
    )
    kernel = torch.empty(64, 64, 3, 3, device="meta").to(memory_format=torch.channels_last)
    arguments: dict[str, tuple[Any, ...]] = {
        "linear": (x, x),
        "linear_geglu": (x, x),
        "attention": (x[None], x[None], x[None], 2),
        "conv2d": (image, kernel, None, None, 1, 1),
        "upsample_conv2d": (image, kernel, None, 16, 16),
    }
    with mock.patch.object(dispatch, "interpreting", return_value=False), dispatch.targeting(Target(90)):
        for name, args in arguments.items():
            with mock.patch("fastldm.kernels.linear.interpreting", return_value=False):
                assert "float32" in dispatch.OPS[name].path(*args).reason, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_computes_in_full_float32(name: str) -> None:
    """TF32 keeps 10 bits: it would be a thousandth off."""
    torch.set_float32_matmul_precision("high")
    backends.cudnn.allow_tf32 = True
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.device("cuda"):
        assert ops.error(CALLS[name](x.cuda()), CALLS[name](x.cuda().double())) < 2e-6
