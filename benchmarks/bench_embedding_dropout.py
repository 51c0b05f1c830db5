"""An embedding that drops whole words, against what awd-lstm-lm writes: the whole weight masked, then looked up."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, Contender, Work, in_double, ours, with_gradients

from fastlm.ops import dropconnect_mask, embedding_dropout, philox
from fastlm.ops.embedding_dropout import reference

DROP = 0.1


def masked_weight(weight, ids):
    """Its embedded_dropout: a mask of PyTorch's own over the rows of the weight."""
    keep = weight.new_empty(len(weight), 1).bernoulli_(1 - DROP)
    return F.embedding(ids, keep.expand_as(weight) / (1 - DROP) * weight)


def work(device, *, V, E, T, B, dtype):
    form, seed = DTYPES[dtype], torch.tensor(3, device=device)
    wrap = partial(with_gradients, wanted=[0])

    def inputs():
        weight, grad = (torch.randn(*shape, device=device).to(form) for shape in [(V, E), (T, B, E)])
        return weight, torch.randint(V, (T, B), device=device), grad

    def fast(impl):
        run = wrap(lambda weight, ids: embedding_dropout(weight, ids, DROP, impl=impl))
        check = wrap(lambda weight, ids: embedding_dropout(weight, ids, DROP, seed, impl=impl))
        return Contender(f"fastlm {impl}", run, check)

    def masked(weight, ids):
        keep = dropconnect_mask((V, 1), DROP, seed, stream=philox.EMBEDDING, impl="reference").to(weight.dtype)
        return F.embedding(ids, keep.expand_as(weight) / (1 - DROP) * weight)

    note = "its mask is its own: what is checked is the product with ours"
    rows = T * B * E * form.itemsize
    return Work(
        inputs,
        [
            *ours("embedding_dropout", device, form, fast),
            Contender("mask, then look up", wrap(masked_weight), wrap(masked), note=note),
        ],
        exact=in_double(wrap(lambda weight, ids: reference(weight, ids, DROP, seed))),
        plain=wrap(masked),
        names=["y", "dweight"],
        bytes=3 * rows + V * E * form.itemsize,  # rows read and written, a gradient read, that of the weight written
    )


def case(dtype, V=10_000, E=400, T=70, B=20, **options):
    make = partial(work, V=V, E=E, T=T, B=B, dtype=dtype)
    title = f"V={V} E={E} N={T * B} {dtype}, forward + backward"
    return Case("embedding_dropout", title, make, dtype, **options)


CASES = [
    case("fp32", size="quick"),
    case("bf16"),
    case("fp32", 33_278, 400, 70, 80),
    case("fp32", 11, 5, 3, 2, size="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embedding_dropout(case, measured):
    measured(case)
