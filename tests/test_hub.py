"""Hub ids: what is fetched, what is taken from the local cache, and what each failure is called."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from states import same_as

from fastldm.errors import CheckpointError
from fastldm.loading import hub as hub_module
from fastldm.loading.hub import resolve
from fastldm.loading.open_checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline("sd1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipe` as diffusers saves it; tests that change it copy it first."""
    return tiny.save_pipeline("sd1", tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


class Hub:
    """One repository, "acme/tiny", in a folder; records what is fetched from it."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache, self.fetched = repository, cache, set[str]()
        self.failing: Exception | None = None
        self.calls: list[dict[str, Any]] = []

    def _snapshot(self, revision: str | None) -> Path:
        assert revision in (None, "main", "v2", "c0ffee")
        return self.cache / "snapshots" / "c0ffee"

    def _copy(self, name: str, revision: str | None) -> Path:
        target = self._snapshot(revision) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.repository / name, target)
        self.fetched.add(name)
        return target

    def hf_hub_download(self, repo: str, name: str, **options: Any) -> str:
        self.calls.append(options)
        assert repo == "acme/tiny"
        if self.failing:
            raise self.failing
        return str(self._copy(name, options["revision"]))

    def names(self) -> list[str]:
        return [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]

    def model_info(self, repo: str, *, revision: str, timeout: float) -> SimpleNamespace:
        assert revision == "c0ffee"
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names()])

    def snapshot_download(self, repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append(options)
        for name in filter_repo_objects(self.names(), allow_patterns=allow_patterns):
            self._copy(name, options["revision"])
        return str(self._snapshot(options["revision"]))


@pytest.fixture
def hub(pipe: Any, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository like those people publish: two precisions, pickles, a checker, and a single file in its root."""
    import huggingface_hub

    deepcopy(pipe).to(torch.float16).save_pretrained(copied, variant="fp16")
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (copied / "unet" / "openvino_model.bin").write_bytes(b"other")
    (copied / "safety_checker").mkdir()
    (copied / "safety_checker" / "model.safetensors").write_bytes(b"large")
    (copied / "v1-5-pruned.safetensors").write_bytes(b"large")
    (copied / "README.md").write_text("hello")
    stand_in = Hub(copied, tmp_path / "cache")
    for name in ("hf_hub_download", "model_info", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(stand_in, name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return stand_in


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_hub_fetches_only_what_is_needed(pipe: Any, hub: Hub, variant: str | None) -> None:
    checkpoint = open_checkpoint("acme/tiny", variant=variant, revision="v2", cache_dir=hub.cache)
    dot = f".{variant}" if variant else ""
    tokenizer = {f"tokenizer/{path.name}" for path in (hub.repository / "tokenizer").iterdir()}
    assert hub.fetched == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *tokenizer,
        "unet/config.json",
        f"unet/diffusion_pytorch_model{dot}.safetensors",
        "vae/config.json",
        f"vae/diffusion_pytorch_model{dot}.safetensors",
        "text_encoder/config.json",
        f"text_encoder/model{dot}.safetensors",
    }
    assert [call["revision"] for call in hub.calls] == ["v2", "c0ffee"]
    assert {call["cache_dir"] for call in hub.calls} == {str(hub.cache)}
    dtype = torch.float16 if variant else torch.float32
    assert same_as(pipe.unet, checkpoint.components["unet"].state(), dtype)


def test_hub_fetches_shards(pipe: Any, hub: Hub) -> None:
    (hub.repository / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(hub.repository / "unet", max_shard_size="300KB")
    checkpoint = open_checkpoint("acme/tiny")
    assert same_as(pipe.unet, checkpoint.components["unet"].state())
    assert not any("fp16" in name for name in hub.fetched)


def test_hub_refuses_before_it_fetches_weights(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r'acme/tiny/unet has no variant "bf16".*no variant or variant="fp16"'):
        open_checkpoint("acme/tiny", variant="bf16")
    for path in hub.repository.rglob("diffusion_pytorch_model*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="acme/tiny/unet has only pickled weights"):
        open_checkpoint("acme/tiny")
    assert hub.fetched == {"model_index.json"}


def _hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    return kind("told by the hub") if name in ("EntryNotFoundError", "LocalEntryNotFoundError") else kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "acme/tiny is gated: accept its conditions"),
        ("RepositoryNotFoundError", "There is no folder acme/tiny here and no such model on the hub"),
        ("RevisionNotFoundError", "acme/tiny has no revision 'v2' on the hub"),
        ("EntryNotFoundError", r"acme/tiny at revision v2 has no model_index\.json: it is not a diffusers pipeline"),
        (
            "LocalEntryNotFoundError",
            "is neither a folder here nor in the local hub cache, and the hub cannot be reached",
        ),
    ],
)
def test_hub_errors_become_one_sentence(hub: Hub, error: str, message: str) -> None:
    hub.failing = _hub_error(error)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("acme/tiny", revision="v2")
    hub.failing = TimeoutError("slow")
    with pytest.raises(CheckpointError, match="acme/tiny cannot be downloaded from the hub: slow"):
        open_checkpoint("acme/tiny")


def test_unreachable_hub_falls_back_to_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    open_checkpoint("acme/tiny")

    def unreachable(*_: Any, **__: Any) -> SimpleNamespace:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    assert open_checkpoint("acme/tiny").source == str(hub.cache / "snapshots" / "c0ffee")
    assert "the hub cannot be reached (no route); trying the local cache" in caplog.text


@pytest.fixture
def cache(copied: Path, tmp_path: Path) -> Path:
    """huggingface_hub's own cache with "acme/tiny" in it, for its real functions with no network."""
    root = tmp_path / "hub"
    snapshot = root / "models--acme--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(copied, snapshot)
    (root / "models--acme--tiny" / "refs").mkdir()
    (root / "models--acme--tiny" / "refs" / "main").write_text("a" * 40)
    return root


def test_offline_uses_local_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "model_info", None)  # a call would raise
    real = huggingface_hub.hf_hub_download

    def download(*names: str, local_files_only: bool, **options: Any) -> str:
        assert local_files_only
        return real(*names, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    matches = resolve("acme/tiny", cache_dir=cache, local_files_only=True)
    assert matches == cache / "models--acme--tiny" / "snapshots" / ("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("acme/tiny", cache_dir=cache) == matches
    assert resolve("acme/tiny", cache_dir=cache, revision="a" * 40) == matches
    for path in (matches / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="acme/tiny in the local hub cache/unet has no weights"):
        resolve("acme/tiny", cache_dir=cache)
    with pytest.raises(
        CheckpointError, match="acme/other is neither a folder here nor in the local hub cache, and the hub was not"
    ):
        resolve("acme/other", cache_dir=cache)


def test_local_paths_never_reach_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub_module, "_from_hub", called)
    monkeypatch.chdir(folder.parent.parent)
    relative = f"{folder.parent.name}/{folder.name}"  # a path that would pass for a hub id
    assert open_checkpoint(relative).components["unet"].files[0].is_file()
    for name in (str(tmp_path / "gone"), "./gone/model", "gone", "a/b/c", "models/gone.safetensors", "https://host/x"):
        with pytest.raises(
            CheckpointError, match=r"does not exist here\. Give a model folder, a \.safetensors file, or a hub id"
        ):
            open_checkpoint(name)
