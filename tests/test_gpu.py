"""Every implementation of every operator on a GPU: what only a GPU shows, from the one table of `gpu_table.py`.

The tests that a CPU can run go through the table there too, in Triton's interpreter where an operator has kernels, so
that the table is known to be right before a GPU sees it.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parent))

from gpu_table import CASES, assert_right, draw, outcome, pattern, several, weights

from fastlm import _lib, ops, testing
from fastlm.ops import philox

SIZES = {"cpu": (5, 9), "cuda": (37, 150)}  # T and the width; the interpreter is slow


def runs(*devices: str, named: tuple[str, ...] = ("auto", "triton", "cpu", "cuda", "aten", "reference"), where=None):
    """Parameters (device, case, impl): all that a device has of the implementations named."""
    found = []
    for device in devices:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for case in filter(where, CASES):
            impls = [impl for impl in testing.impls(case.op, device) if impl in named]
            found += [pytest.param(device, case, i, marks=marks, id=f"{device}-{case}-{i}") for i in impls]
    return pytest.mark.parametrize(("device", "case", "impl"), found)


OURS = ("auto", "triton", "cuda", "aten")
KERNELS = ("triton", "cuda")


def dtypes(case, device):
    """Those that the operator declares, as its inputs; in the interpreter two."""
    declared = _lib.ops[case.op].dtypes
    if not declared[0].is_floating_point:
        return (torch.float32,)
    return declared if device == "cuda" else declared[:2]


@pytest.fixture(autouse=True)
def products_in_float32():
    """cuDNN's LSTM takes TF32 else, whose errors are not those of float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def drawn(case, device, dtype=torch.float32, T=None):
    """Inputs and gradients of the size for the device."""
    steps, width = SIZES[device.partition(":")[0]]
    T = steps if T is None else T
    return draw(case, T, width, dtype, device), weights(case, T, width, device)


def near(ours, expected):
    """Equal but for the order in which a library may add."""
    assert ours.keys() == expected.keys()
    for name, wanted in expected.items():
        assert ours[name].dtype == wanted.dtype, name
        testing.assert_close(str(name), ours[name], wanted.double(), 1e-5)


def test_the_table_has_every_operator():
    assert {case.op for case in CASES} == set(_lib.ops)
    assert len({str(case) for case in CASES}) == len(CASES)


@runs("cpu", "cuda")
def test_values_and_gradients(device, case, impl, poisoned):
    for dtype in dtypes(case, device):
        inputs, grads = drawn(case, device, dtype)
        before = {name: x.detach().clone() for name, x in inputs.items()}
        ours = outcome(case, inputs, grads, impl)
        assert_right(case, inputs, grads, ours)
        for name, x in before.items():
            assert torch.equal(inputs[name].detach(), x), f"{name} was modified"


@runs("cpu", "cuda", where=lambda case: case.masked)
def test_masks_are_those_of_the_reference(device, case, impl):
    inputs, grads = drawn(case, device)
    on_cpu = {name: x.detach().cpu().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    expected = pattern(case, outcome(case, on_cpu, [grad.cpu() for grad in grads], "reference"))
    found = pattern(case, outcome(case, inputs, grads, impl))
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted) and 0.05 < wanted.double().mean() < 0.95


@runs("cpu", "cuda", where=lambda case: case.op == "dropconnect_mask")
def test_masks_of_any_seed_and_length(device, case, impl):
    counts = (0, 1, 5, 4099) if device == "cuda" else (0, 1, 5, 130)
    for value in testing.SEEDS:
        seed = torch.tensor(value, device=device)
        for count in counts:
            for p, stream in ((0.0, 0), (0.3, 1), (0.5, 2), (1.0, 3)):
                mask = ops.dropconnect_mask((count,), p, seed, stream=stream, impl=impl)
                assert torch.equal(mask.cpu(), philox.keep_mask((count,), p, seed.cpu(), stream))


