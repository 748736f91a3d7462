"""Every key of every file of a model, with every hostile value: it loads, or is one line that names file and key."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.errors import CheckpointError, FastLDMError, InputError
from fastldm.loading import spec as loading
from fastldm.loading.checkpoint import Checkpoint
from fastldm.loading.diffusers_folder import open_diffusers
from fastldm.samplers import table as schedule

HOSTILE: list[Any] = [
    None,
    True,
    False,
    "",
    "text",
    "x" * 5000,
    "\ud800\n",
    0,
    1,
    -1,
    3,
    10**9,
    10**12,
    10**30,
    1e12,
    1.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [1],
    [[1]],
    [1, 2, 3, 4],
    [0] * 4,
    [10**9] * 4,
    [None] * 4,
    ["text"] * 4,
    [math.nan] * 4,
    [1] * 1000,
    {},
    {"a": 1},
    {"content": 3},
]
SAMPLE = 30
Case = tuple[tuple[str, ...], Any]


def key_paths(config: dict[str, Any], depth: int) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (key,)
        if depth > 1 and isinstance(value, dict):
            yield from ((key, *inner) for inner in key_paths(dict(list(value.items())[:5]), depth - 1))


def cases(config: dict[str, Any], all_of_them: bool, depth: int = 1) -> list[Case]:
    every = [(keys, value) for keys in key_paths(config, depth) for value in HOSTILE]
    return every if all_of_them else random.Random(0).sample(every, min(SAMPLE, len(every)))


def changed(config: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    inner = changed(config[keys[0]], keys[1:], value) if len(keys) > 1 else value
    return {**config, keys[0]: inner}


def check(load: Callable[[], object], file: str, keys: tuple[str, ...], value: Any) -> None:
    try:
        load()
    except CheckpointError as refused:
        text = str(refused)
        assert text.isprintable(), (keys, value, text)
        assert len(text) < 1000, (keys, value, text)
        assert file in text or keys[0] in text, (keys, value, text)
    except BaseException as raw:  # a panic of a library in Rust is no Exception
        pytest.fail(f"{file}, {keys}, {value!r:.60}: {type(raw).__name__}: {raw}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("values")
    tiny.pipeline("sd1", vae=tiny.tiny_vae()).save_pretrained(base / "tiny-vae", max_shard_size="300KB")
    return {family: tiny.save_pipeline(family, base / family) for family in ("sd1", "sdxl")} | {
        "tiny-vae": base / "tiny-vae"
    }


def build(checkpoint: Checkpoint) -> None:
    """All that is made of the configs before weights are read, and a sampler's table."""
    spec = loading.spec_of(checkpoint)
    assert spec.parameters > 0
    assert min(spec.default_size) > 0
    with contextlib.suppress(InputError):  # what a sampler cannot do is said to who asks for it
        schedule.make_table(spec.schedule, 2)


FULL = pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "full"])


@FULL
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sd1", "unet"),
        ("sdxl", "unet"),
        ("sd1", "vae"),
        ("tiny-vae", "vae"),
        ("sd1", "text_encoder"),
        ("sdxl", "text_encoder_2"),
    ],
)
def test_values_of_components(folders: dict[str, Path], family: str, name: str, full: bool) -> None:
    checkpoint = open_diffusers(folders[family])
    component = checkpoint.components[name]
    for keys, value in cases(component.config, full):
        components = {**checkpoint.components, name: replace(component, config=changed(component.config, keys, value))}
        check(lambda components=components: build(replace(checkpoint, components=components)), name, keys, value)  # type: ignore[misc]


@FULL
@pytest.mark.parametrize("name", ["DDIM", "PNDM", "LCM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_values_of_schedulers(folders: dict[str, Path], name: str, full: bool) -> None:
    import diffusers

    checkpoint = open_diffusers(folders["sd1"])
    options = {"clip_sample": False} if name == "DDIM" else {"skip_prk_steps": True} if name == "PNDM" else {}
    config = json.loads(getattr(diffusers, f"{name}Scheduler")(**options).to_json_string())
    for keys, value in cases(config, full):
        edited = replace(checkpoint, scheduler=changed(config, keys, value))
        check(lambda edited=edited: build(edited), "scheduler_config.json", keys, value)  # type: ignore[misc]


@contextlib.contextmanager
def rewritten(path: Path, keys: tuple[str, ...], value: Any) -> Iterator[None]:
    content = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(changed(json.loads(content), keys, value)), encoding="utf-8")
    yield
    path.write_text(content, encoding="utf-8")


@FULL
@pytest.mark.parametrize(
    ("family", "name"),
    [("sd1", "model_index.json"), ("sdxl", "model_index.json"), ("tiny-vae", "unet/*.index.json")],
)
def test_values_of_indices(tmp_path: Path, folders: dict[str, Path], family: str, name: str, full: bool) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "model"))
    path = next(folder.glob(name))
    for keys, value in cases(json.loads(path.read_text()), full, depth=2):
        with rewritten(path, keys, value):
            check(lambda: loading.describe(folder), str(folder), keys, value)


@FULL
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"]
)
def test_values_of_tokenizers(tmp_path: Path, folders: dict[str, Path], name: str, full: bool) -> None:
    folder = Path(shutil.copytree(folders["sd1"] / "tokenizer", tmp_path / "tokenizer"))
    if name == "special_tokens_map.json":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / name).write_text(json.dumps({"pad_token": "!", "bos_token": {"content": "<|startoftext|>"}}))
    if name == "added_tokens.json":
        (folder / name).write_text(json.dumps({"<cat>": 1000, "<dog>": 1001}))
    for keys, value in cases(json.loads((folder / name).read_text(encoding="utf-8")), full, depth=3):
        with rewritten(folder / name, keys, value):
            check(lambda: Tokenizer(folder).ids("a cat <cat>"), str(folder), keys, value)


def test_error_says_what_is_expected(folders: dict[str, Path]) -> None:
    """A few of the messages, whole."""
    checkpoint = open_diffusers(folders["sd1"])

    def refused(name: str, **values: Any) -> str:
        component = checkpoint.components[name]
        components = {**checkpoint.components, name: replace(component, config={**component.config, **values})}
        with pytest.raises(FastLDMError) as error:
            loading.spec_of(replace(checkpoint, components=components))
        return str(error.value).removeprefix(f"{folders['sd1']}/")

    assert refused("text_encoder", num_hidden_layers=1e12) == (
        "text_encoder/config.json: 'num_hidden_layers' is 1000000000000.0, expected a whole number from 1 to 256"
    )
    assert refused("vae", scaling_factor=math.nan) == (
        "vae/config.json: 'scaling_factor' is nan, expected a number from 1e-06 to 1e+06"
    )
    assert refused("unet", layers_per_block=[2, "2", 2, 2]) == (
        "unet/config.json: 'layers_per_block[1]' is '2', expected a whole number from 1 to 64"
    )
