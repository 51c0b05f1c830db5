"""Linear cross entropy of a batch that comes in pieces: their means over the whole of it add up to its mean."""

import pytest
import torch
from test_linear_cross_entropy import layer, outcome, plain

from fastlm import testing
from fastlm.ops import linear_cross_entropy

IMPLS = testing.impls("linear_cross_entropy")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_means_of_pieces_add_up(impl, dtype, as_tensor):
    input, weight, bias, target = layer(13, 9, 5, dtype)
    target[::4] = -100
    divisor = torch.tensor(9) if as_tensor else 9  # the targets that count

    def pieces(input, weight, target, bias, **options):
        parts = zip(input.split([5, 0, 8]), target.split([5, 0, 8]), strict=True)
        means = [linear_cross_entropy(x, weight, t, bias=bias, impl=impl, divisor=divisor, **options) for x, t in parts]
        return sum(means)

    options = {"label_smoothing": 0.1}
    upstream = torch.tensor(3.0)
    leaves = [x.detach().double().requires_grad_() for x in (input, weight, bias)]
    exact = outcome(plain, *leaves[:2], target, leaves[2], upstream, **options)
    ours = outcome(pieces, input, weight, target, bias, upstream, **options)
    theirs = outcome(plain, input, weight, target, bias, upstream, **options)
    for name, a, p, e in zip(("loss", "input", "weight", "bias"), ours, theirs, exact, strict=True):
        if name != "loss":  # a lone number of plain PyTorch may be right by luck
            testing.assert_accurate(name, a, p, e)
        testing.assert_close(name, a, e, 4 * torch.finfo(dtype).eps)


def test_compiles():
    input, weight, bias, target = layer(6, 9, 4)

    def loss(input, divisor):
        return linear_cross_entropy(input, weight, target, bias=bias, divisor=divisor)

    expected = plain(input, weight, target, bias, reduction="sum") / 11
    for divisor in (11.0, torch.tensor(11.0)):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        testing.assert_close("loss", compiled(input, divisor), expected.double())


def test_errors():
    input, weight, _, target = layer(6, 9, 4)
    with pytest.raises(ValueError, match="divisor goes with reduction 'mean' alone, got 'sum'"):
        linear_cross_entropy(input, weight, target, reduction="sum", divisor=6)
    with pytest.raises(ValueError, match=r"divisor must be a scalar tensor, got shape \[1\]"):
        linear_cross_entropy(input, weight, target, divisor=torch.ones(1))
    for divisor in ("a", [6], 1j):
        with pytest.raises(TypeError, match="divisor must be a number, got "):
            linear_cross_entropy(input, weight, target, divisor=divisor)
    for divisor in (0, -1.5, float("nan")):
        with pytest.raises(ValueError, match="divisor must be positive, got "):
            linear_cross_entropy(input, weight, target, divisor=divisor)
    with pytest.raises(TypeError, match="divisor must be on cpu like input, got meta"):
        linear_cross_entropy(input, weight, target, divisor=torch.ones((), device="meta"))
