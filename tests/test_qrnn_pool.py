"""QRNN pooling: values and gradients against float64, zoneout, splits, strides, compilers, errors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm.ops
from fastlm import testing
from fastlm.ops import philox, qrnn_pool
from fastlm.ops.qrnn_pool import GATES, _adjoint, _forward, reference

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = [impl for impl in testing.impls("qrnn_pool") if impl != "cpu"]  # "auto" is the CPU kernel where there is one
SHAPES = [(1, 33, 8), (2, 3, 37), (5, 8, 1), (63, 1, 400), (5, 3, 1150), (17, 2, 130), (70, 5, 9)]
EMPTY = [(0, 3, 7), (5, 0, 7), (5, 3, 0), (0, 0, 0)]
ZONEOUT = [{}, {"zoneout": 0.3}, {"zoneout": 0.3, "training": True, "seed": torch.tensor(2**40 + 7)}]


def inputs(shape, pooling="fo", dtype=torch.float32, state=None):
    steps, batch, hidden = shape
    gates = torch.randn(steps, batch, GATES[pooling] * hidden).to(dtype)
    return gates.requires_grad_(), torch.randn(batch, hidden).to(state or dtype).requires_grad_()


def plain(gates, c0, pooling="fo", zoneout=0.0, training=False, seed=None, reverse=False):
    """The layer as a user would write it: everything in the dtype of the inputs."""
    z, f, *rest = gates.chunk(GATES[pooling], dim=-1)
    z, f, rest = z.tanh(), f.sigmoid(), [gate.sigmoid() for gate in rest]
    f = f * (philox.keep_mask(f.shape, zoneout, seed, philox.ZONEOUT) if training else 1 - zoneout)
    c, out, written = c0.to(gates.dtype), [], f * z if pooling != "ifo" else rest[1] * z
    steps = list(zip(f.unbind(), written.unbind(), strict=True))
    for gate, value in reversed(steps) if reverse else steps:
        c = (1 - gate) * c + value
        out.append(c)
    h = torch.stack(out[::-1] if reverse else out)
    return (h if pooling == "f" else rest[0] * h), c.to(c0.dtype)


def with_gradients(function, tensors, grads, **options):
    """h, c_n, and the gradients of the gates and of c0, from copies of the tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves, **options)
    torch.autograd.backward(outputs, [grad.to(out.dtype) for out, grad in zip(outputs, grads, strict=True)])
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [*(out.detach() for out in outputs), *gradients]


def exactly(tensors, grads, training=False, seed=None, **options):
    seed = seed if training else None
    return with_gradients(reference, [t.double() for t in tensors], grads, seed=seed, **options)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pooling", GATES)
def test_values_and_gradients(dtype, shape, pooling):
    for reverse, options in zip((False, True, len(pooling) > 1), ZONEOUT, strict=True):
        tensors = inputs(shape, pooling, dtype)
        grads = torch.randn(shape).to(dtype), torch.randn(shape[1:]).to(dtype)
        options = {**options, "pooling": pooling, "reverse": reverse}
        theirs, exact = with_gradients(plain, tensors, grads, **options), exactly(tensors, grads, **options)
        size = max(tensors[0].numel(), 100 * shape[1])  # each row is a program of its own
        for impl in (impl for impl in IMPLS if testing.quick(impl, size)):
            ours = with_gradients(qrnn_pool, tensors, grads, impl=impl, **options)
            for name, *results in zip(("h", "c_n", "dgates", "dc0"), ours, theirs, exact, strict=True):
                testing.assert_accurate(f"{name} of {impl} with {options}", *results)
                assert results[0].dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (19, 2, 2500), (140, 60, 400)], ids=str)
@pytest.mark.parametrize("pooling", GATES)
def test_cuda_values_and_gradients(dtype, shape, pooling):
    for reverse, options in zip((False, True, len(pooling) > 1), ZONEOUT, strict=True):
        tensors = inputs(shape, pooling, dtype, torch.float32 if reverse else dtype)
        grads = torch.randn(shape).to(dtype), torch.randn(shape[1:]).to(tensors[1].dtype)
        options = {**options, "pooling": pooling, "reverse": reverse}
        theirs, exact = with_gradients(plain, tensors, grads, **options), exactly(tensors, grads, **options)
        if "seed" in options:
            options["seed"] = options["seed"].cuda()
        for impl in testing.impls("qrnn_pool", "cuda"):
            ours = with_gradients(
                qrnn_pool, [t.cuda() for t in tensors], [g.cuda() for g in grads], impl=impl, **options
            )
            for name, *results in zip(("h", "c_n", "dgates", "dc0"), ours, theirs, exact, strict=True):
                testing.assert_accurate(f"{name} of {impl} with {options}", results[0].cpu(), *results[1:])


