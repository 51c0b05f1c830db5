"""The continuous cache over a stream in Triton: flash attention over a band, with a scalar in the place of the values.

A program takes BLOCK rows and walks the keys before them, BLOCK at a time, from the nearest outwards: what a row holds
when it passes the end of a window is that window's result, so one walk serves every window. A row keeps the maximum of
its scores and of those of its own next word, and for every theta two sums: exp(theta (score - maximum)) over the other
words against the first, over its own word against the second. So one exponential serves a pair, and a word whose
weight is nothing beside the best one keeps its logarithm.

float32 rows are multiplied as float16: x 2^s = high + low, 22 bits of x, and three of the four products.
"""

from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, hardware, launch

ROWS = 128  # of a program
MOST_THETAS, MOST_WINDOWS = 8, 8  # of one walk: 16 sums for every row; more windows compile long, and spill at 32
LOG2E = tl.constexpr(1.4426950408889634)
BEFORE = tl.constexpr(128)  # unused places before the ids and units, for the columns of a tile before all keys


def _tile(hidden) -> tuple[int, int, int, int]:
    """Keys and parts of a tile of scores, stages and columns of its loads.

    The test split of WikiText-2 (245,569 rows, window 3785, D = 400) reads (1 / 128 + 1 / keys) of 9.2e8 D numbers
    from level 2: 12 GB with 128 keys in 16 bits, 24 GB as halves, 18 and 35 GB with 64. The query does not stay on
    the chip: its halves would take 205 of the 227 KB of an H200, and with 64 rows of them the keys alone are 24 GB.
    A thread has 64 scores of 128 keys, and takes in 32 at a time: 208 to 254 registers on Hopper. Ampere would spill
    with eight thetas, and takes 172 to 255 with 64 keys. Three stages take 25 to 99 KB; two take 13 to 25 of the 64
    KB of CDNA. 32 columns pad D = 400 to 416, where 64 would to 448; 64 of halves spill on Hopper with eight thetas.
    """
    wide = hidden.dtype != torch.float32 and -hidden.size(1) % 64 * 12 <= hidden.size(1)
    backend, arch = hardware(hidden)
    if backend == "cuda" and arch == 90:
        return 128, 2, 3, 64 if wide else 32
    return (64, 2, 3, 32) if backend == "cuda" else (64, 1, 2, 32)


@triton.jit(do_not_specialize=["rows", "first"])
def _split(
    x, high, low, unit, rows: tl.int64, first: tl.int64, WIDTH: tl.int64, PITCH: tl.int64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x as float16 halves, times a power of two that takes the largest number to [2^14, 2^15), and its inverse.

    An infinity gets the least factor and comes out as NaN; so does a NaN.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    values = tl.load(x + row[:, None] * WIDTH + column, mask=inside & (column < WIDTH), other=0.0)
    exponent = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) >> 23
    field = tl.minimum(268 - exponent, 253)  # 127 + 14 - (exponent - 127), as long as the inverse is a normal number
    values *= (field << 23).to(tl.float32, bitcast=True)[:, None]
    front = values.to(tl.float16)
    at = (first + row)[:, None] * PITCH + column
    tl.store(high + at, front, mask=inside & (column < PITCH))
    tl.store(low + at, (values - front.to(tl.float32)).to(tl.float16), mask=inside & (column < PITCH))
    tl.store(unit + BEFORE + first + row, ((254 - field) << 23).to(tl.float32, bitcast=True), mask=row < rows)


@triton.jit
def _pick(values, j, COUNT: tl.constexpr):
    """values[j] for a j known at run time."""
    value = values[0]
    for u in tl.static_range(1, COUNT):
        value = tl.where(j == u, values[u], value)
    return value


@triton.jit
def _reach(windows, j, COUNT: tl.constexpr):
    """Window j, from the two floats that it comes in: Triton would compile anew for other integers in a tuple."""
    return (_pick(windows[0], j, COUNT).to(tl.int64) << 24) + _pick(windows[1], j, COUNT).to(tl.int64)


@triton.jit
def _near(distance):
    """A distance as int32; beyond 2^30 rows it does not matter how far."""
    return tl.minimum(tl.maximum(distance, -(2**30)), 2**30).to(tl.int32)


@triton.jit
def _factor(theta):
    """theta log2(e); for theta = 0 so little that every score weighs 1, but 0 where it is -inf."""
    return tl.maximum(theta * LOG2E, 2e-38)


@triton.jit
def _fallen(old, new):
    """How far a maximum was below the new one, and 0 where there was none."""
    return tl.where(old == -float("inf"), 0.0, old - new)


