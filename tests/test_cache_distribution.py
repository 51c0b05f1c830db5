"""The cache's distribution over the vocabulary: it sums to one, agrees with the stream form, and hides no bad id."""

import importlib

import pytest
import torch

from fastlm import _lib, testing
from fastlm.ops import cache_attention, cache_distribution
from fastlm.ops.cache_distribution import reference

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = testing.impls("cache_distribution")
GPU = "cuda"
# streams, window, width, words
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 4), (2, 130, 33, 900), (4, 9, 0, 3), (1, 20, 600, 7), (1, 8300, 1, 1500)]


def ring(batch, window, width, words, dtype=torch.float32):
    query = torch.randn(batch, width).to(dtype)
    return query, torch.randn(batch, window, width).to(dtype), torch.randint(words, (batch, window))


def oracle(query, keys, ids, count, words, theta):
    out = torch.zeros(len(query), words, dtype=torch.float64)
    for b in range(len(query)):
        n = int(count[b])
        weights = (theta * (keys[b, :n].double() @ query[b].double())).softmax(0)
        for i in range(n):
            out[b, ids[b, i]] += weights[i]
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(impl, dtype, shape):
    if impl in ("cpu", "triton") and dtype == torch.float64:
        dtype = torch.float32  # they have no float64
    batch, window, width, words = shape
    if not testing.quick(impl, window):
        pytest.skip("minutes in the interpreter")
    query, keys, ids = ring(*shape, dtype)
    count = torch.randint(1, window + 1, (batch,))
    for theta in (0.0, 0.7, 200.0):
        out = cache_distribution(query, keys, ids, count, words, theta=theta, impl=impl)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = oracle(query, keys, ids, count, words, theta)
        # 200 times the rounding of a score in float32, which plain PyTorch has as well
        assert (out - exact).abs().max() < (1e-14 if dtype == torch.float64 else 1e-6 + 1e-7 * theta * width)
        assert (out.double().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_the_stream_form_at_the_target(impl):
    hidden, next_ids = torch.randn(40, 8), torch.randint(6, (40,))
    log_mass, log_norm = cache_attention(hidden, next_ids, theta=0.9, window=15)
    for t in (1, 7, 39):
        seen = slice(max(0, t - 15), t)
        out = cache_distribution(hidden[t : t + 1], hidden[None, seen], next_ids[None, seen], min(t, 15), 6, theta=0.9)
        assert abs(out[0, next_ids[t]] - (log_mass - log_norm)[0, 0, t].exp()) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_order_in_the_ring_does_not_matter(impl):
    query, keys, ids = ring(3, 64, 16, 10)
    out = cache_distribution(query, keys, ids, 64, 10, theta=0.5, impl=impl)
    for shift in (1, 30):
        turned = cache_distribution(query, keys.roll(shift, 1), ids.roll(shift, 1), 64, 10, theta=0.5, impl=impl)
        assert torch.allclose(turned, out, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_entries_beyond_the_count_do_not_matter(impl):
    query, keys, ids = ring(3, 20, 4, 10)
    count = torch.tensor([0, 5, 20], dtype=torch.int32)
    expected = cache_distribution(query, keys, ids, count, 10, theta=0.5, impl=impl)
    for b, n in enumerate(count):
        keys[b, n:], ids[b, n:] = float("nan"), -(2**40)
    out = cache_distribution(query, keys, ids, count, 10, theta=0.5, impl=impl)
    assert torch.equal(out, expected)
    assert not out[0].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(impl):
    query, keys, ids = ring(4, 6, 3, 5)
    expected = cache_distribution(query, keys, ids, 6, 5, theta=0.5, impl=impl)
    query[1, 0], keys[2, 4, 1] = float("nan"), float("inf")
    out = cache_distribution(query, keys, ids, 6, 5, theta=0.5, impl=impl)
    assert out[1:3].isnan().all() and torch.equal(out[::3], expected[::3])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_times_a_large_theta_stay_finite(impl):
    keys = torch.full((1, 3, 2), 1e5)
    keys[0, 1] = 0.0
    out = cache_distribution(keys[:, 0], keys, torch.tensor([[2, 1, 0]]), 3, 4, theta=1e29, impl=impl)
    assert torch.equal(out, torch.tensor([[0.5, 0.0, 0.5, 0.0]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_sizes(impl):
    assert cache_distribution(*ring(0, 3, 2, 5), 3, 5, theta=1.0, impl=impl).shape == (0, 5)
    assert torch.equal(cache_distribution(*ring(2, 0, 2, 5), 0, 5, theta=1.0, impl=impl), torch.zeros(2, 5))


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_and_strides_give_the_same_bits(impl):
    query, keys, ids = ring(4, 300, 24, 3)
    out = cache_distribution(query, keys, ids, 300, 3, theta=0.3, impl=impl)
    for _ in range(3):
        assert torch.equal(cache_distribution(query, keys, ids.int(), 300, 3, theta=0.3, impl=impl), out)
    strided = cache_distribution(*map(testing.strided, (query, keys, ids)), 300, 3, theta=0.3, impl=impl)
    assert torch.allclose(strided, out, rtol=1e-6, atol=0)


def test_operator_is_well_registered():
    query, keys, ids = ring(3, 9, 4, 10)
    count = torch.tensor([0, 5, 9])
    torch.library.opcheck(torch.ops.fastlm.cache_distribution.default, (query, keys, ids, count, 10, 0.5))


def test_compile():
    def run(*args):
        return cache_distribution(*args, 10, theta=0.5)

    args = (*ring(3, 9, 4, 10), torch.tensor([0, 5, 9]))
    # The operator is opaque to code generation, so any backend will do.
    assert torch.equal(torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")(*args), run(*args))


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl == "triton"])
def test_runs_are_joined_some_at_a_time(impl, monkeypatch):
    query, keys, ids = ring(2, 300, 3, 10)
    monkeypatch.setattr(importlib.import_module("fastlm.triton.cache_distribution"), "RUNS", 8)
    out = cache_distribution(query, keys, ids, 300, 10, theta=0.7, impl=impl)
    assert (out - oracle(query, keys, ids, [300, 300], 10, 0.7)).abs().max() < 1e-6


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl == "triton"])
def test_kernels_check_values_themselves(impl):
    query, keys, ids = ring(2, 40, 3, 10)
    call = _lib.kernel("cache_distribution", impl)
    for wrong in (-1, 10, 2**40):
        ids[1, 17] = wrong
        with pytest.raises(RuntimeError, match="cache_distribution: ids outside the vocabulary"):
            call(query, keys, ids, torch.tensor([40, 18]), 10, 1.0)
        call(query, keys, ids, torch.tensor([40, 17]), 10, 1.0)
    for window in (0, 40):
        for count in (-1, window + 1):
            given = torch.tensor([0, count])
            with pytest.raises(RuntimeError, match=r"cache_distribution: count outside \[0, W\]"):
                call(query, keys[:, :window], ids[:, :window].clamp(0, 9), given, 10, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3785, 400, 33_278)], ids=str)
