"""runtime/eight_bits.py: large layers of the U-Net in fp8, through the public pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastldm
from fastldm.kernels import dispatch, fp8
from fastldm.models.layers import Linear
from fastldm.runtime import eight_bits

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "output_type": "np"}


@pytest.fixture
def pipe() -> Iterator[fastldm.Pipeline]:
    pipe = fastldm.Pipeline.default(dtype="float32")
    yield pipe
    pipe.disable_fp8()


def enable(pipe: fastldm.Pipeline, least_weight: int = 1, least_rows: int = 1) -> int:
    """As Pipeline.enable_fp8, with the small layers of the default model."""
    request = pipe.stages.complete(fastldm.Request(prompt="a red apple", num_inference_steps=2, seed=0))
    return pipe.session.call(lambda: eight_bits.enable(pipe.stages, request, least_weight, least_rows))


def picture(pipe: fastldm.Pipeline, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(pipe("a red apple", **OPTIONS | options).images)


def difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """RMSE in grey levels."""
    return float(255 * np.sqrt(((a - b) ** 2).mean()))


def test_pictures_stay_near_and_come_back(pipe: fastldm.Pipeline) -> None:
    before = picture(pipe)
    assert enable(pipe) > 50
    eight = picture(pipe)
    assert 0.1 < difference(eight, before) < 8, "another arithmetic, and the same picture"
    assert np.array_equal(picture(pipe), eight)
    pipe.disable_fp8()
    assert np.array_equal(picture(pipe), before)


def test_large_layers_get_the_scale_of_their_input(pipe: fastldm.Pipeline) -> None:
    largest: dict[int, float] = {}

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.name == "linear_geglu":
            address = args[1].data_ptr()
            largest[address] = max(largest.get(address, 0.0), args[0].abs().max().item())

    request = pipe.stages.complete(fastldm.Request(prompt="a red apple", num_inference_steps=2, seed=0))
    with dispatch.observe(watch):
        pipe.stages.make(request)
    sizes = [layer.weight.numel() for layer in pipe.unet.modules() if isinstance(layer, Linear)]
    least = sorted(sizes)[len(sizes) // 2]
    enable(pipe, least_weight=least, least_rows=16)
    taken = [layer for layer in pipe.unet.modules() if isinstance(layer, Linear) and layer.eight_bits is not None]
    assert 0 < len(taken) < len(sizes)
    for layer in taken:
        assert layer.eight_bits is not None
        if layer.weight.data_ptr() in largest:
            assert layer.eight_bits.x_scale == pytest.approx(largest[layer.weight.data_ptr()] / fp8.LARGEST)


def test_projections_of_one_input_are_one_product(pipe: fastldm.Pipeline) -> None:
    enable(pipe)
    calls: list[Any] = []

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.name in ("linear_fp8", "quantize"):
            calls.append((op.name, args))

    request = pipe.stages.complete(fastldm.Request(prompt="a red apple", num_inference_steps=1, seed=0))
    with dispatch.observe(watch):
        pipe.stages.make(request)
    self_attentions = [m for m in pipe.unet.modules() if type(m).__name__ == "TransformerLayer"]
    packed = {layer.attn1.to_q.eight_bits.weight.data_ptr() for layer in self_attentions}
    products = [args for name, args in calls if name == "linear_fp8"]
    assert {args[1].data_ptr() for args in products} > packed
    for args in products:
        if args[1].data_ptr() in packed:
            assert args[1].shape[0] == 3 * args[1].shape[1]
    gates = sum(args[6] for args in products)
    assert gates == len(self_attentions)
    assert all(args[7] is not None for args in products if args[6]), "written in the eight bits of the next layer"
    # Norms and gates write eight bits: what comes out of an attention, or from elsewhere, is quantised by itself.
    assert sum(name == "quantize" for name, _ in calls) == len(products) - 4 * len(self_attentions)


def test_changed_weights_are_quantised_again(pipe: fastldm.Pipeline) -> None:
    enable(pipe)
    before = picture(pipe)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, Linear) and m.eight_bits is not None)
    layer.weight.data.mul_(1.5)
    changed = picture(pipe)
    assert difference(changed, before) > 0.1
    layer.weight.data.div_(1.5)
    assert np.array_equal(picture(pipe), before)


def test_a_batch_made_before_takes_no_new_run(pipe: fastldm.Pipeline) -> None:
    """On a GPU its captured steps would go on in the old arithmetic."""
    picture(pipe)
    (bucket,) = list(pipe.session._buckets)
    old = bucket.batch
    enable(pipe)
    picture(pipe)
    assert bucket.batch is not old


def test_models_without_large_layers_are_refused_by_name(pipe: fastldm.Pipeline) -> None:
    before = picture(pipe)
    with pytest.raises(fastldm.InputError, match=r"no linear layer of default has 1,048,576 weights and 256 rows"):
        pipe.enable_fp8(num_inference_steps=1)
    assert not eight_bits.is_on(pipe.stages)
    assert np.array_equal(picture(pipe), before)


def test_a_refused_request_leaves_the_eight_bits(pipe: fastldm.Pipeline) -> None:
    enable(pipe)
    before = picture(pipe)
    with pytest.raises(fastldm.InputError, match="no linear layer"):
        pipe.enable_fp8(num_inference_steps=1)
    assert eight_bits.is_on(pipe.stages)
    assert np.array_equal(picture(pipe), before)


def test_gpus_without_units_are_refused(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.stages, "device", torch.device("cuda"))
    monkeypatch.setattr(dispatch, "device_capability", lambda index: 80)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    request = fastldm.Request(prompt="a red apple")
    with pytest.raises(fastldm.InputError, match=r"NVIDIA A100 has no matrix units for fp8"):
        eight_bits.enable(pipe.stages, request)


def test_exporting_says_that_fp8_stays_behind(pipe: fastldm.Pipeline, tmp_path: Any) -> None:
    enable(pipe)
    with pytest.raises(fastldm.InputError, match="disable_fp8 first"):
        pipe.export(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_request_that_fails_leaves_the_weights(pipe: fastldm.Pipeline) -> None:
    with pytest.raises(fastldm.InputError):
        pipe.enable_fp8("a red apple", num_inference_steps=0)
    assert not eight_bits.is_on(pipe.stages)
