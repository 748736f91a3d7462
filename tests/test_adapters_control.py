"""Reading ControlNets and T2I-Adapters: every layout, what does not fit, and files that are damaged or hostile."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_files
import controls
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from original_layout import cldm_controlnet, full_controlnet, full_size, random_state, write_sparse
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastldm.adapters.control import Control, read_control
from fastldm.errors import CheckpointError, InputError
from fastldm.loading.spec import Spec, describe
from fastldm.models.config import UNetConfig
from fastldm.models.controlnet import ControlNet
from fastldm.models.t2i_adapter import T2IAdapter, feature_places


def spec(family: str) -> Spec:
    return adapter_files.spec(family)


def same_weights(control: Control, theirs: nn.Module) -> bool:
    ours, expected = control.network.state_dict(), theirs.state_dict()
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


# --- diffusers' folders, files and modules ---


@pytest.mark.parametrize("name", controls.CONTROLNETS)
def test_controlnet_folder_file_and_module_are_one(name: str, tmp_path: Path) -> None:
    family, own = controls.CONTROLNETS[name]
    theirs = controls.controlnet(name)
    theirs.save_pretrained(tmp_path / "outlines")
    folder = read_control(tmp_path / "outlines", spec(family))
    file = tmp_path / "outlines" / "diffusion_pytorch_model.safetensors"
    pooled = own.get("global_pool_conditions", False)
    single = read_control(file, spec(family), global_pool_conditions=pooled)
    module = read_control(theirs, spec(family))
    for control in (folder, single, module):
        assert isinstance(control.network, ControlNet)
        assert same_weights(control, theirs)
    config = folder.network.config
    assert module.network.config == config
    # A single file is rgb, and the U-Net beyond the encoder is the model's.
    unet = dataclasses.replace(single.network.config.unet, up=config.unet.up, sample_size=config.unet.sample_size)
    assert dataclasses.replace(single.network.config, bgr=config.bgr, unet=without_text(unet)) == dataclasses.replace(
        config, unet=without_text(config.unet)
    )
    assert (folder.name, single.name, module.name) == ("outlines", file.stem, "controlnet")
    data = file.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert folder.short_hash == single.short_hash == hashlib.sha256(tensors).hexdigest()[:12]
    assert module.short_hash is None


def without_text(unet: UNetConfig) -> UNetConfig:
    """Heads of levels without attention do not matter."""
    down = tuple(
        dataclasses.replace(level, heads=1) if level.depths[0] is None else level for level in (*unet.down, unet.mid)
    )
    return dataclasses.replace(unet, down=down[:-1], mid=down[-1])


@pytest.mark.parametrize("name", controls.T2I_ADAPTERS)
def test_t2i_folder_file_and_module_are_one(name: str, tmp_path: Path) -> None:
    family, _ = controls.T2I_ADAPTERS[name]
    theirs = controls.t2i_adapter(name)
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors", theirs):
        control = read_control(source, spec(family))
        assert isinstance(control.network, T2IAdapter)
        assert same_weights(control, theirs)
    assert read_control(tmp_path, spec(family)).network.config == control.network.config


def test_weights_are_copied_in_the_wanted_dtype(tmp_path: Path) -> None:
    theirs = controls.controlnet("sd1")
    for source in (theirs, tmp_path):
        theirs.save_pretrained(tmp_path)
        control = read_control(source, spec("sd1"))
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        file.write_bytes(bytes(file.stat().st_size))
        theirs.conv_in.weight.data += 1
        assert not torch.equal(control.network.conv_in.weight, theirs.conv_in.weight)  # type: ignore[union-attr,arg-type]
        assert torch.equal(control.network.conv_in.weight + 1, theirs.conv_in.weight)  # type: ignore[union-attr,operator]
    half = read_control(theirs, spec("sd1"), dtype=torch.float16)
    assert {parameter.dtype for parameter in half.network.parameters()} == {torch.float16}


def test_shards_variants_and_pickles_are_as_of_models(tmp_path: Path) -> None:
    theirs = controls.controlnet("sd1")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert same_weights(read_control(tmp_path / "shards", spec("sd1")), theirs)
    theirs.save_pretrained(tmp_path / "variant", variant="fp16")
    assert same_weights(read_control(tmp_path / "variant", spec("sd1"), variant="fp16"), theirs)
    with pytest.raises(CheckpointError, match='load with variant="fp16"'):
        read_control(tmp_path / "variant", spec("sd1"))
    theirs.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    for path in (tmp_path / "pickle", tmp_path / "a.pth"):
        with pytest.raises(CheckpointError, match="pickle"):
            read_control(path, spec("sd1"))
        assert same_weights(read_control(path, spec("sd1"), allow_pickle=True), theirs)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fetched of the repository "acme/controlnet-1.0", which is the folder `tmp_path / "repository"`."""
    import huggingface_hub

    root, names = tmp_path / "repository", list[str]()

    def download(repo: str, name: str, **options: Any) -> str:
        names.append(name)
        return str(root / name)

    def info(repo: str, **options: Any) -> SimpleNamespace:
        assert repo == "acme/controlnet-1.0"
        files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "model_info", info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return names


