"""How an op finds its kernel: what every file of this package shares.

An op is one signature written several times: a plain PyTorch reference that defines correct, a launcher of Triton
kernels, a predicate that says where the kernel applies, the name of the shape's class in the table of launch
configurations, and what the op costs. `Op` holds them together and, for each call, takes one path:

    triton   on an NVIDIA GPU of Ampere or later, where `supports` says so and the table does not prefer the library
    torch    everywhere else: the reference

Triton is imported when the first kernel is launched and not before, so a machine without it, or a command that does
not need it, never loads it. Nothing here imports anything else of fastldm.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

P = ParamSpec("P")
R = TypeVar("R")
Config = Mapping[str, Any]  # a launch configuration: num_warps, num_stages and the kernel's own constants
Route = Literal["triton", "torch"]


class Verdict(NamedTuple):
    """Whether a kernel applies to some arguments, and if not, why: "head dim 12 is no multiple of 8"."""

    ok: bool
    why: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Verdict(True)


def no(why: str) -> Verdict:
    return Verdict(False, why)


_ON_CPU = no("tensors are on the CPU")  # made once: a network's ops ask two hundred times a step


class Cost(NamedTuple):
    """What an op has to do at least, from which its floor follows."""

    flop: int  # float operations, 2 for each multiply-add, of the matrix products (of everything where there are none)
    bytes: int  # read and written, each tensor once
    exp: int = 0  # exponentials, where they may outlast the rest


# ------------------------------------------------------------------------------------- which path a call takes

Observer = Callable[["Op[..., Any]", tuple[Any, ...], dict[str, Any]], Callable[[], None] | None]


class _Scope(threading.local):
    """What the contexts below set, for the thread that entered them. (torch.compile traces this, no ContextVar.)"""

    preference: Route | None = None
    observer: Observer | None = None
    forced: tuple[str, Config] | None = None
    target: Target | None = None
    instead: Mapping[str, Callable[..., Any]] = {}  # replaced, never written to


_scope = _Scope()


@contextmanager
def _set(name: str, value: object) -> Iterator[None]:
    before = getattr(_scope, name)
    setattr(_scope, name, value)
    try:
        yield
    finally:
        setattr(_scope, name, before)


def use(path: Route) -> AbstractContextManager[None]:
    """Inside, every op takes this path: "torch" always, "triton" wherever the kernel supports the arguments.

    For tests, comparisons and export. Holds for the thread that entered it.
    """
    if path not in ("triton", "torch"):
        raise ValueError(f'kernels.use: got {path!r}, expected "triton" or "torch"')
    if path == "triton" and not has_triton():
        raise RuntimeError('kernels.use("triton"): triton is not installed; pip install triton')
    return _set("preference", path)


def observe(observer: Observer) -> AbstractContextManager[None]:
    """Inside, `observer(op, args, kwargs)` is called before each op runs, and what it returns, unless that is None,
    when the op has run. Ops that an op is made of are seen too, between the two."""
    return _set("observer", observer)


def instead(references: Mapping[str, Callable[..., Any]]) -> AbstractContextManager[None]:
    """Inside, these run in place of the references of the ops so named: how an export has an op as one node."""
    return _set("instead", references)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, one program after the other (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_type(x: Tensor) -> str:
    """The type of device that x is on; for a meta tensor of what it stands for: the target, a GPU if there is none."""
    if x.is_meta:
        return "cpu" if _scope.target is not None and not _scope.target.arch else "cuda"
    return x.device.type


def capability(x: Tensor) -> int:
    """Compute capability of the device that x is on, 90 for sm_90; of the compilation's target for meta tensors."""
    if x.is_cuda:
        return device_capability(x.device.index)
    return (_scope.target and _scope.target.arch) or 90


@functools.cache
def device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def dense(x: Tensor) -> Verdict:
    """Whether the last dimension of x is dense and every row of it starts where 16 bytes can be loaded at once."""
    if x.stride(-1) != 1:
        return no(f"the last dimension has stride {x.stride(-1)}")
    if any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
        return no(f"rows of {tuple(x.shape)} with strides {tuple(x.stride())} are not 16 bytes aligned")
    return YES


