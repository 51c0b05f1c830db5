"""Locked dropout: one mask for all steps, bit for bit in every implementation, and its gradient."""

import pytest
import torch

import fastlm.ops
from fastlm import _lib, testing
from fastlm.ops import locked_dropout, philox
from fastlm.ops.locked_dropout import reference

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = testing.impls("locked_dropout")
KERNELS = [impl for impl in IMPLS if impl != "reference"]
SHAPES = [(9, 3, 37), (8, 2, 520), (1, 1, 1), (17, 4, 3), (70, 1, 9), (0, 3, 7), (5, 0, 7), (5, 3, 0)]
PROBABILITIES = [0.0, 0.3, 0.999, 1.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient(impl, dtype, shape):
    for p, seed in zip([*PROBABILITIES, 0.5, 0.3], map(torch.tensor, testing.SEEDS), strict=True):
        x, grad = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
        out = locked_dropout(x, p, seed, impl=impl)
        out.backward(grad)
        keep = philox.keep_mask(shape[1:], p, seed, philox.LOCKED)
        mask = keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)
        assert torch.equal(out, x.detach() * mask) and torch.equal(x.grad, grad * mask)


def _parts_are_those_of_the_whole(x, grad, seed, impl):
    whole, wanted = (reference(t.detach(), 0.4, seed) for t in (x, grad))
    for start, stop in [(0, 2), (2, 3), (3, 7), (7, 7)]:
        part = x[:, start:stop].detach().requires_grad_()
        out = locked_dropout(part, 0.4, seed, offset=start * x.shape[2], impl=impl)
        out.backward(grad[:, start:stop])
        assert torch.equal(out, whole[:, start:stop]) and torch.equal(part.grad, wanted[:, start:stop])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [37, 520, 6], ids=str)  # offsets with each of the generator's alignments
def test_a_part_of_a_batch_has_the_mask_of_the_whole(impl, width):
    _parts_are_those_of_the_whole(torch.randn(9, 7, width), torch.randn(9, 7, width), torch.tensor(2**40 + 7), impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", testing.impls("locked_dropout", "cuda"))
def test_cuda_part_of_a_batch_has_the_mask_of_the_whole(impl):
    for width in (37, 1150, 6):
        x, grad = (torch.randn(9, 7, width, device="cuda") for _ in range(2))
        _parts_are_those_of_the_whole(x, grad, torch.tensor(2**40 + 7, device="cuda"), impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 20, 1150), (5, 60, 2500)], ids=str)
def test_cuda_values_and_gradient(dtype, shape):
    x, grad, seed = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.tensor(2**40 + 7)
    for impl in testing.impls("locked_dropout", "cuda"):
        on_gpu = x.cuda().requires_grad_()
        out = locked_dropout(on_gpu, 0.3, seed.cuda(), impl=impl)
        out.backward(grad.cuda())
        assert torch.equal(out.cpu(), reference(x, 0.3, seed)), impl
        assert torch.equal(on_gpu.grad.cpu(), reference(grad, 0.3, seed)), impl


@pytest.mark.gpu
@pytest.mark.parametrize("impl", testing.impls("locked_dropout", "cuda"))
def test_cuda_graph_draws_fresh_masks(impl):
    x = torch.ones(9, 2, 512, device="cuda")
    locked_dropout(x, 0.5, impl=impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = locked_dropout(x, 0.5, impl=impl)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_expanded_gradient(impl):
    x, seed = torch.randn(9, 3, 34), torch.tensor(5)
    expected = reference(x, 0.5, seed)
    for view in (testing.strided(x), x.permute(1, 2, 0).contiguous().permute(2, 0, 1), x.double().float()):
        before = view.clone()
        view.requires_grad_()
        out = locked_dropout(view, 0.5, seed, impl=impl)
        out.sum().backward()
        assert torch.equal(out, expected) and torch.equal(view, before)
        assert torch.equal(view.grad, reference(torch.ones(9, 3, 34), 0.5, seed))
    row = torch.randn(1, 3, 34)
    assert torch.equal(
        locked_dropout(row.expand(9, 3, 34), 0.5, seed, impl=impl), reference(row.expand(9, 3, 34), 0.5, seed)
    )


def test_float64_and_gradcheck():
    x, seed = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True), torch.tensor(5)
    assert torch.equal(locked_dropout(x, 0.3, seed), reference(x, 0.3, seed))
    for impl in ("auto", "reference"):
        for offset in (0, 5):
            args = {"offset": offset, "impl": impl}
            assert torch.autograd.gradcheck(lambda x, args=args: locked_dropout(x, 0.3, seed, **args), x)
        assert torch.autograd.gradgradcheck(lambda x, impl=impl: locked_dropout(x, 0.3, seed, impl=impl), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative(impl):
    x, seed = torch.randn(3, 2, 4, requires_grad=True), torch.tensor(5)
    out = locked_dropout(x, 0.3, seed, offset=3, impl=impl)
    (grad,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    ones = torch.ones(3, 2, 4)
    torch.testing.assert_close(second, 2 * reference(reference(ones, 0.3, seed, 3), 0.3, seed, 3))


def test_drawn_seed_is_fresh_and_reproducible():
    x = torch.ones(2, 5, 100)
    torch.manual_seed(1)
    first, second = locked_dropout(x, 0.5), locked_dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(locked_dropout(x, 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("impl", KERNELS)
def test_operator_is_well_registered(impl):
    for x in (torch.randn(3, 2, 5), torch.randn(0, 2, 5), torch.randn(2, 5, 3).half().permute(2, 0, 1)):
        torch.library.opcheck(_lib.kernel("locked_dropout_fwd", impl), (x, 0.3, torch.tensor(3), 5))


@pytest.mark.parametrize("impl", KERNELS)
def test_compile_export_and_transforms(impl):
    def loss(x, seed):
        return (locked_dropout(x, 0.5, seed, offset=x.shape[2], impl=impl) ** 2).sum()

    seed = torch.tensor(9)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps in (5, 19):
        x = torch.randn(steps, 3, 7, requires_grad=True)
        compiled(x, seed).backward()
        assert torch.equal(x.grad, torch.func.grad(loss)(x.detach(), seed))

    class Module(torch.nn.Module):
        def forward(self, x, seed):
            return locked_dropout(x, 0.5, seed, impl=impl)

    x = torch.randn(5, 3, 7)
    assert torch.equal(torch.export.export(Module(), (x, seed)).module()(x, seed), reference(x, 0.5, seed))


def test_errors():
    x, seed = torch.randn(2, 3, 4), torch.tensor(1)
    with pytest.raises(ValueError, match=r"x must have shape \[T, B, H\], got \[3, 4\]"):
        locked_dropout(x[0], 0.5, seed)
    with pytest.raises(TypeError, match="x must be float32.*got torch.int64"):
        locked_dropout(x.long(), 0.5, seed)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got -0.5"):
        locked_dropout(x, -0.5, seed)
    with pytest.raises(ValueError, match="offset must be at least 0, got -1"):
        locked_dropout(x, 0.5, seed, offset=-1)
    with pytest.raises(TypeError, match="seed must be an int64 scalar tensor, got int"):
        locked_dropout(x, 0.5, 3)
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference'"):
        locked_dropout(x, 0.5, seed, impl="fast")
    with pytest.raises(RuntimeError, match="locked_dropout: there is no 'cpu' kernel"):
        locked_dropout(x, 0.5, seed, impl="cpu")


def test_which():
    assert fastlm.ops.which(locked_dropout, torch.randn(2, 3, 4)) == "reference"
