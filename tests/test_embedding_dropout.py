"""Embedding dropout: whole words dropped, bit for bit in every implementation, and the gradient of the weight."""

import pytest
import torch

import fastlm.ops
from fastlm import _lib, testing
from fastlm.ops import embedding_dropout, philox
from fastlm.ops.embedding_dropout import _adjoint, reference

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = testing.impls("embedding_dropout")
KERNELS = [impl for impl in IMPLS if impl != "reference"]
SIZES = [(50, 7, (9, 2)), (5, 132, (3,)), (1, 1, (2, 3, 1)), (9, 130, ()), (9, 4, (0, 3)), (9, 0, (4,))]


def expected(weight, ids, p, seed, padding_idx=None):
    """What PyTorch's own embedding gives, masked by hand."""
    mask = philox.keep_mask(weight.shape[:1], p, seed, philox.EMBEDDING).to(weight.dtype)
    mask = mask * (1 / (1 - p) if p < 1 else 0.0)
    return torch.nn.functional.embedding(ids, weight, padding_idx) * mask[ids].unsqueeze(-1)


def with_gradient(function, weight, ids, grad, *args, **options):
    leaf = weight.detach().clone().requires_grad_()
    out = function(leaf, ids, *args, **options)
    out.backward(grad)
    return out.detach(), leaf.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize(("V", "E", "shape"), SIZES)
def test_values_and_gradient(impl, dtype, V, E, shape):
    settings = zip([0.0, 0.3, 0.999, 1.0, 0.5, 0.3], map(torch.tensor, testing.SEEDS), (None, 0) * 3, strict=True)
    for p, seed, padding_idx in settings:
        weight, grad = torch.randn(V, E, dtype=dtype), torch.randn(*shape, E, dtype=dtype)
        for ids in (torch.randint(V, shape), torch.randint(V, shape, dtype=torch.int32)):
            wanted = with_gradient(expected, weight, ids, grad, p, seed, padding_idx)
            actual = with_gradient(embedding_dropout, weight, ids, grad, p, seed, padding_idx=padding_idx, impl=impl)
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize(("V", "E", "shape"), [*SIZES, (10000, 400, (70, 20)), (33278, 301, (140, 60))])
def test_cuda_values_and_gradient(dtype, V, E, shape):
    weight, grad = torch.randn(V, E, dtype=dtype), torch.randn(*shape, E, dtype=dtype)
    ids, seed = torch.randint(V, shape), torch.tensor(2**40 + 7)
    out, _ = with_gradient(reference, weight, ids, grad, 0.3, seed, 0)
    _, theirs = with_gradient(reference, weight.cuda(), ids.cuda(), grad.cuda(), 0.3, seed.cuda(), 0)
    _, exact = with_gradient(reference, weight.double(), ids, grad.double(), 0.3, seed, 0)
    for impl in testing.impls("embedding_dropout", "cuda"):
        for words in (ids, ids.int()):
            args = weight.cuda(), words.cuda(), grad.cuda(), 0.3, seed.cuda()
            actual = with_gradient(embedding_dropout, *args, padding_idx=0, impl=impl)
            again = with_gradient(embedding_dropout, *args, padding_idx=0, impl=impl)
            assert torch.equal(actual[0].cpu(), out), impl
            testing.assert_accurate(f"dweight of {impl}", actual[1].cpu(), theirs.cpu(), exact)
            assert torch.equal(actual[1], again[1]), f"{impl} is not deterministic"


@pytest.mark.gpu
def test_cuda_asserts_that_ids_are_words(fresh_python):
    for id in (-1, 5):
        fresh_python(
            "import os, torch\n"
            "from fastlm.ops import embedding_dropout\n"
            f"weight, ids = torch.randn(5, 3, device='cuda'), torch.tensor([2, {id}], device='cuda')\n"
            "try:\n"
            "    embedding_dropout(weight, ids, 0.5), torch.cuda.synchronize()\n"
            "except RuntimeError as error:\n"
            "    os._exit('assert' not in str(error))\n"
            "os._exit(1)\n"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("impl", testing.impls("embedding_dropout", "cuda"))
def test_cuda_graph_draws_fresh_masks(impl):
    weight, ids = torch.ones(512, 8, device="cuda"), torch.arange(512, device="cuda")
    embedding_dropout(weight, ids, 0.5, impl=impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = embedding_dropout(weight, ids, 0.5, impl=impl)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_expanded_gradient(impl):
    weight, ids, seed = torch.randn(11, 6), torch.randint(11, (4, 5)), torch.tensor(5)
    wanted = with_gradient(expected, weight, ids, torch.ones(4, 5, 6), 0.5, seed)
    for view in (testing.strided(weight), weight.t().contiguous().t()):
        for words in (testing.strided(ids), ids.t().contiguous().t()):
            before = view.clone(), words.clone()
            leaf = view.detach().requires_grad_()
            out = embedding_dropout(leaf, words, 0.5, seed, impl=impl)
            out.sum().backward()
            assert torch.equal(out, wanted[0]) and torch.equal(leaf.grad, wanted[1])
            assert torch.equal(view, before[0]) and torch.equal(words, before[1])


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_adjoint_is_the_derivative_of_the_reference(padding_idx):
    weight, ids, seed = torch.randn(6, 3, dtype=torch.float64), torch.randint(6, (4, 5)), torch.tensor(5)
    grad = torch.randn(4, 5, 3, dtype=torch.float64)
    _, wanted = with_gradient(reference, weight, ids, grad, 0.3, seed, padding_idx)
    actual = _adjoint(grad, ids, 6, 0.3, seed, -1 if padding_idx is None else padding_idx)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-14)
    leaf = weight.requires_grad_()
    for impl in ("auto", "reference"):
        assert torch.autograd.gradcheck(lambda w, impl=impl: embedding_dropout(w, ids, 0.3, seed, impl=impl), leaf)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl == "triton"])
