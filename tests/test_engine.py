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
from small_network import BATCH, HEIGHT, WIDTH, Tiny, exported, spec
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


def error(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b).abs().max() / b.abs().max()).item()


# ---- on the CPU

SIZES = [
    {},
    {"batch": 1, "tokens": 1, "height": 4, "width": 4},  # the least of everything
    {"batch": 4, "tokens": 20, "height": 16, "width": 16},  # the most
    {"batch": 3, "height": 6, "width": 14},  # between, not square
]
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


# ---- TensorRT-RTX builds with no GPU


@pytest.fixture(scope="module")
def tensorrt() -> Any:
    return importlib.import_module(f"fastldm.export.{backend('tensorrt')}")


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
    engine = open_engine(backend("tensorrt"), model, spec(), device="cuda:0")
    for sizes in SIZES:
        inputs = sample(spec(), sizes, seed=1)
        outputs = engine({name: tensor.to("cuda:0") for name, tensor in inputs.items()})
        assert error(outputs["out_sample"].cpu(), network(*inputs.values())) <= 1e-4
    engine.close()


@pytest.mark.gpu
def test_engine_can_be_captured(model: Path) -> None:
    engine = open_engine(backend("tensorrt"), model, spec(), device="cuda:0")
    inputs = {name: tensor.to("cuda:0") for name, tensor in sample(spec()).items()}
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine(inputs)
        with torch.cuda.graph(graph, stream=stream):
            captured = engine(inputs)["out_sample"]
        inputs["sample"].neg_()
        graph.replay()
        assert torch.equal(captured, engine(inputs)["out_sample"])


def test_tensorrt_lets_activations_be_given() -> None:
    """The calls by which engines share memory, for which a GPU is needed otherwise."""
    trt = pytest.importorskip("fastldm.export.tensorrt", reason="tensorrt_rtx is not installed").trt
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    assert {"set_device_memory", "update_device_memory_size_for_shapes"} <= set(dir(trt.IExecutionContext))


@pytest.mark.gpu
def test_engines_share_the_memory_of_activations(model: Path) -> None:
    engines = [open_engine(backend("tensorrt"), model, spec(), device="cuda:0") for _ in range(2)]
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
