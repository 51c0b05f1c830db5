"""The emulator itself: right kernels pass, and each class of fault is reported by name, with block, thread and line."""

import re

import emulated
import pytest
import torch
from emulated import Fault, read, update, write

from fastlm import testing

ENUM = re.search(r"enum Fault \{(.*?)\}", (emulated.EMULATOR / "toys.cpp").read_text(), re.DOTALL)[1]
FAULTS = re.findall(r"\bk(\w+),", ENUM)
THREADS, BLOCKS, STEPS = 64, 3, 4
WHERE = r".* block \d+ thread \d+.* toys\.cpp:\d+"


@pytest.fixture(scope="module")
def unit():
    return emulated.load("toys")


def block_sum(unit, fault="None"):
    x = torch.randn(BLOCKS, THREADS)
    out = unit.run("toy_block_sum", read("x", x), write("out", x), BLOCKS, STEPS, FAULTS.index(fault))["out"]
    exact = x.double().sum(1, keepdim=True) * (STEPS * (STEPS + 1) // 2)
    testing.assert_close("sum", out, exact.expand(BLOCKS, THREADS), scale=100.0)


def warps(unit, fault="None"):
    x = torch.randn(THREADS)
    out = unit.run("toy_warps", read("x", x), write("out", x), THREADS, FAULTS.index(fault))["out"]
    rows = x.double().view(-1, 32)
    testing.assert_close("sum", out.view(-1, 32), rows.sum(1, keepdim=True) + rows.flip(1))


def named(unit, fault="None"):
    x = torch.randn(STEPS, 32)
    out = unit.run("toy_named", read("x", x), write("out", x[:2]), STEPS, FAULTS.index(fault))["out"]
    testing.assert_close("sum", out, x.double().sum(0).expand(2, 32))


def pipeline(unit):
    rows, inside = 5, 3  # rows from the third on are copied as zeros
    x = torch.randn(rows, THREADS, 4)
    out = unit.run("toy_pipeline", read("x", x[:inside]), write("out", x[0, :, 0]), rows, inside)["out"]
    testing.assert_close("sum", out.roll(1), x[:inside].double().sum((0, 2)))


def shared_sums(blocks):
    total = torch.zeros(blocks, dtype=torch.float64)
    for epoch in range(1, STEPS + 1):
        total = total + ((epoch * torch.arange(1, blocks + 1) + total) * 0.125).sum()
    return total[:, None].expand(blocks, THREADS)


def exchange(unit, fault="None", blocks=BLOCKS):
    shares, flags = torch.empty(2, blocks, THREADS), torch.zeros(blocks, dtype=torch.int32)
    arrays = write("shares", shares), update("flags", flags), write("out", shares[0])
    out = unit.run("toy_exchange", *arrays, blocks, STEPS, FAULTS.index(fault))["out"]
    testing.assert_close("total", out, shared_sums(blocks))


def tagged(unit):
    words = torch.zeros(2, BLOCKS, THREADS, 2, dtype=torch.int32)
    out = write("out", torch.empty(BLOCKS, THREADS))
    out = unit.run("toy_tagged", update("shares", words), out, BLOCKS, STEPS)["out"]
    testing.assert_close("total", out, shared_sums(BLOCKS))


def peers(unit, fault="None"):
    ranks, steps = torch.arange(4).double(), 3
    total, first = ranks, None
    for step in range(steps):
        first = total[0] + ranks if step % 2 == 0 else first  # what rank 0 has put into the first of the two buffers
        total = total * 0.5 + total.sum() + 4 * ranks
    out = write("out", torch.empty(8, THREADS))
    out = unit.run("toy_peers", out, steps, FAULTS.index(fault))["out"]
    testing.assert_close("total", out, (total + first.roll(-1)).repeat(2)[:, None].expand(8, THREADS))


def multicast(unit, fault="None"):
    steps, width = 5, 2 * THREADS
    arrays = write("rows", torch.empty(steps, width)), write("out", torch.empty(2, THREADS))
    out = unit.run("toy_multicast", *arrays, steps, FAULTS.index(fault))["out"]
    exact = sum(range(1, steps + 1)) * sum(range(width))
    testing.assert_close("total", out, torch.full((2, THREADS), exact).double())


# What a kernel must not be without: "call: what is reported", for each call site in the order of the source. A read
# that comes too early is a race, or one of what nobody has written yet.
UNORDERED = "(race|uninitialised): "
MUTATIONS = {
    block_sum: ["sync_block: unordered", "sync_block: unordered"],
    warps: ["sync_warp: unordered"],
    named: ["sync_named: unordered", "sync_named: hang", "sync_named: unordered", "sync_named: hang"],
    pipeline: [
        "side: unordered",
        "copy_async_commit: unordered",
        "copy_async_wait: unordered",
        "sync_block: unordered",
        "sync_block: unordered",
    ],
    exchange: [
        "side: unordered",
        "sync_block: unordered",
        "store_release: unordered",
        "load_acquire: unordered",
        "sync_block: unordered",
    ],
    tagged: ["side: hang", "load_relaxed_x2: hang"],
    peers: [
        "cluster_sync: a cluster peer that may not have begun",
        "side: unordered",
        "cluster_arrive: cluster_wait without cluster_arrive",
        "cluster_wait: unordered",
        "cluster_sync: exit of a cluster peer",
    ],
    multicast: [
        "fence_async: missing fence_async",
        "fence_mbarrier_init: missing fence_mbarrier_init",
        "cluster_sync: an mbarrier that nobody made",
        "mbarrier_wait: unordered",
        "mbarrier_expect: hang",
        "mbarrier_wait: unordered",
        "mbarrier_arrive: hang",
        "cluster_sync: exit of a cluster peer",
    ],
}


@pytest.mark.parametrize("kernel", MUTATIONS, ids=lambda kernel: kernel.__name__)
def test_what_is_taken_away_is_reported(unit, kernel):
    reports = emulated.assert_all_reported(unit, lambda: kernel(unit))

    def line(site):
        return [int(number) for number in site.rsplit(":", 2)[1:]]

    found = [f"{site.split()[0]}: {reports[site]}" for site in sorted(reports, key=line)]
    assert len(found) == len(MUTATIONS[kernel]), found
    for report, expected in zip(found, MUTATIONS[kernel], strict=True):
        assert re.match(expected.replace("unordered", UNORDERED), report), found


@pytest.mark.parametrize(
    ("kernel", "fault", "report"),
    [
        (block_sum, "Outside", f"out of bounds: x, byte 768 of 768, read by{WHERE}"),
        (block_sum, "OutsideShared", f"out of bounds: shared memory of block ., byte .* written by{WHERE}"),
        (block_sum, "Misaligned", f"misaligned: 8 bytes by{WHERE}"),
        (block_sum, "Divergence", f"divergence:{WHERE}, other lanes of its warp in sync_block at toys"),
        (block_sum, "EarlyExit", f"exit of a thread that others wait for:{WHERE}"),
        (block_sum, "Uninitialised", f"uninitialised: shared memory of block ., byte 28 of 256, read by{WHERE}"),
        (block_sum, "WritesInput", f"an input is written: x{WHERE}"),
        (block_sum, "RaceAcrossBlocks", f"race: out, byte 0 of 768, written by{WHERE}, written by{WHERE}"),
        (warps, "NoOrder", f"{UNORDERED}shared memory of block 0, byte .*, read by{WHERE}"),
        (named, "Deadlock", "hang: .*block 0 thread 0 and 31 more in sync_named at toys.cpp"),
        (exchange, "NobodySets", "hang: .*block 0 thread 1 and 2 more in load_acquire at toys.cpp"),
        (exchange, "PlainPoll", "race: flags.* written by.* toys.cpp"),
        (peers, "EarlyExit", "exit of a thread that others wait for: .*, awaited in the cluster's barrier"),
        (peers, "OutsidePeer", f"out of bounds: shared memory of block ., byte 2048 of 2048, written by{WHERE}"),
        (multicast, "TooFewBytes", "wrong byte count: an mbarrier of block . got 16 bytes more than it was to expect"),
        (multicast, "TooManyBytes", "hang: .*mbarrier_wait.*; an mbarrier of block . lacks 0 arrivals and 16 bytes"),
    ],
    ids=lambda value: value if value in FAULTS else "",
)
def test_faults_are_reported_by_name(unit, kernel, fault, report):
    with pytest.raises(AssertionError, match=report):
        kernel(unit, fault)


def test_blocks_that_wait_for_blocks_need_a_cooperative_launch(unit):
    with pytest.raises(Fault, match="hang: .* that have not begun"):
        exchange(unit, "TooFewBlocks", blocks=20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_fragments(unit, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = write("d", torch.empty(16, 8))
    d = unit.run("toy_product", read("a", a), read("b", b), d, int(dtype == torch.bfloat16))["d"]
    testing.assert_close("product", d, a.double() @ b.double())


def test_atomics(unit):
    words, out = torch.zeros(4, dtype=torch.int32), torch.empty(BLOCKS * THREADS, dtype=torch.int32)
    got = unit.run("toy_atomics", update("words", words), write("out", out), BLOCKS)
    assert got["words"].tolist() == [BLOCKS * THREADS, BLOCKS * THREADS - 1, -1, 5]
    assert got["out"].eq(1).all()


def test_a_result_that_depends_on_the_schedule(unit):
    with pytest.raises(Fault, match="results that depend on the schedule: out"):
        unit.run("toy_tickets", update("words", torch.zeros(1, dtype=torch.int32)), write("out", torch.zeros(5)), 5)


def test_a_harmless_removal_has_a_reason(unit):
    with pytest.raises(AssertionError, match="removed without a report:\n.*sync_block .*toys.cpp"):
        emulated.assert_all_reported(unit, lambda: unit.run("toy_needless", write("out", torch.zeros(THREADS))))
    out = write("out", torch.zeros(THREADS))
    reason = {"needless": "nothing is shared"}
    emulated.assert_all_reported(unit, lambda: unit.run("toy_needless", out), reason)
    assert unit.run("toy_needless", out)["out"].eq(2).all()
    with pytest.raises(AssertionError, match="is said to be harmless, but: "):
        emulated.assert_all_reported(unit, lambda: warps(unit), {"sync_warp": "it looks superfluous"})
    with pytest.raises(AssertionError, match="no such site"):
        emulated.assert_all_reported(unit, lambda: unit.run("toy_needless", out), reason | {"fence": "not here"})


ESCAPES = {
    "out[0] = rounded(x)": "rounded",
    "out[0] = __float2half(widened(out[1]))": "widened",
    "memcpy(out, out + 64, n)": "memcpy",
}


@pytest.mark.parametrize("statement", ESCAPES, ids=ESCAPES.values())
def test_no_access_escapes_the_race_check(unit, tmp_path, statement):
    source = tmp_path / "escape.cpp"
    source.write_text(
        "#include <cuda_fp16.h>\n"
        "__attribute__((noinline)) __half rounded(float x) { return __float2half(x); }\n"
        "__attribute__((noinline)) float widened(__half x) { return __half2float(x); }\n"
        f"void kernel(__half* out, float x, int n) {{ {statement}; }}\n"
        "void fine(__half* out, float x) { const __half y = rounded(x); out[0] = y; }\n"
    )
    with pytest.raises(AssertionError, match=rf"escape the race check:\n.*escape.cpp:4: .*{ESCAPES[statement]}.*\Z"):
        emulated.compile_unit(source, tmp_path / "escape.o")
