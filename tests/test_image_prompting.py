"""IP-Adapters on a loaded pipeline against diffusers' load_ip_adapter, and changes while requests run."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import controls
import ip_adapters
import lora
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fastldm import CheckpointError, InputError, Pipeline, Request, Session
from fastldm.image import read_parameters, save_result
from fastldm.runtime.image_prompts import cross_scales


def photo(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    """Smooth, in no way square."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    """diffusers' pipelines without adapters, of the smallest U-Nets and autoencoders."""
    pipes = {
        "sd1": tiny.pipeline("sd1", unet=tiny.unet("sd1", layers_per_block=1), vae=tiny.vae("small", sample_size=32)),
        "sdxl": tiny.pipeline(
            "sdxl", unet=tiny.unet("sdxl", layers_per_block=1), vae=tiny.vae("small", sample_size=32)
        ),
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def folders(originals: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ip")
    return {
        family: ip_adapters.folder(root / family, pipe.unet, *ip_adapters.KINDS) for family, pipe in originals.items()
    }


def loaded(original: Any, folder: Path, *kinds: str) -> tuple[Any, Pipeline]:
    """diffusers' pipeline and ours, with the same adapters."""
    peer, pipe = deepcopy(original), Pipeline.from_diffusers(original)
    names = [f"{kind}.safetensors" for kind in kinds]
    for each in (peer, pipe):
        each.load_ip_adapter(str(folder), subfolder="models", weight_name=names if len(names) > 1 else names[0])
    return peer, pipe


def picture(pipe: Any, **options: Any) -> np.ndarray:
    defaults = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "np", "height": 32, "width": 32}
    options = {**defaults, **options}
    count = options.get("num_images_per_prompt", 1) * (
        1 if isinstance(options["prompt"], str) else len(options["prompt"])
    )
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    return np.asarray(pipe(generator=generators, **options).images)


def check(peer: Any, pipe: Pipeline, **options: Any) -> np.ndarray:
    theirs, ours = picture(peer, **options), picture(pipe, **options)
    assert np.abs(ours - theirs).max() < 1e-3
    return ours


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unguided": {"guidance_scale": 1.0},
    "several images": {"num_images_per_prompt": 2},
    "several prompts": {"prompt": ["a cat", "a dog"], "negative_prompt": ["bad", "worse"]},
}