@triton.jit
def _finite(x):
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _add(scores, match, top, best, others, matches, thetas, count, COUNT: tl.constexpr):
    """Take in a tile of scores, -inf where a pair does not count."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    new_best = tl.maximum(best, tl.max(tl.where(match, scores, -float("inf")), 1))
    below = scores - tl.where(match, _finite(new_best)[:, None], _finite(new_top)[:, None])
    for k in range(0, count if COUNT > 1 else 1):  # unrolled, eight thetas would take ten seconds to compile
        factor = _factor(_pick(thetas, k, COUNT))
        weight = tl.exp2(below * factor)
        other = _pick(others, k, COUNT) * tl.exp2(_fallen(top, new_top) * factor)
        mass = _pick(matches, k, COUNT) * tl.exp2(_fallen(best, new_best) * factor)
        other += tl.sum(tl.where(match, 0.0, weight), 1)
        mass += tl.sum(tl.where(match, weight, 0.0), 1)
        new_others, new_matches = (), ()
        for u in tl.static_range(COUNT):
            new_others += (tl.where(k == u, other, others[u]),)
            new_matches += (tl.where(k == u, mass, matches[u]),)
        others, matches = new_others, new_matches
    return new_top, new_best, others, matches


@triton.jit
def _log_sum(theta, top, total):
    """theta top + log(total), and -inf for an empty sum; a sum of NaN stays NaN."""
    return tl.where((top == -float("inf")) & (total == 0.0), -float("inf"), theta * top + tl.log(total))


@triton.jit
def _write(log_mass, log_norm, ended, sums, thetas, rows, count, COUNT: tl.constexpr):
    top, best, others, matches = sums
    for k in range(0, count if COUNT > 1 else 1):
        theta, mass = _pick(thetas, k, COUNT), _pick(matches, k, COUNT)
        total = _pick(others, k, COUNT) + mass * tl.exp2(_fallen(best, top) * _factor(theta))
        tl.store(log_mass + k * rows, _log_sum(theta, best, mass), mask=ended)
        tl.store(log_norm + k * rows, _log_sum(theta, top, total), mask=ended)


@triton.jit(do_not_specialize=["past", "rows", "stride", "theta_count", "window_count"])
def _walk(
    high, low, unit, ids, start, log_mass, log_norm, past: tl.int64, rows: tl.int64, stride: tl.int64, theta_count,
    window_count, thetas, windows, PITCH: tl.constexpr, THETAS: tl.constexpr, WINDOWS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`stride`: of the windows in the results."""
    lane = tl.arange(0, ROWS)
    offset = tl.program_id(0).to(tl.int64) * ROWS  # of the first row
    begin = past + offset
    count = tl.minimum(rows - offset, ROWS).to(tl.int32)
    end = begin + count
    inside = lane < count
    oldest = -_near(begin)  # counted from `begin`, as all that a row has for itself: 64 bits would cost registers
    if start is not None:
        given = tl.load(start + offset + lane, mask=inside, other=0) - offset
        oldest = tl.where(inside, tl.minimum(tl.maximum(given, oldest), lane).to(tl.int32), lane)
    first = tl.maximum(lane - _near(_reach(windows, window_count - 1, WINDOWS)), oldest)
    bottom = begin + tl.min(tl.where(inside, first, ROWS), 0)
    latest = begin + tl.max(tl.where(inside, oldest, -_near(begin)), 0)  # where the last row begins to see
    own = tl.minimum(lane, count - 1)
    own_id = tl.load(ids + BEFORE + begin + own)[:, None]

    depth = tl.arange(0, DEPTH)
    key = tl.arange(0, KEYS)
    WIDTH: tl.constexpr = KEYS // PARTS
    column = tl.arange(0, WIDTH)
    top = tl.full([ROWS], -float("inf"), tl.float32)  # of all scores
    best = tl.full([ROWS], -float("inf"), tl.float32)  # of those of the row's own word
    others, matches = (), ()
    for _ in tl.static_range(THETAS):
        others += (tl.zeros([ROWS], tl.float32),)
        matches += (tl.zeros([ROWS], tl.float32),)
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    window = 0  # the nearest that not all rows have passed
    CHUNKS: tl.constexpr = PITCH // DEPTH
    for step in range(0, (end - bottom + KEYS - 1) // KEYS * CHUNKS):  # one loop, so that loads run ahead of a tile
        chunk = step % CHUNKS
        left = end - (step // CHUNKS + 1) * KEYS
        key_row = tl.minimum(tl.maximum(left + key, 0), end - 1)
        query_at = (begin + own)[:, None] * PITCH + (chunk * DEPTH + depth)
        key_at = key_row[:, None] * PITCH + (chunk * DEPTH + depth)
        query_high, key_high = tl.load(high + query_at), tl.load(high + key_at)
        if low is not None:
            scores = tl.dot(tl.load(low + query_at), key_high.T, scores)
            scores = tl.dot(query_high, tl.load(low + key_at).T, scores)
        scores = tl.dot(query_high, key_high.T, scores)
        if chunk == CHUNKS - 1:
            for part in tl.static_range(PARTS):
                tile, edge = scores, left
                if PARTS == 2:
                    tiles = tl.split(tl.permute(tl.reshape(scores, [ROWS, 2, WIDTH]), [0, 2, 1]))
                    tile, edge = tiles[1 - part], left + (1 - part) * WIDTH
                if low is not None:
                    own_unit = tl.load(unit + BEFORE + begin + own)
                    tile *= own_unit[:, None] * tl.load(unit + (BEFORE + edge) + column)[None, :]
                match = own_id == tl.load(ids + (BEFORE + edge) + column)[None, :]
                while (window + 1 < window_count) & (begin - _reach(windows, window, WINDOWS) >= edge + WIDTH):
                    window += 1
                j = window
                near = tl.where(j == 0, 0, _reach(windows, j - 1, WINDOWS))
                # the bands of the tile: mostly one, and where windows end for some row the next ones
                while (j < window_count) & ((edge <= latest) | (end - 1 - near > edge)):
                    far = _reach(windows, j, WINDOWS)
                    first = tl.maximum(lane + _near(begin - far - edge), oldest + _near(begin - edge))
                    stop = tl.maximum(lane + _near(begin - near - edge), oldest + _near(begin - edge))
                    seen = (column[None, :] >= first[:, None]) & (column[None, :] < stop[:, None])
                    seen_scores = tl.where(seen, tile, -float("inf"))
                    top, best, others, matches = _add(
                        seen_scores, match, top, best, others, matches, thetas, theta_count, THETAS
                    )
                    at = j * stride + offset + lane
                    ended = inside & (first >= 0) & (first < WIDTH)
                    sums = (top, best, others, matches)
                    _write(log_mass + at, log_norm + at, ended, sums, thetas, rows, theta_count, THETAS)
                    near = far
                    j += 1
            # zeros that the compiler does not know: it would make constants before the tile, in registers of their own
            scores = tl.zeros([ROWS, KEYS], tl.float32) + tl.where(j < 0, 1.0, 0.0)


def _joined(memory, hidden):
    return hidden.contiguous() if memory is None else torch.cat([memory, hidden])


def _packed(hidden, memory, pitch):
    """Memory and rows in one buffer of `pitch` columns: 16-bit numbers, or halves and the unit of each row."""
    if hidden.dtype != torch.float32:
        return F.pad(_joined(memory, hidden), (0, pitch - hidden.size(1))), None, None
    past = 0 if memory is None else len(memory)
    high = hidden.new_empty((past + len(hidden), pitch), dtype=torch.float16)
    low, unit = torch.empty_like(high), hidden.new_empty(BEFORE.value + len(high))
    block = triton.next_power_of_2(pitch)
    count = max(1, 4096 // block)
    for x, first in ((memory, 0), (hidden, past)):
        if x is not None:
            tensors, sizes = (x.contiguous(), high, low, unit), (len(x), first, x.size(1), pitch)
            launch(_split, cdiv(len(x), count), *tensors, *sizes, ROWS=count, BLOCK=block, num_warps=8, fp_fusion=False)
    return high, low, unit


def _padded(values):
    """The values, and the last again up to a power of two: how many there are is a constant of the kernel."""
    return tuple(values) + (values[-1],) * (triton.next_power_of_2(len(values)) - len(values))


def cache_attention(hidden, next_ids, memory, memory_ids, start, theta, window):
    rows, past = len(hidden), 0 if memory is None else len(memory)
    log_mass = hidden.new_empty((len(window), len(theta), rows), dtype=torch.float32)
    log_norm = torch.empty_like(log_mass)
    keys, parts, stages, depth = _tile(hidden)
    pitch = max(1, cdiv(hidden.size(1), depth)) * depth
    ids = next_ids.new_zeros(BEFORE.value + past + rows, dtype=torch.int32)
    ids[BEFORE.value + past :] = next_ids
    if memory is not None:
        ids[BEFORE.value : BEFORE.value + past] = memory_ids
    inputs = (*_packed(hidden, memory, pitch), ids, None if start is None else start.contiguous())
    options = dict(ROWS=ROWS, KEYS=keys, PARTS=parts, PITCH=pitch, DEPTH=depth)
    options |= dict(num_warps=8, num_stages=stages, fp_fusion=True)
    for i, j in product(range(0, len(theta), MOST_THETAS), range(0, len(window), MOST_WINDOWS)):
        thetas, reaches = theta[i : i + MOST_THETAS], window[j : j + MOST_WINDOWS]
        windows = _padded([float(x >> 24) for x in reaches]), _padded([float(x % 2**24) for x in reaches])
        tensors = (*inputs, log_mass[j:, i:], log_norm[j:, i:])
        sizes = (past, rows, len(theta) * rows, len(thetas), len(reaches))
        lists = dict(THETAS=len(_padded(thetas)), WINDOWS=len(windows[0]))
        launch(_walk, cdiv(rows, ROWS), *tensors, *sizes, _padded(thetas), windows, **lists, **options)
    return log_mass, log_norm
