"""What a proof of a bundle finds: errors that are small and systematic, ranges that are left, and what really runs."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import bundles
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastldm import device as devices
from fastldm.cli import main
from fastldm.errors import BundleError
from fastldm.export import auto, networks
from fastldm.export import verify as proof
from fastldm.export.bundle import Bundle
from fastldm.export.parity import Difference, difference
from fastldm.export.reference import ReferenceNetworks, rounding
from fastldm.export.spec import sample
from fastldm.loading import spec as loading
from fastldm.profiling import backends

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the bundle of it."""
    return bundles.exported("sd1", True, bundles.shared(tmp_path_factory))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLDM_CACHE", str(bundles.shared(tmp_path_factory) / "cache"))


class Wrong:
    """An engine whose outputs are changed."""

    def __init__(self, engine: Any, change: Any) -> None:
        self.specs, self._engine, self._change = engine.specs, engine, change

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._change(x) for name, x in self._engine(inputs).items()}

    def close(self) -> None:
        self._engine.close()


@pytest.mark.parametrize(
    "change",
    [lambda x: 1.00005 * x, lambda x: x + 0.00005, lambda x: x + 3e-5 * torch.randn_like(x), lambda x: x.flip(0)],
    ids=["a factor", "a shift", "noise", "rows swapped"],
)
def test_small_network_error_is_found(
    change: Any, exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last would pass a tolerance of 1e-4."""
    opened, bundle = proof.open_engine, Bundle.open(exported[1])
    monkeypatch.setattr(proof, "open_engine", lambda *args, **options: Wrong(opened(*args, **options), change))
    checks = list(proof.check_network(bundle, "unet_step"))
    assert any("is not PyTorch's" in check.problem for check in checks)


def test_float16_bias_is_found(tmp_path: Path) -> None:
    """Of 0.8%, which one tolerance for all networks lets pass: a sound computation's error is a twentieth."""
    model = loading.describe(bundles.smallest("sd1", tmp_path / "model"))
    stored, reference = ReferenceNetworks(model, "float16", exact=True), ReferenceNetworks(model, "float32")
    spec = stored.specs["unet"]
    goldens = proof.goldens_of(spec, reference, stored)
    (inputs, expected), *_ = goldens.cases
    with rounding("float16"):
        sound = stored.run("unet", proof.exact(inputs))["out_sample"]
    allowed = goldens.sound["float16"]["out_sample"].allowed(expected["out_sample"].numel())
    assert difference(sound, expected["out_sample"]).within(allowed)
    biased = difference(1.008 * sound, expected["out_sample"])
    assert biased.relative < 1e-2
    assert not biased.within(allowed)
    float16 = ReferenceNetworks(model, "float16").run("unet", inputs)["out_sample"].float()  # PyTorch's own float16
    assert difference(float16, expected["out_sample"]).within(allowed)


def test_sinusoids_stay_float32_in_a_sound_run(tmp_path: Path) -> None:
    """So that what another computation may be off in float16 is a few times PyTorch's error, and angles in float16 are
    found: at a timestep of 999 these have no digits behind the point."""
    model = loading.describe(bundles.smallest("lcm", tmp_path / "model"))
    stored, reference = (
        ReferenceNetworks(model, "float16", split=True, exact=True),
        ReferenceNetworks(model, "float32", split=True),
    )
    spec = stored.specs["time_rows"]
    goldens = proof.goldens_of(spec, reference, stored)
    inputs, expected = goldens.cases[0]
    rows = expected["temb_rows"]
    allowed = goldens.sound["float16"]["temb_rows"].allowed(rows.numel())
    float16 = ReferenceNetworks(model, "float16", split=True).run("time_rows", inputs)["temb_rows"].float()
    real = difference(float16, rows)
    assert real.within(allowed)
    assert allowed.spread < 20 * real.spread
    with rounding("float16"):
        rounded = stored.run("time_rows", proof.exact(inputs))["temb_rows"]
    assert not difference(rounded, rows).within(allowed)


def test_few_values_may_share_errors() -> None:
    """Four of them have half of it in common by chance; a thousand have not."""
    sound = Difference(1e-3, 1e-3, 60.0, 1e-3, 1e-5)
    matches = Difference(1e-3, 1e-3, 60.0, 1e-3, 1.5e-3)
    assert matches.within(sound.allowed(4))
    assert not matches.within(sound.allowed(1000))


@pytest.mark.full
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("split", [True, False])
def test_openvino_runs_float16_bundles(split: bool, precision: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Outputs are rounded to float16, whatever it computes in."""
    if not importlib.import_module(f"fastldm.export.{_openvino()}").has_bfloat16() and precision == "bfloat16":
        pytest.skip("this CPU has no bfloat16")
    folder = bundles.shared(tmp_path_factory) / f"float16-{split}"
    if not folder.exists():
        model = bundles.smallest("sd1", bundles.shared(tmp_path_factory) / f"float16-{split}-model")
        done = CliRunner().invoke(
            main, ["export", "-m", str(model), str(folder), "--dtype", "float16", *["--split"] * split]
        )
        assert done.exit_code == 0, done.output
    problems = [check.problem for check in proof.verify(Bundle.open(folder), "openvino", dtype=precision)]
    assert problems == [""] * len(problems)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_rounding_mode_matches_precision_error(precision: str, exported: tuple[Path, Path]) -> None:
    """Held against PyTorch, computing in it."""
    model = loading.describe(exported[0])
    networks = ReferenceNetworks(model, "float32")
    inputs = sample(networks.specs["unet"])
    expected = networks.run("unet", inputs)["out_sample"]
    with rounding(precision):
        rounded = networks.run("unet", inputs)["out_sample"]
    assert torch.equal(networks.run("unet", inputs)["out_sample"], expected)  # nothing of it stays
    module = networks.module("unet").to(getattr(torch, precision))
    theirs = module(*(inputs[name].to(getattr(torch, precision)) for name in inputs))  # type: ignore[operator]
    ours, real = (difference(x.float(), expected) for x in (rounded, theirs))
    assert 0.5 < ours.spread / real.spread < 2


def test_verify_uses_precision_of_pipeline(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO computes in bfloat16 where the processor has it, whatever the file holds."""
    openvino = importlib.import_module(f"fastldm.export.{_openvino()}")
    if not openvino.has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    monkeypatch.setattr(devices, "bfloat16_is_faster", lambda: True)
    monkeypatch.setattr(backends, "measure", lambda *args: auto.Measured(1, 1, "bfloat16"))
    opened: list[str] = []
    for module in (proof, networks):

        def watched(*args: Any, call: Any = module.open_engine, **options: Any) -> Any:
            opened.append(options["precision"])
            return call(*args, **options)

        monkeypatch.setattr(module, "open_engine", watched)
    done = CliRunner().invoke(main, ["verify", str(exported[1]), "--backend", "openvino"])
    assert done.exit_code == 0, done.output
    assert set(opened) == {"bfloat16", "float32"}  # that of the time rows
    assert "as close to PyTorch in float32 as bfloat16 is, on openvino, which will run in it" in done.output
    opened.clear()
    done = CliRunner().invoke(main, ["verify", str(exported[1]), "--backend", "openvino", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert set(opened) == {"float32"}


def _openvino() -> str:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    return "openvino"


def test_wrong_image_is_found(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Where each network is right and what is made of them is not."""
    copy = Path(shutil.copytree(exported[1], tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["scheduler"]["beta_end"] = 0.02
    bundles.sign(copy, manifest)
    matches = {check.network: bool(check.problem) for check in proof.verify(Bundle.open(copy))}
    assert matches == {**dict.fromkeys(Bundle.read(copy).specs, False), "picture": True}


# ---- autoencoders in float16


def with_large_activations(folder: Path, factor: float, **changes: Any) -> Path:
    """A model whose autoencoder's activations are large, and cancelled by its norms."""
    vae = tiny.vae("sd1", 1, force_upcast=False, **changes)
    with torch.no_grad():
        for network in (vae.encoder, vae.decoder):
            for layer in network.modules():
                if isinstance(layer, torch.nn.Conv2d) and layer is not network.conv_out:
                    layer.weight.mul_(factor ** (layer is network.conv_in))
    tiny.pipeline("sd1", vae=vae).save_pretrained(folder)
    return folder


def test_sample_latents_are_in_usual_range(exported: tuple[Path, Path]) -> None:
    model = loading.describe(exported[0])
    specs = ReferenceNetworks(model, "float32").specs
    (latents,) = sample(specs["vae_decoder"], {"height": 64, "width": 64, "batch": 4}).values()
    assert float(latents.std()) == pytest.approx(1 / model.vae.scaling_factor, rel=0.1)  # 5.5 for SD 1
    blocks = torch.nn.functional.avg_pool2d(latents, 8)
    assert float(blocks.std()) > 0.5 * float(latents.std())  # noise alone would have an eighth
    (image,) = sample(specs["vae_encoder"], {"height": 64, "width": 64}).values()
    assert float(image.abs().max()) <= 1


@pytest.mark.parametrize("factor", [1.0, 3e4])
def test_autoencoder_is_rescaled_by_its_activations(factor: float, tmp_path: Path) -> None:
    """`force_upcast` does not say so here."""
    model = loading.describe(with_large_activations(tmp_path / "model", factor))
    stored, reference = ReferenceNetworks(model, "float16", exact=True), ReferenceNetworks(model, "float32")
    for name in ("vae_decoder", "vae_encoder"):
        goldens = proof.goldens_of(stored.specs[name], reference, stored)
        assert all(error.relative < 2e-2 for error in goldens.sound["float16"].values()), name
    theirs = reference.module("vae_decoder").state_dict()["decoder.conv_in.weight"].half().float()
    ours = stored.module("vae_decoder").state_dict()["decoder.conv_in.weight"]
    scale = float((ours.abs().sum() / theirs.abs().sum()).log2())
    assert scale == pytest.approx(round(scale), abs=1e-3)  # a power of two
    assert (scale < -1) == (factor > 1)


def test_unrescalable_autoencoder_is_not_exported(tmp_path: Path) -> None:
    """Past the last norm: the decoder's own output leaves float16's range, or its weights do."""
    model = loading.describe(with_large_activations(tmp_path / "model", 1.0))
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.weight"] *= 1e5
    save_file(weights, path, metadata={"format": "pt"})
    stored, reference = ReferenceNetworks(model, "float16", exact=True), ReferenceNetworks(model, "float32")
    with pytest.raises(BundleError, match="sample leaves the range of float16: export the model in float32"):
        proof.goldens_of(stored.specs["vae_decoder"], reference, stored)
