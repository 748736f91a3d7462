"""Backends behind the Engine seam, on small_network, which has every kind of axis that a U-Net has."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_network import BATCH, HEIGHT, SIZES, Tiny, error, exported, spec
from torch import Tensor

from fastldm import device as devices
from fastldm.errors import EngineError, InputError
from fastldm.export import cache as cache_module
from fastldm.export import networks
from fastldm.export.backends import BACKENDS, Backend, engines_of
from fastldm.export.cache import EngineCache
from fastldm.export.engine import bound, open_engine
from fastldm.export.graphs import FILES, STEPS
from fastldm.export.spec import Axis, NetworkSpec, Port, sample
from fastldm.model import choose_backend
from fastldm.sizes import nearest

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def network() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(network: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(network, tmp_path_factory.mktemp("tiny") / "unet")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def backend(name: str) -> str:
    package = {"tensorrt": "tensorrt_rtx"}.get(name, name)
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'fastldm[{BACKENDS[name].extra}]'")
    return name


# ---- on the CPU

# float32 differs in the order of sums alone; bfloat16 has 2^-9 in each of about eight roundings in a row.
RUNS = [("onnxruntime", None, 1e-5), ("openvino", "float32", 1e-5), ("openvino", "bfloat16", 8 * 2**-9)]


@pytest.mark.parametrize(("name", "precision", "tolerance"), RUNS)
def test_backend_matches_pytorch(
    name: str, precision: str | None, tolerance: float, network: Tiny, model: Path
) -> None:
    engine = open_engine(backend(name), model, spec(), precision=precision)
    cached = []
    for sizes in SIZES:
        inputs = sample(spec(), sizes, seed=1)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
        expected = network(*inputs.values())
        outputs = engine(inputs)
        assert set(outputs) == {"out_sample"}
        assert outputs["out_sample"].shape == expected.shape
        assert all(torch.equal(inputs[name], before[name]) for name in before), "inputs are only read"
        cached.append((outputs["out_sample"], expected))
    # Compared at the end: an output is the caller's, and no later call writes to it.
    assert max(error(*pair) for pair in cached) <= tolerance
    engine.close()


def test_float16_on_onnx_runtime(network: Tiny, tmp_path: Path) -> None:
    float16 = Tiny().eval().requires_grad_(False)
    float16.load_state_dict(network.state_dict())
    engine = open_engine(
        backend("onnxruntime"), exported(float16.half(), tmp_path / "unet", "float16"), spec("float16")
    )
    inputs = sample(spec("float16"), seed=1)
    outputs = engine(inputs)
    assert outputs["out_sample"].dtype == torch.float16
    assert error(outputs["out_sample"], network(*(tensor.float() for tensor in inputs.values()))) <= 1e-2


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda inputs: {key: tensor for key, tensor in inputs.items() if key != name}


def replaced(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda inputs: {**inputs, name: tensor}


WRONG = {
    "one is missing": (without("timestep"), "unet got sample, encoder_hidden_states: expected sample, timestep"),
    "one too many": (replaced("other", torch.zeros(1)), "unet got .*, other: expected sample"),
    "dtype": (
        replaced("timestep", torch.zeros(2).long()),
        "timestep is int64 of 1 dimensions on cpu: expected float32",
    ),
    "dimensions": (replaced("timestep", torch.zeros(())), "float32 of 0 dimensions on cpu: expected float32 of 1"),
    "device": (replaced("timestep", torch.zeros(2, device="meta")), "on meta: expected float32 of 1 dimensions on cpu"),
    "channels": (
        replaced("sample", torch.zeros(2, 5, 8, 8)),
        r"sample is \(2, 5, 8, 8\): expected \(batch 1 to 4, 4, ",
    ),
    "not a multiple": (replaced("sample", torch.zeros(2, 4, 9, 8)), "height 4 to 16 in steps of 2"),
    "too large": (replaced("sample", torch.zeros(2, 4, 8, 18)), "width 4 to 16 in steps of 2"),
    "too small": (replaced("sample", torch.zeros(2, 4, 2, 8)), "height 4 to 16 in steps of 2"),
    "two batches": (replaced("timestep", torch.zeros(3)), r"timestep is \(3,\): expected \(batch 1 to 4\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_outside_spec_are_refused(wrong: str) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(InputError, match=message):
        bound(spec(), change(sample(spec())), CPU)


def test_contiguous_inputs_are_not_copied() -> None:
    inputs = sample(spec())
    ins, outs = bound(spec(), inputs, CPU)
    assert all(ins[name] is inputs[name] for name in inputs)
    assert {name: tuple(tensor.shape) for name, tensor in outs.items()} == {"out_sample": (2, 3, 16, 16)}


@pytest.mark.parametrize("axis", [HEIGHT, BATCH, Axis("width", 3, 3, 3, 3), Axis("width", 16, 64, 128, 8)])
def test_nearest_returns_closest_size(axis: Axis) -> None:
    valid = range(axis.least, axis.most + 1, axis.multiple_of)
    for size in range(-3, 2 * axis.most):
        assert nearest(axis, size) == min(valid, key=lambda valid_size: abs(valid_size - size))


# ---- what is kept


@pytest.mark.parametrize("external", [False, True])  # weights in the graph's file or beside it
def test_openvino_compiles_once(
    external: bool, network: Tiny, model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"fastldm.export.{backend('openvino')}")
    onnx, path = pytest.importorskip("onnx"), tmp_path / "model.onnx"
    options = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 0} if external else {}
    onnx.save_model(onnx.load(model), path, **options)
    inputs = sample(spec(), seed=1)
    compiled = open_engine("openvino", path, spec())(inputs)["out_sample"]
    assert error(compiled, network(*inputs.values())) <= 1e-5
    (entry,) = cache.glob("*/engine")

    def no_model(self: Any, path: Path) -> None:
        raise AssertionError("compiled although it was kept")

    with monkeypatch.context() as patch:
        patch.setattr(module.ov.Core, "read_model", no_model)
        assert torch.equal(open_engine("openvino", path, spec())(inputs)["out_sample"], compiled)
    entry.write_bytes(entry.read_bytes()[:1000])  # as a full disk leaves a file that was copied by hand
    assert torch.equal(open_engine("openvino", path, spec())(inputs)["out_sample"], compiled)
    if module.has_bfloat16():
        open_engine("openvino", path, spec(), precision="bfloat16")
    assert len([stored for stored in EngineCache(cache).entries() if not stored.aside]) == 1 + module.has_bfloat16()
    # Other weights under the same graph are another engine: none is run with weights that it was not compiled for.
    if external:
        data = bytearray((tmp_path / "model.onnx_data").read_bytes())
        data[:4] = b"\0\0\0\0"
        (tmp_path / "model.onnx_data").write_bytes(data)
        assert not torch.equal(open_engine("openvino", path, spec())(inputs)["out_sample"], compiled)


def test_engine_key_depends_on_cpu_instructions(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Virtual machines call different processors by one name: two on one cache leave each other's engines alone."""
    module = importlib.import_module(f"fastldm.export.{backend('openvino')}")
    for flags in ("fma avx2", "fma avx2 avx512f", "fma avx2", "fma avx2 avx512f"):
        monkeypatch.setattr(module, "instructions", lambda flags=flags: flags)
        open_engine("openvino", model, spec())
    cached = EngineCache(cache).entries()
    assert [entry.aside for entry in cached] == [False, False]
    assert {entry.key.device.rpartition("fma")[2] for entry in cached if entry.key} == {" avx2", " avx2 avx512f"}
    assert len(caplog.records) == 1  # the second of them says that the first's is not for it


