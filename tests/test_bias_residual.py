"""kernels/bias_residual.py: bias and residual added in place, against the sums of PyTorch."""

from __future__ import annotations

import ops
import pytest
import torch
from torch import Tensor

from fastldm.kernels.bias_residual import BIAS_RESIDUAL


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Channels-last where it is an image."""
    t = torch.randn(shape, device=ops.DEVICE).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 320, 4, 4), (3, 3, 5, 7), (1, 72, 1, 1)], ids=str)
def test_kernel_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Full blocks, tails of rows and columns, less than a block."""
    out, bias, residual = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype), randn(*shape, dtype=dtype)
    ops.check(BIAS_RESIDUAL, out, bias, residual)
    ops.check(BIAS_RESIDUAL, out, bias, None)
    ops.check(BIAS_RESIDUAL, out, None, residual)


def test_refusals_name_the_reason() -> None:
    x = randn(2, 16, 4, 4)
    assert "not channels-last" in BIAS_RESIDUAL.supports(x, None, x.contiguous()).reason
    assert "dtype" in BIAS_RESIDUAL.supports(x.double(), None, None).reason
    assert "is empty" in BIAS_RESIDUAL.supports(x[:0], None, None).reason


def test_cost_counts_each_tensor_once() -> None:
    x, bias = randn(2, 16, 8, 8), randn(16)
    assert BIAS_RESIDUAL.cost(x, bias, x).bytes == 3 * 2 * x.numel()


def test_tuner_tries_at_most_thirty_configurations() -> None:
    x, bias = randn(2, 64, 8, 8), randn(64)
    assert 1 <= sum(BIAS_RESIDUAL.is_candidate(config, x, bias, None) for config in BIAS_RESIDUAL.space) <= 30


def test_registered_op_agrees_with_its_schema() -> None:
    ops.check_registered(BIAS_RESIDUAL, randn(1, 8, 3, 4), randn(8), None)
