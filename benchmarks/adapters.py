"""What adapters cost: reading a file, swapping one for another, steps with some beside the weights; and diffusers' way.

    python -m benchmarks.adapters                        SD1.5's size, float32, one thread, some ten minutes
    python -m benchmarks.adapters --quick                a small network, to see that it runs
    python -m benchmarks.adapters --predict              launches and bytes of a step on a GPU, computed, not measured

Random weights, and LoRAs of all attention, feed-forward and projection layers of the U-Net, kohya's default, written to
files as diffusers writes them. Of each pair both are timed in turns, and ratios are of neighbours:

    read      `read_adapter`; diffusers' `load_lora_weights`, the first and by hotswap=True
    swap      another adapter in the weights (merged), in copies of the weights that it touches, the least that any swap
              by copying takes; the same by diffusers' hotswap, which leaves its steps slower; beside: pages are
              filled once for an adapter, and a swap is then an index
    step      of two rows, with adapters beside the weights, over one without; of a peft network over its own
    mixed     four requests with four adapters in one batch, over one after another with swaps

Results go to benchmarks/results/MACHINE/adapters.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import ladder
from benchmarks.networks import calls, with_random_weights
from benchmarks.suite import machine_folder
from fastldm.adapters.selection import Selection
from fastldm.kernels.lora import Group, Rows
from fastldm.models.layers import Linear, Pointwise
from fastldm.models.unet import UNet
from fastldm.pipeline import Pipeline
from fastldm.request import Request
from fastldm.runtime.pages import Pages
from fastldm.system import machine

RANKS = (16, 64, 128)


def layers_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that kohya's trainers adapt by default: of the transformers."""
    kinds = (Linear, Pointwise, nn.Linear, nn.Conv2d)
    return {path: m for path, m in unet.named_modules() if ".attentions." in path and isinstance(m, kinds)}


def write_lora(unet: nn.Module, rank: int, seed: int, path: Path) -> Path:
    """A file as diffusers writes it."""
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers_of(unet).items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        out, inputs, *kernel = weight.shape
        shapes = ((rank, inputs, *kernel), (out, rank, *kernel))
        for leaf, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            tensors[f"unet.{name}.{leaf}.weight"] = 0.02 * torch.randn(shape, generator=g)
    save_file(tensors, path)
    return path


