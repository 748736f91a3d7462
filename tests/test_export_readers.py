"""Bundles of models that read T5's states, or vectors of pictures: IF, Kandinsky 2.2, stable unCLIP of texts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import bundles
import deepfloyd
import onnx
import picture_readers
import pytest
import torch

from fastldm.export.onnx import write
from fastldm.export.onnxruntime import ONNXRuntimeEngine
from fastldm.export.parity import difference
from fastldm.export.reference import ReferenceNetworks
from fastldm.export.spec import sample
from fastldm.loading import spec as loading

Options = dict[str, Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of diffusers' pipelines."""
    made = {"if": deepfloyd.first_stage, "text-unclip": picture_readers.unclip_of_text}
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, make in made.items():
        make().save_pretrained(folders[name])
    return folders


def error(networks: ReferenceNetworks, name: str, folder: Path, **options: Any) -> float:
    """The largest relative error of a network in ONNX Runtime, at sizes that were not traced."""
    write(networks, name, folder, **options)
    spec, worst = networks.specs[name], 0.0
    engine = ONNXRuntimeEngine(folder / "model.onnx", spec, torch.device("cpu"))
    for seed, sizes in enumerate(({"batch": 1}, {"batch": 5, "tokens": 7})):
        inputs = sample(spec, sizes, seed)
        expected, actual = networks.run(name, inputs), engine(inputs)
        worst = max(worst, *(difference(actual[port.name], expected[port.name]).relative for port in spec.outputs))
    return worst


OPTIONS = [{}, {"opset": 23}, {"fused_ops": True}]


@pytest.mark.parametrize("options", [OPTIONS[0], *(pytest.param(own, marks=pytest.mark.full) for own in OPTIONS[1:])])
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("if", "text_encoder"),
        ("text-unclip", "prior_kv"),
        ("text-unclip", "prior_step"),
        pytest.param("text-unclip", "prior_text_encoder", marks=pytest.mark.full),
        pytest.param("text-unclip", "prior_vectors", marks=pytest.mark.full),
    ],
)
def test_network_equals_pytorch(
    source: str, name: str, options: Options, sources: dict[str, Path], tmp_path: Path
) -> None:
    networks = ReferenceNetworks(loading.describe(sources[source]), "float32")
    assert error(networks, name, tmp_path / name, **options) < 1e-5
    ops = {node.op_type for node in onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph.node}
    assert "Log" not in ops  # whose last bit would be another distance's bucket


@pytest.mark.parametrize(
    ("family", "split", "backend"),
    [
        ("sd2-unclip-prior", True, "onnxruntime"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in itertools.product(bundles.READERS, (True, False), ("onnxruntime", "openvino"))
            if case != ("sd2-unclip-prior", True, "onnxruntime")
        ),
    ],
)
def test_bundle_makes_pytorchs_images(
    family: str, split: bool, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundles.expect_images(family, split, backend, tmp_path_factory)
