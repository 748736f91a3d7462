"""planning/warm.py and its command, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import controls
import ip_adapters
import karlo
import picture_readers
import pytest
import tiny
import torch
from click.testing import CliRunner
from other_networks import latent_upscaler

from fastldm.cli import main
from fastldm.errors import InputError
from fastldm.kernels import compile as kernel_compile
from fastldm.kernels.dispatch import Target
from fastldm.loading.ranker import describe_ranker
from fastldm.loading.spec import Spec, describe
from fastldm.models.controlnet import ControlNetConfig
from fastldm.planning import warm

OTHERS = ("sdxl-refiner", "sd1-inpaint", "sd1-edit", "sdxl-edit", "sd2-depth", "variations", "unclip", "lcm", "karlo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_warm_without_a_gpu_requires_an_arch() -> None:
    result = CliRunner().invoke(main, ["warm"])
    message = f"fastldm: torch sees no GPU here: say which to compile for with --arch {warm.ARCH_NAMES}\n"
    assert (result.exit_code, result.output) == (2, message)


@pytest.mark.parametrize("arch", ["sm_75", "90a", "hopper", ""])
def test_unknown_arch_lists_the_supported_ones(arch: str) -> None:
    with pytest.raises(InputError, match=r"expected sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120"):
        warm.parse_arch(arch)


class Launches(Target):
    """In place of the compiler, which Triton's interpreter excludes: each kernel that it would be given, with the types
    and shapes of its tensors."""

    def __init__(self, arch: int, on_compiled: Any = None) -> None:
        super().__init__(arch)
        self.compiled: set[Any] = set()

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        inputs = tuple((x.dtype, *x.shape) if isinstance(x, torch.Tensor) else x for x in args)
        self.compiled.add((kernel.fn.__name__, inputs, str(constants)))


def test_controls_have_kernels_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and with adapters beside the weights."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(kernel_compile, "Ahead", Launches)
    spec = describe(tiny.save_pipeline("sd1", tmp_path / "sd1"))
    own = ControlNetConfig.from_dict(controls.controlnet("sd1").config)
    counts = [
        warm.warm(spec, "sm_90", sizes=[(64, 64)], lora=lora, controls=using)
        for lora in (False, True)
        for using in ([], [own])
    ]
    assert counts[0] < counts[1] < counts[3]
    assert counts[0] < counts[2] < counts[3]


def test_guidance_has_kernels_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third row, and the step's last kernel with few columns and all, from what the network made and what is
    averaged."""
    pytest.importorskip("triton", reason="triton is not installed")
    launches: list[Launches] = []

    def target(arch: int, on_compiled: Any = None) -> Launches:
        launches.append(Launches(arch))
        return launches[-1]

    monkeypatch.setattr(kernel_compile, "Ahead", target)
    spec = describe(tiny.save_pipeline("sd1", tmp_path / "sd1"))
    for options in ({}, {"pag": True}, {"apg_momentum": True}):
        warm.warm(spec, "sm_90", sizes=[(64, 64)], **options)
    ends = [
        {(inputs[0][0], inputs[0][1], constants) for name, inputs, constants in own.compiled if "end_step" in name}
        for own in launches
    ]
    kinds = [{(dtype, "'RARE': True" in constants) for dtype, _, constants in own} for own in ends]
    half = {(torch.float16, False), (torch.float16, True)}
    assert kinds == [half, half, half | {(torch.float32, False), (torch.float32, True)}]
    assert [max(rows for _, rows, _ in own) for own in ends] == [2, 3, 2]


def launches(spec: Spec, monkeypatch: pytest.MonkeyPatch, **options: Any) -> set[Any]:
    """What `warm` would have compiled."""
    pytest.importorskip("triton", reason="triton is not installed")
    made: list[Launches] = []
    monkeypatch.setattr(kernel_compile, "Ahead", lambda *args: made.append(Launches(*args)) or made[0])
    warm.warm(spec, "sm_90", sizes=[spec.default_size], **options)
    return made[0].compiled


def test_ranking_has_kernels_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = describe(tiny.save_pipeline("sd1", tmp_path / "sd1"))
    ranker = describe_ranker(ip_adapters.clip_folder(tmp_path / "clip"))
    assert launches(spec, monkeypatch) < launches(spec, monkeypatch, ranker=ranker)


def test_rows_are_those_that_graphs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = describe(tiny.save_pipeline("sd1", tmp_path / "sd1"))
    made = launches(spec, monkeypatch, batches=(5,))
    rows = {inputs[0][1] for name, inputs, _ in made if "end_step" in name}
    assert rows == {6, 12}, "of 5 and of 10"


@pytest.mark.parametrize(
    "family", ["upscaler", *(pytest.param(name, marks=pytest.mark.full) for name in ("x4-upscaler", *OTHERS))]
)
def test_every_kind_of_model_is_warmed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "upscaler":
        spec = describe(tiny.save_pixel_upscaler(tmp_path / "model"))
    elif family == "karlo":
        karlo.karlo().save_pretrained(tmp_path / "model")
        spec = describe(tmp_path / "model")
    elif family in ("variations", "unclip"):
        getattr(picture_readers, family)().save_pretrained(tmp_path / "model")
        spec = describe(tmp_path / "model")
    else:
        spec = describe(tiny.save_pipeline(family, tmp_path / "model"))
    names = {name for name, *_ in launches(spec, monkeypatch)}
    assert len(names) > 3
    assert any("step" in name for name in names)


@pytest.mark.full
def test_latent_upscaler_has_the_kernels_of_its_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which reads a picture of half the size."""
    latent_upscaler().save_pretrained(tmp_path)
    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(warm.dry_run, "run_encoder", lambda *_, height, width, **__: sizes.append((height, width)))
    assert launches(describe(tmp_path), monkeypatch)
    assert sizes == [(8, 8)]