def test_instructions_are_read_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    output = ["model name\t: Xeon", "flags\t\t: fpu vme sse2 fma avx2 ibrs avx512_bf16 amx_tile md_clear", "bugs\t:"]
    monkeypatch.setattr(cache_module, "_lines", lambda path: output)
    assert cache_module.instructions() == "amx_tile avx2 avx512_bf16 fma sse2"
    monkeypatch.setattr(cache_module, "_lines", lambda path: ["Features : fp asimd sve bf16 crc32"])
    assert cache_module.instructions() == "asimd bf16 sve"
    monkeypatch.setattr(cache_module, "_lines", lambda path: [])
    assert cache_module.instructions() == torch.backends.cpu.get_cpu_capability()


def test_onnx_runtime_writes_nothing_to_home(model: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests" / "support")!r}, {str(ROOT)!r}]
from pathlib import Path
import small_network
from fastldm.export.engine import open_engine
from fastldm.export.spec import sample
given = small_network.spec()
open_engine("onnxruntime", Path({str(model)!r}), given)(sample(given))
"""
    set_here = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in set_here}
    home = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **home}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name.lower()]


# ---- what cannot run


def test_bfloat16_is_refused_without_cpu_support(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"fastldm.export.{backend('openvino')}")
    monkeypatch.setattr(module, "_capabilities", lambda: ["FP32", "INT8"])
    with pytest.raises(EngineError, match="OpenVINO has no bfloat16 on this CPU, only float32"):
        open_engine("openvino", model, spec(), precision="bfloat16")
    # What it takes by default is then the other, also where PyTorch calls the processor able.
    monkeypatch.setattr(devices, "bfloat16_is_faster", lambda: True)
    assert networks.precision(None, "openvino", CPU, None) == "float32"  # type: ignore[arg-type]


@pytest.mark.parametrize("queries", [4, 6])
def test_openvino_is_right_with_any_number_of_queries(queries: int, tmp_path: Path) -> None:
    """As many queries as heads, 4, are what OpenVINO 2026.4.1 by itself computes wrongly, by half of the result."""
    module = importlib.import_module(f"fastldm.export.{backend('openvino')}")
    if not module.has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    sizes = {"q": Axis("queries", 1, 4, 16), "k": 16, "v": 16}
    network = NetworkSpec(
        STEPS,
        tuple(Port(name, "float32", (2, size, 128)) for name, size in sizes.items()),
        (Port("out", "float32", (2, sizes["q"], 128)),),
    )
    save_attention(tmp_path / FILES[STEPS])
    inputs = sample(network, {"queries": queries}, seed=0)
    heads = [x.unflatten(2, (4, 32)).transpose(1, 2) for x in inputs.values()]
    expected = torch.softmax(heads[0] @ heads[1].mT, -1) @ heads[2]
    engine = open_engine("openvino", tmp_path / FILES[STEPS], network, precision="bfloat16")
    assert error(engine(inputs)["out"], expected.transpose(1, 2).flatten(2)) < 0.05


def save_attention(path: Path) -> None:
    """A graph of attention with 4 heads: q (2, N, 128), k and v (2, 16, 128) -> out (2, N, 128)."""
    of_heads, together = np.array([0, 0, 4, 32]), np.array([0, 0, 128])
    nodes = []
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(helper.make_node("Reshape", [name, "of_heads"], [f"{name}4"]))
        nodes.append(helper.make_node("Transpose", [f"{name}4"], [f"{name}t"], perm=order))
    nodes.append(helper.make_node("MatMul", ["qt", "kt"], ["scores"]))
    nodes.append(helper.make_node("Softmax", ["scores"], ["weights"], axis=-1))
    nodes.append(helper.make_node("MatMul", ["weights", "vt"], ["of_each"]))
    nodes.append(helper.make_node("Transpose", ["of_each"], ["side_by_side"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["side_by_side", "together"], ["out"]))
    lengths = {"q": "queries", "k": 16, "v": 16, "out": "queries"}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, length, 128]) for n, length in lengths.items()]
    numbers = {"of_heads": of_heads, "together": together}
    constants = [numpy_helper.from_array(value, name) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "attention", values[:3], values[3:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="backend is 'tvm': expected one of onnxruntime-graph, onnxruntime, openvino-graph, openvino, tensorrt",
    ):
        open_engine("tvm", tmp_path, spec())


def test_backend_needs_file_and_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("fastldm.export.dummy")
    module.open_engine = lambda path, spec, device, precision, hashes, threads: (path, device.type)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(BACKENDS, "dummy", Backend("dummy-extra", ("dummy",), ("cpu",)))
    (tmp_path / "model.onnx").touch()
    assert open_engine("dummy", tmp_path / "model.onnx", spec()) == (tmp_path / "model.onnx", "cpu")
    with pytest.raises(InputError, match=r"expected auto, torch, .*tensorrt, dummy"):
        choose_backend("other", "default", CPU)
    with pytest.raises(InputError, match="dummy runs bundles"):
        choose_backend("dummy", "default", CPU)


def test_the_command_offers_every_backend() -> None:
    code = """
from fastldm.export.backends import BACKENDS, Backend
BACKENDS["dummy"] = Backend("dummy-extra", ("dummy",), ("cpu",))
from fastldm.cli import main
for command in ("generate", "plan", "profile", "verify", "bench"):
    choices = next(option for option in main.commands[command].params if option.name == "backend").type.choices
    assert "dummy" in choices, command
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_missing_backend_names_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, f"fastldm.export.{engines_of(name)}", raising=False)
    with pytest.raises(EngineError, match=rf"backend '{name}' cannot be imported.*fastldm\[{BACKENDS[name].extra}\]"):
        open_engine(name, tmp_path / "model.onnx", spec())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_missing_and_damaged_files_are_named(name: str, model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model.onnx"
    with pytest.raises(EngineError, match="does not exist: expected the unet of a bundle"):
        open_engine(backend(name), damaged, spec())
    damaged.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(EngineError, match=f"cannot load {damaged}: ."):
        open_engine(name, damaged, spec())


@pytest.mark.parametrize(
    ("name", "device", "precision", "message"),
    [
        ("onnxruntime", "cpu", "bfloat16", "computes in what the file holds, float32, not in bfloat16"),
        ("openvino", "cpu", "float16", "computes in float32 or bfloat16 on a CPU, not in float16"),
        ("openvino", "cuda", None, "runs on the CPU, not on cuda"),
        ("tensorrt", "cpu", None, "runs on NVIDIA GPUs, not on cpu"),
        ("tensorrt", "cuda", "bfloat16", "computes in what the file holds, float32, not in bfloat16"),
    ],
)
def test_unsupported_precision_or_device_is_named(
    name: str, device: str, precision: str | None, message: str, model: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        open_engine(backend(name), model, spec(), device=device, precision=precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("claimed", [False, True])
def test_onnx_runtime_never_falls_back_silently(claimed: bool, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"fastldm.export.{backend('onnxruntime')}")
    if claimed:  # as onnxruntime-gpu does on a machine without CUDA: it has the provider, and cannot start it
        monkeypatch.setattr(module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    message = "could not start its CUDAExecutionProvider" if claimed else r"cannot run on cuda.*fastldm\[onnx-gpu\]"
    with pytest.raises(EngineError, match=message):
        open_engine("onnxruntime", model, spec(), device="cuda")
