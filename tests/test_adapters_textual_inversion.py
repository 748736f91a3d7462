"""adapters/textual_inversion.py: what each form of file gives, and what bad files get."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastldm.adapters.textual_inversion import check_token, read_textual_inversion
from fastldm.errors import CheckpointError, InputError

THREE = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def written(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


A1111 = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": THREE},
    "name": "toy",
    "step": 9,
    "sd_checkpoint": None,
}
FORMS: dict[str, tuple[str, Any, str | None, dict[str, Tensor]]] = {
    "diffusers": ("a.safetensors", {"<toy>": THREE}, "<toy>", {"": THREE}),
    "diffusers pickle": ("learned_embeds.bin", {"<toy>": THREE}, "<toy>", {"": THREE}),
    "one vector": ("a.safetensors", {"<toy>": THREE[0].clone()}, "<toy>", {"": THREE[:1]}),
    "half": ("a.safetensors", {"<toy>": THREE.half()}, "<toy>", {"": THREE.half().float()}),
    "emb_params": ("nice hands.safetensors", {"emb_params": THREE}, "nice hands", {"": THREE}),
    "string_to_param": ("x.pt", A1111, "toy", {"": THREE}),
    "without a name": ("x.pt", {**A1111, "name": None}, "x", {"": THREE}),
    "parameter": ("x.pt", {**A1111, "string_to_param": {"*": torch.nn.Parameter(THREE)}}, "toy", {"": THREE}),
    "SDXL": (
        "y.safetensors",
        {"clip_g": THREE[:2].clone(), "clip_l": THREE},
        "y",
        {"clip_l": THREE, "clip_g": THREE[:2]},
    ),
    "a tensor": ("z.pt", THREE, None, {"": THREE}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_files_are_read(form: str, tmp_path: Path) -> None:
    name, content, token, vectors = FORMS[form]
    got = read_textual_inversion(written(tmp_path / name, content), allow_pickle=True)
    assert got.token == token
    assert {*got.vectors} == {*vectors}
    for key, expected in vectors.items():
        assert got.vectors[key].dtype == torch.float32
        assert torch.equal(got.vectors[key], expected)


def test_folders_and_names_in_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    written(tmp_path / "learned_embeds.safetensors", {"<a>": THREE})
    written(tmp_path / "deep" / "x.safetensors", {"<b>": THREE})
    assert read_textual_inversion(tmp_path).token == "<a>"
    assert read_textual_inversion(tmp_path, subfolder="deep", weight_name="x.safetensors").token == "<b>"


def test_pickles_need_permission(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt", A1111)
    with pytest.raises(CheckpointError, match=r"is a pickle, .*allow_pickle=True"):
        read_textual_inversion(path)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_no_code_of_a_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.pt").write_bytes(pickle.dumps({"string_to_param": {"*": Evil()}}, protocol=2))
    with pytest.raises(CheckpointError):
        read_textual_inversion("x.pt", allow_pickle=True)
    assert not Path("evil").exists()


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


NAN = torch.full((2, 32), float("nan"))
BAD: dict[str, tuple[Any, str]] = {
    "truncated": (
        header({"<a>": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}, bytes(8)),
        "is cut off, ",
    ),
    "empty": (b"", "is empty"),
    "garbage": (b"garbage " * 99, "is no safetensors file, or damaged"),
    "NaN": ({"<a>": NAN}, "has vectors with NaN or infinity"),
    "infinity in SDXL's": ({"clip_l": THREE, "clip_g": NAN / 0}, "clip_g has vectors with NaN"),
    "three dimensions": ({"<a>": torch.zeros(1, 2, 32)}, r"has vectors of shape \(1, 2, 32\), expected"),
    "a number": ({"<a>": torch.tensor(1.0)}, r"has vectors of shape \(\)"),
    "no vectors": ({"<a>": torch.zeros(0, 32)}, r"has vectors of shape \(0, 32\)"),
    "too many vectors": ({"<a>": torch.zeros(1025, 2)}, r"has vectors of shape \(1025, 2\)"),
    "integers": ({"<a>": torch.zeros(2, 32, dtype=torch.int32)}, "has vectors of dtype torch.int32"),
    "100,000 keys": (
        header(
            {f"k{k}": {"dtype": "U8", "shape": [1], "data_offsets": [k, k + 1]} for k in range(10**5)}, bytes(10**5)
        ),
        "it has 100,000 tensors, such as 'k",
    ),
    "SD 3": ({"clip_l": THREE, "clip_g": THREE.clone(), "t5xxl": THREE.clone()}, "it has 3 tensors"),
    "a LoRA": ({"a.lora_down.weight": THREE, "a.lora_up.weight": THREE.clone()}, "is no textual inversion"),
    "nothing": ({}, "it has 0 tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_textual_inversion(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


PICKLES: dict[str, tuple[Any, str]] = {
    "two parameters": (
        {"string_to_param": {"*": THREE, "+": THREE}, "name": "x"},
        "has 2 tensors in 'string_to_param'",
    ),
    "no dict of parameters": ({"string_to_param": [THREE], "name": "x"}, "has 0 tensors in 'string_to_param'"),
    "a list": ([THREE], "holds a list; a token's vectors were expected"),
    "texts": ({"a": "b"}, "it has 0 tensors"),
    "sparse": ({"<a>": THREE.to_sparse()}, "sparse"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_bad_pickles_are_refused(case: str, tmp_path: Path) -> None:
    content, message = PICKLES[case]
    with pytest.raises(CheckpointError, match=message):
        read_textual_inversion(written(tmp_path / "x.pt", content), allow_pickle=True)


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "a\0b", "\u2028", "a\u3000b", "x" * 201, "\ud800", 3, None])
def test_tokens_that_no_prompt_has(token: Any) -> None:
    with pytest.raises(InputError, match=r"token is .*: expected a text without spaces"):
        check_token(token)
    with pytest.raises(CheckpointError, match=r"a\.pt calls its token .* pass token= with another"):
        check_token(token, "a.pt")


WIDTHS = {"text_encoder": 768, "text_encoder_2": 1280}
SECOND = "text_encoder_2"
REFINER = {SECOND: 1280}


@pytest.mark.parametrize(
    ("vectors", "widths", "encoder", "message"),
    [
        (
            {"": (2, 1024)},
            {"text_encoder": 768},
            None,
            r"1024 channels, which are for SD 2; the model is X: its text encoder has 768\.",
        ),
        ({"": (2, 1280)}, WIDTHS, None, r"pass text_encoder=pipe\.text_encoder_2\.$"),
        ({"": (2, 768)}, WIDTHS, SECOND, r"768 channels, .*; the model is X: its text encoder has 1280\.$"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, {"text_encoder": 768}, None, "it has no second text encoder"),
        ({"clip_l": (2, 768), "clip_g": (2, 768)}, WIDTHS, None, "its text encoder has 1280"),
        ({"clip_l": (2, 768)}, REFINER, None, "it has no first text encoder"),
        ({"clip_l": (2, 768), "clip_g": (2, 768)}, REFINER, None, "its text encoder has 1280"),
        ({"": (2, 768)}, REFINER, None, r"which are for SD 1\.5, .* its text encoder has 1280\.$"),
        ({"clip_l": (2, 768)}, WIDTHS, SECOND, "has no vectors for this text encoder, only clip_l"),
    ],
)
def test_widths_name_the_model(
    vectors: dict[str, tuple[int, int]], widths: dict[str, int], encoder: str | None, message: str
) -> None:
    embedding = read_textual_inversion(THREE)
    object.__setattr__(embedding, "vectors", {key: torch.zeros(shape) for key, shape in vectors.items()})
    with pytest.raises(CheckpointError, match=message):
        embedding.fit(widths, "X", encoder, torch.float32)


def test_numbers_beyond_half_are_refused() -> None:
    embedding = read_textual_inversion({"<a>": torch.tensor([1e6, 0])})
    widths = {"text_encoder": 2}
    assert embedding.fit(widths, "X", None, torch.float32)["text_encoder"].tolist() == [[1e6, 0]]
    with pytest.raises(CheckpointError, match=r"numbers beyond torch\.float16"):
        embedding.fit(widths, "X", None, torch.float16)