@pytest.mark.parametrize("kind", ip_adapters.KINDS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_equal_diffusers(family: str, kind: str, originals: dict[str, Any], folders: dict[str, Path]) -> None:
    peer, pipe = loaded(originals[family], folders[family], kind)
    plain = picture(pipe)
    for name, options in CALLS.items():
        got = check(peer, pipe, ip_adapter_image=photo(1), **options)
        assert name != "plain" or np.abs(got - plain).max() > 0.01
    check(peer, pipe, ip_adapter_image=[[photo(1), photo(2, (64, 30)), photo(3)]])
    peer.set_ip_adapter_scale(0.4)
    pipe.set_ip_adapter_scale(0.4)
    check(peer, pipe, ip_adapter_image=photo(1))


SCALES: list[Any] = [
    {"up": {"block_1": [0.0, 1.0]}},
    {"down": {"block_0": [0.5]}, "up": 0.3},
    {"mid": 2.0},
    {"down": 0.7, "mid": -0.5, "up": {"block_1": 0.2, "block_2": [0.1, 0.9]}},
]


@pytest.mark.parametrize("k", range(len(SCALES)))
def test_scales_by_block_equal_diffusers(k: int, originals: dict[str, Any], folders: dict[str, Path]) -> None:
    peer, pipe = loaded(originals["sd1"], folders["sd1"], "base")
    peer.set_ip_adapter_scale(deepcopy(SCALES[k]))
    pipe.set_ip_adapter_scale(SCALES[k])
    own = check(peer, pipe, ip_adapter_image=photo(1))
    pipe.set_ip_adapter_scale(1.0)
    same = picture(pipe, ip_adapter_image=photo(1), ip_adapter_scale=SCALES[k])  # of the request alone
    assert np.abs(own - same).max() < 1e-6
    assert np.abs(own - picture(pipe, ip_adapter_image=photo(1))).max() > 1e-3


def test_two_adapters_equal_diffusers(originals: dict[str, Any], folders: dict[str, Path]) -> None:
    """Each with its pictures and its scale."""
    peer, pipe = loaded(originals["sdxl"], folders["sdxl"], "plus", "base")
    for each in (peer, pipe):
        each.set_ip_adapter_scale([0.6, {"up": {"block_0": [0.0, 1.0]}}])
    check(peer, pipe, ip_adapter_image=[[photo(1), photo(2)], photo(3)])
    alone = picture(pipe, ip_adapter_image=[None, photo(3)])
    zero = picture(pipe, ip_adapter_image=[photo(1), photo(3)], ip_adapter_scale=[0.0, {"up": {"block_0": [0.0, 1.0]}}])
    assert np.array_equal(alone, zero)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_embeddings_and_tensors_equal_diffusers(kind: str, originals: dict[str, Any], folders: dict[str, Path]) -> None:
    peer, pipe = loaded(originals["sd1"], folders["sd1"], kind)
    for guided in (True, False):
        options = (None, "cpu", 1, guided)
        theirs = peer.prepare_ip_adapter_image_embeds([[photo(1), photo(2)]], *options)
        ours = pipe.prepare_ip_adapter_image_embeds([[photo(1), photo(2)]], *options)
        assert [x.shape for x in ours] == [x.shape for x in theirs]
        assert (ours[0] - theirs[0]).abs().max() < 1e-5 * theirs[0].abs().max()
        own = check(peer, pipe, ip_adapter_image_embeds=theirs, guidance_scale=7.5 if guided else 1.0)
        same = picture(pipe, ip_adapter_image=[[photo(1), photo(2)]], guidance_scale=7.5 if guided else 1.0)
        assert np.abs(own - same).max() < 1e-5
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    check(peer, pipe, ip_adapter_image=pixels)


def test_image_to_image_and_samplers_equal_diffusers(originals: dict[str, Any], folders: dict[str, Path]) -> None:
    diffusers = tiny.peer("diffusers")
    peer, pipe = loaded(originals["sd1"], folders["sd1"], "plus")
    start = photo(7, (32, 32))
    peer.scheduler = diffusers.DDIMScheduler.from_config(originals["sd1"].scheduler.config, clip_sample=False)
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**peer.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"ip_adapter_image": photo(1), "image": start, "strength": 0.7}
    options |= {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np"}
    theirs = np.asarray(image_to_image(generator=torch.Generator().manual_seed(0), **options).images)
    ours = np.asarray(pipe(generator=torch.Generator().manual_seed(0), sampler="ddim", **options).images)
    assert np.abs(ours - theirs).max() < 1e-3
    for name, sampler in (
        ("EulerAncestralDiscreteScheduler", "euler a"),
        ("DPMSolverMultistepScheduler", "dpm++ 2m"),
        ("HeunDiscreteScheduler", "heun"),
        ("UniPCMultistepScheduler", "unipc"),
        ("DDIMScheduler", "ddim"),
    ):
        own = {"clip_sample": False} if sampler == "ddim" else {}
        peer.scheduler = getattr(diffusers, name).from_config(originals["sd1"].scheduler.config, **own)
        theirs = picture(peer, ip_adapter_image=photo(1))
        assert np.abs(picture(pipe, ip_adapter_image=photo(1), sampler=sampler) - theirs).max() < 1e-3, name


# --- many requests


def request(seed: int, **options: Any) -> dict[str, Any]:
    defaults = {
        "prompt": "a cat",
        "num_inference_steps": 3,
        "seed": seed,
        "output_type": "np",
        "height": 32,
        "width": 32,
    }
    return {**defaults, **options}


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_batch_of_unlike_requests_equals_each_alone(
    batch_invariant: bool, originals: dict[str, Any], folders: dict[str, Path]
) -> None:
    _, pipe = loaded(originals["sd1"], folders["sd1"], "plus", "base")
    requests = [
        request(1),
        request(2, ip_adapter_image=[photo(1), photo(2)]),
        request(3, ip_adapter_image=[photo(3), None], guidance_scale=1.0),
        request(4, ip_adapter_image=[None, [photo(1), photo(4)]], num_images_per_prompt=2, guidance_interval=(0.4, 1)),
        request(5, ip_adapter_image=[photo(5), photo(5)], ip_adapter_scale={"up": {"block_2": 1.0}}),
    ]
    with Session(pipe, max_batch=1, batch_invariant=batch_invariant) as session:
        alone = [session.submit(**each).result(60).images for each in requests]
    with Session(pipe, max_batch=8, batch_invariant=batch_invariant) as session:
        for future, expected in zip([session.submit(**each) for each in requests], alone, strict=True):
            got = future.result(60).images
            assert np.array_equal(got, expected) if batch_invariant else np.abs(got - expected).max() < 2e-5
    assert np.abs(alone[0] - alone[1]).max() > 1e-3


def test_requests_keep_the_adapters_they_came_with(originals: dict[str, Any], folders: dict[str, Path]) -> None:
    _, pipe = loaded(originals["sd1"], folders["sd1"], "base")
    expected = {"base": picture_of(pipe)}
    pipe.load_ip_adapter(folders["sd1"], "models", "plus.safetensors")
    expected["plus"] = picture_of(pipe)
    assert np.abs(expected["base"] - expected["plus"]).max() > 1e-3
    with Session(pipe, max_batch=1) as session:
        futures = [session.submit(**request(1, ip_adapter_image=photo(1))) for _ in range(3)]
        pipe.load_ip_adapter(folders["sd1"], "models", "base.safetensors")
        futures.append(session.submit(**request(1, ip_adapter_image=photo(1))))
        pipe.set_ip_adapter_scale(0.0)
        pipe.unload_ip_adapter()
        with pytest.raises(InputError, match="no IP-Adapter is loaded"):
            session.submit(**request(1, ip_adapter_image=photo(1)))
        for future, kind in zip(futures, ["plus"] * 3 + ["base"], strict=True):
            assert np.abs(future.result(60).images - expected[kind]).max() < 2e-5


def picture_of(pipe: Pipeline) -> Any:
    return pipe(**request(1, ip_adapter_image=photo(1))).images


def test_swaps_from_threads_leave_one_whole(originals: dict[str, Any], folders: dict[str, Path]) -> None:
    _, pipe = loaded(originals["sd1"], folders["sd1"], "base")
    expected = []
    for kind in ("base", "plus", "full"):
        pipe.load_ip_adapter(folders["sd1"], "models", f"{kind}.safetensors")
        expected.append(picture_of(pipe))

    def swap(kind: str) -> None:
        for _ in range(3):
            pipe.load_ip_adapter(folders["sd1"], "models", f"{kind}.safetensors")
            got = picture_of(pipe)
            assert min(np.abs(got - own).max() for own in expected) < 2e-5

    with ThreadPoolExecutor(3) as threads:
        for future in [threads.submit(swap, kind) for kind in ("base", "plus", "full")]:
            future.result(60)


def test_all_kinds_of_adapters_at_once_equal_diffusers(tmp_path: Path) -> None:
    """A LoRA, a ControlNet, a textual inversion and an IP-Adapter in one request; then each in its own of one batch."""
    peers, pipe = tiny.pipeline("sd1"), Pipeline.from_diffusers(tiny.pipeline("sd1"))
    own = deepcopy(peers.components) | {"controlnet": controls.controlnet("sd1")}
    peer = tiny.peer("diffusers").StableDiffusionControlNetPipeline(**own, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    file, folder = (
        lora.write(tmp_path / "lora.safetensors", "sd1"),
        ip_adapters.folder(tmp_path / "ip", peer.unet, "plus"),
    )
    token = {"<thing>": torch.randn(2, 32, generator=torch.Generator().manual_seed(1))}
    for each in (peer, pipe):
        each.load_textual_inversion(token)
        each.load_ip_adapter(str(folder), subfolder="models", weight_name="plus.safetensors")
    peer.load_lora_weights(str(file))
    pipe.load_lora_weights(file, adapter_name="style")
    pipe.attach_control(controls.controlnet("sd1"), "outlines")
    options: dict[str, Any] = {"prompt": "a <thing>", "height": 64, "width": 64, "ip_adapter_image": photo(1)}
    theirs = picture(peer, image=photo(2, (64, 64)), **options)
    ours = picture(pipe, control_image=photo(2, (64, 64)), **options)
    assert np.abs(ours - theirs).max() < 1e-3

    kinds: list[dict[str, Any]] = [
        {"prompt": "a <thing>"},
        {"adapters": {"style": 1.0}},
        {"control_image": photo(2, (64, 64))},
        {"ip_adapter_image": photo(1)},
        {
            "prompt": "a <thing>",
            "adapters": {"style": -0.5},
            "control_image": photo(3, (64, 64)),
            "ip_adapter_image": photo(4),
        },
    ]
    requests = [request(k, **{"height": 64, "width": 64, "adapters": {}, **kind}) for k, kind in enumerate(kinds)]
    alone = [pipe(**each).images for each in requests]
    with Session(pipe, max_batch=8) as session:
        for future, expected in zip([session.submit(**each) for each in requests], alone, strict=True):
            assert np.abs(future.result(60).images - expected).max() < 2e-5
    plain = pipe(**request(0, height=64, width=64, adapters={})).images
    assert all(np.abs(each - plain).max() > 1e-3 for each in alone)


# --- what does not fit


@pytest.fixture
def pipe(originals: dict[str, Any]) -> Pipeline:
    return Pipeline.from_diffusers(originals["sd1"])


def test_the_image_encoder_is_found_or_left_out(pipe: Pipeline, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["sd1"]
    pipe.load_ip_adapter(folder / "models" / "base.safetensors")  # beside the file
    first = pipe.image_encoder
    assert first is not None
    pipe.load_ip_adapter(folder, "models", ["plus.safetensors", "base.safetensors"])
    assert pipe.image_encoder is first  # which fits, and is kept
    pipe.load_ip_adapter(folder, "models", "plus.safetensors", image_encoder_folder=None)
    assert pipe.image_encoder is None
    with pytest.raises(InputError, match="no image encoder was loaded: give ip_adapter_image_embeds"):
        pipe("a cat", ip_adapter_image=photo(1))
    pipe.load_ip_adapter(folder, "models", "plus.safetensors", image_encoder_folder="models/image_encoder")
    pipe.unload_ip_adapter()
    with pytest.raises(CheckpointError, match=r"config\.json' in .*none"):
        pipe.load_ip_adapter(folder, "models", "plus.safetensors", image_encoder_folder="none")


def test_a_hub_id_is_read_from_the_local_cache(pipe: Pipeline, folders: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "models--acme--adapter"
    shutil.copytree(folders["sd1"], repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    pipe.load_ip_adapter("acme/adapter", "models", "plus.safetensors", **options)
    assert pipe.image_encoder is not None
    pipe.unload_ip_adapter()
    pipe.load_ip_adapter("acme/adapter", "models", "base.safetensors", "models/image_encoder", **options)
    pipe.unload_ip_adapter()
    with pytest.raises(CheckpointError, match=r"there is no file 'config\.json' in acme/adapter/models/none"):
        pipe.load_ip_adapter("acme/adapter", "models", "base.safetensors", "none", **options)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), r"image_encoder/config\.json"),
        (lambda folder: (folder / "config.json").write_text('{"hidden_size": "x"}'), "'hidden_size' is 'x'"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), r"image_encoder/model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "image_encoder has no weights"),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / "model.safetensors"), "tensors missing"),
    ],
)
def test_damaged_image_encoders_change_nothing(
    damage: Any, message: str, pipe: Pipeline, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders["sd1"], copy)
    damage(copy / "models" / "image_encoder")
    pipe.load_ip_adapter(folders["sd1"], "models", "base.safetensors", image_encoder_folder=None)
    before = pipe.stages.image_prompts.loaded
    with pytest.raises(CheckpointError, match=message) as caught:
        pipe.load_ip_adapter(copy, "models", "base.safetensors")
    assert "\n" not in str(caught.value)
    assert pipe.stages.image_prompts.loaded is before


BAD_LOADS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "lists": (("models", ["base.safetensors"] * 3), {}, "the list of paths has 2 items for 3 IP-Adapters"),
    "empty": (("models", []), {}, "weight_name has 0 items"),
    "an option": (("models", "base.safetensors"), {"use_safetensors": True}, "unknown argument 'use_safetensors'"),
    "a number": (("models", "base.safetensors", 3), {}, "image_encoder_folder is 3"),
    "a way out": (("../x", "base.safetensors"), {}, r"subfolder is '\.\./x'"),
    "pickle": (("models", "base.safetensors"), {"allow_pickle": 1}, "allow_pickle is 1"),
}


