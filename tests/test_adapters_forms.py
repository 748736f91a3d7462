"""Forms of low rank and of none, against the live network of lycoris-lora that wrote each file, at two scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_files
import pytest
import torch
from safetensors import safe_open

from fastldm.adapters.forms import Change, DoRA, LoRA, product
from fastldm.adapters.read import read_adapter

BOUND = 1e-5  # float32, of the largest output of a module; about 1e-6 is seen

# What create_lycoris is called with, and a tensor that shows that the file has the form.
LYCORIS: dict[str, tuple[dict[str, Any], str]] = {
    "LoCon": ({"algo": "locon", "linear_alpha": 2, "conv_dim": 3, "conv_alpha": 1.5, "train_norm": True}, "w_norm"),
    "LoCon, Tucker": ({"algo": "locon", "use_tucker": True}, "lora_mid.weight"),
    "DoRA by rows": ({"algo": "locon", "dora_wd": True}, "dora_scale"),
    "DoRA by columns": ({"algo": "locon", "dora_wd": True, "wd_on_output": False}, "dora_scale"),
    "LoHa": ({"algo": "loha", "linear_alpha": 2}, "hada_w1_a"),
    "LoHa, Tucker": ({"algo": "loha", "linear_alpha": 2, "use_tucker": True}, "hada_t1"),
    "LoHa, DoRA": ({"algo": "loha", "dora_wd": True}, "dora_scale"),
    "LoKr": ({"algo": "lokr", "linear_dim": 2}, "lokr_w2_a"),
    "LoKr of factor 8": ({"algo": "lokr", "linear_dim": 2, "factor": 8}, "lokr_w2_a"),
    "LoKr, both in factors": ({"algo": "lokr", "linear_dim": 1, "decompose_both": True}, "lokr_w1_a"),
    "LoKr, both whole": ({"algo": "lokr", "linear_dim": 2, "full_matrix": True}, "lokr_w2"),
    "LoKr, unbalanced": ({"algo": "lokr", "linear_dim": 2, "unbalanced_factorization": True, "factor": 4}, "lokr_w1"),
    "LoKr, Tucker": ({"algo": "lokr", "linear_dim": 1, "use_tucker": True}, "lokr_t2"),
    "LoKr, DoRA": ({"algo": "lokr", "linear_dim": 2, "dora_wd": True}, "dora_scale"),
    "full": ({"algo": "full"}, "diff_b"),
    "GLoRA": ({"algo": "glora", "linear_alpha": 2}, "a1.weight"),
    "(IA)3": ({"algo": "ia3"}, "on_input"),
}


@pytest.mark.parametrize("form", LYCORIS)
def test_lycoris_form_matches_its_live_network(form: str, tmp_path: Path) -> None:
    options, mark = LYCORIS[form]
    unet = adapter_files.pipeline("tiny-sd").unet
    lives = adapter_files.lycoris_file(tmp_path / "a.safetensors", unet, "unet", **options)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert any(key.endswith(f".{mark}") for key in file.keys())  # noqa: SIM118
    adapter = read_adapter(tmp_path / "a.safetensors", adapter_files.spec("tiny-sd"))
    assert adapter.key_format == "lycoris"
    assert adapter_files.worst(adapter, lives) < BOUND


def test_ia3_on_inputs_matches_its_live_module(tmp_path: Path) -> None:
    """create_lycoris has no argument for it: a preset does."""
    wrapper = pytest.importorskip("lycoris.wrapper")
    names = {"Linear": {"algo": "ia3", "train_on_input": True}, "Conv2d": {"algo": "ia3", "train_on_input": True}}
    wrapper.LycorisNetwork.MODULE_ALGO_MAP = names
    try:
        unet = adapter_files.pipeline("tiny-sd").unet
        lives = adapter_files.lycoris_file(tmp_path / "a.safetensors", unet, "unet", algo="ia3", preset="attn-only")
    finally:
        wrapper.LycorisNetwork.MODULE_ALGO_MAP = {}
    adapter = read_adapter(tmp_path / "a.safetensors", adapter_files.spec("tiny-sd"))
    assert all(change.weight.on_input for change in adapter.changes.values())  # type: ignore[union-attr]
    assert adapter_files.worst(adapter, lives) < BOUND


def test_factors_give_the_delta() -> None:
    form = LoRA(torch.randn(3, 5, 3, 3), torch.randn(7, 3), 0.5)
    a, b, scale = form.factors()
    weight = torch.zeros(7, 5, 3, 3)
    assert a.shape == (3, 45)
    assert torch.allclose(form.delta(weight, 0.8), 0.8 * scale * (b @ a).view(7, 5, 3, 3), atol=1e-6)
    assert Change(form).lora is form
    assert Change(DoRA(form, torch.ones(7), False, "peft")).lora is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_delta_is_float32_of_any_stored_dtype(dtype: torch.dtype) -> None:
    down, up = torch.randn(2, 6).to(dtype), torch.randn(4, 2).to(dtype)
    delta = LoRA(down, up, 1.0).delta(torch.zeros(4, 6, dtype=torch.float16))
    assert delta.dtype == torch.float32
    assert torch.equal(delta, up.float() @ down.float())


def test_a_row_of_zeros_has_no_direction() -> None:
    weight = torch.randn(4, 6)
    up = torch.zeros(4, 2)
    weight[1] = 0
    delta = DoRA(LoRA(torch.randn(2, 6), up, 1.0), torch.ones(4), False, "peft").delta(weight)
    assert delta.isfinite().all()
    assert not delta[1].any()


def test_tucker_product_is_its_definition() -> None:
    a, b, core = torch.randn(3, 4), torch.randn(3, 5), torch.randn(3, 3, 2, 2)
    expected = sum(core[i, j] * a[i][:, None, None, None] * b[j][:, None, None] for i in range(3) for j in range(3))
    assert torch.allclose(product((a, b, core)), torch.as_tensor(expected), atol=1e-5)
