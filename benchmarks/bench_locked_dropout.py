"""One mask for all steps, against the product that awd-lstm-lm writes and its compiled form; forward and backward."""

from functools import partial

import pytest
import torch
from cases import DTYPES, Case, Contender, Work, compiled, in_double, ours, with_gradients

from fastlm.ops import dropconnect_mask, locked_dropout, philox
from fastlm.ops.locked_dropout import reference

DROP = 0.4


def by_hand(x):
    """Its LockedDropout: a mask of PyTorch's own for all steps."""
    return x * (x.new_empty(1, *x.shape[1:]).bernoulli_(1 - DROP) / (1 - DROP))


def work(device, *, T, B, H, dtype, compile_too):
    form, seed = DTYPES[dtype], torch.tensor(3, device=device)
    wrap = partial(with_gradients, wanted=[0])

    def inputs():
        return tuple(torch.randn(T, B, H, device=device).to(form) for _ in range(2))

    def fast(impl):
        run = wrap(lambda x: locked_dropout(x, DROP, impl=impl))
        return Contender(f"fastlm {impl}", run, wrap(lambda x: locked_dropout(x, DROP, seed, impl=impl)))

    def masked(x):
        return x * (
            dropconnect_mask(x.shape[1:], DROP, seed, stream=philox.LOCKED, impl="reference").to(x.dtype) / (1 - DROP)
        )

    note = "its mask is its own: what is checked is the product with ours"
    plain = Contender("x * mask", wrap(by_hand), wrap(masked), note=note)
    found = [*ours("locked_dropout", device, form, fast), plain]
    if compile_too:
        run, check = (wrap(compiled(function)) for function in (by_hand, masked))
        found.append(Contender("torch.compile of it", run, check, note=note))
    return Work(
        inputs,
        found,
        exact=in_double(wrap(lambda x: reference(x, DROP, seed))),
        plain=wrap(masked),
        names=["y", "dx"],
        bytes=4 * T * B * H * form.itemsize,  # x and a gradient, each read and written
    )


def case(dtype, T=70, B=20, H=1150, *, compile_too=True, **options):
    make = partial(work, T=T, B=B, H=H, dtype=dtype, compile_too=compile_too)
    return Case("locked_dropout", f"({T},{B},{H}) {dtype}, forward + backward", make, dtype, **options)


CASES = [
    case("fp32", size="quick"),
    case("bf16"),
    case("bf16", 140, 60, 2500),
    case("fp32", 3, 2, 5, compile_too=False, size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_locked_dropout(case, measured):
    measured(case)
