"""The CUDA kernels of the continuous cache on a CPU, against float64: every form, and that each wait is needed."""

import emulated
import pytest
import torch
from emulated import read, write
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_attention import assert_accurate, stream

from fastlm import testing
from fastlm.ops import cache_attention

PAD = 256  # ids and powers begin and end at a multiple: kPad
ROOM, H200 = 1 << 20, 227 * 1024  # bytes of shared memory: more than any query takes, and a block's
SMALL, WIDE, SHIPPED, ONE_SLOT = range(4)  # tiles of tests/emulator/cache_attention.cpp


def up(x, unit):
    return -(-x // unit) * unit


def split(unit, x, pitch, **options):
    """Rows of halves and the power of two of each, as the kernel makes them from float32."""
    packed, powers = torch.empty(len(x), pitch, dtype=torch.uint8), torch.empty(len(x))
    sizes = (len(x), x.shape[1])
    found = unit.run(
        "cache_attention_split", read("rows", x), *sizes, write("packed", packed), pitch, write("powers", powers), 2,
        **options,
    )  # fmt: skip
    return found["packed"], found["powers"]


def emulate(hidden, next_ids, theta, window, memory=None, start=None, tile=SMALL, limit=ROOM, **options):
    """What the host function of csrc/cache_attention.cu does, with the kernels under the emulator."""
    unit = emulated.load("cache_attention")
    (rows, width), past = hidden.shape, 0 if memory is None else len(memory[0])
    joined = hidden if memory is None else torch.cat([memory[0], hidden])
    ids = torch.zeros(up(past, PAD) + up(rows, PAD), dtype=torch.int32)
    first = up(past, PAD) - past
    ids[first : first + past + rows] = next_ids if memory is None else torch.cat([memory[1], next_ids])
    powers, units = None, up(width, 16) // 16
    if hidden.dtype == torch.float32:
        units *= 2
        packed, some = split(unit, joined, 32 * units, **options)
        powers = torch.zeros(len(ids))
        powers[first : first + past + rows] = some
    elif past == 0 and width % 8 == 0:
        packed = hidden
    else:
        packed = torch.nn.functional.pad(joined, (0, up(width, 16) - width))
    pitch = packed.shape[1] * packed.element_size()
    results = [write(name, torch.empty(len(window), len(theta), rows)) for name in ("log_mass", "log_norm")]
    factors, reaches = torch.tensor(theta, dtype=torch.float32), torch.tensor(window, dtype=torch.int32)
    found = unit.run(
        "cache_attention_walk", emulated.DTYPES[hidden.dtype], tile, limit, read("rows", packed), pitch, pitch, units,
        read("ids", ids), None if powers is None else read("powers", powers), up(past, PAD), read("start", start), past,
        rows, *results, read("theta", factors), len(theta), read("window", reaches), len(window), **options,
    )  # fmt: skip
    return found["log_mass"], found["log_norm"]


def check(hidden, next_ids, memory=None, **options):
    call = {name: options[name] for name in ("theta", "window", "start") if name in options}
    exact_memory = memory and (memory[0].double(), memory[1])
    exact = cache_attention(hidden.double(), next_ids, memory=exact_memory, impl="reference", **call)
    plain = cache_attention(hidden, next_ids, memory=memory, impl="reference", **call)
    assert_accurate(emulate(hidden, next_ids, memory=memory, **options), plain, exact)


# rows, rows of memory, width, words, thetas, windows, tile, bytes of shared memory
SHAPES = [
    (1, 0, 5, 3, [0.5], [3], SMALL, ROOM),
    (5, 40, 0, 2, [0.0, 1.0], [2, 50], SMALL, ROOM),
    (19, 0, 8, 3, [0.7], [1], SMALL, ROOM),
    (33, 10, 20, 4, [0.0, 40.0], [1, 2, 7, 16, 17, 30], SMALL, ROOM),
    (21, 37, 49, 3, [0.3], [5, 95], SMALL, 9000),  # a part of the query is copied again for each tile
    (70, 12, 33, 5, [0.1, 0.662], [9, 2**30], WIDE, ROOM),
    (20, 30, 65, 2, [0.2], [31, 32, 33], WIDE, 32_000),
]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bounded", [False, True])
def test_values(dtype, shape, bounded):
    rows, past, width, words, thetas, windows, tile, limit = shape
    hidden, next_ids = stream(rows, width, words, dtype)
    memory = stream(past, width, words, dtype) if past else None
    start = torch.randint(-past - 5, rows + 5, (rows,)) if bounded else None
    check(hidden, next_ids, memory, theta=thetas, window=windows, start=start, tile=tile, limit=limit)


@settings(max_examples=2000 if emulated.THOROUGH else 30, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(0, 60), st.integers(0, 50)),
    st.lists(st.integers(1, 120), min_size=1, max_size=5, unique=True),
    st.booleans(),
    st.sampled_from(testing.DTYPES),
    st.sampled_from([(SMALL, 6000), (SMALL, ROOM), (WIDE, 24_000), (WIDE, ROOM)]),
)
def test_any_shape(shape, windows, bounded, dtype, tile):
    rows, past, width = shape
    torch.manual_seed(sum(shape))
    hidden, next_ids = stream(rows, width, 5, dtype)
    memory = stream(past, width, 5, dtype)
    start = torch.randint(-past - 3, rows + 3, (rows,)) if bounded else None
    call = dict(theta=[0.2, 0.9], window=sorted(windows), start=start)
    found = emulate(hidden, next_ids, memory=memory, tile=tile[0], limit=tile[1], schedules=1, **call)
    exact_memory = (memory[0].double(), memory[1])
    exact = cache_attention(hidden.double(), next_ids, memory=exact_memory, impl="reference", **call)
    for name, a, e in zip(("log_mass", "log_norm"), found, exact, strict=True):
        assert torch.equal(a.isinf(), e.isinf()), f"{name}: -inf in other places"
        scale = 0.9 * 0.7**2 * max(1, width)  # a lone score may be nearly zero
        testing.assert_close(name, a[e.isfinite()], e[e.isfinite()], scale=scale)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_the_tiles_of_a_gpu(dtype):
    hidden, next_ids = stream(300, 50, 5, dtype)
    memory, start = stream(150, 50, 5, dtype), torch.randint(-160, 300, (300,))
    check(
        hidden, next_ids, memory, theta=[0.5], window=[3, 90, 200], start=start, tile=SHIPPED, limit=H200, schedules=2
    )


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_float32_of_any_size(size):
    hidden, next_ids = stream(20, 33, 5)
    hidden *= size * 10.0 ** torch.linspace(-3, 3, 33)  # beyond float16 within a row, too
    check(hidden, next_ids, theta=[1e-6 / size / size, 1e-5 / size / size], window=[9, 40])


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_rows(dtype, value):
    hidden, next_ids = stream(24, 6, 2, dtype)
    hidden[8, 3] = value
    log_mass, log_norm = emulate(hidden, next_ids, [0.0, 1.0], [3, 6], schedules=2)
    assert log_norm[..., 8].isnan().all()
    assert value == float("inf") or log_norm[1, :, 9:15].isnan().all()  # an infinity may be a score of -inf, or NaN
    assert log_norm[0, :, 12:].isfinite().all() and log_norm[:, :, 1:8].isfinite().all()


