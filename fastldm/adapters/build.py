"""From the tensors of a module in a file to its change: which form they are, and whether they agree.

Two kinds of failure: `Misfit`, for tensors that are sound and belong to a module of another shape, and CheckpointError,
for tensors that contradict each other, so that the file is damaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastldm.adapters.forms import IA3, Change, Difference, DoRA, Factors, Form, GLoRA, LoHa, LoKr, LoRA
from fastldm.adapters.module_tensors import Alpha, Misfit, Tensors
from fastldm.adapters.orthogonal import BOFT, OFT
from fastldm.adapters.targets import Module


def build_change(tensors: Tensors, module: Module, alpha: Alpha = Alpha()) -> Change:  # noqa: B008
    """The change of a module. Misfit if it is for another shape, CheckpointError if the tensors contradict each other,
    or are of a form that is not implemented."""
    form = _weight_form(tensors, module.weight, alpha)
    if form is not None:
        form = _decomposed(tensors, form, module.weight)
    bias = _bias(tensors, module, form)
    if (form is None and bias is None) or tensors.unused():
        names = ", ".join(tensors.unused()[:4])
        raise tensors.error(f"has {names}, which is part of no form of adapter that fastldm knows")
    return Change(form, bias)


def _weight_form(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form | None:
    for marks, build in FORMS.items():
        if any(mark in tensors for mark in marks):
            return build(tensors, shape, alpha)
    return None


def _scale(tensors: Tensors, rank: int, alpha: Alpha) -> float:
    """alpha / rank, or alpha / sqrt(rank); 1 where nothing states an alpha."""
    value = alpha.value
    if (stored := tensors.optional("alpha")) is not None:
        value = _number(tensors, "alpha", stored)
    if value is None:
        return 1.0
    if value <= 0:
        raise tensors.error(f"has an alpha of {value:g}, expected a number above 0")
    return value / math.sqrt(rank) if alpha.rank_stabilised else value / rank


def _number(tensors: Tensors, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise tensors.error(f"has {name} of shape {tuple(tensor.shape)}, expected one number")
    return float(tensor)


def _width(shape: tuple[int, ...]) -> int:
    """Columns of a weight as a matrix. Misfit for a norm."""
    if len(shape) < 2:
        raise Misfit(f"for a layer with inputs, and the model has a norm of {shape[0]} channels there")
    return math.prod(shape[1:])


def _expect(tensor: Tensor, expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Misfit unless a tensor has the expected shape, with or without the ones of a 1x1 kernel."""
    actual = tuple(tensor.shape)
    while len(actual) > len(expected) and actual[-1] == 1:
        actual = actual[:-1]
    if actual != expected and actual + (1,) * (len(expected) - len(actual)) != expected:
        raise Misfit(f"a tensor is {tuple(tensor.shape)} where {expected} fits the model's weight {shape}")


def _flat(tensors: Tensors, name: str) -> Tensor:
    """A matrix that may be stored as a 1x1 convolution."""
    tensor = tensors.take(name)
    if tensor.ndim < 2 or tensor.shape[2:].numel() != 1:
        raise tensors.error(f"has {name} of shape {tuple(tensor.shape)}, expected a matrix or a 1x1 convolution")
    return tensor.flatten(1)


# --- Forms of low rank ---


