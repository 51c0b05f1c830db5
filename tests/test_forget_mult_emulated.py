"""csrc/forget_mult.cu on the CPU, under the emulator: values and gradients against float64, on every schedule."""

import emulated
import pytest
import torch
from emulated import read, write

from fastlm import testing
from fastlm.ops.forget_mult import _adjoint, reference

SHAPES = [(0, 2, 3), (1, 33, 8), (2, 3, 37), (8, 1, 1), (9, 5, 61), (37, 2, 130)]  # around the steps loaded ahead
SHAPES += [(70, 5, 301)] * emulated.THOROUGH
BLOCKS = 2


@pytest.fixture(scope="module")
def unit():
    return emulated.load("forget_mult")


def close(name, actual, exact):
    """To the rounding of the result: all that is between is in float32."""
    size = exact.abs().max().item() if exact.numel() else 0.0
    rounding = 0.51 * torch.finfo(actual.dtype).eps
    assert ((actual.double() - exact).abs() <= rounding * size + 1e-5 * size).all(), name


def check(unit, shape, dtype=torch.float32, state="none", reverse=False, align=16, busy=0):
    """Both directions, on addresses of which nothing but `align` is known, with V such that there are `busy` blocks."""

    def given(name, x):
        return read(name, x, align)

    def result(name, like):
        return write(name, like, align)

    f, x, grad = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    h0 = None if state == "none" else torch.randn(shape[1:]).to(torch.float32 if state == "wide" else dtype)
    state_of = torch.empty(shape[1:], dtype=dtype if h0 is None else h0.dtype)
    code, wide = emulated.DTYPES[dtype], int(h0 is not None and h0.dtype == torch.float32)
    sizes = shape[0], shape[1] * shape[2], int(reverse), BLOCKS, busy
    inputs = given("f", f), given("x", x), read("h0", h0, 4), wide
    h = unit.run("forget_mult_fwd", code, *inputs, result("out", f), *sizes)["out"]
    exact = [None if t is None else t.double() for t in (grad, f, x, h0)]
    close("h", h, reference(*exact[1:], reverse))

    results = result("df", f), result("dx", x), write("dh0", state_of, 4)
    got = unit.run("forget_mult_bwd", code, given("grad", grad), *inputs, given("h", h), *results, *sizes)
    for name, expected in zip(("df", "dx", "dh0"), _adjoint(*exact, h.double(), reverse), strict=True):
        close(name, got[name], expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", ["none", "narrow", "wide"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_against_float64(unit, dtype, shape, state, reverse):
    check(unit, shape, dtype, state, reverse)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_neighbours(unit, dtype):
    for align in (16, 8, 4, 2):  # V from 4 to 1
        check(unit, (21, 3, 36), dtype, align=max(align, dtype.itemsize))
    for busy in (1, 3, 5):  # the same where there are few recurrences
        check(unit, (21, 1, 260), dtype, busy=busy)


def test_every_wait_is_needed(unit):
    emulated.assert_all_reported(unit, lambda: check(unit, (70, 1, 36), state="wide"))
