"""unCLIP's prior against diffusers, on seeded random weights in float32."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peer_networks import error, give
from torch import Tensor, nn

from fastldm.errors import CheckpointError, InputError
from fastldm.models.prior import Prior, PriorConfig

pytestmark = pytest.mark.usefixtures("_no_grad")
TOLERANCE = 2e-6
CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "embedding_dim": 24,
    "num_embeddings": 11,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "karlo": {},
    "others": {
        "norm_in_type": "layer",
        "embedding_proj_norm_type": "layer",
        "embedding_proj_dim": 20,
        "clip_embed_dim": 28,
        "time_embed_act_fn": "gelu",
        "time_embed_dim": 40,
    },
    "no token for the prediction": {"added_emb_type": None, "additional_embeddings": 3},
    "text as it is": {"encoder_hid_proj_type": None, "attention_head_dim": 6},
}


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def judge(name: str) -> nn.Module:
    """diffusers' network, whose trained constants are zeros until they are loaded."""
    make = tiny.peer("diffusers").PriorTransformer
    theirs = tiny.seeded(lambda: make(**{**CONFIG, **OPTIONS[name]}))
    generator = torch.Generator().manual_seed(5)
    for key in ("positional_embedding", "prd_embedding", "clip_mean", "clip_std"):
        if getattr(theirs, key) is not None:
            getattr(theirs, key).data.normal_(generator=generator)
    return theirs


def prior_of(theirs: nn.Module) -> Prior:
    with torch.device("meta"):
        ours = Prior(PriorConfig.from_dict({**theirs.config, "_class_name": "PriorTransformer"}))
    return give(ours, theirs.state_dict())


def inputs(theirs: nn.Module) -> dict[str, Tensor]:
    """Two rows that differ in all they hold."""
    g = torch.Generator().manual_seed(0)
    vector = theirs.config.embedding_proj_dim or theirs.config.embedding_dim
    return {
        "hidden_states": torch.randn(2, 24, generator=g),
        "timestep": torch.tensor([999, 20]),
        "proj_embedding": torch.randn(2, vector, generator=g),
        "encoder_hidden_states": torch.randn(2, 11, 24, generator=g),
        "attention_mask": torch.arange(11) < torch.tensor([[11], [4]]),
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_prior_equals_diffusers(name: str) -> None:
    theirs = judge(name)
    ours, arguments = prior_of(theirs), inputs(theirs)
    expected = theirs(**arguments).predicted_image_embedding
    expected = expected.reshape(2, -1)  # without a token for the prediction, theirs is a list of one
    assert error(ours(**arguments), expected) < TOLERANCE
    assert error(ours.post_process_latents(expected), theirs.post_process_latents(expected)) == 0


def test_steps_of_two_prompts_equal_diffusers() -> None:
    """Rows of a schedule of both prompts at once; prompts by slot, of which what is not visible is NaN."""
    theirs = judge("others")
    ours, arguments = prior_of(theirs), inputs(theirs)
    text_len = torch.tensor([11, 4], dtype=torch.int32)
    kv = ours.cross_kv(arguments["encoder_hidden_states"], arguments["proj_embedding"], text_len)
    for each in kv:
        each[1, 5:] = torch.nan
    kv_len, steps = text_len + 1, torch.tensor([999, 500, 0])
    slots = torch.tensor([1, 0], dtype=torch.int32)
    rows = ours.time_rows(steps.repeat_interleave(2), kv, kv_len=kv_len, slots=slots.repeat(3)).unflatten(0, (3, 2))
    assert rows.shape[2] == ours.config.time_channels
    x = arguments["hidden_states"]
    for step, row in zip(steps, rows, strict=True):
        mine = {name: value.flip(0) for name, value in arguments.items() if name != "timestep"}
        expected = theirs(**{**mine, "hidden_states": x}, timestep=step).predicted_image_embedding
        assert error(ours.step(x, row, kv, kv_len=kv_len, slots=slots), expected) < TOLERANCE


def test_prompts_and_time_are_read_at_admission() -> None:
    theirs = judge("karlo")
    ours, arguments = prior_of(theirs), inputs(theirs)
    kv = ours.cross_kv(arguments["encoder_hidden_states"], arguments["proj_embedding"])
    rows = ours.time_rows(arguments["timestep"], kv)
    expected = ours.step(arguments["hidden_states"], rows, kv)
    for name, parameter in ours.named_parameters():
        if name.startswith(("time_embedding", "embedding_proj", "encoder_hidden_states_proj")):
            parameter.data = torch.full_like(parameter, torch.nan)
    assert torch.equal(ours.step(arguments["hidden_states"], rows, kv), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("added_emb_type", "sum"),
        ("encoder_hid_proj_type", None),
        ("norm_in_type", "group"),
        ("additional_embeddings", 0),
    ],
)
def test_unsupported_values_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"prior/config.json: '{key}' is {value!r}"):
        PriorConfig.from_dict({**CONFIG, key: value}, "prior/config.json")


def test_wrong_inputs_are_refused() -> None:
    theirs = judge("karlo")
    ours, arguments = prior_of(theirs), inputs(theirs)
    with pytest.raises(InputError, match="not true of the first tokens alone"):
        ours(**{**arguments, "attention_mask": ~arguments["attention_mask"]})
    with pytest.raises(InputError, match="the text has 9 tokens, and this prior reads 11"):
        ours.cross_kv(torch.zeros(1, 9, 24), torch.zeros(1, 24))


@pytest.mark.full
def test_published_prior_has_its_parameters() -> None:
    """Karlo's, of a billion."""
    with torch.device("meta"):
        theirs = tiny.peer("diffusers").PriorTransformer(num_layers=20)
        ours = Prior(PriorConfig.from_dict(theirs.config))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(1.022e9, rel=2e-2)
