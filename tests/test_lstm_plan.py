"""The launch plans of the persistent LSTM (csrc/lstm_plan.h) for every size, against the kernels' formulas in numpy.

What a kernel makes of a plan stands here once more, written from csrc/lstm_forward.cu, lstm_backward.cu, lstm_ways.cuh
and lstm.cuh: who owns which rows and columns of the weight, which portion of the batch, and what lies in shared memory.
"""

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastlm.data import encoder

host = encoder.native()
pytestmark = pytest.mark.skipif(host is None, reason="fastlm._host is not built, or switched off")

ROOT = Path(__file__).resolve().parents[1]
DATA, FLAGS, GRID, MULTICAST, CLUSTER = range(5)
WARPS, THREADS = 8, 256
HOPPER, AMPERE = 227 * 1024, 163 * 1024  # bytes of shared memory that a block may have
DEVICES = {
    "H200": (132, HOPPER, (132, 66, 33, 16, 8)),
    "uneven": (132, HOPPER, (132, 64, 30, 13, 5)),  # clusters lie within groups of multiprocessors, here smaller ones
    "H100 PCIe": (114, HOPPER, (114, 57, 28, 13, 6)),
    "A100": (108, AMPERE, (0, 0, 0, 0, 0)),
    "slice": (14, HOPPER, (14, 7, 3, 1, 0)),
}
# backward, exchange, whether groups add up in clusters. `grid` has the plans of `flags`, as is tested.
MODES = [(False, exchange, False) for exchange in (DATA, FLAGS, MULTICAST, CLUSTER)]
MODES += [(True, DATA, False), (True, DATA, True), (True, FLAGS, False)]
CASES = [(device, *mode) for device in DEVICES for mode in MODES]
CASES = [case for case in CASES if case[0] != "uneven" or case[2] in (MULTICAST, CLUSTER) or case[3]]  # else an H200
H, B = (x.ravel() for x in np.meshgrid(np.arange(1, 2049), np.arange(8, 257, 8), indexing="ij"))


