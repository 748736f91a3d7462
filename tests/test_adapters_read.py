"""Reading adapters' files: what fits, what is left, and files that are damaged or hostile."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import adapter_files
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from original_layout import full_size, write_sparse
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastldm.adapters.key_formats import TENSORS
from fastldm.adapters.read import MAX_KEYS, read_adapter, short_hash
from fastldm.adapters.targets import Target, modules_of
from fastldm.errors import CheckpointError, InputError
from fastldm.loading.spec import Spec, describe

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # (16, 16)
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"  # (16, 16, 3, 3)
FF = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2"  # (16, 64), with a bias


def lora(name: str, out: int, *inputs: int, rank: int = 2, alpha: float | None = 1.0) -> dict[str, Tensor]:
    ones = [1] * (len(inputs) - 1)
    state = {
        f"{name}.lora_down.weight": torch.randn(rank, *inputs),
        f"{name}.lora_up.weight": torch.randn(out, rank, *ones),
    }
    return state if alpha is None else state | {f"{name}.alpha": torch.tensor(alpha)}


def good() -> dict[str, Tensor]:
    return lora(LINEAR, 16, 16) | lora(CONV, 16, 16, 3, 3, rank=3) | lora(FF, 16, 64, alpha=None)


def spec() -> Spec:
    return adapter_files.spec("tiny-sd")


def written(folder: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(state, folder / "sketch.safetensors", metadata)
    return folder / "sketch.safetensors"


def test_adapter_says_what_it_is(tmp_path: Path) -> None:
    path = written(tmp_path, good())
    adapter = read_adapter(path, spec())
    assert (adapter.name, adapter.source, adapter.key_format) == ("sketch", str(path), "kohya")
    assert (adapter.rank, adapter.components, adapter.left) == (3, ("unet",), ())
    assert len(adapter.changes) == 3
    assert {adapter: 1}[adapter] == 1
    assert len({*adapter.changes.values()}) == 3
    down = adapter.changes[Target("unet", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2")].lora
    assert down is not None
    assert (down.scale, down.down.shape, down.up.shape) == (1.0, (2, 64), (16, 2))


def test_short_hash_leaves_out_the_header(tmp_path: Path) -> None:
    """As A1111's `addnet_hash_safetensors`: the same file with other metadata has the same."""
    first = written(tmp_path, good())
    data = first.read_bytes()
    expected = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    assert read_adapter(first, spec()).short_hash == expected
    save_file(load_file(first), tmp_path / "b.safetensors", {"ss_steps": "7"})
    assert short_hash(tmp_path / "b.safetensors") == expected


def test_file_may_change_after_it_was_read(tmp_path: Path) -> None:
    path = written(tmp_path, good())
    adapter = read_adapter(path, spec())
    before = {target: change.weight_delta(weight_of(target)) for target, change in adapter.changes.items()}
    with path.open("r+b") as file:
        file.seek(-256, 2)
        file.write(b"\xff" * 256)
    for target, change in adapter.changes.items():
        after = change.weight_delta(weight_of(target))
        assert after is not None
        assert torch.equal(after, before[target])  # type: ignore[arg-type]


def weight_of(target: Target) -> Tensor:
    return torch.zeros(modules_of(spec()).modules[target].weight)


# --- What fits ---


@cache
def full_spec(family: str, folder: Path) -> Spec:
    write_sparse(folder / f"{family}.safetensors", full_size(family))
    return describe(folder / f"{family}.safetensors")


def full_file(folder: Path, family: str) -> Path:
    """A LoRA of rank 1 of all attention of a full-size model, in the original layout's names."""
    state = {}
    for key, shape in full_size(family).items():
        name = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
        if key.startswith("model.diffusion_model.") and ".attn" in name and not name.endswith("bias"):
            state |= lora(f"lora_unet_{name.replace('.', '_')}", shape[0], shape[1], rank=1)
    return written(folder, {key: tensor.half() for key, tensor in state.items()})


