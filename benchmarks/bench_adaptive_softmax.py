"""The adaptive softmax against PyTorch's, which has projections, and against the full softmax; forward and backward.

Each has a loss of its own, so each is checked against itself in float64. Tails have the shares of the targets for which
their products are as large as each other: so awd-lstm-lm's cutoffs were chosen, by its own account.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, Contender, Target, Work, in_double, ours, with_gradients

from fastlm.ops import adaptive_softmax, linear_cross_entropy

RIVAL = "nn.AdaptiveLogSoftmaxWithLoss"
FULL = "linear_cross_entropy, full softmax"


def work(device, *, N, V, D, cutoffs, shares, dtype):
    form, edges, tails = DTYPES[dtype], torch.tensor([0, *cutoffs, V]), len(cutoffs)

    def inputs():
        x = torch.randn(N, D, device=device).to(form)
        w, t = ((torch.randn(rows, D, device=device) * D**-0.5).to(form) for rows in (V, tails))
        b, s = ((torch.randn(rows, device=device) * 0.1).to(form) for rows in (V, tails))
        cluster = torch.multinomial(torch.tensor([1 - sum(shares), *shares]), N, replacement=True)
        first, end = edges[cluster], edges[cluster + 1]
        target = first + (torch.rand(N) * (end - first)).long()  # on the host, as from a loader
        return x, w, b, t, s, target, None

    wrap = partial(with_gradients, wanted=range(5))

    def fast(impl):
        def run(x, w, b, t, s, target):
            return adaptive_softmax(x, w, target, t, cutoffs=cutoffs, bias=b, tail_bias=s, impl=impl)

        return Contender(f"fastlm {impl}", wrap(run))

    plain = wrap(partial(composed, edges.tolist()))
    full = with_gradients(lambda x, w, b, t, s, target: F.cross_entropy(F.linear(x, w, b), target.to(device)), range(3))
    kernel = with_gradients(
        lambda x, w, b, t, s, target: linear_cross_entropy(x, w, target.to(device), bias=b), range(3)
    )
    return Work(
        inputs,
        [
            *ours("adaptive_softmax", device, form, fast),
            _torchs(
                torch.nn.AdaptiveLogSoftmaxWithLoss(D, V, list(cutoffs), div_value=1.0, head_bias=True), device, form
            ),
            Contender(FULL, kernel, exact=in_double(full), plain=full),
        ],
        exact=in_double(plain),
        plain=plain,
        names=["loss", "dx", "dw", "db", "dt", "ds"],
        bytes=2 * (N * D + V * D + V) * form.itemsize,
    )


def composed(edges, x, w, b, t, s, target):
    """The same loss as a user of PyTorch writes it, with a branch of the host for each tail."""
    first, target = edges[1], target.to(x.device)
    scores = F.linear(x, torch.cat([w[:first], t]), torch.cat([b[:first], s]))
    wanted, total = target.clone(), 0.0
    for k, (start, end) in enumerate(zip(edges[1:-1], edges[2:], strict=True)):
        rows = ((target >= start) & (target < end)).nonzero()[:, 0]
        wanted[rows] = first + k
        total = total + F.cross_entropy(
            F.linear(x[rows], w[start:end], b[start:end]), target[rows] - start, reduction="sum"
        )
    return (total + F.cross_entropy(scores, wanted, reduction="sum")) / len(target)


def _torchs(module, device, form):
    module = module.to(device, form)

    def run(module, *inputs):
        leaf, target = inputs[0].to(module.head.weight.dtype).detach().requires_grad_(), inputs[5].to(device)
        loss = module(leaf, target).loss
        return loss.detach(), *torch.autograd.grad(loss, [leaf, *module.parameters()], materialize_grads=True)

    def exact(*inputs):
        return run(copy.deepcopy(module).double(), *inputs)

    itself = partial(run, module)
    note = (
        "not the same model: a projection for each tail, biases in the head alone; its parameters are apart, and so "
        "are their gradients, where ours is one of the weight that an embedding shares"
    )
    return Contender(RIVAL, itself, exact=exact, plain=itself, note=note)


def case(dtype, N, V, cutoffs, shares, D=400, **options):
    make = partial(work, N=N, V=V, D=D, cutoffs=cutoffs, shares=shares, dtype=dtype)
    title = f"N={N} V={V:,} D={D} cutoffs={cutoffs} {dtype}, forward + backward"
    return Case("adaptive_softmax", title, make, dtype, **options)


WIKITEXT_103 = 267_735, (2800, 20_000, 76_000), (0.16, 0.05, 0.015)
WIKITEXT_2 = 33_278, (2000, 10_000), (0.2, 0.06)
NO_SLOWER = Target(RIVAL, ratio=1.0)
CASES = [
    case("fp32", 280, *WIKITEXT_103, size="quick", targets={"cpu": (NO_SLOWER, Target(FULL, ratio=2.0))}),
    case("fp32", 1400, *WIKITEXT_2, size="quick", targets={"cpu": (NO_SLOWER,)}),
    case("bf16", 1400, *WIKITEXT_103),
    case("bf16", 8400, *WIKITEXT_103, devices=("cuda",), targets={"cuda": (Target(ms=1.5),)}),
    case("fp32", 8400, *WIKITEXT_103, devices=("cuda",)),
    case("fp32", 20, 30, (8, 20), (0.3, 0.2), D=5, size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adaptive_softmax(case, measured):
    measured(case)