def ceil_div(a, b):
    return -(-a // b)


def lines(size):
    return ceil_div(size, 128) * 128


def plans(device, backward, split, exchange, clusters, hidden, batch):
    return host.lstm_plans(backward, split, exchange, clusters, *device, hidden, batch)


def named(table, **more):
    """The columns of a table of plans, by name."""
    return SimpleNamespace(**dict(zip(host.LSTM_PLAN_FIELDS, table.T, strict=True)), **more)


def plan(device, backward, hidden, batch, split=False, exchange=DATA, clusters=False):
    found = plans(DEVICES.get(device, device), backward, split, exchange, clusters, [hidden], [batch])[0]
    return SimpleNamespace(**dict(zip(host.LSTM_PLAN_FIELDS, found.tolist(), strict=True)))


@cache
def tilings(name):
    """A table of the header: split, tiles, kept, wave, columns."""
    text = (ROOT / "csrc" / "lstm_plan.h").read_text()
    body = re.search(rf"Tiling {name}\[\] = {{(.*?)\n?}};", text, re.DOTALL)[1]
    rows = re.findall(r"{(true|false), (\d+), (\d+), (\d+), (\d+)}", body)
    assert len(rows) == body.count("{")
    return [(row[0] == "true", *map(int, row[1:])) for row in rows]


def table_of(backward, split, exchange):
    """The tilings that a mode has to choose from."""
    if split and exchange in (FLAGS, GRID):
        return []
    name = "kBackward" if backward else {MULTICAST: "kMulticast", CLUSTER: "kCluster"}.get(exchange, "kForward")
    return [tiling for tiling in tilings(name) if tiling[0] == split]


# ---- Who owns what, of which only the part below H is there ---------------------------------------------------------


def is_each_once(numbers):
    return np.array_equal(np.sort(numbers, axis=None), np.arange(np.size(numbers)))


@cache
def assert_forward_owned(tiles, groups):
    """Row r of a block is gate r % 4 of its unit r / 4."""
    block, row = np.indices((groups, 16 * tiles))
    assert is_each_once((block * 4 * tiles + row // 4) * 4 + row % 4)


@cache
def assert_backward_owned(units, slices, groups):
    """Block (slice, group) has the gates of the units of its slice as columns, the units of its group as rows."""
    members = slices * units

    def unit_of(of_slice, k):
        return k // units * members + of_slice * units + k % units

    of_slice, k, gate = np.indices((slices, groups * units, 4))
    assert is_each_once(unit_of(of_slice, k) * 4 + gate)
    group, member = np.indices((groups, members))
    assert is_each_once(group * members + member)
    # What a rank publishes lies where its slice looks for it; what its group hands to it is of its own units.
    group, rank, unit = np.indices((groups, slices, units))
    own = group * members + rank * units + unit
    assert is_each_once(own) and np.array_equal(unit_of(rank, group * units + unit), own)
    assert np.array_equal(own % members // units, rank) and np.array_equal(own % members % units, unit)


@cache
def assert_portions_taken(portions, replicas, passes):
    """Replica r takes portions r, r + replicas, ..., in no more passes than it has memory for."""
    taken = [r + np.arange((portions - r + replicas - 1) // replicas) * replicas for r in range(replicas)]
    assert is_each_once(np.concatenate(taken)) and max(map(len, taken)) == passes and min(map(len, taken)) > 0


def each(*columns):
    """The different rows of some columns, of numbers below 4096."""
    keys = np.unique(sum(column << (12 * i) for i, column in enumerate(columns)))
    return zip(*((keys >> (12 * i) & 4095).tolist() for i in range(len(columns))), strict=True)


# ---- What lies in shared memory -------------------------------------------------------------------------------------


def shared_memory(p, backward, exchange):
    """Bytes: the weights beyond the registers, what threads remember and bring, operands or the inbox, sums."""
    width = np.where(p.split, 4, 2)  # words of a lane in a fragment
    slots = np.maximum(p.depth - p.kept, 0) + np.where(p.split, p.depth, 0)
    tail = 16 * THREADS * p.tiles * slots
    if backward:
        states = 4 * THREADS * (4 * p.passes + 9)
        box = lines(4 * p.slices * p.units * 8 * p.columns)
        between = np.where(p.cluster > 1, 2 * box, 0)
    else:
        pairs = ceil_div(16 * p.tiles * p.columns, THREADS)  # of units, with eight columns of a row each
        states = 4 * THREADS * pairs * (2 * p.passes + 8)
        operand = 4 * ceil_div(p.H, 16) * p.columns * 32 * width
        between = {MULTICAST: 2, CLUSTER: 2 * p.passes}.get(exchange, 0) * operand
    sums = lines(4 * WARPS * 8 * p.columns * (16 * p.tiles + 4))
    planes = np.where(p.split, 2, 1)
    stage = lines(2 * planes * 16 * p.tiles * (16 * WARPS + 16))  # one column tile a warp, on its way to the registers
    loading = np.maximum(tail, 16 * THREADS * p.tiles * np.minimum(p.kept, p.depth)) + stage
    return 128 + np.maximum(tail + states + between + p.sides * sums, loading)


# ---- Where there is a plan ------------------------------------------------------------------------------------------


def reach(device, backward, split, exchange, clusters):
    """The largest batch that any tiling of the table holds, for H = 1 to 2048; by trial of all."""
    multiprocessors, shared, counts = device
    hidden = np.arange(1, 2049)
    largest = np.zeros_like(hidden)
    for _, tiles, kept, _, columns in table_of(backward, split, exchange):
        if backward:
            ranks = [s for s in (1, 2, 4, 8, 16) if not clusters or s > 1]
            shapes = [(u, s, s if clusters else 1) for s in ranks for u in range(1, 16 * tiles // s + 1)]
            shapes = [shape for shape in shapes if shape[0] * 8 * columns <= THREADS]
        else:
            shapes = [(4 * tiles, 1, c) for c in {MULTICAST: (2, 4, 8), CLUSTER: (2, 4, 8, 16)}.get(exchange, (1,))]
        if clusters and exchange == FLAGS:
            continue
        for units, slices, cluster in shapes:
            groups = ceil_div(hidden, slices * units)
            if not backward:
                if exchange == CLUSTER:
                    groups = np.where(groups > cluster, 1 << 20, groups)
                groups = ceil_div(groups, cluster) * cluster
            replicas = multiprocessors // (groups * slices)
            if cluster > 1:
                replicas = np.minimum(replicas, counts[int(np.log2(cluster))] * cluster // (groups * slices))
            width = 4 * groups * units if backward else hidden
            p = SimpleNamespace(
                split=split, tiles=tiles, kept=kept, columns=columns, units=units, slices=slices, cluster=cluster,
                sides=1, H=hidden, depth=ceil_div(width, 16 * WARPS),
            )  # fmt: skip
            fitting = np.zeros_like(hidden)
            for more in (32, 16, 8, 4, 2, 1):
                p.passes = fitting + more
                fitting += more * (shared_memory(p, backward, exchange) <= shared)
            largest = np.maximum(largest, 8 * columns * replicas * fitting)
    return largest


@pytest.mark.parametrize("split", [False, True], ids=["half", "split"])
@pytest.mark.parametrize(("device", "backward", "exchange", "clusters"), CASES)
def test_plans(split, device, backward, exchange, clusters):
    mode = (backward, split, exchange, clusters)
    multiprocessors, shared, counts = DEVICES[device]
    table = plans(DEVICES[device], *mode, H, B)
    there = table[:, 0] > 0
    assert np.array_equal(there, reach(DEVICES[device], *mode)[H - 1] >= B), "a plan that was missed, or cannot be"
    assert not table[~there].any()
    p = named(table[there], H=H[there], B=B[there], split=split)
    if not there.any():
        return

    # A kernel of the table, with room for the tile.
    width = 4 if split else 2
    chosen = {(split, *row) for row in each(p.tiles, p.kept, p.wave, p.columns)}
    assert chosen <= set(table_of(backward, split, exchange)) and (p.wave >= p.kept).all()
    fetched = width * p.columns * (1 if exchange in (MULTICAST, CLUSTER) else p.wave)  # from shared memory one by one
    assert (4 * p.tiles * p.kept + fetched + 4 * p.tiles * p.columns < 232).all()
    assert np.array_equal(shared_memory(p, backward, exchange), p.shared) and (p.shared <= shared).all()
    assert np.isin(p.sides, (1,) if backward else (1, 2)).all()

    # Every part of the weight in one block, every row of the batch in one portion of one replica.
    assert (p.groups * p.slices * p.units >= p.H).all()
    if backward:
        assert (p.slices * p.units <= 16 * p.tiles).all() and (p.units * 8 * p.columns <= THREADS).all()
        assert (p.depth * WARPS * 16 >= 4 * p.groups * p.units).all()
        for shape in each(p.units, p.slices, p.groups):
            assert_backward_owned(*shape)
    else:
        assert (p.units == 4 * p.tiles).all() and (p.slices == 1).all()
        assert (p.depth * WARPS * 16 >= p.H).all()
        for shape in each(p.tiles, p.groups):
            assert_forward_owned(*shape)
    portions = ceil_div(p.B, 8 * p.columns)
    for shape in each(portions, p.replicas, p.passes):
        assert_portions_taken(*shape)

    # All blocks at once, in whole clusters.
    assert np.array_equal(p.blocks, p.slices * p.groups * p.replicas) and (p.blocks <= multiprocessors).all()
    assert (p.blocks % p.cluster == 0).all()
    if backward:
        assert np.array_equal(p.cluster, p.slices if clusters else np.ones_like(p.slices))
    elif exchange == CLUSTER:
        assert (p.groups <= p.cluster).all()
    elif exchange == MULTICAST:
        assert np.isin(p.cluster, (2, 4, 8)).all()
    else:
        assert (p.cluster == 1).all()
    many = p.cluster > 1
    assert (p.blocks // p.cluster <= np.array(counts)[np.log2(p.cluster).astype(int)])[many].all()

    # What the kernels count in 32 bits, over 10,000 steps: turns, words of a portion, bytes of shared memory; a barrier
    # of a cluster counts 2^20 bytes.
    operand = ceil_div(4 * p.groups * p.units if backward else p.H, 16) * p.columns * 32 * width
    assert 10_000 * p.passes.max() < 2**31 and operand.max() * 4 < 2**20 and p.shared.max() < 2**31

    # Any batch has the plan of the next multiple of 8.
    hidden = np.arange(1, 2049)
    batch = np.random.default_rng(0).integers(1, 257, hidden.size)
    at = (hidden - 1) * 32 + ceil_div(batch, 8) - 1
    assert np.array_equal(plans(DEVICES[device], *mode, hidden, batch), table[at])


def test_a_batch_enters_by_its_multiple_of_8():
    batch = np.arange(1, 257)
    tables = [tilings(name) for name in ("kForward", "kMulticast", "kCluster", "kBackward")]
    for columns in {tiling[-1] for table in tables for tiling in table}:
        assert np.array_equal(ceil_div(batch, 8 * columns), ceil_div(ceil_div(batch, 8) * 8, 8 * columns))


def test_threads_have_all_pairs():
    """Forward, thread and turn i have row id / (2 tiles) and units id % (2 tiles) * 2 of it and the next."""
    for name in ("kForward", "kMulticast", "kCluster"):
        for _, tiles, _, _, columns in tilings(name):
            items = np.arange(ceil_div(16 * tiles * columns, THREADS) * THREADS)
            row, unit = np.divmod(items[: 16 * tiles * columns], 2 * tiles)
            assert is_each_once(row * 4 * tiles + unit * 2 + np.array([[0], [1]]))
            assert row.max() == 8 * columns - 1


@pytest.mark.parametrize("backward", [False, True])
def test_grid_and_flags(backward):
    for device in DEVICES.values():
        batch = np.random.default_rng(1).integers(1, 257, 2048)
        both = [plans(device, backward, False, way, False, np.arange(1, 2049), batch) for way in (FLAGS, GRID)]
        assert np.array_equal(*both)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", ["H200", "A100"])
def test_the_layers_of_the_language_model(device, backward):
    for hidden in (1150, 400):
        for batch in (20, 40, 80):
            assert plan(device, backward, hidden, batch).nanoseconds > 0
            assert device == "A100" or not backward or plan(device, True, hidden, batch, clusters=True).nanoseconds > 0


def test_large_layers():
    """Backward, what a thread remembers of each portion takes the room of weights: past 1,792 units not every batch."""
    assert plan("H200", False, 2048, 256).nanoseconds > 0
    for clusters in (False, True):
        for hidden, batch in ((1792, 256), (1920, 200), (2048, 160)):
            assert plan("H200", True, hidden, batch, clusters=clusters).nanoseconds > 0


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_fewer_multiprocessors(backward, split):
    """Fewer blocks with more units each, as long as they hold the weights."""
    found = [plan((n, HOPPER, (n, 0, 0, 0, 0)), backward, 400, 20, split) for n in range(1, 133)]
    there = [p.nanoseconds > 0 for p in found]
    assert there == sorted(there), "a plan for fewer multiprocessors, but none for more"
    assert all(p.blocks <= n for n, p in enumerate(found, start=1))
    slowest_first = [p.nanoseconds for p in found if p.nanoseconds > 0]
    assert slowest_first == sorted(slowest_first, reverse=True)
    least, most = next(p for p in found if p.nanoseconds > 0), found[-1]
    assert least.units > most.units and least.blocks < most.blocks / 2
    if not split:
        assert there[13], "a slice of 14 holds the layer of 400"


def test_nonsense():
    device = DEVICES["H200"]
    for hidden, batch in (([0], [1]), ([1], [0]), ([1], [-8]), ([2**31], [1]), ([1, 2], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="hidden and batch"):
            plans(device, False, False, DATA, False, hidden, batch)
    for exchange in (-1, 5):
        with pytest.raises(ValueError, match="exchange"):
            plans(device, False, False, exchange, False, [1], [1])
    for wrong in ((0, HOPPER, (0,) * 5), (132, -1, (0,) * 5)):
        with pytest.raises(ValueError, match="multiprocessors"):
            plans(wrong, False, False, DATA, False, [1], [1])
    with pytest.raises(ValueError, match="cluster_counts"):
        plans((132, HOPPER, (0, 0, 0, 0, -1)), False, False, DATA, False, [1], [1])
    assert plans(device, False, False, DATA, False, [], []).shape == (0, len(host.LSTM_PLAN_FIELDS))
