"""kernels/dispatch.py and kernels/compile.py: which path a call takes, where configurations come from, and kernels
compiled for a GPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ops
import pytest
import torch
from conftest import ROOT

from fastldm.kernels import OPS, dispatch, observe, use
from fastldm.kernels.geglu import GEGLU, geglu
from fastldm.kernels.layer_norm import LAYER_NORM

X = torch.randn(3, 64, device=ops.DEVICE)


def test_every_op_is_registered_under_its_own_name() -> None:
    import fastldm.kernels.step
    import fastldm.models.layers  # noqa: F401

    assert {"attention", "group_norm", "layer_norm", "geglu", "conv2d", "linear"} <= OPS.keys()
    assert all(op.name == name for name, op in OPS.items())


@pytest.mark.skipif(ops.DEVICE == "cuda", reason="about machines without a GPU")
def test_on_a_cpu_the_reference_runs_and_doctor_can_say_why() -> None:
    assert GEGLU.path(X) == (False, "tensors are on the CPU")
    with use("triton"):
        assert GEGLU.path(X)
    with use("torch"):
        assert "use" in GEGLU.path(X).why


def test_use_holds_for_its_thread_and_ends() -> None:
    found = []
    with use("torch"):
        other = threading.Thread(target=lambda: found.append(dispatch._scope.preference))
        other.start()
        other.join()
        assert dispatch._scope.preference == "torch"
    assert found == [None]
    assert dispatch._scope.preference is None
    with pytest.raises(ValueError, match='expected "triton" or "torch"'):
        use("cuda")  # type: ignore[arg-type]


def test_use_triton_without_triton_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        use("triton")


def test_observers_see_each_call() -> None:
    seen = []
    with observe(lambda op, args, kwargs: seen.append((op.name, args[0].shape))):
        geglu(X)
    geglu(X)
    assert seen == [("geglu", X.shape)]


def test_observers_may_ask_to_be_called_when_the_op_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between the two is all of the op, and the ops that it is made of."""
    order: list[str] = []

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        order.append(f"{op.name} begins")
        return lambda: order.append(f"{op.name} has run")

    def reference(x: torch.Tensor) -> torch.Tensor:
        order.append("inside")
        return LAYER_NORM(x, x[0], x[0], 1e-5)

    monkeypatch.setattr(GEGLU, "reference", reference)
    with use("torch"), observe(watch):
        geglu(X)
    assert order == ["geglu begins", "inside", "layer_norm begins", "layer_norm has run", "geglu has run"]


def test_the_table_and_who_overrules_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forced, then FASTLDM_TUNED, then what ships, then the op's default; a path of "torch" is heeded."""
    shape = torch.empty(4, 64, device="meta")
    config = {"ROWS": 1, "CHANNELS": 256, "num_warps": 2}
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"sm_90": {"geglu": {"c32": {"config": config, "path": "torch"}}}}))
    monkeypatch.setenv("FASTLDM_TUNED", str(tuned))
    dispatch.table.cache_clear()
    try:
        with dispatch.targeting(dispatch.Target(90)):
            assert GEGLU.config(shape) == config
            assert GEGLU.path(shape) == (False, "torch's own is faster here, says the table")
            with dispatch.forced("geglu", {"ROWS": 8}):
                assert GEGLU.config(shape) == {"ROWS": 8}
        with dispatch.targeting(dispatch.Target(80)):
            assert GEGLU.config(shape) == GEGLU.default("c32", 80)
            assert GEGLU.path(shape)
        tuned.write_text("not json")
        dispatch.table.cache_clear()
        with pytest.raises(ValueError, match=r"tuned\.json: not a table of launch configurations"):
            dispatch.table()
    finally:
        dispatch.table.cache_clear()


def test_torch_compile_takes_the_public_op_whole() -> None:
    compiled = torch.compile(geglu, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), geglu(X))


@pytest.mark.gpu
def test_torch_compile_sees_the_kernel() -> None:
    x = torch.randn(64, 2 * 320, device="cuda", dtype=torch.float16)
    assert torch.equal(torch.compile(geglu, fullgraph=True)(x), geglu(x))


def test_export_gives_plain_torch_ops_on_a_cpu() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return geglu(x)

    graph = torch.export.export(Net(), (torch.randn(3, 64),)).graph
    assert not [node for node in graph.nodes if "fastldm" in str(node.target)]


# ---- compiled for a GPU that is not here ----

TRACED = """
import sys, torch
from pathlib import Path
from fastldm.models.config import UNetConfig
from fastldm.planning import dry
from fastldm.kernels.compile import Ahead
from fastldm.kernels.dispatch import targeting
import triton
loads, compiles = [], []
def listen(**event): (loads if event["cache_hit"] else compiles).append(event["src"].name)
triton.knobs.compilation.listener = listen
config = UNetConfig.from_dict({
    "block_out_channels": [64, 128], "layers_per_block": 1, "attention_head_dim": 1, "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
})
ahead = Ahead(int(sys.argv[1]))
with targeting(ahead):
    dry.run_unet(config, height=16, width=16, rows=2, tokens=77, dtype=torch.float16)
print(len(ahead.compiled), len(compiles), len(loads))
"""


def _in_a_fresh_process(arch: int, cache: Path) -> tuple[int, int, int]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run([sys.executable, "-c", TRACED, str(arch)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kernels, compiles, loads = map(int, ran.stdout.split())
    return kernels, compiles, loads


def test_what_is_warmed_is_not_compiled_again(tmp_path: Path) -> None:
    """A second process that stands for a machine with an sm_90 finds every kernel in the cache; an sm_80 finds none."""
    kernels, compiles, loads = _in_a_fresh_process(90, tmp_path)
    assert (compiles, loads) == (kernels, 0)
    assert kernels > 3
    assert _in_a_fresh_process(90, tmp_path) == (kernels, 0, kernels)
    assert _in_a_fresh_process(80, tmp_path)[1] > 0


def test_an_interpreter_cannot_compile() -> None:
    from fastldm.kernels.compile import Ahead

    with pytest.raises(ValueError, match="expected one of 80, 86"):
        Ahead(75)
    if dispatch.interpreting():
        with pytest.raises(RuntimeError, match="unset it"):
            Ahead(90)
