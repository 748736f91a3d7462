"""benchmarks/predict.py: the model's arithmetic, and that its table counts the launches of a captured step."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT
from counters import Launches, Nodes

from benchmarks import predict, sass
from fastldm.kernels import dispatch


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
            with Nodes() as nodes:
                run()
        assert nodes.count + launches.count == tables[name]["launches"]
        assert tables[name]["ms"] == pytest.approx(sum(part["ms"] for part in tables[name]["parts"].values()), abs=0.01)


def test_the_rate_of_bytes_is_below_the_data_sheet() -> None:
    assert predict.BYTES < sass.DEVICE_BYTES * predict.MULTIPROCESSORS * predict.CLOCK
