"""The linear cross entropy loss as a module."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_a_linear_layer_and_a_loss(reduction, bias, smoothing):
    options = {"reduction": reduction, "ignore_index": 3, "label_smoothing": smoothing}
    loss = nn.LinearCrossEntropyLoss(5, 11, bias=bias, dtype=torch.float64, **options)
    x = torch.randn(4, 3, 5).double().requires_grad_()
    target = torch.randint(11, (4, 3))
    target[0, 0] = 3
    expected = F.cross_entropy(loss.linear(x).flatten(0, 1), target.flatten(), **options)
    actual = loss(x, target)
    torch.testing.assert_close(actual, expected.view(4, 3) if reduction == "none" else expected)
    inputs = [x, *loss.parameters()]
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_keys_are_those_of_torch():
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    keys = ["linear.weight", "linear.bias"]
    assert list(nn.LinearCrossEntropyLoss(5, 11, bias=True).state_dict()) == keys
    if theirs is not None:
        assert list(theirs(5, 11, bias=True).state_dict()) == keys


def test_tied_weight_learns_from_both_sides():
    embedding, loss = torch.nn.Embedding(11, 5), nn.LinearCrossEntropyLoss(5, 11)
    loss.linear.weight = embedding.weight
    ids, target = torch.tensor([1, 2]), torch.tensor([3, 4])
    loss(embedding(ids), target).backward()
    weight = embedding.weight.detach().requires_grad_()
    F.cross_entropy(F.linear(weight[ids], weight), target).backward()
    torch.testing.assert_close(embedding.weight.grad, weight.grad)
    twin = copy.deepcopy(torch.nn.ModuleList([embedding, loss]))
    assert twin[0].weight is twin[1].linear.weight
