"""Differences between two computations of the same values, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastldm.errors import BundleError, FastLDMError

FACTOR = 4
"""Allowed ratio to a sound computation's error, for a computation that sums in another order or rounds elsewhere."""
_SHARED = 3 / 16
"""Fraction of a sound computation's error that all values may have in common: usually less than 0.01, 0.51 / FACTOR
where OpenVINO cuts weights of float16 to bfloat16 instead of rounding them (the default model's text_kv)."""
_LEAST, _LEAST_SHARED = 2.0**-20, 2.0**-18
"""Smallest bounds, relative to the largest value: eight roundings of float32, and the common shift of convolution
algorithms with transforms (OpenVINO's in float32, SD1.5's decoder at 512x512: 1.3e-5)."""


@dataclass(frozen=True)
class Difference:
    """The difference between actual and expected values."""

    maximum: float  # max |actual - expected|
    relative: float  # maximum / max |expected|
    psnr: float  # dB, for values in -1..1, such as images
    spread: float  # root mean square of actual - expected, over that of expected
    bias: float  # common part of the errors, relative to expected: a shift or a factor, whichever is larger

    def __str__(self) -> str:
        return f"relative error {self.relative:.1e}, mean {self.spread:.1e}, bias {self.bias:.1e}"

    @classmethod
    def none(cls) -> Difference:
        return cls(0.0, 0.0, math.inf, 0.0, 0.0)

    def values(self) -> list[float]:
        """All fields, as stored in bundles."""
        return [self.maximum, self.relative, self.psnr, self.spread, self.bias]

    def allowed(self, numbers: int) -> Difference:
        """The bound for another computation of so many numbers, if this is a sound computation's difference. A few
        numbers may have a common error by chance."""
        return Difference(
            math.inf,
            FACTOR * max(self.relative, _LEAST),
            -math.inf,
            FACTOR * max(self.spread, _LEAST),
            FACTOR * max(self.bias, max(_SHARED, numbers**-0.5) * self.spread, _LEAST_SHARED),
        )

    def within(self, allowed: Difference) -> bool:
        return self.relative <= allowed.relative and self.spread <= allowed.spread and self.bias <= allowed.bias


def difference(actual: Tensor, expected: Tensor) -> Difference:
    """The difference of two tensors of one shape, in float64; infinite if `actual` is not finite."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return Difference(math.inf, math.inf, -math.inf, math.inf, math.inf)
    expected = expected.double()
    error = actual.double() - expected
    maximum, square, power = float(error.abs().max()), float(error.square().mean()), float(expected.square().mean())
    if maximum == 0:
        return Difference.none()
    psnr = 10 * math.log10(4 / square)
    if power == 0:
        return Difference(maximum, math.inf, psnr, math.inf, math.inf)
    shift, factor = abs(float(error.mean())) / math.sqrt(power), abs(float((error * expected).mean())) / power
    largest = float(expected.abs().max())
    return Difference(maximum, maximum / largest, psnr, math.sqrt(square / power), max(shift, factor))


def worst(first: Difference, second: Difference) -> Difference:
    """The worse value of each field."""
    values = [max(a, b) for a, b in zip(first.values(), second.values(), strict=True)]
    values[2] = min(first.psnr, second.psnr)
    return Difference(*values)


def gate(
    network: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    sound: Mapping[str, Difference],
    error: type[FastLDMError] = BundleError,
) -> Difference:
    """The largest differences of all outputs of a network. Raises `error`, with network, output and differences, if an
    output is missing or beyond the bound from `sound`, a sound computation's differences by output."""
    total = Difference.none()
    for name, x in expected.items():
        if name not in actual:
            raise error(f"{network} has no output {name!r}, only {', '.join(actual) or 'none'}")
        measured, allowed = difference(actual[name].cpu(), x), sound[name].allowed(x.numel())
        if not measured.within(allowed):
            raise error(
                f"{network}: {name} {tuple(actual[name].shape)} is not PyTorch's {tuple(x.shape)}: "
                f"{measured}; allowed are {allowed.relative:.1e}, {allowed.spread:.1e} and {allowed.bias:.1e}"
            )
        total = worst(total, measured)
    return total
