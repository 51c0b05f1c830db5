"""Locked dropout in Triton: a program multiplies STEPS steps of 512 elements of [B, H] by the mask it drew for them.

All STEPS loads of 16 bytes a thread (8 in 16 bits) are on their way together, 64 KB a multiprocessor at 4 programs,
where 22 KB hide the latency of an H200; the generator's 100 instructions serve 32 elements.
"""

import torch
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, launch, philox_keep, run_length, scale, threshold

LOCKED = tl.constexpr(2)  # stream of the mask generator
STEPS, BLOCK = 8, 512


@triton.jit(do_not_specialize=["T", "OFFSET", "least"])
def _forward(
    x, out, seed, T, RUNS: tl.int64, OFFSET: tl.int64, least: tl.int64, factor,
    RUN: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = RUNS * RUN  # so that the compiler knows RUN elements to be aligned
    blocks = tl.cdiv(count, BLOCK)
    first, step = tl.program_id(0) % blocks * BLOCK, tl.program_id(0) // blocks * STEPS
    n, t = first + tl.arange(0, BLOCK), step + tl.arange(0, STEPS)
    at, there = (t * count)[:, None] + n[None, :], (t < T)[:, None] & (n < count)[None, :]
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    keep = philox_keep(tl.load(seed), OFFSET * LANES + first, least, LOCKED, BLOCK, LANES)
    mask = tl.where(keep, factor, 0.0)
    mask = mask.to(x.dtype.element_ty).to(tl.float32)[None, :]  # as rounded as x is
    tl.store(out + at, (values * mask).to(out.dtype.element_ty), mask=there)


def locked_dropout_fwd(x, p, seed, offset):
    x = x.contiguous()
    out, count = torch.empty_like(x), x.shape[1] * x.shape[2]
    run, lanes = run_length(count), run_length(offset)
    steps = STEPS if lanes == 4 else STEPS // 2  # one element a block of the generator takes more registers
    launch(
        _forward,
        cdiv(count, BLOCK) * cdiv(len(x), steps),
        *(x, out, seed, len(x), count // run, offset // lanes, threshold(p), scale(p)),
        **dict(RUN=run, LANES=lanes, STEPS=steps, BLOCK=BLOCK, num_warps=4, fp_fusion=True),
    )
    return out
