"""The ops that layers call, as they run on a CPU, against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peer_networks import error

from fastldm.kernels import attention, conv, geglu, group_norm, layer_norm, linear


def test_ops_match_their_formulas() -> None:
    x, skip = torch.randn(2, 10, 5, 3), torch.randn(2, 14, 5, 3)  # groups of 6: one straddles the seam
    shift, weight, bias = torch.randn(2, 24), torch.randn(24), torch.randn(24)
    y = (torch.cat((x, skip), 1) + shift[:, :, None, None]).double().reshape(2, 4, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, correction=0) + 1e-3).sqrt()
    y = y.reshape(2, 24, 5, 3) * weight[:, None, None] + bias[:, None, None]
    out = group_norm.group_norm(x, 4, weight, bias, 1e-3, silu=True, shift=shift, skip=skip)
    assert error(out, y * y.sigmoid()) < 1e-5

    q, kv = torch.randn(2, 7, 24), torch.randn(2, 5, 48)
    k, v = kv.chunk(2, dim=-1)  # halves of one packed tensor
    for scale, causal in ((None, False), (0.1, False), (None, True)):
        heads = [t.double().reshape(2, -1, 3, 8).transpose(1, 2) for t in (q, k, v)]
        scores = heads[0] @ heads[1].mT * (scale or 8**-0.5)
        if causal:
            scores += torch.full((7, 5), -torch.inf).triu(1)
        expected = (scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(2, 7, 24)
        assert error(attention.attention(q, k, v, 3, scale=scale, causal=causal), expected) < 1e-5

    a, b = q.double().chunk(2, dim=-1)
    assert error(geglu.geglu(q), a * b * (1 + torch.erf(b / 2**0.5)) / 2) < 1e-5
    y = (q - q.mean(-1, keepdim=True)) / (q.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias
    assert error(layer_norm.layer_norm(q, weight, bias, 1e-5), y) < 1e-5
    residual, w = torch.randn(2, 7, 6), torch.randn(6, 24)
    assert error(linear.linear(q, w, bias[:6], residual=residual), q @ w.T + bias[:6] + residual) < 1e-5


@pytest.mark.parametrize("size", [(10, 6), (9, 6)], ids=["twice", "a skip connection's odd size"])
def test_convolutions_match_their_formulas(size: tuple[int, int]) -> None:
    x, weight, bias = torch.randn(2, 4, 5, 3), torch.randn(6, 4, 3, 3), torch.randn(6)
    rows, columns = (torch.arange(n) * m // n for n, m in zip(size, (5, 3), strict=True))
    large = F.pad(x[:, :, rows][..., columns], (1, 1, 1, 1))
    windows = large.unfold(2, 3, 1).unfold(3, 3, 1)  # (2, 4, H, W, 3, 3)
    expected = torch.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
    assert error(conv.upsample_conv2d(x, weight, bias, size), expected) < 1e-5

    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)
    expected = torch.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
    residual = torch.randn_like(expected)
    out = conv.conv2d(x, weight, bias, stride=2, padding=1, residual=residual)
    assert error(out, expected + residual) < 1e-5
