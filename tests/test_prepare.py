"""Prepared weights: where they lie, and that every way to change them reaches the next step.

The judge of a change is diffusers' or transformers' own module, changed the same way.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.kernels import conv, dispatch, linear, onednn
from fastldm.loading import adoption, prepare
from fastldm.loading import spec as loading
from fastldm.loading.state import load_module
from fastldm.models import UNet
from fastldm.models.clip import SelfAttention
from fastldm.models.layers import Attention

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5  # max |a - b| / max |b|, as in peer_networks: float32 rounding through a network
HALF_TOLERANCE = 1e-2  # float16's, as in peer_networks

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights padded and folded as for a GPU, on the CPU and in any dtype."""
    for module in (conv, linear, prepare):
        monkeypatch.setattr(module, "fast_library", lambda x: True)


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def adopt(pipe: Any) -> loading.LoadedModel:
    """As Pipeline.from_diffusers does."""
    spec = loading.spec_of(adoption.describe_diffusers(pipe))
    components = {name: getattr(pipe, name) for name in spec.checkpoint.components}
    return loading.load(spec, lambda module, name: adoption.adopt(module, components[name]), components)


def load(folder: Path) -> loading.LoadedModel:
    """As Pipeline.from_pretrained does."""
    spec = loading.describe(folder)

    def fill(module: nn.Module, name: str) -> nn.Module:
        component = spec.checkpoint.components[name]
        return load_module(module, component.state(to_prepare=True), dtype=torch.float32, source=component.source)

    return loading.load(spec, fill)


def network(networks: loading.LoadedModel, name: str) -> nn.Module:
    return networks.text_stages[0].model if name == "text_encoder" else getattr(networks, name)


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, tiny.VOCABULARY - 2, (2, 9), generator=torch.Generator().manual_seed(2))
RUNS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {  # ours, the judge's
    "unet": (lambda net: net(NOISE, 500, TEXT), lambda net: net(NOISE, 500, TEXT).sample),
    "vae": (lambda net: net.decode(NOISE), lambda net: net.decode(NOISE).sample),
    "text_encoder": (lambda net: net(IDS)[0], lambda net: net(IDS).last_hidden_state),
}

# --------------------------------------------------------------------------------------------- where they lie


