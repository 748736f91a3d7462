"""benchmarks/predict.py: the model's arithmetic, and that its table counts the launches of a captured step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from counters import Launches, Nodes

from benchmarks import designs, predict, sass
from fastldm.kernels import dispatch
from fastldm.kernels.linear import columns_of


def test_large_products_are_bound_by_the_matrix_units() -> None:
    seconds, bound = predict.matrix_product(8192, 8192, 8192)
    assert bound == "matrix"
    assert 600e12 < 2 * 8192**3 / seconds < 800e12, "of 949 at this clock"


def test_thin_products_are_bound_by_bytes() -> None:
    seconds, bound = predict.matrix_product(16, 8192, 8192)
    assert bound in ("bytes", "cache")
    assert seconds >= 2 * 8192**2 / predict.BYTES


def test_more_rounds_take_longer() -> None:
    times = [predict.matrix_product(rows, 1280, 1280)[0] for rows in (128, 1024, 8192, 65536)]
    assert times == sorted(times)
    assert times[3] > 6 * times[2]


def test_every_looping_kernel_has_its_iterations() -> None:
    """A kernel whose loop were counted once would be predicted far too fast."""
    listed = json.loads((ROOT / "benchmarks" / "results" / "sass.json").read_text())
    assert {entry["kernel"] for entry in listed if entry["loops"]} <= predict.ITERATIONS.keys()


def test_the_table_is_of_this_code() -> None:
    """Launches are those that tests allow a captured step; times are not compared, for they are of a model."""
    tables = json.loads((ROOT / "benchmarks" / "results" / "predicted.json").read_text())
    for name, make in predict.WORKLOADS.items():
        launches = Launches()
        with dispatch.targeting(launches):
            run = make(torch.float16)
            launches.count = 0  # of what making it launched
            with Nodes() as nodes:
                run()
        assert nodes.count + launches.count == tables[name]["launches"]
        assert tables[name]["ms"] == pytest.approx(sum(part["ms"] for part in tables[name]["parts"].values()), abs=0.01)


def test_the_predicted_table_takes_the_faster_path() -> None:
    """For each class of an op that a library computes by default; and a step by it is predicted to be faster."""
    results = ROOT / "benchmarks" / "results"
    table = json.loads((results / "predicted_table.json").read_text())["sm_90"]
    dispatch.load_ops()
    assert table.keys() == {name for name, op in dispatch.OPS.items() if op.prefer == "torch"}
    for entries in table.values():
        for entry in entries.values():
            us = entry["predicted"]
            assert entry["path"] == ("triton" if us["us"] <= us["torch_us"] else "torch")
    for total in json.loads((results / "predicted.json").read_text()).values():
        assert total["by table"]["ms"] < total["ms"]


def test_convolutions_taken_by_default_are_faster_cautiously_too() -> None:
    """Of all shapes of the networks: with the efficiency of a library's tile and partial sums written and read,
    against the library without the pass for bias and residual that it needs."""
    table = json.loads((ROOT / "benchmarks" / "results" / "predicted_table.json").read_text())["sm_90"]
    taken = 0
    for name in ("conv2d", "upsample_conv2d"):
        op = dispatch.load_ops()[name]
        for shape_class in filter(lambda shape_class: op.faster(shape_class, 90), table[name]):
            m, n, k = map(int, re.findall(r"\d+", shape_class))
            config = op.default(shape_class, 90)
            rows, columns, split = config["BLOCK_M"], columns_of(config), config["SPLIT"]
            rounds = dispatch.cdiv(dispatch.cdiv(m, rows) * dispatch.cdiv(n, columns) * split, predict.MULTIPROCESSORS)
            matrix = 2 * rows * columns * dispatch.cdiv(k, split) / sass.MATRIX / predict.efficiency(rows * columns)
            own = rounds * matrix / predict.CLOCK
            if split > 1:
                own += 8 * m * n * split / predict.BYTES + predict.GAP + predict.RAMP
            assert own < 1.01 * predict.matrix_product(m, n, k, elements=0)[0], shape_class
            taken += 1
    assert taken >= 20


TABLED = """
import torch
from benchmarks import networks, predict
from fastldm.kernels import dispatch
from fastldm.planning import dry_run

shape = {"height": 8, "width": 8, "rows": 2, "tokens": 77}
predict.WORKLOADS["tiny"] = lambda dtype: dry_run.step(networks.TINY, **shape, dtype=dtype)
dispatch.load_ops()
linear = dispatch.OPS["linear"]
with dispatch.targeting(dispatch.Target(90)):
    calls = [call for call in networks.calls("tiny step", torch.float16) if call.op == "linear"]
    classes = {linear.shape_class(*call.arguments("meta")[0]) for call in calls}
config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
table = {"sm_90": {"linear": {shape: {"path": "triton", "config": config} for shape in classes}}}
print(*sorted({node.kernel for node in predict.nodes("tiny", table) if node.op == "linear"}))
"""


@pytest.mark.full
def test_a_table_decides_which_kernels_a_prediction_has() -> None:
    """A step with every product of a linear layer by fastldm's kernel has none of cuBLAS."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TABLED], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == ["linear_kernel"]


def test_designs_differ_from_the_default() -> None:
    """Every entry is of a class that a step has, and makes another choice for it; a prediction may agree."""
    tables = designs.design_tables("sd15-512 step", torch.float16, 90)
    assert {"products as predicted", "gate by the library", "attention by PyTorch"} < tables.keys()
    assert {"gate in one program a multiprocessor", "convolution and norm apart"} < tables.keys()
    assert "convolutions by the library" in tables
    for title, entries in tables.items():
        assert entries
        for call, entry in entries:
            op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
            with dispatch.targeting(dispatch.Target(90)):
                by_default = (bool(op.path(*args, **kwargs)), op.config(*args, **kwargs))
                with dispatch.use_table(designs.as_table(90, entries)):
                    chosen = (bool(op.path(*args, **kwargs)), op.config(*args, **kwargs))
            assert chosen == (entry["path"] == "triton", entry["config"])
            assert chosen != by_default or title == "products as predicted"


def test_the_rate_of_bytes_is_below_the_data_sheet() -> None:
    assert predict.BYTES < sass.DEVICE_BYTES * predict.MULTIPROCESSORS * predict.CLOCK