class Op(Generic[P, R]):
    """One operation of the networks. All that is given has the op's own signature.

    name: as in torch.ops.fastldm.NAME. reference: defines correct. triton: launches kernels; called with tensors that
    `supports` has agreed to. shape_class: a short string that the table of launch configurations is keyed by.
    default: the configuration where the table has none, from (shape class, capability). space, keep: what a tuner
    tries, and whether a configuration is worth a try for some arguments. prefer: the path where the table says nothing.
    given: of a call's arguments those that random numbers cannot stand for (integers, and whatever else holds places),
    by name: valid and typical ones for its shapes, on the CPU.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[P, R],
        triton: Callable[P, R],
        supports: Callable[P, Verdict],
        shape_class: Callable[P, str],
        cost: Callable[P, Cost],
        default: Callable[[str, int], Config],
        space: Sequence[Config] = (),
        keep: Callable[..., bool] = lambda config, *args, **kwargs: True,
        prefer: Route = "triton",
        mutates: tuple[str, ...] = (),
        given: Callable[P, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.reference, self.triton, self.supports = reference, triton, supports
        self.shape_class, self.cost, self.default = shape_class, cost, default
        self.space, self.keep = space, keep
        self.prefer, self.mutates, self.given = prefer, mutates, given
        OPS[name] = self

    @property
    def module(self) -> str:
        """The file of kernels/ that declares the op, without its ending: tests and benchmarks have names of it."""
        return self.triton.__module__.rpartition(".")[2]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        observer = _scope.observer
        done = None if observer is None else observer(self, args, kwargs)
        if not self.path(*args, **kwargs):
            out = _scope.instead.get(self.name, self.reference)(*args, **kwargs)
        elif _scope.target is None and traced():
            out = self.registered(*args, **kwargs)
        else:
            out = self.triton(*args, **kwargs)
        if done is not None:
            done()
        return out

    def path(self, *args: P.args, **kwargs: P.kwargs) -> Verdict:
        """Whether a call takes the Triton path, and if not, why."""
        x = args[0]
        assert isinstance(x, Tensor)
        preference = _scope.preference
        if preference == "torch":
            return no('kernels.use("torch")')
        if x.is_cuda:
            if not has_triton():
                return no("triton is not installed")
            if capability(x) < 80:
                return no(f"sm_{capability(x)} is older than Ampere (sm_80)")
        elif (_scope.target is None or not _scope.target.arch) and not (preference == "triton" and interpreting()):
            return _ON_CPU if x.device.type == "cpu" else no(f"tensors are on the {x.device.type}")
        verdict = self.supports(*args, **kwargs)
        if verdict and preference is None:
            entry = entry_of(self.name, self.shape_class(*args, **kwargs), capability(x))
            if (entry or {}).get("path", self.prefer) == "torch":
                return no("torch's own is faster here, says the table" if entry else "torch's own is taken by default")
        return verdict

    def config(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """The launch configuration for these arguments."""
        forced = _scope.forced
        if forced is not None and forced[0] == self.name:
            return dict(forced[1])
        x = args[0]
        assert isinstance(x, Tensor)
        key, arch = self.shape_class(*args, **kwargs), capability(x)
        entry = entry_of(self.name, key, arch)
        return dict((entry or {}).get("config") or self.default(key, arch))

    def named(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """The arguments of a call by their names."""
        return dict(inspect.signature(self.reference).bind(*args, **kwargs).arguments)

    def example(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device | str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with tensors on `device` in place of theirs, which may be meta tensors: of the same
        shapes, dtypes and strides, of random normal numbers, and as `given` says where there is no such thing.

        How an op is timed and tuned. TypeError for an integer tensor that `given` says nothing of: rounded noise would
        be lengths below zero and rows that are not there.
        """
        named = self.named(*args, **kwargs)
        given = {} if self.given is None else self.given(*args, **kwargs)

        def make(name: str, x: Tensor) -> Tensor:
            size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
            flat = torch.empty(size, dtype=x.dtype, device=device)
            if name in given:
                return flat.as_strided(x.shape, x.stride()).copy_(given[name])
            if not x.is_floating_point():
                raise TypeError(f"op {self.name} reads {name!r}, {x.dtype}, and does not say which values are valid")
            return flat.normal_().as_strided(x.shape, x.stride())

        made = {name: make(name, value) if isinstance(value, Tensor) else value for name, value in named.items()}
        return tuple(made.values())[: len(args)], {name: made[name] for name in kwargs}

    @functools.cached_property
    def registered(self) -> Callable[P, R]:
        """The op as torch.compile, torch.export and FakeTensor see it: torch.ops.fastldm.NAME.

        Eager calls do not pass through here. Registering costs 2.5 s of imports (torch 2.13 loads its compiler), and
        each call some microseconds of dispatch.
        """
        op: Any = torch.library.triton_op(f"fastldm::{self.name}", self.triton, mutates_args=self.mutates)
        op.register_kernel("cpu")(lambda *a, **k: (self.triton if interpreting() else self.reference)(*a, **k))
        return op


