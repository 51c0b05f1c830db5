"""DropConnect in Triton: a thread has the four elements of a block of the mask generator, 512 a program.

16 bytes a thread (8 in 16 bits) are on their way at a time, and 2048 threads a multiprocessor hide the latency of more
than that: an H200 wants 22 KB in flight on each. The generator's 100 instructions serve four elements.
"""

import torch
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, launch, philox_keep, run_length, scale, threshold

WEIGHT = tl.constexpr(0)  # stream of the mask generator
BLOCK = 512
OPTIONS = dict(BLOCK=BLOCK, num_warps=4, fp_fusion=True)


@triton.jit(do_not_specialize=["least"])
def _forward(weight, out, seed, RUNS: tl.int64, least: tl.int64, factor, RUN: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    inside = e < RUNS * RUN  # so that the compiler knows RUN elements to be aligned
    w = tl.load(weight + e, mask=inside, other=0.0).to(tl.float32)
    keep = philox_keep(tl.load(seed), first, least, WEIGHT, BLOCK, 4)
    tl.store(out + e, tl.where(keep, w * factor, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["least"])
def _mask(out, seed, RUNS: tl.int64, least: tl.int64, STREAM: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    tl.store(out + e, philox_keep(tl.load(seed), first, least, STREAM, BLOCK, 4), mask=e < RUNS * RUN)


def dropconnect_fwd(weight, p, seed):
    weight = weight.contiguous()
    out, count, run = torch.empty_like(weight), weight.numel(), run_length(weight.numel())
    sizes = count // run, threshold(p), scale(p)
    launch(_forward, cdiv(count, BLOCK), weight, out, seed, *sizes, RUN=run, **OPTIONS)
    return out


def dropconnect_mask(seed, count, p, stream):
    out, run = seed.new_empty((count,), dtype=torch.bool), run_length(count)
    launch(_mask, cdiv(count, BLOCK), out, seed, count // run, threshold(p), STREAM=stream, RUN=run, **OPTIONS)
    return out
