"""WeightDrop on modules of every kind, and the ways in which its ancestors broke."""

import copy
import pickle

import pytest
import torch

from fastlm import nn
from fastlm.ops import dropconnect_mask, philox

X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))
MODULES = {
    "linear": (lambda: torch.nn.Linear(8, 16), ["weight"]),
    "gru": (lambda: torch.nn.GRU(8, 16), ["weight_hh_l0"]),
    "lstm": (lambda: torch.nn.LSTM(8, 16, num_layers=2, bidirectional=True), ["weight_hh_l0", "weight_hh_l1_reverse"]),
    "nested": (lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.RNN(16, 16)), ["1.weight_hh_l0"]),
    "qrnn": (lambda: nn.QRNN(8, 16, 2), ["layers.1.linear.weight"]),
}
each = pytest.mark.parametrize("kind", MODULES)


def make(kind, p=0.5):
    build, names = MODULES[kind]
    return nn.WeightDrop(build(), names, p)


def output(result):
    return result[0] if isinstance(result, tuple) else result


@each
def test_runs_on_the_masked_weights(kind):
    """`torch.func.functional_call` alone leaves PyTorch's recurrent layers on their raw weights."""
    drop = make(kind)
    twin = copy.deepcopy(drop.module)
    torch.manual_seed(2)
    y = output(drop(X))
    torch.manual_seed(2)
    masks = {}
    with torch.no_grad():
        for name in drop.names:
            weight = twin.get_parameter(name)
            masks[name] = dropconnect_mask(weight.shape, 0.5, philox.draw_seed("cpu"))
            weight.mul_(masks[name] * 2)
    torch.testing.assert_close(y, output(twin(X)))
    y.square().sum().backward()
    for name, mask in masks.items():
        grad = drop.module.get_parameter(name).grad
        assert grad[mask].count_nonzero() > 0.9 * mask.sum() and not grad[~mask].any()
    assert not torch.equal(output(drop(X)), y)


@each
def test_raw_weight_is_the_only_parameter_and_learns(kind):
    drop = make(kind)
    keys = [f"module.{key}" for key in MODULES[kind][0]().state_dict()]
    before = {name: drop.module.get_parameter(name).clone() for name in drop.names}
    optimizer = torch.optim.SGD(drop.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output(drop(X)).square().sum().backward()
        optimizer.step()
    for name, old in before.items():
        weight = drop.module.get_parameter(name)
        assert isinstance(weight, torch.nn.Parameter) and (weight != old).double().mean() > 0.5
    assert list(drop.state_dict()) == keys


@each
def test_train_eval_train(kind):
    drop = make(kind)
    drop(X)
    plain = output(drop.module(X))
    assert torch.equal(output(drop.eval()(X)), plain)
    assert not torch.allclose(output(drop.train()(X)), plain)
    assert torch.equal(output(drop.module(X)), plain)
    output(drop(X)).sum().backward()
    assert torch.equal(output(make_off(drop)(X)), plain)


def make_off(drop):
    off = nn.WeightDrop(drop.module, drop.names, 0.0)
    return off.train()


@each
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_after_a_forward(kind, clone):
    drop = make(kind)
    drop(X)
    twin = clone(drop)
    results = []
    for module in (drop, twin):
        torch.manual_seed(4)
        results.append(output(module(X)))
    assert torch.equal(*results)


def test_a_failing_forward_leaves_the_module_as_it_was():
    drop = make("gru")
    weights = drop.module._flat_weights
    with pytest.raises(RuntimeError):
        drop(torch.randn(5, 3, 9))
    assert drop.module._flat_weights is weights and weights[1] is drop.module.weight_hh_l0


def test_state_arguments_pass_through():
    drop, h = make("gru").eval(), torch.randn(1, 3, 16)
    torch.testing.assert_close(drop(X, hx=h), drop.module(X, h))


@each
def test_func_grad(kind):
    drop = make(kind)
    parameters = {k: v.detach() for k, v in drop.named_parameters()}

    def loss(parameters):
        torch.manual_seed(8)
        return output(torch.func.functional_call(drop, parameters, (X,))).square().sum()

    grads = torch.func.grad(loss)(parameters)
    torch.manual_seed(8)
    output(drop(X)).square().sum().backward()
    for name, p in drop.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


def test_to_dtype():
    drop = make("gru")
    drop(X)
    y, _ = drop.double()(X.double())
    assert y.dtype == torch.float64


def test_compiles_without_a_break():
    drop = make("linear")
    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    compiled(X).sum().backward()
    assert 0.3 < (drop.module.weight.grad != 0).double().mean() < 0.7


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"names must be parameters \(weight, bias\), got 'weight_hh_l0'"):
        nn.WeightDrop(torch.nn.Linear(2, 2), ["weight_hh_l0"], 0.5)
    with pytest.raises(ValueError, match="p must lie in"):
        nn.WeightDrop(torch.nn.Linear(2, 2), ["weight"], 1.5)
    assert nn.WeightDrop(torch.nn.Linear(2, 2), "weight", 0.5).names == ["weight"]
