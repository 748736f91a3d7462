"""Ops and their dispatch: the code that all files of this package share.

An op is several functions of one signature: a plain PyTorch reference that defines correct, a launcher of Triton
kernels, a predicate for the arguments that the kernel supports, the shape's class in the table of launch
configurations, and the cost. `Op` combines them and takes one of two paths for each call:

    triton   on an NVIDIA GPU of Ampere or later, where `supports` agrees and the table does not prefer the library
    torch    everywhere else, and where the gradient of an argument is wanted: the reference, which autograd records

Triton is imported when the first kernel is launched and not before, so a machine without it, or a command that does
not need it, never loads it. Nothing here imports anything else of fastldm.

Over 500 lines, for an op, its paths and its table are read together.
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
Table = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]  # sm_NN -> op -> shape class -> entry
Config = Mapping[str, Any]  # a launch configuration: num_warps, num_stages and the kernel's own constants
Route = Literal["triton", "torch"]


class Verdict(NamedTuple):
    """Whether a kernel applies to some arguments, and if not, the reason: "head dim 12 is no multiple of 8"."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Verdict(True)


def no(reason: str) -> Verdict:
    return Verdict(False, reason)


_ON_CPU = no("tensors are on the CPU")  # a constant: the ops of a network return it two hundred times a step


class Cost(NamedTuple):
    """The least work of an op, from which the lower bound of its time follows."""

    flop: int  # float operations, 2 for each multiply-add, of the matrix products (of everything where there are none)
    bytes: int  # read and written, each tensor once
    exp: int = 0  # exponentials, where they may outlast the rest


# ------------------------------------------------------------------------------------- which path a call takes

Observer = Callable[["Op[..., Any]", tuple[Any, ...], dict[str, Any]], Callable[[], None] | None]


