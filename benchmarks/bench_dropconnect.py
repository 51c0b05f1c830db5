"""A masked weight, against `F.dropout` and its compiled form; forward and backward."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, Contender, Work, compiled, in_double, ours, with_gradients

from fastlm.ops import dropconnect, dropconnect_mask
from fastlm.ops.dropconnect import reference

DROP = 0.5


def work(device, *, rows, columns, dtype, compile_too):
    form, seed = DTYPES[dtype], torch.tensor(3, device=device)
    wrap = partial(with_gradients, wanted=[0])

    def inputs():
        return tuple(torch.randn(rows, columns, device=device).to(form) for _ in range(2))

    def fast(impl):
        run = wrap(lambda w: dropconnect(w, DROP, impl=impl))
        return Contender(f"fastlm {impl}", run, wrap(lambda w: dropconnect(w, DROP, seed, impl=impl)))

    def dropped(w):
        return F.dropout(w, DROP)

    def masked(w):
        return w * dropconnect_mask(w.shape, DROP, seed, impl="reference") / (1 - DROP)

    note = "its mask is its own: what is checked is the product with ours"
    found = [*ours("dropconnect", device, form, fast), Contender("F.dropout", wrap(dropped), wrap(masked), note=note)]
    if compile_too:
        run, check = (wrap(compiled(function)) for function in (dropped, masked))
        found.append(Contender("torch.compile of it", run, check, note=note))
    return Work(
        inputs,
        found,
        exact=in_double(wrap(lambda w: reference(w, DROP, seed))),
        plain=wrap(masked),
        names=["masked", "dw"],
        bytes=4 * rows * columns * form.itemsize,  # a weight and a gradient, each read and written
    )


def case(dtype, rows=4600, columns=1150, *, compile_too=True, **options):
    make = partial(work, rows=rows, columns=columns, dtype=dtype, compile_too=compile_too)
    return Case("dropconnect", f"[{rows},{columns}] {dtype}, forward + backward", make, dtype, **options)


CASES = [case("fp32", size="quick"), case("bf16"), case("fp32", 5, 7, compile_too=False, size="tiny")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dropconnect(case, measured):
    measured(case)
