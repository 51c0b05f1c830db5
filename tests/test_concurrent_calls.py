"""Operators called from several Python threads at a time give what they give one after the other."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastlm import ops
from fastlm.data import encoder

THREADS, ROUNDS = 4, 6
T, B, H = 9, 3, 70


def with_gradients(function, *tensors):
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    outputs = out if isinstance(out, tuple) else (out,)
    sum(y.float().square().sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), *(x.grad for x in tensors)]


def inputs(*shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def forget_mult(seed):
    f, x, h = inputs((T, B, H), (T, B, H), (B, H), seed=seed)
    return with_gradients(ops.forget_mult, f.sigmoid(), x, h)


def qrnn_pool(seed):
    def pool(gates, c0):
        return ops.qrnn_pool(gates, c0, zoneout=0.2, training=True, seed=torch.tensor(seed))

    return with_gradients(pool, *inputs((T, B, 3 * H), (B, H), seed=seed))


def lstm(seed):
    def layer(x, h0, c0, w_ih, w_hh):
        return ops.lstm(x, h0, c0, w_ih, w_hh, weight_dropout=0.5, seed=torch.tensor(seed))

    return with_gradients(layer, *inputs((T, B, 40), (B, H), (B, H), (4 * H, 40), (4 * H, H), seed=seed))


def dropconnect(seed):
    return with_gradients(lambda w: ops.dropconnect(w, 0.5, torch.tensor(seed)), *inputs((301, H), seed=seed))


def linear_cross_entropy(seed):
    target = torch.arange(50) * (seed + 1) % 333
    shapes = (50, H), (333, H)
    return with_gradients(lambda x, w: ops.linear_cross_entropy(x, w, target), *inputs(*shapes, seed=seed))


def cache_attention(seed):
    ids = torch.arange(150) * (seed + 1) % 17
    return ops.cache_attention(*inputs((150, H), seed=seed), ids, theta=[0.1, 0.5], window=[10, 100])


def encode_text(seed):
    words = random.Random(seed).choices([f"word{i}" for i in range(5000)], k=20_000)
    text = " ".join(words).encode()
    host = encoder.native()
    found, ids = host.encode_words(text, 3) if host else encoder.encode_text(text, "word")
    return [torch.tensor([len(found)]), torch.from_numpy(ids)]


CALLS = [forget_mult, qrnn_pool, lstm, dropconnect, linear_cross_entropy, cache_attention, encode_text]


def run(jobs, threads):
    # a pool even for one: a Python thread may have another number of OpenMP threads than the main one
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda job: job[0](job[1]), jobs))


@pytest.mark.parametrize("calls", [*([call] for call in CALLS), CALLS], ids=[*(c.__name__ for c in CALLS), "all"])
def test_results_are_those_of_one_call_after_the_other(calls):
    jobs = [(call, seed) for seed in range(ROUNDS) for call in calls]
    for alone, together in zip(run(jobs, 1), run(jobs, THREADS), strict=True):
        assert len(alone) == len(together)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