def test_powers_are_exact_and_halves_are_not_too_large():
    x = torch.cat([torch.randn(3, 40) * s for s in (0.0, 1e-38, 1.0, 1e38)])
    packed, powers = split(emulated.load("cache_attention"), x, 3 * 64)
    units = packed.view(torch.float16).view(len(x), 3, 2, 16).double()
    assert (powers.frexp()[0] == 0.5).all() and units.abs().max() <= 2.0**15
    found = units.sum(2).flatten(1)[:, :40] * powers[:, None].double()
    error = (found - x.double()).abs().amax(1)
    assert (error <= x.double().abs().amax(1) * 2.0**-21).all()
    assert units[..., 8:].reshape(len(x), 3, 2, 8)[:, 2].abs().max() == 0  # beyond the width


def test_every_wait_is_needed():
    hidden, next_ids = stream(40, 40, 3)

    def call():
        check(hidden, next_ids, theta=[0.1, 0.5], window=[20, 30], tile=WIDE, limit=24_000)

    emulated.assert_all_reported(emulated.load("cache_attention"), call)


def test_a_ring_needs_a_slot_more_than_stages_under_way():
    hidden, next_ids = stream(20, 40, 3)
    with pytest.raises(emulated.Fault, match="race"):
        emulate(hidden, next_ids, [0.5], [20], tile=ONE_SLOT)
