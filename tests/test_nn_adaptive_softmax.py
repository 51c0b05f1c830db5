"""The adaptive softmax: values, gradients and order against the whole distribution composed by its formula."""

import copy
import importlib
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn, testing

module = importlib.import_module("fastlm.ops.adaptive_softmax")  # the name in the package is the function

V, D = 13, 5
CUTOFFS = [(4,), (1, 12), (3, 5, 9)]
REDUCTIONS = ["mean", "sum", "none"]


def make(cutoffs=(3, 5, 9), **options):
    """A layer whose tombstones count, as after some training."""
    softmax = nn.AdaptiveSoftmax(D, V, cutoffs, **options)
    for tail in (softmax.tail_vectors, softmax.tail_bias):
        if tail is not None:
            torch.nn.init.normal_(tail)
    return softmax


def composed(softmax, x):
    """log p, word by word as in the formula, in float64."""
    z = x @ softmax.weight.T + softmax.bias
    if not softmax.cutoffs:
        return z.log_softmax(-1)
    tombstones = x @ softmax.tail_vectors.T + softmax.tail_bias
    edges = [0, *softmax.cutoffs, V]
    head = torch.cat([z[..., : edges[1]], tombstones], -1).log_softmax(-1)
    columns = []
    for word in range(V):
        k = sum(word >= cutoff for cutoff in softmax.cutoffs)
        if k == 0:
            columns.append(head[..., word])
        else:
            tail = z[..., edges[k] : edges[k + 1]].log_softmax(-1)
            columns.append(head[..., edges[1] + k - 1] + tail[..., word - edges[k]])
    return torch.stack(columns, -1)


def plain(softmax, x, target, reduction):
    """The loss of `composed`; its log probabilities are those of a distribution, so that they pass for logits."""
    loss = F.cross_entropy(composed(softmax, x).flatten(0, -2), target.flatten(), reduction=reduction, ignore_index=2)
    return loss.view(target.shape) if reduction == "none" else loss


def outcome(loss, softmax, x):
    """The loss and every gradient, of rows that count differently."""
    upstream = torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, [x, *softmax.parameters()], upstream)]


def inputs(shape=(4, 6), dtype=torch.float32):
    """Where there is room, every word is a target."""
    words = torch.randperm(math.prod(shape)) % V
    return torch.randn(*shape, D).to(dtype).requires_grad_(), words.view(shape)