@pytest.mark.parametrize("case", BAD_LOADS)
def test_bad_arguments_of_loading(case: str, pipe: Pipeline, folders: dict[str, Path]) -> None:
    arguments, options, message = BAD_LOADS[case]
    source: Any = [folders["sd1"]] * 2 if case == "lists" else folders["sd1"]
    with pytest.raises(InputError, match=message):
        pipe.load_ip_adapter(source, *arguments, **options)
    assert not pipe.stages.image_prompts.loaded.adapters


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "two pictures": ({"ip_adapter_image": [photo(1), photo(2)]}, r"a list of 2 for 1 IP-Adapters: .*\[\[a, b\]\]"),
    "no pictures": ({"ip_adapter_image": [[]]}, "has 0 pictures: expected 1 to 64"),
    "many pictures": ({"ip_adapter_image": [[photo(1)] * 65]}, "has 65 pictures"),
    "a number": ({"ip_adapter_image": 3}, "ip_adapter_image is a int: expected a PIL image"),
    "a file": ({"ip_adapter_image": "none.png"}, "ip_adapter_image: there is no file 'none.png'"),
    "a small tensor": (
        {"ip_adapter_image": torch.zeros(1, 3, 8, 8)},
        r"\(1, 3, 8, 8\), which is the image encoder's own",
    ),
    "NaN": ({"ip_adapter_image": torch.full((1, 3, 32, 32), float("nan"))}, "ip_adapter_image holds NaN"),
    "embeds": ({"ip_adapter_image_embeds": torch.zeros(2, 1, 20)}, "ip_adapter_image_embeds is .*: expected a list"),
    "wide embeds": ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 21)]}, r"expected \(any, any, 20\)"),
    "one row": (
        {"ip_adapter_image_embeds": [torch.zeros(1, 1, 20)]},
        "expected 2 rows, of which the first is negative",
    ),
    "three rows": (
        {"ip_adapter_image_embeds": [torch.zeros(3, 1, 20)], "guidance_scale": 1},
        r"has shape \(3, 1, 20\): expected 1 row",
    ),
    "embeds of NaN": ({"ip_adapter_image_embeds": [torch.full((2, 1, 20), float("inf"))]}, "holds NaN or infinity"),
    "both": (
        {"ip_adapter_image": photo(1), "ip_adapter_image_embeds": [torch.zeros(2, 1, 20)]},
        "ip_adapter_image and ip_adapter_image_embeds were both given",
    ),
    "a block": ({"ip_adapter_image": photo(1), "ip_adapter_scale": {"up": {"block_9": 1.0}}}, "names 'block_9'"),
    "a side": ({"ip_adapter_image": photo(1), "ip_adapter_scale": {"left": 1.0}}, "names 'left'"),
    "counts": ({"ip_adapter_image": photo(1), "ip_adapter_scale": {"up": {"block_1": [1] * 5}}}, "has 5 scales for up"),
    "scales": ({"ip_adapter_image": photo(1), "ip_adapter_scale": [1.0, 2.0]}, "ip_adapter_scale has 2 items for 1"),
    "no number": ({"ip_adapter_image": photo(1), "ip_adapter_scale": "much"}, "ip_adapter_scale is 'much'"),
    "nested": ({"ip_adapter_image": photo(1), "ip_adapter_scale": {"up": {"block_1": {"a": 1}}}}, "ip_adapter_scale"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_refused(case: str, pipe: Pipeline, folders: dict[str, Path]) -> None:
    options, message = BAD_REQUESTS[case]
    pipe.load_ip_adapter(folders["sd1"], "models", "base.safetensors")
    with pytest.raises(InputError, match=message):
        pipe("a cat", **options)


def test_pictures_without_adapter_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(
        InputError, match="ip_adapter_image was given, and no IP-Adapter is loaded: load_ip_adapter loads"
    ):
        pipe("a cat", ip_adapter_image=photo(1))
    with pytest.raises(InputError, match="scale has 2 items for 0 IP-Adapters"):
        pipe.set_ip_adapter_scale([1.0, 2.0])
    pipe.unload_ip_adapter()  # nothing is loaded, which is no error


def test_scales_follow_the_network(originals: dict[str, Any]) -> None:
    config = Pipeline.from_diffusers(originals["sdxl"]).unet.config
    assert cross_scales(0.5, config) == (0.5,) * len(config.cross_widths)
    scales = cross_scales({"down": {"block_1": 1.0}, "mid": 2.0, "up": {"block_0": [3.0, 4.0]}}, config)
    down, mid, up = (2, 3), 3, (3, 3, 2, 2)  # transformers' depths
    expected = [1.0] * down[0] + [0.0] * down[1] + [2.0] * mid + [3.0] * up[0] + [4.0] * up[1] + [0.0] * sum(up[2:])
    assert scales == tuple(expected)


def test_completed_requests_can_be_run_again(pipe: Pipeline, folders: dict[str, Path]) -> None:
    pipe.load_ip_adapter(folders["sd1"], "models", "base.safetensors")
    result = pipe(**request(1, ip_adapter_image=photo(1)))
    assert isinstance(result.request, Request)
    again: Any = pipe(result.request)
    assert np.array_equal(again.images, result.images)
    adapter = weakref.ref(pipe.stages.image_prompts.loaded.adapters[0])
    pipe.unload_ip_adapter()
    with pytest.raises(InputError, match="the IP-Adapter of this request is not loaded any more"):
        pipe(result.request)
    for _ in range(50):  # until the worker has turned to what comes next
        gc.collect()
        if adapter() is None:
            break
        time.sleep(0.1)
    assert adapter() is None  # a result that is kept does not keep its networks

    pipe.load_ip_adapter(folders["sd1"], "models", "base.safetensors")
    positive = pipe.prepare_ip_adapter_image_embeds(photo(1), do_classifier_free_guidance=False)
    unguided = pipe(**request(1, ip_adapter_image_embeds=positive, guidance_scale=1.0)).request
    with pytest.raises(InputError, match="expected 2 rows, of which the first is negative"):
        pipe(unguided, guidance_scale=5.0)


def test_png_says_which_adapters_made_it(originals: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    """As units of AUTOMATIC1111's extension; the weights read back, in order."""
    _, pipe = loaded(originals["sd1"], folders["sd1"], "base", "plus")
    names = [(adapter.name, adapter.short_hash) for adapter in pipe.stages.image_prompts.loaded.adapters]
    options = request(1, ip_adapter_image=[photo(1), photo(2)], ip_adapter_scale=[0.25, 1.0], output_type="pil")
    save_result(pipe(**options), [tmp_path / "a.png"], "tiny")
    read, fields = read_parameters(tmp_path / "a.png")
    units = [fields[f"ControlNet {k}"] for k in (0, 1)]
    assert units == [
        f"Module: ip-adapter_clip_sd15, Model: {name} [{digest}], Weight: {weight}"
        for (name, digest), weight in zip(names, ("0.25", "1"), strict=True)
    ]
    assert read.ip_adapter_scale == (0.25, 1.0)


def test_arrays_and_pictures_are_one(pipe: Pipeline, folders: dict[str, Path], tmp_path: Path) -> None:
    pipe.load_ip_adapter(folders["sd1"], "models", "base.safetensors")
    photo(1).save(tmp_path / "a.png")
    forms: list[Any] = [
        photo(1),
        np.asarray(photo(1)),
        tmp_path / "a.png",
        np.asarray(photo(1)).astype(np.float32) / 255,
    ]
    embeds: list[Tensor] = [pipe.prepare_ip_adapter_image_embeds(form)[0] for form in forms]
    assert all(torch.equal(own, embeds[0]) for own in embeds)
