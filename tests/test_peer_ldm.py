"""Latent diffusion's first text to image (LDMBert, its autoencoder of codes) against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from pairs import close, generator
from peer_networks import TOLERANCE, error, give

from fastldm import CheckpointError, InputError, Pipeline
from fastldm.loading.hub import _needed_files
from fastldm.loading.state import fit_names
from fastldm.model import describe
from fastldm.models.clip import CLIPText
from fastldm.models.config import TextConfig
from fastldm.planning import memory

PROMPT = "a photo of squirrels, eating!"


@pytest.fixture(scope="module")
def peer() -> Any:
    return tiny.ldm_text()


@pytest.fixture(scope="module")
def pipe(peer: Any) -> Pipeline:
    return Pipeline.from_diffusers(peer)


@pytest.fixture(scope="module")
def folder(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm")
    peer.save_pretrained(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_ldm_bert_equals_diffusers(act: str) -> None:
    theirs = tiny.ldm_bert(activation_function=act)
    config = {**theirs.config.to_dict(), "architectures": ["LDMBertModel"]}
    with torch.device("meta"):
        ours = CLIPText(TextConfig.from_dict(config))
    state = theirs.state_dict()
    give(ours, {name: state[key] for name, key in fit_names(ours, state, "a file").items()})
    ids = torch.randint(0, theirs.config.vocab_size, (2, 77), generator=generator())
    hidden, pooled = ours(ids)
    assert pooled is None
    assert error(hidden, theirs(ids)[0]) < TOLERANCE


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 6.0},
    "eta": {"guidance_scale": 6.0, "eta": 0.7},
    "several prompts": {"prompt": [PROMPT, "a dog"], "guidance_scale": 3.0},
    "a size": {"height": 48, "width": 72, "guidance_scale": 6.0},
    "steps": {"num_inference_steps": 7},
    "latents": {"latents": torch.randn(1, 4, 8, 8, generator=generator(9)), "guidance_scale": 6.0},
    "no text": {"prompt": "", "guidance_scale": 6.0},
    "a long prompt": {"prompt": "a cat " * 35, "guidance_scale": 6.0},
}
FEW = ("eta", "several prompts", "a size")


@pytest.mark.parametrize(
    "case", [case if case in FEW else pytest.param(case, marks=pytest.mark.full) for case in CALLS]
)
def test_ldm_equals_diffusers(case: str, peer: Any, pipe: Pipeline) -> None:
    """Noise of steps is the global generator's in diffusers, which here draws all."""
    options = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np", **CALLS[case]}
    images = []
    for each in (pipe, peer):
        torch.manual_seed(3)
        images.append(each(**options, generator=torch.default_generator).images)
    close(*images)


@pytest.mark.full
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("vae", ["VQModel", "AutoencoderKL"])
def test_ldm_of_other_parts_equals_diffusers(scheduler: str, vae: str) -> None:
    parts: dict[str, Any] = {"scheduler": tiny.scheduler("sd1" if scheduler == "PNDMScheduler" else "sd2-v")}
    parts |= {"vqvae": tiny.vae()} if vae == "AutoencoderKL" else {}
    theirs = tiny.ldm_text(**parts)
    ours = Pipeline.from_diffusers(theirs)
    options = {"prompt": [PROMPT, "a dog"], "num_inference_steps": 4, "guidance_scale": 6.0, "output_type": "np"}
    images = [each(**options, generator=[generator(1), generator(2)]).images for each in (ours, theirs)]
    close(*images)


def test_ldm_of_a_folder_is_the_adopted_one(pipe: Pipeline, folder: Path) -> None:
    loaded = Pipeline.from_pretrained(folder, dtype="float32")
    assert loaded.family.name == "ldm-text"
    assert (loaded.family.num_inference_steps, loaded.stages.spec.default_size) == (50, (64, 64))
    options = {"num_inference_steps": 2, "seed": 4, "output_type": "np"}
    assert np.array_equal(loaded(PROMPT, **options).images, pipe(PROMPT, **options).images)
    text, other = (loaded(prompt, **options).images for prompt in (PROMPT, "a dog"))
    assert np.abs(text - other).max() > 1e-2


def test_hub_is_asked_for_ldms_folders(folder: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    needed = _needed_files(index, names, None, False, "a/b")
    assert {"vqvae/config.json", "bert/config.json", "bert/model.safetensors", "tokenizer/tokenizer.json"} <= {*needed}


@pytest.mark.parametrize(
    ("component", "class_name", "message"),
    [
        ("bert", "BertModel", "bert is a BertModel; fastldm runs CLIPTextModel"),
        ("vqvae", "AutoencoderDC", "vqvae is a AutoencoderDC; fastldm runs AutoencoderKL"),
        ("vqvae", None, "has no vqvae"),
        ("bert", None, "has no bert"),
    ],
)
def test_parts_of_another_class_are_named(
    folder: Path, tmp_path: Path, component: str, class_name: str | None, message: str
) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index[component] = [None if class_name is None else "transformers", class_name]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path)


def test_ldms_config_is_read_strictly(folder: Path) -> None:
    config = {**json.loads((folder / "bert" / "config.json").read_text()), "activation_function": "relu"}
    with pytest.raises(CheckpointError, match=r"'activation_function' is 'relu'"):
        TextConfig.from_dict(config)


def test_plan_of_ldm_is_by_its_configs(peer: Any, folder: Path) -> None:
    workload = {"width": 64, "height": 64, "batch": 1, "dtype": torch.float32, "arch": 0}
    plan = memory.plan(memory.Workload.of_spec(describe(folder), **workload))
    networks = (peer.unet, peer.vqvae, peer.bert.model)  # without what only training reads
    parameters = sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert sum(line.bytes for line in plan.weights) == 4 * parameters


def test_adopted_ldm_with_a_hook_is_refused() -> None:
    theirs = tiny.ldm_text()
    hook = theirs.bert.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(CheckpointError, match=r"text_encoder.*has the hook"):
        Pipeline.from_diffusers(theirs)
    hook.remove()
    Pipeline.from_diffusers(theirs)


def test_what_ldm_does_not_read_is_named(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="only SDXL reads it"):
        pipe(PROMPT, prompt_2="a dog")
    with pytest.raises(InputError, match="prompt is None"):
        pipe()


@pytest.mark.full
def test_ldms_bundle_makes_the_same_images(folder: Path, tmp_path: Path) -> None:
    from fastldm.export import writing
    from fastldm.export.bundle import Bundle
    from fastldm.export.verify import verify

    writing.export(describe(folder), tmp_path / "out", source=str(folder), whole_picture=True)
    bundle = Bundle.open(tmp_path / "out")
    assert [check.problem for check in verify(bundle, model=describe(folder)) if check.problem] == []
    options = {"num_inference_steps": 3, "seed": 4, "output_type": "np"}
    expected = Pipeline.from_pretrained(folder, dtype="float32", backend="torch")(PROMPT, **options).images
    for backend in ("onnxruntime", "onnxruntime-graph"):
        made = Pipeline.from_pretrained(tmp_path / "out", backend=backend, dtype="float32")(PROMPT, **options).images
        assert np.abs(made - expected).max() < 1e-3, backend


def test_diffusers_has_no_other_names() -> None:
    """What is translated is what diffusers' class calls its components."""
    names = diffusers.LDMTextToImagePipeline.__init__.__code__.co_varnames[1:6]
    assert set(names) == {"vqvae", "bert", "tokenizer", "unet", "scheduler"}
