"""Faults to plant in the kernels' source, each with a check that must fail: data for test_mutations.py.

FAULTS has them by the file of kernels/ that they are planted in: `old`, which its source has exactly once, becomes
`new`, and `check`, which gets the mutated module and calls ops.py on its op, must fail.

Over 500 lines, for it is one table.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import ops
import torch
from step_states import full_state, in_blocks_of, output_for, rescale_arguments

from fastldm.kernels import dispatch


class Fault(NamedTuple):
    old: str
    new: str
    check: Callable[[ModuleType], None]
    title: str


def _geglu(module: ModuleType) -> None:
    ops.check(module.GEGLU, torch.randn(3, 2 * 648, device=ops.DEVICE))


def _bias_residual(module: ModuleType) -> None:
    """A block of pixels that is not full, behind one that is."""
    out, residual = (torch.randn(1, 8, 5, 7, device=ops.DEVICE) for _ in range(2))
    images = [t.contiguous(memory_format=torch.channels_last) for t in (out, residual)]
    ops.check(module.BIAS_RESIDUAL, images[0], torch.randn(8, device=ops.DEVICE), images[1])


def _group_norm(module: ModuleType) -> None:
    """Pieces, the last one short; a group with channels of x and skip; a shift; a last block that is half empty."""
    x, skip = (torch.randn(2, c, 5, 7).contiguous(memory_format=torch.channels_last) for c in (17, 13))
    weight, bias, shift = torch.randn(30), torch.randn(30), torch.randn(2, 30)
    args = [t.to(ops.DEVICE) for t in (x, weight, bias, shift, skip)]
    with dispatch.forced("group_norm", {"GROUPS": 2, "PIXELS": 8, "TILES": 2, "num_warps": 4}):
        ops.check(module.GROUP_NORM, args[0], 3, *args[1:3], 1e-5, shift=args[3], skip=args[4])


def _group_norm_of_rows(module: ModuleType) -> None:
    """Weight and bias of each row."""
    x, (weight, bias) = torch.randn(2, 30, 5, 7).contiguous(memory_format=torch.channels_last), torch.randn(2, 2, 30)
    args = [t.to(ops.DEVICE) for t in (x, weight, bias)]
    ops.check(module.GROUP_NORM, args[0], 3, *args[1:], 1e-5)


def _add_group_norm(module: ModuleType) -> None:
    """Both designs; a group with channels of the sum and of skip; values that float16 rounds much."""
    images = [torch.randn(2, c, 5, 7).contiguous(memory_format=torch.channels_last) for c in (17, 17, 13)]
    x, residual, skip = (t.half().to(ops.DEVICE) for t in images)
    x_bias, ahead, weight, bias = (torch.randn(c).half().to(ops.DEVICE) for c in (17, 17, 30, 30))
    for config in ({"GROUPS": 2, "PIXELS": 8, "TILES": 2}, {"GROUPS": 1, "PIXELS": 32, "TILES": 2}):
        with dispatch.forced("add_group_norm", {**config, "num_warps": 4}):
            args = (x, residual * 99, x_bias, 3, weight, bias, 1e-5)
            ops.check(module.ADD_GROUP_NORM, *args, False, skip, ahead)
            total, out = module.ADD_GROUP_NORM.triton(*args, False, skip)
        with dispatch.forced("group_norm", {**config, "num_warps": 4}):
            assert torch.equal(out, module.GROUP_NORM.triton(total, 3, weight, bias, 1e-5, skip=skip))


def _moments_of_channels(module: ModuleType) -> None:
    """Of three blocks of pixels, with a shift."""
    x, (weight, bias) = torch.randn(2, 30, 6, 8, device=ops.DEVICE), torch.randn(2, 30, device=ops.DEVICE)
    x, shift = x.contiguous(memory_format=torch.channels_last), torch.randn(2, 30, device=ops.DEVICE)
    blocks = x.flatten(2).unflatten(2, (3, 16))  # (2, C, 3, 16)
    moments = torch.stack((blocks.mean(3), blocks.var(3, correction=0) * 16)).transpose(2, 3).contiguous()
    config = {"GROUPS": 2, "PIXELS": 8, "TILES": 2, "num_warps": 4}
    got = module.normalise(config, x, 3, weight, bias, 1e-5, False, shift=shift, moments=moments)
    assert ops.error(got, module.group_norm_reference(x, 3, weight, bias, 1e-5, shift=shift)) < 1e-5


def _conv_group_norm(module: ModuleType) -> None:
    """With moments from the convolution, and with partial sums and a skip; all that is added."""
    whole = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "MORE_N": 16, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
    norm = {"GROUPS": 2, "PIXELS": 8, "TILES": 2, "num_warps": 4}
    for split, extra in ((1, 0), (3, 15)):
        images = [torch.randn(2, c, 4, 8, device=ops.DEVICE) for c in (16, 30, 15)]
        weight = torch.randn(30, 16, 3, 3, device=ops.DEVICE)
        x, residual, skip, weight = (t.contiguous(memory_format=torch.channels_last) for t in (*images, weight))
        conv_bias, ahead = torch.randn(2, 30, device=ops.DEVICE)
        scale, bias = torch.randn(2, 30 + extra, device=ops.DEVICE)
        table = {op: Every(c) for op, c in (("conv2d", whole | {"SPLIT": split}), ("add_group_norm", norm))}
        with dispatch.use("triton"), dispatch.use_table({f"sm_{dispatch.capability(x)}": table}):
            args = (x, weight, conv_bias, residual, 3, scale, bias, 1e-5, 1, 1, True)
            ops.check(module.CONV_GROUP_NORM, *args, None, skip if extra else None, ahead)
            if not extra:
                shift = torch.randn(2, 30, device=ops.DEVICE)
                ops.check(module.CONV_GROUP_NORM, *args, shift)


class Every(dict[str, Any]):
    """Entries of a table: one configuration for all shapes."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

    def get(self, key: str, default: Any = None) -> Any:
        return {"path": "triton", "config": self.config}


