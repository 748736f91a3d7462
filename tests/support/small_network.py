"""A network that is exported and built in a second: a convolution, a GroupNorm, cross-attention and an upsampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.export.spec import Axis, NetworkSpec, Port, sample

BATCH, TOKENS = Axis("batch", 1, 2, 4), Axis("tokens", 1, 7, 20)
HEIGHT, WIDTH = Axis("height", 4, 8, 16, 2), Axis("width", 4, 8, 16, 2)

SIZES = [
    {},
    {"batch": 1, "tokens": 1, "height": 4, "width": 4},  # the least of everything
    {"batch": 4, "tokens": 20, "height": 16, "width": 16},  # the most
    {"batch": 3, "height": 6, "width": 14},  # between, not square
]


def spec(dtype: Any = "float32") -> NetworkSpec:
    height, width = (Axis(a.name, 2 * a.least, 2 * a.best, 2 * a.most, 2 * a.multiple_of) for a in (HEIGHT, WIDTH))
    inputs = (
        Port("sample", dtype, (BATCH, 4, HEIGHT, WIDTH)),
        Port("timestep", "float32", (BATCH,), 1000),
        Port("encoder_hidden_states", dtype, (BATCH, TOKENS, 12)),
    )
    return NetworkSpec("unet", inputs, (Port("out_sample", dtype, (BATCH, 3, height, width)),))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norm, self.q, self.kv = nn.GroupNorm(4, 16), nn.Linear(16, 16), nn.Linear(12, 32)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = (timestep * 1e-3).to(sample.dtype)[:, None, None, None]
        x = F.silu(self.norm(self.conv(sample) + time))  # (B, 16, h, w)
        rows, channels, height, width = x.shape
        q, k, v = (
            tokens.unflatten(2, (2, 8)).transpose(1, 2)
            for tokens in (self.q(x.flatten(2).transpose(1, 2)), *self.kv(encoder_hidden_states).chunk(2, dim=2))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, hw, 16)
        x = x + attended.transpose(1, 2).reshape(rows, channels, height, width)
        return self.out(F.gelu(F.interpolate(x, scale_factor=2.0)))


def exported(network: nn.Module, folder: Path, dtype: str = "float32", opset: int = 21) -> Path:
    pytest.importorskip("onnx", reason="exporting needs onnx: pip install 'fastldm[onnx]'")
    pytest.importorskip("onnxscript", reason="exporting needs onnxscript: pip install 'fastldm[onnx]'")
    batch, tokens = torch.export.Dim("batch", min=1, max=4), torch.export.Dim("tokens", min=1, max=20)
    height, width = (2 * torch.export.Dim(name, min=2, max=8) for name in ("height", "width"))
    inputs = sample(spec(dtype))
    program = torch.onnx.export(
        network,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=opset,
        input_names=list(inputs),
        output_names=["out_sample"],
        dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch}, {0: batch, 1: tokens}),
        verbose=False,
    )
    assert program is not None
    folder.mkdir()
    program.save(str(folder / "model.onnx"))
    return folder / "model.onnx"


def error(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b).abs().max() / b.abs().max()).item()
