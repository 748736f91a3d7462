"""What is installed, what is imported, and who may import whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastldm

ROOT = Path(fastldm.__file__).resolve().parent.parent
SOURCES = {"fastldm": ROOT / "fastldm", "fastldm/kernels": ROOT / "kernels", "fastldm/export": ROOT / "export"}


def run(python: str | Path, code: str, cwd: Path, **env: str) -> str:
    """Runs code in a fresh interpreter and returns what it printed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(python), "-c", code], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # built from a copy: setuptools leaves build/ and *.egg-info beside the sources
    out = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = tracked.stdout.splitlines() if tracked.returncode == 0 else []
    assert files, "the wheel is built from what git knows: run the tests in a clone"
    for name in files:
        if (ROOT / name).is_file():
            (out / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (out / "src" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(build, cwd=out / "src", check=True, capture_output=True)
    return next(out.glob("*.whl"))


def environment(folder: Path) -> Path:
    """The interpreter of a fresh environment. Dependencies are lent by ours, or those under it, whose own .pth files
    (an editable fastldm) do not count."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = run(python, "import sysconfig; print(sysconfig.get_path('purelib'))", folder)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "lent.pth").write_text("\n".join(packages) + "\n")
    return python


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = environment(tmp_path_factory.mktemp("clean"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True, capture_output=True)
    return python


def test_wheel_has_every_module_and_asset(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{prefix}/{path.relative_to(folder)}"
        for prefix, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert "fastldm/assets/default/model_index.json" in names


IMPORTED = "import fastldm, fastldm.kernels, fastldm.export; print(fastldm.kernels.__file__)"


def test_installed_wheel_runs_elsewhere(clean: Path, tmp_path: Path) -> None:
    assert str(clean.parent.parent) in run(clean, IMPORTED, tmp_path)
    version = subprocess.run([clean.parent / "fastldm", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert version.stdout.strip() == f"fastldm, version {fastldm.__version__}"
    generated = subprocess.run(
        [clean.parent / "fastldm", "generate", "a red apple", "--steps", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert generated.returncode == 0, generated.stderr
    assert len(list(tmp_path.glob("fastldm-*.png"))) == 1


def test_checkout_as_working_folder_shadows_the_wheel(clean: Path) -> None:
    # the checkout's fastldm/ comes first on sys.path and shadows the wheel, whose kernels/ must not be mixed in
    assert run(clean, IMPORTED, ROOT) == str(ROOT / "kernels" / "__init__.py")


def test_bare_checkout_is_importable(bare: Path, tmp_path: Path) -> None:
    assert run(bare, "import importlib.util as u; print(u.find_spec('fastldm'))", tmp_path) == "None"
    assert run(bare, IMPORTED, ROOT) == str(ROOT / "kernels" / "__init__.py")


@pytest.mark.parametrize(
    "code", ["from kernels import attention", "import kernels; kernels.attention", "import export"]
)
def test_second_copy_of_a_package_is_refused(code: str) -> None:
    output = run(sys.executable, f"try:\n    {code}\nexcept ImportError as error:\n    print(error)", ROOT)
    assert f"import this package as 'fastldm.{'export' if 'export' in code else 'kernels'}'" in output
    assert "ModuleNotFoundError" in run(
        sys.executable, "try:\n    import kernels.attention\nexcept ImportError as e:\n    print(repr(e))", ROOT
    )


def test_transformers_ignores_our_kernels_folder() -> None:
    assert run(sys.executable, "import transformers.utils as u; print(u.is_kernels_available())", ROOT) == "False"


LOADED = "import sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules} | set(sys.modules))))"


def modules_after(arguments: str, cwd: Path) -> set[str]:
    code = f"""
import contextlib, io, sys
sys.argv = ["fastldm", *{arguments.split("|")!r}]
from fastldm.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
{LOADED}"""
    return set(json.loads(run(sys.executable, code, cwd, PYTHONPATH=str(ROOT))))


@pytest.mark.parametrize("arguments", ["--help", "--version", "generate|--help", "doctor|--help"])
def test_help_and_version_load_nothing_heavy(arguments: str, tmp_path: Path) -> None:
    assert not modules_after(arguments, tmp_path) & {
        "torch",
        "numpy",
        "triton",
        "PIL",
        "tokenizers",
        "huggingface_hub",
        "tqdm",
    }


def test_generate_loads_no_peer_and_no_compiler(tmp_path: Path) -> None:
    loaded = modules_after("generate|a red apple|--steps|1|--device|cpu|-o|a.png", tmp_path)
    assert (tmp_path / "a.png").exists()
    assert not loaded & {"torch._dynamo", "triton", "transformers", "diffusers", "huggingface_hub", "scipy", "onnx"}


def test_pipeline_runs_without_triton(tmp_path: Path) -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import fastldm
result = fastldm.Pipeline.default(device="cpu")("a red apple", num_inference_steps=1, seed=0)
print(result.images[0].size[0] > 0)"""
    assert run(sys.executable, code, tmp_path, PYTHONPATH=str(ROOT)) == "True"


def test_tracked_files_stay_small() -> None:
    """A machine with a GPU is sent the tree: under 58 MiB without its history."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no clone: git knows no files here")
    files = [ROOT / name for name in tracked.stdout.splitlines()]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 58 << 20