def by_all_rows(monkeypatch):
    """The way of targets that are on a GPU."""
    monkeypatch.setattr(module, "_on_host", lambda target: False)


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("cutoffs", CUTOFFS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_and_gradients(monkeypatch, all_rows, dtype, cutoffs, reduction):
    """Word 2, in the head or in a tail, counts for nothing."""
    if all_rows:
        by_all_rows(monkeypatch)
    softmax = make(cutoffs, ignore_index=2, dtype=dtype)
    x, target = inputs((4, 6), dtype)
    ours = outcome(softmax(x, target, reduction=reduction), softmax, x)
    theirs = outcome(plain(softmax, x, target, reduction), softmax, x)
    twin, wide = copy.deepcopy(softmax).double(), x.detach().double().requires_grad_()
    exact = outcome(plain(twin, wide, target, reduction), twin, wide)
    assert ours[0].dtype == torch.float32 and ours[0].shape == exact[0].shape
    for name, a, p, e in zip(("loss", "x", "w", "b", "tail w", "tail b"), ours, theirs, exact, strict=True):
        if e.numel() > len(cutoffs):  # plain PyTorch may have a few numbers right by luck
            testing.assert_accurate(name, a, p, e)
        testing.assert_close(name, a, e, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("cutoffs", [(), *CUTOFFS], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (7,), ()], ids=str)
def test_log_prob_is_the_distribution_of_the_loss(cutoffs, shape):
    softmax = make(cutoffs).double()
    x, target = inputs(shape, torch.float64)
    log_prob = softmax.log_prob(x)
    testing.assert_close("log p", log_prob, composed(softmax, x), 1e-12)
    testing.assert_close("sums", log_prob.exp().sum(-1), torch.ones(shape).double(), 1e-12)
    ours = softmax(x, target, reduction="none")
    testing.assert_close("nll", ours, -log_prob.gather(-1, target[..., None])[..., 0], 1e-12)
    assert torch.equal(softmax.predict(x), log_prob.argmax(-1))
    assert softmax.bfloat16().log_prob(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_without_cutoffs_it_is_the_plain_loss(reduction, bias):
    softmax = make((), bias=bias, ignore_index=2)
    assert list(softmax.state_dict()) == ["weight", "bias"][: 1 + bias]
    loss = nn.LinearCrossEntropyLoss(D, V, bias, reduction=reduction)
    loss.linear.weight, loss.linear.bias, loss.ignore_index = softmax.weight, softmax.bias, 2
    x, target = inputs()
    assert torch.equal(softmax(x, target, reduction=reduction), loss(x, target))
    testing.assert_close("log p", softmax.log_prob(x), loss.linear(x).log_softmax(-1).double())


def test_order_and_strides():
    softmax = make()
    x, target = inputs((6, 4))
    whole = softmax(x, target, reduction="none")
    order = torch.randperm(6)
    testing.assert_close("rows", softmax(x[order], target[order], reduction="none"), whole[order].double())
    testing.assert_close("columns", softmax(x.transpose(0, 1), target.T, reduction="none"), whole.T.double())


@pytest.mark.parametrize("word", [0, 4, 12], ids=["head", "first tail", "last tail"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_clusters_without_rows(word, reduction):
    softmax = make()
    x, target = inputs((3,))
    target = torch.full_like(target, word)
    ours = outcome(softmax(x, target, reduction=reduction), softmax, x)
    exact = outcome(plain(softmax, x, target, reduction), softmax, x)
    for name, a, e in zip(("loss", "x", "w", "b", "tail w", "tail b"), ours, exact, strict=True):
        testing.assert_close(name, a, e.double(), 1e-5)


@pytest.mark.parametrize("cutoffs", [(), (3, 5, 9)], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_nothing_to_learn_from(cutoffs, ignored):
    softmax = make(cutoffs)
    x, target = inputs((3,) if ignored else (0, 2))
    target = torch.full_like(target, -100)
    assert softmax(x, target).isnan()
    for reduction in ("sum", "none"):
        loss = softmax(x, target, reduction=reduction)
        assert torch.equal(loss, torch.zeros(target.shape if reduction == "none" else ()))
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss.sum(), [x, *softmax.parameters()]))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weight_learns_from_both_sides(tied):
    """Assigned, or given with each call: then a state dict has it once."""
    embedding, bias = torch.nn.Embedding(V, D), torch.nn.Parameter(torch.randn(V))
    softmax = make(tied=tied)
    if not tied:
        softmax.weight, softmax.bias = embedding.weight, bias
    layer = (embedding.weight, bias) if tied else ()
    ids, target = torch.randint(V, (7,)), torch.randint(V, (7,))
    softmax(embedding(ids), target, *layer).backward()
    reference = make()
    reference.load_state_dict({"weight": embedding.weight, "bias": bias, **softmax.state_dict()})
    F.nll_loss(composed(reference, reference.weight[ids]), target).backward()
    testing.assert_close("weight", embedding.weight.grad, reference.weight.grad.double())
    testing.assert_close("bias", bias.grad, reference.bias.grad.double())
    testing.assert_close(
        "log p", softmax.log_prob(embedding(ids), *layer), composed(reference, embedding(ids)).double()
    )
    assert list(softmax.state_dict()) == [*(() if tied else ("weight", "bias")), "tail_vectors", "tail_bias"]
    assert torch.equal(softmax.predict(embedding(ids), *layer), reference.predict(embedding(ids)))


def split_cross_entropy(weight, bias, tail_vectors, tail_bias, splits, hidden):
    """log p of awd-lstm-lm's split softmax, written anew from its formula: the first tail has the last tombstone."""
    scores = hidden @ weight.T + bias
    words, *tails = scores.tensor_split(splits, dim=1)
    tombstones = hidden @ tail_vectors.T + tail_bias
    among = torch.logsumexp(torch.cat([words, tombstones], 1), 1, keepdim=True)
    log_prob = words - among
    for tail, tombstone in zip(tails, reversed(tombstones.unbind(1)), strict=True):
        of_tail = tombstone[:, None] - among
        log_prob = torch.cat([log_prob, of_tail + tail - torch.logsumexp(tail, 1, keepdim=True)], 1)
    return log_prob


@pytest.mark.parametrize("cutoffs", CUTOFFS, ids=str)
def test_tombstones_of_the_original(cutoffs):
    softmax, x = make(cutoffs), torch.randn(6, D)
    tails = torch.randn(len(cutoffs), D), torch.randn(len(cutoffs))
    expected = split_cross_entropy(softmax.weight, softmax.bias, *tails, cutoffs, x)
    softmax.import_tails(*tails)
    testing.assert_close("log p", softmax.log_prob(x), expected.double())
    softmax.import_tails(*tails, tombstones="in order")
    assert torch.equal(softmax.tail_vectors, tails[0]) and torch.equal(softmax.tail_bias, tails[1])
    assert len(cutoffs) == 1 or not torch.allclose(softmax.log_prob(x), expected)


def test_initial_values():
    softmax = nn.AdaptiveSoftmax(100, 50, (10, 20))
    for drawn in (softmax.weight, softmax.bias):
        assert 0.08 < drawn.abs().max() <= 0.1
    assert not softmax.tail_vectors.any() and not softmax.tail_bias.any()
    assert softmax.tail_vectors.shape == (2, 100)
    assert repr(softmax) == "AdaptiveSoftmax(100, 50, cutoffs=(10, 20), bias=True, tied=False)"


def test_copies_and_pickles():
    softmax, (x, target) = make(), inputs()
    expected = softmax(x, target)
    for twin in (copy.deepcopy(softmax), pickle.loads(pickle.dumps(softmax))):
        assert torch.equal(twin(x, target), expected)


def test_autocast():
    softmax, (x, target) = make(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss, log_prob = softmax(x, target), softmax.log_prob(x)
    assert loss.dtype == log_prob.dtype == torch.float32
    gradients = torch.autograd.grad(loss, [x, *softmax.parameters()])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    testing.assert_close("loss", loss, softmax(x, target).double(), 1e-2)
    testing.assert_close("log p", log_prob, softmax.log_prob(x).double(), 1e-2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_for_any_split_of_the_rows(reduction):
    softmax = make()
    compiled = torch.compile(softmax, backend="aot_eager")
    for _ in range(3):
        x, target = inputs((2, 3))
        loss = compiled(x, target, reduction=reduction)
        expected = softmax(x, target, reduction=reduction)
        for a, e in zip(outcome(loss, softmax, x), outcome(expected, softmax, x), strict=True):
            testing.assert_close("compiled", a, e.double())


@pytest.mark.parametrize("all_rows", [False, True])
def test_targets_outside_the_vocabulary_raise(monkeypatch, all_rows):
    if all_rows:
        by_all_rows(monkeypatch)
    softmax, (x, target) = make(), inputs()
    for word in (-1, V, 2**40):
        target[1, 2] = word
        with pytest.raises(ValueError, match=r"target must lie in \[0, "):
            softmax(x, target)
    with pytest.raises(ValueError, match=r"\[0, 13\), the vocabulary, or be ignore_index = -100, got 1099511627776"):
        monkeypatch.undo()
        softmax(x, target)


def test_errors():
    x, target = inputs()
    for cutoffs in ((0,), (V,), (5, 3), (3, 3)):
        with pytest.raises(ValueError, match=r"cutoffs must increase and lie in \[1, 13\), the vocabulary, got"):
            nn.AdaptiveSoftmax(D, V, cutoffs)
    for cutoffs in (5, None):
        with pytest.raises(TypeError, match=f"cutoffs must be a sequence of integers, got {cutoffs}"):
            nn.AdaptiveSoftmax(D, V, cutoffs)
    for cutoff in (5.5, True, "5"):
        with pytest.raises(TypeError, match=f"cutoffs must be integers, got {cutoff!r}"):
            nn.AdaptiveSoftmax(D, V, [cutoff])
    for error, sizes, words in [
        (ValueError, (-8, V), "in_features must be at least 0, got -8"),
        (ValueError, (D, -1), "num_classes must be at least 0, got -1"),
        (TypeError, (5.0, V), "in_features must be an integer, got 5.0"),
    ]:
        with pytest.raises(error, match=words):
            nn.AdaptiveSoftmax(*sizes)
    softmax, tied = make(), make(tied=True)
    for call in (softmax.log_prob, softmax.predict, make(()).log_prob):
        for wrong in (x[..., 1:], x.detach().sum()):
            with pytest.raises(ValueError, match=r"input must have shape \[\.\.\., D\] with D = 5 like weight, got \["):
                call(wrong)
        for wrong, words in [
            (target, "input must be float32, bfloat16, float16 or float64, got torch.int64"),
            (x.bfloat16(), "weight must be torch.bfloat16 like input, got torch.float32"),
            (x.to("meta"), "weight must be on meta like input, got cpu"),
        ]:
            with pytest.raises(TypeError, match=words):
                call(wrong)
    with pytest.raises(ValueError, match=r"shape \[\.\.\., D\] with D = 5 like weight, got \[4, 6, 4\]"):
        softmax(x[..., 1:], target)
    with pytest.raises(ValueError, match=r"target must have shape \[4, 6\] like input, got \[4, 5\]"):
        softmax(x, target[:, 1:])
    with pytest.raises(TypeError, match="target must be an int64 or int32 tensor, got torch.float32"):
        softmax(x, target.float())
    with pytest.raises(TypeError, match="target must be on cpu like input, got meta"):
        softmax(x, target.to("meta"))
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'avg'"):
        softmax(x, target, reduction="avg")
    with pytest.raises(ValueError, match="a layer that is tied alone"):
        softmax(x, target, softmax.weight)
    with pytest.raises(ValueError, match="must be given weight and bias with each call"):
        tied(x, target, softmax.weight)
    with pytest.raises(ValueError, match=r"weight must have shape \[V, D\] = \[13, 5\], got \[12, 5\]"):
        tied(x, target, softmax.weight[1:], softmax.bias)
    with pytest.raises(ValueError, match="tombstones must be 'reversed' or 'in order', got 'backwards'"):
        softmax.import_tails(softmax.tail_vectors, softmax.tail_bias, tombstones="backwards")
    with pytest.raises(ValueError, match=r"tail_vectors must have shape \[tails, D\] = \[3, 5\], got \[2, 5\]"):
        softmax.import_tails(softmax.tail_vectors[1:], softmax.tail_bias)
    with pytest.raises(ValueError, match="no place in a layer without cutoffs or without bias"):
        make(bias=False).import_tails(softmax.tail_vectors, softmax.tail_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_a_gpu_without_waiting(dtype, reduction):
    """Targets on the host and on the GPU, the same numbers, and neither waits."""
    classes, width, rows = 3000, 64, 500
    softmax = nn.AdaptiveSoftmax(width, classes, (100, 500, 1500), device="cuda", dtype=dtype)
    torch.nn.init.normal_(softmax.tail_vectors)
    x = torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True)
    on_host = torch.randint(classes, (rows,))
    on_gpu = on_host.cuda()
    upstream = torch.rand(rows if reduction == "none" else (), device="cuda")

    def run(target):
        loss = softmax(x, target, reduction=reduction)
        return [loss, *torch.autograd.grad(loss, [x, *softmax.parameters()], upstream)]

    run(on_host), run(on_gpu)  # what is made at a first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(on_host), run(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    twin = copy.deepcopy(softmax).double()
    wide = x.detach().double().requires_grad_()
    log_prob = twin.log_prob(wide)
    exact = F.nll_loss(log_prob, on_gpu, reduction=reduction)
    exact = [exact, *torch.autograd.grad(exact, [wide, *twin.parameters()], upstream.double())]
    for ours in found:
        for name, a, e in zip(("loss", "x", "w", "b", "tail w", "tail b"), ours, exact, strict=True):
            testing.assert_close(name, a, e, 32 * torch.finfo(dtype).eps)
