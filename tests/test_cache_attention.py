"""The continuous cache: what a row sees, one-hot arithmetic in float64, and that no split of a stream shows."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import testing
from fastlm.ops import cache_attention

module = importlib.import_module("fastlm.ops.cache_attention")  # the name in the package is the function
pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = [*testing.impls("cache_attention"), "fallback"]
GPU, LARGE, WIDE = "cuda", (20_000, 400), (torch.float32, torch.float64)
THETAS = [0.0, 0.3, 0.662, 40.0]
# rows, rows of memory, width, words, windows
SHAPES = [
    (0, 0, 4, 5, [3]),
    (0, 7, 4, 5, [3]),
    (1, 0, 4, 5, [3, 9]),
    (1, 2, 4, 5, [3]),
    (5, 0, 0, 2, [2]),
    (97, 0, 1, 3, [1]),
    (193, 40, 8, 7, [1, 2, 31, 32, 33, 64, 100, 500]),
    (130, 500, 37, 1, [95, 96, 97]),
    (64, 30, 403, 2000, [1000]),
]


@pytest.fixture
def run(monkeypatch):
    """Call an implementation by name; "fallback" is the vectorised PyTorch one even where there is a kernel."""

    def call(impl, hidden, next_ids, **options):
        if impl == "fallback":
            monkeypatch.setattr(module._lib, "kernel", lambda *_: module._blocked)
            monkeypatch.setattr(module._lib, "resolve", lambda *_: "fallback")
            impl = "auto"
        result = cache_attention(hidden, next_ids, impl=impl, **options)
        monkeypatch.undo()
        return result

    return call


def stream(rows, width, words, dtype=torch.float32):
    return torch.randn(rows, width).mul(0.7).to(dtype), torch.randint(words, (rows,))


def assert_accurate(actual, plain, exact):
    """Both results, their -inf in the same places and the rest as near to float64 as plain PyTorch."""
    for name, a, p, e in zip(("log_mass", "log_norm"), actual, plain, exact, strict=True):
        assert a.dtype == torch.float32 and a.shape == e.shape
        empty = e.isinf()
        assert torch.equal(a.isinf(), empty), f"{name}: -inf in other places"
        testing.assert_accurate(name, a[~empty], p[~empty], e[~empty])


def one_hot_probability(hidden, next_ids, theta, window):
    """Softmax over the positions of the window times one-hot rows, and the entry of the next word."""
    rows = torch.eye(int(next_ids.max()) + 1, dtype=torch.float64)[next_ids]
    out = torch.zeros(len(hidden), dtype=torch.float64)
    for t in range(1, len(hidden)):
        seen = slice(max(0, t - window), t)
        weights = (theta * (hidden[seen].double() @ hidden[t].double())).softmax(0)
        out[t] = (weights[:, None] * rows[seen]).sum(0)[next_ids[t]]
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [1, 13, 200])
def test_probability_is_that_of_one_hot_arithmetic(run, impl, window):
    hidden, next_ids = stream(150, 12, 9)
    log_mass, log_norm = run(impl, hidden, next_ids, theta=0.8, window=window)
    assert log_mass.shape == log_norm.shape == (1, 1, 150)
    probability = (log_mass - log_norm)[0, 0, 1:].exp()
    assert (probability - one_hot_probability(hidden, next_ids, 0.8, window)[1:]).abs().max() < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bounded", [False, True])
def test_values(run, impl, dtype, shape, bounded):
    rows, past, width, words, windows = shape
    hidden, next_ids = stream(rows, width, words, dtype)
    memory = stream(past, width, words, dtype) if past else None
    options = dict(theta=THETAS, window=windows)
    if bounded:
        options["start"] = torch.randint(-past - 5, rows + 5, (rows,))
    exact_memory = memory and (memory[0].double(), memory[1])
    exact = cache_attention(hidden.double(), next_ids, memory=exact_memory, impl="reference", **options)
    plain = cache_attention(hidden, next_ids, memory=memory, impl="reference", **options)
    assert_accurate(run(impl, hidden, next_ids, memory=memory, **options), plain, exact)


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(0, 130), st.integers(0, 70), st.integers(0, 20)),
    st.lists(st.integers(1, 150), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_shape(shape, windows, bounded):
    rows, past, width = shape
    torch.manual_seed(sum(shape))
    hidden, next_ids = stream(rows, width, 5)
    memory, memory_ids = stream(past, width, 5)
    options = dict(theta=[0.2, 0.9], window=windows)
    options["start"] = torch.randint(-past - 3, rows + 3, (rows,)) if bounded else None
    exact_memory = (memory.double(), memory_ids)
    exact = cache_attention(hidden.double(), next_ids, memory=exact_memory, impl="reference", **options)
    plain = cache_attention(hidden, next_ids, memory=(memory, memory_ids), impl="reference", **options)
    assert_accurate(cache_attention(hidden, next_ids, memory=(memory, memory_ids), **options), plain, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 50, 149], [96, 97], [120]])
def test_any_split_of_a_stream_gives_the_same(run, impl, cuts):
    hidden, next_ids = stream(200, 20, 30)
    options = dict(theta=[0.4, 1.1], window=[7, 64])
    whole = run(impl, hidden, next_ids, **options)
    for keep in (64, 10**6):
        parts = []
        for begin, end in zip([0, *cuts], [*cuts, 200], strict=True):
            past = slice(max(0, begin - keep), begin)
            parts.append(
                run(impl, hidden[begin:end], next_ids[begin:end], memory=(hidden[past], next_ids[past]), **options)
            )
        for i in range(2):
            joined = torch.cat([part[i] for part in parts], dim=-1)
            assert torch.allclose(joined, whole[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_never_sees_its_own_answer_nor_the_future(run, impl):
    hidden, next_ids = stream(120, 8, 6)
    next_ids[77] = 1000  # once in the whole stream
    log_mass, log_norm = run(impl, hidden, next_ids, theta=1.0, window=50)
    assert log_mass[0, 0, 77] == float("-inf") and log_norm[0, 0, 77].isfinite()
    later_hidden, later_ids = hidden.clone(), next_ids.clone()
    later_hidden[78:], later_ids[77:] = 9.0, 0
    changed = run(impl, later_hidden, later_ids, theta=1.0, window=50)
    assert torch.equal(changed[0][..., :77], log_mass[..., :77])
    assert torch.equal(changed[1][..., :78], log_norm[..., :78])


@pytest.mark.parametrize("impl", IMPLS)
def test_theta_zero_counts_words(run, impl):
    hidden, next_ids = stream(100, 5, 4)
    log_mass, log_norm = run(impl, hidden, next_ids, theta=0, window=30)
    for t in range(100):
        seen = next_ids[max(0, t - 30) : t]
        assert abs(log_norm[0, 0, t].exp() - len(seen)) < 1e-4
        assert abs(log_mass[0, 0, t].exp() - (seen == next_ids[t]).sum()) < 1e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_theta_attends_to_the_best_pair(run, impl):
    hidden, next_ids = stream(150, 16, 3)
    log_mass, log_norm = run(impl, hidden, next_ids, theta=1e29, window=40)
    for t in range(1, 150):
        first = max(0, t - 40)
        best = first + int((hidden[first:t].double() @ hidden[t].double()).argmax())
        probability = (log_mass - log_norm)[0, 0, t].exp()
        assert probability == float(next_ids[best] == next_ids[t])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_near_window_keeps_its_weight_beside_a_far_better_past(run, impl):
    hidden = torch.full((200, 1), 0.1)
    hidden[0] = 4000.0  # scores 400 against the 0.01 of the others: exp(-400) is 0 in float32
    next_ids = torch.zeros(200, dtype=torch.long)
    next_ids[0] = 1
    log_mass, log_norm = run(impl, hidden, next_ids, theta=1.0, window=[1, 5, 500])
    assert (log_norm[:2, 0, 150] - torch.tensor([0.01, 0.01 + torch.tensor(5.0).log()])).abs().max() < 1e-6
    assert abs(log_norm[2, 0, 150] - 400.0) < 1e-3
    assert abs(log_mass[2, 0, 150] - (0.01 + torch.tensor(149.0).log())) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_hidden_states_of_any_size(run, impl, size):
    hidden, next_ids = stream(150, 33, 5)
    hidden *= size * 10.0 ** torch.linspace(-3, 3, 33)  # beyond float16 within a row, too
    options = dict(theta=[1e-6 / size / size, 1e-5 / size / size], window=[40, 100])
    exact = cache_attention(hidden.double(), next_ids, impl="reference", **options)
    plain = cache_attention(hidden, next_ids, impl="reference", **options)
    assert_accurate(run(impl, hidden, next_ids, **options), plain, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("thetas, windows", [(11, [3, 50, 90]), (2, [1, 2, 5, 9, 14, 30, 50, 70, 77, 90, 130, 500])])
def test_more_than_one_pass_takes(run, impl, thetas, windows):
    hidden, next_ids = stream(140, 9, 4)
    options = dict(theta=[0.1 * k for k in range(thetas)], window=windows)
    exact = cache_attention(hidden.double(), next_ids, impl="reference", **options)
    plain = cache_attention(hidden, next_ids, impl="reference", **options)
    assert_accurate(run(impl, hidden, next_ids, **options), plain, exact)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl == "triton"])
@pytest.mark.parametrize("tile", [(64, 1, 2, 32), (64, 2, 3, 32)], ids=str)
def test_tiles_of_other_gpus(impl, tile, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastlm.triton.cache_attention"), "_tile", lambda hidden: tile)
    hidden, next_ids = stream(193, 40, 7)
    memory, start = stream(40, 40, 7), torch.randint(-45, 193, (193,))
    for options in (dict(start=start), dict()):
        options.update(theta=THETAS, window=[1, 31, 64, 500])
        exact_memory = (memory[0].double(), memory[1])
        exact = cache_attention(hidden.double(), next_ids, memory=exact_memory, impl="reference", **options)
        plain = cache_attention(hidden, next_ids, memory=memory, impl="reference", **options)
        assert_accurate(cache_attention(hidden, next_ids, memory=memory, impl=impl, **options), plain, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_word_has_all_the_weight(run, impl):
    hidden, _ = stream(140, 24, 1)
    log_mass, log_norm = run(impl, hidden, torch.full((140,), 7), theta=[0.1, 2.0], window=[3, 100])
    assert torch.equal(log_mass, log_norm)
    assert (log_norm[..., 0] == float("-inf")).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_start_separates_documents(run, impl):
    hidden, next_ids = stream(170, 10, 5)
    memory = stream(20, 10, 5)
    begins, options = [-8, 30, 31, 140], dict(theta=[0.5], window=[12, 400])
    start = torch.tensor([max(b for b in begins if b <= t) for t in range(170)])
    together = run(impl, hidden, next_ids, memory=memory, start=start, **options)
    for begin, end in zip(begins, [*begins[1:], 170], strict=True):
        first = max(begin, 0)
        past = (memory[0][12:], memory[1][12:]) if begin < 0 else None
        alone = run(impl, hidden[first:end], next_ids[first:end], memory=past, **options)
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[..., first:end], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_results_come_in_the_order_of_the_arguments(run, impl):
    hidden, next_ids = stream(80, 6, 5)
    thetas, windows = [1.0, 0.2, 1.0], [50, 4, 50, 9]
    grid = run(impl, hidden, next_ids, theta=thetas, window=windows)
    for j, window in enumerate(windows):
        for k, theta in enumerate(thetas):
            for a, b in zip(grid, run(impl, hidden, next_ids, theta=theta, window=window), strict=True):
                assert torch.allclose(a[j, k], b[0, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_very_wide_window_stays_accurate(run, impl):
    hidden, next_ids = stream(20, 2, 3)
    memory = stream(40_000 if testing.quick(impl, 40_000) else 3000, 2, 3)
    options = dict(theta=[0.01, 0.5], window=[1, 10**9])
    exact = cache_attention(
        hidden.double(), next_ids, memory=(memory[0].double(), memory[1]), impl="reference", **options
    )
    for a, e in zip(run(impl, hidden, next_ids, memory=memory, **options), exact, strict=True):
        finite = e.isfinite()
        assert (a[finite] - e[finite]).abs().max() < 3e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_int32_ids_are_left_alone(run, impl):
    hidden, next_ids = stream(90, 7, 4)
    memory = stream(15, 7, 4)
    expected = run("reference", hidden, next_ids, memory=memory, theta=0.5, window=20)
    inputs = (testing.strided(hidden), testing.strided(next_ids), *map(testing.strided, memory))
    copies = [x.clone() for x in inputs]
    for ids in (inputs[1], next_ids.int()):
        result = run(impl, inputs[0], ids, memory=inputs[2:], theta=0.5, window=20)
        for a, b in zip(result, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl not in ("reference", "fallback")])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_nan_is_not_hidden(impl, dtype):
    hidden, next_ids = stream(60, 6, 2, dtype)
    hidden[20, 3] = float("nan")
    log_mass, log_norm = cache_attention(hidden, next_ids, theta=[0.0, 1.0], window=[3, 30], impl=impl)
    assert log_norm[..., 20].isnan().all() and log_norm[1, :, 21:51].isnan().all()
    assert log_norm[0, :, 24:].isfinite().all() and log_norm[:, :, 1:20].isfinite().all()


def test_operator_is_well_registered():
    hidden, next_ids = stream(11, 3, 4)
    memory, memory_ids = stream(4, 3, 4)
    op = torch.ops.fastlm.cache_attention.default
    torch.library.opcheck(op, (hidden, next_ids, memory, memory_ids, torch.arange(11), [0.5, 1.0], [2, 9]))
    torch.library.opcheck(op, (hidden.half(), next_ids, None, None, None, [0.5], [3]))


def test_compile():
    compiled = torch.compile(
        lambda hidden, ids: cache_attention(hidden, ids, theta=[0.5, 1.0], window=[9, 3]),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",  # the operator is opaque to code generation
    )
    for rows in (20, 33):
        hidden, next_ids = stream(rows, 5, 4)
        expected = cache_attention(hidden, next_ids, theta=[0.5, 1.0], window=[9, 3])
        for a, b in zip(compiled(hidden, next_ids), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_touch_the_scores(run, impl):
    hidden, next_ids = stream(50, 9, 3)
    expected = run(impl, hidden, next_ids, theta=1.0, window=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(impl, hidden, next_ids, theta=1.0, window=20)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_there_is_no_gradient_and_it_says_so():
    hidden, next_ids = stream(9, 3, 4)
    hidden.requires_grad_()
    with pytest.raises(ValueError, match="hidden must not require a gradient.*torch.no_grad"):
        cache_attention(hidden, next_ids, theta=1.0, window=3)
    with torch.no_grad():
        assert not cache_attention(hidden, next_ids, theta=1.0, window=3)[0].requires_grad


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl in ("auto", "triton")])
def test_same_bits_for_every_run_and_thread_count(impl):
    hidden, next_ids = stream(700 if testing.quick(impl, 700 * 33) else 150, 33, 20)
    threads = torch.get_num_threads()
    options = dict(theta=[0.5, 0.7], window=[40, 300], impl=impl)
    expected = cache_attention(hidden, next_ids, **options)
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            result = cache_attention(hidden, next_ids, **options)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 100, 1700, 5, [90])], ids=str)  # too deep for shared memory, too
def test_cuda_values(dtype, shape):
    rows, past, width, words, windows = shape
    hidden, next_ids = stream(rows, width, words, dtype)
    memory = stream(past, width, words, dtype) if past else None
    for start in (None, torch.randint(-past - 5, rows + 5, (rows,))):
        options = dict(theta=THETAS, window=windows, start=start)
        exact_memory = memory and (memory[0].double(), memory[1])
        exact = cache_attention(hidden.double(), next_ids, memory=exact_memory, impl="reference", **options)
        plain = cache_attention(hidden, next_ids, memory=memory, impl="reference", **options)
        options["start"] = None if start is None else start.to(GPU)
        options["memory"] = memory and tuple(x.to(GPU) for x in memory)
        for impl in testing.impls("cache_attention", GPU):
            found = cache_attention(hidden.to(GPU), next_ids.to(GPU).int(), impl=impl, **options)
            assert_accurate([x.cpu() for x in found], plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("grid", [([0.662], [3785]), ([0.1, 0.3, 0.5, 0.7, 0.9], [250, 1000, 3785])], ids=str)
def test_cuda_at_the_size_of_a_test_set(dtype, grid):
    N, D, block, (thetas, windows) = *LARGE, 64, grid
    hidden, next_ids = ((0.3 * torch.randn(N, D)).to(GPU, dtype), torch.randint(500, (N,)).to(GPU))
    for impl in testing.impls("cache_attention", GPU):
        if impl != "reference":
            found = cache_attention(hidden, next_ids, theta=thetas, window=windows, impl=impl)
            again = cache_attention(hidden, next_ids, theta=thetas, window=windows, impl=impl)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            for first in (1, 3780, N // 2, N - block):
                rows, past = slice(first, first + block), slice(max(0, first - windows[-1]), first)
                inputs = (hidden[rows], next_ids[rows], hidden[past], next_ids[past])
                wide, exact = ([x.to(kind) if x.is_floating_point() else x for x in inputs] for kind in WIDE)
                plain, exact = (module._blocked(*x, None, thetas, windows) for x in (wide, exact))
                assert_accurate([x[..., rows] for x in found], plain, exact)


def test_every_instruction_set(fresh_python, instruction_set):
    fresh_python(
        "import torch\n"
        "from fastlm import _lib\n"
        "from fastlm.ops import cache_attention\n"
        f"assert _lib.instruction_set() == {instruction_set!r}\n"
        "ids, start = torch.randint(9, (230,)), torch.randint(-20, 230, (230,))\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    h = torch.randn(230, 37).mul(0.5).to(dtype)\n"
        "    for bound in (None, start):\n"
        "        args = dict(theta=[0.0, 0.6, 9.0], window=[1, 33, 64, 200], start=bound)\n"
        "        args['memory'] = (h[:50], ids[:50])\n"
        "        for a, b in zip(*(cache_attention(h, ids, impl=i, **args) for i in ('cpu', 'reference'))):\n"
        "            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), (a - b).abs().max()\n",
        FASTLM_CPU=instruction_set,
    )


def test_errors():
    hidden, next_ids = stream(6, 3, 4)
    options = dict(theta=1.0, window=3)
    for theta in (-0.1, float("nan"), 1e30):
        with pytest.raises(ValueError, match=r"theta must lie in \[0, 1e30\)"):
            cache_attention(hidden, next_ids, theta=theta, window=3)
    for window in (0, -1, 2.5, 3.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="window must be an integer >= 1"):
            cache_attention(hidden, next_ids, theta=1.0, window=window)
    with pytest.raises(ValueError, match="window must be a number or a sequence of numbers, got an empty"):
        cache_attention(hidden, next_ids, theta=1.0, window=[])
    with pytest.raises(ValueError, match=r"hidden must have shape \[N, D\], got \[6, 1, 3\]"):
        cache_attention(hidden[:, None], next_ids, **options)
    with pytest.raises(ValueError, match=r"next_ids must have shape \[N\] = \[6\], got \[5\]"):
        cache_attention(hidden, next_ids[:5], **options)
    with pytest.raises(TypeError, match="next_ids must be an int64 or int32 tensor, got torch.float32"):
        cache_attention(hidden, next_ids.float(), **options)
    with pytest.raises(TypeError, match="hidden must be float32.*got torch.int64"):
        cache_attention(hidden.long(), next_ids, **options)
    with pytest.raises(ValueError, match=r"memory\[0\] must have shape \[M, D\] = \[6, 3\], got \[6, 2\]"):
        cache_attention(hidden, next_ids, memory=(hidden[:, :2], next_ids), **options)
    with pytest.raises(TypeError, match=r"memory\[0\] must be torch.float32 like hidden, got torch.float16"):
        cache_attention(hidden, next_ids, memory=(hidden.half(), next_ids), **options)
    with pytest.raises(ValueError, match=r"start must have shape \[N\] = \[6\], got \[2\]"):
        cache_attention(hidden, next_ids, start=torch.tensor([0, 1]), **options)
    with pytest.raises(TypeError, match="start must be an int64 or int32 tensor"):
        cache_attention(hidden, next_ids, start=torch.zeros(6), **options)
    with pytest.raises((RuntimeError, TypeError), match="cache_attention: "):
        cache_attention(hidden, next_ids, impl="cuda", **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_ids_that_do_not_fit_raise_instead_of_matching(run, impl):
    hidden, next_ids = stream(6, 3, 4)
    for large in (next_ids + 2**32, next_ids - 2**32):
        with pytest.raises(ValueError, match=r"^next_ids must lie in \[-2147483648, 2147483648\), 32 bits, got -?\d+$"):
            run(impl, hidden, large, theta=1.0, window=3)
        with pytest.raises(ValueError, match=r"^memory\[1\] must lie in"):
            run(impl, hidden, next_ids, theta=1.0, window=3, memory=(hidden, large))


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_windows_see_everything(run, impl):
    hidden, next_ids = stream(30, 3, 4)
    options = dict(theta=[0.5, 1.0], memory=(hidden[:9], next_ids[:9]))
    expected = run(impl, hidden, next_ids, window=[5, 39, 39], **options)
    actual = run(impl, hidden, next_ids, window=[5, 2**62, 10**30], **options)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
