"""The persistent LSTM of csrc/lstm_*.cu on the CPU: values, schedules, races, and what happens without each barrier."""

import ctypes
import functools
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import read, update, write

from fastlm.ops.lstm import _adjoint, _forward

DATA, FLAGS, GRID, MULTICAST, CLUSTER = range(5)
WORDS = ("there", "exchange", "flags", "handed", "tiles", "kept", "units", "slices", "groups", "replicas", "passes",
         "depth", "sides", "cluster", "shared")  # fmt: skip
SEED = torch.tensor(2**40 + 7)
HALF, SPLIT = 6e-4, 1e-6  # of the result, by its norm, as the products have 11 or 22 bits


class Wish(NamedTuple):
    """Sizes, and a device such that the plan is the one that a case is for."""

    T: int
    B: int
    H: int
    split: int = 0
    exchange: int = DATA
    clusters: int = 0
    multiprocessors: int = 132
    shared: int = 227 * 1024
    only: int = -1
    warps: int = 2

    def packed(self):
        return torch.tensor(self[:9])


@functools.cache
def unit(name, warps=2):
    return emulated.load(name if warps == 2 else f"{name}{warps}")


def plan_of(wish, name):
    given, out = (ctypes.c_int64 * 9)(*wish[:9]), (ctypes.c_int64 * len(WORDS))()
    getattr(unit(name, wish.warps).library, f"{name}_plan")(given, out)
    return dict(zip(WORDS, out, strict=True))


def layer(wish, dtype, state, size=1.0):
    torch.manual_seed(hash(wish[:3]))
    weight = (torch.rand(4 * wish.H, wish.H) * 2 - 1) * wish.H**-0.5 * size
    h0, c0 = torch.randn(wish.B, wish.H) * 0.5, torch.randn(wish.B, wish.H)
    return torch.randn(wish.T, wish.B, 4 * wish.H).to(dtype), weight.to(dtype), h0.to(state), c0.to(state)


def words(count):
    return torch.empty(count, dtype=torch.int32)


def forward(
    wish, *, dtype=torch.float32, state=torch.float32, p=0.5, reverse=False, keep=True, change=None, size=1.0, **options
):
    """What the kernel finds and what float64 does."""
    plan, codes = plan_of(wish, "lstm_forward"), emulated.DTYPES
    assert plan["there"], "no plan"
    gates, weight, h0, c0 = layer(wish, dtype, state, size)
    if change is not None:
        change(gates)
    T, B, H = wish[:3]
    seed = SEED if p else None
    found = unit("lstm_forward", wish.warps).run(
        "lstm_forward", read("wish", wish.packed()), codes[dtype], codes[state], int(reverse), p, read("seed", seed),
        read("weight", weight), read("h0", h0), read("c0", c0), update("gates", gates),
        write("cells", torch.empty(T, B, H)) if keep else None, write("y", torch.empty(T, B, H, dtype=dtype)),
        write("h_n", h0), write("c_n", c0), write("exchange", words(plan["exchange"])),
        write("flags", words(plan["flags"])), **options,
    )  # fmt: skip
    kept = gates.double()
    y, h_n, c_n, cells = _forward(kept, weight.double(), h0.double(), c0.double(), seed, p, reverse, keep, False)
    return found, dict(y=y, h_n=h_n, c_n=c_n, gates=kept, **(dict(cells=cells) if keep else {}))


