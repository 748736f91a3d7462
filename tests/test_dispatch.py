"""kernels/dispatch.py and kernels/compile.py: which path a call takes, where configurations come from, and kernels
compiled for a GPU that is not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ops
import pytest
import torch
from conftest import ROOT

from benchmarks import first, networks
from fastldm import kernels
from fastldm.kernels import OPS, dispatch, observe, use
from fastldm.kernels.geglu import GEGLU, geglu
from fastldm.kernels.layer_norm import LAYER_NORM
from fastldm.planning import tune

X = torch.randn(3, 64, device=ops.DEVICE)


def test_an_op_whose_gradient_is_wanted_takes_its_reference() -> None:
    with use("triton"):
        assert GEGLU.path(X)
        variable = X.clone().requires_grad_()
        assert "gradient" in GEGLU.path(variable).reason
        assert LAYER_NORM.path(X, X[0], variable[0], 1e-5).reason == GEGLU.path(variable).reason
        (gradient,) = torch.autograd.grad(geglu(variable).sum(), variable)
        with torch.no_grad():
            assert GEGLU.path(variable), "nothing is recorded"
    a, b = X.chunk(2, dim=-1)
    assert ops.error(gradient[:, : a.shape[1]], torch.nn.functional.gelu(b)) < 1e-6


def test_every_file_with_an_op_registers_it() -> None:
    declares = re.compile(r"^[A-Z_0-9]+ = _?\w*(Op|Norm)\($", re.MULTILINE)
    files = {path.stem for path in (ROOT / "kernels").glob("*.py") if declares.search(path.read_text())}
    assert ops.modules() == files
    assert len(OPS) > len(files) > 7
    assert all(op.name == name for name, op in OPS.items())


DUMMY = '''
"""out = 2 x"""
from __future__ import annotations
from torch import Tensor
from fastldm.kernels.dispatch import YES, Cost, Op, cdiv, jit, launch

def dummy_reference(x: Tensor) -> Tensor: return 2 * x

@jit
def _dummy_kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, at < count), at < count)

def dummy_triton(x: Tensor) -> Tensor:
    config, out = DUMMY.config(x), x.new_empty(x.shape)
    launch(_dummy_kernel, (cdiv(x.numel(), config["BLOCK"]),), x, out, x.numel(), **config)
    return out

DUMMY = Op(
    "dummy", reference=dummy_reference, triton=dummy_triton, supports=lambda x: YES, shape_class=lambda x: "any",
    cost=lambda x: Cost(0, 2 * x.nbytes), default=lambda shape, arch: {"BLOCK": 32, "num_warps": 1},
    space=[{"BLOCK": 64, "num_warps": 2}],
)
'''


@pytest.fixture
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dispatch.Op[..., Any]]:
    """An op of a file of its own beside those of kernels/, which is all that adds it."""
    (tmp_path / "dummy.py").write_text(DUMMY)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    before = dict(OPS)
    yield dispatch.load_ops()["dummy"]
    OPS.clear()
    OPS.update(before)
    del sys.modules["fastldm.kernels.dummy"]


def test_an_op_is_added_by_a_file(
    dummy: dispatch.Op[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It runs, and is checked, timed, tuned, compiled and collected with the others."""
    x = torch.randn(5, 9, device=ops.DEVICE)
    assert torch.equal(dummy(x), 2 * x)
    ops.check(dummy, x)
    ops.check_registered(dummy, x)
    assert "dummy" in ops.modules()  # each of which must have tests and faults for them to find
    assert "_dummy_kernel" in ops.kernels()  # each of which must be in benchmarks/aot.py's table

    monkeypatch.setitem(networks.SMALL, "dummy", lambda dtype: dummy(torch.empty(5, 9, dtype=dtype, device="meta")))
    (call,) = networks.calls("dummy", torch.float16)
    context, rows = first.Context(tmp_path, dry=True), []
    monkeypatch.setattr(first, "emit", lambda **row: rows.append(row))
    for stage in ("checks", "ops"):
        commands = [command for entry in first.stages(context) if entry.name == stage for command in entry.commands]
        assert any("dummy" in command for command in commands)
        first.STAGES[stage](context, ["dummy"])
    *_, checked, timed = rows
    assert (checked["op"], checked["tried"], checked["wrong_calls"]) == ("dummy", 1, 0)
    assert timed["us"].keys() == {"triton", "torch"}
    assert "tests/test_dummy.py" in first.suite()
    assert tune.candidates(dummy, "any", 90, *call.arguments("meta"), limit=9) == [
        dummy.default("any", 90),
        *dummy.space,
    ]


def test_an_added_op_goes_with_its_file() -> None:
    assert "dummy" not in ops.modules()


@pytest.mark.skipif(ops.DEVICE == "cuda", reason="about machines without a GPU")
def test_path_names_the_reason_on_a_cpu() -> None:
    assert GEGLU.path(X) == (False, "tensors are on the CPU")
    with use("triton"):
        assert GEGLU.path(X)
    with use("torch"):
        assert "use" in GEGLU.path(X).reason


def test_use_applies_to_its_thread_and_ends() -> None:
    preferences = []
    with use("torch"):
        thread = threading.Thread(target=lambda: preferences.append(dispatch._scope.preference))
        thread.start()
        thread.join()
        assert dispatch._scope.preference == "torch"
    assert preferences == [None]
    assert dispatch._scope.preference is None
    with pytest.raises(ValueError, match='expected "triton" or "torch"'):
        use("cuda")  # type: ignore[arg-type]


def test_use_triton_without_triton_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        use("triton")


def test_observers_see_each_call() -> None:
    calls = []
    with observe(lambda op, args, kwargs: calls.append((op.name, args[0].shape))):
        geglu(X)
    geglu(X)
    assert calls == [("geglu", X.shape)]


def test_observers_are_called_after_the_op_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two calls come the op, and the ops that it calls."""
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


def test_configurations_follow_the_order_of_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
        with dispatch.targeting(dispatch.Target(90)):
            other = {"sm_90": {"geglu": {"c32": {"config": {"ROWS": 4}}}}}
            with dispatch.use_table(other):  # in place of both
                assert GEGLU.config(shape) == {"ROWS": 4}
                assert GEGLU.path(shape)
        tuned.write_text("not json")
        dispatch.table.cache_clear()
        with pytest.raises(ValueError, match=r"tuned\.json: not a table of launch configurations"):
            dispatch.table()
    finally:
        dispatch.table.cache_clear()


def test_torch_compile_traces_the_public_op() -> None:
    compiled = torch.compile(geglu, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), geglu(X))


@pytest.mark.gpu
def test_torch_compile_runs_the_kernel() -> None:
    x = torch.randn(64, 2 * 320, device="cuda", dtype=torch.float16)
    assert torch.equal(torch.compile(geglu, fullgraph=True)(x), geglu(x))


def test_export_gives_torch_ops_on_a_cpu() -> None:
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
from fastldm.planning import dry_run
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
    dry_run.run_unet(config, height=16, width=16, rows=2, tokens=77, dtype=torch.float16)
print(len(ahead.compiled), len(compiles), len(loads))
"""


def _in_a_fresh_process(arch: int, cache: Path) -> tuple[int, int, int]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run([sys.executable, "-c", TRACED, str(arch)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kernels, compiles, loads = map(int, ran.stdout.split())
    return kernels, compiles, loads


@pytest.mark.full
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