def products(run: Callable[[], Any]) -> list[tuple[int, tuple[int, ...]]]:
    """Address and shape of each matrix that `run` multiplies by."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def watch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.name == "linear":
            seen.append((args[1].data_ptr(), tuple(args[1].shape)))

    with dispatch.observe(watch):
        run()
    return seen


def test_query_key_and_value_are_one_product() -> None:
    ours = adopt(tiny.pipeline("sd1"))
    for name, run in RUNS.items():
        net = network(ours, name)
        seen = products(lambda: run[0](net))  # noqa: B023
        for path, layer in net.named_modules():
            if path.endswith("attn2"):
                keys = layer.to_k.weight
                assert (keys.data_ptr(), (2 * keys.shape[0], keys.shape[1])) in seen
                assert layer.to_v.weight.data_ptr() not in [at for at, _ in seen]
            elif isinstance(layer, Attention | SelfAttention) and "encoder.mid" not in path:
                queries = layer.q_proj.weight if isinstance(layer, SelfAttention) else layer.to_q.weight
                assert (queries.data_ptr(), (3 * queries.shape[0], queries.shape[1])) in seen


def test_unprepared_network_computes_the_same() -> None:
    for name, (run, _) in RUNS.items():
        ours = network(adopt(tiny.pipeline("sd1")), name)
        # a deep copy keeps the layout, another dtype loses it
        apart = deepcopy(ours).double().float()
        assert torch.equal(run(deepcopy(ours)), run(ours))
        assert error(run(apart), run(ours)) < TOLERANCE
        assert len(products(lambda: run(apart))) == len(products(lambda: run(ours)))  # noqa: B023


def test_preparing_for_cpu_pads_and_caches_nothing() -> None:
    ours = adopt(tiny.pipeline("sd1"))
    for name in RUNS:
        net = network(ours, name)
        stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in net.parameters()}
        assert sum(stored.values()) == sum(p.nbytes for p in net.parameters())
        assert not list(net.buffers())


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_gpu_channels_are_padded_and_phases_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = adopt(tiny.pipeline("sd1-inpaint", vae=tiny.tiny_vae()))  # 9 channels; 3 and 4
    narrow = [
        module.weight
        for net in (ours.unet, ours.vae)
        for module in net.modules()
        if getattr(module, "weight", torch.empty(0)).dim() == 4 and module.weight.shape[2] == 3
        if module.weight.shape[0] % 8 or module.weight.shape[1] % 8
    ]
    assert [tuple(w.shape[:2]) for w in narrow] == [(16, 9), (4, 16), (16, 3), (4, 16), (16, 4), (3, 16)]
    for weight in narrow:
        full = conv.pad_to_eights(weight)
        assert full.data_ptr() == weight.data_ptr()
        assert full.shape[0] % 8 == full.shape[1] % 8 == 0
        assert full.count_nonzero() == weight.count_nonzero()  # zeros around it
    phases = [buffer for net in (ours.unet, ours.vae) for buffer in net.buffers()]
    assert len(phases) == 6  # three enlargements each
    monkeypatch.setattr(conv, "upsample_phases", None)  # none is made again
    ours.unet(torch.randn(1, 9, 8, 8), 1, TEXT[:1])
    ours.vae.decode(torch.randn(1, 4, 64, 64))  # enough pixels that phases would be made if none were kept


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_meta_networks_are_prepared_as_on_gpu() -> None:
    """A dry run sees the products that a GPU makes."""
    real = adopt(tiny.pipeline("sd1")).unet
    with torch.device("meta"):
        unet = UNet(real.config).half()
        prepare.prepare({"unet": unet})
        seen = products(lambda: unet(NOISE.half().to("meta"), 1, TEXT.half().to("meta")))
    assert [shape for _, shape in seen] == [shape for _, shape in products(lambda: RUNS["unet"][0](real))]
    assert unet.conv_in.weight.stride() == (9 * 8, 1, 3 * 8, 8)
    assert unet.up_blocks[0].upsamplers[0].phases.shape == (48, 48, 4, 4)


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from fastldm.loading.checkpoint import Component
from fastldm.loading.state import load_module
from fastldm.models.layers import Attention, Conv
from fastldm.loading.prepare import prepare

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

with torch.device("meta"):
    network = nn.ModuleList([Attention(1024, 8, 1024) if i % 2 else Conv(768, 512) for i in range(24)]).bfloat16()
if sys.argv[2] == "write":
    from safetensors.torch import save_file
    save_file({name: torch.ones(p.shape, dtype=p.dtype) for name, p in network.named_parameters()}, sys.argv[1])
    sys.exit()
part = Component("unet", "ModuleList", {}, (Path(sys.argv[1]),), sys.argv[1])
before = resident("VmRSS")
load_module(network, part.state(to_prepare=True), dtype=torch.bfloat16, source=sys.argv[1])
prepare({"unet": network})
for p in network.parameters():
    p.sum()  # now all of it is resident
print((resident("VmHWM") - before) / sum(p.nbytes for p in network.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_preparing_needs_memory_of_one_layer(tmp_path: Path) -> None:
    """24 layers of 8 MB: one of them twice is 4% of all."""
    path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    for phase in ("write", "measure"):
        command = [sys.executable, "-c", MEASURE, path, phase]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert 0.95 <= float(done.stdout) <= 1.15  # below: the measurement missed the weights


# ------------------------------------------------------------------------------------------------------- changes

Change = Callable[[nn.Module, str, Tensor], Any]


def set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, value)


def set_data(module: nn.Module, name: str, value: Tensor) -> None:
    module.get_parameter(name).data = value


def add_to_data(module: nn.Module, name: str, value: Tensor) -> None:
    parameter = module.get_parameter(name)
    parameter.data += value - parameter.data


def load_state(module: nn.Module, name: str, value: Tensor, assign: bool = False) -> None:
    module.load_state_dict({**module.state_dict(), name: value}, assign=assign)


IN_PLACE: dict[str, Change] = {
    ".data +=": add_to_data,
    "add_": lambda module, name, value: module.get_parameter(name).add_(value - module.get_parameter(name)),
    "copy_": lambda module, name, value: module.get_parameter(name).copy_(value),
    "load_state_dict": load_state,
}
REPLACED: dict[str, Change] = {
    "another parameter": lambda module, name, value: set_parameter(module, name, nn.Parameter(value)),
    ".data =": set_data,
    "load_state_dict(assign=True)": lambda module, name, value: load_state(module, name, value, assign=True),
}
CHANGES = IN_PLACE | REPLACED
PLAIN = {  # of each kind of layout one, by component; none is folded
    "unet": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight",  # packed
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v.weight",
        "conv_in.weight",  # padded on a GPU
        "down_blocks.1.resnets.0.conv1.bias",  # folded into the time rows, at each request
    ),
    "vae": ("decoder.mid_block.attentions.0.to_v.bias", "decoder.conv_out.weight"),
    "text_encoder": ("text_model.encoder.layers.1.self_attn.q_proj.bias",),
}
FOLDED = {"unet": ("up_blocks.0.upsamplers.0.conv.weight",), "vae": ("decoder.up_blocks.1.upsamplers.0.conv.weight",)}


def theirs_name(module: nn.Module, name: str) -> str:
    return name if name in dict(module.named_parameters()) else name.removeprefix("text_model.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("owner", ["loaded", "adopted", "adopted, theirs changed"])
def test_every_change_reaches_the_next_step(owner: str, change: str, folder: Path) -> None:
    pipe, judges = tiny.pipeline("sd1"), tiny.pipeline("sd1")
    ours = load(folder) if owner == "loaded" else adopt(pipe)
    for component, (run, judge) in RUNS.items():
        net, theirs = network(ours, component), getattr(judges, component)
        target = getattr(pipe, component) if owner == "adopted, theirs changed" else net
        addresses = {name: p.data_ptr() for name, p in (*net.named_parameters(), *net.named_buffers())}
        for name in PLAIN[component] + FOLDED.get(component, ()):
            before = run(net)
            old = theirs.get_parameter(theirs_name(theirs, name))
            new = old + 10 * old.std() * torch.randn(old.shape)
            CHANGES[change](target, theirs_name(target, name), new.clone())
            set_data(theirs, theirs_name(theirs, name), new)

            unseen = [f"{component}.{name}"] if change in REPLACED else []
            if name in FOLDED.get(component, ()):
                unseen.append(f"{component}.{name.removesuffix('conv.weight')}phases")
            assert ours.prepared.stale() == bool(unseen), name
            if unseen:
                assert ours.prepared.weights_changed() == unseen
            after = run(net)
            assert error(after, judge(theirs)) < TOLERANCE, name
            assert error(after, before) > 10 * TOLERANCE, f"{name} does not matter"
            assert not ours.prepared.stale()
        # what a captured step reads is where it was
        assert addresses == {name: p.data_ptr() for name, p in (*net.named_parameters(), *net.named_buffers())}
        if owner != "loaded":  # and still shared
            assert error(judge(getattr(pipe, component)), after) < TOLERANCE


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_one_bit_of_derived_source_is_detected(folder: Path) -> None:
    ours = load(folder)
    weight = ours.unet.get_parameter(FOLDED["unet"][0])
    weight.data[3, 1, 0, 2] = torch.nextafter(weight[3, 1, 0, 2], torch.tensor(9.0))
    assert ours.prepared.stale()
    assert ours.prepared.weights_changed() == ["unet.up_blocks.0.upsamplers.0.phases"]
    assert torch.equal(ours.unet.up_blocks[0].upsamplers[0].phases, conv.upsample_phases(weight))
    assert not ours.prepared.stale()


@pytest.mark.skipif(not onednn._available(torch.float32), reason="oneDNN's ops are not there")
@pytest.mark.parametrize("change", CHANGES)
def test_on_a_cpu_layouts_follow_their_weights(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_BYTES", 0)  # tiny weights too
    pipe, judge = tiny.pipeline("sd1"), tiny.unet("sd1")
    ours, (run, judged) = adopt(pipe), RUNS["unet"]
    assert error(run(ours.unet), judged(judge)) < TOLERANCE
    assert not ours.prepared.stale()
    for name in (*PLAIN["unet"][:3], *FOLDED["unet"], "up_blocks.1.resnets.0.conv_shortcut.weight"):
        new = judge.get_parameter(name) * 3
        CHANGES[change](ours.unet, name, new.clone())
        set_data(judge, name, new)
        assert ours.prepared.stale(), name
        listed = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight" if "attn1" in name else name
        assert f"unet.{listed.replace('to_v', 'to_k')}" in ours.prepared.weights_changed()
        assert error(run(ours.unet), judged(judge)) < TOLERANCE, name
        assert not ours.prepared.stale()


def test_rescaled_autoencoder_follows_adopted_weights() -> None:
    pipe = tiny.pipeline("sdxl").to(torch.float16)
    ours, latents = adopt(pipe), NOISE.half()
    theirs = pipe.vae.decoder.conv_in
    assert torch.equal(ours.vae.decoder.conv_in.weight, theirs.weight / 16)  # theirs stays as it is
    assert ours.vae.decoder.mid_block.resnets[0].norm1.weight.data_ptr() in {
        p.data_ptr() for p in pipe.vae.parameters()
    }

    for change, apply in CHANGES.items():
        before = ours.vae.decode(latents)
        apply(theirs, "weight", theirs.weight * 1.5)
        assert ours.prepared.stale(), change
        assert ours.prepared.weights_changed() == ["vae.decoder.conv_in.weight"]
        decoded = ours.vae.decode(latents)
        assert torch.equal(decoded, adopt(pipe).vae.decode(latents))
        assert error(decoded, before) > HALF_TOLERANCE
    assert error(decoded, deepcopy(pipe.vae).float().decode(NOISE).sample) < HALF_TOLERANCE


def test_parameter_of_other_shape_or_dtype_is_refused() -> None:
    pipe = tiny.pipeline("sd1")
    ours = adopt(pipe)
    ours.unet.conv_in.weight = nn.Parameter(torch.zeros(16, 5, 3, 3))
    refused = (
        r"unet\.conv_in\.weight was replaced by \(16, 5, 3, 3\) in float32 on cpu: expected \(16, 4, 3, 3\) in float32"
    )
    with pytest.raises(InputError, match=refused):
        ours.prepared.weights_changed()
    ours = adopt(pipe)
    pipe.to(torch.bfloat16)
    assert ours.prepared.stale()
    with pytest.raises(InputError, match=r"was replaced by .* in bfloat16 on cpu: expected .* in float32 on cpu"):
        ours.prepared.weights_changed()