@pytest.mark.gpu
def test_cuda_graph_draws_fresh_masks():
    gates, c0 = (t.detach().cuda() for t in inputs((9, 3, 37)))
    for impl in (impl for impl in testing.impls("qrnn_pool", "cuda") if impl != "reference"):
        qrnn_pool(gates, c0, zoneout=0.5, training=True, impl=impl)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = qrnn_pool(gates, c0, zoneout=0.5, training=True, impl=impl)
        graph.replay()
        first = out.clone()
        graph.replay()
        assert not torch.equal(first, out)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pooling", GATES)
def test_empty(impl, pooling):
    for shape in EMPTY:
        gates, c0 = inputs(shape, pooling)
        h, c_n = qrnn_pool(gates, c0, pooling=pooling, zoneout=0.5, training=True, impl=impl)
        assert h.shape == shape and c_n.shape == shape[1:]
        (h.sum() + 3 * c_n.sum()).backward()
        if shape[0] == 0:
            assert torch.equal(c_n, c0) and torch.equal(c0.grad, torch.full_like(c0, 3))
            assert c_n.data_ptr() != c0.data_ptr() or c0.numel() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_no_initial_cell_is_zeros(impl):
    gates, c0 = inputs((9, 3, 37))
    actual, expected = qrnn_pool(gates, impl=impl), qrnn_pool(gates, torch.zeros_like(c0), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    actual[0].sum().backward()
    assert gates.grad.isfinite().all()


@pytest.mark.parametrize("pooling", GATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_adjoint_is_the_derivative_of_the_reference(pooling, reverse):
    for shape in [(0, 2, 3), (1, 1, 1), (9, 2, 3)]:
        for zoneout, seed in [(0.3, None), (0.3, torch.tensor(5))]:
            tensors = inputs(shape, pooling, torch.float64)
            options = seed, pooling, zoneout, reverse
            outputs, grads = reference(*tensors, *options), []
            for out in outputs:
                grads.append(torch.randn_like(out))
            expected = torch.autograd.grad(outputs, tensors, grads, allow_unused=True, materialize_grads=True)
            gates, c0 = (t.detach() for t in tensors)
            kept = _forward(gates, c0, *options, True)[2]
            for result, wanted in zip(_adjoint(*grads, gates, kept, *options), expected, strict=True):
                torch.testing.assert_close(result, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pooling", GATES)
def test_gradcheck(pooling):
    for options in ZONEOUT:
        tensors = inputs((4, 2, 3), pooling, torch.float64)
        assert torch.autograd.gradcheck(lambda *t, o=options: qrnn_pool(*t, pooling=pooling, **o), tensors)


@pytest.mark.parametrize("impl", ["auto", *(["triton"] if "triton" in IMPLS else [])])
@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 20), st.integers(0, 4), st.integers(0, 70)),
    st.sampled_from(sorted(GATES)),
    st.permutations(range(3)),
    st.sampled_from(["dense", "strided", "expanded"]),
    st.booleans(),
    st.sampled_from(testing.DTYPES),
    st.sampled_from(ZONEOUT),
)
def test_any_shape_and_stride(impl, shape, pooling, order, layout, reverse, dtype, zoneout):
    torch.manual_seed(sum(shape))
    gates, c0 = inputs(shape, pooling, dtype, torch.float32)
    grads = torch.randn(shape).to(dtype), torch.randn(shape[1:])
    if layout == "expanded":
        gates, c0 = gates[:, :1].expand_as(gates), c0[:1].expand_as(c0)
        grads = grads[0][:, :, :1].expand(shape), grads[1][:, :1].expand(shape[1:])
    elif layout == "strided":
        gates, c0, *grads = (testing.strided(t) for t in (gates, c0, *grads))
    inverse = [order.index(d) for d in range(3)]
    if layout != "expanded":
        gates = gates.detach().permute(order).contiguous().permute(inverse).requires_grad_()
    before = gates.clone(), c0.clone()
    options = {**zoneout, "pooling": pooling, "reverse": reverse}
    outputs = qrnn_pool(gates, c0, impl=impl, **options)
    gradients = torch.autograd.grad(outputs, (gates, c0), grads, allow_unused=True, materialize_grads=True)
    wanted = exactly((gates, c0), grads, **options)
    tolerance = 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, *results in zip(("h", "c_n", "dgates", "dc0"), (*outputs, *gradients), wanted, strict=True):
        testing.assert_close(name, *results, tolerance, scale=1.0)
    assert torch.equal(gates, before[0]) and torch.equal(c0, before[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_gradients_and_each_output_alone(impl):
    tensors, options = inputs((11, 2, 37)), {"zoneout": 0.2, "training": True, "seed": torch.tensor(3), "impl": impl}
    one, zero = torch.ones(()), torch.zeros(())
    for use, grads in [((0,), (one, zero)), ((1,), (zero, one)), ((0, 1), (one, one))]:
        grads = grads[0].expand(11, 2, 37).clone(), grads[1].expand(2, 37).clone()
        expected = with_gradients(qrnn_pool, tensors, grads, **options)[2:]
        outputs = qrnn_pool(*tensors, **options)
        actual = torch.autograd.grad(sum(outputs[i].sum() for i in use), tensors)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pooling", GATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_split_across_calls_equals_one_call(impl, pooling, reverse):
    gates, c0 = inputs((21, 3, 37), pooling, torch.bfloat16, torch.float32)
    options = {"pooling": pooling, "zoneout": 0.1, "reverse": reverse, "impl": impl}
    h, c_n = qrnn_pool(gates, c0, **options)
    parts, state, cuts = [], c0, [(0, 8), (8, 9), (9, 21)]
    for begin, end in reversed(cuts) if reverse else cuts:
        part, state = qrnn_pool(gates[begin:end], state, **options)
        parts.append(part)
    assert torch.equal(torch.cat(parts[::-1] if reverse else parts), h)
    assert torch.equal(state, c_n) and c_n.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.999, 1.0])
