"""OFT and BOFT against the live network of lycoris-lora that wrote each file, at two scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_files
import pytest
import torch

from fastldm.adapters.orthogonal import BOFT, OFT, rotations
from fastldm.adapters.read import read_adapter

CASES: dict[str, dict[str, Any]] = {
    "OFT": {"algo": "diag-oft", "linear_dim": 4},
    "OFT with constraint and rescale": {"algo": "diag-oft", "linear_dim": 4, "constraint": 0.01, "rescaled": True},
    "BOFT with constraint and rescale": {"algo": "boft", "linear_dim": 8, "constraint": 0.01, "rescaled": True},
}


@pytest.mark.parametrize("case", CASES)
def test_orthogonal_form_matches_its_live_network(case: str, tmp_path: Path) -> None:
    unet = adapter_files.pipeline("tiny-sd").unet
    lives = adapter_files.lycoris_file(tmp_path / "a.safetensors", unet, "unet", **CASES[case])
    adapter = read_adapter(tmp_path / "a.safetensors", adapter_files.spec("tiny-sd"))
    assert adapter_files.worst(adapter, lives) < 1e-5


@pytest.mark.parametrize("form", [OFT(torch.randn(4, 4, 4), 0.0, None), BOFT(torch.randn(3, 4, 4, 4), 0.0, None)])
def test_rows_are_only_turned(form: OFT | BOFT) -> None:
    weight = torch.randn(16, 5)
    turned = weight + form.delta(weight)
    assert torch.allclose(turned.mT @ turned, weight.mT @ weight, atol=1e-4)
    assert form.delta(weight, 0.0).abs().max() < 1e-6


def test_limit_bounds_the_angle() -> None:
    blocks = torch.randn(4, 4, 4)
    identity = torch.eye(4)
    assert (rotations(blocks, 1e-3) - identity).norm() < 2.1e-3
    assert torch.equal(rotations(blocks, 0.0), rotations(blocks, 1e6))
