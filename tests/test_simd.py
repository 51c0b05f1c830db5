"""The vector functions of the CPU kernels on each instruction set of this machine: ulp, ends, rounding."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm import _lib

UNIT = """
#include "simd.h"
using namespace fastlm::FASTLM_ISA;
#define APPLY(name) \\
  extern "C" void apply_##name(const float* x, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += kWidth) store(y + i, name(load(x + i, n - i)), n - i); \\
  }
APPLY(exp) APPLY(tanh) APPLY(sigmoid)
#define CONVERT(type) \\
  extern "C" void to_##type(const float* x, fastlm::type* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += kWidth) store(y + i, load(x + i, n - i), n - i); \\
  } \\
  extern "C" void from_##type(const fastlm::type* x, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += kWidth) store(y + i, load(x + i, n - i), n - i); \\
  } \\
  extern "C" void scalar_to_##type(const float* x, fastlm::type* y, int64_t n) { \\
    for (int64_t i = 0; i < n; ++i) y[i] = from_float<fastlm::type>(x[i]); \\
  } \\
  extern "C" void scalar_from_##type(const fastlm::type* x, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]); \\
  }
CONVERT(bf16) CONVERT(f16)
extern "C" float reduce_sum(const float* x) { return sum(load(x)); }
extern "C" float reduce_max(const float* x) { return max(load(x)); }
extern "C" int64_t width() { return kWidth; }
"""
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
FLAGS["avx512"] = [*FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]


@pytest.fixture(scope="module", params=list(FLAGS))
def unit(request, tmp_path_factory):
    if _lib.status["_C"] is not None:
        pytest.skip(f"no native kernels: {_lib.status['_C']}")
    order = _lib.INSTRUCTION_SETS
    if order.index(request.param) > order.index(_lib.instruction_set()):
        pytest.skip(f"this machine has no {request.param}")
    folder = tmp_path_factory.mktemp("simd")
    (folder / "unit.cpp").write_text(UNIT)
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]
    include = Path(__file__).resolve().parents[1] / "csrc"
    command = ["c++", *flags, "-Wno-psabi", f"-DFASTLM_ISA={request.param}", f"-I{include}", *FLAGS[request.param]]
    subprocess.run([*command, str(folder / "unit.cpp"), "-o", str(folder / "unit.so")], check=True)
    library = ctypes.CDLL(str(folder / "unit.so"))
    library.reduce_sum.restype = library.reduce_max.restype = ctypes.c_float
    return library


def call(unit, name, x, out):
    getattr(unit, name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(x.size))
    return out


def ulps(actual, exact):
    return np.abs(actual.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


@pytest.mark.parametrize(
    "name, exact, low, high, bound",
    [
        ("exp", np.exp, -87.0, 88.7, 2.0),
        ("tanh", np.tanh, -12.0, 12.0, 2.5),
        ("tanh", np.tanh, -1e-3, 1e-3, 2.5),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), -87.0, 87.0, 4.0),
    ],
)
def test_error_in_ulp(unit, name, exact, low, high, bound):
    x = np.linspace(low, high, 200_003, dtype=np.float32)
    y = call(unit, f"apply_{name}", x, np.empty_like(x))
    worst = ulps(y, exact(x.astype(np.float64))).max()
    assert worst <= bound, f"{name}: {worst:.2f} ulp"


def test_ends(unit):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -200, -100, 0.0, -0.0, 100, 200, inf, nan, 1e-30], dtype=np.float32)
    exp, tanh, sigmoid = (call(unit, f"apply_{name}", x, np.empty_like(x)) for name in ("exp", "tanh", "sigmoid"))
    assert exp[0] == exp[1] == 0 and abs(exp[2] - np.exp(-100.0)) < 2e-45
    assert exp[3] == exp[4] == 1 and exp[5] == exp[6] == exp[7] == inf and np.isnan(exp[8])
    assert list(tanh[[0, 1, 6, 7]]) == [-1, -1, 1, 1] and np.isnan(tanh[8]) and tanh[9] == np.float32(1e-30)
    assert list(sigmoid[[0, 3, 7]]) == [0, 0.5, 1] and np.isnan(sigmoid[8])


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("prefix", ["", "scalar_"])
def test_sixteen_bit_conversion(unit, name, dtype, prefix):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    wide = call(unit, f"{prefix}from_{name}", every.view(torch.int16).numpy(), np.empty(65536, np.float32))
    assert torch.equal(torch.from_numpy(wide).nan_to_num(7.0), every.float().nan_to_num(7.0))
    bits = torch.randint(-(2**31), 2**31, (1 << 18,)).to(torch.int32)  # every exponent, ties and subnormals among them
    x = torch.cat([bits.view(torch.float32), every.float(), torch.tensor([65519.9, 65520.0, 2.0**-25, 2.0**-24 * 1.5])])
    narrow = call(unit, f"{prefix}to_{name}", x.numpy(), np.empty(x.numel(), np.int16))
    got, expected = torch.from_numpy(narrow).view(dtype), x.to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_reductions(unit):
    x = np.random.default_rng(0).standard_normal(unit.width()).astype(np.float32)
    pointer = ctypes.c_void_p(x.ctypes.data)
    assert abs(unit.reduce_sum(pointer) - x.sum()) < 1e-5 and unit.reduce_max(pointer) == x.max()
