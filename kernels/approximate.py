"""Fast functions for kernels: one instruction of the special function units each, where Triton's own take many.

Triton's `1.0 / x` and `tl.exp2` are right for denormal numbers too: comparisons and scalings around the instruction
that computes, 28 instructions for SiLU where 5 do. Here denormal operands and results are zero, and the error is that
of the instruction: 1 unit in the last place of a reciprocal, 2 of exp2 (PTX ISA 9.0, rcp.approx.ftz.f32 and
ex2.approx.ftz.f32). That is a ten-thousandth of what float16 keeps.

The interpreter has no such instructions: kernels compute there with Triton's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastldm.kernels.dispatch import jit

if TYPE_CHECKING:
    import triton.language as tl

INTERPRETED = False  # set when a kernel is first launched: dispatch.Kernel


@jit
def exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def silu(x):
    return x * reciprocal(1.0 + exp2(-1.4426950409 * x))  # log2 e
