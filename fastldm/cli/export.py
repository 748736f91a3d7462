"""`fastldm export` and `fastldm verify`: from a checkpoint to a verified bundle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastldm.cli import loras as adapters
from fastldm.cli.options import Size, debug_option, lora_option, model_option
from fastldm.cli.report import reported
from fastldm.errors import BundleError, InputError
from fastldm.export.backends import BACKENDS, related

if TYPE_CHECKING:
    from fastldm.export.bundle import Bundle


@click.command()
@model_option
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--variant", metavar="V", help="Weights variant of a folder or hub id, such as fp16.")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub id.")
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="Of a single file, which seldom says it.  [default: v_prediction for SD 2, else epsilon]",
)
@click.option("--allow-pickle", is_flag=True, help="Take tensors from pickled files too.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option(
    "--opset", type=click.Choice(["21", "23"]), default="21", show_default=True, help="23 has attention as one node."
)
@click.option(
    "--split", is_flag=True, help="The U-Net in three: what changes once a prompt, once a schedule, each step."
)
@click.option(
    "--whole-picture",
    is_flag=True,
    help="All steps, and a whole picture, as one graph too: the fastest on CPUs. Implies --split.",
)
@click.option(
    "--fused-ops", is_flag=True, help="GroupNorm with SiLU, attention and GEGLU as one node each. Not for OpenVINO."
)
@lora_option
@click.option(
    "--adapters",
    "adapter_rank",
    type=click.IntRange(min=0),
    default=0,
    metavar="RANK",
    help="Take LoRAs of this rank together after it was written. Implies --split.",
)
@click.option(
    "--control",
    "controls",
    multiple=True,
    metavar="PATH",
    help="A ControlNet or T2I-Adapter to export with it: a file, a folder or a hub id. Implies --split. Repeatable.",
)
@click.option(
    "--quantize",
    "quantize_mode",
    type=click.Choice(["int8-weights", "int8"]),
    help="The U-Net in eight bits, if its pictures stay the model's.",
)
@click.option(
    "--to",
    type=click.Choice(["tensorrt", "web"]),
    help="tensorrt: build engines of the networks too; needs no GPU. web: in place of a bundle, a folder for browsers.",
)
@click.option(
    "--arch",
    multiple=True,
    metavar="A",
    help="With --to tensorrt: a GPU that the engines are for, such as sm_89; may be repeated.  [default: Ampere and "
    "later]",
)
@click.option(
    "--size",
    "sizes",
    type=Size(),
    multiple=True,
    help="With --to tensorrt: engines for pictures of this size alone; may be repeated.  [default: all that the model "
    "has]",
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "int8"]),
    help="With --to web: how weights are stored; they are computed with in float32.  [default: float16]",
)
@click.option(
    "--onnxruntime-web",
    "onnxruntime_web",
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH",
    help="With --to web: the package onnxruntime-web, packed or as a folder.  [default: from npm]",
)
@debug_option
def export(
    model: str,
    out: Path,
    variant: str | None,
    revision: str | None,
    prediction_type: str | None,
    allow_pickle: bool,
    dtype: str,
    opset: str,
    split: bool,
    whole_picture: bool,
    fused_ops: bool,
    loras: tuple[tuple[str, float], ...],
    adapter_rank: int,
    controls: tuple[str, ...],
    quantize_mode: str | None,
    to: str | None,
    arch: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    weights: str | None,
    onnxruntime_web: Path | None,
    debug: bool,
) -> None:
    """Write a model to the folder OUT as ONNX, each network compared with PyTorch before it counts.

    \b
    fastldm export -m ./sd15 ./sd15-onnx --split                a checkpoint becomes a bundle
    fastldm export -m ./sd15 ./sd15-style --lora style.safetensors:0.8       an adapter merged into it
    fastldm verify ./sd15-onnx --backend openvino               proved once more, on the machine that runs it
    fastldm generate "a castle" -m ./sd15-onnx --backend openvino

    \b
    For NVIDIA GPUs, in float16; the engines go into OUT/engines, and no network is traced twice:
    fastldm export -m ./sd15 ./sd15-half --split --dtype float16 --to tensorrt --arch sm_89 --size 512x512
    fastldm generate "a castle" -m ./sd15-half --backend tensorrt
    fastldm cache ls                                            what a machine built for itself, where no engine fitted

    \b
    For browsers, and for Node: a folder of static files, with a page to try it (docs/web.md). -m may be a bundle:
    fastldm export --to web ./web
    python -m http.server -d ./web

    Models without a prompt, with classes and those that enlarge a picture are exported too, but for --to web, and where
    a sampler clamps for --whole-picture.

    \b
    --split        text and time steps are computed once, not at each step; without, optimum reads the folder too
    --whole-picture   the backends onnxruntime-graph and openvino-graph take several steps a call; picture.onnx has it
                   all, from token ids to pixels, for other programs (docs/deployment.md)
    --opset        23 has attention as one node, which not all backends know
    --adapters     `generate --lora` and `load_lora_weights` then work on the bundle, see docs/adapters.md
    --quantize     int8-weights: a quarter of the size; int8: faster too. Forty pictures must be within 40 dB of
                   float32's in the mean, or nothing is written (docs/deployment.md)
    --fused-ops    for backends with kernels of their own; ONNX Runtime and TensorRT run what the nodes stand for
    --size         the builder then knows all shapes: one guided picture of one window of text at a time; of several
                   sizes, each is tuned on its own, in one engine with one copy of the weights

    The folders are laid out as optimum's and diffusers' exports are. OUT may be an empty folder, such as a mounted
    volume. An export that was stopped goes on where it was when the same command is given again, and so do engines.
    """
    with reported(debug):
        from fastldm.model import describe, need_exporter

        need_exporter()
        from fastldm.adapters.control import read_control
        from fastldm.export import prepared, writing
        from fastldm.export.spec import specs
        from fastldm.profiling import quantized
        from fastldm.runtime.controls import Controls

        if to != "tensorrt" and (arch or sizes):
            raise InputError("--arch and --size are of engines: give --to tensorrt too")
        if to != "web" and (weights or onnxruntime_web):
            raise InputError("--weights and --onnxruntime-web are of a folder for browsers: give --to web too")
        options: dict[str, Any] = {
            "variant": variant,
            "revision": revision,
            "prediction_type": prediction_type,
            "allow_pickle": allow_pickle,
        }
        if to == "web":
            asked = {"--dtype": dtype != "float32", "--opset": opset != "21", "--fused-ops": fused_ops}
            asked |= {
                "--adapters": adapter_rank > 0,
                "--control": bool(controls),
                "--quantize": quantize_mode is not None,
            }
            if refused := [option for option, given in asked.items() if given]:
                raise InputError(f"--to web does not go with {', '.join(refused)}: leave it out")
            _export_to_web(model, out, options, loras, weights or "float16", onnxruntime_web)
            return
        spec = describe(model, **options)
        attached = Controls()
        for control in controls:
            attached.attach(None, read_control(control, spec, allow_pickle=allow_pickle))
        if to == "tensorrt":  # mistakes are found before anything is traced
            tensorrt = need_tensorrt()
            capabilities = [tensorrt.parse_capability(name) for name in arch]
            configs = [control.network.config for control in attached.attached.values()]
            form: dict[str, Any] = {"dtype": dtype, "adapter_rank": adapter_rank, "controls": configs}
            form["split"] = split or whole_picture or adapter_rank > 0 or bool(controls)
            form |= {"vision": spec.vision, "prior": spec.prior}
            tensorrt.image_profiles(specs(spec.unet, spec.vae, spec.text, **form), sizes, spec.vae.factor)
        shared: dict[str, Any] = {
            "dtype": dtype,
            "opset": int(opset),
            "split": split,
            "whole_picture": whole_picture,
            "fused_ops": fused_ops,
            "adapter_rank": adapter_rank,
            "controls": attached.attached,
            "on_network": _say,
        }
        folder = out
        if quantize_mode is not None:
            if to is not None:
                raise InputError("--quantize is for CPUs, and does not go with --to tensorrt")
            quantized.check_options(quantize_mode, out, shared)
            folder = out.with_name(f".{out.name}.float32")
        if loras:
            bundle = _export_with(adapters.find(loras, allow_pickle=allow_pickle), model, folder, options, shared)
        else:
            source = prepared.source_of(model)
            bundle = writing.export(spec, folder, source=source, options=options, **shared)
        if quantize_mode is not None:
            try:
                bundle = quantized.make(bundle, out, quantize_mode, say=lambda text: click.echo(text, err=True))
            except BundleError as error:
                raise BundleError(f"{error}; in float32 it is in {folder}, where the same command goes on") from error
            shutil.rmtree(folder)
        total = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
        names = ", ".join((*bundle.specs, *bundle.graphs))
        as_what = quantized.summary(bundle) if bundle.quantized else f"in {dtype}, as PyTorch computes them"
        click.echo(f"{out}: {names}; {total / 2**20:.0f} MiB {as_what}")
        if to == "tensorrt":
            for record, seconds in tensorrt.build_ahead(bundle, capabilities=capabilities, sizes=sizes):
                text = f"{seconds:.1f} s" if seconds else "is there"
                click.echo(f"{out / 'engines' / record.file}: {text}, {record.bytes / 2**20:.1f} MiB")


def _say(part: str) -> None:
    click.echo(f"{part} ...", err=True)


def _export_to_web(
    model: str,
    out: Path,
    options: dict[str, Any],
    loras: tuple[tuple[str, float], ...],
    weights: str,
    onnxruntime_web: Path | None,
) -> None:
    """Write the folder of a model or bundle for browsers, all of it or nothing."""
    from tempfile import TemporaryDirectory

    from fastldm.export import prepared, web, writing
    from fastldm.export.bundle import Bundle
    from fastldm.export.engine import is_bundle
    from fastldm.files import check_folder
    from fastldm.model import describe

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists: give the name of a new folder")
    check_folder(out.absolute().parent)
    given = Bundle.open(Path(model)) if is_bundle(model) else None
    if given is not None and loras:
        raise InputError("--lora merges into a model's weights: give the model in place of the bundle")
    spec = describe(model, **options) if given is None else given.model
    web.check(spec)
    engine = web.onnxruntime_web(onnxruntime_web)
    with TemporaryDirectory(prefix=f".{out.name[:40]}-", dir=out.absolute().parent) as scratch:
        folder = Path(scratch) / "web"
        folder.mkdir()
        shared: dict[str, Any] = {"whole_picture": True, "on_network": _say}
        if given is not None:
            bundle = given
        elif loras:
            found = adapters.find(loras, allow_pickle=options["allow_pickle"])
            bundle = _export_with(found, model, Path(scratch) / "bundle", options, shared)
        else:
            source = prepared.source_of(model)
            bundle = writing.export(spec, Path(scratch) / "bundle", source=source, options=options, **shared)
        info = web.write(bundle, folder, engine, weights, on_part=_say)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    size = web.transfer_size(info) / 1e6
    click.echo(f"{out}: {size:.1f} MB for a tab, weights in {weights}: images {info['psnr']:.0f} dB from PyTorch's")
    click.echo(f"to try it: python -m http.server -d {out}")


def _export_with(
    found: Sequence[tuple[str, Path, float]], model: str, out: Path, options: dict[str, Any], shared: dict[str, Any]
) -> Bundle:
    """The model with adapters merged into its weights, in float32."""
    from fastldm.export.bundle import Bundle
    from fastldm.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32", **options)
    adapters.load(pipe, found, allow_pickle=options["allow_pickle"])
    return Bundle.open(pipe.export(out, **shared))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice([*BACKENDS]), default="onnxruntime", show_default=True)
@click.option("--device", metavar="D", help="Such as cpu or cuda.  [default: cuda for tensorrt, else cpu]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: what `generate` takes]")
@click.option(
    "-m", "--model", metavar="MODEL", help="What it was exported from.  [default: what the bundle names, if it is here]"
)
@debug_option
def verify(out: Path, backend: str, device: str | None, dtype: str | None, model: str | None, debug: bool) -> None:
    """Prove a bundle: compare each file with its hash, then run each network, and a whole picture, in the precision
    that it will run in, and compare with PyTorch in float32.

    \b
    golden    at three sizes, with PyTorch's results that lie in the bundle: the model itself need not be here
    fresh     at three others that the bundle knows nothing of, computed now, where the model is here

    Each output may be four times as far off as PyTorch itself is where it rounds to that precision, and no more in what
    all its errors have in common: a shift or a factor is not what rounding makes.

    What loading and a picture take is measured, too, on PyTorch where the model is here: --backend auto goes by that.
    Exit status 1 where anything differs, with the network and the figure.
    """
    with reported(debug):
        from fastldm.device import choose_device
        from fastldm.errors import CheckpointError
        from fastldm.export import networks
        from fastldm.export.bundle import Bundle
        from fastldm.export.verify import verify
        from fastldm.model import describe

        target_device = choose_device(device or ("cuda" if backend == "tensorrt" else "cpu"))
        bundle = Bundle.open(out)
        manifest = bundle.manifest
        precision = networks.precision(bundle, backend, target_device, dtype)
        click.echo(
            f"{manifest['model']} ({manifest['family']}), {manifest['dtype']}, opset {manifest['opset']}: "
            f"{len(manifest['files'])} files are as they were written"
        )
        try:
            source = manifest["source"] if model is None else model
            if source is None:
                raise CheckpointError(f"{out} was made of a model in memory")
            spec = describe(source, local_files_only=model is None, **({} if model else manifest["options"]))
        except CheckpointError as error:
            if model is not None:
                raise
            click.echo(f"{error}: compared with the goldens alone")
            spec = None
        problems, width = [], max(15, *(len(name) + 1 for name in (*bundle.specs, *bundle.graphs)))
        for check in verify(bundle, backend, target_device, spec, precision):
            if check.difference is None:
                problems.append(check.problem)
            text = "FAILED" if check.difference is None else f"{check.difference}  PSNR {check.difference.psnr:.0f} dB"
            click.echo(f"{check.network:<{width}}{check.origin:<8}{check.sizes:<36}{text}")
        names = [name for name in related(backend) if bundle.graphs or name == backend]
        if bundle.quantized:
            from fastldm.profiling import quantized

            for name in names:
                count = f"{len(manifest['quantized']['prompts'])} pictures on {name}"
                try:
                    text = str(quantized.check(bundle, name, target_device, precision))
                except BundleError as error:
                    problems.append(str(error))
                    text = "FAILED"
                click.echo(f"{'eight bits':<{width}}{'gate':<8}{count:<36}{text}")
        if problems:
            raise BundleError(f"{len(problems)} of the above failed on {backend} in {precision}: {problems[0]}")
        apart = ", but for eight bits," if bundle.quantized else ","
        click.echo(
            f"all are as close to PyTorch in float32 as {precision} is{apart} on {backend}, which will run in it"
        )

        from fastldm.export import auto
        from fastldm.profiling import backends

        for name in ("torch", *names) if spec is not None and model is None else names:
            measured = backends.measure(bundle, name, target_device, dtype)
            click.echo(
                f"{name} {measured.precision}: {measured.start_up:.2f} s to load, {measured.picture:.2f} s a picture"
            )
        click.echo(f"--backend auto takes {auto.choose(bundle, target_device)} here")


def need_tensorrt() -> Any:
    """fastldm.export.tensorrt. EngineError where what it needs is not installed."""
    import importlib

    from fastldm.errors import EngineError

    try:
        return importlib.import_module("fastldm.export.tensorrt")
    except ImportError as error:
        raise EngineError(f"TensorRT cannot be imported here ({error}): pip install 'fastldm[tensorrt]'") from error
