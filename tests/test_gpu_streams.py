"""CUDA graphs, streams, synchronisation, repeated runs, other lengths and other GPUs, for all of `gpu_table.py`."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from gpu_table import (
    KERNELS,
    OURS,
    SIZES,
    assert_right,
    draw,
    drawn,
    dtypes,
    near,
    outcome,
    pattern,
    runs,
    weights,
)

from fastlm import _lib, testing


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
@pytest.mark.parametrize("kind", testing.DTYPES, ids=str)
def test_cuda_graph(device, case, impl, kind):
    if kind not in dtypes(case, device):
        pytest.skip(f"{case.op} has no {kind}")
    inputs, grads = drawn(case, device, kind)
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
    torch.cuda._sleep(100_000_000)  # a twentieth of a second, or more, on the default stream
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
@pytest.mark.parametrize("kind", testing.DTYPES, ids=str)
def test_the_host_waits_for_nothing(device, case, impl, kind):
    if kind not in dtypes(case, device):
        pytest.skip(f"{case.op} has no {kind}")
    inputs, grads = drawn(case, device, kind)
    warm(case, inputs, grads, impl)
    fresh = draw(case, *SIZES[device], kind, device, drawn=True)
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
