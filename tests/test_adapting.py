"""LoRA on pipelines, beside diffusers with peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora
import numpy as np
import pytest
import torch
from lora import picture

from fastldm import Pipeline, Session
from fastldm.errors import CheckpointError, InputError

FAMILIES = ("sd1", pytest.param("sd2", marks=pytest.mark.full), "sdxl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three files of each family: the default layers, all layers, and the U-Net alone."""
    folder = tmp_path_factory.mktemp("lora")
    kinds: list[dict[str, Any]] = [{}, {"unet": lora.ALL}, {"text": (), "rank": 2}]
    return {
        family: [
            lora.write(folder / f"{family}-{k}.safetensors", family, seed=k, **kind) for k, kind in enumerate(kinds)
        ]
        for family in ("sd1", "sd2", "sdxl")
    }


@pytest.fixture(params=FAMILIES)
def pipes(request: pytest.FixtureRequest, files: dict[str, list[Path]]) -> Iterator[tuple[Any, Pipeline, list[Path]]]:
    """diffusers' pipeline, ours, and files for them; without adapters before and after."""
    theirs, ours = lora.theirs(request.param), lora.ours(request.param)
    yield theirs, ours, files[request.param]
    theirs.unload_lora_weights()
    ours.unload_lora_weights()
    ours.unfuse_lora()


def load(pipe: Any, files: list[Path]) -> None:
    for k, file in enumerate(files):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="abc"[k])


def same(ours: Any, theirs: Any, **options: Any) -> None:
    a, b = picture(ours, **options), picture(theirs, **options)
    assert np.abs(a - b).max() < 1e-3
    assert np.abs(a - b).max() < 0.02 * b.std()


def test_pictures_equal_diffusers(pipes: tuple[Any, Pipeline, list[Path]]) -> None:
    theirs, ours, files = pipes
    plain = picture(ours)
    load(theirs, files), load(ours, files)
    seen = [plain]
    for names, weights in ((["a"], 1.0), (["b"], [0.7]), (["a", "c"], [0.5, -0.8]), (["c", "b", "a"], None)):
        theirs.set_adapters(names, weights), ours.set_adapters(names, weights)
        same(ours, theirs)
        seen.append(picture(ours))
        assert all(np.abs(seen[-1] - other).max() > 0.01 for other in seen[:-1]), "an adapter that nobody sees"
    theirs.disable_lora(), ours.disable_lora()
    assert np.array_equal(picture(ours), plain), "without adapters bitwise as before"
    same(ours, theirs)
    theirs.enable_lora(), ours.enable_lora()
    same(ours, theirs)


def test_refiner_takes_its_own_text_encoders_layers(tmp_path: Path) -> None:
    """Which is SDXL's second, and its only one."""
    theirs, ours = lora.theirs("sdxl-refiner"), lora.ours("sdxl-refiner")
    options: dict[str, Any] = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))}
    options |= {"strength": 0.7, "num_inference_steps": 4}
    plain = picture(ours, **options)
    for k, kind in enumerate(({"unet": ()}, {}, {"unet": lora.ALL})):
        file = lora.write(tmp_path / f"{k}.safetensors", "sdxl-refiner", seed=k, **kind)
        load(theirs, [file]), load(ours, [file])
        same(ours, theirs, **options)
        assert np.abs(picture(ours, **options) - plain).max() > 0.01
        theirs.unload_lora_weights(), ours.unload_lora_weights()


def test_adapters_of_sdxl_are_none_of_its_refiner(tmp_path: Path, files: dict[str, list[Path]]) -> None:
    with pytest.raises(CheckpointError, match=r"SDXL.*the SDXL refiner"):
        lora.ours("sdxl-refiner").load_lora_weights(files["sdxl"][0])


def test_kwargs_scale_multiplies_all(pipes: tuple[Any, Pipeline, list[Path]]) -> None:
    theirs, ours, files = pipes
    load(theirs, files[:1]), load(ours, files[:1])
    same(ours, theirs, cross_attention_kwargs={"scale": 0.4})


