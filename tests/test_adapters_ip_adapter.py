"""adapters/ip_adapter.py: files as they are published, and what other and bad ones get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_files
import ip_adapters
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastldm.adapters.ip_adapter import read_ip_adapter
from fastldm.errors import CheckpointError, InputError


def spec(family: str = "sd1") -> Any:
    return adapter_files.spec(family)


@pytest.fixture(scope="module")
def contents() -> dict[str, ip_adapters.State]:
    unet = tiny.unet("sd1")
    return {kind: ip_adapters.state(unet, kind) for kind in ip_adapters.KINDS}


@pytest.mark.parametrize("kind", ip_adapters.KINDS)
def test_safetensors_pickles_and_dicts_are_one(
    kind: str, contents: dict[str, ip_adapters.State], tmp_path: Path
) -> None:
    save_file(ip_adapters.flat(contents[kind]), tmp_path / "a.safetensors")
    torch.save(contents[kind], tmp_path / "a.bin")
    sources: list[Any] = [tmp_path / "a.safetensors", tmp_path / "a.bin", contents[kind]]
    sources.append(ip_adapters.flat(contents[kind]))
    adapters = [read_ip_adapter(source, spec(), allow_pickle=True) for source in sources]
    first = adapters[0].network
    assert first.config.kind == kind
    assert first.config.tokens == {"base": 4, "plus": 4, "full": 0}[kind]
    for adapter in adapters[1:]:
        assert adapter.network.config == first.config
        for name, tensor in adapter.network.state_dict().items():
            assert torch.equal(tensor, first.state_dict()[name]), name
    assert [adapter.name for adapter in adapters] == ["a", "a", "the given dict", "the given dict"]
    assert adapters[0].short_hash is not None
    assert adapters[2].short_hash is None
    with pytest.raises(CheckpointError, match=r"is a pickle, .*allow_pickle=True"):
        read_ip_adapter(tmp_path / "a.bin", spec())


def test_weights_are_copies_in_the_models_dtype(contents: dict[str, ip_adapters.State], tmp_path: Path) -> None:
    content = ip_adapters.flat(contents["base"])
    adapter = read_ip_adapter(content, spec(), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in adapter.network.state_dict().values()} == {torch.bfloat16}
    own = adapter.network.image_proj.norm.weight.clone()
    content["image_proj.norm.weight"].fill_(9)
    assert torch.equal(adapter.network.image_proj.norm.weight, own)


def test_other_models_are_named() -> None:
    sdxl = ip_adapters.state(tiny.unet("sdxl"))
    with pytest.raises(
        CheckpointError, match=r"is for another U-Net, the model is .*: it has \d+ attentions of 72 chan"
    ):
        read_ip_adapter(sdxl, spec())
    wide = {part: dict(tensors) for part, tensors in sdxl.items()}
    wide["image_proj"]["norm.weight"], wide["image_proj"]["proj.weight"] = torch.ones(2048), torch.zeros(8192, 20)
    with pytest.raises(
        CheckpointError, match=r"this IP-Adapter is for SDXL, the model is .*of 2048 channels, the model"
    ):
        read_ip_adapter(wide, spec())


OTHERS = {
    "FaceID": ({"image_proj.proj.0.weight": 1, "image_proj.norm.weight": 1}, "is an IP-Adapter FaceID: fastldm reads"),
    "FaceID with LoRA": ({"ip_adapter.0.to_q_lora.down.weight": 1, "image_proj.a": 1}, "is an IP-Adapter FaceID: "),
    "FaceID Plus": (
        {
            "image_proj.perceiver_resampler.proj_in.weight": 1,
            "image_proj.norm.weight": 1,
            "image_proj.proj.0.weight": 1,
        },
        "is an IP-Adapter FaceID Plus",
    ),
    "SD 3": ({"image_proj.time_in.weight": 1, "ip_adapter.0.to_k_ip.weight": 1}, "for Stable Diffusion 3"),
    "FLUX": ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": 1}, "an IP-Adapter for FLUX"),
    "a LoRA": ({"lora_unet_a.lora_down.weight": 1, "lora_unet_a.lora_up.weight": 1}, "no IP-Adapter: it is a LoRA"),
    "no projection": ({"ip_adapter.1.to_k_ip.weight": 1}, "is no IP-Adapter: it is an IP-Adapter"),
    "nothing": ({}, r"is no IP-Adapter: its keys are like '\(none\)'"),
    "something": ({"x": 1}, "is no IP-Adapter: its keys are like 'x'"),
    "too many": ({f"ip_adapter.{k}.to_k_ip.weight": 1 for k in range(30_001)}, "has 30,001 tensors, expected at most"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(name: str) -> None:
    shapes, message = OTHERS[name]
    with pytest.raises(CheckpointError, match=message):
        read_ip_adapter({key: torch.zeros(1, 1) for key in shapes}, spec())


def changed(content: ip_adapters.State, **changes: Tensor | None) -> dict[str, Tensor]:
    flat = {**ip_adapters.flat(content), **changes}
    return {key: tensor for key, tensor in flat.items() if tensor is not None}


KV, ODD = "ip_adapter.1.to_k_ip.weight", "ip_adapter.2.to_k_ip.weight"
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "NaN": ("base", {KV: torch.full((16, 32), float("nan"))}, f"'{KV}' holds NaN or infinity in float32"),
    "integers": ("base", {KV: torch.zeros(16, 32, dtype=torch.int32)}, "expected floating point numbers"),
    "a missing layer": ("base", {KV: None}, r"it has 15\.5 attentions of 32 channels, the model 16"),
    "an even id": ("base", {KV: None, ODD: torch.zeros(16, 32)}, f"holds '{ODD}', which no IP-Adapter of this model"),
    "an id beyond": ("base", {KV: None, "ip_adapter.33.to_k_ip.weight": torch.zeros(16, 32)}, "which no IP-Adapter of"),
    "another part": ("base", {KV: None, "ip_adapter.1.to_z": torch.zeros(16, 32)}, r"'ip_adapter\.1\.to_z'"),
    "another shape": ("base", {KV: torch.zeros(8, 32)}, r"has shape \(8, 32\), expected \(16, 32\)"),
    "a vector": ("base", {"image_proj.proj.weight": torch.zeros(9)}, "is built as no IP-Adapter"),
    "no norm": ("base", {"image_proj.norm.weight": None}, r"'norm\.weight' is missing"),
    "no bias": ("base", {"image_proj.norm.bias": None}, r"lacks 1 tensors, such as image_proj\.norm\.bias"),
    "one more": ("base", {"image_proj.more": torch.zeros(1)}, r"holds 'image_proj\.more', which no IP-Adapter has"),
    "empty": ("base", {"image_proj.norm.weight": torch.zeros(0)}, r"has shape \(0,\), which is empty"),
    "layers left out": ("plus", {"image_proj.layers.9.1.0.weight": torch.zeros(40)}, "lacks"),
    "many layers": ("plus", {"image_proj.layers.9999.1.0.weight": torch.zeros(40)}, "it has 10000 layers"),
    "odd heads": ("plus", {"image_proj.layers.0.0.to_q.weight": torch.zeros(100, 40)}, "has 100 channels, expected he"),
    "half a layer": ("plus", {"image_proj.layers.0.0.to_kv.weight": torch.zeros(255, 40)}, r"expected \(256, 40\)"),
    "no queries": ("plus", {"image_proj.latents": None}, "'latents' is missing"),
    "short projection": ("full", {"image_proj.proj.0.weight": None}, r"'proj\.0\.weight' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case: str, contents: dict[str, ip_adapters.State]) -> None:
    kind, changes, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_ip_adapter(changed(contents[kind], **changes), spec())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_numbers_beyond_half_are_refused(contents: dict[str, ip_adapters.State]) -> None:
    with pytest.raises(CheckpointError, match="holds NaN or infinity in float16"):
        read_ip_adapter(changed(contents["base"], **{KV: torch.full((16, 32), 1e6)}), spec(), dtype=torch.float16)


def test_truncated_files_and_wrong_arguments(contents: dict[str, ip_adapters.State], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(ip_adapters.flat(contents["base"]), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is cut off"):
        read_ip_adapter(path, spec())
    with pytest.raises(InputError, match="allow_pickle is 3"):
        read_ip_adapter(path, spec(), allow_pickle=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pretrained_model_name_or_path is 3"):
        read_ip_adapter(3, spec())  # type: ignore[arg-type]