class Calls(TorchDispatchMode):
    """Notes each call of an operator of the package, with its arguments as they were."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == _lib.NAMESPACE:
            self.seen.append((function, [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]))
        return function(*args, **kwargs or {})


@runs("cpu", "cuda", named=OURS)
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_operators_are_well_registered(device, case, impl):
    inputs, grads = drawn(case, device)
    with Calls() as calls:
        outcome(case, inputs, grads, impl)
    for function, args in calls.seen:
        torch.library.opcheck(function, tuple(args))
    overloads = {function._overloadname for function, _ in calls.seen}
    if impl in KERNELS:
        assert ("triton" in overloads) == (impl == "triton"), calls.seen


@runs("cpu", "cuda", named=OURS)
def test_compile(device, case, impl):
    torch._dynamo.reset()
    # PyTorch's own compiler once an operator: the operators are opaque to it, and it takes seconds.
    backend = "inductor" if device == "cuda" and impl == "auto" else "aot_eager"
    compiled = torch.compile(
        lambda inputs: several(case.call(**inputs, impl=impl)), fullgraph=True, dynamic=True, backend=backend
    )
    for T in (5, 9) if device == "cpu" else (37, 50):
        inputs, grads = drawn(case, device, T=T)
        expected = outcome(case, inputs, grads, impl)
        through = case._replace(call=lambda impl, **inputs: compiled(inputs))
        near(outcome(through, inputs, grads, impl), expected)


@runs("cpu", "cuda", named=OURS)
def test_export(device, case, impl):
    class Module(torch.nn.Module):
        def forward(self, inputs):
            return several(case.call(**inputs, impl=impl))

    inputs = {name: x.detach() for name, x in drawn(case, device)[0].items()}
    exported = torch.export.export(Module(), (inputs,)).module()
    ours, expected = (dict(enumerate(run(inputs))) for run in (exported, Module()))
    near(ours, expected)


@runs("cpu", "cuda", named=OURS, where=lambda case: case.wanted)
def test_autocast(device, case, impl):
    inputs, grads = drawn(case, device)
    exact = outcome(case, inputs, grads, "reference")
    with torch.autocast(device, torch.bfloat16):
        ours = outcome(case, inputs, grads, impl)
    for name, wanted in exact.items():
        assert testing.error(ours[name], wanted.double()) < 0.05, name
        if name.startswith("gradient"):
            assert ours[name].dtype == torch.float32


def warm(case, inputs, grads, impl):
    """Run on a stream of its own until nothing is compiled or allocated any more, as a capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            found = outcome(case, inputs, grads, impl)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return stream, found


