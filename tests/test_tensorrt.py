"""Engines of TensorRT-RTX, which builds them with no GPU; those that run one need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_network import BATCH, HEIGHT, SIZES, WIDTH, Tiny, error, exported, spec

from fastldm.errors import EngineError, InputError
from fastldm.export.engine import open_engine
from fastldm.export.spec import NetworkSpec, Port, sample

REASON = "tensorrt_rtx is not installed: pip install 'fastldm[tensorrt]'"


@pytest.fixture(scope="module")
def network() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(network: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(network, tmp_path_factory.mktemp("tiny") / "unet")


@pytest.fixture(scope="module")
def tensorrt() -> Any:
    return pytest.importorskip("fastldm.export.tensorrt", reason=REASON)


def test_engine_builds_without_gpu(tensorrt: Any, model: Path) -> None:
    # An engine cannot be opened without a GPU; that it names all ports says that it is one. What it knows of one GPU
    # more, and of one profile more, takes room.
    def size(**options: Any) -> int:
        engine = tensorrt.build(model, spec(), **options)
        assert all(port.name.encode() in engine for port in (*spec().inputs, *spec().outputs))
        return len(engine)

    shape = tensorrt.static(spec(), {"height": 16})
    assert size(profiles=[shape], capabilities=[89]) < size(profiles=[shape], capabilities=[89, 120])
    ranges = [{"height": (4, 4, 8), "width": (4, 4, 8)}, {"height": (8, 16, 16)}]
    assert size(profiles=[shape]) < size(profiles=ranges[:1]) < size(profiles=ranges)


def test_profile_has_least_best_and_most_shapes(tensorrt: Any) -> None:
    matches = tensorrt.shapes(spec(), {"height": (4, 8, 8), "batch": (2, 2, 2)})
    assert matches == {
        "sample": ((2, 4, 4, 4), (2, 4, 8, 8), (2, 4, 8, 16)),
        "timestep": ((2,), (2,), (2,)),
        "encoder_hidden_states": ((2, 1, 12), (2, 7, 12), (2, 20, 12)),
    }
    fixed = tensorrt.shapes(spec(), tensorrt.static(spec(), {"height": 16}))
    assert fixed["sample"] == ((2, 4, 16, 8),) * 3


def test_attention_as_one_node_is_built_in_float32_too(tensorrt: Any, network: Tiny, tmp_path: Path) -> None:
    path = exported(network, tmp_path / "unet", opset=23)
    assert b"Attention" in path.read_bytes()
    assert len(tensorrt.build(path, spec(), profiles=[tensorrt.static(spec(), {})], capabilities=[86])) > 10_000


def changed(**ports: Port) -> NetworkSpec:
    original = spec()
    inputs = tuple(ports.get(port.name, port) for port in original.inputs)
    return NetworkSpec("unet", inputs, tuple(ports.get(port.name, port) for port in original.outputs))


@pytest.mark.parametrize(
    ("changed_spec", "message"),
    [
        (changed(sample=Port("sample", "float16", (BATCH, 4, HEIGHT, WIDTH))), "the inputs .* found sample float32"),
        (changed(sample=Port("latent", "float32", (BATCH, 4, HEIGHT, WIDTH))), "expected latent float32"),
        (changed(sample=Port("sample", "float32", (BATCH, 4, 8, WIDTH))), r"expected sample float32 \(-1, 4, 8, -1\)"),
        (changed(out_sample=Port("out_sample", "float32", (BATCH, 4, HEIGHT, WIDTH))), "the outputs .* are not what"),
    ],
)
def test_network_with_other_ports_is_not_built(
    changed_spec: NetworkSpec, message: str, tensorrt: Any, model: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        tensorrt.build(model, changed_spec)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"depth": (1, 1, 1)}, "unet has no axis 'depth': expected some of "),
        ({"height": (4, 8, 32)}, "from 4 over 8 to 32: expected ascending multiples of 2 from 4 to 16"),
        ({"height": (4, 7, 8)}, "from 4 over 7 to 8"),
        ({"batch": (2, 1, 4)}, "from 2 over 1 to 4"),
    ],
)
def test_ranges_outside_spec_are_refused(ranges: dict[str, Any], message: str, tensorrt: Any, model: Path) -> None:
    with pytest.raises(InputError, match=message):
        tensorrt.build(model, spec(), profiles=[ranges])


def test_unsupported_gpus_are_refused_by_name(tensorrt: Any, model: Path) -> None:
    with pytest.raises(InputError, match=r"does not build for sm_90: expected .*sm_89, sm_120"):
        tensorrt.build(model, spec(), capabilities=[90])


def test_a_damaged_network_is_named(tensorrt: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model.read_bytes()[:1000])
    with pytest.raises(EngineError, match=f"cannot read {tmp_path / 'model.onnx'}: ."):
        tensorrt.build(tmp_path / "model.onnx", spec())


def test_key_depends_on_all_engine_inputs(tensorrt: Any, model: Path, tmp_path: Path) -> None:
    def key(**changes: Any) -> str:
        return tensorrt.key_of(path, spec(), **{"gpu": "A sm_89", **changes}).digest

    path = tmp_path / "model.onnx"
    path.write_bytes(model.read_bytes())
    keys = [key(), key(gpu="B sm_89"), key(profiles=[{"height": (4, 4, 4)}]), key(profiles=[{}, {}])]
    assert key(profiles=[{"batch": (1, 2, 4)}]) == keys[0], "the spec's own ranges, spelled out"
    (tmp_path / "model.onnx_data").write_bytes(b"weights")
    keys.append(key())
    (tmp_path / "model.onnx_data").write_bytes(b"Weights")
    keys.append(key())
    path.write_bytes(model.read_bytes() + b"\0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.gpu
def test_gpu_engine_matches_pytorch(network: Tiny, model: Path) -> None:
    engine = open_engine("tensorrt", model, spec(), device="cuda:0")
    for sizes in SIZES:
        inputs = sample(spec(), sizes, seed=1)
        outputs = engine({name: tensor.to("cuda:0") for name, tensor in inputs.items()})
        assert error(outputs["out_sample"].cpu(), network(*inputs.values())) <= 1e-4
    engine.close()


@pytest.mark.gpu
def test_engine_can_be_captured(model: Path) -> None:
    engine = open_engine("tensorrt", model, spec(), device="cuda:0")
    inputs = {name: tensor.to("cuda:0") for name, tensor in sample(spec()).items()}
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine(inputs)
        with torch.cuda.graph(graph, stream=stream):
            captured = engine(inputs)["out_sample"]
        inputs["sample"].neg_()
        graph.replay()
        assert torch.equal(captured, engine(inputs)["out_sample"])


def test_activations_can_be_given(tensorrt: Any) -> None:
    """The calls by which engines share memory, for which a GPU is needed otherwise."""
    trt = tensorrt.trt
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    assert {"set_device_memory", "update_device_memory_size_for_shapes"} <= set(dir(trt.IExecutionContext))


@pytest.mark.gpu
def test_engines_share_the_memory_of_activations(model: Path) -> None:
    engines = [open_engine("tensorrt", model, spec(), device="cuda:0") for _ in range(2)]
    inputs = {name: tensor.to("cuda:0") for name, tensor in sample(spec()).items()}

    def peak(count: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        for engine in engines[:count]:
            engine(inputs)
        return torch.cuda.max_memory_allocated()

    peak(2)
    assert peak(2) == peak(1)
    held = torch.cuda.memory_allocated()
    engines[0](inputs)
    assert torch.cuda.memory_allocated() == held
