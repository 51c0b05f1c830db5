"""The operator library: schemas, the native modules, and the choice of an implementation.

Schemas are defined in Python, once; native modules only add kernels for a dispatch key. So every operator exists
in a pure-Python install, and loading a native module changes speed, never meaning.
"""

import ctypes
import os
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

library = torch.library.Library(NAMESPACE, "FRAGMENT")
native_kernels: set[tuple[str, str]] = set()  # (schema name, device type)


class Op(NamedTuple):
    """A public operator: the schemas it needs a kernel for, and what else can serve it on every device."""

    kernels: tuple[str, ...]
    extra: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


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


def declare(
    op: str,
    *,
    kernels: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Make a public operator known to `resolve`.

    Args:
        op: its public name. kernels: the schemas that a device must have kernels for.
        extra: implementations that need no native kernel, best first. dtypes: what the native kernels take.
    """
    ops[op] = Op(kernels, extra, dtypes)


def native(op: str, device: str) -> bool:
    """Whether every kernel of `op` is there for the device type."""
    kernels = ops[op].kernels
    return bool(kernels) and all((name, device) in native_kernels for name in kernels)


IMPLS = ("auto", "reference", "cpu", "cuda", "triton", "aten")
DEFAULT_IMPL = os.environ.get("FASTLM_IMPL") or "auto"  # checked at the first call: an import must not fail


def resolve(op: str, impl: str, tensor: torch.Tensor) -> str:
    """Choose what serves a call of `op` on `tensor`.

    Returns:
        `"reference"`: the plain differentiable PyTorch function; `"fallback"`: the registered reference behind the
        dispatcher, what `"auto"` takes without a kernel; `"cpu"`, `"cuda"` or a name of `extra`.

    Raises:
        ValueError: no such implementation.
        TypeError: the named implementation does not take this device or dtype.
        RuntimeError: the named implementation is not installed, or FASTLM_IMPL names none.
    """
    kernels, extra, dtypes = ops[op]
    device = tensor.device.type
    if DEFAULT_IMPL not in IMPLS:
        raise RuntimeError(f"FASTLM_IMPL must be one of {', '.join(IMPLS)}, got {DEFAULT_IMPL!r}")
    if impl == "auto" and DEFAULT_IMPL in ("reference", *extra):  # a kernel is what "auto" takes where it can serve
        impl = DEFAULT_IMPL
    if impl == "auto":
        if native(op, device):
            return device if tensor.dtype in dtypes else (*extra, "reference")[0]
        return extra[0] if extra else "fallback"
    if impl == "reference" or impl in extra:
        return impl
    if impl not in ("cpu", "cuda", "triton"):
        names = ", ".join(repr(name) for name in ("auto", "reference", "cpu", "triton", "cuda", *extra))
        raise ValueError(f"{op}: impl must be one of {names}, got {impl!r}")
    if impl == "triton" or not kernels:
        raise RuntimeError(f"{op}: there is no {impl!r} kernel in this version of fastlm; use impl='auto'")
    if not native(op, impl):
        module = "_C" if impl == "cpu" else "_C_cuda"
        if status[module] is None:
            raise RuntimeError(f"{op}: there is no {impl!r} kernel in this version of fastlm; use impl='auto'")
        raise RuntimeError(f"{op}: impl={impl!r} needs fastlm.{module}: {status[module]}; to get it: {BUILD_COMMAND}")
    if device != impl:
        raise TypeError(f"{op}: impl={impl!r} takes tensors on {impl}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: impl={impl!r} takes {names}, got {tensor.dtype}")
    return impl
