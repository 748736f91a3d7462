"""Reading a component's weights: how much memory it takes at most."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from fastldm.loading.checkpoint import Component
from fastldm.loading.state import load_module

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

path, dtype, width, count = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with torch.device("meta"):
    # half linear layers, half convolutions of as many weights: the latter are copied to be channels-last
    layers = [nn.Conv2d(width // 2, width // 2, 2) if i % 2 else nn.Linear(width, width) for i in range(count)]
    module = nn.Sequential(*layers)
part = Component("unet", "Sequential", {}, (Path(path),), path)
before = resident("VmRSS")
load_module(module, part.state(to_prepare=True), dtype=dtype, source=path)
for p in module.parameters():
    # one number of each page: all weights are resident
    torch.as_strided(p, (p.nbytes // p.itemsize,), (1,))[:: 2048 // p.itemsize].sum().item()
print((resident("VmHWM") - before) / sum(p.nbytes for p in module.parameters()))
unwanted = ("transformers", "diffusers", "huggingface_hub", "torch._dynamo", "triton")
print([name for name in unwanted if name in sys.modules])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_load_needs_memory_of_weights_only(tmp_path: Path, dtype: torch.dtype) -> None:
    width, count = 2048, 24 if dtype == torch.bfloat16 else 12  # 200 MB
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    shapes = [(width // 2, width // 2, 2, 2) if i % 2 else (width, width) for i in range(count)]
    fill = {f"{i}.weight": torch.full(shape, i, dtype=dtype) for i, shape in enumerate(shapes)}
    save_file(fill | {f"{i}.bias": torch.zeros(shape[0], dtype=dtype) for i, shape in enumerate(shapes)}, path)
    command = [sys.executable, "-c", MEASURE, str(path), str(dtype).removeprefix("torch."), str(width), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ratio, imported = done.stdout.splitlines()
    assert 0.95 <= float(ratio) <= 1.15  # below: the measurement missed the weights
    assert imported == "[]"
