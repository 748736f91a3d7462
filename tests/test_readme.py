"""The README's code runs, its commands parse, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import bundles
import pytest
from click.testing import CliRunner
from PIL import Image

import fastldm
from fastldm.cli import main
from fastldm.loading import spec as loading
from fastldm.samplers.names import resolve_sampler

ROOT = Path(fastldm.__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


DEPLOYMENT = README.partition("## Deployment\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("code", [code for code in blocks("python") if code not in DEPLOYMENT])
def test_the_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("model", ["smallest", pytest.param("default", marks=pytest.mark.full)])
def test_the_way_to_a_running_engine(
    model: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The four commands as they stand there, then the Python; with a small model in place of the one that ships."""
    for package in ("openvino", "tensorrt_rtx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    if model == "smallest":
        monkeypatch.setattr(loading, "DEFAULT_MODEL", bundles.smallest("sd1", tmp_path / "model"))
    (commands,), (code,) = (re.findall(rf"```{kind}\n(.*?)```", DEPLOYMENT, re.DOTALL) for kind in ("sh", "python"))
    lines = [shlex.split(line.partition("   #")[0]) for line in commands.splitlines()]
    assert [line[:2] for line in lines] == [["fastldm", name] for name in ("export", "verify", "generate", "export")]
    with bundles.traced_once(bundles.shared(tmp_path_factory)):
        for line in lines:
            done = CliRunner().invoke(main, line[1:])
            assert done.exit_code == 0, done.output
    with Image.open("apple.png") as picture:
        assert re.search("Backend: (torch|openvino) (float32|bfloat16)", picture.info["parameters"])
    assert len([*(tmp_path / "half" / "engines").rglob("*.engine")]) == 6
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("openvino ")


def test_the_commands_exist() -> None:
    lines = [line.partition("   #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    assert any(line.startswith("fastldm generate") for line in lines)
    for line in lines:
        words = shlex.split(line)
        if words[0] == "fastldm":
            main.commands[words[1]].make_context(words[1], words[2:])  # raises where an option does not exist
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), line
        else:
            assert words[0] == "pip", line


def test_what_it_names_is_there() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:fastldm|kernels|export|benchmarks|tests)/[\w./]*)`", README
    )
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_it_stays_short() -> None:
    """Without what is measured, which benchmarks/readme.py writes."""
    written = re.sub(r"(<!-- table: .*? -->).*?<!-- end -->", r"\1", README, flags=re.DOTALL)
    assert len(written.splitlines()) <= 265


def test_the_samplers_it_names_are_known() -> None:
    section = README.partition("## Samplers")[2].partition("\n## ")[0]
    kinds = {"karras", "exponential", "beta", "eta"}
    names = {name.strip('"') for name in re.findall(r"`([^`]+)`", section) if "/" not in name} - kinds
    assert len(names) > 12
    for name in names:
        resolve_sampler(name)  # raises where there is none
