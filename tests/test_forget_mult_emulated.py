"""csrc/forget_mult.cu on the CPU, under the emulator: values and gradients against float64, on every schedule."""

import emulated
import pytest
import torch
from emulated import read, write

from fastlm import testing
from fastlm.ops.forget_mult import _adjoint, reference

SHAPES = [(1, 33, 8), (2, 3, 37), (8, 1, 1), (9, 5, 61), (17, 2, 130)]  # around the steps loaded ahead: 8, and 4 back
BLOCKS = 2


@pytest.fixture(scope="module")
def unit():
    return emulated.load("forget_mult")


def close(name, actual, exact):
    """To the rounding of the result: all that is between is in float32."""
    size = exact.abs().max().item()
    rounding = 0.51 * torch.finfo(actual.dtype).eps
    assert (actual.double() - exact).abs().max() <= rounding * size + 1e-5 * size, name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", ["none", "narrow", "wide"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_against_float64(unit, dtype, shape, state, reverse):
    f, x, grad = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    h0 = None if state == "none" else torch.randn(shape[1:]).to(torch.float32 if state == "wide" else dtype)
    state_of = f[0] if h0 is None else h0
    count, code, wide = shape[1] * shape[2], emulated.DTYPES[dtype], int(h0 is not None and h0.dtype == torch.float32)
    inputs = read("f", f), read("x", x), read("h0", h0), wide
    h = unit.run("forget_mult_fwd", code, *inputs, write("out", f), shape[0], count, int(reverse), BLOCKS)["out"]
    exact = [None if t is None else t.double() for t in (grad, f, x, h0)]
    close("h", h, reference(*exact[1:], reverse))

    results = write("df", f), write("dx", x), write("dh0", state_of)
    got = unit.run(
        "forget_mult_bwd",
        code,
        read("grad", grad),
        *inputs,
        read("h", h),
        *results,
        shape[0],
        count,
        int(reverse),
        BLOCKS,
    )
    for name, expected in zip(("df", "dx", "dh0"), _adjoint(*exact, h.double(), reverse), strict=True):
        close(name, got[name], expected)


def test_nothing_can_be_taken_away(unit):
    assert emulated.mutations(unit, lambda: test_against_float64(unit, torch.float32, (9, 5, 61), "wide", True)) == {}
