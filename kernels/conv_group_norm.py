"""A convolution and the GroupNorm that reads its output.

    total = conv2d(x, weight) + conv_bias + residual, rounded to x's dtype            either is optional
    out = group_norm(total, skip), with shift and SiLU                                returns total + ahead and out

    x (B, C, H, W), weight (O, C, K, K), conv_bias, ahead (O,), residual (B, O, H', W'), skip (B, C2, H', W'),
    shift (B, O + C2), norm_weight and norm_bias (O + C2,) or (B, O + C2) -> (B, O, H', W') and (B, O + C2, H', W')

Nothing is computed here that conv.py and group_norm.py do not compute. What is saved is what lies between them, where
the convolution is by its kernel:

    not split   The program that writes a tile knows its mean and M2: it writes them too, of each channel of 128 pixels,
                and the norm's first kernel, which would read the image for them, is not launched. They are of the
                numbers as they are rounded.
    split K     Up to _MOST_PARTS partial sums are added by the norm's first kernel, not by one of their own.

By a library the convolution has neither bias nor residual, and the norm adds them (`add_group_norm`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.kernels import conv, group_norm
from fastldm.kernels.conv import CONV2D, conv2d
from fastldm.kernels.dispatch import Config, Cost, Op, P, Verdict, no
from fastldm.kernels.group_norm import ADD_GROUP_NORM, add_group_norm, like_pixels


def conv_group_norm_reference(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    stride: int = 1,
    padding: int = 0,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two ops; the sum is left to the norm, unless that has something of its own to add."""
    norm = (groups, norm_weight, norm_bias, eps)
    if shift is None:
        total = conv2d(x, weight, stride=stride, padding=padding)
        return add_group_norm(total, residual, conv_bias, *norm, silu=silu, skip=skip, ahead=ahead)
    total = conv2d(x, weight, conv_bias, stride=stride, padding=padding, residual=residual)
    out = group_norm.group_norm(total, *norm, silu=silu, shift=shift, skip=skip)
    return total if ahead is None else total + ahead[:, None, None], out


_MOST_PARTS = 4  # of more, the loads take more registers than there are
_MOST_BLOCKS = 128  # that each program of the norm merges: of more, reading the image again is faster


def _total_of(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution's output, without numbers."""
    batch, height, width = conv.out_size(x, weight, stride, padding)
    return torch.empty((batch, height, width, weight.shape[0]), dtype=x.dtype, device="meta").permute(0, 3, 1, 2)


def supports(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    stride: int = 1,
    padding: int = 0,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> Verdict:
    if not (verdict := conv.supports(x, weight, conv_bias, residual, stride, padding)):
        return verdict
    if ahead is not None and shift is not None:
        return no("the sum has something ahead, and the norm a shift")
    total = _total_of(x, weight, stride, padding)
    norm = (groups, norm_weight, norm_bias, eps, silu)
    verdict = group_norm.supports(total, *norm, shift, skip)
    return verdict and group_norm.add_supports(total, residual, conv_bias, *norm, skip, ahead)


def shape_class(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    stride: int = 1,
    padding: int = 0,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> str:
    return conv.shape_class(x, weight, conv_bias, residual, stride, padding)


def cost(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    stride: int = 1,
    padding: int = 0,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> Cost:
    """Those of the two, whose total goes through memory."""
    first = conv.cost(x, weight, conv_bias, residual, stride, padding)
    total = _total_of(x, weight, stride, padding)
    second = group_norm.cost(total, groups, norm_weight, norm_bias, eps, silu, shift, skip)
    return Cost(first.flop, first.bytes + second.bytes, second.exp)


def default(shape: str, arch: int) -> Config:
    """None of its own: the kernels are launched as the two ops' tables say."""
    return {}


def conv_group_norm_triton(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    stride: int = 1,
    padding: int = 0,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    config = CONV2D.config(x, weight, conv_bias, residual, stride, padding)
    batch, height, width = conv.out_size(x, weight, stride, padding)
    total = x.new_empty((batch, height, width, weight.shape[0])).permute(0, 3, 1, 2)
    norm = (groups, norm_weight, norm_bias, eps, silu)
    norm_config = ADD_GROUP_NORM.config(total, None, None, *norm, skip, ahead)
    pixels, moments = total[0, 0].numel(), None
    blocks, rest_of_pixels = divmod(pixels, config["BLOCK_M"])
    in_pieces = norm_config["PIXELS"] * norm_config["TILES"] < pixels
    if in_pieces and config["SPLIT"] == 1 and skip is None and not rest_of_pixels and blocks <= _MOST_BLOCKS:
        moments = x.new_empty((2, total.shape[0], blocks, total.shape[1]), dtype=torch.float32)
    out = total.permute(0, 2, 3, 1)
    summed = config["SPLIT"] > _MOST_PARTS
    parts = conv.convolve(x, weight, conv_bias, residual, stride, padding, out, config, moments, summed)
    rest = {"shift": shift, "skip": skip, "ahead": ahead}
    if parts is not None:
        terms = {"residual": residual, "x_bias": conv_bias, "total": total}
        return total, group_norm.normalise(norm_config, parts.permute(0, 1, 4, 2, 3), *norm, **terms, **rest)
    later = None if ahead is None else like_pixels(total)
    normed = group_norm.normalise(norm_config, total, *norm, total=later, moments=moments, **rest)
    return total if later is None else later, normed


class _ConvGroupNorm(Op[P, tuple[Tensor, Tensor]]):
    """Takes its kernels where the convolution takes its own."""

    def path(self, *args: P.args, **kwargs: P.kwargs) -> Verdict:
        verdict = super().path(*args, **kwargs)
        if not verdict:
            return verdict
        named = self.bind(*args, **kwargs)
        images = [named.get(name) for name in ("x", "weight", "conv_bias", "residual")]
        return CONV2D.path(*images, named.get("stride", 1), named.get("padding", 0))


CONV_GROUP_NORM = _ConvGroupNorm(
    "conv_group_norm",
    reference=conv_group_norm_reference,
    triton=conv_group_norm_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
)


def conv_group_norm(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    stride: int = 1,
    padding: int = 0,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """total = conv2d(x, weight, conv_bias, residual=residual), and group_norm of it, with its options.

    ahead (O,): as of `add_group_norm`, added to the total that is returned and not to what is normalised.
    """
    x, weight = conv.in_eights(x, weight)
    norm = (groups, norm_weight, norm_bias, eps)
    return CONV_GROUP_NORM(x, weight, conv_bias, residual, *norm, stride, padding, silu, shift, skip, ahead)