def backward(wish, *, dtype=torch.float32, state=torch.float32, p=0.5, reverse=False, grads=("dy", "dh", "dc"),
             scale=1.0, change=None, shut=(), size=1.0, **options):  # fmt: skip
    """The same for da, dh0 and dc0, from gates that float32 has made."""
    plan, codes = plan_of(wish, "lstm_backward"), emulated.DTYPES
    assert plan["there"], "no plan"
    gates, weight, h0, c0 = layer(wish, dtype, state, size)
    T, B, H = wish[:3]
    seed = SEED if p else None
    for step in shut:  # nothing is written to the cells, and they keep what they have
        gates[step, :, :H] -= 14
        gates[step, :, H : 2 * H] += 14
    kept = gates.float()
    cells = _forward(kept, weight.float(), h0.float(), c0.float(), seed, p, reverse, True, False)[3]
    kept = kept.to(dtype)
    given = dict(
        dy=torch.randn(T, B, H).mul(scale).to(dtype), dh=torch.randn(B, H) * scale, dc=torch.randn(B, H) * scale
    )
    if change is not None:
        change(given["dy"])
    dy, dh, dc = (given[name] if name in grads else None for name in given)
    found = unit("lstm_backward", wish.warps).run(
        "lstm_backward", read("wish", wish.packed()), codes[dtype], codes[state], int(reverse), p, read("seed", seed),
        read("weight", weight), read("dy", dy), read("dh_n", dh), read("dc_n", dc), read("c0", c0),
        read("cells", cells), update("gates", kept), write("dh0", torch.empty(B, H)), write("dc0", torch.empty(B, H)),
        write("exchange", words(plan["exchange"])), write("flags", words(plan["flags"])),
        update("peaks", torch.zeros(T + 1, dtype=torch.int32)), write("handed", torch.empty(plan["handed"])), **options,
    )  # fmt: skip
    da = kept.double()
    wide = [None if g is None else g.double() for g in (dy, dh, dc)]
    dh0, dc0 = _adjoint(*wide, da, cells.double(), c0.double(), weight.double(), seed, p, reverse, False)
    return found, dict(gates=da, dh0=dh0, dc0=dc0)


def assert_near(found, wanted, bound):
    for name, exact in wanted.items():
        size = exact.norm()
        rounding = torch.finfo(found[name].dtype).eps / 2  # of the result itself
        error = ((found[name].double() - exact).norm() / size).item() if size > 0 else found[name].norm().item()
        assert error <= bound + rounding, f"{name}: {error:.1e}"


def both(run, bound, *wishes, **options):
    """A check for mutations: what one size does not need, the other does."""

    def check():
        for wish in wishes:
            assert_near(*run(wish, schedules=4, **options), bound)

    return check


SMALL = Wish(
    4, 11, 61, multiprocessors=16
)  # two portions of 8 rows, two column tiles a warp, 3 units in the last block
SIZES = [Wish(1, 1, 1), Wish(1, 3, 4), Wish(2, 1, 37), Wish(3, 9, 16), Wish(5, 2, 5), Wish(3, 26, 21), SMALL]


@pytest.mark.parametrize("wish", SIZES, ids=str)
def test_forward_sizes(wish):
    assert_near(*forward(wish), HALF)


@pytest.mark.parametrize("wish", SIZES, ids=str)
def test_backward_sizes(wish):
    assert_near(*backward(wish), HALF)


@pytest.mark.parametrize("exchange", [DATA, FLAGS, GRID, MULTICAST, CLUSTER])
@pytest.mark.parametrize("B", [5, 30])
def test_forward_exchanges(exchange, B):
    clusters = int(exchange in (MULTICAST, CLUSTER))
    assert_near(*forward(Wish(4, B, 50, exchange=exchange, clusters=clusters, multiprocessors=16)), HALF)


@pytest.mark.parametrize(("exchange", "clusters"), [(DATA, 0), (DATA, 1), (FLAGS, 0), (GRID, 0)])
@pytest.mark.parametrize("B", [5, 30])
def test_backward_exchanges(exchange, clusters, B):
    assert_near(*backward(Wish(4, B, 50, exchange=exchange, clusters=clusters, multiprocessors=16)), HALF)


# Every tiling of the tables, at a width for which the warps have tiles beyond those that are kept.
@pytest.mark.parametrize("only", range(15))
def test_forward_tilings(only):
    wish = Wish(2, 19, 170 if only < 9 else 120, split=int(only >= 9), only=only)
    assert_near(*forward(wish, schedules=2), SPLIT if wish.split else HALF)


@pytest.mark.parametrize(("exchange", "only"), [(MULTICAST, 0), (MULTICAST, 1), (CLUSTER, 0), (CLUSTER, 1)])
def test_forward_tilings_of_clusters(exchange, only):
    wish = Wish(3, 19, 150, exchange=exchange, clusters=1, only=only)
    assert_near(*forward(wish, schedules=4), HALF)


@pytest.mark.parametrize("clusters", [0, 1])
@pytest.mark.parametrize("only", range(15))
def test_backward_tilings(only, clusters):
    wish = Wish(2, 19, 70, split=int(only >= 7), clusters=clusters, only=only)
    assert_near(*backward(wish, schedules=2), SPLIT if wish.split else HALF)


