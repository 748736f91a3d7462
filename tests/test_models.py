"""What building and importing networks costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny
import torch

from fastldm.models import AutoencoderKL, CLIPText, UNet
from fastldm.models.config import TextConfig, UNetConfig, VAEConfig


def test_building_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    UNet(UNetConfig.from_dict(tiny.UNETS["sdxl"]))
    AutoencoderKL(VAEConfig.from_dict(tiny.vae().config))
    CLIPText(TextConfig.from_dict(tiny.text_encoder("l").config.to_dict()))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_networks_import_nothing_heavy() -> None:
    code = f"""
import sys, torch
from fastldm.models.config import UNetConfig
from fastldm.models import UNet
with torch.inference_mode():
    unet = UNet(UNetConfig.from_dict({tiny.UNETS["tiny-sd"]!r}))
    unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 32))
print([name for name in ("torch._dynamo", "triton", "transformers", "diffusers") if name in sys.modules])
"""
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr
