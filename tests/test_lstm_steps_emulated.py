"""The fused kernels between the products of the LSTM's alternating path on CUDA, under the emulator, in float64."""

import emulated
import pytest
import torch
from emulated import read, update, write

from fastlm import testing
from fastlm.ops.lstm import _adjoint, _forward

SHAPES = [(1, 1), (3, 37), (5, 130)]  # the last has two blocks to a row
FEW = 4  # schedules: no thread waits for another
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def problem(B, H, dtype, wide):
    """A step in `dtype`: the input's part, weight and state; and all of it in float64."""
    found = torch.randn(B, 4 * H).to(dtype), torch.randn(4 * H, H).mul(H**-0.5).to(dtype)
    state = [torch.randn(B, H).to(torch.float32 if wide else dtype) for _ in range(2)]
    return (*found, *state), [x.double() for x in (*found, *state)]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_forward(shape, dtype, wide):
    B, H = shape
    (gates, w_hh, h0, c0), exact = problem(B, H, dtype, wide)
    product, before = h0.float() @ w_hh.float().t(), c0.float()
    gates64 = exact[0][None].clone()
    y, h, c, cells = _forward(gates64, *exact[1:], None, 0.0, False, True, False)
    expected = {"y": y[0], "after": cells[0], "h_n": h, "c_n": c}
    unit = emulated.load("lstm_steps")
    for keep, last, rows in ((1, 1, B), (0, 1, 2), (1, 0, 1)):
        states = [write("h_n", h0), write("c_n", c0)] if last else [None, None]
        tensors = [read("product", product), read("before", before), update("gates", gates)]
        tensors += [write("after", before), write("y", h0.to(dtype)), *states]
        sizes = (B, H, keep, int(h0.dtype == torch.float32), rows)
        found = unit.run("forward_step", emulated.DTYPES[dtype], *tensors, *sizes, schedules=FEW)
        for name in [name for name in expected if name in found]:
            testing.assert_close(name, found[name], expected[name], TOLERANCE[dtype])
        if keep:
            testing.assert_close("gates", found["gates"], gates64[0], TOLERANCE[dtype])
        else:
            assert torch.equal(found["gates"], gates)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_back(shape, dtype):
    B, H = shape
    (gates, w_hh, h0, c0), exact = problem(B, H, dtype, True)
    *_, cells = _forward(exact[0][None], *exact[1:], None, 0.0, False, True, False)
    activated, dy = exact[0].to(dtype), torch.randn(B, H).to(dtype)
    dh, dc = torch.randn(2, B, H)
    unit = emulated.load("lstm_steps")
    for given, rows in (((dy, dh, None, dc), B), ((None, None, dh, dc), 2), ((dy, None, None, None), 1)):
        names = ("dy", "given", "product", "dc")
        tensors = [None if x is None else read(name, x) for name, x in zip(names, given, strict=True)]
        found = unit.run(
            "backward_step",
            emulated.DTYPES[dtype],
            *(update("gates", activated), read("cells", cells[0].float()), read("before", c0), *tensors),
            *(write("dc_before", c0), B, H, rows),
            schedules=FEW,
        )
        upstream = [None if x is None else x.double() for x in given]
        later = upstream[1] if upstream[2] is None else upstream[2]
        da = activated.double()[None]
        adjoint = (None if upstream[0] is None else upstream[0][None], later, upstream[3], da, cells.float().double())
        _, dc_before = _adjoint(*adjoint, c0.double(), exact[1], None, 0.0, False, False)
        testing.assert_close("da", found["gates"], da[0], TOLERANCE[dtype])
        testing.assert_close("dc_before", found["dc_before"], dc_before, 1e-6)


def test_nan_and_infinity_pass_through():
    """A gate that is shut or open by far is 0 or 1 exactly; what is no number stays none."""
    (gates, _, _, c0), _ = problem(1, 4, torch.float32, True)
    gates[0] = torch.tensor([-torch.inf] * 4 + [torch.inf] * 4 + [1.0] * 4 + [200.0, -200.0, torch.nan, 0.0])
    unit = emulated.load("lstm_steps")
    tensors = [read("product", torch.zeros(1, 16)), read("before", c0), update("gates", gates), write("after", c0)]
    found = unit.run("forward_step", 0, *tensors, write("y", c0), None, None, 1, 4, 1, 1, 1, schedules=FEW)
    assert torch.equal(found["after"], c0) and found["y"][0, 2].isnan() and found["y"][0, 1] == 0
    torch.testing.assert_close(found["y"][0, 0], c0[0, 0].tanh())
    assert torch.equal(found["gates"][0, :8], torch.tensor([0.0] * 4 + [1.0] * 4))