@pytest.mark.parametrize("run", [forward, backward])
def test_replicas_and_one_buffer(run):
    """Rows of the batch over several copies of the layer, in turns; and sums in one buffer where memory is short."""
    wish = Wish(3, 60, 21, multiprocessors=20)
    plan = plan_of(wish, f"lstm_{run.__name__}")
    assert plan["replicas"] > 1 and plan["passes"] > 1
    assert_near(*run(wish), HALF)
    if run is forward:
        wish = wish._replace(H=61, multiprocessors=6, only=4)
        wish = wish._replace(shared=plan_of(wish, "lstm_forward")["shared"] - 1)
        assert plan_of(wish, "lstm_forward")["sides"] == 1
        assert_near(*run(wish), HALF)


@pytest.mark.parametrize(("H", "multiprocessors"), [(37, 132), (150, 24)])
def test_eight_warps(H, multiprocessors):
    """As many as are shipped; of 37 units some warps have none."""
    wish = Wish(2, 11, H, multiprocessors=multiprocessors, warps=8)
    assert_near(*forward(wish._replace(only=2), schedules=4), HALF)
    for clusters in (0, 1):
        assert_near(*backward(wish._replace(only=1, clusters=clusters), schedules=4), HALF)


@pytest.mark.parametrize("run", [forward, backward])
@pytest.mark.parametrize("state", ["same", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(run, dtype, state):
    bound = HALF + 2 * torch.finfo(dtype).eps  # gates and outputs are rounded, step after step
    state = dtype if state == "same" else torch.float32
    assert_near(*run(SMALL, dtype=dtype, state=state), bound)


@pytest.mark.parametrize("run", [forward, backward])
@pytest.mark.parametrize("split", [0, 1])
def test_directions_and_masks(run, split):
    for p in (0.0, 0.9, 1.0):
        for reverse in (False, True):
            assert_near(*run(SMALL._replace(split=split), p=p, reverse=reverse, schedules=4), SPLIT if split else HALF)


def test_what_may_be_absent():
    found, wanted = forward(SMALL, keep=False)
    del wanted["gates"]  # which stay as they are
    assert_near(found, wanted, HALF)
    for grads in ((), ("dy",), ("dh",), ("dc",)):
        assert_near(*backward(SMALL, grads=grads, schedules=4), HALF)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e6, 1e30])
def test_size_of_gradients(scale):
    """Halves hold gradients of any size, also when they grow or vanish over the steps."""
    assert_near(*backward(SMALL, scale=scale), HALF)

    def fading(dy):
        dy.mul_(torch.logspace(0, -24, len(dy)).view(-1, 1, 1))

    for reverse in (False, True):
        found, wanted = backward(SMALL._replace(T=7), change=fading, grads=("dy",), reverse=reverse, schedules=4)
        for step in range(7):  # each by itself: the large ones say nothing about the small
            rows = dict(gates=wanted["gates"][step])
            assert_near(dict(gates=found["gates"][step]), rows, 5 * HALF)


@pytest.mark.parametrize("split", [0, 1])
def test_gates_that_shut(split):
    """Gradients that gates keep in the cells for some steps, and then let out, all at once."""
    bound = SPLIT if split else HALF
    for wish in (Wish(2, 1, 1, split), Wish(2, 4, 8, split), SMALL._replace(T=6, split=split)):
        for grads, shut in ((("dc",), [-1]), (("dc",), [-1, -2]), (("dh",), [-2]), (("dy",), [-1, -2, -3])):
            found, wanted = backward(wish, grads=grads, shut=shut[: wish.T - 1], schedules=2)
            assert_near(found, wanted, 5 * bound)


