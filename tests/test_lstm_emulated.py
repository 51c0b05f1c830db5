"""The persistent LSTM of csrc/lstm_*.cu on the CPU: values, schedules, races, and what happens without each barrier."""

import ctypes

import emulated
import pytest
import torch
from emulated import read, update, write

from fastlm.ops import philox
from fastlm.ops.lstm import _adjoint, _forward

DATA, FLAGS, GRID, MULTICAST, CLUSTER = range(5)
FIELDS = "exchange flags handed tiles columns units slices groups replicas passes depth sides cluster shared there kept"


def unit():
    return emulated.load("lstm")


def plan(backward, T, B, H, split, exchange, clusters, multiprocessors):
    out = (ctypes.c_int64 * 16)()
    unit().library.lstm_plan(backward, T, B, H, split, exchange, clusters, multiprocessors, out)
    return dict(zip(FIELDS.split(), out, strict=True))


def layer(T, B, H, dtype=torch.float32, state=None, size=1.0):
    torch.manual_seed(T + 10 * B + 100 * H)
    weight = (torch.rand(4 * H, H) * 2 - 1) * H**-0.5 * size
    h0, c0 = torch.randn(B, H) * 0.5, torch.randn(B, H)
    return torch.randn(T, B, 4 * H).to(dtype), weight.to(dtype), h0.to(state or dtype), c0.to(state or dtype)


def forward(T, B, H, *, split=0, exchange=DATA, multiprocessors=132, dtype=torch.float32, state=None, p=0.5,
            reverse=False, schedules=None):  # fmt: skip
    """The kernel's results and those of float64, and the plan."""
    clusters = int(exchange in (MULTICAST, CLUSTER))
    shape = plan(0, T, B, H, split, exchange, clusters, multiprocessors)
    assert shape["there"], "no plan"
    gates, weight, h0, c0 = layer(T, B, H, dtype, state)
    seed = torch.tensor(2**40 + 7) if p else None
    codes = emulated.DTYPES
    found = unit().run(
        "lstm_forward", T, B, H, split, exchange, clusters, multiprocessors, codes[dtype], codes[h0.dtype],
        int(reverse), p, read("seed", seed), read("weight", weight), read("h0", h0), read("c0", c0),
        update("gates", gates), write("cells", torch.empty(T, B, H)), write("y", torch.empty(T, B, H, dtype=dtype)),
        write("h_n", h0), write("c_n", c0), write("exchange", torch.empty(shape["exchange"], dtype=torch.int32)),
        write("flags", torch.empty(shape["flags"], dtype=torch.int32)), schedules=schedules or emulated.SCHEDULES,
    )  # fmt: skip
    wanted_gates = gates.double()
    y, h_n, c_n, cells = _forward(wanted_gates, weight.double(), h0.double(), c0.double(), seed, p, reverse, True)
    return found, dict(y=y, h_n=h_n, c_n=c_n, cells=cells, gates=wanted_gates), shape


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def assert_near(found, wanted, bound):
    for name, exact in wanted.items():
        assert error(found[name], exact) <= bound, (name, error(found[name], exact))


def test_forward():
    found, wanted, _ = forward(3, 5, 21, multiprocessors=8)
    assert_near(found, wanted, 3e-4)


def backward(T, B, H, *, split=0, exchange=DATA, clusters=0, multiprocessors=132, dtype=torch.float32, state=None,
             p=0.5, reverse=False, grads="dy dh dc", scale=1.0, schedules=None):  # fmt: skip
    """da, dh0 and dc0 of the kernel, of float64 from the same gates, and the plan."""
    shape = plan(1, T, B, H, split, exchange, clusters, multiprocessors)
    assert shape["there"], "no plan"
    gates, weight, h0, c0 = layer(T, B, H, dtype, state)
    seed = torch.tensor(2**40 + 7) if p else None
    kept = gates.float()
    cells = _forward(kept, weight.float(), h0.float(), c0.float(), seed, p, reverse, True)[3]
    kept = kept.to(dtype)
    dy, dh, dc = torch.randn(T, B, H).mul(scale).to(dtype), torch.randn(B, H) * scale, torch.randn(B, H) * scale
    dy, dh, dc = (g if name in grads.split() else None for g, name in zip((dy, dh, dc), ("dy", "dh", "dc"), strict=True))
    codes = emulated.DTYPES
    found = unit().run(
        "lstm_backward", T, B, H, split, exchange, clusters, multiprocessors, codes[dtype], codes[c0.dtype],
        int(reverse), p, read("seed", seed), read("weight", weight), read("dy", dy), read("dh_n", dh),
        read("dc_n", dc), read("c0", c0), read("cells", cells), update("gates", kept),
        write("dh0", torch.empty(B, H)), write("dc0", torch.empty(B, H)),
        write("exchange", torch.empty(shape["exchange"], dtype=torch.int32)),
        write("flags", torch.empty(shape["flags"], dtype=torch.int32)),
        update("peaks", torch.zeros(T + 1, dtype=torch.int32)), write("handed", torch.empty(shape["handed"])),
        schedules=schedules or emulated.SCHEDULES,
    )  # fmt: skip
    wanted = kept.double()
    wide = [None if g is None else g.double() for g in (dy, dh, dc)]
    dh0, dc0 = _adjoint(*wide, wanted, cells.double(), c0.double(), weight.double(), seed, p, reverse)
    return found, dict(gates=wanted, dh0=dh0, dc0=dc0), shape
