"""The operator library: schemas, the native modules, and the choice of an implementation.

Schemas are defined in Python, once; native modules only add kernels for a dispatch key. So every operator exists
in a pure-Python install, and loading a native module changes speed, never meaning.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

NAMESPACE = "fastlm"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")  # in the order of csrc/isa.cpp
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # what native kernels take; the reference also takes float64
BUILD_COMMAND = "pip install --no-build-isolation ."
OLDEST_TRITON = (3, 6)  # the oldest that the kernels are tried with

library = torch.library.Library(NAMESPACE, "FRAGMENT")
schemas: dict[str, str] = {}
native_kernels: set[tuple[str, str]] = set()  # (schema name, device type)


class Op(NamedTuple):
    """A public operator: the schemas that a device or Triton needs kernels for, and what else can serve it anywhere."""

    kernels: tuple[str, ...]
    triton: tuple[str, ...]
    extra: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    unmeasured: tuple[str, ...]


ops: dict[str, Op] = {}


def _load(name: str) -> str | None:
    """Load a native module; return None when it is in, else the reason why not."""
    path = Path(__file__).with_name(f"{name}.so")
    if os.environ.get("FASTLM_DISABLE_NATIVE", "0") not in ("", "0"):
        return "switched off by FASTLM_DISABLE_NATIVE"
    if not path.exists():
        return f"not built; `{BUILD_COMMAND}` builds it"
    if name == "_C_cuda" and torch.version.cuda is None:
        return "built, but this PyTorch has no CUDA"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"built, but does not load: {error.__cause__ or error}"
    return None


status: dict[str, str | None] = {name: _load(name) for name in ("_C", "_C_cuda")}


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels run with, or None when there are no native kernels."""
    if status["_C"] is not None:
        return None
    return INSTRUCTION_SETS[ctypes.CDLL(str(Path(__file__).with_name("_C.so"))).fastlm_instruction_set()]


def define(schema: str) -> None:
    """Define an operator of the library and note which devices have a native kernel for it."""
    library.define(schema)
    name = schema.partition("(")[0]
    schemas[name] = schema
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
            native_kernels.add((name, device))


def reference(name: str, function) -> None:
    """Register `function` for every device that has no native kernel."""
    # no_grad: else the inner operators are recorded and the fallback is differentiable where a kernel is not
    library.impl(name, torch.no_grad()(function), "CompositeExplicitAutograd")


def fake(name: str, function) -> None:
    """Register the shapes and dtypes of the results, for torch.compile and torch.export."""
    torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=library)
    if any(name in op.triton for op in ops.values()):
        torch.library.register_fake(f"{NAMESPACE}::{name}.triton", function, lib=library)


def declare(
    op: str,
    *,
    kernels: tuple[str, ...] = (),
    triton: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    unmeasured: tuple[str, ...] = (),
) -> None:
    """Make a public operator known to `resolve`; comes after its schemas, before their fakes.

    Args:
        op: its public name. kernels: the schemas that a device must have kernels for.
        triton: the schemas that have a Triton kernel, a function of the same name in `fastlm.triton`; each gets an
            overload of that name, from the first operator that declares it.
        extra: implementations that need no kernel, best first. dtypes: what the kernels take.
        unmeasured: the devices whose native kernels no results in benchmarks/results have timed yet: `"auto"` takes
            what is in `extra`, else Triton's, before them.
    """
    shared = {name for other in ops.values() for name in other.triton}
    ops[op] = Op(kernels, triton, extra, dtypes, unmeasured)
    for name in (name for name in triton if name not in shared):
        library.define(schemas[name].replace(name, f"{name}.triton", 1))
        library.impl(f"{name}.triton", _triton_function(op, name), "CompositeExplicitAutograd")


def _triton_function(op: str, name: str):
    """The launcher of a Triton kernel; Triton is imported at its first call."""
    stem = op.removesuffix("_mask")

    @torch.no_grad()
    def call(*args):
        return getattr(importlib.import_module(f"fastlm.triton.{stem}"), name)(*args)

    return call


def kernel(name: str, impl: str):
    """The operator of a schema that serves an implementation chosen by `resolve`."""
    return getattr(getattr(torch.ops.fastlm, name), "triton" if impl == "triton" else "default")


def native(op: str, device: str) -> bool:
    """Whether every kernel of `op` is there for the device type."""
    kernels = ops[op].kernels
    return bool(kernels) and all((name, device) in native_kernels for name in kernels)


