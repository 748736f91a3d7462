"""From a checkpoint to running engines at full size, once: time, memory and disk of each command.

    python -m benchmarks.deployment /tmp/deployment

SD1.5 with seeded random weights is exported (whole, split with the graphs of all steps and of a picture, and split in
float16), the split bundle is verified, two steps of a picture at 512x512 are sampled on every backend of a CPU, and
TensorRT-RTX engines are built, by the commands that users type, each in a process of its own. The default model is
prepared, too, and compared in turns with diffusers and OpenVINO GenAI on every backend. Needs 20 GiB of memory and of
disk. Commands that are done are skipped; when all are, the record goes into the history of benchmarks/suite.py.
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
from benchmarks.suite import add_run
from fastldm.system import machine

PICTURE = ["generate", "a castle", "--steps", "2", "--seed", "0", "--json", "--device", "cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for model, bundles and images")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "sd15"
    if not model.exists():
        make_model(model)

    record_file = folder / "done.json"
    done: dict[str, dict[str, Any]] = json.loads(record_file.read_text()) if record_file.exists() else {}
    before = len(done)
    for name, command, output_folder in commands(model, folder):
        if name not in done:
            done[name] = {"command": "fastldm " + " ".join(command).replace(f"{folder}/", ""), **run(command)}
            if output_folder is not None:
                done[name]["MiB"] = sum(p.stat().st_size for p in output_folder.rglob("*") if p.is_file()) / 2**20
            record_file.write_text(json.dumps(done, indent=1))
        entry = done[name]
        size = f"{entry['MiB']:8.0f} MiB written" if "MiB" in entry else ""
        print(f"{name:32}{entry['seconds']:8.1f} s {entry['peak_MiB']:8.0f} MiB of memory{size}", flush=True)
    if len(done) > before:
        names = [name for name, _, _ in commands(model, folder)]  # in this order, whichever ran first
        record = {
            "what": "SD1.5, seeded random weights, 512x512",
            "command": "python -m benchmarks.deployment FOLDER",
            "machine": machine(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "seconds": {name: done[name]["seconds"] for name in names},
            "commands": {name: done[name] for name in names},
        }
        add_run("deployment", record)


def commands(model: Path, folder: Path) -> list[tuple[str, list[str], Path | None]]:
    """Name, command, and the folder that it writes."""
    full, split, float16 = folder / "whole", folder / "split", folder / "half"
    default_full, default_split = folder / "default-whole", folder / "default-split"
    in_turns = ["--bundle", str(default_split), "--json", str(folder / "default.json")]
    export = ["export", "-m", str(model)]

    def generate(name: str, source: Path, *options: str) -> tuple[str, list[str], None]:
        out = folder / f"{name.replace(' ', '-')}.png"
        return name, [*PICTURE, "-m", str(source), "-o", str(out), "--force", *options], None

    return [
        ("export split, whole picture", [*export, str(split), "--whole-picture"], split),
        ("verify split onnxruntime", ["verify", str(split), "--backend", "onnxruntime"], None),
        ("verify split openvino", ["verify", str(split), "--backend", "openvino"], None),
        generate("torch float32", model, "--dtype", "float32"),
        generate("torch bfloat16", model, "--dtype", "bfloat16"),
        generate("onnxruntime float32", split, "--backend", "onnxruntime"),
        generate("onnxruntime-graph float32", split, "--backend", "onnxruntime-graph"),
        generate("openvino float32", split, "--backend", "openvino", "--dtype", "float32"),
        generate("openvino bfloat16", split, "--backend", "openvino", "--dtype", "bfloat16"),
        generate("openvino-graph bfloat16", split, "--backend", "openvino-graph", "--dtype", "bfloat16"),
        (
            "export split float16, TensorRT",
            [*export, str(float16), "--split", "--dtype", "float16", "--to", "tensorrt"],
            float16,
        ),
        ("export whole", [*export, str(full)], full),
        generate("whole onnxruntime float32", full, "--backend", "onnxruntime"),
        generate("whole openvino float32", full, "--backend", "openvino", "--dtype", "float32"),
        ("export default whole", ["export", str(default_full)], default_full),
        ("export default graphs", ["export", str(default_split), "--whole-picture"], default_split),
        (
            "default model in turns",
            [*["bench", "--compare", "diffusers,openvino-genai", "--bundle", str(default_full)], *in_turns],
            None,
        ),
    ]


def run(command: list[str]) -> dict[str, Any]:
    """A command's seconds and its peak memory, as Linux counts it."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fastldm", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"fastldm {' '.join(command)} failed:\n{output}")
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak_MiB": used.ru_maxrss / 1024}
    if command[0] == "generate":
        result["timings"] = json.loads(output)["timings"]
    return result


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
