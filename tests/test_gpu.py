"""Every implementation of every operator on a GPU, from the one table of `gpu_table.py`.

What a CPU can run goes through the table there too, in Triton's interpreter where an operator has kernels, so that the
table is known to be right before a GPU sees it. What a GPU alone has is in `test_gpu_streams.py`.
"""

from pathlib import Path

import pytest
import torch
from gpu_table import (
    CASES,
    KERNELS,
    OURS,
    SIZES,
    assert_right,
    drawn,
    dtypes,
    near,
    outcome,
    pattern,
    runs,
    several,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import _lib, ops, testing
from fastlm.ops import philox


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
    """Notes the first call of each operator of the package, with its arguments as they were."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def note(self, function, args):
        kept = tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)
        self.seen.setdefault(function, kept)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == _lib.NAMESPACE:
            self.note(function, args)
        return function(*args, **kwargs or {})

    def kernel(self, choose):
        """`_lib.kernel` that notes what is called within another operator too, which the mode does not see."""

        def chosen(name, impl):
            def call(*args):
                function = choose(name, impl)
                self.note(function, args)
                return function(*args)

            return call

        return chosen


@runs("cpu", "cuda", named=OURS)
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_operators_are_well_registered(device, case, impl, monkeypatch):
    inputs, grads = drawn(case, device)
    calls = Calls()
    with calls, monkeypatch.context() as patch:
        patch.setattr(_lib, "kernel", calls.kernel(_lib.kernel))
        outcome(case, inputs, grads, impl)
    for function, args in calls.seen.items():
        torch.library.opcheck(function, args)
    overloads = {function._overloadname for function in calls.seen}
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
if {device!r} == "cuda" and {impl!r} == "triton":
    from triton.runtime import driver
    driver.active.utils  # what talks to the driver: built once for a machine, as a part of installing Triton
synchronize()
start = time.perf_counter()
outcome(case, inputs, grads, {impl!r})
synchronize()
print(time.perf_counter() - start)
"""


def first_call(device, case, impl, fresh_python, folder):
    """Seconds of the first forward and backward pass of a process, with all that they compile and load."""
    T, H = SIZES[device]
    code = FIRST_CALL.format(tests=str(Path(__file__).parent), case=str(case), T=T, H=H, device=device, impl=impl)
    return float(fresh_python(code, TRITON_CACHE_DIR=str(folder)).split()[-1])


@runs("cuda", named=KERNELS)
def test_first_call_of_a_process(device, case, impl, fresh_python, tmp_path):
    assert first_call(device, case, impl, fresh_python, tmp_path) < 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_how_the_first_call_is_timed(fresh_python, tmp_path):
    assert first_call("cpu", CASES[0], "auto", fresh_python, tmp_path) > 0
