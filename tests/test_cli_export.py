"""`fastldm export` and `fastldm verify`: what they print and write, and what they refuse. test_bundle.py and
test_verify.py have what bundles and proofs are."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import bundles
import pytest
from click.testing import Result
from command import run

from fastldm.export import writing

WHOLE = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
SPLIT = ["text_encoder", "text_kv", "time_rows", "unet_step", "vae_decoder", "vae_encoder"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.smallest("sd1", tmp_path_factory.mktemp("export") / "model")


Exported = tuple[Path, Result]


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The folder of a "whole" or a "split" export, and how the command ended; each runs once."""

    @cache
    def export(kind: str) -> Exported:
        folder = model.with_name(kind)
        with bundles.traced_once(bundles.shared(tmp_path_factory)):
            return folder, run("export", "-m", str(model), str(folder), *["--split"] * (kind == "split"))

    return export


@pytest.mark.parametrize(
    ("kind", "networks"),
    [("split", SPLIT), pytest.param("whole", WHOLE, marks=pytest.mark.full)],
    ids=["split", "whole"],
)
def test_export_names_networks_and_writes_them(
    kind: str, networks: list[str], exported: Callable[[str], Exported]
) -> None:
    folder, done = exported(kind)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [f"{stage} ..." for stage in (*networks, "picture")]
    output = re.fullmatch(r"(.*): (.*); (\d+) MiB in float32, as PyTorch computes them\n", done.stdout)
    assert output is not None
    assert output.groups()[:2] == (str(folder), ", ".join(networks))
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert abs(int(output[3]) - written / 2**20) <= 1
    assert {path.parent.name for path in folder.glob("*/model.onnx")} == set(networks)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert (manifest["split"], manifest["dtype"], manifest["opset"]) == (kind == "split", "float32", 21)


def test_export_again_opens_what_is_there(model: Path, exported: Callable[[str], Exported]) -> None:
    folder, first = exported("split")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.onnx")}
    done = run("export", "-m", str(model), str(folder), "--split")
    assert (done.exit_code, done.stdout, done.stderr) == (0, first.stdout, "")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.onnx")} == before


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["full"], 2, "full"),
        (["out", "--dtype", "bfloat16"], 2, "'bfloat16' is not one of"),
        (["out", "--opset", "20"], 2, "'20' is not one of"),
        (["out", "--to", "openvino"], 2, "'openvino' is not"),
        (["out", "--size", "64"], 2, "give --to tensorrt too"),
        (["out", "-m", "./nowhere"], 1, "nowhere"),
        ([], 2, "Missing argument 'OUT'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_refuses_mistakes_and_writes_nothing(
    options: list[str], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full", "notes.txt").touch()
    done = run("export", *options)
    assert (done.exit_code, done.stdout) == (status, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/notes.txt"]


def test_verify_prints_checks_times_and_choice(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    folder = exported("split")[0]
    done = run("verify", str(folder), "--backend", "onnxruntime")
    assert (done.exit_code, done.stderr) == (0, "")
    heading, *lines = done.stdout.splitlines()
    count = len(json.loads((folder / "manifest.json").read_text("utf-8"))["files"])
    assert heading == f"model (sd1), float32, opset 21: {count} files are as they were written"
    choice, *times = reversed(lines[-3:])
    checks, proved = lines[:-4], lines[-4]
    assert {line.split()[0] for line in checks} == {*SPLIT, "picture"}
    assert all(re.search(r"  PSNR (\d+|inf) dB$", line) for line in checks)
    assert proved == "all are as close to PyTorch in float32 as float32 is, on onnxruntime, which will run in it"
    for backend, line in zip(("onnxruntime", "torch"), times, strict=True):
        assert re.fullmatch(rf"{backend} \w+: \d+\.\d\d s to load, \d+\.\d\d s a picture", line)
    assert re.fullmatch(r"--backend auto takes (onnxruntime|torch) here", choice)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["nowhere"], 1, "nowhere"),
        (["damaged"], 1, "unet_step/model.onnx"),
        (["bundle", "-m", "./nowhere"], 1, "nowhere"),
        (["bundle", "--device", "warp"], 2, "cannot be used here"),
        (["bundle", "--backend", "torch"], 2, "'torch' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_verify_reports_mistakes_on_stderr(
    options: list[str],
    status: int,
    message: str,
    exported: Callable[[str], Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(exported("split")[0])
    shutil.copytree("bundle", "damaged")
    with Path("damaged", "unet_step", "model.onnx").open("ab") as file:
        file.write(b"x")
    done = run("verify", *options)
    assert done.exit_code == status, done.output
    assert message in done.stderr
    assert done.stderr.startswith(("fastldm: ", "Usage: "))
    assert "Traceback" not in done.stderr


def test_missing_exporter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "export", lambda *args, **kwargs: pytest.fail("it exports"))
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fastldm.export.onnx", raising=False)
    done = run("export", str(tmp_path / "out"))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "pip install 'fastldm[onnx]'" in done.stderr
    assert not list(tmp_path.iterdir())
