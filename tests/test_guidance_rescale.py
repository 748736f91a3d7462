"""kernels/guidance_rescale.py: the factor of each slot, against the formula."""

from __future__ import annotations

import ops
import pytest
import torch
from step_states import SHAPES, full_state, output_for, rescale_arguments

from fastldm.kernels import dispatch
from fastldm.kernels.guidance_rescale import GUIDANCE_RESCALE


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_matches_reference(shape: dict[str, int], dtype: torch.dtype) -> None:
    if shape == SHAPES["one-pixel"]:  # which has no deviation
        shape = {**shape, "width": 2}
    state = full_state(**shape, dtype=dtype)
    with dispatch.forced("guidance_rescale", {"PIXELS": 8, "num_warps": 1}):  # several blocks, the last not full
        ops.check(GUIDANCE_RESCALE, *rescale_arguments(state, output_for(state)).values())


def test_a_huge_mean_costs_no_digits() -> None:
    """Sums of squares less a squared sum would have no digit left."""
    state = full_state()
    ops.check(GUIDANCE_RESCALE, *rescale_arguments(state, output_for(state) + 3000).values())


def test_refusals_name_the_reason() -> None:
    out = output_for(full_state())
    assert "dtype" in GUIDANCE_RESCALE.supports(out.long()).reason


def test_registered_op_agrees_with_its_schema() -> None:
    state = full_state()
    ops.check_registered(GUIDANCE_RESCALE, *rescale_arguments(state, output_for(state)).values())