def test_zoneout_keeps_the_cell_where_the_mask_says(impl, p):
    # rows that start at each lane of a Philox block, at every second one, at none
    for hidden, seed in zip([131, 34, 132, 131, 34, 132], map(torch.tensor, testing.SEEDS), strict=True):
        shape = (9, 2, hidden) if hidden == 34 else (3, 3, hidden)
        gates, c0 = inputs(shape, "f")
        c, _ = qrnn_pool(gates, c0, pooling="f", zoneout=p, training=True, seed=seed, impl=impl)
        kept = philox.keep_mask(shape, p, seed, philox.ZONEOUT)
        assert torch.equal(torch.cat([c0[None], c[:-1]]) != c, kept)
        c.sum().backward()
        assert torch.equal(gates.grad[:, :, hidden:] != 0, kept) and torch.equal(gates.grad[:, :, :hidden] != 0, kept)


def test_zoneout_share_and_mean():
    gates, ones = torch.zeros(1, 64, 2 * 1024), torch.ones(64, 1024)
    gates[..., :1024] = -20.0  # z = -1, f = 1/2: c falls from 1 to 0 where the gate is kept
    c, _ = qrnn_pool(gates, ones, pooling="f", zoneout=0.25, training=True)
    assert set(c.unique().tolist()) == {0.0, 1.0}
    assert abs(c.mean().item() - 0.25) < 4 * (0.25 * 0.75 / 65536) ** 0.5
    c, _ = qrnn_pool(gates, ones, pooling="f", zoneout=0.25)
    assert torch.equal(c, torch.full_like(c, 0.25))


