"""The operator of the adaptive softmax: every implementation, one write of each gradient, transforms, errors.

`test_nn_adaptive_softmax.py` has its values and gradients in every dtype, against the formula.
"""

import importlib

import pytest
import torch

from fastlm import testing
from fastlm.ops import adaptive_softmax, linear_cross_entropy

module = importlib.import_module("fastlm.ops.adaptive_softmax")  # the name in the package is the function
clusters = importlib.import_module("fastlm.ops.linear_cross_entropy")
pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = testing.impls("adaptive_softmax")
REDUCTIONS = ["mean", "sum", "none"]
V, D, CUTOFFS = 13, 5, (3, 5, 9)


def layer(rows=24, classes=V, width=D, cutoffs=CUTOFFS, dtype=torch.float32):
    """Input, weight, bias, tombstones and their bias, leaves of size 1; where there is room, every word is a target."""
    shapes = (rows, width), (classes, width), (classes,), (len(cutoffs), width), (len(cutoffs),)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes], torch.randperm(rows) % classes


def call(tensors, target, cutoffs=CUTOFFS, **options):
    x, w, b, t, s = tensors
    return adaptive_softmax(x, w, target, t, cutoffs=cutoffs, bias=b, tail_bias=s, **options)


def outcome(tensors, target, **options):
    """Loss and gradients, of rows that count differently."""
    loss = call(tensors, target, **options)
    upstream = torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, [x for x in tensors if x is not None], upstream)]