def test_file_of_another_family_is_counted_and_named(tmp_path: Path) -> None:
    path = full_file(tmp_path, "sdxl")
    assert len(read_adapter(path, full_spec("sdxl", tmp_path)).changes) == 560
    with pytest.raises(CheckpointError, match=r"of 560 modules fit: this file is for SDXL, the model is SD 1\.5\."):
        read_adapter(path, full_spec("sd1", tmp_path))
    path = full_file(tmp_path, "sd1")
    with pytest.raises(CheckpointError, match=r"of 128 modules fit: this file is for SD 1\.5, the model is SDXL\."):
        read_adapter(path, full_spec("sdxl", tmp_path))


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_that_fits_is_an_error_either_way(strict: bool, tmp_path: Path) -> None:
    state = {}
    for k in range(5):
        state |= lora(f"lora_unet_double_blocks_{k}_img_attn_proj", 32, 32)
    with pytest.raises(
        CheckpointError, match=r"0 of 5 modules fit: this file is for FLUX.*, the model is of the family"
    ):
        read_adapter(written(tmp_path, state), spec(), strict=strict)


def test_partial_match_needs_strict_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = good() | lora("lora_unet_no_such_module", 4, 4) | lora(f"{LINEAR[:-1]}k", 16, 15)
    state["bundle_emb.thing.string_to_param"] = torch.zeros(2, 32)
    path = written(tmp_path, state)
    with pytest.raises(
        CheckpointError, match=r"3 of 5 modules fit.*belong to no module: 1, such as 'bundle_emb.*strict=False"
    ):
        read_adapter(path, spec())
    with caplog.at_level(logging.WARNING, "fastldm"):
        adapter = read_adapter(path, spec(), strict=False)
    assert "3 of 5 modules fit" in caplog.text
    assert len(adapter.changes) == 3
    assert len(adapter.left) == 3
    assert adapter.left[0].endswith("fits the model's weight (16, 16)")
    assert adapter.left[1:] == ("no_such_module: the model has no such module", "bundle_emb.thing.string_to_param")


def test_two_names_of_one_module_do_not_both_count(tmp_path: Path) -> None:
    original = lora("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", 16, 16)
    with pytest.raises(CheckpointError, match=r"3 of 4 modules fit.*changes unet\.down_blocks.*to_q twice"):
        read_adapter(written(tmp_path, good() | original), spec())


