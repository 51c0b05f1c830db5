"""QRNN pooling in Triton: a warp walks neighbouring channels of a batch row through time, EVERY steps at a time.

The loads of a chunk come before their use, and all that is no recurrence is done to tiles [channels, EVERY]; a tile
is split into its steps, in registers, for the recurrence alone. A thread has as many channels as a block of the mask
generator serves, if the row's length allows: 4, backward 2, for "ifo" 1, because more would not stay in registers with
what is recomputed. A warp a program leaves few lanes idle at the end of a row (1150 channels are 18 programs of 64)
and no processor idle (20 rows of them are 360 programs).

What is in flight decides the speed: 4.8 TB/s times 0.6 us of latency is 2.9 MB. 8 steps of three float32 gates are 96
bytes a channel, enough from 30,000 channels on; backward, with a gradient, 128 bytes, enough from 23,000 on.
"""

import torch
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, hardware, launch, philox_keep, run_length, sigmoid, tanh, threshold

EVERY = tl.constexpr(8)  # steps of a chunk, from one kept state to the next; fastlm/ops/qrnn_pool.py has the same
ZONEOUT = tl.constexpr(1)  # stream of the mask generator
SIZES = ["T", "B", "RUNS", "ROW", "origin", "stride", "least"]  # none is worth a compilation
GATES = {"f": 2, "fo": 3, "ifo": 4}


