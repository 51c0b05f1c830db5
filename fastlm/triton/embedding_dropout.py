"""Embedding dropout in Triton: a program multiplies a tile of rows, looked up or given, by the mask of their words.

A warp has 128 elements of a row, 16 bytes a thread (8 in 16 bits), and 2048 threads a multiprocessor 32 KB on their
way, where 22 KB hide the latency of an H200. The generator's 100 instructions serve the four elements of a thread.
"""

import torch
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, launch, philox_lane, run_length, scale, threshold

EMBEDDING = tl.constexpr(3)  # stream of the mask generator
ROWS, BLOCK = 4, 128


@triton.jit(do_not_specialize=["N", "V", "least"], do_not_specialize_on_alignment=["ids"], debug=True)
def _scale_rows(
    x, ids, out, seed, N: tl.int64, V: tl.int64, RUNS: tl.int64, least: tl.int64, factor,
    LOOKUP: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    E = RUNS * RUN  # so that the compiler knows RUN elements to be aligned
    blocks = tl.cdiv(E, BLOCK)
    n = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + n, mask=n < N, other=0).to(tl.int64)
    tl.device_assert((id >= 0) & (id < V), "embedding_dropout: ids outside the vocabulary")
    there = (n < N)[:, None] & (e < E)[None, :]
    values = tl.load(x + ((id if LOOKUP else n) * E)[:, None] + e[None, :], mask=there, other=0.0).to(tl.float32)
    keep = philox_lane(tl.load(seed), id, EMBEDDING).to(tl.int64) >= least
    mask = tl.where(keep, factor, 0.0).to(x.dtype.element_ty).to(tl.float32)[:, None]  # as rounded as x is
    tl.store(out + (n * E)[:, None] + e[None, :], (values * mask).to(out.dtype.element_ty), mask=there)


def _scaled(x, ids, count, p, seed, lookup):
    x, ids = x.contiguous(), ids.contiguous()
    width = x.shape[-1]
    out, run = x.new_empty(*ids.shape, width), run_length(width)
    launch(
        _scale_rows,
        cdiv(ids.numel(), ROWS) * cdiv(width, BLOCK),
        *(x, ids, out, seed, ids.numel(), count, width // run, threshold(p), scale(p)),
        **dict(LOOKUP=lookup, RUN=run, ROWS=ROWS, BLOCK=BLOCK, num_warps=4, fp_fusion=True),
        sanitize_overflow=False,  # else `debug`, which device_assert needs, would look at every sum of integers too
    )
    return out


def embedding_dropout_fwd(weight, ids, p, seed):
    return _scaled(weight, ids, len(weight), p, seed, True)


def embedding_dropout_bwd(grad, ids, count, p, seed, padding_idx):
    rows = _scaled(grad, ids, count, p, seed, False)
    return torch.ops.aten.embedding_dense_backward(rows, ids, count, padding_idx, False)