class _Scope(threading.local):
    """The state that the context managers below set, for the thread that entered them. (A thread-local, for
    torch.compile cannot trace a ContextVar.)
    """

    preference: Route | None = None
    batch_invariant: bool = False
    observer: Observer | None = None
    forced: tuple[str, Config] | None = None
    target: Target | None = None
    table: Table | None = None
    replacements: Mapping[str, Callable[..., Any]] = {}  # set anew, never mutated


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

    For tests, comparisons and export. It applies to the thread that entered it.
    """
    if path not in ("triton", "torch"):
        raise ValueError(f'kernels.use: got {path!r}, expected "triton" or "torch"')
    if path == "triton" and not has_triton():
        raise RuntimeError('kernels.use("triton"): triton is not installed; pip install triton')
    return _set("preference", path)


def batch_invariant() -> AbstractContextManager[None]:
    """Inside, on a GPU, a row of an op's output (an entry along the first dimension) is bitwise the same however many
    rows there are and whatever they hold.

    Every op takes its kernel, for cuBLAS and cuDNN choose by the number of rows; the kernel's configuration is that of
    one row, for its splits decide in which order numbers are added. An op whose kernel does not take the arguments
    raises NotBatchInvariant.
    """
    return _set("batch_invariant", True)


def is_batch_invariant() -> bool:
    return _scope.batch_invariant


class NotBatchInvariant(RuntimeError):
    """An op would be computed by a library that chooses by the number of rows."""


def observe(observer: Observer) -> AbstractContextManager[None]:
    """Inside, `observer(op, args, kwargs)` is called before each op runs. If it returns a function, that is called when
    the op has run. Ops that an op calls are observed too, between the two calls.
    """
    return _set("observer", observer)


def replace_references(functions: Mapping[str, Callable[..., Any]]) -> AbstractContextManager[None]:
    """Inside, these functions, by the name of the op, run in place of the references. An export uses it to have an op
    as one node.
    """
    return _set("replacements", functions)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, one program after the other (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_type(x: Tensor) -> str:
    """The type of the device that x is on; for a meta tensor that of the target, or "cuda" if there is none."""
    if x.is_meta:
        return "cpu" if _scope.target is not None and not _scope.target.arch else "cuda"
    return x.device.type


def capability(x: Tensor) -> int:
    """Compute capability of the device that x is on, 90 for sm_90; for meta tensors that of the target."""
    if x.is_cuda:
        return device_capability(x.device.index)
    return (_scope.target and _scope.target.arch) or 90


@functools.cache
def device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def dense(x: Tensor) -> Verdict:
    """Whether the last dimension of x is dense and every row of it is aligned to 16 bytes."""
    if x.stride(-1) != 1:
        return no(f"the last dimension has stride {x.stride(-1)}")
    if any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
        return no(f"rows of {tuple(x.shape)} with strides {tuple(x.stride())} are not 16 bytes aligned")
    return YES


class Op(Generic[P, R]):
    """One operation of the networks. The functions below take the arguments of the op itself.

    name: as in torch.ops.fastldm.NAME.
    reference: defines correct.
    triton: launches kernels; is called only with arguments that `supports` accepts.
    shape_class: a short string, the key of a shape in the table of launch configurations.
    default: (shape class, compute capability) -> the configuration where the table has none.
    space, is_candidate: the configurations for a tuner to try, and whether one may be fast for some arguments.
    prefer: the path where the table has no entry.
    faster: (shape class, compute capability) -> whether the kernel is taken all the same where `prefer` is the library.
    mutates: the names of the arguments that the op writes.
    example_values: valid and typical values, on the CPU and by name, of those arguments for which random numbers are
        not valid (integers, and whatever holds indices).

    An op registers itself in OPS.
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
        is_candidate: Callable[..., bool] = lambda config, *args, **kwargs: True,
        prefer: Route = "triton",
        faster: Callable[[str, int], bool] = lambda shape, arch: False,
        mutates: tuple[str, ...] = (),
        example_values: Callable[P, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.reference, self.triton, self.supports = reference, triton, supports
        self.shape_class, self.cost, self.default = shape_class, cost, default
        self.space, self.is_candidate = space, is_candidate
        self.prefer, self.faster = prefer, faster
        self.mutates, self.example_values = mutates, example_values
        OPS[name] = self

    @property
    def module(self) -> str:
        """The file of kernels/ that declares the op, without its ending: tests and benchmarks have names of it."""
        return self.triton.__module__.rpartition(".")[2]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        observer = _scope.observer
        done = None if observer is None else observer(self, args, kwargs)
        if not self.path(*args, **kwargs):
            out = _scope.replacements.get(self.name, self.reference)(*args, **kwargs)
        elif _scope.target is None and traced():
            out = self.registered(*args, **kwargs)
        else:
            out = self.triton(*args, **kwargs)
        if done is not None:
            done()
        return out

    def path(self, *args: P.args, **kwargs: P.kwargs) -> Verdict:
        """Whether a call takes the Triton path, and if not, the reason."""
        x = args[0]
        assert isinstance(x, Tensor)
        preference = _scope.preference
        if preference == "torch":
            return no('kernels.use("torch")')
        if needs_gradient(*args, *kwargs.values()):
            return no("its gradient is wanted")
        if x.is_cuda:
            if not has_triton():
                return no("triton is not installed")
            if capability(x) < 80:
                return no(f"sm_{capability(x)} is older than Ampere (sm_80)")
        elif (_scope.target is None or not _scope.target.arch) and not (preference == "triton" and interpreting()):
            return _ON_CPU if x.device.type == "cpu" else no(f"tensors are on the {x.device.type}")
        verdict = self.supports(*args, **kwargs)
        if _scope.batch_invariant:
            if not verdict:
                raise NotBatchInvariant(f"{self.name} is not batch-invariant here: {verdict.reason}")
        elif verdict and preference is None:
            key, arch = self.shape_class(*args, **kwargs), capability(x)
            entry = table_entry(self.name, key, arch)
            by_default = "triton" if self.prefer == "triton" or self.faster(key, arch) else "torch"
            if (entry or {}).get("path", by_default) == "torch":
                return no("torch's own is faster here, says the table" if entry else "torch's own is taken by default")
        return verdict

    def config(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """The launch configuration for these arguments."""
        forced = _scope.forced
        if forced is not None and forced[0] == self.name:
            return dict(forced[1])
        x, *rest = args
        assert isinstance(x, Tensor)
        first = x[:1] if _scope.batch_invariant else x
        key, arch = self.shape_class(first, *rest, **kwargs), capability(x)  # type: ignore[arg-type]
        entry = table_entry(self.name, key, arch)
        return dict((entry or {}).get("config") or self.default(key, arch))

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """The arguments of a call by their names."""
        return dict(inspect.signature(self.reference).bind(*args, **kwargs).arguments)

    def example(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device | str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, which may have meta tensors, with new tensors on `device`: of the same shapes,
        dtypes and strides, with random normal numbers or, for the names that it has, `example_values`.

        Ops are timed and tuned on them. TypeError for an integer tensor that `example_values` lacks: rounded noise
        would be negative lengths and indices out of range.
        """
        named = self.bind(*args, **kwargs)
        values = {} if self.example_values is None else self.example_values(*args, **kwargs)

        def make(name: str, x: Tensor) -> Tensor:
            size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
            flat = torch.empty(size, dtype=x.dtype, device=device)
            if name in values:
                return flat.as_strided(x.shape, x.stride()).copy_(values[name])
            if not x.is_floating_point():
                raise TypeError(f"op {self.name} reads {name!r}, {x.dtype}: its example_values lack it")
            flat.copy_(torch.randn(size, device=device))  # PyTorch draws none in 8 bits
            return flat.as_strided(x.shape, x.stride())

        example = {name: make(name, value) if isinstance(value, Tensor) else value for name, value in named.items()}
        return tuple(example.values())[: len(args)], {name: example[name] for name in kwargs}

    @functools.cached_property
    def registered(self) -> Callable[P, R]:
        """The op as torch.compile, torch.export and FakeTensor see it: torch.ops.fastldm.NAME.

        Eager calls do not use it: registering takes 2.5 s of imports (torch 2.13 loads its compiler), and each call
        some microseconds of dispatch.
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


def needs_gradient(*values: object) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def traced() -> bool:
    """Whether calls are traced (torch.compile, torch.export, FakeTensorMode) and not run."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


# ------------------------------------------------------------------------------------------- launching kernels


class Kernel:
    """A function in Triton's language, passed to triton.jit when it is first launched.

    Triton looks names up in the function's module when it compiles. So `triton`, `tl` and INTERPRETED are set there
    then, and the kernels of that module are replaced by the functions that triton.jit returns.
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
                names["INTERPRETED"] = tl.constexpr(interpreting())
                for name, value in list(names.items()):
                    if isinstance(value, Kernel):
                        names[name] = value.jitted()
            return self._jitted


def jit(fn: Callable[..., Any]) -> Any:
    """triton.jit, deferred to the first launch. Device functions, which kernels call, are decorated too; the name of a
    kernel ends in _kernel.
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
        target.launch(kernel, grid, args, constants)
    elif interpreting() or not traced():
        if not any(isinstance(a, Tensor) and (a.is_meta or isinstance(a, FakeTensor)) for a in args):
            kernel[grid](*args, **constants)
    else:
        torch.library.wrap_triton(kernel)[grid](*args, **constants)


class CompiledLate(RuntimeError):
    """A kernel would be compiled where nothing may be compiled."""


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Inside, a kernel that this thread launches and that is not compiled yet raises CompiledLate: for the capture of a
    graph, which must not compile.
    """
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
    """The path that `use` has set for this thread: to set it in another thread that does this one's work."""
    return _scope.preference


# --------------------------------------------------------------------------------------- launch configurations

SHIPPED = Path(__file__).with_name("tuned.json")


def forced(op: str, config: Config) -> AbstractContextManager[None]:
    """Inside, this op is launched with this configuration. A tuner tries configurations so."""
    return _set("forced", (op, config))


def use_table(table: Table) -> AbstractContextManager[None]:
    """Inside, this table of launch configurations is read in place of `table()`: to compare one with another."""
    return _set("table", table)


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """sm_NN -> op -> shape class -> {"config": ..., "path": ..., "ms": ...}.

    The file that ships, overridden by the one that FASTLDM_TUNED names (`fastldm tune` writes one). Read once.
    """
    tables = []
    for path in (SHIPPED, os.environ.get("FASTLDM_TUNED")):
        if path is None:
            continue
        try:
            tables.append(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: not a table of launch configurations ({error}); write one: fastldm tune"
            ) from None
    return merge_tables(*tables)


def merge_tables(*tables: Table) -> dict[str, dict[str, dict[str, Any]]]:
    """One table of the entries of all; of those for one shape class the last."""
    merged: dict[str, dict[str, dict[str, Any]]] = {}
    for table in tables:
        for arch, ops in table.items():
            for op, entries in ops.items():
                merged.setdefault(arch, {}).setdefault(op, {}).update(entries)
    return merged


def table_entry(op: str, shape_class: str, arch: int) -> dict[str, Any] | None:
    entries = table() if _scope.table is None else _scope.table
    entry = entries.get(f"sm_{arch}", {}).get(op, {}).get(shape_class)
    return None if entry is None else dict(entry)


# --------------------------------------------------------------------------------------- ahead-of-time targets


class Target:
    """A device that need not be present: ops on meta tensors take the paths that they would take on it.

    arch: 90 for sm_90, 0 for a CPU. This target ignores launches; the one of kernels/compile.py compiles kernels.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Called in place of a launch of a grid of programs."""


def targeting(target: Target) -> AbstractContextManager[None]:
    """Inside, meta tensors count as tensors on the target, whose `launch` is called in place of each."""
    return _set("target", target)
