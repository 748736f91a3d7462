"""The end of a step: guidance, history, next latent, next anchor, mask blend, and the model input of the next step.

    out  = u + g * (c - u)                                             classifier-free guidance, g per call
    m    = p * x + q * out                                             history, newest first
    x'   = a * x + a1 * y + sum_k b_k * m_(i-k) + d * noise            next latent
    y'   = e * x + e1 * y + sum_k f_k * m_(i-k)                        next anchor
    x'   = mask * x' + (1 - mask) * (r * init + s * init_noise)        only where a mask is set
    u'   = c_in * x'                                                   next model input, once for each U-Net row

All state is float32, (B, C, h, w); `row` holds one row of a step table, in the order of COLUMNS. Zero coefficients
cost nothing: a DDIM step is two multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = ("c_in", "p", "q", "a", "a1", "b0", "b1", "b2", "b3", "d", "e", "e1", "f0", "f1", "f2", "f3", "r", "s")


def guide(out: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: (2B, C, h, w), unguided rows first, to (B, C, h, w) float32.

    `rescale` pulls each sample's deviation back to its guided half's: https://arxiv.org/abs/2305.08891, section 3.4.
    """
    unguided, guided = out.float().chunk(2)
    mixed = torch.lerp(unguided, guided, scale)
    if rescale == 0.0:
        return mixed
    dims = tuple(range(1, mixed.ndim))
    ratio = guided.std(dims, keepdim=True) / mixed.std(dims, keepdim=True)
    return mixed * (1 - rescale + rescale * ratio)


def model_input(x: Tensor, c_in: float, dtype: torch.dtype, copies: int, extra: Tensor | None = None) -> Tensor:
    """c_in * x in the model's dtype, `extra` channels (of an inpainting model) behind, `copies` times along the
    batch.
    """
    u = (x if c_in == 1.0 else x * c_in).to(dtype)
    if extra is not None:
        u = torch.cat((u, extra), 1)
    return u if copies == 1 else torch.cat((u,) * copies)


def step(
    row: Sequence[float],
    x: Tensor,
    y: Tensor | None,
    history: tuple[Tensor, ...],
    out: Tensor,
    noise: Tensor | None,
    *,
    depth: int = 4,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """One step: (x', y', history with m in front, at most `depth` long).

    x, out, noise: (B, C, h, w) float32. y: None for samplers that read no anchor, and it stays None. Pure: nothing
    is written in place.
    """
    p, q, a, a1, b0, b1, b2, b3, d, e, e1, f0, f1, f2, f3 = row[1:16]
    history = (_sum((p, x), (q, out)), *history[: depth - 1])
    nothing = (None,) * (4 - len(history))
    m0, m1, m2, m3 = (*history, *nothing)
    after = _sum((a, x), (a1, y), (b0, m0), (b1, m1), (b2, m2), (b3, m3), (d, noise))
    if y is not None:
        y = _sum((e, x), (e1, y), (f0, m0), (f1, m1), (f2, m2), (f3, m3))
    return after, y, history


def blend(row: Sequence[float], x: Tensor, mask: Tensor, init: Tensor, init_noise: Tensor) -> Tensor:
    """Where mask is 0, the given picture at the noise level of the next step; where it is 1, x."""
    return torch.lerp(_sum((row[16], init), (row[17], init_noise)), x, mask)


def _sum(*terms: tuple[float, Tensor | None]) -> Tensor:
    """The sum of c * t over terms whose coefficient is not 0."""
    total: Tensor | None = None
    for c, t in terms:
        if c == 0.0 or t is None:
            continue
        if total is None:
            total, owned = (t, False) if c == 1.0 else (t * c, True)
        elif owned:
            total.add_(t, alpha=c)
        else:
            total, owned = torch.add(total, t, alpha=c), True
    assert total is not None  # no row of a table forgets all that it had
    return total