def timed(function: Callable[[], object]) -> float:
    gc.collect()
    start = perf_counter()
    function()
    return perf_counter() - start


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, so many times."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function))
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median over rounds."""
    return round(median(a / b for a, b in zip(times[name], times[base], strict=True)), 3)


def merged_swap(pipe: Pipeline, rank: int, folder: Path, rounds: int) -> dict[str, float]:
    """Adapter for adapter in the weights; a copy of the weights that it touches."""
    adapters = pipe.stages.adapters
    for name, seed in (("a", 0), ("b", 1)):
        file = write_lora(pipe.unet, rank, seed, folder / f"{name}.safetensors")  # type: ignore[arg-type]
        pipe.load_lora_weights(file, adapter_name=name)
    selections = [adapters.select({name: 1.0}) for name in "ab"]
    parts = ("conditions", "step")

    def swap(selection: Selection) -> None:
        for part in parts:
            adapters._switch(part, selection)

    for selection in selections:
        swap(selection)  # originals are copied, and the selection knows its parameters
    touched = [adapters._read(parameter) for parameter in selections[0].deltas]
    copies = [tensor.clone() for tensor in touched]

    def copy() -> None:
        for tensor, other in zip(touched, copies, strict=True):
            other.copy_(tensor)

    turn = iter(range(10**6))
    times = in_turns({"swap": lambda: swap(selections[next(turn) % 2]), "copy": copy}, rounds)
    row = {"swap s": round(median(times["swap"]), 4), "copies": ratio(times, "swap", "copy")}
    pages = Pages(pipe.unet)  # type: ignore[arg-type]
    pages.apply(selections[0], selections)  # allocates
    row["pages filled s"] = round(timed(lambda: pages.apply(selections[1], selections)), 4)
    row["index s"] = round(timed(lambda: pages.apply(selections[0], selections)), 6)
    pages.close()
    row["touched MB"] = round(sum(tensor.nbytes for tensor in touched) / 1e6)
    pipe.unload_lora_weights()
    swap(Selection())
    return row


@contextlib.contextmanager
def beside(unet: UNet, rank: int, rows: int) -> Iterator[None]:
    """Inside, each of so many rows has an adapter of its own beside the weights."""
    pages = Pages(unet, fixed=rows * rank // 16)
    for path in layers_of(unet):
        if not path.endswith((".attn2.to_k", ".attn2.to_v")):
            pages.add(path)
    for low_rank, _ in pages._layers.values():
        low_rank.down[1:].normal_(std=0.02), low_rank.up[1:].normal_(std=0.02)
    each = rank // 16
    groups = tuple(Group(row, row + 1, tuple((1 + row * each + k, 1.0) for k in range(each))) for row in range(rows))
    try:
        with unet.beside.having(Rows(torch.empty(0), torch.empty(0), groups)):
            yield
    finally:
        pages.close()


def step_of(unet: UNet, latent: int) -> Callable[[], object]:
    """A step of two rows."""
    x, text = (
        torch.randn(2, unet.config.in_channels, latent, latent),
        torch.randn(2, 77, unet.config.cross_attention_dim),
    )
    with torch.no_grad():
        temb, kv = unet.time_rows(torch.tensor([500.0])).expand(2, -1), unet.cross_kv(text)

    def step() -> None:
        with torch.inference_mode():
            unet.step(x, temb, kv)

    return step


def step_overhead(unet: UNet, rank: int, latent: int, rounds: int) -> dict[str, float]:
    plain, row = step_of(unet, latent), {}
    plain()

    times: dict[str, list[float]] = {"plain": [], "beside": []}
    for _ in range(rounds):
        times["plain"].append(timed(plain))
        with beside(unet, rank, 2):
            times["beside"].append(timed(plain))
    row["step s"] = round(median(times["plain"]), 4)
    row["beside over plain"] = ratio(times, "beside", "plain")
    return row


def peer(model: ladder.Model, rank: int, latent: int, folder: Path, rounds: int) -> dict[str, float]:
    """diffusers with peft: loading, hotswap, and its step with an adapter over its own without."""
    import diffusers
    from safetensors.torch import load_file

    diffusers.utils.logging.set_verbosity_error()
    config = model.unet
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=[level.channels for level in config.down],
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=[level.heads for level in config.down],
            norm_num_groups=config.norm_groups,
        )
    with_random_weights(unet, torch.device("cpu"), torch.float32)
    files = [write_lora(unet, rank, seed, folder / f"peer{seed}.safetensors") for seed in (0, 1)]
    states = [{k.removeprefix("unet."): v for k, v in load_file(file).items()} for file in files]
    x, text = torch.randn(2, config.in_channels, latent, latent), torch.randn(2, 77, config.cross_attention_dim)

    def step() -> None:
        with torch.inference_mode():
            unet(x, 500, encoder_hidden_states=text)

    step()
    first = timed(lambda: unet.load_lora_adapter(dict(states[0]), adapter_name="a", prefix=None))
    turn = iter(range(1, 10**6))
    swap = lambda: unet.load_lora_adapter(dict(states[next(turn) % 2]), adapter_name="a", prefix=None, hotswap=True)  # noqa: E731
    swaps, times = [], {"plain": [], "adapted": []}
    for _ in range(rounds):
        swaps.append(timed(swap))
        for name, switch in (("plain", unet.disable_lora), ("adapted", unet.enable_lora)):
            switch()
            times[name].append(timed(step))
    return {
        "peer first s": round(first, 3),
        "peer hotswap s": round(median(swaps), 4),
        "peer step over its own": ratio(times, "adapted", "plain"),
    }


def mixed(folder: Path, rounds: int) -> dict[str, float]:
    """The default model: four requests with four adapters at once, over one after another."""
    pipe = Pipeline.default(device="cpu", dtype="float32")
    for seed in range(4):
        file = write_lora(pipe.unet, 16, seed, folder / f"{seed}.safetensors")  # type: ignore[arg-type]
        pipe.load_lora_weights(file, adapter_name=str(seed))
    requests = [Request(prompt="a red apple", seed=k, adapters={str(k): 0.05}) for k in range(4)]

    def together() -> None:
        for generation in [pipe.session.submit(request) for request in requests]:
            generation.result()

    def one_by_one() -> None:
        for request in requests:
            pipe(request)

    for warm in (together, one_by_one):
        warm()
    times = in_turns({"together": together, "one by one": one_by_one}, rounds)
    return {
        "four at once s": round(median(times["together"]), 3),
        "over one by one": ratio(times, "together", "one by one"),
    }


def predicted() -> list[dict[str, Any]]:
    """Of a step of two rows on a GPU in float16: what rank 16 beside the weights adds, by the ops' shapes."""
    rows = []
    for name in ("sd15-512 step", "sdxl-1024 step"):
        adapted = calls(f"{name}, adapters", torch.float16)
        launches, z, separate, pages = 0, 0, 0, 0
        for call, count in adapted.items():
            if call.op not in ("lora_linear", "lora_geglu") or not count:
                continue
            args, _ = call.arguments("meta")
            x, weight = args[0], args[1]
            down, up = (args[4], args[5]) if call.op == "lora_linear" else (args[3], args[4])
            tokens = x.numel() // x.shape[-1]
            launches += count
            z += count * 2 * 2 * tokens * 16 * down.shape[1]  # written once, read once, two bytes each
            # a product of its own reads x and z, and reads and writes the output once more
            separate += count * 2 * (2 * tokens * weight.shape[0] + 2 * tokens * 16 * down.shape[1] + x.numel())
            pages += count * 2 * 2 * (down[0].numel() + up[0].numel())
        row = {"step": name, "launches": launches, "activations GB": round(z / 1e9, 3)}
        rows.append(row | {"by separate products GB": round(separate / 1e9, 2), "pages GB": round(pages / 1e9, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network")
    parser.add_argument("--predict", action="store_true", help="launches and bytes only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latent", type=int, default=32, help="side of the latents of the timed steps")
    args = parser.parse_args()
    record: dict[str, Any] = {"predicted": predicted()}
    for row in record["predicted"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.predict:
        return
    torch.set_num_threads(args.threads)
    model = ladder.MODELS["tiny" if args.quick else "sd15-512"]
    latent = 8 if args.quick else args.latent
    pipe = ladder.pipeline(model, torch.device("cpu"), torch.float32)
    unet: Any = pipe.unet
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for rank in RANKS:
            row: dict[str, Any] = {"rank": rank, **merged_swap(pipe, rank, folder, args.rounds)}
            row |= step_overhead(unet, rank, latent, args.rounds)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        file = write_lora(unet, 16, 0, folder / "read.safetensors")
        reads = [timed(lambda: pipe.load_lora_weights(file)) for _ in range(3)]
        record["read s"] = round(median(reads), 3)
        pipe.unload_lora_weights()
        record["peer"] = peer(model, 16, latent, folder, args.rounds)
        record["mixed"] = mixed(folder, args.rounds)
    print({key: value for key, value in record.items() if key != "predicted"}, flush=True)
    if not args.quick:
        head = {
            "machine": machine(torch.device("cpu")),
            "threads": args.threads,
            "rounds": args.rounds,
            "latent": latent,
        }
        path = machine_folder(torch.device("cpu")) / "adapters.json"
        path.write_text(json.dumps({**head, "rows": rows, **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
