"""Matrix products of eight bits: e4m3, four bits of exponent and three of mantissa, up to 448.

    quantize     q = e4m3(x / scale)                                     x (..., I), one scale -> (..., I)
    linear_fp8   out = (x weight^T) * scale + bias + residual            x (..., I) and weight (O, I) e4m3, scale (O,)
        gated    out = a * gelu(b)   (a | b) = (x weight^T) * scale + bias          weight (2O, I), scale (2O,)

The matrix units of Ada, Hopper and Blackwell multiply e4m3 at twice the rate of float16, and a weight is half as many
bytes. e4m3 keeps four significant bits: 2^-4 is the largest error of a number, 2.6% its RMS, and those of a product of
thousands of terms average out. What it lacks is range, 2^-9 to 448, so numbers are scaled into it: each row of a weight
by its largest element, an input by the largest that it had in the model's own steps (runtime/eight_bits.py). What is
larger in a later one is clipped to 448. Source: Micikevicius et al. 2022, arXiv:2209.05433.

`scale` is that of the input times that of the weight's row; it multiplies the float32 sums, which are exact in it. The
kernel is linear.py's, with steps of 128 along K: as many bytes as 64 of float16. Norms and gates write their output in
e4m3 for the product that follows; what comes from elsewhere is quantised in a pass of its own (`quantize`).

Hopper's units add the products of a step with 14 bits, which is left so: 2^-14 of the sum is far below the operands'
errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastldm.kernels import linear
from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, capability, cdiv, dense, jit, launch, no
from fastldm.kernels.geglu import geglu_reference
from fastldm.kernels.linear import to_range

if TYPE_CHECKING:
    import triton.language as tl

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
OLDEST = 89  # Ada, Hopper and Blackwell have matrix units for it


def quantize_reference(x: Tensor, scale: float) -> Tensor:
    """The formula in PyTorch; float32, whatever the dtype, times the rounded inverse, as the kernel does."""
    inverse = torch.tensor(1 / scale, dtype=torch.float32, device=x.device)
    return (x.float() * inverse).clamp(-LARGEST, LARGEST).to(E4M3)


def linear_fp8_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    gated: bool = False,
    out_scale: float | None = None,
) -> Tensor:
    """The formula in PyTorch: float32 sums."""
    out = torch.nn.functional.linear(x.float(), weight.float()) * scale
    out = out if bias is None else out + bias.float()
    out = geglu_reference(out) if gated else out
    out = out if residual is None else out + residual.float()
    return out.to(dtype) if out_scale is None else quantize_reference(out, out_scale)


def weight_scale(weight: Tensor) -> Tensor:
    """The scale of each row of a weight (O, I): (O,) float32. A row of zeros has scale 1."""
    scale = weight.float().abs().amax(1) / LARGEST
    return torch.where(scale > 0, scale, 1.0)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (O, I) as e4m3, and the scale of each row: (O, I), (O,) float32."""
    scale = weight_scale(weight)
    return (weight.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(E4M3), scale


# ----------------------------------------------------------------------- where the kernels apply, and their cost


def has_units(x: Tensor) -> Verdict:
    if capability(x) < OLDEST:
        return no(f"sm_{capability(x)} has no matrix units for e4m3: sm_{OLDEST} and later do")
    return YES


def quantize_supports(x: Tensor, scale: float) -> Verdict:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return no(f"dtype {x.dtype}")
    if not x.is_contiguous() or not x.numel():
        return no(f"{tuple(x.shape)} is empty or not contiguous")
    return has_units(x)


def supports(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    gated: bool = False,
    out_scale: float | None = None,
) -> Verdict:
    if x.dtype != E4M3 or weight.dtype != E4M3 or scale.dtype != torch.float32:
        return no(f"x is {x.dtype}, weight {weight.dtype}, scale {scale.dtype}: not e4m3, e4m3 and float32")
    if weight.shape[1] % 16:
        return no(f"{weight.shape[1]} input channels are no multiple of 16: rows are not 16 bytes aligned")
    if gated and (weight.shape[0] % 2 or residual is not None):
        return no("a gate has two halves, and no residual")
    for vector in (scale, bias, residual):
        if vector is not None and not vector.is_contiguous():
            return no("scale, bias or residual is not contiguous")
    if not x.numel():
        return no(f"x {tuple(x.shape)} is empty")
    return has_units(x) and dense(x) and dense(weight)


def quantize_cost(x: Tensor, scale: float) -> Cost:
    return Cost(flop=0, bytes=x.numel() * (x.element_size() + 1))


def cost(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    gated: bool = False,
    out_scale: float | None = None,
) -> Cost:
    rows, size = x.numel() // x.shape[-1], dtype.itemsize if out_scale is None else 1
    out = rows * weight.shape[0] // (2 if gated else 1)
    moved = x.numel() + weight.numel() + out * (size if residual is None else size + residual.element_size())
    return Cost(flop=2 * rows * weight.numel(), bytes=moved, exp=out if gated else 0)


# ----------------------------------------------------------------------------------------------- configurations


def _eight_bits(config: Config) -> Config:
    """The configuration of a 16-bit product, for operands of half the size."""
    return {**config, "BLOCK_K": 2 * config["BLOCK_K"]}


SPACE = [_eight_bits(config) for config in linear.SPACE]
GATED_SPACE = [_eight_bits(config) for config in linear.GEGLU_SPACE]


def is_candidate(
    config: Config,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    gated: bool = False,
    out_scale: float | None = None,
) -> bool:
    """Those of the 16-bit product; a gate is not split."""
    if gated == ("SPLIT" in config):
        return False
    wide = {**config, "BLOCK_K": config["BLOCK_K"] // 2}
    if gated:
        return linear.linear_geglu_is_candidate(wide, x, weight)
    return linear.is_candidate(wide, x, weight)


def shape_class(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    gated: bool = False,
    out_scale: float | None = None,
) -> str:
    return linear.shape_class(x, weight) + (" gated" if gated else "")


def default(shape: str, arch: int) -> Config:
    config = _eight_bits((linear.linear_geglu_default if shape.endswith("gated") else linear.default)(shape, arch))
    # Two programs on a multiprocessor would spill: warps that multiply from registers take more of them for operands of
    # 128 along K, and Blackwell's take sums out of its tensor memory.
    return config if arch == 90 else {**config, "maxnreg": 255}


def quantize_default(shape: str, arch: int) -> Config:
    return {"NUMBERS": 2048, "num_warps": 4}  # 16 a thread: loads and stores of 16 bytes


# ------------------------------------------------------------------------------------------------------ kernels


@jit
def _quantize_kernel(x, out, inverse, count, NUMBERS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    y = tl.load(x + at, at < count, other=0.0).to(tl.float32)
    tl.store(out + at, to_range(y * inverse).to(out.dtype.element_ty), at < count)


def quantize_triton(x: Tensor, scale: float) -> Tensor:
    config = QUANTIZE.config(x, scale)
    out = x.new_empty(x.shape, dtype=E4M3)
    launch(_quantize_kernel, (cdiv(x.numel(), config["NUMBERS"]),), x, out, 1 / scale, x.numel(), **config)
    return out


def linear_fp8_triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    gated: bool = False,
    out_scale: float | None = None,
) -> Tensor:
    config = LINEAR_FP8.config(x, weight, scale, bias, residual, dtype, gated, out_scale)
    filters = weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], filters), dtype=dtype if out_scale is None else E4M3)
    inverse = None if out_scale is None else 1 / out_scale
    return linear.multiply(config, x, weight, scale, bias, residual, out, gated=gated, inverse=inverse)


# ---------------------------------------------------------------------------------------------------------- ops

QUANTIZE = Op(
    "quantize",
    reference=quantize_reference,
    triton=quantize_triton,
    supports=quantize_supports,
    shape_class=lambda x, scale: f"n{x.shape[-1]}",
    cost=quantize_cost,
    default=quantize_default,
)

LINEAR_FP8 = Op(
    "linear_fp8",
    reference=linear_fp8_reference,
    triton=linear_fp8_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=[*SPACE, *GATED_SPACE],
    is_candidate=is_candidate,
)


def quantize(x: Tensor, scale: float) -> Tensor:
    """x / scale as e4m3, clipped to +-448."""
    return QUANTIZE(x, scale)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gated: bool = False,
    out_scale: float | None = None,
) -> Tensor:
    """Multiply x (..., I) by weight (O, I), both e4m3, and each column by `scale` (O,) float32; then as `linear`, or
    with `gated` as `linear_geglu`. In `dtype`, or with `out_scale` as e4m3 to be multiplied by it.
    """
    return LINEAR_FP8(x, weight, scale, bias, residual, dtype, gated, out_scale)
