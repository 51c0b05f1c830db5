"""ForgetMult: values and gradients against float64, strides, splits, compilers, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm.ops
from fastlm import testing
from fastlm.ops import forget_mult
from fastlm.ops.forget_mult import _adjoint, reference

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = [impl for impl in testing.impls("forget_mult") if impl != "cpu"]  # "auto" is the CPU kernel where there is one
SHAPES = [(1, 33, 8), (2, 3, 37), (5, 8, 1), (63, 1, 400), (5, 3, 1150), (1, 8, 1150), (70, 5, 9)]
EMPTY = [(0, 3, 7), (5, 0, 7), (5, 3, 0), (0, 0, 0)]


def inputs(shape, dtype=torch.float32, state=None, h0=True):
    f, x = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
    start = torch.randn(shape[1:]).to(state or dtype) if h0 else None
    return [t.requires_grad_() if t is not None else None for t in (f, x, start)]


def plain(f, x, h0=None, reverse=False):
    """The recurrence as a user would write it: everything in the dtype of the inputs."""
    h = torch.zeros_like(f[0]) if h0 is None else h0.to(f.dtype)
    out, steps = [], list(zip(f.unbind(), x.unbind(), strict=True))
    for gate, value in reversed(steps) if reverse else steps:
        h = gate * value + (1 - gate) * h
        out.append(h)
    return torch.stack(out[::-1] if reverse else out)


def with_gradients(function, tensors, grad, **options):
    """The result of `function` and the gradients of all given tensors, from copies of the tensors."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    out.backward(grad.to(out.dtype))
    return [out.detach()] + [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients(dtype, shape, reverse):
    for h0 in (True, False):
        tensors, grad = inputs(shape, dtype, h0=h0), torch.randn(shape).to(dtype)
        exact = with_gradients(reference, [t if t is None else t.double() for t in tensors], grad, reverse=reverse)
        theirs = with_gradients(plain, tensors, grad, reverse=reverse)
        for impl in (impl for impl in IMPLS if testing.quick(impl, tensors[0].numel())):
            ours = with_gradients(forget_mult, tensors, grad, reverse=reverse, impl=impl)
            for name, *results in zip(("h", "df", "dx", "dh0"), ours, theirs, exact, strict=False):
                testing.assert_accurate(f"{name} of {impl}", *results)
                assert results[0].dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_values_and_gradients(dtype, shape):
    for reverse, h0, state in [(False, True, dtype), (True, True, torch.float32), (True, False, None)]:
        tensors, grad = inputs(shape, dtype, state, h0), torch.randn(shape).to(dtype)
        exact = with_gradients(reference, [t if t is None else t.double() for t in tensors], grad, reverse=reverse)
        theirs = with_gradients(plain, tensors, grad, reverse=reverse)
        on_gpu = [t if t is None else t.cuda() for t in tensors]
        for impl in testing.impls("forget_mult", "cuda"):
            ours = with_gradients(forget_mult, on_gpu, grad.cuda(), reverse=reverse, impl=impl)
            for name, *results in zip(("h", "df", "dx", "dh0"), ours, theirs, exact, strict=False):
                testing.assert_accurate(f"{name} of {impl}", results[0].cpu(), *results[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl):
    for shape in EMPTY:
        f, x, h0 = inputs(shape)
        out = forget_mult(f, x, h0, impl=impl)
        assert out.shape == shape
        out.sum().backward()
        assert f.grad.shape == x.grad.shape == shape
        assert h0.grad is None or not h0.grad.any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("h0", [False, True])
def test_adjoint_is_the_derivative_of_the_reference(reverse, h0):
    for shape in [(0, 2, 3), (1, 1, 1), (7, 2, 3)]:
        tensors, grad = inputs(shape, torch.float64, h0=h0), torch.randn(shape, dtype=torch.float64)
        given = [t for t in tensors if t is not None]
        out = reference(*tensors, reverse)
        expected = torch.autograd.grad(out, given, grad, allow_unused=True, materialize_grads=True)
        actual = _adjoint(grad, *[None if t is None else t.detach() for t in tensors], out.detach(), reverse)
        for result, wanted in zip(actual, expected, strict=False):
            torch.testing.assert_close(result, wanted, rtol=0, atol=1e-14)


def test_gradcheck():
    assert torch.autograd.gradcheck(reference, inputs((4, 2, 3), torch.float64))
    assert torch.autograd.gradcheck(forget_mult, inputs((4, 2, 3), torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 12), st.integers(0, 4), st.integers(0, 70)),
    st.permutations(range(3)),
    st.sampled_from(["dense", "strided", "expanded"]),
    st.booleans(),
    st.sampled_from(testing.DTYPES),
)
def test_any_shape_and_stride(shape, order, layout, reverse, dtype):
    torch.manual_seed(sum(shape))
    f, x, h0 = inputs(shape, dtype, torch.float32)
    f, grad = 0.9 * f.detach(), torch.randn(shape).to(dtype)  # nearer to 1, dh0 = r - f r loses its relative accuracy
    if layout == "expanded":
        f, h0, grad = f[:, :1].expand(shape), h0[:1].expand(shape[1:]), grad[:, :, :1].expand(shape)
    elif layout == "strided":
        f, x, h0, grad = testing.strided(f), testing.strided(x), testing.strided(h0), testing.strided(grad)
    inverse = [order.index(d) for d in range(3)]
    f, x = (t.detach().permute(order).contiguous().permute(inverse).requires_grad_() for t in (f, x))
    before = [t.clone() for t in (f, x, h0)]
    out = forget_mult(f, x, h0, reverse=reverse)
    gradients = torch.autograd.grad(out, (f, x, h0), grad, allow_unused=True, materialize_grads=True)
    exact = [t.detach().double().requires_grad_() for t in (f, x, h0)]
    expected = reference(*exact, reverse)
    wanted = torch.autograd.grad(expected, exact, grad.double(), allow_unused=True, materialize_grads=True)
    tolerance = 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, *results in zip(("h", "df", "dx", "dh0"), (out, *gradients), (expected, *wanted), strict=True):
        testing.assert_close(name, *results, tolerance, scale=1.0)
    assert all(torch.equal(t, copy) for t, copy in zip((f, x, h0), before, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_gradient(impl):
    f, x, h0 = inputs((5, 3, 37))
    ones = with_gradients(forget_mult, (f, x, h0), torch.ones(5, 3, 37), impl=impl)
    forget_mult(f, x, h0, impl=impl).sum().backward()
    assert all(torch.equal(t.grad, wanted) for t, wanted in zip((f, x, h0), ones[1:], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_split_across_calls_equals_one_call(impl, reverse):
    f, x, h0 = inputs((11, 3, 37))
    whole = forget_mult(f, x, h0, reverse=reverse, impl=impl)
    parts, state, cuts = [], h0, [(0, 4), (4, 5), (5, 11)]
    for begin, end in reversed(cuts) if reverse else cuts:
        parts.append(forget_mult(f[begin:end], x[begin:end], state, reverse=reverse, impl=impl))
        state = parts[-1][0 if reverse else -1]
    assert torch.equal(torch.cat(parts[::-1] if reverse else parts), whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_state_of_a_16_bit_call(impl):
    f, x, h0 = inputs((5, 3, 37), torch.bfloat16, torch.float32)
    out = forget_mult(f, x, h0, impl=impl)
    out.sum().backward()
    assert out.dtype == f.grad.dtype == torch.bfloat16 and h0.grad.dtype == torch.float32
    exact = reference(f.double(), x.double(), h0.double())
    assert testing.error(out, exact) < torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_channel_only(impl, bad):
    f, x, h0 = inputs((9, 2, 37))
    with torch.no_grad():
        x[4, 1, 20] = bad
    out = forget_mult(f, x, h0, impl=impl)
    expected = torch.zeros(9, 2, 37, dtype=torch.bool)
    expected[4:, 1, 20] = True
    assert torch.equal(~out.isfinite(), expected)
    out.sum().backward()
    assert not f.grad[4, 1, 20].isfinite() and f.grad.isfinite().sum() >= f.numel() - 9


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_operators_are_well_registered():
    for shape, h0 in [((5, 3, 7), True), ((5, 3, 7), False), ((0, 3, 7), True)]:
        f, x, start = inputs(shape, h0=h0)
        out = forget_mult(f, x, start).detach()
        torch.library.opcheck(torch.ops.fastlm.forget_mult_fwd.default, (f, x, start, h0))
        torch.library.opcheck(torch.ops.fastlm.forget_mult_bwd.default, (out, f, x, start, out, h0))


def test_compile_export_and_transforms():
    def loss(f, x, h0):
        return (forget_mult(f, x, h0, reverse=True) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (5, 9):
        tensors = inputs((steps, 3, 37))
        compiled(*tensors).backward()
        expected = torch.func.grad(loss, argnums=(0, 1, 2))(*[t.detach() for t in tensors])
        assert all(torch.equal(t.grad, wanted) for t, wanted in zip(tensors, expected, strict=True))

    class Module(torch.nn.Module):
        def forward(self, f, x):
            return forget_mult(f, x)

    f, x, _ = (t.detach() for t in inputs((5, 3, 37)))
    assert torch.equal(torch.export.export(Module(), (f, x)).module()(f, x), forget_mult(f, x))


def test_second_derivative_raises():
    f, x, _ = inputs((5, 3, 7))
    # the gradient in x is f r: its derivative in f exists though the incoming gradient is a constant
    (dx,) = torch.autograd.grad(forget_mult(f, x, impl="auto").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="forget_mult has no second derivative"):
        torch.autograd.grad(dx.sum(), f, allow_unused=True)
    (dx,) = torch.autograd.grad(forget_mult(f, x, impl="reference").sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), f)[0].any()


def test_result_does_not_depend_on_the_thread_count(native):
    threads, results = torch.get_num_threads(), []
    tensors, grad = inputs((9, 3, 1150)), torch.randn(9, 3, 1150)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(forget_mult, tensors, grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_every_instruction_set(fresh_python, instruction_set):
    fresh_python(
        "import torch\n"
        "from fastlm import _lib, testing\n"
        "from fastlm.ops.forget_mult import forget_mult, reference\n"
        f"assert _lib.instruction_set() == {instruction_set!r}\n"
        "for dtype in testing.DTYPES:\n"
        "    f, x, h = (torch.rand(s).to(dtype).requires_grad_() for s in [(9, 3, 61), (9, 3, 61), (3, 61)])\n"
        "    wide = [t.detach().double().requires_grad_() for t in (f, x, h)]\n"
        "    out, exact = forget_mult(f, x, h, impl='cpu'), reference(*wide)\n"
        "    (out * out.detach()).sum().backward(), (exact * out.detach()).sum().backward()\n"
        "    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps\n"
        "    testing.assert_close('h', out, exact, limit)\n"
        "    for t, w in zip((f, x, h), wide):\n"
        "        testing.assert_close('gradient', t.grad, w.grad, 2 * limit)\n",
        FASTLM_CPU=instruction_set,
    )


def test_errors():
    f, x, h0 = (t.detach() for t in inputs((5, 3, 7)))
    with pytest.raises(TypeError, match="f must be float32.*got torch.int64"):
        forget_mult(f.long(), x)
    with pytest.raises(ValueError, match=r"f must have shape \[T, B, H\], got \[3, 7\]"):
        forget_mult(f[0], x[0])
    with pytest.raises(TypeError, match="x must be a tensor, got float"):
        forget_mult(f, 0.5)
    with pytest.raises(TypeError, match="x must be torch.float32 like f, got torch.bfloat16"):
        forget_mult(f, x.bfloat16())
    with pytest.raises(TypeError, match="x must be on cpu like f, got meta"):
        forget_mult(f, x.to("meta"))
    with pytest.raises(ValueError, match=r"x must have shape \[T, B, H\] = \[5, 3, 7\], got \[5, 3, 1\]"):
        forget_mult(f, x[:, :, :1])
    with pytest.raises(ValueError, match=r"h0 must have shape \[B, H\] = \[3, 7\], got \[1, 3, 7\]"):
        forget_mult(f, x, h0[None])
    with pytest.raises(TypeError, match="h0 must be torch.float32 like f, got torch.float64"):
        forget_mult(f, x, h0.double())
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference'"):
        forget_mult(f, x, impl="fast")
    with pytest.raises((RuntimeError, TypeError), match="forget_mult: "):
        forget_mult(f, x, impl="cuda")


def test_which():
    expected = "cpu" if "cpu" in testing.impls("forget_mult") else "reference"
    assert fastlm.ops.which(forget_mult, torch.rand(2, 3, 4)) == expected
    assert fastlm.ops.which(forget_mult, torch.rand(2, 3, 4).double()) == "reference"
