"""The CUDA kernels of QRNN pooling on the CPU: results, masks, splits, and what the emulator reports."""

import emulated
import pytest
import torch
from emulated import read, write

from fastlm import testing
from fastlm.ops import philox
from fastlm.ops.qrnn_pool import EVERY, GATES, _adjoint, _forward

NEIGHBOURS = [(37, 16), (34, 16), (36, 16), (36, 8), (36, 4), (36, 2)]  # H and the alignment of all: V from 1 to 4
LENGTHS = [1, 3, 8, 21, 37] if emulated.THOROUGH else [1, 21]
SEED = torch.tensor(2**40 + 7)
ZONEOUT = [(0.3, None), (0.3, SEED)]
FEW = 2  # schedules where one would do, as nothing passes between threads


@pytest.fixture(scope="module")
def unit():
    return emulated.load("qrnn_pool")


class Layer:
    """A layer of T steps, its inputs drawn, run by the kernels; `align` is all that their addresses promise."""

    def __init__(self, unit, shape, pooling="fo", dtype=torch.float32, state=None, align=16, **options):
        self.unit, self.shape, self.pooling, self.dtype, self.align = unit, shape, pooling, dtype, align
        T, B, H = shape
        self.gates = 1.5 * torch.randn(T, B, GATES[pooling] * H).to(dtype)
        self.c0, self.dc_n = (torch.randn(B, H).to(state or dtype) for _ in range(2))
        self.dh = torch.randn(shape).to(dtype)
        self.zoneout, self.seed, self.reverse = 0.0, None, False
        self.rows, self.busy = max(1, B - 1), 0
        vars(self).update(options)

    def _arguments(self, state):
        wide = int(state is not None and state.dtype == torch.float32)
        return emulated.DTYPES[self.dtype], GATES[self.pooling], wide, (self.seed, self.zoneout, int(self.reverse))

    def _in(self, name, x):
        return None if x is None else read(name, x, max(self.align, x.element_size()))

    def _out(self, name, *shape, dtype=None):
        x = torch.empty(shape, dtype=dtype or self.dtype)
        return write(name, x, max(self.align, x.element_size()))

    def forward(self, keep=True, schedules=FEW):
        T, B, H = self.shape
        dtype, count, wide, (seed, *mask) = self._arguments(self.c0)
        c_n = write("c_n", torch.empty(B, H, dtype=self.dtype if self.c0 is None else self.c0.dtype), 4)
        kept = self._out("kept", -(-T // EVERY), B, H, dtype=torch.float32) if keep else None
        given = self._in("gates", self.gates), read("c0", self.c0, 4), wide, read("seed", seed)
        sizes = T, B, H, self.rows, self.busy
        results = self.unit.run(
            "qrnn_pool_fwd",
            dtype,
            count,
            *given,
            *mask,
            self._out("h", T, B, H),
            c_n,
            kept,
            *sizes,
            schedules=schedules,
        )
        return results["h"], results["c_n"], results.get("kept")

    def backward(self, kept, schedules=FEW):
        T, B, H = self.shape
        dtype, count, wide, (seed, *mask) = self._arguments(self.dc_n)
        given = self._in("dh", self.dh), read("dc_n", self.dc_n, 4), wide, self._in("gates", self.gates)
        given += self._in("kept", kept), read("seed", seed)
        results = self._out("dgates", *self.gates.shape), self._out("dc0", B, H, dtype=torch.float32)
        sizes = T, B, H, self.rows, self.busy
        found = self.unit.run("qrnn_pool_bwd", dtype, count, *given, *mask, *results, *sizes, schedules=schedules)
        return found["dgates"], found["dc0"]

    def exact(self):
        """h, c_n, kept, dgates and dc0 in float64, from the inputs as they are."""
        wide = [None if x is None else x.double() for x in (self.gates, self.c0, self.dh, self.dc_n)]
        gates, c0, dh, dc_n = wide
        options = self.seed, self.pooling, self.zoneout, self.reverse
        results = _forward(gates, c0, *options, True)
        return *results, *_adjoint(dh, dc_n, gates, results[2], *options)

    def check(self, schedules=FEW):
        h, c_n, kept = self.forward(schedules=schedules)
        exact = self.exact()
        found = h, c_n, kept, *self.backward(exact[2].float(), schedules=schedules)  # what another one may have kept
        for name, *results in zip(("h", "c_n", "kept", "dgates", "dc0"), found, exact, strict=True):
            eps = 1e-6 if results[0].dtype == torch.float32 else torch.finfo(self.dtype).eps
            testing.assert_close(f"{name} of {self.pooling}", *results, eps, scale=1.0)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("pooling", GATES)
def test_values_and_gradients(unit, dtype, pooling):
    for H, align in NEIGHBOURS:
        for T in LENGTHS:
            for reverse, (zoneout, seed) in zip((False, True), ZONEOUT, strict=True):
                state = torch.float32 if reverse else dtype
                options = dict(zoneout=zoneout, seed=seed, reverse=reverse)
                Layer(unit, (T, 3, H), pooling, dtype, state, align, **options).check()


@pytest.mark.parametrize("pooling", GATES)
def test_any_size(unit, pooling):
    for shape in [(0, 2, 5), (1, 1, 1), (9, 1, 257), (7, 4, 1), (EVERY, 2, 130), (70, 1, 3), (141, 2, 33)]:
        Layer(unit, shape, pooling, reverse=True).check()


def test_blocks_where_there_are_few_channels(unit):
    for busy in (1, 3, 5):  # V = 4, 2 and 1 for the 260 channels of a row
        Layer(unit, (21, 1, 260), busy=busy).check()


def test_every_schedule(unit):
    for pooling, align in (("f", 4), ("fo", 8), ("ifo", 16)):
        Layer(unit, (37, 2, 36), pooling, zoneout=0.3, seed=SEED, align=align).check(emulated.SCHEDULES)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.999, 1.0])
