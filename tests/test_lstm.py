"""One LSTM layer in one direction: values and gradients, the mask, states, transforms and errors."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastlm import _lib, ops, testing
from fastlm.ops import lstm, philox
from fastlm.ops.lstm import _adjoint, _forward, _Opaque, reference

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = [impl for impl in testing.impls("lstm") if impl != "auto"]
KERNELS = [impl for impl in IMPLS if impl in ("cpu", "triton")]
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 4, 7),
    (9, 2, 1, 3),
    (2, 1, 17, 33),
    (4, 23, 9, 70),
    (2, 2, 5, 130),
    (0, 3, 4, 5),
    (4, 0, 3, 2),
    (3, 2, 0, 4),
]
SEED = torch.tensor(12345)


def arguments(shape, dtype=torch.float64, *, bias=True, state=None):
    T, B, inputs, H = shape
    sizes = [(T, B, inputs), (B, H), (B, H), (4 * H, inputs), (4 * H, H)] + [(4 * H,)] * 2 * bias
    tensors = [torch.randn(size, dtype=torch.float64) * (1 if i < 3 else 0.5) for i, size in enumerate(sizes)]
    return [t.to(state or dtype if i in (1, 2) else dtype).requires_grad_() for i, t in enumerate(tensors)]


def gradients(outputs, inputs, weights):
    loss = sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def masked(args, p=0.4):
    keep = philox.keep_mask(args[4].shape, p, SEED, philox.WEIGHT)
    return [*args[:4], torch.where(keep, args[4] * philox.scale(p), 0), *args[5:]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(impl, shape, bias, reverse):
    if not testing.quick(impl, shape[0] * shape[1] * shape[3]):
        pytest.skip("the interpreter is slow")
    args = arguments(shape, torch.float32, bias=bias)
    exact = [a.detach().double().requires_grad_() for a in args]
    p = 0.4 if testing.quick(impl, args[4].numel() // 10) else 0.0
    expected = reference(*masked(exact, p), reverse=reverse)
    actual = lstm(*args, weight_dropout=p, seed=SEED, reverse=reverse, impl=impl)
    weights = [torch.randn_like(y) for y in expected]
    for name, a, e in zip("yhc", actual, expected, strict=True):
        testing.assert_close(name, a, e, 2e-6)
    names = ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"]
    pairs = zip(names, gradients(actual, args, weights), gradients(expected, exact, weights), strict=False)
    for name, a, e in pairs:
        testing.assert_close(name, a, e, 5e-6)


def test_reference_is_the_textbook_cell():
    """Against torch's single-step cell, which shares nothing with either implementation."""
    x, h, c, *weights = arguments((4, 3, 5, 6))
    y, h_n, c_n = reference(x, h, c, *weights)
    for step, expected in zip(x, y, strict=True):
        h, c = torch.lstm_cell(step, (h, c), *weights)
        torch.testing.assert_close(expected, h)
    torch.testing.assert_close((h_n, c_n), (h, c))


