"""Linear cross entropy: loss and gradients against float64, every odd row, and no logits in memory."""

import importlib
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import testing
from fastlm.ops import linear_cross_entropy

module = importlib.import_module("fastlm.ops.linear_cross_entropy")  # the name in the package is the function
pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = [*testing.impls("linear_cross_entropy"), "fallback"]
TRITON = [impl for impl in IMPLS if impl == "triton"]
ALL_OPTIONS = dict(reduction="sum", ignore_index=1, label_smoothing=0.1)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 4e-3}  # between two orders of the same sums
SHAPES = [(1, 1, 1), (5, 2, 8), (7, 50, 123), (33, 205, 37), (19, 10_000, 40), (3, 4111, 1), (4, 3, 0)]


@pytest.fixture(params=IMPLS)
def loss_of(request, monkeypatch):
    """The public function bound to an implementation; "fallback" is the PyTorch one even where there is a kernel."""
    if request.param != "fallback":
        return lambda *args, **options: linear_cross_entropy(*args, impl=request.param, **options)
    monkeypatch.setattr(module, "_rows", torch.no_grad()(module._rows_))
    monkeypatch.setattr(module._lib, "resolve", lambda *_: "fallback")
    return linear_cross_entropy


@pytest.fixture
def widening(monkeypatch):
    """The way of a GPU whose library adds up products of 16-bit matrices in float32."""

    def product(a, b, out=None, add=False):
        wide = a.float() @ b.float()
        return wide if out is None else out.add_(wide) if add else out.copy_(wide)

    monkeypatch.setattr(module, "_widening", product)
    monkeypatch.setattr(module, "_widens", lambda x: x.dtype != torch.float32)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(module._CHUNK_ROWS, "cpu", (4, 4))


def layer(rows, classes, width, dtype=torch.float32, scale=1.0):
    """Input, weight, bias of size 1 (a small one hides mistakes), and targets."""
    input = (torch.randn(rows, width) * scale).to(dtype).requires_grad_()
    weight = torch.randn(classes, width).to(dtype).requires_grad_()
    bias = torch.randn(classes).to(dtype).requires_grad_()
    return input, weight, bias, torch.randint(classes, (rows,))


def plain(input, weight, target, bias=None, **options):
    return F.cross_entropy(F.linear(input, weight, bias), target, **options)


def outcome(function, input, weight, target, bias=None, upstream=None, **options):
    """Loss and gradients."""
    loss = function(input, weight, target, bias=bias, **options)
    wanted = [x for x in (input, weight, bias) if x is not None and x.requires_grad]
    return [loss, *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype) if upstream is not None else None)]


def doubles(*tensors):
    return [x if x is None else x.detach().double().requires_grad_() for x in tensors]