def test_hub_id_fetches_what_is_needed(fetched: list[str], tmp_path: Path) -> None:
    theirs = controls.controlnet("sd1")
    theirs.save_pretrained(tmp_path / "repository")
    theirs.save_pretrained(tmp_path / "repository", variant="fp16")
    theirs.save_pretrained(tmp_path / "repository" / "inside", max_shard_size="200KB")
    control = read_control("acme/controlnet-1.0", spec("sd1"))
    assert same_weights(control, theirs)
    assert control.name == "controlnet-1.0"
    assert fetched == ["config.json", "diffusion_pytorch_model.safetensors"]
    fetched.clear()
    control = read_control("acme/controlnet-1.0", spec("sd1"), subfolder="inside")
    assert same_weights(control, theirs)
    assert {*fetched} == {f"inside/{path.name}" for path in (tmp_path / "repository" / "inside").iterdir()}
    with pytest.raises(CheckpointError, match=r"acme/controlnet-1\.0/none has no weights"):
        read_control("acme/controlnet-1.0", spec("sd1"), subfolder="none")
    with pytest.raises(InputError, match=r"subfolder is '\.\./x'"):
        read_control("acme/controlnet-1.0", spec("sd1"), subfolder="../x")


def test_weight_name_is_a_file_inside(fetched: list[str], tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    theirs = controls.t2i_adapter("light")
    for name in ("canny", "depth"):
        save_file(theirs.state_dict(), tmp_path / "repository" / f"{name}.safetensors")
    for source in ("acme/controlnet-1.0", tmp_path / "repository"):
        control = read_control(source, spec("sd1"), weight_name="depth.safetensors")
        assert control.name == "depth"
        assert same_weights(control, theirs)
    assert fetched == ["depth.safetensors"]


def test_changed_module_is_refused() -> None:
    theirs = controls.controlnet("sd1")
    theirs.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(CheckpointError, match="has the hook"):
        read_control(theirs, spec("sd1"))
    with pytest.raises(InputError, match="a Linear: expected a path, or a ControlNetModel"):
        read_control(nn.Linear(2, 2), spec("sd1"))


# --- the original layout ---

# Widths as of tiny.UNETS, in cldm's terms: channels, their multiples, depths, the text's channels.
CLDM: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "sd1": ((1, 2, 3, 3), {"depth": (1, 1, 1, 0), "context": 32}),
    "sd2": ((1, 2, 3, 3), {"depth": (1, 1, 1, 0), "context": 32, "linear": True}),
    "sdxl": ((1, 2, 3), {"depth": (0, 2, 3), "context": 72, "linear": True, "label": 72}),
}


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("family", CLDM)
def test_original_controlnet_equals_diffusers_conversion(family: str, prefix: str, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    mult, options = CLDM[family]
    state = random_state(cldm_controlnet(16, mult, hint=(4, 6, 8, 8), **options))
    theirs = convert_controlnet_checkpoint(dict(state), {"layers_per_block": 2})
    state = {prefix + key: tensor for key, tensor in state.items()}
    if prefix:  # the rest of the model may be in the file too
        state["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "control.safetensors")
    control = read_control(tmp_path / "control.safetensors", spec(family))
    ours = control.network.state_dict()
    left_out = {"add_embedding.linear_1", "add_embedding.linear_2"}  # diffusers does not convert those
    assert {name for name in ours if name.rpartition(".")[0] not in left_out} == set(theirs)
    assert all(torch.equal(ours[name], tensor.reshape(ours[name].shape)) for name, tensor in theirs.items())
    if family == "sdxl":
        assert torch.equal(ours["add_embedding.linear_2.bias"], state[f"{prefix}label_emb.0.2.bias"])
    assert control.network.config.hint_channels == (4, 6, 8, 8)  # type: ignore[union-attr]


def original_t2i(theirs: nn.Module, layers: int, light: bool) -> dict[str, Tensor]:
    """The state under the names of TencentARC's adapter.py: full layers numbered through, light ones in `body`."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        words = name.removeprefix("adapter.").split(".")
        if words[0] == "body" and light:
            words = ["body" if word == "resnets" else word for word in words]
        elif words[0] == "body" and words[2] == "in_conv":
            words[1] = str(layers * int(words[1]))
        elif words[0] == "body":
            words = ["body", str(layers * int(words[1]) + int(words[3])), *words[4:]]
        state[".".join(words)] = tensor
    return state


@pytest.mark.parametrize("name", ["full", "full-grey", "light"])
def test_original_t2i_adapter_is_read(name: str, tmp_path: Path) -> None:
    theirs = controls.t2i_adapter(name)
    config = controls.T2I_ADAPTERS[name][1]
    state = original_t2i(theirs, config.get("num_res_blocks", 2), name == "light")
    assert not state.keys() & theirs.state_dict().keys()
    save_file(state, tmp_path / "a.safetensors")
    control = read_control(tmp_path / "a.safetensors", spec("sd1"))
    assert same_weights(control, theirs)


# --- what does not fit ---


@pytest.fixture(scope="module")
def full_specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Spec]:
    folder = tmp_path_factory.mktemp("models")
    specs = {}
    for family in ("sd1", "sd2", "sdxl"):
        write_sparse(folder / f"{family}.safetensors", full_size(family))
        specs[family] = describe(folder / f"{family}.safetensors")
    return specs


def test_family_of_another_model_is_named(full_specs: dict[str, Spec], tmp_path: Path) -> None:
    names = {"sd1": "SD 1.5", "sd2": "SD 2", "sdxl": "SDXL"}
    for family, theirs in names.items():
        write_sparse(tmp_path / "control.safetensors", full_controlnet(family))
        for other, ours in names.items():
            if other != family:
                with pytest.raises(CheckpointError, match=rf"this ControlNet is for {theirs}, the model is {ours}"):
                    read_control(tmp_path / "control.safetensors", full_specs[other])


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "parameters"), [("sd1", 361_279_120), ("sd2", 364_228_240), ("sdxl", 1_251_014_160)]
)
def test_published_sizes_are_read(family: str, parameters: int, full_specs: dict[str, Spec], tmp_path: Path) -> None:
    write_sparse(tmp_path / "control.safetensors", full_controlnet(family))
    network = read_control(tmp_path / "control.safetensors", full_specs[family], dtype=torch.float16).network
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_t2i_family_of_another_model_is_named(full_specs: dict[str, Spec]) -> None:
    with torch.device("meta"):
        full = tiny.peer("diffusers").T2IAdapter()
        xl = tiny.peer("diffusers").T2IAdapter(adapter_type="full_adapter_xl", downscale_factor=16)
    with pytest.raises(CheckpointError, match=r"this T2I-Adapter is for SDXL, the model is SD 1\.5"):
        read_control(xl, full_specs["sd1"])
    with pytest.raises(CheckpointError, match=r"this T2I-Adapter is for SD 1\.5 or SD 2, the model is SDXL"):
        read_control(full, full_specs["sdxl"])


def test_published_sizes_fit_their_models(full_specs: dict[str, Spec]) -> None:
    """Those of TencentARC's adapters, which have a feature less for SD 1."""
    assert feature_places(full_specs["sdxl"].unet) == ((320, 2), (640, 2), (1280, 4), (1280, 4))
    assert feature_places(full_specs["sd1"].unet) == ((320, 1), (640, 2), (1280, 4), (1280, 8), (1280, 8))


@pytest.mark.parametrize(
    ("name", "family", "changes", "message"),
    [
        ("sd1", "sd1", {"layers_per_block": 1}, "its levels have 16 channels x 1"),
        ("sd1", "sd1", {"cross_attention_dim": 40}, "reads text of 40 channels, and the model's has 32"),
        ("sd1", "sd1", {"in_channels": 9}, "reads latents of 9 channels, and the model's have 4"),
        ("sd1", "sd1", {"conditioning_channels": 4}, "pictures of 4 channels, expected 3"),
        ("small", "sd1", {}, "its levels have"),
        ("sd1", "sd1", {"conditioning_embedding_out_channels": (4, 6)}, "for each 2 pixels, and the model for each 8"),
        ("sdxl", "sdxl", {"projection_class_embeddings_input_dim": 80}, "reads pooled text and sizes"),
        ("sdxl", "sd1", {}, "its levels have"),
    ],
)
@pytest.mark.parametrize("single", [True, False])
def test_misfits_are_named(
    name: str, family: str, changes: dict[str, Any], message: str, single: bool, tmp_path: Path
) -> None:
    controls.controlnet(name, **changes).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors" if single else tmp_path
    with pytest.raises(CheckpointError, match=message):
        read_control(path, spec(family))


def test_controlnet_fits_an_inpainting_model(tmp_path: Path) -> None:
    assert read_control(controls.controlnet("sd1"), spec("sd1-inpaint")).network.config.unet.in_channels == 4  # type: ignore[union-attr]


# --- what is not read ---

OTHER: dict[str, tuple[str, str]] = {
    "LLLite": ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight", "LLLite"),
    "Control-LoRA": ("lora_controlnet", "a Control-LoRA"),
    "difference": ("difference", "as the difference from a model"),
    "Union": ("control_add_embedding.linear_1.weight", r"a ControlNet Union \(ControlNet\+\+\)"),
    "fuser": ("spatial_feat_mapping.0.1.weight", "the fuser of CoAdapters"),
    "XS": ("control_to_base_for_conv_in.weight", "a ControlNet-XS"),
    "video": ("down_blocks.0.motion_modules.0.norm.weight", "for video"),
    "BrushNet": ("brushnet_down_blocks.0.weight", "BrushNet"),
    "style": ("style_embedding", "a style adapter"),
    "FLUX": ("controlnet_x_embedder.weight", "for FLUX"),
    "SD 3": ("transformer_blocks.0.attn.to_q.weight", "Stable Diffusion 3 or another"),
    "IP-Adapter": ("ip_adapter.1.to_k_ip.weight", "it is an IP-Adapter"),
    "FaceID": ("image_proj.proj.0.weight", "it is an IP-Adapter"),
    "LoRA": ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "it is a LoRA"),
    "U-Net": ("down_blocks.0.resnets.0.conv1.weight", "it is a U-Net alone"),
    "VAE": ("first_stage_model.decoder.conv_in.weight", "it is a VAE alone"),
    "anything": ("some.key", r"its keys are like 'some\.key'"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    key, message = OTHER[kind]
    save_file({key: torch.ones(4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_control(tmp_path / "a.safetensors", spec("sd1"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ControlNetUnionModel", "a ControlNet Union"),
        ("ControlNetXSAdapter", "a ControlNet-XS"),
        ("SparseControlNetModel", "for video"),
        ("FluxControlNetModel", "of another family"),
        ("MultiAdapter", "several in one"),
        ("UNet2DConditionModel", r"is 'UNet2DConditionModel'\. fastldm reads"),
        (None, "is None"),
        (["ControlNetModel"], "fastldm reads"),
    ],
)
def test_other_folders_are_refused_by_name(name: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(CheckpointError, match=message):
        read_control(tmp_path, spec("sd1"))


# --- bad files ---


def good() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in controls.controlnet("sd1").state_dict().items()}


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in good().items() if not name.startswith(names)}


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "NaN": (good() | {"conv_in.bias": torch.full((16,), torch.nan)}, "'conv_in.bias' holds NaN or infinity"),
    "integers": (good() | {"conv_in.bias": torch.ones(16, dtype=torch.int32)}, "not floating point"),
    "missing": (without("controlnet_mid_block"), r"2 tensors missing \(controlnet_mid_block\.weight"),
    "no first": (without("conv_in.weight"), r"'conv_in\.weight' is missing"),
    "more": (good() | {"conv_in.extra": torch.ones(3)}, r"unexpected \(conv_in\.extra\)"),
    "another shape": (good() | {"mid_block.resnets.0.conv1.bias": torch.ones(3)}, "of another shape"),
    "empty": (good() | {"conv_in.bias": torch.ones(0)}, r"has shape \(0,\), which is empty"),
    "a vector": (good() | {"conv_in.weight": torch.ones(3)}, "is built as no ControlNet"),
    "too many levels": (good() | {"down_blocks.999999999.x": torch.ones(1)}, "leave out numbers"),
    "too deep": (
        good() | {"down_blocks.0.attentions.0.transformer_blocks.99999999.x": torch.ones(1)},
        "leave out numbers",
    ),
    "control character": (good() | {"\x1b[2J": torch.ones(1)}, "is no name of a module"),
    "nothing": ({}, r"its keys are like '\(none\)'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_file_is_one_error(fault: str, tmp_path: Path) -> None:
    state, message = BAD[fault]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_control(tmp_path / "a.safetensors", spec("sd1"))
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_overflow_in_half_precision_is_named(tmp_path: Path) -> None:
    save_file(good() | {"conv_in.bias": torch.full((16,), 1e6)}, tmp_path / "a.safetensors")
    read_control(tmp_path / "a.safetensors", spec("sd1"))
    with pytest.raises(CheckpointError, match=r"'conv_in\.bias' holds NaN or infinity in float16"):
        read_control(tmp_path / "a.safetensors", spec("sd1"), dtype=torch.float16)


def test_truncated_file_is_an_error_at_any_length(tmp_path: Path) -> None:
    save_file(good(), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    for length in (0, 1, 8, 9, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_control(tmp_path / "cut.safetensors", spec("sd1"))


def test_missing_path_and_empty_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors", "no such path"):
        with pytest.raises(CheckpointError, match=r"cannot be read|does not exist here\. Give a file"):
            read_control(path, spec("sd1"))
    with pytest.raises(InputError, match="path is 7"):
        read_control(7, spec("sd1"))  # type: ignore[arg-type]


PARTS = ("controlnet_cond_embedding", "input_hint_block", "adapter", "body", "conv_in", "down_blocks", "resnets")
KEYS = st.lists(st.sampled_from([*PARTS, "0", "1", "2", "14", "99999999999", "block1", "attentions"]), max_size=6).map(
    tuple
)
ENDS = st.sampled_from(["weight", "bias", "x"])
SHAPES = st.lists(st.sampled_from([1, 2, 3, 16]), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.dictionaries(st.tuples(KEYS, ENDS), SHAPES, max_size=8),
    start=st.sampled_from(["controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight", "body.0.x", "x"]),
)
def test_any_tensors_are_refused(keys: dict[Any, list[int]], start: str, tmp_path: Path) -> None:
    state = {".".join((*parts, end)): torch.ones(shape) for (parts, end), shape in keys.items()}
    save_file(state | {start: torch.ones(4, 3, 3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError):
        read_control(tmp_path / "a.safetensors", spec("sd1"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 5000), byte=st.integers(0, 255))
def test_damaged_header_is_read_or_refused(at: int, byte: int, tmp_path: Path) -> None:
    if not (tmp_path / "t2i.safetensors").exists():
        save_file(controls.t2i_adapter("light").state_dict(), tmp_path / "t2i.safetensors")
    data = bytearray((tmp_path / "t2i.safetensors").read_bytes())
    data[at] = byte
    (tmp_path / "b.safetensors").write_bytes(data)
    with suppress(CheckpointError):
        read_control(tmp_path / "b.safetensors", spec("sd1"))


def test_saved_names_are_those_of_the_module(tmp_path: Path) -> None:
    """Judge of the judge: what save_pretrained writes has the names of the module."""
    theirs = controls.controlnet("sdxl-mid")
    theirs.save_pretrained(tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == theirs.state_dict().keys()
