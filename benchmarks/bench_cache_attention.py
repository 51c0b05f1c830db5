"""The neural cache over the test split of WikiText-2, against its authors' word-by-word form and batched PyTorch.

Rows do not depend on each other, so the check is on some rows of the very call that is timed. The competitors, which
would take minutes to hours, run on a stretch of rows with a full window, and their times are divided by its share.
"""

from functools import partial

import pytest
import torch
from cases import DTYPES, Case, Contender, Target, Work, ours

from fastlm.ops import cache_attention

POINTER, BATCHED = "pointer.py, word by word", "batched PyTorch"
VOCABULARY = 33_278


def exact_rows(hidden, ids, rows, thetas, windows, dtype):
    """log_mass and log_norm of some rows, as the formula stands, with 0 for an empty sum."""
    log_mass = torch.empty(len(windows), len(thetas), len(rows), dtype=dtype)
    log_norm = torch.empty_like(log_mass)
    for n, t in enumerate(rows):
        for j, window in enumerate(windows):
            seen = slice(max(0, t - window), t)
            scores = hidden[seen].to(dtype) @ hidden[t].to(dtype)
            scores = torch.tensor(thetas, dtype=dtype, device=scores.device)[:, None] * scores
            log_norm[j, :, n] = scores.logsumexp(1)
            log_mass[j, :, n] = scores.masked_fill(ids[seen] != ids[t], float("-inf")).logsumexp(1)
    return tuple(x.nan_to_num(neginf=0.0) for x in (log_mass, log_norm))


def pointer(hidden, ids, history, first, rows, theta, window):
    """The authors' loop for one word at a time: weights over the window, times its one-hot words, summed."""
    found = []
    for t in range(first, first + rows):
        weights = torch.softmax(theta * (hidden[t - window : t] @ hidden[t]), 0)
        words = history[t - first : t - first + window]
        found.append((weights[:, None] * words).sum(0)[ids[t]])
    return (torch.stack(found),)


def batched(hidden, ids, first, rows, thetas, windows, block):
    """A block of rows against its band of keys: one product, then a masked log sum exp for each theta and window."""
    widest, out = max(windows), []
    for start in range(first, first + rows, block):
        stop = min(start + block, first + rows)
        scores = (hidden[start:stop] @ hidden[start - widest : stop].T).float()
        behind = torch.arange(start, stop, device=ids.device)[:, None] - torch.arange(
            start - widest, stop, device=ids.device
        )
        other = ids[start:stop, None] != ids[start - widest : stop]
        results = []
        for window in windows:
            away = (behind < 1) | (behind > window)
            for theta in thetas:
                terms = (theta * scores).masked_fill(away, float("-inf"))
                results.append((terms.masked_fill(other, float("-inf")).logsumexp(1), terms.logsumexp(1)))
        out.append([torch.stack(x).reshape(len(windows), len(thetas), -1) for x in zip(*results, strict=True)])
    return tuple(torch.cat(x, -1) for x in zip(*out, strict=True))


