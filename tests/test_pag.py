"""Perturbed-attention guidance: a third row in which some self-attentions select each pixel alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import ops
import pipeline_judge as judge
import pytest
import tiny
import torch
from counters import Recorder
from pipeline_judge import Case
from sessions import guided_runs
from torch import Tensor

from fastldm import Pipeline, Request
from fastldm.errors import InputError
from fastldm.models.config import UNetConfig
from fastldm.runtime.batch import Batch, EagerBatch
from fastldm.runtime.denoise import Guidance, Run
from fastldm.runtime.graph import Graphs
from fastldm.runtime.guidance import perturbed_layers
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import make_table

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

CASES = [
    Case("PAG", (("prompt", "list"), ("num_images_per_prompt", "2"))),
    Case("PAG", (("guidance_scale", "1"), ("pag_adaptive_scale", "0.005"))),
    Case("PAG", (("pag_scale", "0"),)),
    Case("PAG", (("guidance_rescale", "0.7"), ("pag_scale", "5"))),
    Case("PAG", (("guidance_rescale", "0.7"), ("guidance_scale", "1"))),
    Case("PAG", (("callback_on_step_end", "guidance"), ("negative_prompt", "text"))),
    Case("PAG image to image", (("generator", "list"), ("num_images_per_prompt", "2"))),
    Case("SDXL PAG", (("negative_prompt_embeds", "tensor"), ("negative_pooled_prompt_embeds", "tensor"))),
    Case("SDXL PAG", (("guidance_scale", "1"), ("original_size", "pair"))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pag_equals_diffusers(case: Case) -> None:
    verdict = judge.judge(case)
    assert verdict.kind == "agree", verdict.detail


@pytest.mark.parametrize("layers", ["mid", ["down_blocks.1", "up.*attentions.0"], "blocks.(1|2)"])
@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.full)])
def test_layers_are_chosen_as_diffusers_does(family: str, layers: Any) -> None:
    theirs = diffusers.AutoPipelineForText2Image.from_pipe(
        tiny.pipeline(family), enable_pag=True, pag_applied_layers=layers
    )
    theirs.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "latent"}
    options |= {"height": 64, "width": 64}
    expected = theirs(**options, generator=torch.Generator().manual_seed(0)).images
    for ours, own in (
        (Pipeline.from_diffusers(theirs), {}),
        (Pipeline.from_diffusers(tiny.pipeline(family)), {"pag_scale": 3.0, "pag_applied_layers": layers}),
    ):
        got = ours(**options, **own, generator=torch.Generator().manual_seed(0), literal_prompt=True).images
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_names_of_layers_are_those_of_diffusers() -> None:
    for family in ("sd1", "sdxl", "ssd-1b", "tiny-sd", "uneven"):
        names = [name for name, _ in tiny.unet(family).named_modules() if name.endswith("attn1")]
        assert sorted(UNetConfig.from_dict(tiny.UNETS[family]).self_attentions) == sorted(names)


GUIDANCES = [
    Guidance(4.0, pag_scale=3.0, pag_layers=(6,)),
    Guidance(pag_scale=2.0, pag_layers=(0, 3)),
    Guidance(4.0, 0.5, 0.3, 0.8, pag_scale=2.0, pag_adaptive_scale=0.003, pag_layers=(3, 15)),
    Guidance(3.0),
    Guidance(3.0, 0.7, image_scale=1.5),
    Guidance(),
]


@pytest.mark.parametrize("kind", ["slots", "graphs"])
def test_perturbed_rows_share_a_batch_with_others(kind: str) -> None:
    unet = Pipeline.from_diffusers(tiny.pipeline("sd1")).unet
    table = make_table(read_config({"_class_name": "DDIMScheduler"}), 5, sampler="ddim")

    def runs() -> list[Run]:
        return guided_runs(unet, table, GUIDANCES)

    def finish(batch: Batch, runs: list[Run]) -> list[Tensor]:
        for run in runs:
            assert batch.holds(run)
            batch.admit(run)
        while not runs[0].done:
            batch.step(runs)
        return [batch.latents(run) for run in runs]

    sizes: dict[str, Any] = {"slots": 9, "rows": 24, "height": 8, "width": 8, "tokens": 9, "steps": 8}
    with torch.no_grad():
        expected = [finish(EagerBatch(unet), [run])[0] for run in runs()]
        buffers = StaticBuffers.empty(unet.config, **sizes, dtype=torch.float32, device="cpu")
        slots = Slots(unet, buffers, Graphs(Recorder()) if kind == "graphs" else None)  # type: ignore[arg-type]
        for batch in (EagerBatch(unet), slots):
            for got, reference in zip(finish(batch, runs()), expected, strict=True):
                assert ops.error(got, reference) < 1e-5
    (plain,) = finish(EagerBatch(unet), [replace_guidance(runs()[1])])
    assert ops.error(expected[1], plain) > 1e-3, "the layers make a difference"


def replace_guidance(run: Run) -> Run:
    run.guidance = replace(run.guidance, pag_scale=0.0)
    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pag_scale": 3.0, "pag_applied_layers": "attn9"}, "holds 'attn9', which is in no name"),
        ({"pag_scale": 3.0, "pag_applied_layers": ["("]}, "which is no regular expression"),
        ({"pag_scale": -1.0}, "pag_scale is -1"),
        ({"pag_applied_layers": 3}, "pag_applied_layers is 3"),
        ({"pag_applied_layers": "mid, up"}, "holds 'mid, up': expected a part of a layer's name"),
        ({"pag_scale": 3.0, "sampler": "euler cfg++"}, "pag_scale is above 0"),
    ],
)
def test_invalid_layers_and_scales_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline.from_diffusers(tiny.pipeline("sd1"))("a cat", **options)


def test_edits_have_no_row_left() -> None:
    with pytest.raises(InputError, match="three rows of its own"):
        Pipeline.from_diffusers(tiny.pipeline("sd1-edit"))("snow", image=judge.image(), pag_scale=3.0)


def test_memory_counts_the_perturbed_row() -> None:
    from fastldm.planning.memory import Workload

    stages = Pipeline.from_diffusers(tiny.pipeline("sd1")).stages
    assert perturbed_layers(Request("a cat"), stages.unet.config) == (6,)
    for options, rows in (({}, 2), ({"pag_scale": 3.0}, 3), ({"pag_scale": 3.0, "guidance_scale": 1.0}, 2)):
        request = stages.complete(Request("a cat", **options))
        assert Workload.of_request(stages, request).step_rows == rows
