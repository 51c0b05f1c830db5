"""The distribution of the continuous cache in Triton: scores, softmax and scatter, and the sums as float32.

The scores take the time: a program reads RUN keys, 25 KB for D = 400 in float32, so that one stream with a window of
3785 gives 237 programs, two for a multiprocessor. Each leaves the maximum and the sum of its run; the scatter joins
them, and adds weights to the words as integers, in any order the same.
"""

import torch
import triton
import triton.language as tl

from fastlm.triton.common import cdiv, launch

RUN = tl.constexpr(16)
DEPTH = 512  # columns of a tile, all of D for the usual models: 64 registers a thread in flight
SCATTER, RUNS, WORDS = 128, 512, 1024  # entries, runs and words that a program takes at a time
OPTIONS = dict(num_warps=4, fp_fusion=True)
ONE = tl.constexpr(2.0**60)  # a probability of 1 as an integer
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weight(score, top, theta):
    """exp(theta (score - top)); neither a difference of finite scores nor theta = 0 makes a NaN."""
    return tl.exp2((0.5 * score - 0.5 * top) * (theta * (2.0 * LOG2E)))


@triton.jit(do_not_specialize=["runs", "W"])
def _scores(
    query, keys, ids, count, scores, tops, totals, wrong, theta, runs: tl.int64, W: tl.int64, D: tl.int64, V: tl.int64,
    DEPTH: tl.constexpr,
):  # fmt: skip
    b, run = tl.program_id(0).to(tl.int64) // runs, tl.program_id(0).to(tl.int64) % runs
    entry, column = run * RUN + tl.arange(0, RUN), tl.arange(0, DEPTH)
    given = tl.load(count + b).to(tl.int64)
    valid = entry < tl.minimum(given, W)
    score = tl.zeros([RUN], tl.float32)
    for first in range(0, D, DEPTH):
        inside = first + column < D
        at = (b * W + entry)[:, None] * D + (first + column)
        key = tl.load(keys + at, mask=valid[:, None] & inside, other=0.0).to(tl.float32)
        score += tl.sum(key * tl.load(query + b * D + first + column, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(scores + b * W + entry, score, mask=valid)
    top = tl.max(tl.where(valid, score, -float("inf")), 0)
    weight = _weight(score, top, theta) + (score - score)  # NaN for a score that is NaN or infinite
    tl.store(tops + tl.program_id(0), top)
    tl.store(totals + tl.program_id(0), tl.sum(tl.where(valid, weight, 0.0), 0))
    word = tl.load(ids + b * W + entry, mask=valid, other=0).to(tl.int64)
    tl.store(wrong + tl.zeros_like(entry), 1, mask=valid & ((word < 0) | (word >= V)))
    tl.store(wrong + 1, 1, mask=(given < 0) | (given > W))


@triton.jit(do_not_specialize=["runs", "W"])
def _scatter(
    ids, count, scores, tops, totals, norms, sums, theta, runs: tl.int64, W: tl.int64, V: tl.int64,
    ENTRIES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(W, ENTRIES)
    b, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    entry, run = block * ENTRIES + tl.arange(0, ENTRIES), tl.arange(0, RUNS)
    best = tl.full([RUNS], -float("inf"), tl.float32)
    for first in range(0, runs, RUNS):
        best = tl.maximum(best, tl.load(tops + b * runs + first + run, mask=first + run < runs, other=-float("inf")))
    top = tl.max(best, 0)
    norm = tl.zeros([RUNS], tl.float32)
    for first in range(0, runs, RUNS):
        inside = first + run < runs
        total = tl.load(totals + b * runs + first + run, mask=inside, other=0.0)
        share = _weight(tl.load(tops + b * runs + first + run, mask=inside, other=0.0), top, theta)
        norm += tl.where(total == 0.0, 0.0, total * share)
    norm = tl.sum(norm, 0)
    tl.store(norms + b, norm, mask=block == 0)
    valid = entry < tl.minimum(tl.load(count + b).to(tl.int64), tl.where(norm == norm, W, 0))
    weight = _weight(tl.load(scores + b * W + entry, mask=valid, other=0.0), top, theta) / norm
    word = tl.load(ids + b * W + entry, mask=valid, other=0).to(tl.int64)
    known = valid & (word >= 0) & (word < V)
    tl.atomic_add(sums + b * V + word, (tl.where(known, weight, 0.0) * ONE).to(tl.int64), mask=known, sem="relaxed")


@triton.jit
def _finish(norms, sums, out, V: tl.int64, WORDS: tl.constexpr):
    blocks = tl.cdiv(V, WORDS)
    b, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    word = block * WORDS + tl.arange(0, WORDS)
    norm = tl.load(norms + b)
    probability = tl.load(sums + b * V + word, mask=word < V, other=0).to(tl.float32) * (1.0 / ONE)
    tl.store(out + b * V + word, tl.where(norm == norm, probability, norm), mask=word < V)


def cache_distribution(query, keys, ids, count, vocab_size, theta):
    query, keys, ids, count = (x.contiguous() for x in (query, keys, ids, count))
    B, W, D = keys.shape
    out = query.new_empty((B, vocab_size), dtype=torch.float32)
    runs = max(1, cdiv(W, RUN.value))  # one for an empty window too, to look at the count
    scores, tops, totals = (query.new_empty(shape, dtype=torch.float32) for shape in ((B, W), (B, runs), (B, runs)))
    norms = query.new_zeros(B, dtype=torch.float32)
    wrong, sums = torch.zeros(2 + B * vocab_size, dtype=torch.int64, device=query.device).split([2, B * vocab_size])
    sizes = (W, D, vocab_size)
    depth = min(DEPTH, max(16, triton.next_power_of_2(D)))
    launch(_scores, B * runs, query, keys, ids, count, scores, tops, totals, wrong, theta, runs, *sizes, DEPTH=depth,
           **OPTIONS)  # fmt: skip
    torch._assert_async(wrong[0] == 0, "cache_distribution: ids outside the vocabulary")
    torch._assert_async(wrong[1] == 0, "cache_distribution: count outside [0, W]")
    tensors, sizes = (ids, count, scores, tops, totals, norms, sums), (theta, runs, W, vocab_size)
    launch(_scatter, B * cdiv(W, SCATTER), *tensors, *sizes, ENTRIES=SCATTER, RUNS=RUNS, **OPTIONS)
    launch(_finish, B * cdiv(vocab_size, WORDS), norms, sums, out, vocab_size, WORDS=WORDS, **OPTIONS)
    return out
