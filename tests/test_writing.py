"""Where a bundle may be written, by how many at once, and what other tools find in it."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import diffusers
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image

from fastldm import Pipeline
from fastldm.errors import BundleError, InputError
from fastldm.export import onnx, writing
from fastldm.export.bundle import Bundle
from fastldm.export.private import locked
from fastldm.export.reference import ReferenceNetworks
from fastldm.loading import spec as loading
from fastldm.model import describe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the bundle of it."""
    return bundles.exported("sd1", False, bundles.shared(tmp_path_factory))


@pytest.fixture
def copying(traced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of tracing: the networks of that bundle. Lists those that were asked for."""
    written: list[str] = []

    def write(networks: ReferenceNetworks, name: str, folder: Path, **options: Any) -> None:
        written.append(name)
        folder.mkdir()
        for file in ("model.onnx", "model.onnx_data"):
            shutil.copyfile(traced[1] / name / file, folder / file)

    monkeypatch.setattr(onnx, "write", write)
    return written


def export(traced: tuple[Path, Path], out: Path, **options: Any) -> Bundle:
    return writing.export(loading.describe(traced[0]), out, source=str(traced[0]), **options)


# ---- where


def test_an_empty_folder_is_taken(traced: tuple[Path, Path], copying: list[str], tmp_path: Path) -> None:
    """A volume cannot be renamed to or from, and may have the folder that its file system makes."""
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    assert export(traced, volume).manifest == Bundle.open(traced[1]).manifest
    assert {path.name for path in volume.iterdir()} == {"lost+found", *(path.name for path in traced[1].iterdir())}
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    assert export(traced, volume).folder == volume  # opened, not made again
    assert len(copying) == len(Bundle.read(traced[1]).specs)


@pytest.mark.parametrize("existing", [False, pytest.param(True, marks=pytest.mark.full)])
def test_interrupted_publish_is_finished(
    existing: bool, traced: tuple[Path, Path], copying: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename, remaining = tmp_path / "out", Path.rename, [3 if existing else 0]
    if existing:
        out.mkdir()

    def stopping(path: Path, target: Path) -> Path:
        if remaining[0] == 0:
            raise KeyboardInterrupt
        remaining[0] -= 1
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stopping)
        with pytest.raises(KeyboardInterrupt):
            export(traced, out)
    with pytest.raises(BundleError, match="is no bundle"):
        Bundle.open(out)
    copying.clear()
    assert export(traced, out).manifest == Bundle.open(traced[1]).manifest
    assert copying == []
    assert {path.name for path in out.iterdir()} == {path.name for path in traced[1].iterdir()}


def test_a_link_to_a_folder_is_the_folder(traced: tuple[Path, Path], copying: list[str], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    export(traced, tmp_path / "link")
    assert Bundle.open(tmp_path / "disk").manifest == Bundle.open(traced[1]).manifest


def file(path: Path) -> Path:
    path.write_text("mine")
    return path


def dangling(path: Path) -> Path:
    path.symlink_to("nowhere")
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def full(path: Path) -> Path:
    path.mkdir()
    (path / "mine").touch()
    return path


@pytest.mark.parametrize(
    ("path_of", "message"),
    [
        (file, "exists and is no bundle"),
        (full, "exists and is no bundle"),
        (dangling, r"is a link to .*nowhere, which does not exist"),
        (loop, "is a link to|cannot be a bundle's name"),
        (lambda path: path.with_name("n" * 250), r"the name n{40}\.\.\. has 250 bytes, at most 2\d\d are possible"),
        (lambda path: path.with_name("n" * 300), "out is .*: too long"),
        (lambda path: path.with_name("é" * 125), "has 250 bytes"),
        (lambda path: path.with_name("a\0b"), "out is .*, which is no path"),
        (lambda path: path / "sub", "there is no folder"),
        (lambda path: file(path) / "sub", "there is no folder"),
        (lambda path: Path("/"), "/ cannot be a bundle: give the name of a new folder"),
    ],
)
def test_unusable_bundle_paths_are_refused(
    path_of: Any, message: str, traced: tuple[Path, Path], tmp_path: Path
) -> None:
    out = path_of(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        export(traced, out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, *[pytest.param(text, marks=pytest.mark.full) for text in ("{", "[]", '{"key": 1, "networks": 2}')]],
)
def test_leftover_files_are_no_obstacle(
    text: str, traced: tuple[Path, Path], copying: list[str], tmp_path: Path
) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "done.json").write_text(text)
    assert export(traced, tmp_path / "out").manifest == Bundle.open(traced[1]).manifest


# ---- one at a time


def test_refused_process_leaves_lock_alone(traced: tuple[Path, Path], tmp_path: Path) -> None:
    lock = tmp_path / ".out.partial.lock"
    with locked(lock, timeout=0):
        for _ in range(2):  # the second, too, finds it held
            with pytest.raises(InputError, match=r"another process is writing .*out: wait for it"):
                export(traced, tmp_path / "out")
        assert lock.exists()


def test_removed_lock_has_one_holder(tmp_path: Path) -> None:
    """Each removes it while holding it: who waited on the removed file takes the next."""
    path, holders, seen = tmp_path / "lock", [0], [0]

    def hold() -> None:
        for _ in range(30):
            with locked(path, remove=True):
                holders[0] += 1
                assert holders[0] == 1
                seen[0] += 1
                holders[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [120]
    assert not path.exists()


def test_lock_of_dead_process_is_free(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from fastldm.export.private import locked
with locked(Path({str(tmp_path / "lock")!r})):
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    with locked(tmp_path / "lock", timeout=0), pytest.raises(TimeoutError), locked(tmp_path / "lock", timeout=0.1):
        pass


# ---- what others read


def test_index_lists_existing_components(traced: tuple[Path, Path], tmp_path: Path, copying: list[str]) -> None:
    """Also where the model has a safety checker, which no bundle has."""
    model = Path(shutil.copytree(traced[0], tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (model / "model_index.json").write_text(json.dumps(index))
    out = writing.export(loading.describe(model), tmp_path / "out", source=str(model)).folder
    output = json.loads((out / "model_index.json").read_text())
    components = {name for name, value in output.items() if isinstance(value, list) and value[0] is not None}
    assert components == {path.name for path in out.iterdir() if path.is_dir()} - {"goldens"}
    assert output["safety_checker"] == output["feature_extractor"] == [None, None]
    assert (output["_class_name"], output["requires_safety_checker"]) == ("StableDiffusionPipeline", False)


REQUEST = {"negative_prompt": "blue", "num_inference_steps": 3, "guidance_scale": 5.0}


def latents(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((1, 4, 8, 12)).astype(np.float32)


def test_diffusers_gives_the_same_image(traced: tuple[Path, Path]) -> None:
    theirs = diffusers.OnnxStableDiffusionPipeline.from_pretrained(traced[1], provider="CPUExecutionProvider")
    size = {"height": 64, "width": 96}  # of latents of 8x12: it takes every autoencoder for one of eight pixels each
    got = theirs("a red apple", latents=latents(), output_type="np", **size, **REQUEST).images[0]
    ours = Pipeline.from_pretrained(traced[0], device="cpu", dtype="float32")
    request: dict[str, Any] = {"height": 16, "width": 24, "latents": torch.from_numpy(latents()), "output_type": "np"}
    expected = ours("a red apple", **request, **REQUEST).images[0]
    assert got.shape == expected.shape == (16, 24, 3)
    assert expected.std() > 0.05  # a picture, not a surface
    assert np.abs(got - expected).max() <= 1e-4


def test_diffusers_image_to_image_runs_bundle(traced: tuple[Path, Path]) -> None:
    """It takes an encoder's first output for the latent."""
    theirs = diffusers.OnnxStableDiffusionImg2ImgPipeline.from_pretrained(traced[1], provider="CPUExecutionProvider")
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    got = theirs("a red apple", image=start, strength=0.5, num_inference_steps=4, output_type="np").images
    assert got.shape == (1, 64, 64, 3)
    assert np.isfinite(got).all()


def test_diffusers_reads_bundle_of_single_file(tmp_path: Path, traced: tuple[Path, Path]) -> None:
    """Its index is made, for the file has none."""
    model = loading.describe("default")
    bare = replace(model, checkpoint=replace(model.checkpoint, index={"_class_name": "StableDiffusionPipeline"}))
    index = writing._index(bare, ("text_encoder", "unet", "vae_decoder", "vae_encoder"))
    copy = Path(shutil.copytree(traced[1], tmp_path / "copy"))
    index["scheduler"] = json.loads((copy / "model_index.json").read_text())["scheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert diffusers.OnnxStableDiffusionPipeline.from_pretrained(copy, provider="CPUExecutionProvider").unet is not None


def test_all_tokenizer_files_are_copied(traced: tuple[Path, Path], copying: list[str], tmp_path: Path) -> None:
    """added_tokens.json too, without which a token of its own is read as letters."""
    model = Path(shutil.copytree(traced[0], tmp_path / "model"))
    shutil.rmtree(model / "tokenizer")
    token_id = tiny.VOCABULARY - 1  # the first free id: transformers gives a token that one, whatever the file says
    vocab, merges = tiny.clip_vocabulary(token_id)
    (model / "tokenizer").mkdir()
    writing._write_vocabulary(model / "tokenizer", vocab, merges)
    (model / "tokenizer" / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})
    )
    (model / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<mine>": token_id}))
    spec = loading.describe(model)
    out = writing.export(spec, tmp_path / "out", source=str(model)).folder
    prompt = "a photo of <mine>"
    expected = spec.checkpoint.tokenizer("tokenizer").ids(prompt)
    assert token_id in expected
    assert transformers.CLIPTokenizer.from_pretrained(out / "tokenizer")(prompt).input_ids[1:-1] == expected
    assert describe(out).checkpoint.tokenizer("tokenizer").ids(prompt) == expected


# ---- what is in memory


@pytest.mark.full
@pytest.mark.parametrize("adopted", [False, True])
def test_edited_pipeline_is_exported(adopted: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As a merged adapter is: the weights as they are now, not as they lie on the disk."""
    source = bundles.smallest("sd1", tmp_path / "model")
    if adopted:
        pipe = Pipeline.from_diffusers(diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32))
    else:
        pipe = Pipeline.from_pretrained(source, device="cpu", dtype="float32")
    unet: Any = pipe.unet
    unet.conv_in.weight.mul_(1.5)
    with bundles.traced_once(bundles.shared(tmp_path_factory)):
        out = pipe.export(tmp_path / "out", split=True)
    request = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    expected = pipe(**request).images
    deployed = Pipeline.from_pretrained(out, backend="onnxruntime")
    assert float((deployed(**request).images - expected).abs().max()) <= 1e-4
    before = Pipeline.from_pretrained(source, device="cpu", dtype="float32")
    assert float((before(**request).images - expected).abs().max()) > 1e-3
    with pytest.raises(BundleError, match="was made of a model in memory, and PyTorch cannot read the bundle itself"):
        Pipeline.from_pretrained(out, backend="torch")
    with pytest.raises(InputError, match="this pipeline runs a bundle on onnxruntime, which has no weights to export"):
        deployed.export(tmp_path / "again")
    with pytest.raises(
        InputError, match="onnxruntime, whose step is one network, and reuse is 2: leave it out, or load"
    ):
        deployed(**request, reuse=2)


# ---- interrupted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.smallest("sd1", tmp_path_factory.mktemp("model") / "smallest")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.split(model, tmp_path_factory)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


class Writer:
    """In place of tracing: the networks of a bundle that is there. Fails at one of them, when told to."""

    def __init__(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source, self.written, self.fails = source, [], {}  # type: ignore[var-annotated]
        monkeypatch.setattr(onnx, "write", self)

    def __call__(self, networks: object, name: str, folder: Path, *, opset: int, fused_ops: bool) -> None:
        if name in self.fails:
            folder.mkdir()
            (folder / "model.onnx").write_bytes(b"half")
            raise self.fails.pop(name)
        self.written.append(name)
        shutil.copytree(self.source / name, folder)


def test_interrupted_export_continues(
    exported: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, out = Writer(exported, monkeypatch), tmp_path / "out"

    def export(**options: object) -> Bundle:
        return writing.export(loading.describe(model), out, source=str(model), split=True, **options)  # type: ignore[arg-type]

    writer.fails = {"unet_step": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        export()
    assert not out.exists()
    assert writer.written == bundles.NETWORKS[:3]

    writer.fails = {"vae_encoder": OSError(errno.ENOSPC, "No space left on device")}
    with pytest.raises(BundleError, match=r"No space left on device.*the same command continues there"):
        export()
    assert not out.exists()
    assert writer.written == bundles.NETWORKS[:5]  # none of them twice

    bundle = export()
    assert writer.written == bundles.NETWORKS
    assert bundle.manifest == Bundle.open(exported).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_export_continues(exported: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from fastldm.loading import spec as loading
from fastldm.export import onnx, writing
def dying(networks, name, folder, **options):
    folder.mkdir()
    if name == "time_rows":
        os.kill(os.getpid(), signal.SIGKILL)
    shutil.copytree(Path({str(exported)!r}, name), folder, dirs_exist_ok=True)
onnx.write = dying
source = {str(model)!r}
writing.export(loading.describe(source), Path({str(tmp_path / "out")!r}), source=source, split=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", ".out.partial.lock"}
    writer = Writer(exported, monkeypatch)
    writing.export(loading.describe(model), tmp_path / "out", source=str(model), split=True)
    assert writer.written == bundles.NETWORKS[2:]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_continues_after_full_disk(
    exported: Path, model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, out = Writer(exported, monkeypatch), small_disk / "out"

    def export() -> Bundle:
        return writing.export(loading.describe(model), out, source=str(model), split=True)

    full_size = sum(path.stat().st_size for path in exported.rglob("*"))
    for kibibytes in (256, full_size // 2048):  # too small, half of what it takes
        subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", small_disk], check=True)
        with pytest.raises(BundleError, match=r"No space left on device.*the same command continues there"):
            export()
        assert not out.exists()
    before = list(writer.written)
    subprocess.run(["mount", "-o", f"remount,size={2 * full_size // 1024}k", small_disk], check=True)
    assert export().manifest == Bundle.open(exported).manifest
    again = writer.written[len(before) :]
    assert before
    assert len(again) < len(bundles.NETWORKS)  # what the half disk held was not made twice
    assert sorted({*before, *again}) == sorted(bundles.NETWORKS)


def test_other_or_damaged_partial_files_are_rewritten(
    exported: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, out = Writer(exported, monkeypatch), tmp_path / "out"
    for name in ("first", "second"):
        writer.fails = {"time_rows": KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            writing.export(loading.describe(model), out, source=name, split=True)
    assert writer.written == [*bundles.NETWORKS[:2], *bundles.NETWORKS[:2]]
    truncated = tmp_path / ".out.partial" / "text_kv" / "model.onnx_data"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    writer.written = []
    writing.export(loading.describe(model), out, source="second", split=True)
    assert writer.written == bundles.NETWORKS[1:]


def test_network_unlike_pytorch_is_not_exported(
    exported: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(Path(shutil.copytree(exported, tmp_path / "source")), monkeypatch)
    path = writer.source / "text_kv" / "model.onnx_data"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BundleError, match=r"text_kv: kv.0 .*: relative error 1.0e\+00"):
        writing.export(loading.describe(model), tmp_path / "out", source=str(model), split=True)
    assert not (tmp_path / "out").exists()


def test_tokens_of_textual_inversion_are_exported(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = bundles.smallest("sd1", tmp_path / "model")
    pipe = Pipeline.from_pretrained(source, device="cpu", dtype="float32")
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    pipe.load_textual_inversion(vectors, token="<thing>")
    with bundles.traced_once(bundles.shared(tmp_path_factory)):
        out = pipe.export(tmp_path / "out", split=True)
    request = {"prompt": "a <thing>", "num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    deployed = Pipeline.from_pretrained(out, backend="onnxruntime")
    assert (deployed(**request).images - pipe(**request).images).abs().max() < 1e-3
    with pytest.raises(InputError, match="a bundle on onnxruntime, whose text encoder takes no new tokens"):
        deployed.load_textual_inversion(vectors, token="<other>")
    assert pipe.text_encoder.config.vocab == tiny.VOCABULARY  # as it was