def test_weights_by_block_equal_diffusers(pipes: tuple[Any, Pipeline, list[Path]]) -> None:
    theirs, ours, files = pipes
    load(theirs, files[::2]), load(ours, files[::2])
    levels = [i for i, level in enumerate(ours.unet.config.up) if level.depths[0] is not None]
    up = {f"block_{levels[0]}": 0.6, f"block_{levels[1]}": [0.4, 0.8, 1.3]}
    weights = {"text_encoder": 0.5, "unet": {"down": 0.9, "mid": 0.3, "up": up}}
    theirs.set_adapters(["a", "b"], [weights, 0.5]), ours.set_adapters(["a", "b"], [weights, 0.5])
    same(ours, theirs)


def test_interval_of_steps_equals_diffusers_callback(tmp_path: Path) -> None:
    """Layers that are read in every step: diffusers reads keys and values of the text anew at each, too."""
    theirs, ours = lora.theirs("sd2-v"), lora.ours("sd2-v")  # whose scheduler is DDIM: PNDM takes its first step twice
    file = lora.write(tmp_path / "x.safetensors", "sd2-v", unet=("ff.net.2", "proj_in", "conv2"), text=())
    load(theirs, [file]), load(ours, [file])

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipe.set_adapters("a", 0.8 if step + 1 in (2, 3) else 0.0)
        return tensors

    options: dict[str, Any] = {"num_inference_steps": 5}
    theirs.set_adapters("a", 0.0)
    expected = picture(theirs, callback_on_step_end=callback, **options)
    interval = {"a": {"scale": 0.8, "start": 0.4, "end": 0.8}}
    got = picture(ours, adapters=interval, **options)
    assert np.abs(got - expected).max() < 1e-3
    assert np.abs(got - picture(ours, adapters={"a": 0.8}, **options)).max() > 0.01
    assert ours("a cat", adapters=interval, **{**lora.OPTIONS, **options}).adapters == "beside"
    with pytest.raises(InputError, match="0 <= start <= end <= 1"):
        ours("a cat", adapters={"a": {"scale": 1, "start": 0.9, "end": 0.1}})
    with Session(ours, batch_invariant=True) as session, pytest.raises(InputError, match="bitwise as alone"):
        session.submit("a cat", adapters=interval).result()
    ours.unload_lora_weights()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"unet": {"left": 1}}, "names 'left': expected down, mid, up"),
        ({"vae": 1}, "names 'vae': expected unet"),
        ({"unet": {"down": {"block_9": 1}}}, "names 'block_9'"),
        ({"unet": {"down": {"block_1": [1, 2, 3]}}}, "has 3 scales for down.block_1: expected 2"),
        (float("nan"), "nan: expected a number"),
        ("much", "'much': expected a number"),
    ],
)
def test_bad_weights_are_refused(files: dict[str, list[Path]], weight: Any, message: str) -> None:
    ours = lora.ours("sd1")
    try:
        load(ours, files["sd1"][:1])
        with pytest.raises(InputError, match=message):
            ours.set_adapters("a", weight)
        with pytest.raises(InputError, match=message):
            ours("a cat", adapters={"a": weight})
        assert ours.get_active_adapters() == ["a"]
    finally:
        ours.unload_lora_weights()


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.full)])
def test_fused_adapters_are_the_models(files: dict[str, list[Path]], family: str) -> None:
    lora.theirs.cache_clear()  # diffusers has no way back from fusing, once the adapters are unloaded
    theirs, ours, own = lora.theirs(family), lora.ours(family), files[family]
    plain = picture(ours)
    load(theirs, own[:1]), load(ours, own[:1])
    theirs.fuse_lora(lora_scale=0.7), ours.fuse_lora(lora_scale=0.7)
    same(ours, theirs)
    theirs.unload_lora_weights(), ours.unload_lora_weights()
    fused = picture(ours)
    assert np.abs(fused - plain).max() > 0.01
    load(ours, own[2:])
    assert np.abs(picture(ours) - fused).max() > 0.01, "another on top"
    ours.unload_lora_weights()
    assert np.array_equal(picture(ours), fused)
    ours.unfuse_lora()
    assert np.array_equal(picture(ours), plain)
    ours.unload_lora_weights(), lora.theirs.cache_clear()


def test_fusing_some_components_only(files: dict[str, list[Path]]) -> None:
    ours = lora.ours("sdxl")
    load(ours, files["sdxl"][:1])
    ours.set_adapters("a", {"text_encoder": 0, "text_encoder_2": 0, "unet": 0.5})
    expected = picture(ours)
    ours.fuse_lora(components=["unet"], lora_scale=1)
    assert ours.get_active_adapters() == []
    assert np.array_equal(picture(ours), expected)
    with pytest.raises(InputError, match="fused already"):
        ours.fuse_lora(adapter_names=["a"])
    ours.unfuse_lora(), ours.unload_lora_weights()