def test_pickle_is_read_only_if_allowed(tmp_path: Path) -> None:
    torch.save({"state_dict": good()}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_adapter(tmp_path / "a.bin", spec())
    assert len(read_adapter(tmp_path / "a.bin", spec(), allow_pickle=True).changes) == 3


@pytest.mark.parametrize("path", ["", 7, None, b"a"])
def test_path_must_be_one(path: Any) -> None:
    with pytest.raises(InputError, match="path is"):
        read_adapter(path, spec())


# --- Bad files ---


def changed(**tensors: Any) -> dict[str, Tensor]:
    """A good file with tensors of its linear layer replaced; None removes one."""
    state = good()
    for name, value in tensors.items():
        key = f"{LINEAR}.{name if name == 'alpha' else f'{name}.weight'}"
        state.pop(key, None)
        if value is not None:
            state[key] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "NaN": (changed(lora_up=torch.full((16, 2), torch.nan)), "holds NaN or infinity"),
    "infinity in half": (changed(lora_down=torch.full((2, 16), torch.inf).half()), "holds NaN or infinity"),
    "NaN in alpha": (changed(alpha=float("nan")), "holds NaN or infinity"),
    "alpha 0": (changed(alpha=0.0), "has an alpha of 0, expected a number above 0"),
    "negative alpha": (changed(alpha=-1.0), "has an alpha of -1"),
    "alpha of two numbers": (changed(alpha=[1.0, 2.0]), r"has alpha of shape \(2,\), expected one number"),
    "ranks": (changed(lora_up=torch.ones(16, 3)), r"different ranks: lora_down is \(2, 16\) and lora_up \(16, 3\)"),
    "exchanged": (
        lora(CONV, 16, 16, 3, 3)
        | {f"{FF}.lora_down.weight": torch.ones(16, 2), f"{FF}.lora_up.weight": torch.ones(2, 64)},
        "has up and down exchanged",
    ),
    "exchanged, square": (
        changed(lora_down=torch.ones(16, 2), lora_up=torch.ones(2, 16)),
        "has up and down exchanged",
    ),
    "no up": (changed(lora_up=None), "has alpha, lora_down and no lora_up: the file is incomplete"),
    "alpha alone": (changed(lora_up=None, lora_down=None), "has alpha, which is part of no form"),
    "vectors": (changed(lora_up=torch.ones(16), lora_down=torch.ones(16)), "expected matrices"),
    "empty": (changed(lora_up=torch.ones(16, 0), lora_down=torch.ones(0, 16)), r"has shape \(0, 16\), which is empty"),
    "integers": (changed(lora_up=torch.ones(16, 2, dtype=torch.int32)), "has dtype torch.int32"),
    "8-bit exponents": (changed(lora_up=torch.ones(16, 2).to(torch.float8_e8m0fnu)), "has dtype torch.float8_e8m0fnu"),
    "complex": (changed(lora_up=torch.ones(16, 2, dtype=torch.complex64)), "has dtype torch.complex64"),
    "two forms": (good() | {f"{LINEAR}.diff": torch.ones(16, 16)}, "has diff, which is part of no form"),
    "unknown tensor": (good() | {f"{LINEAR}.noise_scale": torch.ones(1)}, "has noise_scale, which is part of no form"),
    "unsupported": (good() | {f"{LINEAR}.oft_diag": torch.ones(4, 4)}, "an early form of OFT"),
    "control character": (good() | {"lora_unet_\x1b[2J.alpha": torch.ones(1)}, "no name of a module"),
    "long name": (good() | {f"lora_unet_{'x' * 500}.alpha": torch.ones(1)}, "no name of a module"),
    "traversal": (lora("lora_unet_../../../etc/passwd", 4, 4), "belong to no module"),
    "traversal with dots": (
        {f"unet.../../etc/passwd.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"},
        "0 of 1 modules fit",
    ),
    "ControlNet": ({"control_model.input_hint_block.0.weight": torch.ones(1)}, "it is a ControlNet"),
    "model": ({"down_blocks.0.conv.weight": torch.ones(1)}, "its keys are like 'down_blocks.0.conv.weight'"),
    "nothing": ({}, r"its keys are like '\(none\)'"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fault", BAD)
def test_bad_file_is_one_error(fault: str, strict: bool, tmp_path: Path) -> None:
    state, message = BAD[fault]
    path = written(tmp_path, state)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(path, spec(), strict=strict)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.isprintable()
    assert len(text) < 1000


def test_too_many_tensors_are_refused_at_once(tmp_path: Path) -> None:
    count = 100_000
    entries = {f"lora_unet_{k}.alpha": {"dtype": "U8", "shape": [1], "data_offsets": [k, k + 1]} for k in range(count)}
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(count))
    with pytest.raises(CheckpointError, match=f"has 100,000 tensors, expected at most {MAX_KEYS:,}"):
        read_adapter(tmp_path / "a.safetensors", spec())


def test_truncated_file_is_an_error_at_any_length(tmp_path: Path) -> None:
    data = written(tmp_path, good()).read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_adapter(tmp_path / "cut.safetensors", spec())


def test_missing_file_and_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_adapter(path, spec())


KEYS = st.tuples(st.sampled_from([LINEAR, CONV, FF, "lora_unet_conv_norm_out"]), st.sampled_from([*TENSORS, "x"]))
SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 16, 64]), max_size=4)
ANY_FILE = st.dictionaries(KEYS, SHAPES, min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=ANY_FILE)
def test_any_tensors_are_read_or_refused(content: dict[tuple[str, str], list[int]], tmp_path: Path) -> None:
    """Whatever is accepted has a finite change of the weight's shape."""
    state = {f"{name}.{tensor}": torch.ones(shape) for (name, tensor), shape in content.items()}
    try:
        adapter = read_adapter(written(tmp_path, state), spec(), strict=False)
    except CheckpointError:
        return
    for target, change in adapter.changes.items():
        weight = weight_of(target) + 0.5
        delta = change.weight_delta(weight)
        assert delta is None or (delta.shape == weight.shape and bool(delta.isfinite().all()))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1000), byte=st.integers(0, 255))
def test_damaged_header_is_read_or_refused(at: int, byte: int, tmp_path: Path) -> None:
    data = bytearray(written(tmp_path, good()).read_bytes())
    data[at] = byte
    (tmp_path / "b.safetensors").write_bytes(data)
    with suppress(CheckpointError):
        read_adapter(tmp_path / "b.safetensors", spec(), strict=False)
