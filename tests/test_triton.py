"""What all Triton kernels have in common: how they are chosen, what they take on GPUs that are not here.

Their values are tested with those of the other implementations, in the file of each operator: in Triton's interpreter
where there is no GPU.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastlm import _lib
from fastlm.ops import forget_mult

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "fastlm" / "triton"
OPS = sorted(path.stem for path in SOURCES.glob("*.py") if path.stem not in ("__init__", "common"))
needs_triton = pytest.mark.skipif(_lib.triton_missing is not None, reason=str(_lib.triton_missing))


@pytest.fixture(scope="module")
def compilations(request, tmp_path_factory):
    """Those that the selected tests want, started together: a compiler keeps one core busy."""

    def start(op, target):
        cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, TESTS / "ahead_of_time.py", target, op]
        return pool.submit(subprocess.run, command, env={**os.environ, **cache}, capture_output=True, text=True)

    calls = [item.callspec.params for item in request.session.items if "compilations" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(call["op"], call["target"]): start(**call) for call in calls}
        pool.shutdown(cancel_futures=True)


@needs_triton
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("op", OPS)
def test_ahead_of_time(op, target, compilations):
    """Kernels compile for GPUs that are not here, in their limits, without a spill, for one T as for another."""
    done = compilations[op, target].result()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    launched = set(re.findall(r"launch\(\s*(\w+)", (SOURCES / f"{op}.py").read_text()))
    assert launched and {row["kernel"] for row in rows} == launched, "every kernel of the file is compiled"
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["registers"] <= row["allowed registers"] and row["shared"] <= row["allowed shared"], row
    assert len({row["T"] for row in rows}) == 1, f"another T compiled another kernel: {rows}"


def test_what_cannot_serve_says_why(monkeypatch):
    x = torch.rand(2, 3, 4)
    monkeypatch.setattr(_lib, "interpreting", False)
    with pytest.raises((TypeError, RuntimeError), match="forget_mult: impl='triton'"):
        forget_mult(x, x, impl="triton")
    monkeypatch.setattr(_lib, "triton_missing", None)
    with pytest.raises(TypeError, match=r"takes tensors on a GPU \(under TRITON_INTERPRET=1 on the CPU\), got cpu"):
        forget_mult(x, x, impl="triton")
    monkeypatch.setattr(_lib, "interpreting", True)
    with pytest.raises(TypeError, match="takes float32, bfloat16, float16, got torch.float64"):
        forget_mult(x.double(), x.double(), impl="triton")
    monkeypatch.setattr(_lib, "triton_missing", "Triton is not installed; to get it: pip install triton")
    with pytest.raises(RuntimeError, match="impl='triton': Triton is not installed; to get it: pip install triton"):
        forget_mult(x, x, impl="triton")


def test_auto_takes_triton_on_a_gpu_unless_a_kernel_was_timed(monkeypatch):
    monkeypatch.setattr(_lib, "triton_missing", None)
    monkeypatch.setattr(_lib, "interpreting", True)
    monkeypatch.setattr(_lib, "native_kernels", set())
    assert _lib.resolve("forget_mult", "auto", torch.rand(2, 3, 4)) == "fallback"
    assert _lib._automatic("forget_mult", "cuda", True) == "triton"
    assert _lib._automatic("forget_mult", "cuda", False) == "fallback"
    assert _lib._automatic("lstm", "cuda", True) == "aten"
    built = {(kernel, "cuda") for op in ("forget_mult", "dropconnect") for kernel in _lib.ops[op].kernels}
    monkeypatch.setattr(_lib, "native_kernels", built)
    assert _lib._automatic("dropconnect", "cuda", True) == "cuda"
    assert _lib._automatic("forget_mult", "cuda", True) == "triton"  # its kernel in C++ is not timed yet
    monkeypatch.setattr(_lib, "triton_missing", "not installed")
    assert _lib._automatic("forget_mult", "cuda", True) == "cuda"
    monkeypatch.setattr(_lib, "triton_missing", None)
    monkeypatch.setattr(_lib, "DEFAULT_IMPL", "triton")
    assert _lib._automatic("forget_mult", "cuda", True) == "triton"
    assert _lib._automatic("forget_mult", "cuda", False) != "triton"
    assert _lib.resolve("forget_mult", "auto", torch.rand(2, 3, 4)) == "triton"


@needs_triton
@pytest.mark.parametrize("setting, precision", [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_products_of_float32_are_tf32_where_pytorchs_are(setting, precision):
    """By the setting that can be read whichever way it was made."""
    from fastlm.triton.linear_cross_entropy import _precision

    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        assert _precision("cuda") == precision
    finally:
        matmul.fp32_precision = before


@needs_triton
@pytest.mark.skipif(not (_lib.interpreting or torch.cuda.is_available()), reason="no interpreter and no GPU")
def test_logits_without_room_behind_their_rows():
    """The chunk loop gives them some; the operator is right without it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, target = torch.randn(5, 37, device=device), torch.randint(37, (5,), device=device)
    gradient = torch.ops.fastlm.linear_cross_entropy_gradient_
    ours, wanted = logits.clone(), logits.clone()
    loss = gradient.triton(ours, None, target, None, -100, 0.1)
    torch.testing.assert_close(loss, gradient.default(wanted, None, target, None, -100, 0.1))
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", ["triton", "pytorch-triton-rocm"])
@pytest.mark.parametrize("version, missing", [("3.5.1", "too old"), ("3.6.0+rocm", None), ("3.10rc1", None)])
def test_which_triton_is_there(monkeypatch, name, version, missing):
    def found(asked):
        if asked != name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(_lib, "interpreting", False)
    monkeypatch.setattr(_lib.shutil, "which", lambda _: "/usr/bin/cc")
    assert (missing or "None") in str(_lib._triton_missing())
    monkeypatch.setattr(_lib.shutil, "which", lambda _: None)
    assert missing or sys.platform != "linux" or "C compiler" in _lib._triton_missing()
