"""fastldm beside diffusers' pipelines, argument by argument: see pipeline_judge.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import diffusers
import pipeline_judge as judge
import pytest
from pipeline_judge import CLASSES, KINDS, VALUES, Case, Verdict

from fastldm import Request
from fastldm.conditioning import encode as conditioning

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

ALL = list(judge.cases())
SAMPLE = [
    Case("text to image", (("prompt", "list"), ("num_images_per_prompt", "2"))),
    Case("text to image", (("prompt_embeds", "tensor"), ("negative_prompt", "text"))),
    Case("text to image", (("negative_prompt_embeds", "tensor"), ("clip_skip", "1"))),
    Case("text to image", (("generator", "list"), ("callback_on_step_end", "interrupt"))),
    Case("text to image", (("eta", "0.5"), ("output_type", "latent"))),
    Case("image to image", (("image", "list"), ("num_images_per_prompt", "2"))),
    Case("image to image", (("prompt", "list"), ("image", "list"))),
    Case("image to image", (("generator", "list"), ("num_images_per_prompt", "2"))),
    Case("inpainting", (("prompt", "list"), ("image", "list"))),
    Case("inpainting", (("generator", "list"), ("num_images_per_prompt", "2"))),
    Case("inpainting", (("latents", "tensor"), ("strength", "0.5"))),
    Case("inpainting, 9 channels", (("mask_image", "list"), ("num_images_per_prompt", "2"))),
    Case("SDXL text to image", (("prompt_2", "text"), ("negative_prompt_2", "text"))),
    Case("SDXL text to image", (("negative_original_size", "pair"), ("negative_target_size", "pair"))),
    Case("SDXL image to image", (("latents", "tensor"), ("guidance_rescale", "0.7"))),
    Case("SDXL inpainting", (("negative_prompt_embeds", "tensor"), ("negative_pooled_prompt_embeds", "tensor"))),
    Case("SDXL text to image", (("denoising_end", "0.5"), ("output_type", "latent"))),
    Case("SDXL image to image", (("image", "latents"), ("denoising_start", "0.6"))),
    Case("SDXL image to image", (("denoising_start", "0.3"), ("denoising_end", "0.9"))),
    Case("refiner", (("aesthetic_score", "3"), ("negative_aesthetic_score", "3"))),
    Case("refiner", (("crops_coords_top_left", "pair"), ("denoising_start", "0.6"))),
    Case("refiner inpainting", (("negative_prompt", "text"), ("strength", "0.5"))),
    Case("SDXL inpainting", (("strength", "1"), ("denoising_start", "0.6"))),
    Case("LCM text to image", (("prompt_embeds", "tensor"), ("num_images_per_prompt", "2"))),
]


def unexplained(verdicts: dict[Case, Verdict]) -> list[str]:
    return [f"{case}: {v.kind} {v.detail}" for case, v in verdicts.items() if v.kind in ("unknown", "crashed")]


def test_sampled_pairs_agree_or_have_a_reason() -> None:
    verdicts = {case: judge.judge(case) for case in SAMPLE}
    assert unexplained(verdicts) == []
    assert Counter(v.kind for v in verdicts.values())["agree"] >= len(SAMPLE) - 2


def test_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("text to image", (("negative_prompt", "text"),))
    assert judge.judge(case).kind == "agree"
    encode = conditioning.encode

    def without_negatives(request: Request, *args: Any, **kwargs: Any) -> Any:
        return encode(request.replace(negative_prompt=None), *args, **kwargs)

    monkeypatch.setattr(conditioning, "encode", without_negatives)
    assert judge.judge(case).kind == "unknown", "negatives are not read, and nothing says why"


@pytest.mark.parametrize("pipeline", CLASSES)
def test_all_arguments_of_diffusers_are_tried(pipeline: str) -> None:
    untried = [name for name in judge.parameters(pipeline) if name not in VALUES]
    assert set(untried) <= {"width"}, "an argument that nobody tries; width is as height"


def test_committed_table_has_nothing_unexplained() -> None:
    rows = [line.split("|")[1:-1] for line in judge.TABLE.read_text().splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in rows[0]]
    assert header == ["pipeline", "cases", *KINDS]
    total = dict(zip(header, next(row for row in rows if row[0].strip() == "all"), strict=True))
    assert int(total["unknown"]) == int(total["crashed"]) == 0
    assert int(total["agree"]) > int(total["cases"]) / 2
    assert {row[0].strip() for row in rows} >= {*CLASSES}, "a pipeline that nobody has judged"


@pytest.mark.full
@pytest.mark.parametrize("pipeline", CLASSES)
def test_all_pairs_agree_or_have_a_reason(pipeline: str) -> None:
    verdicts = {case: judge.judge(case) for case in ALL if case.pipeline == pipeline}
    assert unexplained(verdicts) == []