@pytest.mark.parametrize("run", [forward, backward])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1, 10.0])
def test_size_of_weights(run, size):
    assert_near(*run(SMALL._replace(split=1), size=size, schedules=2), 2 * SPLIT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(value):
    """They pass through, and stop neither the exchange nor other rows of the batch."""

    def spoil(x):
        x[1, 2] = value

    for wish in (SMALL, SMALL._replace(exchange=FLAGS)):
        found, wanted = forward(wish, change=spoil)
        if value != value:
            assert found["y"][1:, 2].isnan().all() and found["h_n"][2].isnan().all()
        fine = [row for row in range(wish.B) if row != 2]
        assert_near({k: v[..., fine, :] for k, v in found.items() if k in wanted},
                    {k: v[..., fine, :] for k, v in wanted.items()}, HALF)  # fmt: skip
        found, wanted = backward(wish, change=spoil)
        assert not found["dh0"][2].isfinite().all()
        assert_near({k: v[..., fine, :] for k, v in found.items() if k in wanted},
                    {k: v[..., fine, :] for k, v in wanted.items()}, HALF)  # fmt: skip


TWICE = "a barrier of the block lies between two turns"


REPLICAS = Wish(3, 40, 13, multiprocessors=6)  # several of them, each with several portions
HALVES = Wish(3, 11, 37, split=1, multiprocessors=16)


def assert_passed(reports, *parts):
    for part in parts:
        assert any(part in emulated.label(site) for site in reports), part


def one_buffer():
    wish = Wish(3, 11, 13, multiprocessors=4, only=0)
    wish = wish._replace(shared=plan_of(wish, "lstm_forward")["shared"] - 1)
    assert plan_of(wish, "lstm_forward")["sides"] == 1
    return wish


@pytest.mark.parametrize(
    ("wishes", "harmless"),
    [
        ([SMALL, one_buffer, REPLICAS, HALVES], {}),
        ([SMALL._replace(exchange=FLAGS), Wish(4, 5, 61, exchange=FLAGS)], {"float* partial": TWICE}),
        ([SMALL._replace(exchange=GRID), Wish(4, 5, 61, exchange=GRID)], {"float* partial": TWICE}),
        (
            [Wish(5, B, 90, exchange=MULTICAST, clusters=1, multiprocessors=8) for B in (11, 30)],
            {"float* partial": TWICE},
        ),
        ([Wish(4, 11, 37, exchange=CLUSTER, clusters=1, multiprocessors=2)], {}),
    ],
    ids=["data", "flags", "grid", "multicast", "cluster"],
)
def test_forward_needs_every_barrier(wishes, harmless):
    wishes = [wish() if callable(wish) else wish for wish in wishes]
    reports = emulated.assert_all_reported(unit("lstm_forward"), both(forward, HALF, *wishes), harmless)
    if wishes[0].exchange == DATA:
        assert_passed(reports, "load_relaxed_x2", "load_relaxed_x4", "plan.sides == 1")


def backward_check(*wishes):
    """As `both`, and once with gates for which the scale has to know dc."""
    shut = both(backward, 5 * HALF, wishes[0], grads=("dc",), shut=(-1, -2))

    def check():
        both(backward, HALF, *wishes)()
        shut()

    return check


@pytest.mark.parametrize("exchange", [DATA, FLAGS, GRID])
def test_backward_needs_every_barrier(exchange):
    wishes = [Wish(4, B, 61, exchange=exchange, multiprocessors=8) for B in (5, 11)]
    wishes += [REPLICAS, HALVES] if exchange == DATA else []
    reports = emulated.assert_all_reported(unit("lstm_backward"), backward_check(*wishes))
    if exchange == DATA:
        assert_passed(reports, "load_relaxed_x2", "load_relaxed_x4")


def test_backward_in_clusters_needs_every_barrier():
    wishes = [Wish(4, B, 61, clusters=1, multiprocessors=8) for B in (5, 11)]
    emulated.assert_all_reported(unit("lstm_backward"), backward_check(*wishes))


@pytest.mark.skipif(not emulated.THOROUGH, reason="thorough")
@pytest.mark.parametrize("run", [forward, backward])
def test_any_size(run):
    draw = torch.Generator().manual_seed(1)
    for _ in range(200):
        T, B, H, split, clusters, sms = (
            int(torch.randint(low, high, (), generator=draw))
            for low, high in ((1, 6), (1, 70), (1, 120), (0, 2), (0, 2), (8, 133))
        )
        wish = Wish(T, B, H, split, DATA, clusters if run is backward else 0, sms)
        if plan_of(wish, f"lstm_{run.__name__}")["there"]:
            assert_near(*run(wish, schedules=2), SPLIT if split else HALF)
