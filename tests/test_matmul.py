"""The products of large matrices: every layout and size on both sides of the rule, and a linear layer over them."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn, ops, testing
from fastlm.ops import _matmul

SHAPES = [(1, 1, 1), (3, 1, 5), (1, 17, 4), (0, 3, 4), (3, 0, 4), (3, 4, 0), (33, 130, 65), (70, 1150, 100)]  # M, N, K
LAYOUTS = ["NN", "NT", "TN", "TT"]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["rule", "always"])
def everything(request, monkeypatch):
    """The rule as it is, and with oneDNN for every layout that it takes, on any processor that has it."""
    if request.param == "rule":
        return
    if _matmul._onednn is None:
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(_matmul, "_amd", lambda: True)
    monkeypatch.setattr(_matmul, "_LEAST", 1)
    monkeypatch.setattr(_matmul, "_LEAST_N", 0)


def matrix(rows, columns, layout="N", dtype=torch.float32):
    x = torch.randn(rows, columns) if layout == "N" else torch.randn(columns, rows).t()
    return x.to(dtype)


def counted(monkeypatch):
    """Notes the calls of oneDNN from here on."""
    calls, onednn = [], _matmul._onednn
    monkeypatch.setattr(_matmul, "_onednn", lambda *args: calls.append(args[0].shape) or onednn(*args))
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 1, 5), (1, 17, 4), (0, 3, 4), (3, 0, 4), (3, 4, 0), (33, 130, 65), (70, 1150, 100)],
    ids=str,
)
def test_values(everything, shape, layout):
    M, N, K = shape
    a, b = matrix(M, K, layout[0]), matrix(K, N, layout[1])
    copies = a.clone(), b.clone()
    testing.assert_accurate("product", _matmul.matmul(a, b), a @ b, a.double() @ b.double())
    assert torch.equal(a, copies[0]) and torch.equal(b, copies[1])


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_values(dtype, layout):
    a, b = matrix(300, 130, layout[0], dtype), matrix(130, 1100, layout[1], dtype)
    product = _matmul.matmul(a, b)
    assert product.dtype == dtype
    testing.assert_accurate("product", product, a @ b, a.double() @ b.double())


def test_any_strides(everything):
    wide = torch.randn(80, 90)
    for a in (wide[:, 3:73], wide[::2, :70], torch.randn(1, 70).expand(60, 70), torch.randn(60, 1).expand(60, 70)):
        for b in (wide[:70, 5:], wide.t()[20:, :64], torch.randn(1).expand(70, 66)):
            testing.assert_close("product", _matmul.matmul(a, b), a.double() @ b.double())


def test_the_rule(monkeypatch):
    if _matmul._onednn is None:
        pytest.skip("this PyTorch has no oneDNN")

    def chosen(M, N, K, layout, dtype=torch.float32, device="cpu"):
        a, b = ((r, c) if lay == "N" else (c, r) for r, c, lay in zip((M, K), (K, N), layout, strict=True))
        a, b = torch.empty(a, dtype=dtype, device=device), torch.empty(b, dtype=dtype, device=device)
        return _matmul.by_onednn(a if layout[0] == "N" else a.t(), b if layout[1] == "N" else b.t())

    monkeypatch.setattr(_matmul, "_amd", lambda: True)
    assert all(chosen(1400, 4600, 1150, layout) for layout in LAYOUTS)
    assert all(chosen(20, 4600, 1150, layout) for layout in LAYOUTS)
    assert all(chosen(10_000, 400, 1400, layout) == (layout[0] == "N") for layout in LAYOUTS)
    assert not any(chosen(64, 64, 64, layout) for layout in LAYOUTS)
    assert not any(chosen(1400, 4600, 1150, "NT", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64))
    assert not chosen(1400, 4600, 1150, "NT", device="meta")
    monkeypatch.setattr(_matmul, "_amd", lambda: False)
    assert not any(chosen(1400, 4600, 1150, layout) for layout in LAYOUTS)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (5, 3, 7), (0, 4, 3), (4, 0, 3), (4, 3, 0), (90, 65, 70), (600, 30, 1537), (40, 64, 3100)],
    ids=str,
)
@pytest.mark.parametrize("dropped", [False, True])
def test_own_kernel(shape, dropped):
    """A transposed a, in one stretch of K and in several, and the mask of a dropped weight on the result."""
    (M, N, K), seed = shape, torch.tensor(99) if dropped else None
    a, b = torch.randn(K, M), torch.randn(K, N)
    exact = a.double().t() @ b.double()
    if dropped:
        exact = torch.where(ops.dropconnect_mask((M, N), 0.4, seed), exact / 0.6, 0)
    for x, y in ((a, b), (testing.strided(a), b[:, :1].expand(K, N) if N == 1 else b)):
        testing.assert_accurate("product", torch.ops.fastlm.matmul_tn(x, y, seed, 0.4), a.t() @ b, exact)
    torch.library.opcheck(torch.ops.fastlm.matmul_tn.default, (a, b, seed, 0.4))


def test_own_kernel_from_any_number_of_threads():
    a, b = torch.randn(300, 700), torch.randn(300, 90)
    before, products = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        products.append(torch.ops.fastlm.matmul_tn(a, b, torch.tensor(3), 0.5))
    torch.set_num_threads(before)
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], products[2])


@pytest.mark.parametrize("size", [(40, 5, 6), (600, 130, 70)])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_gradient_of_a_dropped_weight(size, dtype, monkeypatch):
    monkeypatch.setattr(_matmul, "_amd", lambda: True)
    (M, N, K), seed = size, torch.tensor(5)
    grad, x = matrix(K, M, dtype=dtype), matrix(K, N, dtype=dtype)
    exact = torch.where(ops.dropconnect_mask((M, N), 0.3, seed), grad.double().t() @ x.double() / 0.7, 0)
    plain = torch.where(ops.dropconnect_mask((M, N), 0.3, seed), grad.t() @ x / 0.7, 0)
    testing.assert_accurate("gradient", _matmul.weight_gradient(grad, x, seed, 0.3), plain, exact)


def test_wrong_shapes_raise_like_mm(everything):
    with pytest.raises(RuntimeError):
        _matmul.matmul(torch.randn(300, 200), torch.randn(201, 300))
    with pytest.raises(RuntimeError):
        _matmul.linear(torch.randn(300, 200), torch.randn(300, 201))
    with pytest.raises(RuntimeError):
        _matmul.linear(torch.randn(300, 200), torch.randn(300, 200), torch.randn(299))
    with pytest.raises(RuntimeError):
        _matmul.linear(torch.randn(300, 200), torch.randn(300, 200), torch.randn(300).double())


@pytest.mark.parametrize("shape", [(7, 3), (2, 0, 3), (5, 4, 130), (2, 3, 2, 9), (6,)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(everything, shape, with_bias):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(33, shape[-1], requires_grad=True)
    bias = torch.randn(33, requires_grad=True) if with_bias else None
    tensors = [t for t in (x, weight, bias) if t is not None]
    upstream = torch.randn(*shape[:-1], 33)

    def outcome(function, *tensors):
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, upstream.to(y.dtype))]

    exact = outcome(F.linear, *(t.detach().double().requires_grad_() for t in tensors))
    for name, a, p, e in zip(
        ("y", "x", "weight", "bias"),
        outcome(_matmul.linear, *tensors),
        outcome(F.linear, *tensors),
        exact,
        strict=False,
    ):
        testing.assert_accurate(name, a, p, e)


def test_only_the_products_in_need(everything, monkeypatch):
    calls = counted(monkeypatch)
    x, weight = torch.randn(60, 70), torch.randn(50, 70, requires_grad=True)
    _matmul.linear(x, weight).square().sum().backward()
    testing.assert_close("weight", weight.grad, (2 * (x.double() @ weight.double().t()).t() @ x.double()).detach())
    assert len(calls) in (0, 2)  # none by the rule, else the forward and one of the two gradients


def test_expanded_gradient(everything):
    x, weight = torch.randn(4, 15, 70, requires_grad=True), torch.randn(50, 70, requires_grad=True)
    _matmul.linear(x, weight).sum().backward()
    testing.assert_close("x", x.grad, weight.detach().double().sum(0).expand_as(x))
    testing.assert_close("weight", weight.grad, x.detach().double().sum((0, 1)).expand_as(weight))


def test_higher_derivatives(everything):
    tensors = [torch.randn(s, requires_grad=True) for s in ((6, 5), (4, 5), (4,))]

    def penalty(linear, *tensors):
        y = linear(*tensors).tanh().sum()
        grads = torch.autograd.grad(y, tensors, create_graph=True)
        (third,) = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors[0], create_graph=True)
        return torch.autograd.grad(third.square().sum(), tensors)

    exact = penalty(F.linear, *(t.detach().double().requires_grad_() for t in tensors))
    for a, e in zip(penalty(_matmul.linear, *tensors), exact, strict=True):
        testing.assert_close("derivative", a, e, 1e-5)


def test_a_recorded_product_is_differentiable(everything):
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    _matmul.matmul(a, b).sum().backward()
    testing.assert_close("a", a.grad, b.detach().double().sum(1).expand(6, 5))


def test_compile_export_and_transforms(everything):
    x, weight, bias = torch.randn(3, 6, 5), torch.randn(4, 5), torch.randn(4)

    def loss(x, weight, bias):
        return _matmul.linear(x, weight, bias).square().sum()

    exact = torch.func.grad(lambda *t: F.linear(*t).square().sum(), argnums=(0, 1, 2))(
        *(t.double() for t in (x, weight, bias))
    )
    for gradient, e in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias), exact, strict=True):
        testing.assert_close("func.grad", gradient, e)
    mapped = torch.vmap(_matmul.linear, in_dims=(0, None, None))(x, weight, bias)
    testing.assert_close("vmap", mapped, F.linear(x, weight, bias).double())
    tensors = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(*tensors).backward()
    for t, e in zip(tensors, exact, strict=True):
        testing.assert_close("compiled", t.grad, e)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return _matmul.linear(x, weight, bias)

    exported = torch.export.export(Layer(), (x,))
    testing.assert_close("exported", exported.module()(x), F.linear(x, weight, bias).double())


def test_autocast(everything):
    x, weight = torch.randn(60, 70, requires_grad=True), torch.randn(50, 70, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = _matmul.linear(x, weight)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, weight))
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_the_layers_use_it(everything, monkeypatch):
    calls = counted(monkeypatch)
    layer = nn.QRNNLayer(20, 40)
    h, _ = layer(torch.randn(9, 4, 20))
    h.sum().backward()
    assert len(calls) in (0, 2)  # the gates and the gradient of the weight