def test_cuda_values(dtype, shape):
    batch, window, _, words = shape
    query, keys, ids = ring(*shape, dtype)
    keys *= 0.2
    count = torch.randint(1, window + 1, (batch,))
    exact = oracle(query, keys, ids, count, words, 0.7)
    plain = reference(query, keys, ids, count, words, 0.7)
    on_gpu = [x.to(GPU) for x in (query, keys, ids, count)]
    for impl in testing.impls("cache_distribution", GPU):
        out = cache_distribution(*on_gpu, words, theta=0.7, impl=impl)
        testing.assert_accurate(impl, out.cpu(), plain, exact)
        assert torch.equal(cache_distribution(*on_gpu, words, theta=0.7, impl=impl), out)


@pytest.mark.gpu
@pytest.mark.parametrize(("ids", "count"), [("5", "2"), ("-1", "2"), ("0", "3")])
def test_cuda_asserts_on_wrong_values(fresh_python, ids, count):
    assert "stopped" in fresh_python(
        "import torch\n"
        "from fastlm.ops import cache_distribution\n"
        "x = torch.zeros(1, 2, 4, device='cuda')\n"
        f"ids, count = torch.tensor([[0, {ids}]], device='cuda'), torch.tensor([{count}], device='cuda')\n"
        "try:\n"
        "    cache_distribution(x[:, 0], x, ids, count, 5, theta=1.0, impl='triton')\n"
        "    torch.cuda.synchronize()\n"
        "except RuntimeError:\n"
        "    print('stopped', flush=True)\n"
        "import os\n"
        "os._exit(0)\n"  # tear-down of a lost context may abort
    )


def test_errors():
    query, keys, ids = ring(2, 5, 3, 10)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 10\)"):
        cache_distribution(query, keys, ids + 5 + 10, 5, 10, theta=1.0)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 10\)"):
        cache_distribution(query, keys, ids - 11, 5, 10, theta=1.0)
    for count in (-1, 6):
        for given in (count, torch.tensor([1, count])):
            with pytest.raises(ValueError, match=rf"count must lie in \[0, W\] = \[0, 5\], got .*{count}\]"):
                cache_distribution(query, keys, ids, given, 10, theta=1.0)
    with pytest.raises(ValueError, match=r"theta must lie in \[0, 1e30\), got -1.0"):
        cache_distribution(query, keys, ids, 5, 10, theta=-1)
    with pytest.raises(ValueError, match=r"keys must have shape \[B, W, D\] = \[2, 5, 3\], got \[2, 5, 2\]"):
        cache_distribution(query, keys[:, :, :2], ids, 5, 10, theta=1.0)
    with pytest.raises(ValueError, match=r"ids must have shape \[B, W\] = \[2, 5\], got \[2, 4\]"):
        cache_distribution(query, keys, ids[:, :4], 5, 10, theta=1.0)
    with pytest.raises(TypeError, match="keys must be torch.float32 like query, got torch.float16"):
        cache_distribution(query, keys.half(), ids, 5, 10, theta=1.0)
    with pytest.raises(TypeError, match="count must be an int64 or int32 tensor, got torch.float32"):
        cache_distribution(query, keys, ids, torch.ones(2), 10, theta=1.0)
    with pytest.raises(ValueError, match="keys must not require a gradient"):
        cache_distribution(query, keys.requires_grad_(), ids, 5, 10, theta=1.0)
    with pytest.raises(RuntimeError, match="impl=.cuda. needs|no .cuda. kernel"):
        cache_distribution(query.detach(), keys.detach(), ids, 5, 10, theta=1.0, impl="cuda")