def test_second_derivative_of_a_kernel_raises(impl):
    weight = torch.randn(5, 2, requires_grad=True)
    out = embedding_dropout(weight, torch.tensor([1, 2]), 0.1, torch.tensor(0), impl=impl)
    (grad,) = torch.autograd.grad((out**2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_drawn_seed_is_fresh_and_reproducible():
    weight, ids = torch.ones(100, 2), torch.arange(100)
    torch.manual_seed(1)
    first, second = embedding_dropout(weight, ids, 0.5), embedding_dropout(weight, ids, 0.5)
    torch.manual_seed(1)
    assert torch.equal(embedding_dropout(weight, ids, 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("impl", KERNELS)
def test_operators_are_well_registered(impl):
    seed = torch.tensor(3)
    for weight, ids in [
        (torch.randn(5, 3), torch.randint(5, (4, 2))),
        (torch.randn(5, 3).half(), torch.zeros(0).int()),
    ]:
        torch.library.opcheck(_lib.kernel("embedding_dropout_fwd", impl), (weight, ids, 0.3, seed))
        grad = torch.randn(*ids.shape, 3, dtype=weight.dtype)
        torch.library.opcheck(_lib.kernel("embedding_dropout_bwd", impl), (grad, ids, 5, 0.3, seed, 1))


@pytest.mark.parametrize("impl", KERNELS)
def test_compile_export_and_transforms(impl):
    def loss(weight, ids, seed):
        return (embedding_dropout(weight, ids, 0.5, seed, padding_idx=2, impl=impl) ** 2).sum()

    seed = torch.tensor(9)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps in (5, 19):
        weight, ids = torch.randn(11, 6, requires_grad=True), torch.randint(11, (steps, 3))
        compiled(weight, ids, seed).backward()
        assert torch.equal(weight.grad, torch.func.grad(loss)(weight.detach(), ids, seed))

    class Module(torch.nn.Module):
        def forward(self, weight, ids, seed):
            return embedding_dropout(weight, ids, 0.5, seed, impl=impl)

    given = torch.randn(11, 6), torch.randint(11, (5, 3)), seed
    assert torch.equal(torch.export.export(Module(), given).module()(*given), Module()(*given))


def test_errors():
    weight, ids, seed = torch.randn(5, 3), torch.tensor([1, 2]), torch.tensor(1)
    with pytest.raises(ValueError, match=r"weight must have shape \[V, E\], got \[3\]"):
        embedding_dropout(weight[0], ids, 0.5, seed)
    with pytest.raises(TypeError, match="weight must be float32.*got torch.int64"):
        embedding_dropout(weight.long(), ids, 0.5, seed)
    with pytest.raises(TypeError, match="ids must be an int64 or int32 tensor, got torch.float32"):
        embedding_dropout(weight, ids.float(), 0.5, seed)
    with pytest.raises(TypeError, match="ids must be on cpu like weight, got meta"):
        embedding_dropout(weight, ids.to("meta"), 0.5, seed)
    for id in (-1, 5):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, 5\), the vocabulary, got {id}"):
            embedding_dropout(weight, torch.tensor([2, id]), 0.5, seed)
        with pytest.raises(ValueError, match=rf"padding_idx must lie in \[0, 5\), the vocabulary, got {id}"):
            embedding_dropout(weight, ids, 0.5, seed, padding_idx=id)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        embedding_dropout(weight, ids, 1.5, seed)
    with pytest.raises(TypeError, match="seed must be an int64 scalar tensor, got int"):
        embedding_dropout(weight, ids, 0.5, 3)
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference'"):
        embedding_dropout(weight, ids, 0.5, seed, impl="fast")
    with pytest.raises(RuntimeError, match="embedding_dropout: there is no 'cpu' kernel"):
        embedding_dropout(weight, ids, 0.5, seed, impl="cpu")


def test_which():
    assert fastlm.ops.which(embedding_dropout, torch.randn(2, 3)) == "reference"
