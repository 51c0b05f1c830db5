"""DropConnect: the mask, its adjoint, and that every implementation drops the same elements."""

import math

import pytest
import torch

import fastlm.ops
from fastlm import _lib, testing
from fastlm.ops import dropconnect, dropconnect_mask, philox

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(0,), (1,), (5,), (4600, 37), (3, 0, 2), (7, 11, 13), ()]
PROBABILITIES = [0.0, 0.3, 0.5, 0.999, 1.0]


@pytest.mark.parametrize("impl", testing.impls("dropconnect_mask"))
@pytest.mark.parametrize("p", PROBABILITIES)
def test_masks_are_equal_bit_for_bit(impl, p):
    count = 4099 if testing.quick(impl, 4099) else 1027  # three programs, the last one of three elements
    for seed in map(torch.tensor, testing.SEEDS):
        for stream in range(4):
            expected = philox.keep_mask((count,), p, seed, stream)
            assert torch.equal(dropconnect_mask((count,), p, seed, stream=stream, impl=impl), expected)


@pytest.mark.parametrize("impl", testing.impls("dropconnect"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_values_and_gradient(impl, shape, dtype):
    if not testing.quick(impl, math.prod(shape)):
        shape = (46, 37)
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad, seed = torch.randn(shape, dtype=dtype), philox.draw_seed("cpu")
    out = dropconnect(weight, 0.3, seed, impl=impl)
    out.backward(grad)
    keep = philox.keep_mask(shape, 0.3, seed, philox.WEIGHT)
    assert torch.equal(out, torch.where(keep, weight.detach() * (1 / 0.7), 0))
    assert torch.equal(weight.grad, torch.where(keep, grad * (1 / 0.7), 0))


@pytest.mark.parametrize("impl", testing.impls("dropconnect"))
def test_strided_weight_and_expanded_gradient(impl):
    weight, seed = torch.randn(9, 6).requires_grad_(), torch.tensor(5)
    view = testing.strided(weight)
    out = dropconnect(view, 0.5, seed, impl=impl)
    assert torch.equal(out, dropconnect(weight, 0.5, seed, impl="reference"))
    out.sum().backward()
    assert torch.equal(view.grad, philox.keep_mask((9, 6), 0.5, seed, 0) * 2.0)


@pytest.mark.parametrize("impl", testing.impls("dropconnect"))
def test_dropped_is_zero_even_where_the_weight_is_not_finite(impl):
    weight = torch.full((4096,), float("inf"))
    out = dropconnect(weight, 0.5, torch.tensor(1), impl=impl)
    assert set(out.tolist()) == {0.0, float("inf")}
    assert not dropconnect(weight, 1.0, torch.tensor(1), impl=impl).any()


def test_kept_share():
    for p in (0.1, 0.5, 0.9):
        kept = dropconnect_mask((1 << 16,), p, torch.tensor(11)).double().mean().item()
        assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / (1 << 16)) ** 0.5


def test_drawn_seed_is_fresh_and_reproducible():
    weight = torch.ones(1000)
    torch.manual_seed(1)
    first, second = dropconnect(weight, 0.5), dropconnect(weight, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropconnect(weight, 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("impl", [impl for impl in testing.impls("dropconnect") if impl in ("auto", "triton")])
def test_operators_are_well_registered(impl):
    seed = torch.tensor(3)
    for args in [
        (torch.randn(3, 5), 0.5, seed),
        (torch.randn(0), 0.5, seed),
        (torch.randn(4, 4).half().t(), 0.1, seed),
    ]:
        torch.library.opcheck(_lib.kernel("dropconnect_fwd", impl), args)
    torch.library.opcheck(_lib.kernel("dropconnect_mask", impl), (seed, 13, 0.5, 2))


@pytest.mark.parametrize("impl", [impl for impl in testing.impls("dropconnect") if impl in ("auto", "triton")])
def test_compile_and_transforms(impl):
    def loss(weight, seed):
        return (dropconnect(weight, 0.5, seed, impl=impl) ** 2).sum()

    seed = torch.tensor(9)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 130):
        weight = torch.randn(n, 3, requires_grad=True)
        compiled(weight, seed).backward()
        expected = torch.func.grad(loss)(weight.detach(), seed)
        assert torch.allclose(weight.grad, expected)


def test_second_derivative_raises():
    weight = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad((dropconnect(weight, 0.5, torch.tensor(0)) ** 2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_result_does_not_depend_on_the_thread_count():
    weight, seed, threads = torch.randn(300_001), torch.tensor(5), torch.get_num_threads()
    expected = dropconnect(weight, 0.5, seed)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(dropconnect(weight, 0.5, seed), expected)
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set(fresh_python, instruction_set):
    fresh_python(
        "import torch\n"
        "from fastlm import _lib\n"
        "from fastlm.ops import dropconnect\n"
        f"assert _lib.instruction_set() == {instruction_set!r}\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    w, s = torch.randn(4099, dtype=dtype) * torch.logspace(-9, 5, 4099, dtype=dtype), torch.tensor(77)\n"
        "    assert torch.equal(dropconnect(w, 0.3, s, impl='cpu'), dropconnect(w, 0.3, s, impl='reference'))\n",
        FASTLM_CPU=instruction_set,
    )


def test_errors():
    weight, seed = torch.randn(3), torch.tensor(1)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        dropconnect(weight, 1.5, seed)
    with pytest.raises(TypeError, match="weight must be float32.*got torch.int64"):
        dropconnect(torch.arange(3), 0.5, seed)
    with pytest.raises(TypeError, match="seed must be an int64 scalar tensor, got int"):
        dropconnect(weight, 0.5, 3)
    with pytest.raises(ValueError, match=r"seed must be a scalar tensor, got shape \[2\]"):
        dropconnect(weight, 0.5, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference'"):
        dropconnect(weight, 0.5, seed, impl="fast")
    with pytest.raises((RuntimeError, TypeError), match="dropconnect: "):
        dropconnect(weight, 0.5, seed, impl="cuda")
    with pytest.raises(ValueError, match="stream must be 0, 1, 2 or 3, got 4"):
        dropconnect_mask((3,), 0.5, seed, stream=4)


def test_which():
    expected = "cpu" if "cpu" in testing.impls("dropconnect") else "reference"
    assert fastlm.ops.which("dropconnect", torch.randn(3)) == expected
    assert fastlm.ops.which(dropconnect, torch.randn(3)) == expected
    assert fastlm.ops.which("dropconnect", torch.randn(3, dtype=torch.float64)) == "reference"
    with pytest.raises(ValueError, match="unknown operator 'conv'"):
        fastlm.ops.which("conv", torch.randn(3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_cuda_drops_the_same_elements(dtype):
    for shape in [(4600, 37), (1, 301), (5,), (0,), ()]:
        weight, seed = torch.randn(shape, dtype=dtype), torch.tensor(2**40 + 7)
        expected = dropconnect(weight, 0.3, seed, impl="reference")
        for impl in testing.impls("dropconnect", "cuda"):
            on_gpu = weight.cuda().requires_grad_()
            out = dropconnect(on_gpu, 0.3, seed.cuda(), impl=impl)
            out.sum().backward()
            assert torch.equal(out.cpu(), expected), impl
            assert torch.equal(on_gpu.grad != 0, philox.keep_mask(shape, 0.3, seed, 0).cuda()), impl


@pytest.mark.gpu
def test_cuda_mask_of_every_stream():
    for seed in map(torch.tensor, testing.SEEDS):
        for impl in testing.impls("dropconnect_mask", "cuda"):
            for stream in range(4):
                for p in PROBABILITIES:
                    mask = dropconnect_mask((4099,), p, seed.cuda(), stream=stream, impl=impl)
                    assert torch.equal(mask.cpu(), philox.keep_mask((4099,), p, seed, stream)), impl


@pytest.mark.gpu
@pytest.mark.parametrize("impl", testing.impls("dropconnect", "cuda"))
def test_cuda_graph_draws_fresh_masks(impl):
    weight = torch.ones(4096, device="cuda")
    dropconnect(weight, 0.5, impl=impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dropconnect(weight, 0.5, impl=impl)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