def test_hand_written_adjoint():
    """The mathematics of the module docstring, step by step, is what autograd finds."""
    args = arguments((4, 2, 3, 5))
    outputs = reference(*args)
    dy, dh, dc = (torch.randn_like(y) for y in outputs)
    found = torch.autograd.grad(outputs, args, (dy, dh, dc))
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = (a.detach() for a in args)
    h, c, tape = h0, c0, []
    for step in x:
        i, f, g, o = (step @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        tape.append((step, h, c, i, f, g, o))
        c = f * c + i * g
        tape[-1] += (c,)
        h = o * c.tanh()
    dx, dw_ih, dw_hh, db = torch.zeros_like(x), 0, 0, 0
    for t, (step, h, c, i, f, g, o, after) in reversed(list(enumerate(tape))):
        dh = dh + dy[t]
        dc = dc + dh * o * (1 - after.tanh() ** 2)
        gates = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * after.tanh() * o * (1 - o)
        da = torch.cat(gates, -1)
        dx[t], dh, dc = da @ w_ih, da @ w_hh, dc * f
        dw_ih, dw_hh, db = dw_ih + da.T @ step, dw_hh + da.T @ h, db + da.sum(0)
    for expected, actual in zip((dx, dh, dc, dw_ih, dw_hh, db, db), found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_accuracy(impl, dtype):
    args = arguments((13, 4, 20, 24), dtype)
    exact = reference(*masked([a.detach().double() for a in args]))
    x, h, c, *weights = masked([a.detach() for a in args])
    plain = torch._VF.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, False, False, False)
    actual = lstm(*args, weight_dropout=0.4, seed=SEED, impl=impl)
    for name, a, p, e in zip(["y", "h_n", "c_n"], actual, plain, exact, strict=True):
        assert a.dtype == dtype
        testing.assert_accurate(name, a, p.view_as(a), e)


@pytest.mark.parametrize("impl", IMPLS)
def test_both_implementations_drop_the_same_weights(impl):
    args = arguments((6, 2, 3, 11), torch.float32)
    expected = lstm(*masked(args), impl="reference")
    actual = lstm(*args, weight_dropout=0.4, seed=SEED, impl=impl)
    torch.testing.assert_close(actual, expected)
    keep = ops.dropconnect_mask((44, 11), 0.4, SEED)
    grad = torch.autograd.grad(actual[0].sum(), args[4])[0]
    assert not grad[~keep].any() and grad[keep].all()


@pytest.mark.parametrize("impl", IMPLS)
def test_everything_dropped(impl):
    args = arguments((4, 2, 3, 5), torch.float32)
    actual = lstm(*args, weight_dropout=1.0, seed=SEED, impl=impl)
    torch.testing.assert_close(actual, lstm(*args[:4], torch.zeros(20, 5), *args[5:], impl=impl))


def test_drawn_seeds_are_fresh_and_reproducible():
    args = arguments((4, 2, 3, 8), torch.float32)
    torch.manual_seed(3)
    first, second = (lstm(*args, weight_dropout=0.5)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, lstm(*args, weight_dropout=0.5)[0]) and not torch.equal(first, second)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_call_equals_any_split(impl, dtype, reverse):
    x, h, c, *weights = (a.detach() for a in arguments((9, 3, 4, 6), dtype, state=torch.float32))
    whole = lstm(x, h, c, *weights, weight_dropout=0.3, seed=SEED, reverse=reverse, impl=impl)
    parts = [None] * 4
    chunks = x.split([4, 0, 1, 4])
    for i in range(4)[:: -1 if reverse else 1]:
        parts[i], h, c = lstm(chunks[i], h, c, *weights, weight_dropout=0.3, seed=SEED, reverse=reverse, impl=impl)
    assert h.dtype == c.dtype == torch.float32
    # with 16-bit states the cell would be rounded at each seam, and differ by 1e-3
    torch.testing.assert_close(
        (torch.cat(parts), h, c), whole, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2
    )
    torch.testing.assert_close((h, c), whole[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_state_is_not_rounded(impl, dtype):
    args = [a.detach() for a in arguments((9, 3, 4, 6), dtype, state=torch.float32)]
    _, _, c = lstm(*args, impl=impl)
    # a kernel's products are 16-bit ones for 16-bit inputs, whatever the state; the CPU's has none in float16
    rounded = impl == "triton" or (impl == "cpu" and dtype == torch.bfloat16)
    tolerance = torch.finfo(dtype).eps if rounded else 1e-5
    testing.assert_close("c_n", c, reference(*[a.double() for a in args])[2], tolerance)
    if impl in ("cpu", "triton"):  # where the write gate is shut, a cell passes unchanged, as it would not in 16 bits
        open_ = torch.zeros(24, dtype=dtype)
        open_[:6], open_[6:12] = -100, 100
        x, h, c, w_ih, w_hh, *_ = args
        kept = lstm(x, h, c, 0 * w_ih, 0 * w_hh, open_, impl=impl)[2]
        assert torch.equal(kept, c)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_expanded_gradients(impl):
    args = arguments((5, 3, 4, 6), torch.float32)
    views = [testing.strided(a) for a in args]
    before = [v.clone() for v in views]
    expected, actual = lstm(*args, impl=impl), lstm(*views, impl=impl)
    torch.testing.assert_close(actual, expected)
    # sum() hands back a gradient with stride 0
    for a, e in zip(
        torch.autograd.grad(actual[0].sum(), views), torch.autograd.grad(expected[0].sum(), args), strict=True
    ):
        torch.testing.assert_close(a, e)
    assert all(torch.equal(v, b) for v, b in zip(views, before, strict=True))


@pytest.mark.parametrize("impl", ["reference", "aten"])  # kernels have no float64
def test_gradcheck(impl):
    args = arguments((3, 2, 2, 3))
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, r=reverse: lstm(*a, weight_dropout=0.3, seed=SEED, reverse=r, impl=impl), args
        )


def test_operators_are_well_registered():
    for shape in [(3, 2, 4, 5), (0, 2, 4, 5)]:
        projected, h0, c0, w_hh = kernel_inputs(*shape[:2], shape[3])
        for impl in KERNELS or ["auto"]:
            forward, backward = (_lib.kernel(name, impl) for name in ("lstm_fwd", "lstm_bwd"))
            torch.library.opcheck(forward, (projected, w_hh, h0, c0, SEED, 0.4, False, False, False))
            gates = projected.clone()
            y, _, _, cells = forward(gates, w_hh, h0, c0, SEED, 0.4, False, True, False)
            tensors = (torch.randn_like(y), torch.randn_like(h0), None, gates, cells, c0, w_hh)
            torch.library.opcheck(backward, (*tensors, SEED, 0.4, True, False))
        inputs = [a.detach() for a in arguments(shape, torch.float32)[:6]]
        torch.library.opcheck(torch.ops.fastlm.lstm_aten_fwd.default, (*inputs, True))
        y = torch.randn(*shape[:2], 5)
        torch.library.opcheck(torch.ops.fastlm.lstm_aten_bwd.default, (y, *inputs[1:3], y, *inputs, False))


@pytest.mark.parametrize("reverse, impl", [(False, "auto"), (True, "auto"), *((True, impl) for impl in KERNELS)])
def test_compiles_without_a_break(reverse, impl):
    def loss(x, h, c, *weights):
        outputs = lstm(x, h, c, *weights, weight_dropout=0.4, seed=SEED, reverse=reverse, impl=impl)
        return sum(y.square().sum() for y in outputs)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (4, 7):
        args = arguments((T, 2, 3, 5), torch.float32)
        expected, actual = loss(*args), compiled(*args)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(torch.autograd.grad(actual, args), torch.autograd.grad(expected, args), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    zeros = torch.zeros(2, 5)  # one tensor for both states
    torch.testing.assert_close(compiled(args[0], zeros, zeros, *args[3:]), loss(args[0], zeros, zeros, *args[3:]))


def test_second_derivative_of_the_compiled_layer_raises():
    args = arguments((3, 2, 3, 4), torch.float32)
    y = _Opaque.apply(*args[:6], False)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_func_grad(impl, dtype):
    if impl in ("cpu", "triton"):
        dtype = torch.float32
    args = arguments((3, 2, 3, 4), dtype)

    def loss(w_hh):
        return lstm(*args[:4], w_hh, *args[5:], weight_dropout=0.4, seed=SEED, impl=impl)[0].square().sum()

    expected = torch.autograd.grad(loss(args[4]), args[4])[0]
    torch.testing.assert_close(torch.func.grad(loss)(args[4].detach()), expected)


def test_autocast_casts_input_and_weights_and_keeps_the_state():
    args = arguments((5, 2, 3, 8), torch.float32)
    low = [a.bfloat16() if i not in (1, 2) else a for i, a in enumerate(args)]
    expected = lstm(*low, weight_dropout=0.4, seed=SEED)
    with torch.autocast("cpu", torch.bfloat16):
        actual = lstm(*args, weight_dropout=0.4, seed=SEED)
    assert [y.dtype for y in actual] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.autograd.grad(actual[0].float().sum(), args[4])[0].dtype == torch.float32


def kernel_inputs(T, B, H, dtype=torch.float32):
    sizes = (T, B, 4 * H), (B, H), (B, H), (4 * H, H)
    return [(torch.randn(size) * (H**-0.5 if i == 3 else 1)).to(dtype) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_registered_reference(keep, reverse):
    """The parts that a device without kernels gets, against the loop and its automatic adjoint."""
    projected, h0, c0, w_hh = (t.double().requires_grad_() for t in kernel_inputs(5, 3, 21))
    weight = masked([None] * 4 + [w_hh])[4]
    eye = torch.eye(84, dtype=torch.float64)
    outputs = reference(projected, h0, c0, eye, weight, torch.zeros(84).double(), reverse=reverse)
    gates = projected.detach().clone()
    y, h, c, cells = _forward(gates, w_hh.detach(), h0.detach(), c0.detach(), SEED, 0.4, reverse, keep, False)
    torch.testing.assert_close((y, h, c), tuple(o.detach() for o in outputs))
    assert torch.equal(gates, projected) != keep and cells.shape == (5 * keep, 3, 21)
    if keep:
        upstream = [torch.randn_like(o) for o in outputs]
        expected = torch.autograd.grad(outputs, (projected, h0, c0), upstream)
        actual = _adjoint(*upstream, gates, cells, c0.detach(), w_hh.detach(), SEED, 0.4, reverse, False)
        torch.testing.assert_close((gates, *actual), expected)


KERNEL = """
import torch
from fastlm import _lib
from fastlm.ops.lstm import _adjoint, _forward
assert _lib.instruction_set() == WANTED
torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN
forward, backward, seed = torch.ops.fastlm.lstm_fwd, torch.ops.fastlm.lstm_bwd, torch.tensor(2**40 + 7)
for T, B, H, dtype, reverse in [
    (3, 1, 1, torch.float32, False), (4, 5, 37, torch.float32, True), (3, 30, 80, torch.float32, False),
    (2, 150, 19, torch.float32, False), (2, 33, 1150, torch.float32, True), (5, 7, 33, torch.bfloat16, False),
    (3, 20, 130, torch.bfloat16, True), (4, 6, 45, torch.float16, False), (1, 4, 16, torch.float16, True),
]:
    torch.manual_seed(T * B * H)
    sizes = (T, B, 4 * H), (4 * H, H), (B, H), (B, H)
    projected, w_hh, h0, c0 = (torch.randn(size).to(dtype) * (0.2 if size[-1] == H and size[0] == 4 * H else 1)
                               for size in sizes)
    options = (seed, 0.4, reverse)
    gates, exact_gates = projected.clone(), projected.double()
    kept = forward(gates, w_hh, h0, c0, *options, True, False)
    exact = _forward(exact_gates, *(t.double() for t in (w_hh, h0, c0)), *options, True, False)
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]  # some units in the last place
    for name, a, e in zip(["y", "h", "c"], kept, exact):
        error = ((a.double() - e).norm() / e.norm()).item()
        assert error < tolerance, (T, B, H, dtype, name, error)
    for a, e in zip(forward(projected, w_hh, h0, c0, *options, False, False)[:3], kept):
        assert torch.equal(a, e), "an inference has other results"
    dy, dh, dc = torch.randn_like(kept[0]), torch.randn_like(h0), torch.randn_like(c0)
    for upstream in [(dy, dh, dc), (dy, None, None), (None, dh, None)]:
        double = [None if t is None else t.double() for t in upstream]
        da, exact_da = gates.clone(), exact_gates.clone()
        actual = da, *backward(*upstream, da, kept[3], c0, w_hh, *options, False)
        expected = exact_da, *_adjoint(*double, exact_da, exact[3], c0.double(), w_hh.double(), *options, False)
        for name, a, e in zip(["da", "dh0", "dc0"], actual, expected):
            error = ((a.double() - e).norm() / e.norm()).item()
            assert error < tolerance, (T, B, H, dtype, name, error)
"""


def test_kernel_of_every_instruction_set(instruction_set, fresh_python):
    fresh_python(KERNEL.replace("WANTED", repr(instruction_set)), FASTLM_CPU=instruction_set)


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(inputs, options=(SEED, 0.4, False)):
    projected, h0, c0, w_hh = inputs
    gates = projected.clone()
    y, h_n, c_n, cells = torch.ops.fastlm.lstm_fwd(gates, w_hh, h0, c0, *options, True, False)
    return y, h_n, c_n, gates, *torch.ops.fastlm.lstm_bwd(y, None, None, gates, cells, c0, w_hh, *options, False)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_same_results_from_any_number_of_threads(native, threads, dtype):
    """More threads than cores too: whoever waits for a thread that has no core must let it have one."""
    inputs = kernel_inputs(6, 17, 150, dtype)
    threads(1)
    expected = results(inputs)
    for count in (2, 3, 8, 2):
        threads(count)
        assert all(torch.equal(a, e) for a, e in zip(results(inputs), expected, strict=True))


def test_concurrent_calls(native):
    """Nothing is shared between calls: threads of Python call at once, within and without PyTorch's own threads."""
    problems = [kernel_inputs(5, B, H) for B, H in [(3, 60), (17, 130), (8, 90), (1, 200)]]
    expected = [results(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [results(problem) for problem in problems], range(8)):
            for a, e in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("impl", KERNELS)
def test_second_derivative_of_the_kernel_raises(impl):
    args = arguments((3, 2, 3, 4), torch.float32)
    y = lstm(*args, impl=impl)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", KERNELS)
def test_backward_twice(impl):
    """The backward makes its result in the place of the gates, unless the graph is kept."""
    args = arguments((4, 3, 5, 6), torch.float32)
    y = lstm(*args, weight_dropout=0.4, seed=SEED, impl=impl)[0].square().sum()
    first, second = (torch.autograd.grad(y, args, retain_graph=True) for _ in range(2))
    for a, b, c in zip(first, second, torch.autograd.grad(y, args), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("impl", KERNELS)
def test_backward_after_one_that_failed(impl, monkeypatch):
    """The gates are gone then: an error, not gradients of something else."""
    args = arguments((4, 3, 5, 6), torch.float32)
    y = lstm(*args, impl=impl)[0].sum()  # keeps nothing that the first try would free

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(sys.modules[lstm.__module__], "matmul", out_of_memory)
        torch.autograd.grad(y, args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, args)


@pytest.mark.parametrize("impl", KERNELS)
def test_forward_mode_raises(impl):
    """It would be zeros otherwise: the operators have no tangents."""
    args = [a.detach() for a in arguments((4, 3, 5, 6), torch.float32)]
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: lstm(x, *args[1:], impl=impl)[0], (args[0],), (args[0],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        lstm(torch.autograd.forward_ad.make_dual(args[0], args[0]), *args[1:], impl=impl)


@pytest.mark.parametrize("wanted", range(7))
@pytest.mark.parametrize("impl", KERNELS)
def test_one_gradient_alone(wanted, impl):
    args = [a.detach() for a in arguments((4, 3, 5, 6), torch.float32)]
    args[wanted].requires_grad_()
    for output in range(3):
        found = [
            torch.autograd.grad(lstm(*args, weight_dropout=0.4, seed=SEED, impl=i)[output].square().sum(), args[wanted])
            for i in (impl, "reference")
        ]
        torch.testing.assert_close(*found)


def test_which():
    x = torch.zeros(1, 1, 1)
    assert ops.which("lstm", x) == ("cpu" if "cpu" in IMPLS else "aten")
    assert ops.which(lstm, x, impl="aten") == ops.which(lstm, x.double()) == "aten"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: torch.zeros(5, 4)}, ValueError, r"x must have shape \[T, B, I\]"),
        ({0: torch.zeros(5, 3, 4, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({0: torch.zeros(5, 3, 4).half()}, TypeError, "w_ih must be torch.float16 like x"),
        ({1: torch.zeros(2, 6)}, ValueError, r"h0 must have shape \[B, H\] = \[3, 6\], got \[2, 6\]"),
        ({2: torch.zeros(3, 5)}, ValueError, "c0 must have shape"),
        ({2: torch.zeros(3, 6).double()}, TypeError, "c0 must be torch.float32 like x"),
        ({3: torch.zeros(24, 5)}, ValueError, r"w_ih must have shape \[4H, I\] = \[24, 4\]"),
        ({4: torch.zeros(20, 6)}, ValueError, "w_hh must have shape"),
        ({6: torch.zeros(6)}, ValueError, "b_hh must have shape"),
        ({1: torch.zeros(3, 6, device="meta")}, TypeError, "h0 must be on cpu like x, got meta"),
    ],
)
def test_wrong_arguments(change, error, message):
    args = [a.detach() for a in arguments((5, 3, 4, 6), torch.float32)]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(error, match=message):
        lstm(*args)


def test_wrong_options():
    args = arguments((1, 1, 1, 1))
    with pytest.raises(ValueError, match="weight_dropout must lie in"):
        lstm(*args, weight_dropout=1.5)
    with pytest.raises(ValueError, match="impl must be one of"):
        lstm(*args, impl="fast")
    with pytest.raises(RuntimeError, match="'cuda'"):
        lstm(*args, impl="cuda")
    with pytest.raises(TypeError, match="seed must be an int64"):
        lstm(*args, weight_dropout=0.5, seed=torch.tensor(1.0))
