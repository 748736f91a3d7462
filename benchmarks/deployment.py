"""From a checkpoint to running engines at full size, once, and what each command takes.

    python -m benchmarks.deployment /tmp/deployment

SD1.5 with seeded random weights is exported (whole, split, and split in float16), the split bundle is verified, two
steps of a picture at 512x512 are sampled on every backend of a CPU, and TensorRT-RTX engines are built, by the commands
that users type, each in a process of its own. Needs 20 GiB of memory and of disk. What is done is not done again; when
all is, it goes into the history of benchmarks/suite.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import with_random_weights
from benchmarks.suite import keep
from fastldm.system import machine

PICTURE = ["generate", "a castle", "--steps", "2", "--seed", "0", "--json", "--device", "cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where model, bundles and pictures go")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "sd15"
    if not model.exists():
        make_model(model)

    noted = folder / "done.json"
    done: dict[str, dict[str, Any]] = json.loads(noted.read_text()) if noted.exists() else {}
    before = len(done)
    for name, command, written in commands(model, folder):
        if name not in done:
            done[name] = {"command": "fastldm " + " ".join(command).replace(f"{folder}/", ""), **run(command)}
            if written is not None:
                done[name]["MiB"] = sum(p.stat().st_size for p in written.rglob("*") if p.is_file()) / 2**20
            noted.write_text(json.dumps(done, indent=1))
        one = done[name]
        size = f"{one['MiB']:8.0f} MiB written" if "MiB" in one else ""
        print(f"{name:32}{one['seconds']:8.1f} s {one['peak_MiB']:8.0f} MiB of memory{size}", flush=True)
    if len(done) > before:
        names = [name for name, _, _ in commands(model, folder)]  # in this order, whatever was done first
        record = {
            "what": "SD1.5, seeded random weights, 512x512",
            "command": "python -m benchmarks.deployment FOLDER",
            "machine": machine(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "seconds": {name: done[name]["seconds"] for name in names},
            "commands": {name: done[name] for name in names},
        }
        keep("deployment", record)


def commands(model: Path, folder: Path) -> list[tuple[str, list[str], Path | None]]:
    """Name, command, and what it writes."""
    whole, split, half = folder / "whole", folder / "split", folder / "half"
    export = ["export", "-m", str(model)]

    def picture(name: str, source: Path, *options: str) -> tuple[str, list[str], None]:
        out = folder / f"{name.replace(' ', '-')}.png"
        return name, [*PICTURE, "-m", str(source), "-o", str(out), "--force", *options], None

    return [
        ("export split", [*export, str(split), "--split"], split),
        ("verify split onnxruntime", ["verify", str(split), "--backend", "onnxruntime"], None),
        ("verify split openvino", ["verify", str(split), "--backend", "openvino"], None),
        picture("torch float32", model, "--dtype", "float32"),
        picture("torch bfloat16", model, "--dtype", "bfloat16"),
        picture("onnxruntime float32", split, "--backend", "onnxruntime"),
        picture("openvino float32", split, "--backend", "openvino", "--dtype", "float32"),
        picture("openvino bfloat16", split, "--backend", "openvino", "--dtype", "bfloat16"),
        (
            "export split float16, TensorRT",
            [*export, str(half), "--split", "--dtype", "float16", "--to", "tensorrt"],
            half,
        ),
        ("export whole", [*export, str(whole)], whole),
        picture("whole onnxruntime float32", whole, "--backend", "onnxruntime"),
        picture("whole openvino float32", whole, "--backend", "openvino", "--dtype", "float32"),
    ]


def run(command: list[str]) -> dict[str, Any]:
    """A command's seconds and the most memory that it had, which on Linux the kernel counts."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fastldm", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"fastldm {' '.join(command)} failed:\n{said}")
    found: dict[str, Any] = {"seconds": time.perf_counter() - began, "peak_MiB": used.ru_maxrss / 1024}
    if command[0] == "generate":
        found["timings"] = json.loads(said)["timings"]
    return found


def make_model(folder: Path) -> None:
    """SD1.5 as diffusers writes it, with seeded random weights."""
    import diffusers
    import transformers

    from fastldm.conditioning.tokenizer import clip_vocabulary

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
        )
    )
    for network in (unet, vae):
        with_random_weights(network, torch.device("cpu"), torch.float32)
    vocab, merges = clip_vocabulary()
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in merges], pad_token="<|endoftext|>", model_max_length=77
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    partial = folder.with_name(f"{folder.name}.partial")
    diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