def test_zoneout_keeps_the_cell_where_the_mask_says(unit, p):
    for H, value in zip([37, 34, 36, 37, 34, 36], testing.SEEDS, strict=True):
        layer = Layer(unit, (9, 3, H), "f", zoneout=p, seed=torch.tensor(value))
        h, _, kept = layer.forward()
        mask = philox.keep_mask(h.shape, p, layer.seed, philox.ZONEOUT)
        assert torch.equal(torch.cat([layer.c0[None], h[:-1]]) != h, mask)
        layer.dh, layer.dc_n = torch.ones_like(h), None
        dgates, _ = layer.backward(kept)
        assert torch.equal(dgates[:, :, H:] != 0, mask) and torch.equal(dgates[:, :, :H] != 0, mask)


def test_split_across_calls_equals_one_call(unit):
    whole = Layer(unit, (21, 2, 37), dtype=torch.bfloat16, state=torch.float32, zoneout=0.1)
    h, c_n, _ = whole.forward()
    parts, state = [], whole.c0
    for begin, end in (0, 8), (8, 9), (9, 21):
        options = dict(gates=whole.gates[begin:end], c0=state, zoneout=0.1)
        part, state, _ = Layer(unit, (end - begin, 2, 37), dtype=torch.bfloat16, **options).forward()
        parts.append(part)
    assert torch.equal(torch.cat(parts), h) and torch.equal(state, c_n)


def test_what_is_absent_is_zero_and_kept_only_on_demand(unit):
    layer = Layer(unit, (11, 2, 37), "ifo")
    h, c_n, kept = layer.forward()
    assert all(torch.equal(a, b) for a, b in zip(layer.forward(keep=False)[:2], (h, c_n), strict=True))
    for name in ("c0", "dc_n", "dh"):
        results = []
        for value in (torch.zeros_like(getattr(layer, name)), None):
            setattr(layer, name, value)
            results.append([*layer.forward(), *layer.backward(kept)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("pooling", GATES)
def test_what_is_not_finite_shows_in_its_channel_only(unit, pooling):
    for gate in range(GATES[pooling]):
        layer = Layer(unit, (19, 2, 36), pooling)
        layer.gates[9, 1, 36 * gate + 21] = float("nan")
        h, c_n, kept = layer.forward()
        expected = torch.zeros(19, 2, 36, dtype=torch.bool)
        expected[9 : 10 if gate == 2 else None, 1, 21] = True
        assert torch.equal(h.isnan(), expected) and torch.equal(c_n.isnan(), expected[-1] & (gate != 2))
        dgates, _ = layer.backward(kept)
        others = torch.arange(GATES[pooling] * 36) % 36 != 21
        assert dgates[9, 1].isnan().any() and dgates[:, :, others].isfinite().all()


def test_saturated_gates_are_exact(unit):
    gates = torch.tensor([[[1e4, 1e4, 1e4]], [[float("inf")] * 3], [[-float("inf"), -float("inf"), 1e4]]])
    layer = Layer(unit, (3, 1, 1), gates=gates, c0=torch.tensor([[0.25]]), dh=torch.ones(3, 1, 1), dc_n=None)
    h, c_n, kept = layer.forward()
    assert torch.equal(h, torch.ones(3, 1, 1)) and torch.equal(c_n, torch.ones(1, 1))
    assert torch.equal(layer.backward(kept)[0], torch.zeros(3, 1, 3))


def test_every_wait_is_needed(unit):
    emulated.assert_all_reported(unit, lambda: Layer(unit, (70, 1, 36), zoneout=0.3, seed=SEED).check())
