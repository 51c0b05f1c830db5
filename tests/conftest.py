"""Fixtures of all tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Before anything imports Triton: where there is no GPU its kernels run in its interpreter, on the CPU.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastlm import _lib

# The same examples at every run: a failure belongs to a change, not to the luck of the draw.
settings.register_profile("fastlm", derandomize=True, deadline=None)
settings.load_profile("fastlm")
torch.backends.cudnn.allow_tf32 = False  # else cuDNN's LSTM has the errors of TF32 where float32 is asked for

PACKAGE_ROOT = Path(_lib.__file__).resolve().parents[1]  # of the fastlm under test, in the tree or installed


def pytest_report_header(config):
    modules = ", ".join(f"{name}: {reason or 'loaded'}" for name, reason in _lib.status.items())
    triton = _lib.triton_missing or ("interpreted" if _lib.interpreting else "loaded when used")
    cuda = torch.cuda.is_available()
    return f"fastlm: {modules}; CPU kernels: {_lib.instruction_set()}; Triton: {triton}; CUDA: {cuda}"


def _calculate_as_a_gpu_does():
    """The interpreter cuts float32 off to bfloat16, where GPUs round, and multiplies the bits of bfloat16 matrices."""
    from triton import language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl = builder.create_fp_trunc = cast_impl
    builder.create_dot = create_dot


if _lib.interpreting and _lib.triton_missing is None:
    _calculate_as_a_gpu_does()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # the keywords have the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """End a process whose GPU takes no more work: each later test would fail for the one that broke it."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:  # another worker comes in its place
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process after {nodeid}: {error}", 1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill every new tensor, those of native code included, with NaN, so that an element nobody writes shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def native():
    """Skip where the native CPU kernels are not there."""
    if _lib.status["_C"] is not None:
        pytest.skip(f"no native kernels: {_lib.status['_C']}")


@pytest.fixture
def fresh_python():
    """Run Python source in a new process with a changed environment; returns its stdout, fails on a bad exit."""

    def run(source: str, **environment: str) -> str:
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request, native):
    """Each instruction set that this machine has, best last; pass it to `fresh_python` as FASTLM_CPU."""
    order = _lib.INSTRUCTION_SETS
    best = order.index(os.environ.get("FASTLM_CPU") or _lib.instruction_set())
    if order.index(request.param) > best:
        pytest.skip(f"this machine has no {request.param}")
    return request.param
