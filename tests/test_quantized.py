"""Bundles in eight bits: pictures decide, the manifest says what they cost, and what does not go with them is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bundles
import pytest
import torch
from command import run
from safetensors.torch import load_file, save_file

from fastldm.errors import BundleError, InputError
from fastldm.export import manifest as manifests
from fastldm.export import networks
from fastldm.export.bundle import Bundle

quantized: Any = pytest.importorskip("fastldm.profiling.quantized", reason="needs fastldm[onnx]", exc_type=ImportError)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused_ops": True}, "does not go with fused_ops"),
        ({"adapter_rank": 8}, "does not go with adapter_rank"),
        ({"controls": {"edges": 1}}, "does not go with controls"),
        ({"quantized": {"mode": "int8"}}, "does not go with quantized"),
        ({"dtype": "float16"}, "from float32, not from float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_combinations_are_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        quantized.check_options("int8", tmp_path / "out", options)


def test_modes_and_taken_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int4"):
        quantized.check_options("int4", tmp_path / "out", {})
    with pytest.raises(InputError, match="exists"):
        quantized.check_options("int8", tmp_path, {})
    done = run("export", str(tmp_path / "out"), "--quantize", "int8", "--dtype", "float16")
    assert done.exit_code == 2 or done.exit_code == 1
    assert "from float32, not from float16" in done.stderr
    assert not list(tmp_path.iterdir())


def test_equal_pictures_and_noise_have_their_decibels() -> None:
    torch.manual_seed(0)
    first = torch.randint(20, 230, (2, 3, 8, 8), dtype=torch.uint8)
    second = first.clone()
    second[1] += 10
    assert quantized._quality(first, first) == (100.0, 100.0)
    mean, worst = quantized._quality(second, first)
    assert worst == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    assert mean == pytest.approx((100 + worst) / 2)


def test_search_takes_the_least_noisy_that_pass() -> None:
    layers = [quantized.quantize.Layer("Conv", "c", "wc")]
    layers += [quantized.quantize.Layer("MatMul", f"m{k}", f"w{k}") for k in range(10)]
    ranges = {layer.value: quantized.Range(0, 1, 10.0 ** -int(layer.value[1:] or 0)) for layer in layers}

    def quality(values: Any) -> float:
        return 45.0 - len(values)  # passes the margin with four

    assert quantized._search(layers, ranges, quality, lambda text: None) == ["c", "m0", "m1", "m2"]
    assert quantized._search(layers, ranges, lambda values: 0.0, lambda text: None) == ["c"]
    assert len(quantized._search(layers, ranges, lambda values: 50.0, lambda text: None)) == 11


# ------------------------------------------------------------------------------------------------------ whole exports


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A small bundle in float32 and its like in eight bits."""
    folder = bundles.exported("sd1", True, bundles.shared(tmp_path_factory), whole_picture=True)[1]
    return folder, quantized.make(Bundle.open(folder), tmp_path_factory.mktemp("eight") / "out", "int8")


@pytest.mark.full
def test_manifest_says_what_it_cost(made: tuple[Path, Bundle]) -> None:
    entry = made[1].manifest["quantized"]
    assert entry["networks"] == made[1].quantized == ["unet_step"]
    before, after = entry["bytes"]
    assert after < 0.6 * before  # small layers have graphs as large as weights
    assert entry["psnr"]["mean"] >= 40
    assert entry["layers"] >= entry["layers_with_activations"] > 5
    assert "onnxruntime float32" in entry["seconds"]
    assert "in eight bits (int8): mean" in quantized.summary(made[1])


@pytest.mark.full
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_verify_proves_it(backend: str, made: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(backend)
    done = run("verify", str(made[1].folder), "--backend", backend)
    assert done.exit_code == 0, done.output
    assert "eight bits" in done.stdout
    assert "40 pictures" in done.stdout


@pytest.mark.full
def test_other_weights_do_not_pass(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made[1].folder, tmp_path / "changed"))
    data = folder / "unet_step" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2 :: 3] = b"\x05" * len(content[len(content) // 2 :: 3])
    data.write_bytes(content)
    bundles.rehash(folder)
    done = run("verify", str(folder))
    assert done.exit_code == 1
    assert "unet_step: out_sample" in done.stderr


@pytest.mark.full
def test_other_pictures_do_not_pass(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made[1].folder, tmp_path / "changed"))
    path = folder / "goldens" / "quantized.safetensors"
    pictures = load_file(path)["pictures"]
    save_file({"pictures": pictures.flip(0).contiguous()}, path)
    bundles.rehash(folder)
    with pytest.raises(BundleError, match="gate is a mean of 40 dB"):
        quantized.check(Bundle.open(folder), "onnxruntime", CPU)
    path.unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(folder)


@pytest.mark.full
def test_what_fails_the_gate_is_not_written(
    made: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "GATE", 101.0)
    with pytest.raises(BundleError, match="are not the model's any more"):
        quantized.make(Bundle.open(made[0]), tmp_path / "out", "int8-weights")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_tensorrt_and_edited_manifests_are_refused(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in eight bits, which TensorRT has others of"):
        networks.load(made[1], "tensorrt", torch.device("cuda"))
    folder = Path(shutil.copytree(made[1].folder, tmp_path / "changed"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["quantized"]["mode"] = "int4"
    bundles.sign(folder, manifest)
    with pytest.raises(BundleError, match=r"'quantized.mode' is 'int4'"):
        manifests.read(folder)