def doubles(tensors):
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def assert_close(ours, exact, tolerance=1e-6):
    for name, a, e in zip(("loss", "input", "weight", "bias", "tail vectors", "tail bias"), ours, exact, strict=False):
        testing.assert_close(name, a, e.double(), tolerance)


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation(monkeypatch, impl, reduction, biased, all_rows):
    if all_rows:
        monkeypatch.setattr(module, "_on_host", lambda target: False)
    tensors, target = layer()
    tensors = tensors if biased else [*tensors[:2], None, tensors[3], None]
    options = dict(reduction=reduction, ignore_index=4)
    assert_close(outcome(tensors, target, impl=impl, **options), outcome(doubles(tensors), target, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_chunks_are_float32(monkeypatch, dtype):
    """The slices are 16 bits then, and the sums are beside them."""
    tensors, target = layer(150, 40, 16, (10, 25), dtype)
    exact = outcome(doubles(tensors), target, cutoffs=(10, 25))
    for rows in (150, 1):
        monkeypatch.setitem(clusters._CHUNK_ROWS, "cpu", (rows, rows))
        ours = outcome(tensors, target, cutoffs=(10, 25))
        assert all(x.dtype == dtype for x in ours[1:])
        assert_close(ours, exact, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("word", [None, 0, 2999], ids=["all words", "head", "last tail"])
def test_one_gradient_of_the_weight_and_no_other(reduction, word):
    """Slices with gradients of the whole size, a concatenation or a sum would be another."""
    tensors, _ = layer(9, 3000, 20, (100, 700))
    target = torch.arange(0, 2700, 300) if word is None else torch.full((9,), word)
    with torch.profiler.profile(profile_memory=True) as profile:
        outcome(tensors, target, cutoffs=(100, 700), reduction=reduction)
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert [event.nbytes() for event in events if event.nbytes() >= 4 * 2300 * 20] == [4 * 3000 * 20]


def test_only_the_gradients_in_need(monkeypatch):
    tensors, target = layer()
    expected = outcome(doubles(tensors), target, reduction="mean")
    calls, op = [], module._adaptive_softmax
    monkeypatch.setattr(module, "_adaptive_softmax", lambda *args: calls.append(args[-2]) or op(*args))
    for i in range(5):
        one = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        for reduction in ("mean", "none"):
            (gradient,) = torch.autograd.grad(call(one, target, reduction=reduction).mean(), one[i])
            testing.assert_close("gradient", gradient, expected[1 + i])
    assert len(calls) == 15 and all(sum(needs) <= 1 for needs in calls)
    calls.clear()
    with torch.no_grad():
        testing.assert_close("loss", call(tensors, target), expected[0])
    assert calls == [(False,) * 5]


def test_inputs_are_left_alone_and_may_be_strided():
    tensors, target = layer()
    views = [testing.strided(x) for x in tensors]
    copies = [x.detach().clone() for x in views]
    assert_close(outcome(views, testing.strided(target.int())), outcome(doubles(tensors), target))
    assert all(torch.equal(x, copy) for x, copy in zip(views, copies, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_raises(reduction):
    tensors, target = layer()
    (grad,) = torch.autograd.grad(call(tensors, target, reduction=reduction).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="adaptive_softmax is differentiable once"):
        (grad.square().sum() + tensors[1].sum()).backward()


def test_backward_twice_over_a_kept_graph():
    tensors, target = layer()
    loss = call(tensors, target)
    first = [x.clone() for x in torch.autograd.grad(loss, tensors, torch.tensor(2.0), retain_graph=True)]
    again = torch.autograd.grad(loss, tensors, torch.tensor(4.0))
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_transforms(monkeypatch, reduction, all_rows):
    if all_rows:
        monkeypatch.setattr(module, "_on_host", lambda target: False)

    def loss_of(*args):
        return call(args[:-1], args[-1], reduction=reduction).sum() * 3

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (15, 26):
        tensors, target = layer(rows)
        compiled(*tensors, target).backward()
        expected = torch.func.grad(loss_of, argnums=tuple(range(5)))(*tensors, target)
        assert_close([x.grad for x in tensors], [x.detach() for x in expected])


@pytest.mark.parametrize("all_rows", [False, True])
def test_the_operator_is_well_registered(monkeypatch, all_rows):
    if all_rows:
        monkeypatch.setattr(module, "_on_host", lambda target: False)
    tensors, target = layer()
    x, w, b, t, s = (tensor.detach() for tensor in tensors)
    op, scale, options = torch.ops.fastlm.adaptive_softmax.default, torch.rand(len(target)), (4, CUTOFFS)
    torch.library.opcheck(op, (x, w, b, t, s, target, scale, False, *options, [True] * 5, "cpu"))
    torch.library.opcheck(op, (x, w, b, t, s, target, None, True, *options, [True] * 5, "cpu"))
    x, w, t = x.bfloat16(), w.bfloat16(), t.bfloat16()
    torch.library.opcheck(op, (x, w, None, t, None, target, None, False, *options, [False] * 5, "cpu"))


def test_without_cutoffs_it_is_linear_cross_entropy():
    (x, w, b, _, _), target = layer()
    assert torch.equal(adaptive_softmax(x, w, target, cutoffs=(), bias=b), linear_cross_entropy(x, w, target, bias=b))


def test_errors():
    (x, w, b, t, s), target = layer()
    for tensors in ((x, w, b, None, s), (x, w, b, t, None), (x, w, None, t, s)):
        with pytest.raises(ValueError, match="cutoffs want tail_vectors, and tail_bias where there is a bias"):
            call(tensors, target)
    for name, tensors in (
        ("tail_vectors must have shape [tails, D] = [3, 5], got [2, 5]", (x, w, b, t[1:], s)),
        ("tail_bias must have shape [tails] = [3], got [2]", (x, w, b, t, s[1:])),
        ("bias must have shape [V] = [13], got [12]", (x, w, b[1:], t, s)),
        ("weight must have shape [V, D], got [13]", (x, w[:, 0], b, t, s)),
    ):
        with pytest.raises(ValueError) as error:
            call(tensors, target)
        assert str(error.value) == name
    with pytest.raises(TypeError, match="tail_bias must be torch.float32 like input, got torch.bfloat16"):
        call((x, w, b, t, s.bfloat16()), target)
    with pytest.raises((RuntimeError, TypeError), match="adaptive_softmax: "):
        call((x, w, b, t, s), target, impl="cuda")
