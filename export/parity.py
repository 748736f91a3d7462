"""How far two computations of the same thing are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastldm.errors import BundleError, FastLDMError

TOLERANCES = {"float32": 1e-4, "float16": 1e-2}
"""Relative errors that may be between a network in a dtype and PyTorch in float32. Seen were up to 2e-5 of float32,
which only sums in another order, and 2e-3 to 6e-3 of float16."""


@dataclass(frozen=True)
class Difference:
    """Between what was got and what was wanted."""

    maximum: float  # max |got - wanted|
    relative: float  # that over max |wanted|
    psnr: float  # dB, of numbers from -1 to 1, as pictures have

    def __str__(self) -> str:
        return f"relative error {self.relative:.1e}, maximum {self.maximum:.1e}"


def difference(got: Tensor, wanted: Tensor) -> Difference:
    """Of two tensors of one shape, computed in float64. What is not finite is infinitely far off."""
    apart = torch.tensor(math.inf)
    if got.shape == wanted.shape and bool(got.isfinite().all()):
        apart = got.double() - wanted.double()
    maximum, square = float(apart.abs().max()), float(apart.square().mean())
    if maximum == 0:
        return Difference(0.0, 0.0, math.inf)
    largest = float(wanted.abs().max())
    return Difference(
        maximum,
        maximum / largest if largest else math.inf,
        10 * math.log10(4 / square) if square < math.inf else -math.inf,
    )


def gate(
    network: str,
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    tolerance: float,
    error: type[FastLDMError] = BundleError,
) -> Difference:
    """The largest difference of all outputs of a network. Raises `error`, naming network, output and figure, where one
    is missing or beyond the relative tolerance."""
    worst = Difference(0.0, 0.0, math.inf)
    for name, expected in wanted.items():
        if name not in got:
            raise error(f"{network} has no output {name!r}, only {', '.join(got) or 'none'}")
        found = difference(got[name].cpu(), expected)
        if not found.relative <= tolerance:
            raise error(
                f"{network}: {name} {tuple(got[name].shape)} is not PyTorch's {tuple(expected.shape)}: "
                f"{found}, {tolerance:.0e} is allowed"
            )
        worst = max(worst, found, key=lambda one: one.relative)
    return worst