OPS: dict[str, Op[..., Any]] = {}
"""The ops of the files that were imported so far, by name; `load_ops` imports them all."""


def load_ops() -> Mapping[str, Op[..., Any]]:
    """Every op there is, by name: OPS, after all files of this package were imported."""
    package = __name__.rpartition(".")[0]
    for file in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
        importlib.import_module(file.name)
    return OPS


def traced() -> bool:
    """Whether somebody records what runs (torch.compile, torch.export, FakeTensorMode) instead of running it."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


# ------------------------------------------------------------------------------------------- launching kernels


class Kernel:
    """A function in Triton's language, handed to triton.jit when it is first launched.

    Triton looks names up in the function's module when it compiles, so `triton` and `tl` are put there then, and the
    other kernels of that module become what triton.jit made of them.
    """

    _lock = threading.RLock()

    def __init__(self, fn: Callable[..., None]) -> None:
        functools.update_wrapper(self, fn)  # type: ignore[arg-type]
        self.fn = fn
        self._jitted: Any = None

    def jitted(self) -> Any:
        with self._lock:
            if self._jitted is None:
                import triton
                import triton.language as tl

                self._jitted = triton.jit(self.fn)
                names = self.fn.__globals__
                names["triton"], names["tl"] = triton, tl
                for name, value in list(names.items()):
                    if isinstance(value, Kernel):
                        names[name] = value.jitted()
            return self._jitted


def jit(fn: Callable[..., Any]) -> Any:
    """triton.jit, later. Device functions that another kernel calls are marked the same way; the name of what is
    launched ends in _kernel.
    """
    return Kernel(fn)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on a grid of programs. constants: its constexpr arguments, num_warps and num_stages."""
    if isinstance(kernel, Kernel):
        kernel = kernel.jitted()
    constants = {"enable_fp_fusion": True, **constants}  # the default of Triton up to 3.9, not of 3.10
    target = _scope.target
    if target is not None:
        target.compile(kernel, args, constants)
    elif interpreting() or not traced():
        if not any(isinstance(a, Tensor) and (a.is_meta or isinstance(a, FakeTensor)) for a in args):
            kernel[grid](*args, **constants)
    else:
        torch.library.wrap_triton(kernel)[grid](*args, **constants)


class CompiledLate(RuntimeError):
    """A kernel would be compiled where nothing may be."""


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Inside, this thread records what it launches: a kernel that was not compiled before raises CompiledLate."""
    if not has_triton() or interpreting():
        yield
        return
    from triton import knobs

    thread, before = threading.get_ident(), knobs.runtime.jit_cache_hook

    def hook(*args: Any, **named: Any) -> Any:
        if threading.get_ident() == thread:
            raise CompiledLate(f"kernel {named.get('repr') or named.get('fn')} was not compiled before")
        return before(*args, **named) if before is not None else None

    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def preference() -> Route | None:
    """What `use` says here: for whoever hands this thread's work to another."""
    return _scope.preference


# --------------------------------------------------------------------------------------- launch configurations

SHIPPED = Path(__file__).with_name("tuned.json")


def forced(op: str, config: Config) -> AbstractContextManager[None]:
    """Inside, this op is launched with this configuration: how a tuner tries them."""
    return _set("forced", (op, config))


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """sm_NN -> op -> shape class -> {"config": ..., "path": ..., "ms": ...}.

    What ships, and over it what the file named by FASTLDM_TUNED says (`fastldm tune` writes such files). Read once.
    """
    merged: dict[str, dict[str, dict[str, Any]]] = {}
    for path in (SHIPPED, os.environ.get("FASTLDM_TUNED")):
        if path is None:
            continue
        try:
            given = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: not a table of launch configurations ({error}); write one: fastldm tune"
            ) from None
        for arch, ops in given.items():
            for op, entries in ops.items():
                merged.setdefault(arch, {}).setdefault(op, {}).update(entries)
    return merged


def entry_of(op: str, shape_class: str, arch: int) -> dict[str, Any] | None:
    return table().get(f"sm_{arch}", {}).get(op, {}).get(shape_class)


# --------------------------------------------------------------------------------------- ahead-of-time targets


class Target:
    """A device that need not be there: ops on meta tensors take the paths that they would take on it.

    arch: 90 for sm_90, 0 for a CPU. kernels/compile.py has the target that compiles; this one does nothing
    with a kernel.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def compile(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Called in place of a launch."""


def targeting(target: Target) -> AbstractContextManager[None]:
    """Inside, meta tensors count as tensors on the target, which gets each kernel in place of its launch."""
    return _set("target", target)
