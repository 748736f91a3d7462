"""The forms of a change of a weight: LoRA and its relatives, each a frozen dataclass with a method `delta`.

    dW = form.delta(W, scale)      # float32, in the shape of W: the layer then computes with W + dW

W is (out, in) of a linear layer, (out, in, kh, kw) of a convolution, or (channels,) of a norm. Some forms need the
weight itself, the rest only its shape. Tensors keep the dtype of their file; arithmetic is in float32. `scale` is the
user's; what a file states (alpha / rank) is in the form. LoRA, LoHa, LoKr, Difference, GLoRA and IA3 are linear in it,
DoRA and the orthogonal forms (orthogonal.py) are not, and for them scale 0 is not always dW = 0: an adapter at scale 0
is one that is not there. Forms are compared and hashed by identity.

Sources: LoRA arXiv:2106.09685, rank-stabilised 2312.03732, its convolutions, LoHa and LoKr 2309.14859, DoRA 2402.09353,
GLoRA 2306.07967, (IA)3 2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """A change of a weight."""

    @property
    def rank(self) -> int | None:
        """The rank that the file states, or None for a form without."""

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """dW of a weight of any float dtype: float32, in its shape."""


Factors = tuple[Tensor, ...]
"""A matrix as it is stored: (w,), whole; (a, b), a product; (a, b, t), a Tucker decomposition."""


def product(factors: Factors) -> Tensor:
    """The matrix of its factors, in float32.

    (w,) is returned as it is. a (m, r) and b (r, n...) -> (m, n...). a (r, m), b (r, n) and t (r, r, kh, kw) ->
    (m, n, kh, kw), by the core t on its first axis with a and on its second with b.
    """
    if len(factors) == 1:
        return factors[0].float()
    a, b = factors[0].float(), factors[1].float()
    if len(factors) == 2:
        return (a @ b.flatten(1)).unflatten(1, b.shape[1:])
    return torch.einsum("ij...,im,jn->mn...", factors[2].float(), a, b)


@dataclass(frozen=True, eq=False)
class LoRA:
    """dW = scale * up @ down, as a product of its flattened factors. A Tucker core is folded into `down` when read."""

    down: Tensor
    """(rank, in), or (rank, in, kh, kw) of a convolution."""
    up: Tensor
    """(out, rank)."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) of a rank-stabilised one."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (rank, in * kh * kw), B (out, rank) and s, so that dW = s * B @ A: for a layer that adds s * B (A x)."""
        return self.down.flatten(1), self.up, self.scale

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        a, b, own = self.factors()
        return (scale * own * (b.float() @ a.float())).view(weight.shape)


@dataclass(frozen=True, eq=False)
class LoHa:
    """dW = scale * (first ⊙ second): an elementwise product of two matrices of low rank."""

    first: Factors
    second: Factors
    scale: float
    rank: int

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        full = product(self.first).reshape(weight.shape) * product(self.second).reshape(weight.shape)
        return scale * self.scale * full


@dataclass(frozen=True, eq=False)
class LoKr:
    """dW = scale * (first ⊗ second): a Kronecker product, whose second factor has the kernel of a convolution."""

    first: Factors
    """Of a matrix (p, q)."""
    second: Factors
    """Of (out / p, in / q), or (out / p, in / q, kh, kw), which may be flattened."""
    scale: float
    """1 if both factors are whole, whatever alpha."""
    rank: int | None

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        first = product(self.first)  # (p, q)
        p, q = first.shape
        out, channels = weight.shape[:2]
        second = product(self.second).reshape(out // p, channels // q, -1)  # (k, n, kh * kw)
        kron = torch.einsum("pq,knh->pkqnh", first, second)
        return scale * self.scale * kron.reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Difference:
    """dW as it is: full fine-tuning, and the weights of norms."""

    difference: Tensor
    rank: None = None

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.difference.float().reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class GLoRA:
    """dW = scale * (W a1 a2 + b1 b2): a part that acts on the input of the layer, and a LoRA."""

    a1: Tensor
    """(in, rank)."""
    a2: Tensor
    """(rank, in)."""
    b1: Tensor
    """(out, rank)."""
    b2: Tensor
    """(rank, in), or (rank, in, kh, kw)."""
    scale: float

    @property
    def rank(self) -> int:
        return self.a1.shape[1]

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        through = torch.einsum("oi...,ir,rj->oj...", weight.float(), self.a1.float(), self.a2.float())
        added = (self.b1.float() @ self.b2.float().flatten(1)).view(weight.shape)
        return scale * self.scale * (through + added)


@dataclass(frozen=True, eq=False)
class IA3:
    """dW = W scaled by a vector, along the inputs or the outputs. (A bias is not scaled with the outputs.)"""

    vector: Tensor
    """(in,) or (out,)."""
    on_input: bool
    rank: None = None

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        shape = [1] * weight.ndim
        shape[1 if self.on_input else 0] = -1
        return scale * weight.float() * self.vector.float().view(shape)


@dataclass(frozen=True, eq=False)
class DoRA:
    """A change of direction by another form, and the length m of each row (or column) of the result.

    Published formulas agree at scale s = 1, W + dW = m V / |V| with V = W + dW of the form. At other scales each file
    is read as the tool that wrote it runs it:

        "peft" (magnitude vectors)     m V(s) / |V(s)|, V(s) = W + s dW
        "lycoris" (`dora_scale`)       V (s (m / |V| - 1) + 1), V = W + dW
    """

    form: Form
    magnitude: Tensor
    """(out,), or (in,) if `on_input`."""
    on_input: bool
    convention: Literal["peft", "lycoris"]

    @property
    def rank(self) -> int | None:
        return self.form.rank

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        base = weight.float()
        direction = base + self.form.delta(weight, scale if self.convention == "peft" else 1.0)
        axis = 1 if self.on_input else 0
        shape = [1] * weight.ndim
        shape[axis] = -1
        length = direction.transpose(0, axis).flatten(1).norm(dim=1)
        # A row of zeros has no direction: peft would make NaN of it, lycoris adds this to all lengths.
        length = length + torch.finfo(torch.float32).eps
        ratio = (self.magnitude.float() / length).view(shape)
        if self.convention == "lycoris":
            ratio = scale * (ratio - 1) + 1
        return direction * ratio - base


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter changes of one module."""

    weight: Form | None
    bias: Tensor | None = None
    """(out,): added to the bias, times the user's scale."""

    @property
    def rank(self) -> int | None:
        return None if self.weight is None else self.weight.rank

    @property
    def lora(self) -> LoRA | None:
        """The form of the weight if its factors can be applied beside the weight, else None."""
        return self.weight if isinstance(self.weight, LoRA) else None

    def weight_delta(self, weight: Tensor, scale: float = 1.0) -> Tensor | None:
        """dW in float32 and the shape of `weight`, or None if only the bias changes."""
        return None if self.weight is None else self.weight.delta(weight, scale)

    @cached_property
    def bias_form(self) -> Difference | None:
        """The change of the bias as a form."""
        return None if self.bias is None else Difference(self.bias)

    def bias_delta(self, scale: float = 1.0) -> Tensor | None:
        """The change of the bias (out,) in float32, or None."""
        return None if self.bias is None else scale * self.bias.float()