def test_names_are_listed_as_in_diffusers(pipes: tuple[Any, Pipeline, list[Path]]) -> None:
    theirs, ours, files = pipes
    for pipe in (theirs, ours):
        pipe.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    assert ours.get_active_adapters() == theirs.get_active_adapters() == ["default_0"]
    for pipe in (theirs, ours):
        pipe.load_lora_weights(str(files[2].parent), weight_name=files[2].name, adapter_name="u")
    assert ours.get_list_adapters() == theirs.get_list_adapters()
    assert ours.get_active_adapters() == theirs.get_active_adapters()
    for pipe in (theirs, ours):
        pipe.set_adapters(["u", "default_0"], [0.5, 0.2])
        pipe.delete_adapters("u")
    assert ours.get_list_adapters() == theirs.get_list_adapters()
    assert ours.get_active_adapters() == theirs.get_active_adapters()
    assert ours.adapters["default_0"].rank == 4


def test_unknown_names_change_nothing(files: dict[str, list[Path]]) -> None:
    ours = lora.ours("sd1")
    load(ours, files["sd1"][:2])
    for call in (
        lambda: ours.set_adapters(["b", "nobody"]),
        lambda: ours.delete_adapters(["b", "nobody"]),
        lambda: ours.fuse_lora(adapter_names=["nobody"]),
        lambda: ours("a cat", adapters={"nobody": 1}),
    ):
        with pytest.raises(InputError, match="there is no adapter 'nobody': loaded are 'a', 'b'"):
            call()
    with pytest.raises(InputError, match="'a' is loaded"):
        load(ours, files["sd1"][:1])
    with pytest.raises(InputError, match="2 items for 1 adapters"):
        ours.set_adapters("a", [1, 2])
    assert ours.get_active_adapters() == ["a"]
    assert list(ours.adapters) == ["a", "b"]
    ours.unload_lora_weights()
    assert ours.get_list_adapters() == {}


def test_file_for_another_model_is_refused(files: dict[str, list[Path]], tmp_path: Path) -> None:
    ours = lora.ours("sd1")
    plain = picture(ours)
    with pytest.raises(CheckpointError, match="modules fit"):
        ours.load_lora_weights(files["sdxl"][0])
    with pytest.raises(CheckpointError, match="does not exist"):
        ours.load_lora_weights(tmp_path / "nothing.safetensors")
    assert ours.get_list_adapters() == {}
    assert np.array_equal(picture(ours), plain)


@pytest.mark.parametrize("swaps", [20, pytest.param(100, marks=pytest.mark.full)])
def test_swaps_leave_weights_bitwise(files: dict[str, list[Path]], swaps: int) -> None:
    ours = lora.ours("sd1")
    before = {name: p.clone() for name, p in ours.unet.state_dict().items()}
    text = {name: p.clone() for name, p in ours.text_stages[0].model.state_dict().items()}
    load(ours, files["sd1"])
    options = {"num_inference_steps": 1, "output_type": "latent", "height": 16, "width": 16, "seed": 1}
    weights: list[dict[str, float]] = [{"a": 0.3}, {"b": 1.0}, {"a": -1.0, "c": 0.5}, {}]
    first = [ours("a cat", adapters=w, **options).images for w in weights]
    for k in range(swaps):
        again = ours("a cat", adapters=weights[k % 4], **options).images
        assert torch.equal(again, first[k % 4])
    assert not torch.equal(first[0], first[1])
    ours("a cat", adapters={}, **options)
    assert all(torch.equal(p, before[name]) for name, p in ours.unet.state_dict().items())
    assert all(torch.equal(p, text[name]) for name, p in ours.text_stages[0].model.state_dict().items())
    ours.unload_lora_weights()


def test_adopted_weights_are_shared_unchanged(files: dict[str, list[Path]]) -> None:
    theirs = lora.tiny.pipeline("sd1")
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_diffusers(theirs)
    before = picture(theirs)
    load(ours, files["sd1"][1:2])
    assert np.abs(picture(ours) - before).max() > 0.01
    assert np.array_equal(picture(theirs), before), "the diffusers pipeline has no adapter"


