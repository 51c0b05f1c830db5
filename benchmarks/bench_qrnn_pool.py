"""All of a QRNN layer after its matrix product, against the operators that torchqrnn runs one by one."""

from functools import partial

import pytest
import torch
from cases import DTYPES, Case, Contender, Target, Work, compiled, in_double, ours, with_gradients, without_gradients

from fastlm.ops import qrnn_pool
from fastlm.ops.qrnn_pool import reference

RIVAL = "op by op"


def op_by_op(gates):
    """torchqrnn without its CUDA kernel: chunk, activate, a Python loop over time, output gate."""
    z, f, o = gates.chunk(3, dim=-1)
    z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
    c, states = None, []
    for new, keep in zip((f * z).unbind(0), (1 - f).unbind(0), strict=True):
        c = new if c is None else new + keep * c
        states.append(c)
    return o * torch.stack(states)


def work(device, *, T, B, H, dtype, backward, compile_too=()):
    """compile_too: the devices where the loop is timed compiled, which takes a minute to make on a GPU."""
    form = DTYPES[dtype]
    wrap = partial(with_gradients, wanted=[0]) if backward else (lambda f: without_gradients(lambda gates, _: f(gates)))

    def inputs():
        return torch.randn(T, B, 3 * H, device=device).to(form), torch.randn(T, B, H, device=device).to(form)

    def fast(impl):
        return Contender(f"fastlm {impl}", wrap(lambda gates: qrnn_pool(gates, impl=impl)[0]))

    plain = wrap(op_by_op)
    found = [*ours("qrnn_pool", device, form, fast), Contender(RIVAL, plain)]
    if device in compile_too:
        found.append(Contender("torch.compile of it", wrap(compiled(op_by_op))))
    size = T * B * H * form.itemsize
    return Work(
        inputs,
        found,
        exact=in_double(wrap(lambda gates: reference(gates)[0])),
        plain=plain,
        names=["h", "dgates"][: 1 + backward],
        # gates in and h out; backward gates and dh in, dgates out
        bytes=size * (4 + 7 * backward),
    )


def case(dtype, backward, T=140, B=60, H=2500, *, title=None, compile_too=(), **options):
    way = "forward + backward" if backward else "forward"
    make = partial(work, T=T, B=B, H=H, dtype=dtype, backward=backward, compile_too=compile_too)
    return Case("qrnn_pool", title or f"({T},{B},{H}) {dtype}, {way}", make, dtype, **options)


ON_GPU = {"cuda": (Target(share=0.8),)}


def goal(ratio):
    return {"cpu": (Target(RIVAL, ratio=ratio, share=0.8),)} | ON_GPU


CASES = [
    case("fp32", False, size="quick", targets=goal(15.0), compile_too=("cpu",)),
    case("fp32", True, size="quick", targets=goal(8.0)),
    case("bf16", True, size="quick", targets=ON_GPU),
    case("bf16", False, targets=ON_GPU),
    # so small that latency counts, not bandwidth
    *(case(d, way, 70, 20, 1550, size="quick", devices=("cuda",)) for d in ("fp32", "bf16") for way in (False, True)),
    case(
        "fp32",
        True,
        title="(140,60,2500) fp32, forward + backward, compiled",
        compile_too=("cpu", "cuda"),
        slow=True,
    ),
    case("fp32", True, 3, 2, 5, size="tiny"),
]
SWEEPS = [("H", H, dict(H=H)) for H in (320, 640, 1150, 1550, 2500)]
SWEEPS += [("B", B, dict(B=B)) for B in (1, 8, 20, 60)]
SWEEPS += [("T", T, dict(T=T)) for T in (35, 70, 140, 512)]
CASES += [
    case(d, True, title=f"sweep over {axis}: {value}, {d}", sweep=(f"qrnn_pool {d}", axis, value), **sizes)
    for d in ("fp32", "bf16")
    for axis, value, sizes in SWEEPS
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_qrnn_pool(case, measured):
    measured(case)
