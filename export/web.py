"""A model as a folder that a web server can hand out as it is: text to images in the tab, with nothing behind it.

    index.html, page.js, *.css, icon.svg       a page to try it
    fastldm.js                                 the module, for other pages and for Node, where the folder is a package
    model.json                                 sizes, samplers, defaults, and what of the rest comes over the wire
    model.onnx.gz                              the graph of a whole picture (`export.graphs`), its weights in it
    tokenizer.json.gz, tables.json.gz          the tokenizer, and the tables of samplers (samplers/table.py)
    ort/                                       onnxruntime-web, which is no part of fastldm: from npm, or where it lies

Files are compressed here, because few servers would do it for these types; the module takes both.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastldm import checks
from fastldm.errors import BundleError, InputError
from fastldm.export import lighter, networks, writing
from fastldm.export.bundle import Bundle
from fastldm.export.graphs import WHOLE_PICTURE
from fastldm.export.manifest import write_json
from fastldm.export.verify import Goldens
from fastldm.image import to_pixels
from fastldm.kernels.columns import COLUMNS as GRAPH_COLUMNS
from fastldm.loading.spec import Spec
from fastldm.samplers.names import sampler_name
from fastldm.samplers.table import COLUMNS, NEUTRAL, StepTable, make_table
from fastldm.system import ASSETS, LOOK
from fastldm.version import __version__

FORMAT = 1
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
_INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # npm's, sha512
WASM = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU = ("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm")
LEAST = {"float32": 80.0, "float16": 40.0, "int8": 30.0}
"""PSNR in dB that the bundle's images have at least, by form of the weights."""
LARGEST = 2**31 - 2**20
"""Bytes of weights in float32, in which a tab holds them: a graph in one file has at most 2 GiB."""
_STEPS = (*range(1, 31), 40, 50)
_USUAL = (
    *("ddim", "ddpm", "plms", "euler", "euler a", "euler karras", "heun", "dpm2", "dpm2 a", "lms"),
    *("dpm++ 2m", "dpm++ 2m karras", "dpm++ 2m sde", "dpm++ 2m sde karras", "dpm++ 3m", "dpm++ 3m sde"),
    *("dpm++ 2s", "dpm++ 3s", "deis", "unipc", "lcm", "tcd"),
)
_PAGE = ASSETS / "web"


def check(model: Spec) -> None:
    """InputError for a model that the module does not run."""
    if len(model.text) > 1:
        raise InputError(f"the family {model.family.name} has two text encoders: --to web runs models with one")
    if not model.conditioned:
        raise InputError(f"the family {model.family.name} reads no text: --to web runs models for text to images")
    if model.unet.needs_added:
        raise InputError(f"the family {model.family.name} reads sizes beside a prompt: --to web runs others")
    if model.unet.in_channels > model.vae.latent_channels or model.vision is not None:
        raise InputError(f"the family {model.family.name} reads a picture: --to web runs models for text to images")
    if reason := writing.lacks_whole_picture(model):
        raise InputError(f"{reason}: --to web runs models that have that graph")
    total = 4 * model.parameters
    if total > LARGEST:
        raise InputError(
            f"the model has {total / 2**30:.1f} GiB of weights in float32, in which a tab computes: at most 2 are "
            "possible"
        )


def onnxruntime_web(path: Path | None) -> dict[str, bytes]:
    """The files of onnxruntime-web that a tab needs, by name. path: its folder, or npm's package; None for npm.

    Raises InputError where they are not there, with what to do.
    """
    how = f"fetch it with `npm pack {PACKAGE}@{VERSION}` where there is a network, and give --{PACKAGE} FILE"
    names = (*WASM, *WEBGPU)
    if path is None:
        return _fetched(names, how)
    try:
        if path.is_dir():
            folder = path / "dist" if (path / "dist").is_dir() else path
            return {name: (folder / name).read_bytes() for name in names}
        return _unpacked(path, names)
    except (OSError, KeyError, tarfile.TarError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not {PACKAGE} {VERSION} ({reason}): {how}") from error


def _fetched(names: tuple[str, ...], how: str) -> dict[str, bytes]:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"{PACKAGE} is needed, and there is no npm to get it with: {how}")
    with TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--loglevel=error", "--pack-destination", folder]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        found = [*Path(folder).glob("*.tgz")]
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["no file"])[0]
            raise InputError(f"npm could not get {PACKAGE} {VERSION} ({reason}): {how}")
        if hashlib.sha512(found[0].read_bytes()).digest() != base64.b64decode(_INTEGRITY):
            raise InputError(f"what npm gave for {PACKAGE} {VERSION} is not what it was: {how}")
        return _unpacked(found[0], names)


