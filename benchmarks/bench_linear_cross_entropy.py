"""Output layer and loss with no logits in memory, against the logits in memory; forward + backward, and evaluation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    Case,
    Contender,
    NotInstalled,
    Target,
    Work,
    compiled,
    in_double,
    optional,
    ours,
    with_gradients,
    without_gradients,
)

from fastlm.ops import linear_cross_entropy

RIVAL = "F.cross_entropy(F.linear)"


def work(device, *, N, V, D, dtype, evaluate, rivals):
    form = DTYPES[dtype]

    def inputs():
        x = torch.randn(N, D, device=device).to(form)
        w = (torch.randn(V, D, device=device) * D**-0.5).to(form)
        b = (torch.randn(V, device=device) * 0.1).to(form)
        return x, w, b, torch.randint(V, (N,), device=device), None

    def wrap(function):
        def loss(x, w, b, target, _=None):
            return function(x, w, b, target, "none" if evaluate else "mean")

        return without_gradients(loss) if evaluate else with_gradients(loss, [0, 1, 2])

    def logits(x, w, b, target, reduction):
        return F.cross_entropy(F.linear(x, w, b), target, reduction=reduction)

    def torchs(options, x, w, b, target, reduction):
        return F.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, options=options)

    def fast(impl):
        def run(x, w, b, target, reduction):
            return linear_cross_entropy(x, w, target, bias=b, reduction=reduction, impl=impl)

        return Contender(f"fastlm {impl}", wrap(run))

    plain = wrap(logits)
    result = Work(
        inputs,
        [*ours("linear_cross_entropy", device, form, fast), Contender(RIVAL, plain)],
        exact=in_double(plain),
        plain=plain,
        names=["nll"] if evaluate else ["loss", "dx", "dw", "db"],
        flops=2.0 * N * V * D * (1 if evaluate else 3),
        bytes=(N * D + V * D + V) * form.itemsize * (1 if evaluate else 2),
    )
    if "compile" in rivals:
        result.contenders.append(Contender("torch.compile of it", wrap(compiled(logits))))
    for name, chunked in (("F.linear_cross_entropy", False), ("F.linear_cross_entropy, chunked", True)):
        if "torch" in rivals:
            result.add(name, partial(_torchs, name, chunked, torchs, wrap))
    result.add("Liger", partial(_liger, device, wrap))
    result.add("Cut Cross Entropy", partial(_cut, device, wrap))
    return result


def _torchs(name, chunked, function, wrap):
    if not hasattr(F, "linear_cross_entropy"):
        raise NotInstalled("this PyTorch has none")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return Contender(name, wrap(partial(function, options)), slow=chunked)


def _liger(device, wrap):
    module = "liger_kernel.transformers.functional"
    fused = optional(module, "liger_fused_linear_cross_entropy", device, only_on="cuda")

    def run(x, w, b, target, reduction):
        return fused(x, w, target, bias=b, reduction=reduction)

    return Contender("Liger", wrap(run))


def _cut(device, wrap):
    fused = optional("cut_cross_entropy", "linear_cross_entropy", device, only_on="cuda")

    def run(x, w, b, target, reduction):
        return fused(x, w, target, bias=b, reduction=reduction)

    return Contender("Cut Cross Entropy", wrap(run))


def case(dtype, N, V, D=400, *, evaluate=False, rivals=("compile", "torch"), **options):
    way = "forward, per row" if evaluate else "forward + backward"
    make = partial(work, N=N, V=V, D=D, dtype=dtype, evaluate=evaluate, rivals=rivals)
    return Case("linear_cross_entropy", f"N={N} V={V:,} D={D} {dtype}, {way}", make, dtype, **options)


GOAL = {"cpu": (Target(RIVAL, ratio=1.0, memory=0.2),)}
NEARLY = {"cpu": (Target(RIVAL, ratio=0.95, memory=0.2),)}  # within 5 %
CASES = [
    case("fp32", 1400, 10_000, size="quick", targets=GOAL),
    case("bf16", 1400, 10_000, size="quick", targets=NEARLY, rivals=()),
    case("fp32", 1400, 10_000, size="quick", evaluate=True, rivals=("compile",)),
    case("fp32", 1400, 33_278, size="quick", targets=NEARLY, rivals=()),
    case("fp32", 280, 267_735, size="quick", targets=NEARLY, rivals=()),
    case("fp32", 1400, 267_735, targets=NEARLY),
    case("bf16", 1400, 33_278, targets=NEARLY),
    case("fp32", 2800, 33_278, targets=NEARLY),
    case("fp32", 1400, 33_278, evaluate=True),
    case("bf16", 5600, 33_278, devices=("cuda",), targets={"cuda": (Target(ms=1.1),)}),
    case("bf16", 8400, 267_735, devices=("cuda",), targets={"cuda": (Target(ms=12.0, mb=2000.0),)}),
    case("fp32", 5600, 33_278, devices=("cuda",), rivals=("torch",)),
    case("bf16", 8400, 267_735, devices=("cuda",), evaluate=True),
    case("fp32", 7, 30, 5, rivals=("torch",), size="tiny"),
    case("fp32", 7, 30, 5, evaluate=True, rivals=("torch",), size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_cross_entropy(case, measured):
    measured(case)
