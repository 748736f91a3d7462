"""Sampling of unCLIP's prior against the loop of diffusers' pipelines."""

from __future__ import annotations

from typing import Any

import ops
import pytest
import tiny
import torch

from fastldm.conditioning.prior import PriorTexts
from fastldm.loading.adoption import adopt
from fastldm.models.prior import Prior, PriorConfig
from fastldm.runtime.prior import draw_prior, sample_prior
from fastldm.samplers.scheduler_config import read_scheduler
from fastldm.samplers.table import make_table

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
    hidden, vectors, lengths = (torch.cat([getattr(row, k) for row in rows]) for k in ("hidden", "vectors", "lengths"))
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
    peer = peer_prior(kind)
    with torch.device("meta"):
        ours = Prior(PriorConfig.from_dict(dict(peer.config)))
    adopt(ours, peer)
    prompts, negatives = texts(2, 0), texts(2, 2)
    scheduler = getattr(tiny.peer("diffusers"), name)(**KARLO)
    expected, theirs = judged(peer, scheduler, [negatives, prompts] if scale > 1 else [prompts], scale, seed=7)
    table = make_table(read_scheduler({"_class_name": name, **KARLO}, None, "scheduler_config.json"), STEPS)
    generator = torch.Generator().manual_seed(7)
    noise = draw_prior(ours, table, 2, generator)
    assert torch.equal(generator.get_state(), theirs.get_state())  # the same draws
    assert ops.error(sample_prior(ours, table, prompts, negatives, noise, scale), expected) < 1e-4