def _unpacked(package: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    with tarfile.open(package) as archive:
        files = {name: archive.extractfile(f"package/dist/{name}") for name in names}
        return {name: file.read() for name, file in files.items() if file is not None}


def write(
    bundle: Bundle,
    out: Path,
    engine: Mapping[str, bytes],
    weights: str = "float16",
    on_part: Callable[[str], object] = lambda part: None,
) -> dict[str, Any]:
    """Write a bundle that was exported with --whole-picture, in float32, as a folder for the web: what its model.json
    says. `out` must exist, and be empty.

    engine: of `onnxruntime_web`. weights: of `lighter.FORMS`. on_part: called with what is written next.

    Raises InputError for a model that the module does not run, or a bundle without the graph; BundleError where the
    weights make other images.
    """
    model = bundle.model
    check(model)
    if WHOLE_PICTURE not in bundle.graphs or bundle.manifest["dtype"] != "float32":
        raise InputError(f"{bundle.folder} has no graph of a whole picture in float32: export it with --whole-picture")
    weights = checks.choice("weights", weights, lighter.FORMS)
    on_part("graph")
    graph = lighter.load(str(bundle.path(WHOLE_PICTURE)))
    lighter.lighten(graph, weights)
    content = graph.SerializeToString()
    psnr = _psnr(bundle, content)
    if not psnr >= LEAST[weights]:
        raise BundleError(
            f"{weights} weights make other images of this model: {psnr:.0f} dB from PyTorch's, "
            f"expected {LEAST[weights]:.0f}"
        )
    on_part("compressed files")
    default, tables = _tables(model)
    tokenizer = model.checkpoint.tokenizer("tokenizer")
    window = min(tokenizer.max_length, model.text[0].max_position)
    sizes = {
        "model.onnx.gz": _compressed(out / "model.onnx.gz", content),
        "tokenizer.json.gz": _compressed(out / "tokenizer.json.gz", _json({**tokenizer.to_dict(), "length": window})),
        "tables.json.gz": _compressed(out / "tables.json.gz", _json(tables)),
    }
    (out / "ort").mkdir()
    for name, file in engine.items():
        if name.endswith(".wasm"):
            sizes[f"ort/{name}.gz"] = _compressed(out / "ort" / f"{name}.gz", file)
        else:
            (out / "ort" / name).write_bytes(file)
            sizes[f"ort/{name}"] = len(file)
    for file_ in (*sorted(_PAGE.iterdir()), *sorted(LOOK.iterdir())):
        shutil.copyfile(file_, out / file_.name)
    _copy_licenses(bundle, out)
    factor, (height, width) = model.vae.factor, networks.latents(bundle)[0]
    usual = model.default_size
    info = {
        "format": FORMAT,
        "name": bundle.manifest["model"],
        "fastldm": __version__,
        PACKAGE: VERSION,
        "weights": weights,
        "psnr": round(min(psnr, 150.0), 1),
        "columns": list(GRAPH_COLUMNS),
        "channels": model.vae.latent_channels,
        "factor": factor,
        "readsGuidance": model.unet.needs_guidance,
        **{
            name: {
                "least": axis.least * factor,
                "most": axis.most * factor,
                "multiple": axis.multiple_of * factor,
                "usual": usual[k],
            }
            for k, (name, axis) in enumerate((("width", width), ("height", height)))
        },
        "sampler": default,
        "steps": model.family.num_inference_steps,
        "guidanceScale": model.family.guidance_scale,
        "files": sizes,
    }
    write_json(out / "model.json", info)
    package = {"name": "fastldm-web", "version": __version__, "type": "module", "exports": "./fastldm.js"}
    write_json(out / "package.json", {**package, "private": True})
    return info


def transfer_size(info: dict[str, Any], names: tuple[str, ...] = WASM) -> int:
    """Bytes that a tab reads for the model and an engine, by what model.json says."""
    engine = {f"ort/{name}" for name in names} | {f"ort/{name}.gz" for name in names}
    return sum(size for name, size in info["files"].items() if not name.startswith("ort/") or name in engine)


def _psnr(bundle: Bundle, graph: bytes) -> float:
    """Of images of the bundle's goldens, against PyTorch's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    worst = float("inf")
    for inputs, expected in Goldens.read(bundle, WHOLE_PICTURE).cases:
        (image,) = session.run(["image"], {name: tensor.numpy() for name, tensor in inputs.items()})
        error = (to_pixels(torch.from_numpy(image), "pt") - expected["picture"]).square().mean()
        worst = min(worst, float(-10 * torch.log10(error)))
    return worst


def _tables(model: Spec) -> tuple[str, dict[str, dict[int, Any]]]:
    """The name of the model's own sampler, and tables by sampler and number of steps: those that the graph computes.
    InputError where it does not compute the model's own."""
    tables: dict[str, dict[int, Any]] = {}
    default = sampler_name(model.schedule)
    for name in (default, *_USUAL):
        found = {}
        for steps in _STEPS:
            with contextlib.suppress(InputError):  # the schedule has none
                table = make_table(model.schedule, steps, sampler=None if name == default else name)
                if all((table.rows[:, COLUMNS.index(column)] == value).all() for column, value in NEUTRAL.items()):
                    found[steps] = _numbers(table)
        if found:
            tables[name] = found
    own = model.family.sampler or default
    if own not in tables:
        raise InputError(f"the model's sampler, {own}, has numbers that the graph of a whole picture does not read")
    return own, tables


def _numbers(table: StepTable) -> dict[str, Any]:
    return {
        "timesteps": _floats(table.timesteps),
        "rows": _floats(table.rows[:, : len(GRAPH_COLUMNS)].ravel()),
        "draws": [int(draws) for draws in table.draws],
        "index": list(table.index),
        "scale": table.init_noise_sigma,
    }


def _floats(values: Any) -> list[float]:
    """float32 numbers, as short as they are exact."""
    short = [float(f"{value:.9g}") for value in values]
    return [int(value) if value.is_integer() else value for value in short]


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _compressed(path: Path, content: bytes) -> int:
    """Write a file with gzip: its size."""
    path.write_bytes(gzip.compress(content, 9, mtime=0))
    return path.stat().st_size


def _copy_licenses(bundle: Bundle, out: Path) -> None:
    """What lies with the model's weights on their terms, where it is at hand."""
    source = bundle.manifest["source"] or ""
    folder = ASSETS / "default" if source == "default" else Path(source)
    if source and folder.is_dir():
        for file in [*folder.glob("LICENSE*"), *folder.glob("MODEL_CARD.md")]:
            shutil.copyfile(file, out / file.name)