@triton.jit
def _split(x):
    """The columns of a tile [N, EVERY]."""
    a, b = tl.split(x.reshape(x.shape[0], 4, 2))
    a0, a1 = tl.split(a.reshape(x.shape[0], 2, 2))
    b0, b1 = tl.split(b.reshape(x.shape[0], 2, 2))
    x0, x4 = tl.split(a0)
    x2, x6 = tl.split(a1)
    x1, x5 = tl.split(b0)
    x3, x7 = tl.split(b1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _join(x):
    """The tile [N, EVERY] of some columns."""
    a0, a1, b0, b1 = tl.join(x[0], x[4]), tl.join(x[2], x[6]), tl.join(x[1], x[5]), tl.join(x[3], x[7])
    a, b = tl.join(a0, a1).reshape(a0.shape[0], 4), tl.join(b0, b1).reshape(a0.shape[0], 4)
    return tl.join(a, b).reshape(a0.shape[0], EVERY)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    gates, c0, seed, h, c_n, kept, T, B: tl.int64, RUNS: tl.int64, ROW: tl.int64, origin: tl.int64, stride: tl.int64,
    least: tl.int64, scale, GATES: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    H, row_length = RUNS * RUN, ROW * RUN  # all rows, of h and of gates, are known to be aligned to RUN
    b, first = tl.program_id(0) // tl.cdiv(H, BLOCK), tl.program_id(0) % tl.cdiv(H, BLOCK) * BLOCK
    j = first + tl.arange(0, BLOCK)
    c = tl.zeros([BLOCK], tl.float32)
    if c0 is not None:
        c = tl.load(c0 + b * H + j, mask=j < H, other=0.0).to(tl.float32)
    for step in range(0, T, EVERY):
        t = step + tl.arange(0, EVERY)
        row, there = origin + b + t * stride, (j < H)[:, None] & (t < T)[None, :]
        at = gates + (row * row_length)[None, :] + j[:, None]
        z = tl.load(at, mask=there, other=0.0)
        f = tl.load(at + H, mask=there, other=float("-inf"))  # after the last step nothing is written to c
        if GATES > 2:
            o = tl.load(at + 2 * H, mask=there, other=0.0)
        if GATES > 3:
            i = tl.load(at + 3 * H, mask=there, other=float("-inf"))
        if kept is not None:
            tl.store(kept + (step // EVERY * B + b) * H + j, c, mask=j < H)
        z, f = tanh(z.to(tl.float32)), sigmoid(f.to(tl.float32))
        if scale is not None:
            f *= scale
        if seed is not None:
            keep = philox_keep(tl.load(seed), (row * H + first)[:, None], least, ZONEOUT, BLOCK, RUN)
            f = tl.where(tl.trans(keep), f, 0.0)
        if GATES > 3:
            z *= sigmoid(i.to(tl.float32))
        values, writes, states = _split(z), _split(f), ()
        for u in tl.static_range(EVERY):
            c += values[u] - writes[u] * c if GATES > 3 else writes[u] * (values[u] - c)
            states += (c,)
        out = _join(states)
        if GATES > 2:
            out *= sigmoid(o.to(tl.float32))
        tl.store(h + (row * H)[None, :] + j[:, None], out.to(h.dtype.element_ty), mask=there)
    tl.store(c_n + b * H + j, c.to(c_n.dtype.element_ty), mask=j < H)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    dh, dc_n, gates, kept, seed, dgates, dc0, T, B: tl.int64, RUNS: tl.int64, ROW: tl.int64, origin: tl.int64,
    stride: tl.int64, least: tl.int64, scale, GATES: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    H, row_length = RUNS * RUN, ROW * RUN
    b, first = tl.program_id(0) // tl.cdiv(H, BLOCK), tl.program_id(0) % tl.cdiv(H, BLOCK) * BLOCK
    j = first + tl.arange(0, BLOCK)
    r = tl.zeros([BLOCK], tl.float32)
    if dc_n is not None:
        r = tl.load(dc_n + b * H + j, mask=j < H, other=0.0).to(tl.float32)
    for back in range(0, T, EVERY):  # from the last kept state to the first
        step = (T - 1) // EVERY * EVERY - back
        t = step + tl.arange(0, EVERY)
        row, there = origin + b + t * stride, (j < H)[:, None] & (t < T)[None, :]
        at = (row * row_length)[None, :] + j[:, None]
        z = tl.load(gates + at, mask=there, other=0.0)
        f = tl.load(gates + at + H, mask=there, other=float("-inf"))
        if GATES > 2:
            o = tl.load(gates + at + 2 * H, mask=there, other=0.0)
        if GATES > 3:
            i = tl.load(gates + at + 3 * H, mask=there, other=float("-inf"))
        total = tl.zeros([BLOCK, EVERY], tl.float32)
        if dh is not None:
            total = tl.load(dh + (row * H)[None, :] + j[:, None], mask=there, other=0.0).to(tl.float32)
        c = tl.load(kept + (step // EVERY * B + b) * H + j, mask=j < H, other=0.0)
        z, f = tanh(z.to(tl.float32)), sigmoid(f.to(tl.float32))
        if seed is not None:  # 0 for a masked gate is right in all that follows
            keep = philox_keep(tl.load(seed), (row * H + first)[:, None], least, ZONEOUT, BLOCK, RUN)
            f = tl.where(tl.trans(keep), f, 0.0)
        write = f
        if scale is not None:
            write *= scale
        if GATES > 3:
            i = sigmoid(i.to(tl.float32))
        values, writes, before, after = _split(z * i if GATES > 3 else z), _split(write), (), ()
        for u in tl.static_range(EVERY):
            before += (c,)
            c += values[u] - writes[u] * c if GATES > 3 else writes[u] * (values[u] - c)
            after += (c,)
        if GATES > 2:
            o = sigmoid(o.to(tl.float32))
            do = total * _join(after) * o * (1.0 - o)
            tl.store(dgates + at + 2 * H, do.to(dgates.dtype.element_ty), mask=there)
            total *= o
        totals, sums = _split(total), ()
        for u in tl.static_range(EVERY - 1, -1, -1):
            r += totals[u]
            sums = (r,) + sums
            r -= writes[u] * r
        total = _join(sums)
        df = total * ((0.0 if GATES > 3 else z) - _join(before)) * write * (1.0 - f)
        tl.store(dgates + at + H, df.to(dgates.dtype.element_ty), mask=there)
        dz = total * (i if GATES > 3 else write) * (1.0 - z * z)
        tl.store(dgates + at, dz.to(dgates.dtype.element_ty), mask=there)
        if GATES > 3:
            di = total * z * i * (1.0 - i)
            tl.store(dgates + at + 3 * H, di.to(dgates.dtype.element_ty), mask=there)
    tl.store(dc0 + b * H + j, r, mask=j < H)


def _plan(gates, seed, pooling, zoneout, reverse, lanes):
    """Programs, sizes and constants of a launch, with at most `lanes` channels a thread."""
    steps, batch, width = gates.shape
    hidden = width // GATES[pooling]
    run = min(run_length(hidden), lanes)
    rows = ((steps - 1) * batch, -batch) if reverse else (0, batch)  # of the first step, and from one to the next
    factors = threshold(zoneout), 1.0 - zoneout if seed is None and zoneout > 0.0 else None
    constants = dict(GATES=GATES[pooling], RUN=run, BLOCK=32 * run, num_warps=1, fp_fusion=True)
    if hardware(gates)[0] == "cuda":  # else ptxas rounds down to 128 or 168 registers, with 8 bytes on the stack
        constants["maxnreg"] = 255
    return batch * cdiv(hidden, 32 * run), (steps, batch, hidden // run, width // run, *rows, *factors), constants


def qrnn_pool_fwd(gates, c0, seed, pooling, zoneout, reverse, keep):
    gates, c0 = gates.contiguous(), None if c0 is None else c0.contiguous()
    steps, batch, width = gates.shape
    hidden = width // GATES[pooling]
    h, c_n = gates.new_empty(steps, batch, hidden), (gates if c0 is None else c0).new_empty(batch, hidden)
    kept = gates.new_empty(cdiv(steps, EVERY.value) if keep else 0, batch, hidden, dtype=torch.float32)
    programs, sizes, constants = _plan(gates, seed, pooling, zoneout, reverse, lanes=4)
    launch(_forward, programs, gates, c0, seed, h, c_n, kept if keep else None, *sizes, **constants)
    return h, c_n, kept


def qrnn_pool_bwd(dh, dc_n, gates, kept, seed, pooling, zoneout, reverse):
    dh, dc_n, gates, kept = (None if t is None else t.contiguous() for t in (dh, dc_n, gates, kept))
    dgates, dc0 = torch.empty_like(gates), kept.new_empty(kept.shape[1:])
    lanes = 1 if pooling == "ifo" else 2
    programs, sizes, constants = _plan(gates, seed, pooling, zoneout, reverse, lanes)
    launch(_backward, programs, dh, dc_n, gates, kept, seed, dgates, dc0, *sizes, **constants)
    return dgates, dc0
