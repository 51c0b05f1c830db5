"""ForgetMult in Triton: a program walks a block of the B H recurrences through time, AHEAD steps of loads before use.

What is in flight decides the speed: 4.8 TB/s times 0.6 us of latency is 2.9 MB, 22 KB a multiprocessor. With 8 steps
of two float32 arrays, 350 recurrences a multiprocessor are enough (46,000 on an H200); below that the loads are as
wide as they can be and the kernel waits for latency, T / 8 times forward and T / 4 back.
"""

import torch
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, launch

AHEAD_FORWARD, AHEAD_BACKWARD = tl.constexpr(8), tl.constexpr(8)
OPTIONS = dict(num_warps=4, fp_fusion=True)


def _block(count: int) -> int:
    """Recurrences of a program of 128 threads: one a thread until there are four blocks for each of 132 processors."""
    return 128 if count < 4 * 132 * 512 else 512


@triton.jit(do_not_specialize=["T"])
def _forward(f, x, h0, out, T, COUNT: tl.int64, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < COUNT
    h = tl.zeros([BLOCK], tl.float32)
    if h0 is not None:
        h = tl.load(h0 + n, mask=inside).to(tl.float32)
    for step in range(0, T, AHEAD_FORWARD):
        gates, values = (), ()
        for u in tl.static_range(AHEAD_FORWARD):
            at = n + ((T - 1 - step - u) if REVERSE else (step + u)) * COUNT
            there = n < tl.where(step + u < T, COUNT, 0)
            gates += (tl.load(f + at, mask=there, other=0.0),)
            values += (tl.load(x + at, mask=there, other=0.0),)
        for u in tl.static_range(AHEAD_FORWARD):
            at = n + ((T - 1 - step - u) if REVERSE else (step + u)) * COUNT
            h += gates[u].to(tl.float32) * (values[u].to(tl.float32) - h)
            tl.store(out + at, h.to(out.dtype.element_ty), mask=n < tl.where(step + u < T, COUNT, 0))


@triton.jit(do_not_specialize=["T"])
def _backward(grad, f, x, h0, h, df, dx, dh0, T, COUNT: tl.int64, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < COUNT
    first = tl.zeros([BLOCK], tl.float32)
    if h0 is not None:
        first = tl.load(h0 + n, mask=inside).to(tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    for back in range(0, T, AHEAD_BACKWARD):  # from the last step to the first
        totals, gates, values, states = (), (), (), ()
        for u in tl.static_range(AHEAD_BACKWARD):
            step = T - 1 - back - u
            at = n + ((T - 1 - step) if REVERSE else step) * COUNT
            there = n < tl.where(step >= 0, COUNT, 0)
            totals += (tl.load(grad + at, mask=there, other=0.0),)
            gates += (tl.load(f + at, mask=there, other=0.0),)
            values += (tl.load(x + at, mask=there, other=0.0),)
            states += (
                tl.load(h + at + (COUNT if REVERSE else -COUNT), mask=n < tl.where(step > 0, COUNT, 0), other=0.0),
            )
        for u in tl.static_range(AHEAD_BACKWARD):
            step = T - 1 - back - u
            at = n + ((T - 1 - step) if REVERSE else step) * COUNT
            there = n < tl.where(step >= 0, COUNT, 0)
            gate = gates[u].to(tl.float32)
            before = tl.where(step > 0, states[u].to(tl.float32), first)
            r += totals[u].to(tl.float32)
            tl.store(df + at, ((values[u].to(tl.float32) - before) * r).to(df.dtype.element_ty), mask=there)
            tl.store(dx + at, (gate * r).to(dx.dtype.element_ty), mask=there)
            r -= gate * r
    tl.store(dh0 + n, r.to(dh0.dtype.element_ty), mask=inside)


def forget_mult_fwd(f, x, h0, reverse):
    f, x = f.contiguous(), x.contiguous()
    h0 = None if h0 is None else h0.contiguous()
    out, count = torch.empty_like(f), f[0].numel() if len(f) else 0
    block = _block(count)
    launch(_forward, cdiv(count, block), f, x, h0, out, len(f), count, REVERSE=reverse, BLOCK=block, **OPTIONS)
    return out


def forget_mult_bwd(grad, f, x, h0, h, reverse):
    grad, f, x, h = (t.contiguous() for t in (grad, f, x, h))
    df, dx = torch.empty_like(f), torch.empty_like(x)
    dh0 = (f if h0 is None else h0).new_empty(f.shape[1:])
    h0 = None if h0 is None else h0.contiguous()
    count = dh0.numel()
    block = _block(count)
    tensors = (grad, f, x, h0, h, df, dx, dh0)
    launch(_backward, cdiv(count, block), *tensors, len(f), count, REVERSE=reverse, BLOCK=block, **OPTIONS)
    return df, dx, dh0