def assert_accurate(loss_of, input, weight, target, bias, upstream=None, **options):
    exact = outcome(plain, *doubles(input, weight), target, *doubles(bias), upstream, **options)
    theirs = outcome(plain, input, weight, target, bias, upstream, **options)
    ours = outcome(loss_of, input, weight, target, bias, upstream, **options)
    assert ours[0].dtype == torch.float32
    assert all(x.dtype == input.dtype for x in ours[1:])
    for name, a, p, e in zip(("loss", "input", "weight", "bias"), ours, theirs, exact, strict=False):
        if name == "loss" and a.numel() < 10 and input.dtype != torch.float32:  # PyTorch's may be rounded by luck
            testing.assert_close(name, a, e, torch.finfo(input.dtype).eps / 2)
        else:
            testing.assert_accurate(name, a, p, e)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(loss_of, dtype, shape):
    input, weight, bias, target = layer(*shape, dtype)
    assert_accurate(loss_of, input, weight, target, bias)
    assert_accurate(loss_of, input, weight, target, None, torch.tensor(-3.0), **ALL_OPTIONS)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(0, 9)),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.booleans(),
)
def test_any_shape(shape, reduction, smoothing, with_bias):
    torch.manual_seed(sum(shape))
    input, weight, bias, target = layer(*shape)
    upstream = torch.randn(shape[0]) if reduction == "none" else torch.randn(())
    target[::3] = -100
    if reduction == "mean" and not (target >= 0).any():
        return  # NaN, which has a test of its own
    options = dict(reduction=reduction, label_smoothing=smoothing)
    assert_accurate(linear_cross_entropy, input, weight, target, bias if with_bias else None, upstream, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_per_row_gradient(loss_of, small_chunks, smoothing, with_bias, ignored):
    input, weight, bias, target = layer(13, 29, 11)
    target[torch.rand(13) < ignored] = -100
    upstream, options = torch.randn(13), dict(reduction="none", label_smoothing=smoothing)
    assert_accurate(loss_of, input, weight, target, bias if with_bias else None, upstream, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_expanded_gradient_and_any_leading_shape(loss_of, reduction):
    input, weight, bias, target = layer(12, 9, 5)
    folded = input.detach().reshape(4, 3, 5).transpose(0, 1).requires_grad_()
    loss = loss_of(folded, weight, target.reshape(4, 3).T, bias=bias, reduction=reduction)
    assert loss.shape == ((3, 4) if reduction == "none" else ())
    (ours,) = torch.autograd.grad(loss.sum(), folded)
    (theirs,) = torch.autograd.grad(plain(input, weight, target, bias, reduction=reduction).sum(), input)
    testing.assert_close("input", ours.transpose(0, 1).reshape(12, 5), theirs.double(), 1e-6)
    vector = loss_of(input[0], weight, target[0], reduction="none")
    assert vector.shape == () and torch.allclose(vector, plain(input[:1], weight, target[:1])[()], rtol=1e-6)


def test_one_word_costs_nothing(loss_of):
    input, weight, bias, target = layer(6, 1, 4)
    loss, *gradients = outcome(loss_of, input, weight, target, bias)
    assert loss == 0 and not any(x.any() for x in gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_ignored(loss_of, reduction):
    input, weight, bias, _ = layer(6, 7, 4)
    target = torch.full((6,), -100)
    loss = loss_of(input, weight, target, bias=bias, reduction=reduction)
    expected = plain(input, weight, target, bias, reduction=reduction)
    assert torch.equal(loss.isnan(), expected.isnan()) and not loss.nan_to_num().any()
    if reduction != "mean":
        loss.sum().backward()
        assert not any(x.grad.any() for x in (input, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_sizes(loss_of, reduction):
    input, weight, bias, target = layer(0, 7, 4)
    loss, *gradients = outcome(
        loss_of, input, weight, target, bias, torch.zeros(0) if reduction == "none" else None, reduction=reduction
    )
    assert loss.shape == ((0,) if reduction == "none" else ()) and bool(loss.isnan().any()) == (reduction == "mean")
    assert [x.shape for x in gradients] == [(0, 4), (7, 4), (7,)] and not any(x.nan_to_num().any() for x in gradients)


def test_a_sure_row_keeps_its_small_gradient(loss_of):
    input, weight, bias, target = layer(8, 300, 16)
    with torch.no_grad():
        weight[target] += 3 * input  # p of the target near 1
    assert_accurate(loss_of, input, weight, target, bias)
    assert_accurate(loss_of, (input.detach() * 40).requires_grad_(), weight, target, bias)  # logits of several 1000


def test_only_the_gradients_in_need(loss_of, monkeypatch):
    calls, op = [], module._linear_cross_entropy
    monkeypatch.setattr(module, "_linear_cross_entropy", lambda *args: calls.append(args[-4:-1]) or op(*args))
    tensors = layer(9, 20, 6)
    target = tensors[3]
    expected = outcome(plain, *tensors[:2], target, tensors[2])
    for i in range(3):
        one = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors[:3])]
        for reduction in ("mean", "none"):
            loss = loss_of(one[0], one[1], target, bias=one[2], reduction=reduction)
            loss.mean().backward()
            testing.assert_close("gradient", one[i].grad, expected[1 + i].double(), 1e-6)
            one[i].grad = None
    assert all(sum(needs) <= 1 for needs in calls)
    calls.clear()
    with torch.no_grad():
        assert loss_of(*tensors[:2], target, bias=tensors[2]) == loss_of(*tensors[:2], target, bias=tensors[2])
    assert not any(any(needs) for needs in calls)


def test_loss_without_gradients_is_the_same_loss(loss_of):
    input, weight, bias, target = layer(40, 333, 12)
    with torch.no_grad():
        quiet = loss_of(input, weight, target, bias=bias)
    assert torch.allclose(quiet, loss_of(input, weight, target, bias=bias), rtol=1e-6)


def test_tied_weight(loss_of):
    gradients = []
    for function in (loss_of, plain):
        torch.manual_seed(3)
        weight = torch.randn(11, 6, requires_grad=True)
        words, target = torch.randint(11, (2, 15))
        function(torch.tanh(F.embedding(words, weight)), weight, target).backward()
        gradients.append(weight.grad)
    testing.assert_close("weight", gradients[0], gradients[1].double(), 1e-6)


def test_inputs_are_left_alone_and_may_be_strided(loss_of):
    tensors = layer(10, 31, 7)
    target = tensors[3].int()
    expected = outcome(plain, *tensors[:2], tensors[3], tensors[2])
    views = [testing.strided(x) for x in tensors[:3]]
    copies = [x.detach().clone() for x in views]
    result = outcome(loss_of, *views[:2], testing.strided(target), views[2])
    for a, e in zip(result, expected, strict=True):
        testing.assert_close("strided", a, e.double(), 1e-6)
    assert all(torch.equal(x, copy) for x, copy in zip(views, copies, strict=True))


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_chunks_do_not_show(loss_of, monkeypatch, dtype):
    input, weight, bias, target = layer(150, 40, 8, dtype)
    target[::7] = -100
    results = []
    for rows in (150, 64, 1):
        monkeypatch.setitem(module._CHUNK_ROWS, "cpu", (rows, rows))
        results.append(outcome(loss_of, input, weight, target, bias, label_smoothing=0.1))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            # The sum over chunks is float32: in 16 bits it would lose 1 % over 150 of them.
            testing.assert_close("chunks", a, b.double(), TOLERANCE[dtype])


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 50, 23), (3, 205, 37), (9, 600, 40)], ids=str)
def test_rows_that_are_read_in_pieces(monkeypatch, dtype, shape):
    kernels = importlib.import_module("fastlm.triton.linear_cross_entropy")
    monkeypatch.setattr(kernels, "SHORT", 0)
    monkeypatch.setattr(kernels, "LANES", 16)
    loss_of = partial(linear_cross_entropy, impl="triton")
    input, weight, bias, target = layer(*shape, dtype)
    assert_accurate(loss_of, input, weight, target, bias)
    assert_accurate(loss_of, input, weight, target, None, torch.tensor(-3.0), **ALL_OPTIONS)
    target[::2] = -100
    assert_accurate(loss_of, input, weight, target, bias, torch.randn(shape[0]), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 30])
