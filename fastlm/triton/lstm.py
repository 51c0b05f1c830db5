"""The LSTM in Triton: of each step, all that is element by element in one kernel, around the vendor's product.

A step is two launches, h W^T added to the input's part in place and the pointwise kernel, which leaves the activated
gates there for the backward; its step is the pointwise kernel, which turns them into da, and da W. Both capture in a
CUDA graph. The products are PyTorch's: its setting for matrices decides on TF32, whatever the argument says. The masked
weight is made once for a pass, in the dtype of its product, so that no step reads the mask.

A program has 128 elements of one row of the batch, one a thread: at B = 20 and H = 1150 that is 180 programs, which
wait for latency and not for the 0.5 MB that a step moves within the level-2 cache.
"""

import torch
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, launch, sigmoid, tanh

BLOCK = 128
OPTIONS = dict(num_warps=4, fp_fusion=True, BLOCK=BLOCK)


@triton.jit
def _place(H, BLOCK: tl.constexpr):
    """The row of the batch of this program, its units, and which of them there are."""
    blocks = tl.cdiv(H, BLOCK)
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), j, j < H


@triton.jit(do_not_specialize=["step", "earlier"])
def _forward_step(
    gates, before, cells, y, wide, step: tl.int64, earlier: tl.int64, B: tl.int64, H: tl.int64, BLOCK: tl.constexpr
):
    b, j, inside = _place(H, BLOCK)
    at = (step * B + b) * 4 * H + j
    i = sigmoid(tl.load(gates + at, mask=inside).to(tl.float32))
    f = sigmoid(tl.load(gates + at + H, mask=inside).to(tl.float32))
    g = tanh(tl.load(gates + at + 2 * H, mask=inside).to(tl.float32))
    o = sigmoid(tl.load(gates + at + 3 * H, mask=inside).to(tl.float32))
    c = f * tl.load(before + (earlier * B + b) * H + j, mask=inside) + i * g
    h = o * tanh(c)
    tl.store(y + (step * B + b) * H + j, h.to(y.dtype.element_ty), mask=inside)
    if cells is None:
        tl.store(before + b * H + j, c, mask=inside)
    else:
        tl.store(cells + (step * B + b) * H + j, c, mask=inside)
        kind = gates.dtype.element_ty
        tl.store(gates + at, i.to(kind), mask=inside)
        tl.store(gates + at + H, f.to(kind), mask=inside)
        tl.store(gates + at + 2 * H, g.to(kind), mask=inside)
        tl.store(gates + at + 3 * H, o.to(kind), mask=inside)
    if wide is not None:  # the state of a call with 16-bit inputs may be float32
        tl.store(wide + b * H + j, h, mask=inside)


@triton.jit(do_not_specialize=["step", "earlier", "last"])
def _backward_step(
    gates,
    before,
    cells,
    dy,
    given,
    recurrent,
    dc,
    step: tl.int64,
    earlier: tl.int64,
    last: tl.int64,
    B: tl.int64,
    H: tl.int64,
    BLOCK: tl.constexpr,
):
    b, j, inside = _place(H, BLOCK)
    at, place = (step * B + b) * 4 * H + j, b * H + j
    i = tl.load(gates + at, mask=inside).to(tl.float32)
    f = tl.load(gates + at + H, mask=inside).to(tl.float32)
    g = tl.load(gates + at + 2 * H, mask=inside).to(tl.float32)
    o = tl.load(gates + at + 3 * H, mask=inside).to(tl.float32)
    squashed = tanh(tl.load(cells + step * B * H + place, mask=inside))
    # What arrives from later steps: at the last one the gradient of the state, then that of the step just done.
    dh = tl.load(given + place, mask=j < tl.where(step == last, H, 0), other=0.0)
    dh += tl.load(recurrent + place, mask=j < tl.where(step == last, 0, H), other=0.0).to(tl.float32)
    if dy is not None:
        dh += tl.load(dy + step * B * H + place, mask=inside).to(tl.float32)
    d = tl.load(dc + place, mask=inside) + dh * o * (1.0 - squashed * squashed)
    kind = gates.dtype.element_ty
    tl.store(gates + at, (d * g * i * (1.0 - i)).to(kind), mask=inside)
    c = tl.load(before + earlier * B * H + place, mask=inside)
    tl.store(gates + at + H, (d * c * f * (1.0 - f)).to(kind), mask=inside)
    tl.store(gates + at + 2 * H, (d * i * (1.0 - g * g)).to(kind), mask=inside)
    tl.store(gates + at + 3 * H, (dh * squashed * o * (1.0 - o)).to(kind), mask=inside)
    tl.store(dc + place, d * f, mask=inside)


def _masked(w_hh, dtype, seed, p):
    w = w_hh if seed is None else torch.ops.fastlm.dropconnect_fwd.triton(w_hh, p, seed)
    return w.to(dtype)


def lstm_fwd(projected, w_hh, h0, c0, seed, p, reverse, keep, tf32):
    T, (B, H) = len(projected), h0.shape
    y = projected.new_empty(T, B, H)
    cells = projected.new_empty(T if keep else 0, B, H, dtype=torch.float32)
    if y.numel() == 0:
        return (
            y,
            h0.clone(memory_format=torch.contiguous_format),
            c0.clone(memory_format=torch.contiguous_format),
            cells,
        )
    w = _masked(w_hh, projected.dtype, seed, p).t()
    h, c = h0.to(y.dtype), c0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    wide = torch.empty_like(c) if h0.dtype != y.dtype else None
    gates, outputs = projected.unbind(), y.unbind()
    before, earlier = c, 0
    for t in reversed(range(T)) if reverse else range(T):
        gates[t].addmm_(h, w)
        tensors = (projected, before, cells if keep else None, y, wide)
        launch(_forward_step, B * cdiv(H, BLOCK), *tensors, t, earlier, B, H, **OPTIONS)
        h = outputs[t]
        if keep:
            before, earlier = cells, t
    return (
        y,
        h.clone() if wide is None else wide,
        before[earlier].to(c0.dtype, copy=True) if keep else c.to(c0.dtype),
        cells,
    )


def lstm_bwd(dy, dh, dc, gates, cells, c0, w_hh, seed, p, reverse, tf32):
    T, B, H = cells.shape
    given, dc = (torch.zeros_like(c0, dtype=torch.float32) if d is None else d.float() for d in (dh, dc))
    given, dc = given.contiguous(), dc.clone(memory_format=torch.contiguous_format)
    if cells.numel() == 0:
        return given.clone(), dc
    w = _masked(w_hh, gates.dtype, seed, p)
    dy = None if dy is None else dy.contiguous()
    before = c0.to(torch.float32).contiguous()
    recurrent, da = gates.new_empty(B, H), gates.unbind()
    order = range(T) if reverse else range(T - 1, -1, -1)
    last = order[0]
    for t in order:
        earlier = t + 1 if reverse else t - 1
        inside = 0 <= earlier < T
        states = (cells if inside else before, cells, dy, given, recurrent, dc)
        steps = (t, earlier if inside else 0, last)
        launch(_backward_step, B * cdiv(H, BLOCK), gates, *states, *steps, B, H, **OPTIONS)
        torch.mm(da[t], w, out=recurrent)
    return recurrent.float(), dc
