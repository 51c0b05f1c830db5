"""Linear cross entropy in Triton: logits become their gradient in place, and a loss whose logits never reach memory.

Gradient. A row up to 16384 words stays in registers: one read, one write. A longer one is read twice, so few rows are
in flight: 16 warps of 40 registers are three programs a multiprocessor, 400 rows of 66 KB at 33,278 words in bfloat16,
and the second read comes mostly from the 50 MB of an H200's L2. A thread keeps a maximum and a sum of its own over 16
bytes at a time: 9 exponentials for 8 logits, where one at a time would take 16.

Loss. A program holds a tile of the input on the chip and walks words. Both tiles from L2 at every step would be 154 KB
for the 6.6 MFLOP of 128 rows and 64 words at D = 400, at 5.5 TB/s 234 TFLOP/s; the words alone are 51 KB. What fits of
that on an A100 (163 KB) and an H200 (227 KB) is D up to 432 in 16 bits; wider rows, float32 and GPUs with less shared
memory take both tiles in steps.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, hardware, launch

PAD = tl.constexpr(16)  # a row of logits has room for a multiple of so many: loads are of 16 bytes, masks too
LOWEST = tl.constexpr(-3.0e38)  # below all logits and finite: a difference of two is no NaN
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
SHORT = 16384  # words of a row that stays in registers
LANES = 1024  # runs of 16 bytes of a longer row that are read at a time
HELD_WIDTH = 432  # of an input whose tile stays on the chip


# Targets and scales start anywhere: at a word of a text, at a row of a chunk.
@triton.jit(do_not_specialize=["N", "scale_stride", "ignored"], do_not_specialize_on_alignment=["target", "scale"])
def _short_rows(
    logits, bias, target, scale, loss,
    N: tl.int64, V: tl.int32, PADS: tl.int32, scale_stride: tl.int64, ignored: tl.int64, smoothing, share,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    there, room, word = row < N, at < PADS * PAD, at < V
    y = tl.load(target + row, mask=there, other=0)
    kept = y != ignored
    place = logits + (row[:, None] * PADS * PAD + at[None, :])
    z = tl.load(place, mask=there[:, None] & room[None, :], other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + at, mask=room, other=0.0).to(tl.float32)[None, :]
    z = tl.where(word[None, :], z, float("-inf"))
    hit = at[None, :] == y.to(tl.int32)[:, None]
    top = tl.max(z, 1)
    p = tl.exp(z - top[:, None])
    total = tl.sum(p, 1)
    at_target = tl.sum(tl.where(hit, z, 0.0), 1)
    value = tl.log(total) + (top - at_target)
    if SMOOTH:
        value += smoothing * at_target - share * tl.sum(tl.where(word[None, :], z, 0.0), 1)
    tl.store(loss + row, tl.where(kept, value, 0.0), mask=there)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if scale is not None:
        factor = tl.load(scale + row * scale_stride, mask=there, other=0.0)
    p *= tl.div_rn(1.0, total)[:, None]
    gradient = (tl.where(hit, p - (1.0 - smoothing), p) - share) * factor[:, None]
    gradient = tl.where(kept[:, None], gradient, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=there[:, None] & room[None, :])


@triton.jit(do_not_specialize=["scale_stride", "ignored"], do_not_specialize_on_alignment=["target", "scale"])
def _long_row(
    logits, bias, target, scale, loss,
    V: tl.int32, PADS: tl.int32, scale_stride: tl.int64, ignored: tl.int64, smoothing, share,
    SMOOTH: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * PADS * PAD
    y = tl.load(target + row)
    kept = y != ignored
    y = y.to(tl.int32)
    known = (y >= 0) & (y < V)
    at_target = tl.load(logits + y, mask=known, other=0.0).to(tl.float32)
    if bias is not None:
        at_target += tl.load(bias + y, mask=known, other=0.0).to(tl.float32)
    lane = tl.arange(0, LANES)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tops = tl.full([LANES], LOWEST, tl.float32)
    totals, sums = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for first in range(0, V, LANES * RUN):
        at = first + lane
        z = tl.load(logits + at, mask=at < PADS * PAD, other=0.0).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + at, mask=at < PADS * PAD, other=0.0).to(tl.float32)
        if SMOOTH:
            sums += tl.sum(tl.where(at < V, z, 0.0), 1)
        z = tl.where(at < V, z, float("-inf"))
        highest = tl.maximum(tops, tl.max(z, 1))
        totals = totals * tl.exp(tops - highest) + tl.sum(tl.exp(z - highest[:, None]), 1)
        tops = highest
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    value = tl.log(total) + (top - at_target)
    if SMOOTH:
        value += smoothing * at_target - share * tl.sum(sums, 0)
    tl.store(loss + row, tl.where(kept, value, 0.0))

    factor = 1.0
    if scale is not None:
        factor = tl.load(scale + row * scale_stride)
    inverse = tl.div_rn(1.0, total)
    for first in range(0, V, LANES * RUN):
        at = first + lane
        z = tl.load(logits + at, mask=at < PADS * PAD, other=0.0).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + at, mask=at < PADS * PAD, other=0.0).to(tl.float32)
        p = tl.exp(z - top) * inverse
        gradient = (tl.where(at == y, p - (1.0 - smoothing), p) - share) * factor
        gradient = tl.where(kept, gradient, 0.0)
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < PADS * PAD)


def linear_cross_entropy_gradient_(logits, bias, target, scale, ignore_index, label_smoothing):
    (rows, classes), room = logits.shape, logits.stride(0)
    if room % PAD.value:  # not from the loop over chunks
        space = logits.new_empty(rows, cdiv(classes, PAD.value) * PAD.value)[:, :classes].copy_(logits)
        loss = linear_cross_entropy_gradient_(space, bias, target, scale, ignore_index, label_smoothing)
        logits.copy_(space)
        return loss
    loss = logits.new_empty(rows, dtype=torch.float32)
    if bias is not None and classes < room:
        bias = F.pad(bias, (0, room - classes))
    tensors = (logits, bias, target.contiguous(), scale, loss)
    sizes = (classes, room // PAD.value, 0 if scale is None else scale.stride(0), ignore_index)
    smooth = (label_smoothing, label_smoothing / classes)
    options = dict(SMOOTH=label_smoothing != 0.0, fp_fusion=True)
    if classes <= SHORT:
        block = max(16, triton.next_power_of_2(room))
        tile = dict(ROWS=max(1, 4096 // block), BLOCK=block, num_warps=min(16, max(4, block // 1024)))
        launch(_short_rows, cdiv(rows, tile["ROWS"]), *tensors, rows, *sizes, *smooth, **tile, **options)
    else:
        tile = dict(LANES=LANES, RUN=16 // logits.element_size(), num_warps=16)
        launch(_long_row, rows, *tensors, *sizes, *smooth, **tile, **options)
    return loss


@triton.jit(do_not_specialize=["N", "TILES"], do_not_specialize_on_alignment=["target"])
def _partial(
    x, w, bias, target, tops, totals, sums, at_target,
    N: tl.int64, V: tl.int32, TILES: tl.int32, COUNT: tl.int32, D: tl.constexpr, HELD: tl.constexpr,
    SMOOTH: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0) % TILES, tl.program_id(0) // TILES  # neighbours read the same words
    corner, low = tile.to(tl.int64) * ROWS, tl.arange(0, ROWS)
    row = corner + low
    there = row < N
    x += corner * D
    near = tl.minimum(low, (N - corner).to(tl.int32) - 1)  # instead of a mask: what is read twice is not stored
    y = tl.load(target + row, mask=there, other=-1).to(tl.int32)
    begin = split * COUNT * WORDS
    end = tl.minimum(begin + COUNT * WORDS, V)
    words = w + begin.to(tl.int64) * D

    FULL: tl.constexpr = (D + 15) // 16 * 16  # as a sum of powers of two: no width is padded to the next one
    held = ()
    if HELD:
        for i in tl.static_range(5):
            if FULL & (256 >> i):
                at = FULL // (512 >> i) * (512 >> i) + tl.arange(0, 256 >> i)
                held += (tl.load(x + (near[:, None] * D + at[None, :]), mask=(at < D)[None, :], other=0.0),)
            else:
                held += (0,)

    top, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    found, whole = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(begin, end, WORDS):
        word = first + tl.arange(0, WORDS)
        inside = word < V
        next_word = tl.minimum(tl.arange(0, WORDS), V - 1 - first)
        z = tl.zeros([ROWS, WORDS], tl.float32)
        if HELD:
            for i in tl.static_range(5):
                if FULL & (256 >> i):
                    at = FULL // (512 >> i) * (512 >> i) + tl.arange(0, 256 >> i)
                    b = tl.load(words + (next_word[None, :] * D + at[:, None]), mask=(at < D)[:, None], other=0.0)
                    z = tl.dot(held[i], b, z, input_precision=PRECISION)
        else:
            for k in range(0, D, WIDTH):
                at = k + tl.arange(0, WIDTH)
                a = tl.load(x + (near[:, None] * D + at[None, :]), mask=(at < D)[None, :], other=0.0)
                b = tl.load(words + (next_word[None, :] * D + at[:, None]), mask=(at < D)[:, None], other=0.0)
                z = tl.dot(a, b, z, input_precision=PRECISION)
        if bias is not None:
            z += tl.load(bias + word, mask=inside, other=0.0).to(tl.float32)[None, :]
        z *= LOG2E
        found += tl.sum(tl.where(word[None, :] == y[:, None], z, 0.0), 1)
        if SMOOTH:
            whole += tl.sum(tl.where(inside[None, :], z, 0.0), 1)
        z = tl.where(inside[None, :], z, float("-inf"))
        highest = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp2(top - highest) + tl.sum(tl.exp2(z - highest[:, None]), 1)
        top = highest
        words += WORDS * D
    place = split * N + row
    tl.store(tops + place, top, mask=there)
    tl.store(totals + place, total, mask=there)
    if SMOOTH:
        tl.store(sums + place, whole, mask=there)
    tl.store(at_target + row, found, mask=there & (y >= begin) & (y < end))


@triton.jit(do_not_specialize=["N", "ignored"], do_not_specialize_on_alignment=["target"])
def _combine(
    tops, totals, sums, at_target, target, loss, N: tl.int64, SPLITS: tl.int32, ignored: tl.int64, smoothing, share,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, BLOCK)
    there = row < N
    place = split[:, None] * N + row[None, :]
    mask = (split < SPLITS)[:, None] & there[None, :]
    highest = tl.load(tops + place, mask=mask, other=LOWEST)
    top = tl.max(highest, 0)
    total = tl.sum(tl.load(totals + place, mask=mask, other=1.0) * tl.exp2(highest - top[None, :]), 0)
    y = tl.load(target + row, mask=there, other=0)
    found = tl.load(at_target + row, mask=there, other=0.0)
    value = tl.log(total) + (top - found) * LN2
    if SMOOTH:
        whole = tl.sum(tl.load(sums + place, mask=mask, other=0.0), 0)
        value += (smoothing * found - share * whole) * LN2
    tl.store(loss + row, tl.where(y != ignored, value, 0.0), mask=there)


def _precision(backend: str) -> str:
    """Of products of float32: TF32 where PyTorch's own are, else in three parts, which keep 22 bits."""
    if backend == "hip":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def linear_cross_entropy_loss(input, weight, bias, target, ignore_index, label_smoothing):
    (rows, width), classes = input.shape, len(weight)
    tensors = [t if t is None else t.contiguous() for t in (input, weight, bias, target)]
    backend, arch = hardware(input)
    narrow, aligned = input.element_size() == 2, width * input.element_size() % 16 == 0
    held = narrow and width <= HELD_WIDTH and backend == "cuda" and arch in (80, 90)
    tall, words = 128, 64 if aligned else 32  # unaligned rows take more addresses, of fewer bytes each
    count = max(8, cdiv(classes, 128 * words))  # of tiles of words in a program: a split has 512 words at least
    splits, tiles = cdiv(classes, count * words), cdiv(rows, tall)
    smooth = label_smoothing != 0.0
    loss, at_target = (input.new_empty(rows, dtype=torch.float32) for _ in range(2))
    parts = [input.new_empty((splits, rows), dtype=torch.float32) for _ in range(3 if smooth else 2)]
    parts = parts if smooth else [*parts, None]  # tops, totals, sums
    launch(
        _partial, tiles * splits, *tensors, *parts, at_target, rows, classes, tiles, count, D=width,
        HELD=held, SMOOTH=smooth, PRECISION=_precision(backend), ROWS=tall, WORDS=words,
        WIDTH=64 if narrow and aligned else 16, num_warps=8, num_stages=2 if held else 3, fp_fusion=True,
    )  # fmt: skip
    launch(
        _combine, cdiv(rows, 32), *parts, at_target, tensors[3], loss, rows, splits, ignore_index,
        label_smoothing, label_smoothing / classes, SMOOTH=smooth, ROWS=32, BLOCK=triton.next_power_of_2(splits),
        num_warps=4, fp_fusion=True,
    )  # fmt: skip
    return loss
