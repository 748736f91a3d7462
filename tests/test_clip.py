"""Text encoders against transformers, on seeded random weights in float32."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peer_networks import TOLERANCE, error, text_of
from torch import Tensor

from fastldm.models import CLIPText
from fastldm.models.config import TextConfig

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def token_ids(eos: int = tiny.VOCABULARY - 1) -> Tensor:
    """Three texts of different length, padded with end-of-text tokens as SD1 pads."""
    ids = torch.randint(3, tiny.VOCABULARY - 2, (3, 16), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((1, 9, 15)):
        ids[row, length:] = eos
    return ids


@pytest.mark.parametrize("kind", ["l", "h", "bigg"])
def test_text_encoder_equals_transformers(kind: str) -> None:
    theirs = tiny.text_encoder(kind)
    ours, ids = text_of(theirs), token_ids()
    expected = theirs(ids, output_hidden_states=True)
    hidden, pooled = ours(ids)
    assert error(hidden, expected.last_hidden_state) < TOLERANCE
    if kind == "bigg":
        assert error(pooled, expected.text_embeds) < TOLERANCE
    else:
        assert pooled is None
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    for skip in (1, 2):  # as diffusers: clip_skip = 1 is hidden_states[-2], normalised for SD1 and SD2, raw for SDXL
        raw, still_pooled = ours(ids, skip=skip, final_norm=False)
        assert error(raw, expected.hidden_states[-1 - skip]) < TOLERANCE
        assert error(ours(ids, skip=skip)[0], norm(expected.hidden_states[-1 - skip])) < TOLERANCE
        assert pooled is None or torch.equal(still_pooled, pooled)


@pytest.mark.parametrize("eos", [2, 500])
def test_pooled_text_is_of_first_end_token(eos: int) -> None:
    theirs = tiny.text_encoder("bigg", eos_token_id=eos)
    ids = token_ids(eos=tiny.VOCABULARY - 1 if eos == 2 else eos)  # 2 stands for the highest id in old configs
    assert error(text_of(theirs)(ids)[1], theirs(ids).text_embeds) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "heads": 12}, 123_060_480),
        ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "heads": 16}, 340_387_840),
        (
            {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "heads": 20, "p": 1280},
            694_659_840,
        ),
    ],
    ids=["L", "H", "bigG"],
)
def test_published_text_encoders_have_their_parameters(config: dict[str, Any], parameters: int) -> None:
    config = {**config, "num_attention_heads": config["heads"]}
    if "p" in config:
        config |= {"projection_dim": config["p"], "architectures": ["CLIPTextModelWithProjection"]}
    with torch.device("meta"):
        text = CLIPText(TextConfig.from_dict(config))
    assert sum(p.numel() for p in text.parameters()) == parameters