@runs("cuda", named=OURS)
def test_cuda_graph(device, case, impl):
    inputs, grads = drawn(case, device)
    _, expected = warm(case, inputs, grads, impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outcome(case, inputs, grads, impl)
    for x in found.values():
        x.zero_()
    graph.replay()
    near(found, expected)
    with torch.no_grad():  # other values in the same place
        for name in case.wanted:
            inputs[name].mul_(0.5)
    graph.replay()
    assert_right(case, inputs, grads, found)


@runs("cuda", named=OURS, where=lambda case: case.random)
def test_cuda_graph_draws_fresh_masks(device, case, impl):
    inputs = draw(case, *SIZES[device], torch.float32, device, drawn=True)
    grads = weights(case, *SIZES[device], device)
    warm(case, inputs, grads, impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outcome(case, inputs, grads, impl)

    def masks():
        graph.replay()
        return pattern(case, found)

    torch.cuda.manual_seed(5)
    first, second = masks(), masks()
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.cuda.manual_seed(5)
    again = masks(), masks()
    for run, wanted in zip(again, (first, second), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(run, wanted, strict=True))


@runs("cuda", named=OURS)
def test_side_stream(device, case, impl):
    inputs, grads = drawn(case, device)
    stream, expected = warm(case, inputs, grads, impl)
    torch.cuda._sleep(500_000_000)  # a quarter of a second on the default stream
    done = torch.cuda.Event()
    done.record()
    with torch.cuda.stream(stream):
        found = outcome(case, inputs, grads, impl)
    stream.synchronize()
    assert not done.query(), "it waited for the default stream"
    with torch.cuda.stream(stream):
        near({name: x.cpu() for name, x in found.items()}, {name: x.cpu() for name, x in expected.items()})
    torch.cuda.synchronize()


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@runs("cuda", named=OURS)
def test_the_host_waits_for_nothing(device, case, impl):
    inputs, grads = drawn(case, device)
    warm(case, inputs, grads, impl)
    fresh = draw(case, *SIZES[device], torch.float32, device, drawn=True)
    with no_synchronisation():
        outcome(case, inputs, grads, impl)
        if case.random:
            outcome(case, fresh, grads, impl)


@runs("cuda", named=KERNELS)
def test_results_are_equal_from_run_to_run(device, case, impl):
    for dtype in dtypes(case, device):
        inputs, grads = drawn(case, device, dtype)
        first = outcome(case, inputs, grads, impl)
        for _ in range(5):
            again = outcome(case, inputs, grads, impl)
            assert all(torch.equal(again[name], wanted) for name, wanted in first.items())


@runs("cuda", named=OURS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current(device, case, impl):
    inputs, grads = drawn(case, "cuda:1")
    assert torch.cuda.current_device() == 0
    ours = outcome(case, inputs, grads, impl)
    assert all(x.device == torch.device("cuda:1") for x in ours.values())
    assert_right(case, inputs, grads, ours)


def compiled_kernels():
    """How many kernels Triton has compiled for each function of the package."""
    from triton.runtime.jit import JITFunction

    found = {}
    for path in sorted((Path(_lib.__file__).parent / "triton").glob("[a-z]*.py")):
        module = sys.modules.get(f"fastlm.triton.{path.stem}")
        for name, function in vars(module).items() if module else ():
            if isinstance(function, JITFunction):
                caches = function.device_caches.values()
                found[f"{path.stem}.{name}"] = sum(len(cache[0]) for cache in caches)
    return found


@runs("cuda", named=("triton",))
def test_another_length_compiles_nothing(device, case, impl):
    outcome(case, *drawn(case, device, T=70), impl)
    before = compiled_kernels()
    assert any(before.values())
    for T in (64, 37, 16, 1):
        outcome(case, *drawn(case, device, T=T), impl)
    assert compiled_kernels() == before


FIRST_CALL = """
import sys, time
import torch
sys.path.append({tests!r})
from gpu_table import CASES, draw, outcome, weights
case = next(case for case in CASES if str(case) == {case!r})
inputs, grads = draw(case, {T}, {H}, torch.float32, {device!r}), weights(case, {T}, {H}, {device!r})
x = torch.randn(64, 64, device={device!r}, requires_grad=True)
(x @ x).sum().backward()  # the context, and the library of products
synchronize = torch.cuda.synchronize if {device!r} == "cuda" else int
synchronize()
start = time.perf_counter()
outcome(case, inputs, grads, {impl!r})
synchronize()
print(time.perf_counter() - start)
"""


@runs("cpu", "cuda", named=KERNELS)
def test_first_call_of_a_process(device, case, impl, fresh_python, tmp_path):
    """Two seconds for all that a forward and a backward pass compile and load."""
    T, H = SIZES[device]
    code = FIRST_CALL.format(tests=str(Path(__file__).parent), case=str(case), T=T, H=H, device=device, impl=impl)
    if device == "cpu" and case is not CASES[0]:
        pytest.skip("the interpreter compiles nothing: once will do")
    seconds = float(fresh_python(code, TRITON_CACHE_DIR=str(tmp_path)).split()[-1])
    assert device == "cpu" or seconds < 2.0, f"{seconds:.2f} s"
