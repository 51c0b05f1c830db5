"""The LSTM on a GPU: sizes, precision, the ways of its blocks, streams, graphs, and what must not stop it."""

import contextlib
import sys

import pytest
import torch
from test_lstm import SEED, arguments, gradients

from fastlm import testing
from fastlm.ops import dropconnect, dropconnect_mask, lstm
from fastlm.ops._matmul import matmul_tf32
from fastlm.ops.lstm import reference

pytestmark = pytest.mark.gpu
IMPLS = testing.impls("lstm", "cuda")
CUDA = [impl for impl in IMPLS if impl == "cuda"]
NAMES = ("y", "h_n", "c_n", "dx", "dh0", "dc0", "dw_ih", "dw_hh", "db_ih", "db_hh")
EXCHANGES = ("data", "flags", "grid", "multicast", "cluster")
KINDS = {"strict": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of strict float32 there are kernels for "data" alone, and "cluster" or "multicast" is the adjoint that adds up within
# clusters; with the others every step would be a product and a kernel.
WAYS = [
    *(("strict", exchange) for exchange in ("data", "cluster")),
    *((kind, exchange) for kind in ("tf32", "bf16", "fp16") for exchange in EXCHANGES),
]
P = 0.4


def layer(T, B, inputs, H, dtype=torch.float32, *, scale=1.0, gradient=1.0):
    """Arguments of `lstm` as leaves on the GPU, weights uniform in +-scale H^-1/2, and a gradient for each result."""
    sizes = [(T, B, inputs), (B, H), (B, H), (4 * H, inputs), (4 * H, H), (4 * H,), (4 * H,)]
    values = [torch.randn(size) for size in sizes[:3]]
    values += [(torch.rand(size) * 2 - 1) * scale * H**-0.5 for size in sizes[3:]]
    leaves = [x.to("cuda", dtype).requires_grad_() for x in values]
    upstream = [torch.randn(size, device="cuda").mul(gradient).to(dtype) for size in ((T, B, H), (B, H), (B, H))]
    return leaves, upstream


def outcome(call, leaves, upstream):
    """Results and gradients of a call, by name."""
    results = call(*leaves)
    grads = torch.autograd.grad(results, leaves, upstream)
    return dict(zip(NAMES, (*(y.detach() for y in results), *grads), strict=True))


def ours(impl, p=P, **options):
    seed = SEED.cuda()  # not within the call, which a graph may capture
    return lambda *args: lstm(*args, weight_dropout=p, seed=seed, impl=impl, **options)


def in_double(leaves, upstream, p=P, reverse=False):
    """The same in float64, on the GPU too: it is two million million products at the largest size."""

    def call(*args):
        dropped = dropconnect(args[4], p, SEED.cuda(), impl="reference")
        return reference(*args[:4], dropped, *args[5:], reverse=reverse)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    return outcome(call, exact, [x.double() for x in upstream])


def assert_right(impl, leaves, upstream, p=P, **options):
    """By the rule of all tests, PyTorch's own layer being the yardstick."""
    exact = in_double(leaves, upstream, p, **options)
    plain = outcome(ours("aten", p, **options), leaves, upstream)
    found = outcome(ours(impl, p, **options), leaves, upstream)
    for name, wanted in exact.items():
        few = wanted.numel() < 100  # of which plain PyTorch may have rounded all to the right side
        if not (few and testing.error(found[name], wanted) <= torch.finfo(leaves[0].dtype).eps):
            testing.assert_accurate(name, found[name], plain[name], wanted)


@contextlib.contextmanager
def tf32(allowed):
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, allowed
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@pytest.mark.parametrize("shape", [(7, 3, 5, 9), (1, 1, 1, 1), (5, 33, 37, 1150)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_gpu_equals_cpu(reverse, impl, shape):
    args = arguments(shape, torch.float32)
    with torch.no_grad():
        for weight in args[3:5]:
            weight.mul_(2 * shape[3] ** -0.5)  # else the gates of many units are shut or open, and nothing shows
    device = [a.detach().cuda().requires_grad_() for a in args]
    expected = lstm(*args, weight_dropout=0.4, seed=SEED, reverse=reverse)
    actual = lstm(*device, weight_dropout=0.4, seed=SEED.cuda(), reverse=reverse, impl=impl)
    weights = [torch.randn_like(y).double() for y in expected]
    for a, e in zip(actual, expected, strict=True):
        testing.assert_close("value", a.cpu(), e.double(), 1e-3)
    grads = gradients([a.cpu() for a in actual], device, weights)
    for a, e in zip(grads, gradients(expected, args, weights), strict=True):
        testing.assert_close("gradient", a.cpu(), e.double(), 1e-3)


# Each T, B and H of the unfriendly ones twice or more: primes, halves of a tile, one more than a tile, one unit.
SIZES = [
    *((1, 1, 1), (140, 3, 8), (5, 33, 37), (70, 20, 400), (63, 8, 400), (70, 20, 1150), (2, 40, 1150), (70, 80, 1150)),
    *((63, 33, 1152), (5, 128, 1152), (70, 3, 1550), (2, 80, 1550), (63, 1, 2500), (9, 128, 2500), (140, 40, 37)),
    *((8, 20, 1), (63, 128, 8), (140, 8, 1150), (70, 40, 1152), (16, 256, 2048)),
]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("impl", CUDA)
def test_unfriendly_sizes(impl, size, dtype):
    T, B, H = size
    leaves, upstream = layer(T, B, 37, H, dtype)
    assert_right(impl, leaves, upstream)
    assert_right(impl, leaves, upstream, 0.0, reverse=True)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("impl", CUDA)
def test_masks(impl, p):
    leaves, upstream = layer(20, 20, 64, 400)
    assert_right(impl, leaves, upstream, p)
    dw_hh = outcome(ours(impl, p), leaves, upstream)["dw_hh"]
    assert torch.equal(dw_hh != 0, dropconnect_mask((1600, 400), p, SEED.cuda()))


# Bounds on y, dx and dw, three times what the numbers of operands leave at 70 steps of 20 rows and 1150 units: factors
# of float16 in three parts, and of 11 bits with gradients scaled; as PyTorch begins, and with larger weights that are
# dropped by half and the gradients of a mean. Or twice what cuDNN is off by, for libraries may cut 11 bits off.
# `OF_11_BITS` is of all products, the input's too, and holds for fewer steps and units: where cuDNN does without TF32.
OF_11_BITS = (9e-4, 1.2e-3, 1.3e-3)
BOUNDS = [
    (False, 1.0, 0.0, 1.0, (6e-7, 9e-7, 2.1e-6)),
    (False, 3.0, 0.5, 1e-4 / 1400, (1.8e-6, 3e-6, 3e-6)),
    (True, 1.0, 0.0, 1.0, OF_11_BITS),
    (True, 3.0, 0.5, 1e-4 / 1400, (2.1e-3, 3.3e-3, 4.2e-3)),
]


def assert_within(bounds, impl, leaves, upstream, p=P):
    exact = in_double(leaves, upstream, p)
    found, plain = (outcome(ours(name, p), leaves, upstream) for name in (impl, "aten"))
    for names, bound in zip((["y"], ["dx"], ["dw_ih", "dw_hh"]), bounds, strict=True):
        for name in names:
            allowance = max(bound, 2 * testing.error(plain[name], exact[name]))
            testing.assert_close(name, found[name], exact[name], allowance)


@pytest.mark.parametrize(("allowed", "scale", "p", "gradient", "bounds"), BOUNDS)
@pytest.mark.parametrize("impl", CUDA)
def test_precision_of_float32(impl, allowed, scale, p, gradient, bounds):
    leaves, upstream = layer(70, 20, 400, 1150, scale=scale, gradient=gradient)
    with tf32(allowed):
        assert_within(bounds, impl, leaves, upstream, p)


def test_a_product_of_11_bits():
    """As wrong as that, but no more, whatever the operands' layout; a product by PyTorch's own setting stays exact."""
    wide = torch.randn(700, 900, device="cuda")
    for a in (wide[:300, :500], wide[:500, :300].t(), wide[:300, :500].contiguous()):
        for b in (wide[:500, :700], wide[:700, :500].t(), wide[:500, :1]):
            exact = a.double() @ b.double()
            found = testing.error(matmul_tf32(a, b), exact)
            assert found < 2e-3 and (found > 1e-5 or b.shape[1] == 1)  # one column may go to an exact kernel
            assert testing.error(a @ b, exact) < 1e-5


def kernels_of(run):
    """The names of the kernels that a call launches."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    if not any("lstm_" in name for name in names):
        pytest.skip("the profiler sees no kernels here")
    return names


@pytest.mark.parametrize("impl", CUDA)
def test_which_kernels_run(impl, monkeypatch):
    """The weights stay on the chip wherever they have room there and there are steps to use them."""
    if not torch.cuda.get_device_properties(0).multi_processor_count >= 100:
        pytest.skip("1150 units have no room on a small GPU")
    for T, few, persistent in ((70, None, True), (3, None, False), (70, "1", False)):
        leaves, upstream = layer(T, 20, 37, 1150)
        with monkeypatch.context() as patch:
            if few:
                patch.setenv("FASTLM_CUDA_MULTIPROCESSORS", few)
            names = kernels_of(lambda leaves=leaves, upstream=upstream: outcome(ours(impl), leaves, upstream))
        for kernel in ("lstm_forward", "lstm_backward"):
            assert any(f"{kernel}_kernel" in name for name in names) == persistent, names
            assert any(f"{kernel}_step_kernel" in name for name in names) != persistent, names


@pytest.mark.parametrize("few", ["14", "7", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CUDA)
def test_a_slice_of_a_gpu(impl, dtype, few, monkeypatch):
    """With fewer multiprocessors, fewer blocks have more units each, or the weights no room."""
    monkeypatch.setenv("FASTLM_CUDA_MULTIPROCESSORS", few)
    for T, B, H in ((20, 20, 100), (20, 33, 400), (20, 20, 1150)):
        assert_right(impl, *layer(T, B, 37, H, dtype))


@pytest.mark.parametrize(("kind", "exchange"), WAYS)
@pytest.mark.parametrize("impl", CUDA)
def test_each_way_between_blocks(impl, kind, exchange, monkeypatch):
    monkeypatch.setenv("FASTLM_CUDA_EXCHANGE", exchange)
    for T, B, H in ((63, 20, 400), (20, 33, 1150), (12, 7, 37)):
        leaves, upstream = layer(T, B, 37, H, KINDS[kind])
        with tf32(kind == "tf32"):
            if kind == "tf32":
                assert_within(OF_11_BITS, impl, leaves, upstream)
            else:
                assert_right(impl, leaves, upstream)
            first = outcome(ours(impl), leaves, upstream)
            for _ in range(10):
                assert equal(outcome(ours(impl), leaves, upstream), first)


def equal(found, expected):
    return all(torch.equal(found[name], wanted) for name, wanted in expected.items())


@pytest.mark.parametrize("kind", ["strict", "tf32", "bf16"])
@pytest.mark.parametrize("H", [400, 1150])
@pytest.mark.parametrize("impl", CUDA)
def test_the_same_bits_a_hundred_times(impl, H, kind):
    leaves, upstream = layer(70, 20, 64, H, torch.bfloat16 if kind == "bf16" else torch.float32)
    with tf32(kind == "tf32"):
        first = outcome(ours(impl), leaves, upstream)
        for turn in range(100):
            assert equal(outcome(ours(impl), leaves, upstream), first), f"differs at repetition {turn}"


@pytest.mark.parametrize("impl", CUDA)
def test_beside_a_busy_stream(impl):
    """Others hold multiprocessors when the blocks that wait for each other start."""
    leaves, upstream = layer(70, 20, 64, 1150)
    first = outcome(ours(impl), leaves, upstream)
    torch.cuda.synchronize()
    busy, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(busy):
            for _ in range(20):
                a @ a
        assert equal(outcome(ours(impl), leaves, upstream), first)
    torch.cuda.synchronize()


@pytest.mark.parametrize("impl", CUDA)
def test_two_streams_at_once(impl):
    problems = [layer(40, 20, 64, H) for H in (1150, 400)]
    expected = [outcome(ours(impl), *problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found = []
    for _ in range(20):
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(outcome(ours(impl), *problem))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert equal(results, expected[i % len(problems)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CUDA)
def test_graphs_of_several_lengths(impl, dtype):
    """Captured one after the other and replayed in any order, among calls that are not captured."""
    problems = [layer(T, 20, 64, 1150, dtype) for T in (70, 9, 33, 3)]
    expected = [outcome(ours(impl), *problem) for problem in problems]
    stream, captured = torch.cuda.Stream(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for problem in problems:
            outcome(ours(impl), *problem)
    torch.cuda.current_stream().wait_stream(stream)
    for problem in problems:
        graph, call = torch.cuda.CUDAGraph(), ours(impl)
        with torch.cuda.graph(graph):
            captured.append((graph, outcome(call, *problem)))
    for i in (0, 1, 2, 3, 2, 0, 3, 3, 1, 0):
        graph, results = captured[i]
        for x in results.values():
            x.zero_()
        graph.replay()
        for found, wanted in ((results, expected[i]), (outcome(ours(impl), *problems[i - 1]), expected[i - 1])):
            for name, x in wanted.items():  # products of a library may be made in another way within a graph
                testing.assert_close(name, found[name], x.double(), torch.finfo(dtype).eps ** 0.7)


@pytest.mark.parametrize("impl", CUDA)
def test_after_an_exception(impl, monkeypatch):
    """Nothing of a call that failed is left for the next one to wait for."""
    leaves, upstream = layer(20, 20, 64, 400)
    first = outcome(ours(impl), leaves, upstream)
    for _ in range(3):
        with pytest.raises(ValueError, match="w_hh must have shape"):
            lstm(*leaves[:4], leaves[4][:-4], *leaves[5:], impl=impl)
        projected = torch.randn(20, 20, 1600, device="cuda")
        with pytest.raises(RuntimeError, match="w_hh must have shape"):
            torch.ops.fastlm.lstm_fwd(projected, leaves[4][:-4], *leaves[1:3], None, 0.0, False, True, False)
        results = ours(impl)(*leaves)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[lstm.__module__], "weight_gradient", out_of_memory)
            with pytest.raises(MemoryError):
                torch.autograd.grad(results, leaves, upstream)
        assert equal(outcome(ours(impl), leaves, upstream), first)


def out_of_memory(*_):
    raise MemoryError


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("kind", "exchange"), WAYS)
@pytest.mark.parametrize("impl", CUDA)
def test_nan_and_infinity_stop_nothing(impl, kind, exchange, bad, monkeypatch):
    """They stay in their row of the batch on the way forward; on the way back they may reach all, but it ends."""
    monkeypatch.setenv("FASTLM_CUDA_EXCHANGE", exchange)
    with tf32(kind == "tf32"):
        for where in (0, 1):  # the input, the state
            leaves, upstream = layer(20, 20, 64, 400, KINDS[kind])
            clean = outcome(ours(impl), leaves, upstream)
            with torch.no_grad():
                leaves[where].select(-2, 5)[..., 3] = bad
            found = outcome(ours(impl), leaves, upstream)
            others = torch.arange(20, device="cuda") != 5
            assert torch.equal(found["y"][:, others], clean["y"][:, others])
            assert found["y"][:, others].isfinite().all()
            if bad != bad:
                assert found["y"][-1, 5].isnan().all() and found["dw_hh"].isnan().any()
            leaves, upstream = layer(20, 20, 64, 400, KINDS[kind])
            upstream[0][10, 5, 3] = bad
            assert not outcome(ours(impl), leaves, upstream)["dx"][:, 5].isfinite().all()
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", CUDA)
def test_a_long_stream_in_parts(impl, dtype):
    """float32 states between calls: one call equals any split, that of a few steps on the other path included."""
    (x, h, c, *weights), _ = layer(70, 20, 64, 400, dtype)
    x, h, c, *weights = (t.detach() for t in (x, h.float(), c.float(), *weights))
    whole = lstm(x, h, c, *weights, impl=impl)
    parts = []
    for chunk in x.split([40, 3, 0, 27]):
        y, h, c = lstm(chunk, h, c, *weights, impl=impl)
        parts.append(y)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for name, a, e in zip(NAMES, (torch.cat(parts), h, c), whole, strict=False):
        testing.assert_close(name, a, e.double(), tolerance)
