"""A bundle and the model that it was made of: known to be the same, or said not to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import pytest
import torch
from click.testing import CliRunner

from fastldm import Pipeline
from fastldm.cli import main
from fastldm.errors import BundleError, InputError
from fastldm.export import auto, networks, prepared
from fastldm.export.bundle import Bundle, differing, identity
from fastldm.loading import spec as loading

CPU = torch.device("cpu")


@pytest.fixture
def exported(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A model that may be changed, and the bundle of it."""
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    source, out = bundles.exported("sd1", True, bundles.shared(tmp_path_factory))
    model, bundle = Path(shutil.copytree(source, tmp_path / "model")), Path(shutil.copytree(out, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    bundles.sign(bundle, {**manifest, "source": str(model)})
    return model, bundle


def scheduler(model: Path) -> None:
    edit(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")


def text(model: Path) -> None:
    edit(model / "text_encoder" / "config.json", eos_token_id=7)


def vae(model: Path) -> None:
    edit(model / "vae" / "config.json", scaling_factor=0.2)


def tokenizer(model: Path) -> None:
    (model / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<new>": 3}))


def index(model: Path) -> None:
    edit(model / "model_index.json", force_zeros_for_empty_prompt=True)


def weights(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CHANGES = {
    scheduler: "the config of scheduler",
    text: "the config of text_encoder",
    vae: "the config of vae",
    tokenizer: "the files of tokenizer",
    index: "the index",
    weights: "the weights of unet",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_of_source_is_found(change: Callable[[Path], None], exported: tuple[Path, Path]) -> None:
    model, bundle = exported
    assert Pipeline.from_pretrained(bundle, backend="torch", device="cpu").backend == "torch"
    change(model)
    with pytest.raises(BundleError, match=rf"has changed since .* was made of it \({CHANGES[change]}\): export it"):
        Pipeline.from_pretrained(bundle, backend="torch", device="cpu")
    assert Pipeline.from_pretrained(bundle, backend="onnxruntime", device="cpu").backend == "onnxruntime"


def test_config_origin_is_no_change(exported: tuple[Path, Path]) -> None:
    model, bundle = exported
    before = identity(loading.describe(model))
    for path, word in (
        ("unet/config.json", "_diffusers_version"),
        ("text_encoder/config.json", "transformers_version"),
    ):
        edit(model / path, **{word: "99", "_name_or_path": "elsewhere"})
    assert differing(before, identity(loading.describe(model))) == []
    assert networks.source(Bundle.open(bundle)).model == str(model)


def test_auto_ignores_changed_source(exported: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """The bundle itself is whole."""
    model, bundle = exported
    opened = Bundle.open(bundle)
    fast, slow = auto.Measured(1.0, 0.1, "float32"), auto.Measured(9.0, 9.0, "float32")
    auto.remember(opened, CPU, {"torch": fast, "onnxruntime": slow})
    assert Pipeline.from_pretrained(bundle, device="cpu").backend == "torch"
    scheduler(model)
    for _ in range(2):
        assert Pipeline.from_pretrained(bundle, device="cpu").backend == "onnxruntime"
    output = [record.getMessage() for record in caplog.records if "PyTorch was fastest here" in record.getMessage()]
    assert len(output) == 1
    assert "(the config of scheduler)" in output[0]
    shutil.rmtree(model)
    assert Pipeline.from_pretrained(bundle, device="cpu").backend == "onnxruntime"


def test_export_options_are_stored(
    exported: tuple[Path, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The plain weights are others: run from those, the picture would be another."""
    model, _ = exported
    for path in [*model.glob("*/*.safetensors")]:
        path.rename(path.with_name(f"{path.stem}.half.safetensors"))
    out = tmp_path / "variant"
    with bundles.traced_once(bundles.shared(tmp_path_factory)):
        refused = CliRunner().invoke(main, ["export", "-m", str(model), str(out), "--split"])
        assert refused.exit_code == 1, refused.output
        assert 'variant="half"' in refused.output
        done = CliRunner().invoke(main, ["export", "-m", str(model), str(out), "--split", "--variant", "half"])
    assert done.exit_code == 0, done.output
    assert Bundle.open(out).manifest["options"] == {"variant": "half"}
    assert Pipeline.from_pretrained(out, backend="torch", device="cpu").backend == "torch"
    with pytest.raises(InputError, match="variant: not for a bundle"):
        Pipeline.from_pretrained(out, backend="torch", variant="half")


def test_single_file_bundle_keeps_prediction_type(monkeypatch: pytest.MonkeyPatch, exported: tuple[Path, Path]) -> None:
    """What the file does not say is part of where the model is from."""
    bundle = Bundle.open(exported[1])
    described_with: list[dict[str, Any]] = []
    manifest = {**bundle.manifest, "options": {"prediction_type": "epsilon", "variant": None}}
    describe = loading.describe

    def described(path: str, **options: Any) -> loading.Spec:
        described_with.append(options)
        return describe(path, local_files_only=True)

    monkeypatch.setattr(loading, "describe", described)
    matches = networks.source(Bundle(bundle.folder, manifest, bundle.specs))
    assert described_with == [{"local_files_only": True, "prediction_type": "epsilon"}]
    assert matches.options == {"prediction_type": "epsilon"}
    assert prepared.source_of("default") == "default"
