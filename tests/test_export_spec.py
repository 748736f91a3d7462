"""What goes into exported networks and what comes out: held against the networks themselves, and against the names that
others use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from other_networks import NETWORKS, judge

from fastldm.export.engine import open_engine
from fastldm.export.reference import ReferenceNetworks
from fastldm.export.spec import Axis, NetworkSpec, Port, sample, specs
from fastldm.loading import spec as loading
from fastldm.loading.checkpoint import Checkpoint, Loaded
from fastldm.models.config import PIXEL_SPACE
from fastldm.models.families import FAMILIES
from fastldm.models.unet_config import UNetConfig
from fastldm.samplers.config import ScheduleConfig


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, loading.Spec]:
    """SDXL has two text encoders and added conditions, its LCM reads the guidance too, an inpainting model is wider."""
    folder = tmp_path_factory.mktemp("models")
    return {
        family: loading.describe(tiny.save_pipeline(family, folder / family))
        for family in ("sd1", "sd1-inpaint", "sdxl-lcm")
    }


def names(network: NetworkSpec) -> tuple[list[str], list[str]]:
    return [port.name for port in network.inputs], [port.name for port in network.outputs]


def test_names_equal_optimum(models: dict[str, loading.Spec]) -> None:
    sd1, xl = (
        specs(model.unet, model.vae, model.text, dtype="float32") for model in (models["sd1"], models["sdxl-lcm"])
    )
    assert list(sd1) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert list(xl) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
    assert names(sd1["unet"]) == (["sample", "timestep", "encoder_hidden_states"], ["out_sample"])
    assert names(xl["unet"])[0][3:] == ["text_embeds", "time_ids", "timestep_cond"]
    assert names(sd1["vae_decoder"]) == (["latent_sample"], ["sample"])
    assert names(sd1["vae_encoder"]) == (["sample"], ["latent_sample", "latent_parameters"])
    # Pipelines take a text encoder's first output by place: SDXL's second gives its pooled vector there.
    assert names(sd1["text_encoder"])[1][:2] == ["last_hidden_state", "pooler_output"]
    assert names(xl["text_encoder_2"])[1][:2] == ["text_embeds", "last_hidden_state"]
    # diffusers' SDXL reads hidden_states[-2], clip_skip an earlier one; without two encoders they are normalised
    assert [f"hidden_states.{i}" for i in range(3)] == names(xl["text_encoder_2"])[1][2:]
    assert names(sd1["text_encoder"])[1][-2:] == ["clip_skip.1", "clip_skip.2"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd1-inpaint", "sdxl-lcm"])
def test_networks_match_their_specs(models: dict[str, loading.Spec], family: str, split: bool) -> None:
    networks = ReferenceNetworks(models[family], "float32", split=split)
    # Neither square nor best, a batch of three, two windows of text, one timestep for all rows.
    sizes = {"batch": 3, "height": 8, "width": 16, "tokens": 77, "rows": 5}
    for name, network in networks.specs.items():
        inputs = sample(network, {} if name.startswith("vae") else sizes)
        outputs = networks.run(name, inputs)
        for port in network.outputs:
            shape = network.shape(port, {} if name.startswith("vae") else sizes)
            assert outputs[port.name].shape == shape, (name, port.name)
            assert outputs[port.name].dtype == port.torch_dtype


def test_split_networks_equal_full_network(models: dict[str, loading.Spec]) -> None:
    """With SDXL's conditions and a timestep for each row; LCM's guidance is embedded by the split one only."""
    from fastldm.models.embeddings import guidance_embedding

    model = models["sdxl-lcm"]
    full, split = (ReferenceNetworks(model, "float32", split=split) for split in (False, True))
    inputs = sample(full.specs["unet"], {"steps": 2})
    guidance = torch.tensor([1.5, 7.0])
    inputs["timestep_cond"] = guidance_embedding(guidance, model.unet.time_cond_proj_dim or 0)
    kv = split.run("text_kv", {"encoder_hidden_states": inputs["encoder_hidden_states"]})
    conditions = {name: inputs[name] for name in ("text_embeds", "time_ids")}
    rows = split.run("time_rows", {"timesteps": inputs["timestep"], **conditions, "guidance": guidance})
    out = split.run("unet_step", {"sample": inputs["sample"], "temb_row": rows["temb_rows"], **kv})
    torch.testing.assert_close(out["out_sample"], full.run("unet", inputs)["out_sample"], rtol=0, atol=0)


def test_a_spec_survives_json(models: dict[str, loading.Spec]) -> None:
    model = models["sdxl-lcm"]
    for split in (False, True):
        for network in specs(model.unet, model.vae, model.text, dtype="float16", split=split).values():
            assert NetworkSpec.from_dict(json.loads(json.dumps(network.to_dict()))) == network


def test_sizes_are_in_the_unit_of_the_inputs() -> None:
    latent, image = Axis("height", 1, 64, 128), Axis("height", 8, 512, 1024, 8)
    decoder = NetworkSpec("d", (Port("z", "float32", (4, latent)),), (Port("x", "float32", (3, image)),))
    encoder = NetworkSpec("e", decoder.outputs, decoder.inputs)
    assert decoder.shape(decoder.outputs[0], {"height": 33}) == (3, 264)
    assert encoder.shape(encoder.outputs[0], {"height": 264}) == (4, 33)
    assert decoder.shape(decoder.outputs[0], {}) == (3, 512)


def test_latents_come_in_multiples_of_the_stride() -> None:
    model = loading.describe("default")  # of 16 latents a side, three levels
    unet = specs(model.unet, model.vae, model.text, dtype="float32")["unet"]
    assert unet.axes["height"] == Axis("height", 4, 16, 32, 4)


def test_samples_repeat_and_token_ids_end(models: dict[str, loading.Spec]) -> None:
    model = models["sd1"]
    text = specs(model.unet, model.vae, model.text, dtype="float32")["text_encoder"]
    once, again, reseeded = sample(text, seed=1), sample(text, seed=1), sample(text, seed=2)
    assert torch.equal(once["input_ids"], again["input_ids"])
    assert not torch.equal(once["input_ids"], reseeded["input_ids"])
    assert ((once["input_ids"] == model.text[0].vocab - 1).sum(dim=1) >= 2).all()


def test_narrowed_outputs_use_their_own_unit(models: dict[str, loading.Spec]) -> None:
    model = models["sd1"]
    decoder = specs(model.unet, model.vae, model.text, dtype="float32")["vae_decoder"]
    fewer = decoder.narrowed({"height": (2, 5), "width": (6, 6)})
    axes = [[axis for axis in port.shape[2:] if isinstance(axis, Axis)] for port in (*fewer.inputs, *fewer.outputs)]
    factor = model.vae.factor
    assert [[(axis.least, axis.most) for axis in side] for side in axes] == [
        [(2, 5), (6, 6)],
        [(2 * factor, 5 * factor), (6 * factor, 6 * factor)],
    ]
    assert [axis.best for axis in axes[0]] == [5, 6]  # it was 8
    assert fewer.shape(fewer.outputs[0], {"height": 3}) == (1, 3, 3 * factor, 6 * factor)
    assert fewer.axes["batch"] == decoder.axes["batch"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", [*NETWORKS])
def test_inputs_follow_from_the_config(name: str, split: bool) -> None:
    """Whatever the family: what each kind of network reads beside latents and time is an input, and what it makes has
    the shapes of its spec."""
    networks = ReferenceNetworks(lone(name), "float32", split=split)
    sizes = {"batch": 3, "tokens": 4, "rows": 5, "steps": 3}
    for own, network in networks.specs.items():
        outputs = networks.run(own, sample(network, sizes))
        assert {port.name: network.shape(port, sizes) for port in network.outputs} == {
            key: tuple(x.shape) for key, x in outputs.items()
        }


@pytest.mark.full
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", [*NETWORKS])
def test_all_kinds_of_networks_are_traced(name: str, split: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("fastldm.export.onnx", reason="needs fastldm[onnx]", exc_type=ImportError)
    networks = ReferenceNetworks(lone(name), "float32", split=split)
    sizes = {"batch": 3, "tokens": 2, "rows": 7, "steps": 3}
    for own, network in networks.specs.items():
        onnx.write(networks, own, tmp_path / own)
        inputs = sample(network, sizes, seed=3)
        expected = networks.run(own, inputs)
        for backend in ("onnxruntime", "openvino"):
            engine = open_engine(backend, tmp_path / own / "model.onnx", network, precision="float32")
            for key, x in engine(inputs).items():
                assert float((x - expected[key]).abs().max()) < 1e-4 * float(expected[key].abs().max()), (backend, key)
            engine.close()


def lone(name: str) -> loading.Spec:
    """A small network of other_networks.py as a model of its own."""
    module = judge(name)
    config = UNetConfig.from_dict({**module.config, "_class_name": type(module).__name__})
    part = Loaded("unet", "", {}, (), name, tensors=module.state_dict())
    checkpoint = Checkpoint(name, {"unet": part}, {}, {}, {})
    return loading.Spec(checkpoint, config, PIXEL_SPACE, (), FAMILIES[-1], ScheduleConfig("DDIMScheduler"))