def _triton_missing() -> str | None:
    """Why there is no Triton that the kernels can use, or None; it is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; to get it: pip install triton"
    for name in ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton"):  # as PyTorch's wheels call it
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
            return f"Triton {version} is too old; {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} comes with PyTorch 2.11"
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    if sys.platform == "linux" and not interpreting and not any(map(shutil.which, compilers)):
        return "Triton builds what talks to the driver with a C compiler; install one (Debian: apt install gcc)"
    return None


# As Triton reads it: its kernels then run in its interpreter, on the CPU, for tests and debugging.
interpreting: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
triton_missing: str | None = _triton_missing()


def has_triton(op: str, device: str) -> bool:
    """Whether Triton kernels can serve `op` on the device type."""
    able = device == "cuda" or (device == "cpu" and interpreting)
    return able and triton_missing is None and bool(ops[op].triton)


IMPLS = ("auto", "reference", "cpu", "cuda", "triton", "aten")
DEFAULT_IMPL = os.environ.get("FASTLM_IMPL") or "auto"  # checked at the first call: an import must not fail


def resolve(op: str, impl: str, tensor: torch.Tensor) -> str:
    """Choose what serves a call of `op` on `tensor`.

    Returns:
        `"reference"`: the plain differentiable PyTorch function; `"fallback"`: the registered reference behind the
        dispatcher, what `"auto"` takes without a kernel; `"cpu"`, `"cuda"`, `"triton"` or a name of `extra`.

    Raises:
        ValueError: no such implementation.
        TypeError: the named implementation does not take this device or dtype.
        RuntimeError: the named implementation is not installed, or FASTLM_IMPL names none.
    """
    kernels, triton, extra, dtypes, _ = ops[op]
    device = tensor.device.type
    if DEFAULT_IMPL not in IMPLS:
        raise RuntimeError(f"FASTLM_IMPL must be one of {', '.join(IMPLS)}, got {DEFAULT_IMPL!r}")
    if impl == "auto":
        return _automatic(op, device, tensor.dtype in dtypes)
    if impl == "reference" or impl in extra:
        return impl
    if impl not in ("cpu", "cuda", "triton"):
        names = ", ".join(repr(name) for name in ("auto", "reference", "cpu", "triton", "cuda", *extra))
        raise ValueError(f"{op}: impl must be one of {names}, got {impl!r}")
    if not (triton if impl == "triton" else kernels):
        raise RuntimeError(f"{op}: there is no {impl!r} kernel in this version of fastlm; use impl='auto'")
    if impl == "triton":
        if triton_missing is not None:
            raise RuntimeError(f"{op}: impl='triton': {triton_missing}")
        if not has_triton(op, device):
            wanted = "a GPU (under TRITON_INTERPRET=1 on the CPU)"
            raise TypeError(f"{op}: impl='triton' takes tensors on {wanted}, got {tensor.device}")
    elif not native(op, impl):
        module = "_C" if impl == "cpu" else "_C_cuda"
        if status[module] is None:
            raise RuntimeError(f"{op}: there is no {impl!r} kernel in this version of fastlm; use impl='auto'")
        raise RuntimeError(f"{op}: impl={impl!r} needs fastlm.{module}: {status[module]}; to get it: {BUILD_COMMAND}")
    elif device != impl:
        raise TypeError(f"{op}: impl={impl!r} takes tensors on {impl}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: impl={impl!r} takes {names}, got {tensor.dtype}")
    return impl


def _automatic(op: str, device: str, served: bool) -> str:
    """What `"auto"` takes: a native kernel that was measured, the best of `extra`, Triton's, a native kernel.

    `served` is whether kernels take the dtype.

    Triton comes after `extra` because the interpreter, and any GPU that was not measured, must not take an operator
    from a library that was tuned for it.
    """
    extra = ops[op].extra
    able = {"reference": True, **dict.fromkeys(extra, True)}
    able |= {device: served and native(op, device), "triton": served and has_triton(op, device)}
    if able.get(DEFAULT_IMPL):  # a debugging setting that cannot serve is passed over
        return DEFAULT_IMPL
    if able[device] and device not in ops[op].unmeasured:
        return device
    if extra:
        return extra[0]
    if device == "cuda" and able["triton"]:
        return "triton"
    if able[device]:
        return device
    return "fallback" if served or not native(op, device) else "reference"
