"""Sampling of unCLIP's prior against the loop of diffusers' pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ops
import pytest
import tiny
import torch

from fastldm.conditioning.prior import PriorTexts
from fastldm.loading.adoption import adopt
from fastldm.models.prior import Prior, PriorConfig
from fastldm.request import Request
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.denoise import denoise
from fastldm.runtime.prior import PriorStages
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.samplers.scheduler_config import read_scheduler

TOKENS, DIM, STEPS = 9, 24, 5
BASE = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "embedding_dim": DIM}
KINDS: dict[str, dict[str, Any]] = {
    "karlo": {},
    "no token for the prediction": {"added_emb_type": None, "additional_embeddings": 3},
}
KARLO = {  # prediction of the sample, clamped to 5
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 5.0,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peer_prior(kind: str) -> Any:
    """With weights so large that a wrong token shows."""
    torch.manual_seed(0)
    peer = tiny.peer("diffusers").PriorTransformer(**BASE, num_embeddings=TOKENS, **KINDS[kind]).eval()
    for k, parameter in enumerate(peer.parameters()):
        parameter.data += 0.2 * randn(*parameter.shape, seed=k)
    return peer.requires_grad_(False)


def texts(count: int, seed: int) -> PriorTexts:
    """Of 3, 4, ... tokens, padded."""
    lengths = (3 + (torch.arange(count) + seed) % (TOKENS - 2)).int()
    return PriorTexts(randn(count, TOKENS, DIM, seed=seed), randn(count, DIM, seed=seed + 50), lengths)


def judged(peer: Any, scheduler: Any, rows: list[PriorTexts], scale: float, seed: int) -> Any:
    """The loop of diffusers' UnCLIPPipeline, and with another scheduler that of StableUnCLIPPipeline."""
    generator, of_unclip = torch.Generator().manual_seed(seed), type(scheduler).__name__ == "UnCLIPScheduler"
    x = torch.randn(2, DIM, generator=generator)
    scheduler.set_timesteps(STEPS)
    if of_unclip:  # whose last step is a ratio of float32's last bits
        bar = scheduler.alphas_cumprod.double()
        scheduler.alphas_cumprod, scheduler.alphas = bar, bar / torch.cat((torch.ones(1), bar[:-1]))
        scheduler.betas = 1 - scheduler.alphas
    hidden, vectors, lengths = (torch.cat([getattr(row, k) for row in rows]) for k in NAMES)
    mask = torch.arange(TOKENS) < lengths[:, None]
    for i, t in enumerate(scheduler.timesteps):
        out = peer(x.repeat(len(rows), 1), t, vectors, hidden, mask).predicted_image_embedding.reshape(-1, DIM)
        if len(rows) > 1:
            first, second = out.chunk(2)
            out = first + scale * (second - first)
        following = scheduler.timesteps[i + 1] if i + 1 < len(scheduler.timesteps) else None
        more = {"prev_timestep": following} if of_unclip else {}
        x = scheduler.step(out, t, x, generator=generator, **more).prev_sample
    return peer.post_process_latents(x), generator


NAMES = ("hidden", "vectors", "lengths")
READ = {
    text: PriorTexts(*(getattr(texts(2, seed), name)[k : k + 1] for name in NAMES))
    for text, seed, k in (("a", 0, 0), ("b", 0, 1), ("", 2, 0))
}


def stages_of(peer: Any, scheduler: Any, read: dict[str, PriorTexts]) -> PriorStages:
    """Ours, with the peer's weights. read: of each text what the encoder makes of it."""
    with torch.device("meta"):
        ours = Prior(PriorConfig.from_dict(dict(peer.config)))
    adopt(ours, peer)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    schedule = read_scheduler(config, None, "scheduler_config.json")

    def reads(texts: list[str], literal: bool = False) -> PriorTexts:
        return PriorTexts(*(torch.cat([getattr(read[text], name) for text in texts]) for name in NAMES))

    return PriorStages(SimpleNamespace(model=ours, schedule=schedule, read=reads, image_encoder=None))  # type: ignore


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("karlo", 4.0),
        pytest.param("karlo", 1.0, marks=pytest.mark.full),
        pytest.param("no token for the prediction", 4.0, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("name", ["UnCLIPScheduler", "DDPMScheduler"])
def test_sampling_equals_diffusers(name: str, kind: str, scale: float) -> None:
    peer, prompts, negatives = peer_prior(kind), texts(2, 0), READ[""]
    scheduler = getattr(tiny.peer("diffusers"), name)(**KARLO)
    stages = stages_of(peer, scheduler, READ)
    rows = [negatives.repeat(2), prompts] if scale > 1 else [prompts]
    expected, theirs = judged(peer, scheduler, rows, scale, seed=7)
    generator = torch.Generator().manual_seed(7)
    request = request_of(["a", "b"], guidance_scale=scale, generator=generator)
    made, _ = stages.make(request)
    assert torch.equal(generator.get_state(), theirs.get_state())  # the same draws
    assert ops.error(made, expected) < 1e-4


def request_of(prompt: Any, **options: Any) -> Request:
    return Request(prompt, **{"num_inference_steps": STEPS, "guidance_scale": 4.0, **options})


def test_requests_share_steps_in_both_batches() -> None:
    """Each with its own text, length, guidance and number of steps: as `denoise` makes them alone."""
    peer = peer_prior("karlo")
    stages = stages_of(peer, tiny.peer("diffusers").DDPMScheduler(**KARLO), READ)
    requests = [
        request_of("a", seed=1),
        request_of(["b", "a"], seed=[2, 3], guidance_scale=1.0, num_inference_steps=3),
        request_of("b", seed=4, negative_prompt="a"),
    ]
    expected = []
    for request in requests:
        run = stages.prepare(request)

        def network(model_input: torch.Tensor, row: int, branches: Any, run: Any = run) -> torch.Tensor:
            own = (run.texts_of(x, branches) for x in (run.temb[row], run.text_len, *run.text_kv))
            of_time, of_text, *context = own
            return stages.model.step(model_input, of_time, context, kv_len=of_text)

        expected.append(denoise(network, run))
    slots = StaticBuffers.empty(
        stages.model.config, slots=4, rows=8, height=1, width=DIM, tokens=TOKENS + 1, steps=64, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    for batch in (EagerBatch(stages.model), Slots(stages.model, slots)):
        runs = [stages.prepare(request) for request in requests]
        assert all(batch.holds(run) for run in runs)
        for run in runs:
            batch.admit(run)
        while under_way := [run for run in runs if not run.done]:
            batch.step(under_way)
        for run, alone in zip(runs, expected, strict=True):
            assert ops.error(batch.latents(run), alone) < 1e-4
            assert batch.release(run)() is None