def _lora(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form:
    down, up, mid = tensors.take("lora_down"), tensors.take("lora_up"), tensors.optional("lora_mid")
    width = _width(shape)
    if down.ndim < 2 or up.ndim < 2:
        raise tensors.error(f"has lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)}, expected matrices")
    pair = f"lora_down is {tuple(down.shape)} and lora_up {tuple(up.shape)}"
    rank = down.shape[0]
    fits = up[0].numel() == rank and up.shape[0] == shape[0]
    swapped = up[0].numel() == width and down.shape[0] == shape[0] and down[0].numel() == up.shape[0]
    if mid is None and swapped and not (fits and down[0].numel() == width):
        raise tensors.error(f"has up and down exchanged: {pair}, of a weight {shape}")
    if up[0].numel() != rank:
        raise tensors.error(f"has factors of different ranks: {pair}")
    if mid is not None:
        if tuple(mid.shape[:2]) != (rank, rank) or down[0].numel() != down.shape[1]:
            raise tensors.error(f"has lora_mid {tuple(mid.shape)} that joins no pair: {pair}")
        down = torch.einsum("mn...,nj->mj...", mid.float(), down.flatten(1).float())
    _expect(down, (rank, *shape[1:]), shape)
    _expect(up.flatten(1), (shape[0], rank), shape)
    down = down.reshape(rank, *shape[1:])
    return LoRA(down, up.flatten(1), _scale(tensors, rank, alpha))


def _loha(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form:
    width = _width(shape)
    pairs = [_factors(tensors, f"hada_w{n}", f"hada_t{n}") for n in "12"]
    ranks = {_rank(tensors, pair) for pair in pairs}
    rank = ranks.pop()
    if ranks or rank is None:
        raise tensors.error("has two products of different ranks")
    for pair in pairs:
        rows, columns = _extent(pair)
        if (rows, columns) != (shape[0], width):
            raise Misfit(f"it is of a weight {rows} x {columns}, and the model's is {shape}")
    return LoHa(pairs[0], pairs[1], _scale(tensors, rank, alpha), rank)


def _lokr(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form:
    width = _width(shape)
    first, second = _factors(tensors, "lokr_w1", "lokr_t1"), _factors(tensors, "lokr_w2", "lokr_t2")
    ranks = {rank for rank in (_rank(tensors, first), _rank(tensors, second)) if rank is not None}
    if len(ranks) > 1:
        raise tensors.error("has two products of different ranks")
    if len(first) == 3 or first[-1].ndim != 2:
        raise tensors.error("has a first factor that is no matrix")
    (p, q), (k, n) = _extent(first), _extent(second)
    if (p * k, q * n) != (shape[0], width) or shape[1] % q:
        raise Misfit(f"it is of a weight {p * k} x {q * n}, and the model's is {shape}")
    if not ranks:  # trainers store an alpha and do not apply it
        tensors.optional("alpha")
        return LoKr(first, second, 1.0, None)
    rank = ranks.pop()
    return LoKr(first, second, _scale(tensors, rank, alpha), rank)


def _factors(tensors: Tensors, name: str, core: str) -> Factors:
    """A factor that is stored as a whole, as a product of two, or with a Tucker core."""
    if name in tensors:
        return (tensors.take(name),)
    pair = (tensors.take(f"{name}_a"), tensors.take(f"{name}_b"))
    return (*pair, tensors.take(core)) if core in tensors else pair


def _rank(tensors: Tensors, factors: Factors) -> int | None:
    """The rank of a product, or None for a matrix as it is. CheckpointError if its factors do not join."""
    if any(factor.ndim < 2 for factor in factors):
        raise tensors.error("has a vector for a matrix")
    if len(factors) == 1:
        return None
    a, b, *core = factors
    rank = b.shape[0]
    joins = tuple(core[0].shape[:2]) == (a.shape[0], rank) and a.ndim == b.ndim == 2 if core else a.shape[1:] == (rank,)
    if not joins:
        shapes = " and ".join(str(tuple(factor.shape)) for factor in factors)
        raise tensors.error(f"has factors of different ranks: {shapes}")
    return rank


def _extent(factors: Factors) -> tuple[int, int]:
    """Rows and columns of a product, without the product."""
    if len(factors) == 1:
        return factors[0].shape[0], factors[0][0].numel()
    if len(factors) == 2:
        return factors[0].shape[0], factors[1][0].numel()
    return factors[0].shape[1], factors[1].shape[1] * factors[2].shape[2:].numel()


def _glora(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form:
    _width(shape)
    if "bm" in tensors:
        raise tensors.error("is a GLoRA with a Tucker core, which fastldm does not read")
    a1, a2, b1 = (_flat(tensors, name) for name in ("a1", "a2", "b1"))
    b2 = tensors.take("b2")
    rank = a1.shape[1]
    if a2.shape[0] != rank or b1.shape[1] != rank or b2.shape[0] != rank:
        raise tensors.error("has factors of different ranks")
    for tensor, expected in ((a1, (shape[1], rank)), (a2, (rank, shape[1])), (b1, (shape[0], rank))):
        _expect(tensor, expected, shape)
    _expect(b2, (rank, *shape[1:]), shape)
    return GLoRA(a1, a2, b1, b2, _scale(tensors, rank, alpha))


# --- Forms without a rank ---


def _difference(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form:
    difference = tensors.take("diff" if "diff" in tensors else "w_norm")
    tensors.optional("alpha")
    _expect(difference, shape, shape)
    return Difference(difference)


def _ia3(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form:
    _width(shape)
    on_input = _number(tensors, "on_input", tensors.take("on_input"))
    if on_input not in (0, 1):
        raise tensors.error(f"has on_input {on_input:g}, expected 0 or 1")
    vector = tensors.take("ia3").flatten()
    _expect(vector, (shape[int(on_input)],), shape)
    return IA3(vector, bool(on_input))


def _orthogonal(tensors: Tensors, shape: tuple[int, ...], alpha: Alpha) -> Form:
    _width(shape)
    blocks, rescale, stored = tensors.take("oft_blocks"), tensors.optional("rescale"), tensors.optional("alpha")
    constraint = 0.0 if stored is None else _number(tensors, "alpha", stored)
    if constraint < 0:
        raise tensors.error(f"has an alpha of {constraint:g}, expected a constraint of 0 (none) or above")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise tensors.error(f"has oft_blocks of shape {tuple(blocks.shape)}, expected square blocks")
    count, size = blocks.shape[-3], blocks.shape[-1]
    if count * size != shape[0]:
        raise Misfit(f"its blocks turn {count * size} rows, and the model's weight is {shape}")
    if rescale is not None:
        rescale = rescale.flatten()
        _expect(rescale, (shape[0],), shape)
    if blocks.ndim == 3:
        return OFT(blocks, constraint * shape[0], rescale)
    if size % 2 or shape[0] % (size * 2 ** (min(len(blocks), 64) - 1)):
        raise tensors.error(f"has butterfly blocks of shape {tuple(blocks.shape)}, which pair no {shape[0]} rows")
    return BOFT(blocks, constraint * shape[0], rescale)


# By the tensors that mark a form; the first match counts.
FORMS: dict[tuple[str, ...], Callable[[Tensors, tuple[int, ...], Alpha], Form]] = {
    ("lora_down", "lora_up", "lora_mid"): _lora,
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): _loha,
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"): _lokr,
    ("a1", "a2", "b1", "b2"): _glora,
    ("oft_blocks",): _orthogonal,
    ("on_input", "ia3"): _ia3,
    ("diff", "w_norm"): _difference,
}


def _decomposed(tensors: Tensors, form: Form, shape: tuple[int, ...]) -> Form:
    """The form within DoRA if the file has lengths of rows or columns."""
    if (magnitude := tensors.optional("magnitude")) is not None:
        _expect(magnitude.flatten(), (shape[0],), shape)
        return DoRA(form, magnitude.flatten(), False, "peft")
    if (magnitude := tensors.optional("dora_scale")) is not None:
        # (out, 1, ...), or (1, in, ...) as older versions have it
        on_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 != shape[0]
        _expect(magnitude.flatten(), (shape[1 if on_input else 0],), shape)
        return DoRA(form, magnitude.flatten(), on_input, "lycoris")
    return form


def _bias(tensors: Tensors, module: Module, form: Form | None) -> Tensor | None:
    names = [name for name in ("diff_b", "b_norm", "lora_up_bias") if name in tensors]
    if not names:
        return None
    bias = tensors.take(names[0])
    if not module.bias:
        raise Misfit("it changes a bias, and the module has none")
    _expect(bias, module.weight[:1], module.weight)
    if names[0] != "lora_up_bias":
        return bias
    if not isinstance(form, LoRA):
        raise tensors.error("has a bias of lora_B in another form than plain LoRA, which fastldm does not read")
    return bias.float() * form.scale
