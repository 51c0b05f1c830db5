"""Linear cross entropy on a GPU, at the sizes of real vocabularies: values, offsets past 2^31, memory, graphs."""

import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy import ALL_OPTIONS, assert_accurate, layer, module, outcome

from fastlm import testing
from fastlm.ops import linear_cross_entropy

pytestmark = pytest.mark.gpu
IMPLS = testing.impls("linear_cross_entropy", "cuda")
SHAPES = [(570, 50, 123), (330, 205, 37), (127, 10_000, 400), (70, 33_278, 1150), (90, 50_257, 200)]
DEVICE = "cuda"


@pytest.fixture(params=IMPLS)
def loss_of(request):
    return lambda *args, **options: linear_cross_entropy(*args, impl=request.param, **options)


def on_gpu(rows, classes, width, dtype=torch.float32, scale=1.0):
    return [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in layer(rows, classes, width, dtype, scale)]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(loss_of, dtype, shape):
    input, weight, bias, target = on_gpu(*shape, dtype, scale=shape[2] ** -0.5)
    assert_accurate(loss_of, input, weight, target, bias)
    assert_accurate(loss_of, input, weight, target, bias, torch.tensor(-3.0, device=DEVICE), **ALL_OPTIONS)
    target[1::3] = -100
    upstream = torch.randn(shape[0], device=DEVICE)
    assert_accurate(loss_of, input, weight, target, None, upstream, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 2, 8), (127, 3, 0)], ids=str)
def test_tiny(loss_of, shape):
    input, weight, bias, target = on_gpu(*shape)
    assert_accurate(loss_of, input, weight, target, bias, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_wikitext_2(loss_of, dtype):
    assert_accurate(loss_of, *(on_gpu(5600, 33_278, 400, dtype, scale=0.05)[i] for i in (0, 1, 3, 2)))


@pytest.mark.parametrize("chunks", [1, 5])
def test_wikitext_103_past_32_bits(loss_of, monkeypatch, chunks):
    rows, classes, width = 8400, 267_735, 400
    if chunks == 1:
        monkeypatch.setitem(module._CHUNK_ROWS, "cuda", (rows, rows))
    assert len(module._chunks(rows, classes, "cuda", 2)) == chunks + 1
    input, weight, bias, target = on_gpu(rows, classes, width, torch.bfloat16, scale=0.05)
    upstream = torch.rand(rows, device=DEVICE)
    loss, d_input, d_weight, d_bias = outcome(loss_of, input, weight, target, bias, upstream, reduction="none")
    assert all(x.isfinite().all() for x in (loss, d_input, d_weight, d_bias))
    x, w, b = (t.detach().float() for t in (input, weight, bias))
    lse = torch.cat([torch.addmm(b, part, w.T).logsumexp(1) for part in x.split(512)])
    testing.assert_close("loss", loss, (lse - (x * w[target]).sum(1) - b[target]).double(), 1e-3)
    some = torch.tensor([0, 1, 4199, 8020, 8021, rows - 1], device=DEVICE)  # 8021 V is the first above 2^31
    p = torch.addmm(b, x[some], w.T).softmax(1)
    p[torch.arange(len(some)), target[some]] -= 1
    testing.assert_close("input", d_input[some], (upstream[some, None] * (p @ w)).double(), 1e-2)
    words = torch.cat([target[:20], target[-20:], torch.tensor([0, 1, classes - 1], device=DEVICE)])
    p = (torch.addmm(b[words], x, w[words].T) - lse[:, None]).exp() - (target[:, None] == words).float()
    p *= upstream[:, None]
    testing.assert_close("weight", d_weight[words], (p.T @ x).double(), 2e-2)
    testing.assert_close("bias", d_bias[words], p.sum(0).double(), 2e-2)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize(("train", "limit"), [(True, 2e9), (False, 1e8)])
def test_memory(impl, train, limit):
    if not train and impl != "triton":
        pytest.skip("a chunk of the logits is in memory")
    input, weight, bias, target = on_gpu(8400, 267_735, 400, torch.bfloat16, scale=0.05)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.set_grad_enabled(train):
        loss = linear_cross_entropy(input, weight, target, bias=bias, impl=impl)
    if train:
        loss.backward()
    assert torch.cuda.max_memory_allocated() - before < limit


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_graph(loss_of, dtype, reduction):
    input, weight, bias, target = on_gpu(300, 1001, 64, dtype, scale=0.1)
    upstream = torch.rand(300, device=DEVICE) if reduction == "none" else None

    def step():
        return outcome(loss_of, input, weight, target, bias, upstream, reduction=reduction)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(), step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        input.copy_(torch.randn_like(input))
        target.copy_(torch.randint_like(target, 1001))
        target[:5] = -100
    graph.replay()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, a, e in zip(("loss", "input", "weight", "bias"), captured, step(), strict=True):
        testing.assert_close(name, a, e.double(), tolerance)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_at_every_run(loss_of, reduction):
    input, weight, bias, target = on_gpu(2100, 33_278, 400, torch.bfloat16, scale=0.05)
    upstream = torch.rand(2100, device=DEVICE) if reduction == "none" else None
    first, again = (outcome(loss_of, input, weight, target, bias, upstream, reduction=reduction) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_target_outside_the_vocabulary_is_a_device_assertion(fresh_python):
    said = fresh_python(
        "import torch\n"
        "from fastlm.ops import linear_cross_entropy\n"
        "x, w = torch.randn(4, 8, device='cuda'), torch.randn(9, 8, device='cuda')\n"
        "try:\n"
        "    print(linear_cross_entropy(x, w, torch.tensor([1, 9, 2, 3], device='cuda')).item())\n"
        "except RuntimeError as error:\n"
        "    print('refused', error, flush=True)\n"
        "import os\n"
        "os._exit(0)\n"  # tear-down of a lost context may abort
    )
    assert said.startswith("refused")


def test_autocast(loss_of):
    input, weight, bias, target = on_gpu(300, 1001, 64)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = loss_of(input, weight, target, bias=bias)
        expected = F.cross_entropy(F.linear(input, weight, bias), target)
    testing.assert_close("loss", loss, expected.double(), 1e-3)
    gradients = torch.autograd.grad(loss, (input, weight, bias))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in gradients)
