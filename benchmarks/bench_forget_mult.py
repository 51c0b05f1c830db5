"""The QRNN's recurrence alone, against torchqrnn's loop over time."""

from functools import partial

import pytest
import torch
from cases import (
    DTYPES,
    Case,
    Contender,
    Target,
    Work,
    in_double,
    optional,
    ours,
    with_gradients,
    without_gradients,
)

from fastlm.ops import forget_mult
from fastlm.ops.forget_mult import reference

RIVAL = "op by op"


def op_by_op(f, x):
    """A product for all steps, then three operators a step."""
    h, states = None, []
    for new, write in zip((f * x).unbind(0), f.unbind(0), strict=True):
        h = new if h is None else new + (1 - write) * h
        states.append(h)
    return torch.stack(states)


def work(device, *, T, B, H, dtype, backward):
    form = DTYPES[dtype]
    wrap = partial(with_gradients, wanted=[0, 1]) if backward else (lambda f: without_gradients(lambda *a: f(*a[:2])))

    def inputs():
        f, x, grad = (torch.randn(T, B, H, device=device) for _ in range(3))
        return f.sigmoid().to(form), x.to(form), grad.to(form)

    def fast(impl):
        return Contender(f"fastlm {impl}", wrap(lambda f, x: forget_mult(f, x, impl=impl)))

    plain = wrap(op_by_op)
    result = Work(
        inputs,
        [*ours("forget_mult", device, form, fast), Contender(RIVAL, plain)],
        exact=in_double(wrap(reference)),
        plain=plain,
        names=["h", "df", "dx"][: 1 + 2 * backward],
        # f and x in, h out; backward f, x, h and dh in, df and dx out
        bytes=T * B * H * form.itemsize * (3 + 6 * backward),
    )
    result.add("flash-linear-attention", lambda: hgrn(device, wrap))
    return result


def hgrn(device, wrap):
    """flash-linear-attention's HGRN: h_t = exp(g_t) h_{t-1} + x_t with the logarithm of the gate, batch first."""
    fused = optional("fla.ops.hgrn", "fused_recurrent_hgrn", device, only_on="cuda")

    def run(f, x):
        h, _ = fused((f * x).transpose(0, 1).contiguous(), torch.log1p(-f).transpose(0, 1).contiguous())
        return h.transpose(0, 1)

    return Contender("flash-linear-attention", wrap(run))


def case(dtype, backward, T=140, B=60, H=2500, **options):
    way = "forward + backward" if backward else "forward"
    make = partial(work, T=T, B=B, H=H, dtype=dtype, backward=backward)
    return Case("forget_mult", f"({T},{B},{H}) {dtype}, {way}", make, dtype, **options)


GOAL = {"cpu": (Target(share=0.8),), "cuda": (Target(share=0.8),)}
CASES = [
    case("fp32", False, size="quick", targets=GOAL),
    case("fp32", True, size="quick", targets=GOAL),
    case("bf16", False),
    case("bf16", True),
    case("fp32", True, 3, 2, 5, size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forget_mult(case, measured):
    measured(case)