def _moments_of_tiles(module: ModuleType) -> None:
    """As written with the output, of two accumulators and of one in halves."""
    for pixels, tile in ((8, {"BLOCK_M": 16, "BLOCK_N": 16, "MORE_N": 16}), (16, {"BLOCK_M": 128, "BLOCK_N": 128})):
        x = torch.randn(2, 16, pixels, pixels, device=ops.DEVICE).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(24, 16, 1, 1, device=ops.DEVICE).contiguous(memory_format=torch.channels_last)
        out = torch.empty(2, pixels, pixels, 24, device=ops.DEVICE)
        moments = torch.empty(2, 2, pixels * pixels // tile["BLOCK_M"], 24, device=ops.DEVICE)
        config = {**tile, "BLOCK_K": 16, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
        module.convolve(x, weight, torch.randn(24, device=ops.DEVICE), None, 1, 0, out, config, moments)
        blocks = out.flatten(1, 2).unflatten(1, (-1, tile["BLOCK_M"]))
        assert ops.error(moments[0], blocks.mean(2)) < 1e-5
        assert ops.error(moments[1], blocks.var(2, correction=0) * tile["BLOCK_M"]) < 1e-5


def _layer_norm(module: ModuleType) -> None:
    """A row that is no power of two, and a program with one row of two."""
    x, weight, bias = torch.randn(3, 320) + 1, torch.randn(320), torch.randn(320)
    ops.check(module.LAYER_NORM, *(t.to(ops.DEVICE) for t in (x, weight, bias)), 1e-5)


def _add_layer_norm(module: ModuleType) -> None:
    """Values that float16 rounds much: the statistics are those of the rounded sum."""
    x, residual = (torch.randn(3, 320, device=ops.DEVICE).half() for _ in range(2))
    weight, bias = torch.randn(2, 320, device=ops.DEVICE).half()
    total, out = module.ADD_LAYER_NORM.triton(x, residual * 99, weight, bias, 1e-5)
    assert torch.equal(out, module.LAYER_NORM.triton(total, weight, bias, 1e-5))
    later, same = module.ADD_LAYER_NORM.triton(x, residual * 99, weight, bias, 1e-5, bias)
    assert torch.equal(later, total + bias)
    assert torch.equal(same, out)


def _end_step(module: ModuleType) -> None:
    """Every term, in several programs a slot; see step_states.py."""
    state = full_state()
    with in_blocks_of(4):
        ops.check(module.END_STEP, output_for(state), *state)


def _end_rare_step(module: ModuleType) -> None:
    """Three rows a slot, and the terms that few samplers have."""
    state = full_state(rare=True)
    with in_blocks_of(4):
        ops.check(module.END_STEP, output_for(state, channels=8), *state, rare=True)


def _guidance_rescale(module: ModuleType) -> None:
    """A last block that is not full, of three rows a slot."""
    state = full_state(rare=True)
    ops.check(module.GUIDANCE_RESCALE, *rescale_arguments(state, output_for(state)).values())


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=ops.DEVICE).to(torch.float16)


_TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


def _linear(module: ModuleType) -> None:
    """A tail of K; five steps in two splits; ten rows of tiles."""
    with dispatch.forced("linear", _TILE | {"SPLIT": 2}):
        ops.check(module.LINEAR, _random(300, 72), _random(40, 72) / 8, _random(40), _random(300, 40))


def _linear_wide(module: ModuleType) -> None:
    with dispatch.forced("linear", _TILE | {"SPLIT": 1, "MORE_N": 16}):
        ops.check(module.LINEAR, _random(40, 32), _random(96, 32) / 6)


def _quantize(module: ModuleType) -> None:
    """A last block that is not full, and numbers beyond the range."""
    x = torch.full((2049,), 1000.0, device=ops.DEVICE)
    x[-1] = 3.5
    assert torch.equal(module.QUANTIZE.triton(x, 0.5).float(), module.quantize_reference(x, 0.5).float())


def _eight_bit_output(module: ModuleType) -> None:
    x, weight = (torch.eye(32, device=ops.DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.full((32,), 3.0, device=ops.DEVICE)
    with dispatch.forced("linear_fp8", _TILE | {"BLOCK_K": 32, "SPLIT": 1}):
        got = module.LINEAR_FP8.triton(x, weight, scale, None, None, torch.float16, False, 0.5)
    assert torch.equal(got.float(), 6 * torch.eye(32, device=ops.DEVICE))


def _conv(module: ModuleType) -> None:
    channels_last = torch.channels_last
    x, weight = (_random(*s).contiguous(memory_format=channels_last) for s in ((2, 16, 5, 4), (24, 16, 3, 3)))
    with dispatch.forced("conv2d", _TILE | {"SPLIT": 1}):
        ops.check(module.CONV2D, x, weight / 12, padding=1)


def _upsample(module: ModuleType) -> None:
    channels_last = torch.channels_last
    x, weight = (_random(*s).contiguous(memory_format=channels_last) for s in ((1, 16, 3, 4), (24, 16, 3, 3)))
    with dispatch.forced("upsample_conv2d", _TILE | {"SPLIT": 1}):
        ops.check(module.UPSAMPLE_CONV2D, x, weight / 12, None, 6, 8)


def _attention(config: dispatch.Config) -> Callable[[ModuleType], None]:
    """Tails everywhere; keys and values with strides of their own; a slot shared, one shorter, one never read."""

    def check(module: ModuleType) -> None:
        dtype = torch.float32 if ops.DEVICE == "cpu" else torch.float16
        q, k, v = (torch.randn(3, n, c, device=ops.DEVICE, dtype=dtype) for n, c in ((40, 80), (77, 80), (77, 96)))
        v += 1  # so that a key too many or too few moves the mean
        k[:, ::7] *= 4  # the peak moves from block to block
        kv_len, slots = (torch.tensor(n, dtype=torch.int32, device=ops.DEVICE) for n in ([77, 45, 9], [1, 0, 1]))
        with dispatch.forced("attention", config):
            ops.check(module.ATTENTION, q, k, v[..., :80], 2, kv_len=kv_len, slots=slots)

    return check


_attention_long = _attention(
    {"BLOCK_M": 32, "BLOCK_N": 32, "SPLIT": True, "FMA_EIGHTHS": 0, "num_warps": 4, "num_stages": 2}
)
_attention_short = _attention({"BLOCK_M": 32, "PROGRAMS": 1, "SPLIT": True, "num_warps": 4, "num_stages": 1})


def _lora(module: ModuleType) -> None:
    """Three layers, two pages, rows with other pages and with none; tiles that are not full."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias, residual, down, up = (
        torch.randn(*shape, generator=g).to(ops.DEVICE)
        for shape in ((2, 70, 40), (72, 40), (72,), (2, 70, 72), (4, 3, 16, 40), (4, 72, 16))
    )
    down[0] = 0
    pages = torch.tensor([[1, 3], [0, 2]], dtype=torch.int32, device=ops.DEVICE)
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]], device=ops.DEVICE)
    ops.check(module.LORA_LINEAR, x, weight, bias, residual, down, up, pages, scales)


def _lora_geglu(module: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias, down, up = (
        torch.randn(*shape, generator=g).to(ops.DEVICE)
        for shape in ((2, 20, 40), (48, 40), (48,), (3, 1, 16, 40), (3, 48, 16))
    )
    pages = torch.tensor([[1], [2]], dtype=torch.int32, device=ops.DEVICE)
    ops.check(module.LORA_GEGLU, x, weight, bias, down, up, pages, torch.ones(2, 1, device=ops.DEVICE))


FAULTS: dict[str, list[Fault]] = {
    "lora": [
        Fault(
            "down += (page.to(tl.int64) * layers + layer) * RANK * k",
            "down += page.to(tl.int64) * layers * RANK * k",
            _lora,
            "every layer shrunk by the first one's page",
        ),
        Fault(
            "tile *= tl.load(scales + batch * PAGES + slot)",
            "tile *= tl.load(scales + batch * PAGES)",
            _lora,
            "the scale of the row's first page for all",
        ),
        Fault(
            "        if page > 0:\n            a = tl.load(z",
            "        if page >= 0:\n            a = tl.load(z",
            _lora,
            "what nobody shrunk is expanded for no page",
        ),
        Fault(
            "from_page = up + (page.to(tl.int64) * layers + layer) * (n * RANK)",
            "from_page = up + page.to(tl.int64) * layers * (n * RANK)",
            _lora,
            "every layer expanded by the first one's page",
        ),
        Fault(
            "z += ((layer * tl.num_programs(1) + batch).to(tl.int64) * tokens + top)",
            "z += ((layer * tl.num_programs(1)).to(tl.int64) * tokens + top)",
            _lora,
            "the first row's shrunk tokens for all rows",
        ),
        Fault(
            "            bias += start\n",
            "            bias += 0\n",
            _lora,
            "the first layer's bias for all",
        ),
        Fault(
            "tl.load(from_page + n * RANK + rank[:, None] + column * RANK), second)",
            "tl.load(from_page + rank[:, None] + column * RANK), second)",
            _lora_geglu,
            "the gate expanded by the other half",
        ),
    ],
    "geglu": [
        Fault(
            "tl.maximum(b, 0.0) - z * series",
            "tl.maximum(b, 0.0) + z * series",
            _geglu,
            "the far side of the normal distribution added instead of taken away",
        ),
        Fault(
            "mask = (row < rows) & (channel < channels)",
            "mask = (row < rows) & (channel < channels - 1)",
            _geglu,
            "a tail mask one channel short",
        ),
    ],
    "bias_residual": [
        Fault(
            'cdiv(rows, config["ROWS"])',
            'rows // config["ROWS"]',
            _bias_residual,
            "the last block of pixels is skipped",
        ),
        Fault(
            "None, bias, residual, None, out, rows",
            "None, bias, None, None, out, rows",
            _bias_residual,
            "the residual left out",
        ),
    ],
    "group_norm": [
        Fault(
            "count = tl.minimum(tl.maximum(pixels - source * (PIXELS * TILES), 0), PIXELS * TILES)",
            "count = tl.where(source * (PIXELS * TILES) < pixels, PIXELS * TILES, 0)",
            _group_norm,
            "a short last piece weighed like the rest",
        ),
        Fault(
            "mask & (channel >= split_channel), other=0.0)",
            "mask & (channel > split_channel), other=0.0)",
            _group_norm,
            "the first channel of the skip connection left out",
        ),
        Fault(
            "m2 += deviation * (y - mean)",
            "m2 += deviation * deviation",
            _group_norm,
            "the running M2 without the step that the mean has made",
        ),
        Fault(
            "mean = tl.gather(mean, slot, 0)[None, :] - offset",
            "mean = tl.gather(mean, slot, 0)[None, :]",
            _group_norm,
            "a shift in the statistics only",
        ),
        Fault(
            "weight += row * weight_row",
            "weight += 0 * weight_row",
            _group_norm_of_rows,
            "the first row's weights for all",
        ),
        Fault(
            "bias += row * bias_row",
            "bias += row * 0",
            _group_norm_of_rows,
            "the first row's bias for all",
        ),
        Fault(
            "next_mask = (pixel >= first + PIXELS) & (pixel < last + PIXELS) & channel_mask",
            "next_mask = (pixel >= first + PIXELS) & (pixel < last) & channel_mask",
            _group_norm,
            "the tile before the last one loaded with the last one's mask",
        ),
        Fault(
            "tile = total.to(like.dtype.element_ty)",
            "tile = total",
            _add_group_norm,
            "a sum that is not rounded before it is normalised",
        ),
        Fault(
            "mask & (channel < split_channel), other=0.0)\n    return tile",
            "mask, other=0.0)\n    return tile",
            _add_group_norm,
            "the residual added to the skip connection too",
        ),
        Fault(
            "channel_mask & (channel < split_channel))\n    return row",
            "channel_mask)\n    return row",
            _add_group_norm,
            "the bias of x read on for the skip connection",
        ),
        Fault(
            "residual_tile = next_residual",
            "residual_tile = residual_tile",
            _add_group_norm,
            "the residual of the first tile added to all",
        ),
        Fault(
            "later = _total(y, None, _x_vector(ahead,",
            "later = _total(y, None, _x_vector(x_bias,",
            _add_group_norm,
            "x's bias twice in the sum instead of what comes ahead",
        ),
        Fault(
            "deviation = tl.where(source < BLOCKS, deviation, 0.0)",
            "deviation = deviation",
            _moments_of_channels,
            "a block that is none counted in the variance",
        ),
        Fault(
            "mean += tl.reshape(offset + tl.zeros((1, LANES), tl.float32), (LANES,))",
            "mean += 0.0",
            _moments_of_channels,
            "a shift that moments of channels lack",
        ),
    ],
    "conv_group_norm": [
        Fault(
            '{"shift": shift, "skip"',
            '{"shift": None, "skip"',
            _conv_group_norm,
            "a convolution that is normalised without its shift",
        ),
        Fault(
            '{"residual": residual, "x_bias"',
            '{"residual": None, "x_bias"',
            _conv_group_norm,
            "the residual left out of partial sums",
        ),
        Fault(
            '"x_bias": conv_bias, "total"',
            '"x_bias": None, "total"',
            _conv_group_norm,
            "the bias left out of partial sums",
        ),
        Fault(
            "return total if later is None else later, normed",
            "return total, normed",
            _conv_group_norm,
            "what comes ahead left out of the sum",
        ),
    ],
    "layer_norm": [
        Fault(
            "deviation = tl.where(mask, y - mean, 0.0)",
            "deviation = y - mean",
            _layer_norm,
            "lanes beyond the row counted in the variance",
        ),
        Fault(
            "tl.load(residual + offset, mask, other=0.0).to(tl.float32)).to(y.dtype)",
            "tl.load(residual + offset, mask, other=0.0).to(tl.float32))",
            _add_layer_norm,
            "the sum normalised before it is rounded",
        ),
        Fault(
            "tl.store(total + offset, later, mask)",
            "tl.store(total + offset, y, mask)",
            _add_layer_norm,
            "the bias of what comes later left out",
        ),
    ],
    "step": [
        Fault(
            "== tl.num_programs(0) - 1:",
            "== 0:",
            _end_step,
            "the first program moves the counter, before the others have read it",
        ),
        Fault(
            "ring + (i + 2) % 4 * size",
            "ring + (i + 1) % 4 * size",
            _end_step,
            "the ring of histories read one plane too far back",
        ),
        Fault(
            "_term(tl.abs(a1) + moves * tl.abs(e1), y + offset, valid)",
            "_term(moves * tl.abs(e1) * 0.0, y + offset, valid)",
            _end_step,
            "an anchor that the row asks for, not read",
        ),
        Fault(
            "_term(w2, out_at + third_row * out_row, valid)",
            "_term(w2, out_at + unguided_row * out_row, valid)",
            _end_rare_step,
            "the first row of the U-Net in place of the third",
        ),
        Fault(
            "x_next += o * model_output +",
            "x_next += o * guided +",
            _end_rare_step,
            "the guided row as the raw output, without its guidance",
        ),
    ],
    "guidance_rescale": [
        Fault(
            "tl.where(mask, guided - guided_mean, 0.0)",
            "guided - guided_mean",
            _guidance_rescale,
            "lanes beyond the end counted in the deviation",
        ),
        Fault(
            "mixed_sum += w0 * _row(out, row0, w0, at, mask) + w1 * guided + w2 * _row(out, row2, w2, at, mask)",
            "mixed_sum += w0 * _row(out, row0, w0, at, mask) + w1 * guided",
            _guidance_rescale,
            "a mean without the third row",
        ),
    ],
    "linear": [
        Fault(
            "a = tl.load(x + at + rows, (inner < k - at)[None, :], other=0.0)",
            "a = tl.load(x + at + rows, (inner < k - at - 1)[None, :], other=0.0)",
            _linear,
            "the last element of a row left out",
        ),
        Fault(
            "range(split * steps // SPLIT, (split + 1) * steps // SPLIT)",
            "range(split * (steps // SPLIT), (split + 1) * (steps // SPLIT))",
            _linear,
            "steps that the splits do not divide left out",
        ),
        Fault(
            "height = tl.minimum(rows - first, 8)",
            "height = 8",
            _linear,
            "a short last group of tiles walked like the rest",
        ),
        Fault(
            "column_of(first + BLOCK_N, n, MORE_N)",
            "column_of(first, n, MORE_N)",
            _linear_wide,
            "the second accumulator of a tile computes the first's columns",
        ),
        Fault(
            "tl.minimum(tl.arange(0, BLOCK_M), m - 1 - top)",
            "tl.minimum(tl.arange(0, BLOCK_M), m - 2 - top)",
            _linear,
            "the last row is the one before",
        ),
    ],
    "fp8": [
        Fault("to_range(y * inverse)", "(y * inverse)", _quantize, "numbers beyond the range are not clipped"),
        Fault(
            "tl.store(out + at, to_range(y * inverse).to(out.dtype.element_ty), at < count)",
            "tl.store(out + at, to_range(y * inverse).to(out.dtype.element_ty), at < count - 1)",
            _quantize,
            "the last number is not written",
        ),
        Fault("else 1 / out_scale", "else out_scale", _eight_bit_output, "an output multiplied by its scale"),
    ],
    "conv": [
        Fault(
            "mean = tl.sum(tile, 0) / M",
            "mean = tl.sum(tile, 0) / N",
            _moments_of_tiles,
            "a sum of rows divided by columns",
        ),
        Fault(
            "deviation = tile - mean[None, :]",
            "deviation = tile",
            _moments_of_tiles,
            "squares instead of deviations",
        ),
        Fault(
            "valid &= (left + j).to(tl.uint32) < width",
            "valid &= left + j < width",
            _conv,
            "left of a row the end of the row before is seen",
        ),
        Fault(
            "tap = (3 - 2 * i - down) * 4 + 3 - 2 * j - right",
            "tap = (3 - 2 * i - right) * 4 + 3 - 2 * j - down",
            _upsample,
            "phases of rows and columns swapped",
        ),
    ],
    "attention": [
        Fault(
            's = tl.where(tl.arange(0, BLOCK_N)[None, :] < keys, s, float("-inf"))',
            's = tl.where(tl.arange(0, BLOCK_N)[None, :] <= keys, s, float("-inf"))',
            _attention_long,
            "a tail mask one key too long",
        ),
        Fault(
            "_load(v, keys, v_row, acc, V_DIM, BLOCK_N, MASK)",
            "_load(v, keys, k_row, acc, V_DIM, BLOCK_N, MASK)",
            _attention_long,
            "values read with the stride of the keys",
        ),
        Fault(
            "_times(acc, rescale))",
            "acc)",
            _attention_long,
            "what was summed before is not rescaled when the peak rises",
        ),
        Fault(
            "slot = tl.load(slots + batch).to(tl.int64)",
            "slot = tl.load(slots).to(tl.int64) + batch * 0",
            _attention_long,
            "all rows read the first row's slot",
        ),
        Fault(
            "if START + WIDTH > DIM:",
            "if START + WIDTH > DIM + 8:",
            _attention_long,
            "the last 8 of a head's 48 channels of scores not masked: the next head's are seen",
        ),
        Fault(
            "tl.arange(0, MORE)[None, :] < keys - KEYS",
            "tl.arange(0, MORE)[None, :] < keys",
            _attention_short,
            "the second block of a short text masked like the first",
        ),
        Fault(
            "_load(v + KEYS * v_row, keys - KEYS, v_row,",
            "_load(v + KEYS * k_row, keys - KEYS, v_row,",
            _attention_short,
            "the second block of values looked for where the keys are",
        ),
    ],
}