def work(device, *, N, D, thetas, windows, dtype, stretch, words, vocabulary=VOCABULARY):
    """stretch, words: rows that the batched and the word-by-word form are measured on; no words, no such form."""
    form, widest, gpu = DTYPES[dtype], max(windows), device == "cuda"
    stretch = min(8 * stretch, N - widest) if gpu else stretch
    split = gpu and dtype == "fp32"  # each score from three products in 16 bits, which the tensor cores have
    pairs = sum(N * w - w * (w + 1) / 2 for w in windows) / len(windows)
    hidden = (0.3 * torch.randn(N, D, device=device)).to(form)
    ids = (vocabulary * torch.rand(N, device=device) ** 4).long()
    sample = sorted({1, widest // 2, widest, widest + 1, N - 1, *torch.linspace(1, N - 1, 32).long().tolist()})

    def rows_of(rows, dtype):
        return lambda hidden, ids: exact_rows(hidden, ids, rows, thetas, windows, dtype)

    def fast(impl):
        def run(hidden, ids):
            return cache_attention(hidden, ids, theta=thetas, window=windows, impl=impl)

        def check(hidden, ids):
            return tuple(x[..., sample].cpu().nan_to_num(neginf=0.0) for x in run(hidden, ids))

        return Contender(f"fastlm {impl}", run, check, slow=True)

    # The yardstick of a 16-bit case keeps float32 scores, as the operator does.
    result = Work(
        lambda: (hidden, ids),
        ours("cache_attention", device, form, fast),
        exact=rows_of(sample, torch.float64),
        plain=rows_of(sample, torch.float32),
        names=["log_mass", "log_norm"],
        flops=2.0 * (3 if split else 1) * (N * widest - widest * (widest + 1) / 2) * D,
        products="bf16" if split else dtype,
        bytes=N * (D * form.itemsize + 8 + 8 * len(thetas) * len(windows)),
    )
    stretched = list(range(widest, widest + stretch))
    block = 4096 if gpu else 256
    run = partial(batched, first=widest, rows=stretch, thetas=thetas, windows=windows, block=block)
    result.contenders.append(
        Contender(
            BATCHED,
            run,
            lambda *inputs: tuple(x.cpu().nan_to_num(neginf=0.0) for x in run(*inputs)),
            rows_of(stretched, torch.float64),
            lambda *inputs: tuple(x.cpu().nan_to_num(neginf=0.0) for x in run(*inputs)),
            share=stretch * widest / pairs if len(windows) == 1 else stretch / N,
            note=f"measured on {stretch:,} of {N:,} rows and scaled",
        )
    )
    if words:
        result.contenders.append(by_word(hidden, ids, N, words, thetas[0], widest, vocabulary, rows_of))
    return result


def by_word(hidden, ids, N, words, theta, window, vocabulary, rows_of):
    history = torch.nn.functional.one_hot(ids[: window + words], vocabulary).to(hidden.dtype)

    def exact(*inputs):
        log_mass, log_norm = rows_of(list(range(window, window + words)), torch.float64)(*inputs)
        return (torch.where(log_mass == 0, 0.0, (log_mass - log_norm).exp()).flatten(),)

    def run(hidden, ids):
        return pointer(hidden, ids, history, window, words, theta, window)

    return Contender(
        POINTER,
        run,
        lambda *inputs: (run(*inputs)[0].cpu(),),
        exact,
        run,
        share=words / N,
        note=f"measured on {words} of {N:,} rows and scaled; its one-hot history is not in its memory",
    )


def case(dtype, thetas, windows, N=245_569, D=400, *, stretch, words=0, vocabulary=VOCABULARY, **options):
    title = f"N={N:,} D={D}, {len(thetas)} theta x {len(windows)} window to {max(windows):,}, {dtype}"
    sizes = dict(N=N, D=D, thetas=thetas, windows=windows, stretch=stretch, words=words, vocabulary=vocabulary)
    return Case("cache_attention", title, partial(work, dtype=dtype, **sizes), dtype, **options)


GRID = ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [250, 500, 1000, 1500, 2000, 2500, 3000, 3785])
ONE = ([0.662], [3785])


def goal(cpu, cuda):
    return ({"cpu": (Target(ms=cpu),)} if cpu else {}) | {"cuda": (Target(ms=cuda),)}


CASES = [
    case("fp32", *ONE, stretch=2048, words=4, size="quick", targets=goal(6000.0, 2.5)),
    case("fp32", *GRID, stretch=256, size="quick", targets=goal(10_000.0, 10.0)),
    case("bf16", *ONE, stretch=2048, targets=goal(None, 2.5)),
    case("bf16", *GRID, stretch=256, targets=goal(None, 10.0)),
    case("fp16", *ONE, stretch=2048, targets=goal(None, 2.5), devices=("cuda",)),
    case("fp32", [0.3], [7], 50, 5, stretch=20, words=3, vocabulary=11, size="tiny"),
    case("fp32", [0.3, 0.5], [3, 7], 50, 5, stretch=20, vocabulary=11, size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cache_attention(case, measured):
    measured(case)