def test_drawn_mask_is_fresh_reproducible_and_only_for_training():
    gates, c0 = (t.detach() for t in inputs((9, 3, 37)))
    torch.manual_seed(1)
    first, second = (qrnn_pool(gates, c0, zoneout=0.5, training=True)[0] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(qrnn_pool(gates, c0, zoneout=0.5, training=True)[0], first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(qrnn_pool(gates, c0, training=True)[0], qrnn_pool(gates, c0, seed=torch.tensor(1))[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("impl", IMPLS)
def test_dtype_of_the_state(impl):
    for dtype in (torch.bfloat16, torch.float16):
        gates, c0 = inputs((9, 3, 37), dtype=dtype, state=torch.float32)
        assert qrnn_pool(gates, impl=impl)[1].dtype == qrnn_pool(gates, c0.to(dtype), impl=impl)[1].dtype == dtype
        h, c_n = qrnn_pool(gates, c0, impl=impl)
        (h.float().sum() + c_n.sum()).backward()
        assert h.dtype == gates.grad.dtype == dtype and c_n.dtype == c0.grad.dtype == torch.float32
        testing.assert_close("c_n", c_n, reference(gates.double(), c0.double())[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pooling", GATES)
def test_what_is_not_finite_shows_in_its_channel_only(impl, pooling):
    for gate in range(GATES[pooling]):
        gates, c0 = inputs((19, 2, 37), pooling)
        with torch.no_grad():
            gates[9, 1, 37 * gate + 20] = float("nan")
        h, c_n = qrnn_pool(gates, c0, pooling=pooling, impl=impl)
        expected = torch.zeros(19, 2, 37, dtype=torch.bool)
        expected[9 : 10 if gate == 2 else None, 1, 20] = True
        assert torch.equal(h.isnan(), expected) and torch.equal(c_n.isnan(), expected[-1] & (gate != 2))
        h.sum().backward()
        others = torch.arange(GATES[pooling] * 37) % 37 != 20
        assert gates.grad[9, 1].isnan().any() and gates.grad[:, :, others].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_gates_are_exact(impl):
    gates = torch.tensor([[[1e4, 1e4, 1e4]], [[float("inf")] * 3], [[-float("inf"), -float("inf"), 1e4]]])
    gates = gates.requires_grad_()
    h, c_n = qrnn_pool(gates, torch.tensor([[0.25]]), impl=impl)
    assert torch.equal(h, torch.ones(3, 1, 1)) and torch.equal(c_n, torch.ones(1, 1))
    h.sum().backward()
    assert torch.equal(gates.grad, torch.zeros(3, 1, 3))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_operators_are_well_registered():
    seed, forward, backward = torch.tensor(5), torch.ops.fastlm.qrnn_pool_fwd, torch.ops.fastlm.qrnn_pool_bwd
    overloads = ["default", *(["triton"] if "triton" in IMPLS else [])]
    for overload, (shape, pooling, masked, reverse, keep) in itertools.product(
        overloads,
        [
            ((9, 3, 7), "fo", True, False, True),
            ((9, 3, 7), "ifo", False, True, False),
            ((0, 3, 7), "f", True, False, 1),
        ],
    ):
        gates, c0 = inputs(shape, pooling)
        options = seed if masked else None, pooling, 0.5, reverse
        torch.library.opcheck(getattr(forward, overload), (gates, c0 if masked else None, *options, bool(keep)))
        h, c_n, kept = (t.detach() for t in forward(gates, c0, *options, True))
        torch.library.opcheck(getattr(backward, overload), (h, c_n if masked else None, gates, kept, *options))


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_compile_export_and_transforms(impl):
    def loss(gates, c0, seed):
        h, c_n = qrnn_pool(gates, c0, zoneout=0.3, training=True, seed=seed, impl=impl)
        return (h**2).sum() + c_n.sum()

    seed = torch.tensor(9)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (5, 19):
        tensors = inputs((steps, 3, 37))
        compiled(*tensors, seed).backward()
        expected = torch.func.grad(loss, argnums=(0, 1))(*[t.detach() for t in tensors], seed)
        assert all(torch.equal(t.grad, wanted) for t, wanted in zip(tensors, expected, strict=True))

    class Module(torch.nn.Module):
        def forward(self, gates, c0):
            return qrnn_pool(gates, c0, pooling="ifo", impl=impl)

    given = [t.detach() for t in inputs((5, 3, 37), "ifo")]
    actual, expected = torch.export.export(Module(), tuple(given)).module()(*given), Module()(*given)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_compiled_mask_is_fresh_and_a_detached_state_compiles():
    def step(gates, c0):
        h, c_n = qrnn_pool(gates, c0, zoneout=0.5, training=True)
        return h, c_n.detach()

    gates, c0 = inputs((9, 3, 37))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (first, _), (second, _) = compiled(gates, c0.detach()), compiled(gates, c0.detach())
    assert not torch.equal(first, second)
    second.sum().backward()
    assert gates.grad.isfinite().all() and gates.grad.any()


def test_second_derivative_raises():
    gates, c0 = inputs((5, 3, 7))
    (dc0,) = torch.autograd.grad(qrnn_pool(gates, c0)[0].sum(), c0, create_graph=True)
    with pytest.raises(RuntimeError, match="qrnn_pool has no second derivative"):
        torch.autograd.grad(dc0.sum(), gates, allow_unused=True)
    (dc0,) = torch.autograd.grad(qrnn_pool(gates, c0, impl="reference")[0].sum(), c0, create_graph=True)
    assert torch.autograd.grad(dc0.sum(), gates)[0].any()


def test_result_does_not_depend_on_the_thread_count(native):
    threads, results = torch.get_num_threads(), []
    tensors, grads = inputs((19, 3, 1150)), (torch.randn(19, 3, 1150), torch.randn(3, 1150))
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(qrnn_pool, tensors, grads, **ZONEOUT[2]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_every_instruction_set(fresh_python, instruction_set):
    fresh_python(
        "import torch\n"
        "from fastlm import _lib, testing\n"
        "from fastlm.ops.qrnn_pool import GATES, qrnn_pool, reference\n"
        f"assert _lib.instruction_set() == {instruction_set!r}\n"
        "seed = torch.tensor(2**50 + 3)\n"
        "for dtype in testing.DTYPES:\n"
        "    for pooling, k in GATES.items():\n"
        "        gates, c0 = 3 * torch.randn(19, 3, k * 61), torch.randn(3, 61)\n"
        "        gates, c0 = (t.to(dtype).requires_grad_() for t in (gates, c0))\n"
        "        wide = [t.detach().double().requires_grad_() for t in (gates, c0)]\n"
        "        h, c_n = qrnn_pool(gates, c0, pooling=pooling, zoneout=0.3, training=True, seed=seed, impl='cpu')\n"
        "        exact = reference(*wide, seed, pooling, 0.3)\n"
        "        torch.autograd.backward((h, c_n), (h.detach(), c_n.detach()))\n"
        "        torch.autograd.backward(exact, (h.detach().double(), c_n.detach().double()))\n"
        "        limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps\n"
        "        for got, want in zip((h, c_n, gates.grad, c0.grad), (*exact, *[t.grad for t in wide])):\n"
        "            testing.assert_close(pooling, got, want, limit)\n",
        FASTLM_CPU=instruction_set,
    )


def test_errors():
    gates, c0 = (t.detach() for t in inputs((5, 3, 7)))
    with pytest.raises(TypeError, match="gates must be float32.*got torch.int64"):
        qrnn_pool(gates.long())
    with pytest.raises(ValueError, match=r"gates must have shape \[T, B, H\], got \[3, 21\]"):
        qrnn_pool(gates[0])
    with pytest.raises(ValueError, match=r"gates must have 4 H columns for pooling='ifo', got shape \[5, 3, 21\]"):
        qrnn_pool(gates, pooling="ifo")
    with pytest.raises(ValueError, match="pooling must be 'f', 'fo' or 'ifo', got 'of'"):
        qrnn_pool(gates, pooling="of")
    with pytest.raises(ValueError, match=r"zoneout must lie in \[0, 1\], got -0.5"):
        qrnn_pool(gates, zoneout=-0.5)
    with pytest.raises(ValueError, match=r"c0 must have shape \[B, H\] = \[3, 7\], got \[3, 21\]"):
        qrnn_pool(gates, gates[0])
    with pytest.raises(TypeError, match="c0 must be torch.bfloat16 like gates, got torch.float16"):
        qrnn_pool(gates.bfloat16(), c0.half())
    with pytest.raises(TypeError, match="c0 must be on cpu like gates, got meta"):
        qrnn_pool(gates, c0.to("meta"))
    with pytest.raises(TypeError, match="seed must be an int64 scalar tensor, got int"):
        qrnn_pool(gates, zoneout=0.5, training=True, seed=3)
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference'"):
        qrnn_pool(gates, impl="fast")
    with pytest.raises((RuntimeError, TypeError), match="qrnn_pool: "):
        qrnn_pool(gates, impl="cuda")


def test_which():
    expected = "cpu" if "cpu" in testing.impls("qrnn_pool") else "reference"
    assert fastlm.ops.which(qrnn_pool, torch.rand(2, 3, 6)) == expected
    assert fastlm.ops.which(qrnn_pool, torch.rand(2, 3, 6).double()) == "reference"


def test_forward_mode_raises(native):
    """It would be zeros otherwise: the operators have no tangents."""
    gates = torch.randn(4, 3, 15)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: qrnn_pool(x, impl="cpu")[0], (gates,), (gates,))