def test_replaced_weights_count_as_originals(files: dict[str, list[Path]]) -> None:
    ours = Pipeline.from_diffusers(lora.tiny.pipeline("sd1"))
    load(ours, files["sd1"][1:2])
    adapted = picture(ours)
    layer = ours.unet.conv_in
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 3, requires_grad=False)
    changed = picture(ours)
    assert np.abs(changed - adapted).max() > 1e-3
    expected = Pipeline.from_diffusers(lora.tiny.pipeline("sd1"))
    expected.unet.conv_in.weight.data.mul_(3)
    load(expected, files["sd1"][1:2])
    assert np.abs(picture(expected) - changed).max() < 1e-5


def test_request_keeps_adapters_that_are_deleted(files: dict[str, list[Path]]) -> None:
    ours = lora.ours("sd1")
    load(ours, files["sd1"][:2])
    ours.set_adapters("b")
    expected = picture(ours)
    generations = [
        ours.session.submit("a cat", generator=torch.Generator().manual_seed(0), **lora.OPTIONS) for _ in range(3)
    ]
    ours.unload_lora_weights()
    for generation in generations:
        assert np.abs(np.asarray(generation.result().images[0]) - expected).max() < 2e-5
    assert generations[0].result().request.adapters == {"b": 1.0}


def test_mixed_requests_get_what_they_get_alone(files: dict[str, list[Path]]) -> None:
    ours = lora.ours("sd1")
    load(ours, files["sd1"])
    weights = [{"a": 1.0}, {}, {"b": 0.5}, {"a": 0.5, "c": 1.0}, None, {"a": 1.0}]
    options: dict[str, Any] = {**lora.OPTIONS, "seed": 3}
    alone = [np.asarray(ours("a cat", adapters=w, **options).images[0]) for w in weights]
    sizes = [64, 64, 48, 64, 64, 48]
    generations = [
        ours.session.submit("a cat", adapters=w, **options, **({} if size == 64 else {"height": size}))
        for w, size in zip(weights, sizes, strict=True)
    ]
    for generation, expected, size in zip(generations, alone, sizes, strict=True):
        image = np.asarray(generation.result().images[0])
        if size == 64:
            assert np.abs(image - expected).max() < 1e-4
    ours.unload_lora_weights()


def test_metadata_names_adapters_and_hashes(files: dict[str, list[Path]], tmp_path: Path) -> None:
    import fastldm
    from fastldm.image import save_result

    ours = lora.ours("sd1")
    load(ours, files["sd1"][:2])
    try:
        weights = {"a": 0.8, "b": {"unet": {"mid": 0.5}}}
        result = ours("a cat", adapters=weights, num_inference_steps=1, seed=3)
        save_result(result, [tmp_path / "x.png"], "sd1")
        request, fields = fastldm.read_parameters(tmp_path / "x.png")
        assert request.adapters == weights
        digests = {name: ours.adapters[name].short_hash for name in weights}
        assert fields["Lora hashes"] == ", ".join(f"{name}: {digest}" for name, digest in digests.items())
        again = ours(request, output_type="np").images
        assert np.array_equal(
            again, ours("a cat", adapters=weights, num_inference_steps=1, seed=3, output_type="np").images
        )
    finally:
        ours.unload_lora_weights()


@pytest.mark.full
def test_export_has_active_adapters_merged(files: dict[str, list[Path]], tmp_path: Path) -> None:
    from fastldm.export.bundle import Bundle

    ours = Pipeline.from_diffusers(lora.tiny.pipeline("sd1"))
    load(ours, files["sd1"][1:2])
    ours.set_adapters("a", 0.7)
    expected = picture(ours)
    plain = picture(ours, adapters={})
    ours.export(tmp_path / "bundle")
    ours.unload_lora_weights()
    assert np.array_equal(picture(ours), plain)
    exported = Pipeline.from_pretrained(tmp_path / "bundle", backend="onnxruntime", dtype="float32")
    assert np.abs(picture(exported) - expected).max() < 1e-3 < np.abs(plain - expected).max()
    (line,) = Bundle.open(tmp_path / "bundle").manifest["adapters"]
    assert line.startswith("a:0.7 (")
    with pytest.raises(InputError, match="fastldm export --lora"):
        exported.load_lora_weights(files["sd1"][1])
    with pytest.raises(InputError, match="there is no adapter 'a'"):
        exported("a cat", adapters={"a": 1.0})
