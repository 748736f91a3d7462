"""How far two computations of the same thing are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastldm.errors import BundleError, FastLDMError

FACTOR = 4
"""How many times a sound computation's error another may have, which sums in another order or rounds elsewhere."""
_SHARED = 3 / 16
"""Of a sound computation's error, what may be common to all numbers: less than a hundredth as a rule, 0.51 / FACTOR
where OpenVINO cuts weights of float16 to bfloat16 instead of rounding them (the default model's text_kv)."""
_LEAST, _LEAST_SHARED = 2.0**-20, 2.0**-18
"""What no bound is below, relative to the largest number: eight roundings of float32, and what transforms of
convolutions shift all numbers by (OpenVINO's in float32, SD1.5's decoder at 512x512: 1.3e-5)."""


@dataclass(frozen=True)
class Difference:
    """Between what was got and what was wanted."""

    maximum: float  # max |got - wanted|
    relative: float  # that over max |wanted|
    psnr: float  # dB, of numbers from -1 to 1, as pictures have
    spread: float  # root mean square of got - wanted, over that of wanted
    bias: float  # what the errors have in common, as a part of wanted: a shift, or a factor, whichever is larger

    def __str__(self) -> str:
        return f"relative error {self.relative:.1e}, mean {self.spread:.1e}, bias {self.bias:.1e}"

    @classmethod
    def none(cls) -> Difference:
        return cls(0.0, 0.0, math.inf, 0.0, 0.0)

    def figures(self) -> list[float]:
        """All of it, as it is kept."""
        return [self.maximum, self.relative, self.psnr, self.spread, self.bias]

    def allowed(self, numbers: int) -> Difference:
        """How far another computation of so many numbers may be off where a sound one is so far off: few have something
        in common by chance."""
        return Difference(
            math.inf,
            FACTOR * max(self.relative, _LEAST),
            -math.inf,
            FACTOR * max(self.spread, _LEAST),
            FACTOR * max(self.bias, max(_SHARED, numbers**-0.5) * self.spread, _LEAST_SHARED),
        )

    def within(self, allowed: Difference) -> bool:
        return self.relative <= allowed.relative and self.spread <= allowed.spread and self.bias <= allowed.bias


def difference(got: Tensor, wanted: Tensor) -> Difference:
    """Of two tensors of one shape, computed in float64. What is not finite is infinitely far off."""
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return Difference(math.inf, math.inf, -math.inf, math.inf, math.inf)
    expected = wanted.double()
    apart = got.double() - expected
    maximum, square, power = float(apart.abs().max()), float(apart.square().mean()), float(expected.square().mean())
    if maximum == 0:
        return Difference.none()
    psnr = 10 * math.log10(4 / square)
    if power == 0:
        return Difference(maximum, math.inf, psnr, math.inf, math.inf)
    shift, factor = abs(float(apart.mean())) / math.sqrt(power), abs(float((apart * expected).mean())) / power
    largest = float(expected.abs().max())
    return Difference(maximum, maximum / largest, psnr, math.sqrt(square / power), max(shift, factor))


def worst(one: Difference, other: Difference) -> Difference:
    """The larger of each figure."""
    figures = [max(a, b) for a, b in zip(one.figures(), other.figures(), strict=True)]
    figures[2] = min(one.psnr, other.psnr)
    return Difference(*figures)


def gate(
    network: str,
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    sound: Mapping[str, Difference],
    error: type[FastLDMError] = BundleError,
) -> Difference:
    """The largest differences of all outputs of a network. Raises `error`, naming network, output and figures, where
    one is missing or further off than a sound computation of it, by output, allows."""
    total = Difference.none()
    for name, expected in wanted.items():
        if name not in got:
            raise error(f"{network} has no output {name!r}, only {', '.join(got) or 'none'}")
        found, allowed = difference(got[name].cpu(), expected), sound[name].allowed(expected.numel())
        if not found.within(allowed):
            raise error(
                f"{network}: {name} {tuple(got[name].shape)} is not PyTorch's {tuple(expected.shape)}: "
                f"{found}; allowed are {allowed.relative:.1e}, {allowed.spread:.1e} and {allowed.bias:.1e}"
            )
        total = worst(total, found)
    return total
