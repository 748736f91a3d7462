"""Bundles: written by the command, whole or not there, refused where a file is not what was written.

Over 500 lines, for the tests of a module are in one file.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bundles
import pytest
import tiny
import torch
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import load_file, save_file

import fastldm
from fastldm import Pipeline
from fastldm.cli import main
from fastldm.conditioning.text import encode_prompts
from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.errors import BundleError, EngineError, InputError
from fastldm.export import manifest as manifests
from fastldm.export import onnx, writing
from fastldm.export import verify as proof
from fastldm.export.bundle import Bundle, in_memory, with_tokens
from fastldm.export.engine import open_engine
from fastldm.export.engines import Engines
from fastldm.export.spec import specs
from fastldm.loading import spec as loading
from fastldm.loading.state import load_module
from fastldm.model import describe
from fastldm.sizes import nearest

ROOT = Path(fastldm.__file__).resolve().parent.parent
PICTURE = {("picture", "golden"): 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.smallest("sd1", tmp_path_factory.mktemp("model") / "smallest")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.split(model, tmp_path_factory)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def verify(folder: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["verify", str(folder), *options])
    return done.exit_code, done.output


def rows(output: str) -> Counter[tuple[str, str]]:
    """Networks and origins of the lines of the table."""
    matches = (line.split()[:2] for line in output.splitlines() if line.startswith((*bundles.NETWORKS, "picture")))
    return Counter((network, origin) for network, origin in matches)


def test_bundle_has_expected_files(exported: Path, model: Path) -> None:
    opened = Bundle.open(exported)
    assert list(opened.specs) == bundles.NETWORKS
    manifest = opened.manifest
    assert (manifest["model"], manifest["family"], manifest["dtype"], manifest["opset"]) == (
        *("smallest", "sd1", "float32"),
        21,
    )
    assert {"torch", "onnx", "fastldm", "python"} <= manifest["versions"].keys()
    matches = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert matches == {"manifest.json", *manifest["files"]}
    assert {f"{name}/model.onnx" for name in bundles.NETWORKS} | {
        f"{name}/config.json" for name in bundles.NETWORKS
    } <= matches
    # the configs that other tools read are those of the model
    for name, source in (("unet_step", "unet"), ("vae_decoder", "vae"), ("scheduler", "scheduler")):
        config = "scheduler_config.json" if source == "scheduler" else "config.json"
        assert json.loads((exported / name / config).read_text()) == json.loads((model / source / config).read_text())
    prompt = "a photo of an astronaut"
    assert Tokenizer(exported / "tokenizer").ids(prompt) == Tokenizer(model / "tokenizer").ids(prompt)
    # transformers 5 wrote one file; older ones, which optimum needs, read these
    assert not (model / "tokenizer" / "vocab.json").exists()
    assert (len(json.loads((exported / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))) == tiny.VOCABULARY
    merges = (exported / "tokenizer" / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert (merges[0], len(merges[1:-1])) == ("#version: 0.2", tiny.VOCABULARY - 2 * 256 - 2)
    assert not [path for path in exported.parent.iterdir() if path.name.startswith(".")]


def test_bundle_verifies(exported: Path) -> None:
    status, output = verify(exported)
    assert status == 0, output
    assert rows(output) == PICTURE | {(name, origin): 3 for name in bundles.NETWORKS for origin in ("golden", "fresh")}
    for golden in ("(1, 4, 8, 8)", "(2, 4, 4, 2)", "(3, 4, 2, 4)"):
        assert re.search(rf"unet_step +golden +sample {re.escape(golden)}", output)
    for fresh in ("(1, 4, 2, 2)", "(1, 4, 6, 8)", "(4, 4, 2, 2)"):
        assert re.search(rf"unet_step +fresh +sample {re.escape(fresh)}", output)
    assert ("picture", "golden") in rows(output)
    assert "all are as close to PyTorch in float32 as float32 is, on onnxruntime, which will run in it\n" in output


def test_fresh_sizes_are_not_goldens() -> None:
    """Of the default model, whose axes have steps enough to tell."""
    model = loading.describe("default")
    for split in (False, True):
        for spec in specs(model.unet, model.vae, model.text, dtype="float32", split=split).values():
            sizes = proof.golden_sizes(spec) + proof.fresh_sizes(spec)
            assert len({tuple(spec.shape(port, case) for port in spec.inputs) for case in sizes}) == 6, spec.name
            values = [(spec.axes[name], size) for case in sizes for name, size in case.items() if name in spec.axes]
            assert all(nearest(axis, size) == size for axis, size in values)


def test_verify_without_model_uses_goldens(exported: Path, model: Path, tmp_path: Path) -> None:
    moved = model.rename(model.with_name("moved"))
    try:
        status, output = verify(exported)
        assert status == 0, output
        assert re.search(rf"{model} .*: compared with the goldens alone", output)
        assert rows(output) == PICTURE | {(name, "golden"): 3 for name in bundles.NETWORKS}
        assert rows(verify(exported, "-m", str(moved))[1])["unet_step", "fresh"] == 3
        status, output = verify(exported, "-m", str(model))
        assert (status, "does not exist here" in output) == (1, True)
    finally:
        moved.rename(model)


def test_weights_of_other_model_are_found(exported: Path, model: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(model, tmp_path / "other"))
    path = changed / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["time_embedding.linear_2.bias"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    status, output = verify(exported, "-m", str(changed))
    assert status == 1
    failed = {tuple(line.split()[:2]) for line in output.splitlines() if line.endswith("FAILED")}
    assert failed == {("time_rows", "fresh")}  # alone: the rows are what that bias goes into
    assert "fastldm: 3 of the above failed on onnxruntime in float32: time_rows: temb_rows" in output

    xl = tiny.save_pipeline("sdxl", tmp_path / "xl")
    status, output = verify(exported, "-m", str(xl))
    assert status == 1
    assert "give -m the model that it was exported from" in output


def truncate(folder: Path) -> None:
    path = folder / "unet_step" / "model.onnx_data"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "unet_step" / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"opset": 21', '"opset": 23'))


def point_outside(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"scheduler/scheduler_config.json": {', '"../outside.json": {'))
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "sha256": manifests.digest(manifest)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"unet_step/model.onnx_data has \d+ bytes, expected \d+: it is damaged"),
        (flip, r"unet_step/model.onnx_data is not what was exported \(its sha256 differs\)"),
        (lambda folder: (folder / "vae_decoder" / "model.onnx").unlink(), "vae_decoder/model.onnx is missing"),
        (edit, r"manifest.json was edited or is damaged \(its sha256 differs\)"),
        (point_outside, r"names '../outside.json', which is not in the bundle"),
        (lambda folder: (folder / "manifest.json").unlink(), "is no bundle: it has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
    ],
)
def test_damage_is_found_before_anything_runs(
    copy: Path, damage: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(copy)
    monkeypatch.setattr(proof, "open_engine", lambda *args, **kwargs: pytest.fail("a network was opened"))
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)
    status, output = verify(copy)
    assert status == 1
    assert output.startswith("fastldm: ")


@pytest.mark.parametrize("files", ["none", "without a network", "without a golden"])
def test_executed_files_have_hashes(files: str, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    dropped = {"none": "", "without a network": "unet_step/model.onnx", "without a golden": "goldens/time_rows"}[files]
    manifest["files"] = {name: file for name, file in manifest["files"].items() if not name.startswith(dropped)}
    bundles.sign(copy, manifest)
    with pytest.raises(BundleError, match=r"manifest\.json has no hash of .*, which is run: export the model again"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["unet_step/other_data", "tokenizer/added_tokens.json", "text_encoder/deep/er"])
def test_added_files_are_not_run(name: str, copy: Path) -> None:
    """A graph may name any file of its folder as its weights, and a tokenizer reads more files than it was given."""
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    with pytest.raises(BundleError, match=rf"manifest\.json has no hash of {name}, which is run"):
        Bundle.open(copy)


def test_verify_names_the_network_and_the_figure(copy: Path) -> None:
    path = copy / "goldens" / "time_rows.safetensors"
    goldens = load_file(path)
    save_file({key: x + 0.5 if key == "1:out:temb_rows" else x for key, x in goldens.items()}, path)
    bundles.rehash(copy)
    status, output = verify(copy)
    assert status == 1
    assert output.count("FAILED") == 1  # the other sizes and networks were still run
    assert "fastldm: 1 of the above failed on onnxruntime in float32: time_rows: temb_rows" in output
    assert re.search(r"relative error \d.\de-01, mean .*; allowed are \d.\de-0[56],", output)


def test_invalid_bundle_paths_are_refused(model: Path, exported: Path, tmp_path: Path) -> None:
    spec = loading.describe(model)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    with pytest.raises(InputError, match="there exists and is no bundle: give the bundle another name"):
        writing.export(spec, tmp_path / "there", source=str(model))
    with pytest.raises(
        InputError, match="has no weights for PyTorch, as a bundle: give the model that it was exported from"
    ):
        writing.export(describe(exported), tmp_path / "out", source=str(exported))
    with pytest.raises(InputError, match="there is no folder"):
        writing.export(spec, tmp_path / "no" / "out", source=str(model))
    with (
        FileLock(tmp_path / ".out.partial.lock"),
        pytest.raises(InputError, match=r"another process is writing .*out: wait for it"),
    ):
        writing.export(spec, tmp_path / "out", source=str(model))


def test_existing_bundle_is_opened(
    exported: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "write", lambda *args, **kwargs: pytest.fail("a network was traced"))
    spec = loading.describe(model)
    assert writing.export(spec, exported, source=str(model), split=True).folder == exported
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    writing.export(loading.describe(moved), exported, source=str(moved), split=True)  # the same weights elsewhere
    with pytest.raises(InputError, match=r"bundle of another model or of other options \(opset differ\)"):
        writing.export(spec, exported, source=str(model), split=True, opset=23)
    path = moved / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * x for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"\(the weights of vae differ\)"):
        writing.export(loading.describe(moved), exported, source=str(moved), split=True)


# ---- engines that are built ahead


def engines(out: Path, model: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["export", "-m", str(model), str(out), "--split", "--to", "tensorrt", *options])
    return done.exit_code, done.output


def test_bundle_engines_build_without_gpu(
    copy: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt = pytest.importorskip("fastldm.export.tensorrt", reason="tensorrt_rtx is not installed")
    monkeypatch.setattr(onnx, "write", lambda *args, **kwargs: pytest.fail("a network was traced"))
    # latents of 6x8 and 8x6, which the model allows and was not made for
    options = ("--arch", "sm_89", "--size", "16x12", "--size", "12x16")
    status, output = engines(copy, model, *options)
    assert status == 0, output
    folder = f"{tensorrt.trt.__name__}-{tensorrt.trt.__version__}-sm_89-16x12-12x16"
    for name in bundles.NETWORKS:
        assert re.search(rf"engines/{re.escape(folder)}/{name}\.engine: \d+\.\d s, \d+\.\d MiB\n", output)
    matches = {record.key.network: record for record in Engines(copy).records()}
    assert list(matches) == bundles.NETWORKS
    assert matches["unet_step"].key.ranges.split(" | ") == [
        "batch=1:2:2 tokens=77:77:77 height=6:6:6 width=8:8:8",
        "batch=1:2:2 tokens=77:77:77 height=8:8:8 width=6:6:6",
    ]
    assert matches["vae_encoder"].key.ranges.startswith("batch=1:1:1 height=12:12:12 width=16:16:16 | ")
    assert matches["time_rows"].key.ranges == "rows=1:32:1024"
    opened = Bundle.open(copy)  # its manifest holds still
    key = tensorrt.key_of(opened.path("unet_step"), opened.specs["unet_step"], gpu="one of sm_89")
    data = Engines(copy).find(key, 89)
    assert data == (copy / "engines" / folder / "unet_step.engine").read_bytes()
    assert all(port.name.encode() in data for port in opened.specs["unet_step"].inputs)
    assert Engines(copy).find(key, 86) is None
    assert "the bundle's engine of unet_step is set aside: it is for sm_89, and here is sm_86" in caplog.text

    (copy / "engines" / folder / "text_kv.engine").unlink()
    status, output = engines(copy, model, *options)
    assert [line.split()[1:3] == ["is", "there,"] for line in output.splitlines() if ".engine: " in line] == [
        name != "text_kv" for name in bundles.NETWORKS
    ]


def test_gpu_uses_fitting_bundle_engine(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Without a GPU: what would be deserialised is looked at instead."""
    tensorrt = pytest.importorskip("fastldm.export.tensorrt", reason="tensorrt_rtx is not installed")
    refused: list[bytes] = []

    def opened(data: bytes, spec: object, device: object) -> bytes:
        if data in refused:
            raise EngineError("made for another driver")
        return data

    monkeypatch.setattr(tensorrt, "TensorRTEngine", opened)
    monkeypatch.setattr(tensorrt, "build", lambda *args, **kwargs: b"built here")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    bundle = Bundle.open(copy)
    path, spec = bundle.path("text_kv"), bundle.specs["text_kv"]

    def run() -> bytes:
        return open_engine("tensorrt", path, spec, device="cuda:0")  # type: ignore[return-value]

    assert run() == b"built here"
    assert not caplog.records
    monkeypatch.setattr(tensorrt, "build", lambda *args, **kwargs: b"built ahead")
    list(tensorrt.build_ahead(bundle))
    assert run() == b"built ahead"
    refused.append(b"built ahead")
    assert run() == b"built here"
    assert caplog.messages == ["the bundle's engine of text_kv is set aside: made for another driver"]
    caplog.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(tensorrt, "build", lambda *args, **kwargs: b"built here")
    assert run() == b"built here"
    assert "text_kv is set aside: it is for Ampere and later, and here is sm_75" in caplog.messages[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tensorrt", "--arch", "sm_90"], r"does not build for sm_90: expected .*sm_89.* or none for Ampere"),
        (["--to", "tensorrt", "--size", "16x13"], r"the size is 16x13: .*in steps of 4, the nearest is 16x12"),
        (["--arch", "sm_89"], "give --to tensorrt too"),
        (["--size", "16x16"], "give --to tensorrt too"),
    ],
)
def test_engine_errors_are_found_before_tracing(
    options: list[str], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--to" in options:
        pytest.importorskip("fastldm.export.tensorrt", reason="tensorrt_rtx is not installed")
    monkeypatch.setattr(writing, "export", lambda *args, **kwargs: pytest.fail("exported"))
    done = CliRunner().invoke(main, ["export", "-m", str(model), str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert re.search(message, done.output), done.output


def test_without_tensorrt_nothing_is_traced(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "export", lambda *args, **kwargs: pytest.fail("exported"))
    for package in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fastldm.export.tensorrt", raising=False)
    status, output = engines(tmp_path / "out", model)
    assert status == 1
    assert re.search(r"TensorRT cannot be imported here .*: pip install 'fastldm\[tensorrt\]'", output)


@pytest.mark.full
@pytest.mark.parametrize("options", [[], ["--split"], ["--dtype", "float16"], ["--split", "--fused-ops"]])
def test_the_default_model(options: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    status, output = verify(tmp_path / "out")
    assert status == 0, output
    if "--fused-ops" not in options and importlib.util.find_spec("openvino"):
        status, output = verify(tmp_path / "out", "--backend", "openvino")
        assert status == 0, output


def test_added_tokens_become_rows_of_both_tables() -> None:
    """What is exported of a pipeline with tokens of textual inversion: its encoders and tokenizers, loaded anew."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sdxl"))
    generator = torch.Generator().manual_seed(1)
    vectors = {"clip_l": torch.randn(3, 32, generator=generator), "clip_g": torch.randn(2, 40, generator=generator)}
    pipe.load_textual_inversion(vectors, token="<thing>")
    spec = pipe.stages.spec
    modules: dict[str, Any] = {"unet": pipe.unet, "vae": pipe.vae}
    for name, stage in zip(("text_encoder", "text_encoder_2"), pipe.text_stages, strict=True):
        spec, modules[name] = with_tokens(spec, name, stage)
    model = in_memory(spec, modules)
    assert [config.vocab for config in model.text] == [tiny.VOCABULARY + 3, tiny.VOCABULARY + 2]
    assert loading.spec_of(model.checkpoint).text == model.text

    def fill(module: Any, name: str) -> Any:
        component = model.checkpoint.components[name]
        return load_module(module, component.state(), dtype=torch.float32, device="cpu", source=name)

    anew = loading.load(model, fill)
    for prompt in ("a <thing>, two <thing><thing>", "nothing"):
        got, expected = (encode_prompts(stages, prompt) for stages in (anew.text_stages, pipe.text_stages))
        assert torch.equal(got.hidden, expected.hidden)
        assert got.pooled is not None
        assert expected.pooled is not None
        assert torch.equal(got.pooled, expected.pooled)