def test_products_added_up_in_float32(widening, loss_of, monkeypatch, dtype, rows):
    monkeypatch.setitem(module._CHUNK_ROWS, "cpu", (rows, rows))
    monkeypatch.setitem(module._LEAST_CHUNKS, "cpu", 1)
    input, weight, bias, target = layer(30, 40, 16, dtype)
    assert_accurate(loss_of, input, weight, target, bias)
    target[::7] = -100
    options = dict(reduction="none", label_smoothing=0.1)
    assert_accurate(loss_of, input, weight, target, bias, torch.randn(30), **options)
    loss_of(input, weight, torch.full((30,), -100), bias=bias).backward()
    assert not any(x.grad.any() for x in (input, weight, bias))


@pytest.mark.parametrize("chunks", [module._ROUNDED_CHUNKS, module._ROUNDED_CHUNKS + 1, 50])
def test_bfloat16_sums_over_chunks(loss_of, monkeypatch, chunks):
    input, weight, bias, target = layer(150, 40, 64, torch.bfloat16)
    rows = -(-150 // chunks)
    monkeypatch.setitem(module._CHUNK_ROWS, "cpu", (rows, rows))
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert len(module._chunks(150, 40, "cpu", 2)) == chunks + 1
    assert_accurate(loss_of, input, weight, target, bias)


def test_adjoint_by_hand_against_finite_differences(monkeypatch, small_chunks):
    monkeypatch.setattr(module, "_rows", torch.no_grad()(module._rows_))
    monkeypatch.setattr(module, "_linear_cross_entropy", torch.no_grad()(module.chunked))
    *tensors, target = layer(9, 6, 3)
    tensors = doubles(*tensors)
    target[2] = -100
    needs = (True, True, True)
    for smoothing in (0.0, 0.2):
        for options in ((None, "mean"), (torch.tensor(3.0).double(), "mean"), (None, "sum")):
            options = (*options, -100, smoothing, needs, "fallback")
            torch.autograd.gradcheck(lambda *x: module._Reduced.apply(*x, target, *options)[0], tensors)  # noqa: B023
        torch.autograd.gradcheck(lambda *x: module._PerRow.apply(*x, target, -100, smoothing, "fallback"), tensors)  # noqa: B023


def test_float64_goes_to_the_reference():
    input, weight, bias, target = layer(5, 6, 3)
    input, weight, bias = doubles(input, weight, bias)
    loss = linear_cross_entropy(input, weight, target, bias=bias)
    assert loss.dtype == torch.float64 and torch.allclose(loss, plain(input, weight, target, bias), rtol=1e-14)


@pytest.mark.parametrize("train", [True, False])
def test_memory_stays_far_below_the_logits(train):
    rows, classes, width = 4000, 3000, 8
    input, weight, bias, target = layer(rows, classes, width)
    input, weight = input.requires_grad_(train), weight.requires_grad_(train)
    bias.requires_grad_(train)
    logits = 4 * rows * classes
    for function, low, high in ((linear_cross_entropy, 0, 0.4 * logits), (plain, logits, 9 * logits)):
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = function(input, weight, target, bias=bias)
            if train:
                loss.backward()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert low <= peak <= high, f"{function.__name__}: {peak / logits:.2f} of the logits"


@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_keep_to_their_budget(itemsize):
    def rows_of(rows, classes, device="cpu"):
        bounds = module._chunks(rows, classes, device, itemsize)
        sizes = [last - first for first, last in pairwise(bounds)]
        assert bounds[0] == 0 and bounds[-1] == rows and max(sizes) - min(sizes) <= 1
        return max(sizes)

    least, most = module._CHUNK_ROWS["cpu"]
    assert rows_of(10**5, 50) > 0.9 * most
    for device, budget in module._CHUNK_BYTES.items():
        for classes in (10_000, 33_278):
            assert itemsize * classes * rows_of(8400, classes, device) <= budget
    assert 0.9 * least < rows_of(8400, 267_735) <= least
    assert rows_of(5, 300) == 5
    for rows in (140, 1400):  # PyTorch holds all logits, twice at least
        assert rows_of(rows, 267_735) <= rows / 4
    assert rows_of(31, 267_735) == 31  # a trip through W and dW less


def test_same_bits_for_every_run_and_same_value_for_every_thread_count():
    input, weight, bias, target = layer(600, 500, 32)
    threads = torch.get_num_threads()
    first, again = (outcome(linear_cross_entropy, input, weight, target, bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for a, b in zip(outcome(linear_cross_entropy, input, weight, target, bias), first, strict=True):
                testing.assert_close("threads", a, b.double(), 1e-6)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_raises(reduction):
    input, weight, _, target = layer(5, 6, 3)
    loss = linear_cross_entropy(input, weight, target, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        (grad.square().sum() + weight.sum()).backward()  # a gradient penalty must not be silently constant


def test_backward_twice_over_a_kept_graph(loss_of):
    input, weight, bias, target = layer(8, 12, 5)
    loss = loss_of(input, weight, target, bias=bias)
    first = torch.autograd.grad(loss, (input, weight, bias), torch.tensor(2.0), retain_graph=True)
    first = [x.clone() for x in first]
    again = torch.autograd.grad(loss, (input, weight, bias), torch.tensor(4.0))
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("impl", ["auto", *TRITON])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_transforms(impl, reduction):
    options = dict(impl=impl, reduction=reduction, label_smoothing=0.1)

    def loss_of(input, weight, bias, target):
        return (linear_cross_entropy(input, weight, target, bias=bias, **options) * 3).sum()

    # The operator is opaque to code generation, so any backend will do.
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 11):
        *tensors, target = layer(rows, 9, 4)
        target[1] = -100
        compiled(*tensors, target).backward()
        expected = torch.func.grad(loss_of, argnums=(0, 1, 2))(*tensors, target)
        for x, e in zip(tensors, expected, strict=True):
            testing.assert_close("gradient", x.grad, e.detach().double(), 1e-6)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, input, weight, target):
            return linear_cross_entropy(input, weight, target, ignore_index=2)

    tensors = [x.detach() for x in layer(7, 9, 4)]
    exported = torch.export.export(Loss(), (tensors[0], tensors[1], tensors[3]))
    for _ in range(2):
        input, weight, _, target = (x.detach() for x in layer(7, 9, 4))
        assert torch.equal(exported.module()(input, weight, target), Loss()(input, weight, target))


def test_operators_are_well_registered():
    input, weight, bias, target = (x.detach() for x in layer(7, 11, 5))
    target[3] = 4
    op = torch.ops.fastlm.linear_cross_entropy.default
    torch.library.opcheck(op, (input, weight, bias, target, torch.rand(7), 4, 0.1, True, True, True, "cpu"))
    torch.library.opcheck(op, (input.half(), weight.half(), None, target, None, -100, 0.0, False, False, False, "cpu"))
    rows = torch.ops.fastlm.linear_cross_entropy_rows_.default
    torch.library.opcheck(rows, (torch.randn(7, 11), target, torch.rand(7), 4, 0.1, True))
    torch.library.opcheck(rows, (torch.randn(7, 11), target, None, 4, 0.0, False))
    padded = torch.randn(7, 16)[:, :11]
    for impl in ("fallback", *TRITON):
        gradient, loss = (module._lib.kernel(f"linear_cross_entropy_{name}", impl) for name in ("gradient_", "loss"))
        torch.library.opcheck(gradient, (padded, bias, target, torch.rand(7), 4, 0.1))
        torch.library.opcheck(gradient, (padded, None, target, None, 4, 0.0))
        torch.library.opcheck(loss, (input, weight, bias, target, 4, 0.1))
        torch.library.opcheck(op, (input, weight, bias, target, torch.rand(7), 4, 0.1, True, True, True, impl))


def test_autocast_casts_like_a_linear_layer(loss_of):
    input, weight, bias, target = layer(30, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(input, weight, target, bias=bias)
        mixed = loss_of(input.bfloat16(), weight, target, bias=bias)
    assert loss.dtype == torch.float32 and torch.equal(loss, mixed)
    cast = [x.detach().bfloat16().requires_grad_() for x in (input, weight, bias)]  # a loss alone may be more exact
    assert torch.equal(loss, loss_of(*cast[:2], target, bias=cast[2]))
    gradients = torch.autograd.grad(loss, (input, weight, bias))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in gradients)


def test_every_instruction_set(fresh_python, instruction_set):
    fresh_python(
        "import torch, torch.nn.functional as F\n"
        "from fastlm import _lib, ops\n"
        f"assert _lib.instruction_set() == {instruction_set!r}\n"
        "rows_ = torch.ops.fastlm.linear_cross_entropy_rows_\n"
        "for classes in (1, 2, 15, 16, 17, 50, 4095, 4096, 4097, 10007):\n"
        "    for smoothing in (0.0, 0.1):\n"
        "        z = (torch.randn(9, classes) * 4).double().requires_grad_()\n"
        "        y, scale = torch.randint(classes, (9,)), torch.rand(9)\n"
        "        y[4] = -100\n"
        "        loss = F.cross_entropy(z, y, reduction='none', label_smoothing=smoothing)\n"
        "        (grad,) = torch.autograd.grad(loss, z, scale.double())\n"
        "        for gradient in (False, True):\n"
        "            work = z.detach().float()\n"
        "            out = rows_(work, y, scale, -100, smoothing, gradient)\n"
        "            assert (out - loss).abs().max() < 4e-6, (out - loss).abs().max()\n"
        "            expected = grad if gradient else z\n"
        "            assert (work - expected).abs().max() < 2e-6, (work - expected).abs().max()\n"
        "            for dtype in (torch.bfloat16, torch.float16):\n"
        "                wide = z.detach().to(dtype).float()\n"
        "                narrow = wide.to(dtype)\n"
        "                exact = rows_(wide, y, scale, -100, smoothing, gradient)\n"
        "                assert torch.equal(rows_(narrow, y, scale, -100, smoothing, gradient), exact)\n"
        "                assert torch.equal(narrow, wide.to(dtype))  # rounded once\n",
        FASTLM_CPU=instruction_set,
    )


def test_targets_outside_the_vocabulary_raise(loss_of):
    input, weight, _, target = layer(6, 9, 4)
    for bad in (9, -1, 2**40):
        target[3] = bad
        with pytest.raises(ValueError, match=r"target must lie in \[0, 9\).*ignore_index = -100"):
            loss_of(input, weight, target)
    target[3] = -1
    loss_of(input, weight, target, ignore_index=-1)


def test_the_native_kernel_checks_its_own_targets(native):
    with pytest.raises(RuntimeError, match="target outside the vocabulary"):
        torch.ops.fastlm.linear_cross_entropy_rows_(torch.randn(2, 5), torch.tensor([1, 5]), None, -100, 0.0, True)


def test_errors():
    input, weight, bias, target = layer(6, 9, 4)
    with pytest.raises(ValueError, match=r"input must have shape \[\.\.\., D\] with D = 4 like weight, got \[6, 3\]"):
        linear_cross_entropy(input[:, :3], weight, target)
    with pytest.raises(ValueError, match=r"weight must have shape \[V, D\], got \[4\]"):
        linear_cross_entropy(input, weight[0], target)
    with pytest.raises(ValueError, match=r"target must have shape \[6\] like input, got \[5\]"):
        linear_cross_entropy(input, weight, target[:5])
    with pytest.raises(ValueError, match=r"bias must have shape \[V\] = \[9\], got \[8\]"):
        linear_cross_entropy(input, weight, target, bias=bias[:8])
    with pytest.raises(TypeError, match="target must be an int64 or int32 tensor, got torch.float32"):
        linear_cross_entropy(input, weight, target.float())
    with pytest.raises(TypeError, match="weight must be torch.float32 like input, got torch.bfloat16"):
        linear_cross_entropy(input, weight.bfloat16(), target)
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'avg'"):
        linear_cross_entropy(input, weight, target, reduction="avg")
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 1.5"):
        linear_cross_entropy(input, weight, target, label_smoothing=1.5)
    with pytest.raises((RuntimeError, TypeError), match="linear_cross_entropy: "):
        linear_cross_entropy(input, weight, target, impl="cuda")
