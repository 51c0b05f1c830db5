"""The cache's distribution over all words, as generation needs it for every token, against plain PyTorch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, Contender, Work, compiled, in_double, ours, without_gradients

from fastlm.ops import cache_distribution
from fastlm.ops.cache_distribution import reference

THETA = 0.3


def work(device, *, B, W, D, V, dtype, one_hot, compile_too):
    form = DTYPES[dtype]

    def inputs():
        query, keys = (0.3 * torch.randn(*shape, device=device).to(form) for shape in ((B, D), (B, W, D)))
        return query, keys, torch.randint(V, (B, W), device=device)

    def fast(impl):
        def run(query, keys, ids):
            return cache_distribution(query, keys, ids, W, V, theta=THETA, impl=impl)

        return Contender(f"fastlm {impl}", without_gradients(run))

    def plain(query, keys, ids):
        weights = torch.softmax(THETA * torch.einsum("bd,bwd->bw", query, keys).float(), 1)
        return weights.new_zeros(B, V).scatter_add_(1, ids, weights)

    def exact(query, keys, ids):
        return (reference(query, keys, ids, torch.full((B,), W, device=device), V, THETA),)

    found = [*ours("cache_distribution", device, form, fast), Contender("plain PyTorch", without_gradients(plain))]
    if compile_too:
        found.append(Contender("torch.compile of it", without_gradients(compiled(plain))))
    result = Work(
        inputs,
        found,
        exact=in_double(exact),
        plain=without_gradients(plain),
        names=["probability"],
        bytes=B * (W * (D * form.itemsize + 8) + D * form.itemsize + 4 * V),
    )
    if one_hot:
        result.contenders.append(by_one_hot(result, device, W, V))
    return result


def by_one_hot(result, device, W, V):
    """pointer.py's form for one word. Its history of one-hot words is a part of its state, so it is not timed."""
    history: dict[int, torch.Tensor] = {}

    def run(query, keys, ids):
        if id(ids) not in history:
            history[id(ids)] = F.one_hot(ids[0], V).to(query.dtype)
        weights = torch.softmax(THETA * (keys[0] @ query[0]), 0)
        return (weights[:, None] * history[id(ids)]).sum(0)[None]

    return Contender("pointer.py, one-hot", without_gradients(run), note="its one-hot history is not in its memory")


def case(dtype, B, W, D=400, V=33_278, *, one_hot=False, compile_too=True, **options):
    make = partial(work, B=B, W=W, D=D, V=V, dtype=dtype, one_hot=one_hot, compile_too=compile_too)
    return Case("cache_distribution", f"B={B} W={W:,} D={D} V={V:,} {dtype}", make, dtype, **options)


CASES = [
    case("fp32", 1, 3785, one_hot=True, size="quick"),
    case("fp32", 16, 3785, size="quick"),
    case("fp32", 1, 500),
    case("bf16", 16, 3785),
    case("fp32", 1, 5, 3, 7, one_hot=True, compile_too=False, size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cache_distribution(case, measured):
    measured(case)
