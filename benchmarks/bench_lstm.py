"""One LSTM layer with weight dropout, and the stack of three, forward and backward.

The competitor is what a user of PyTorch writes: `nn.LSTM` called with its recurrent weight masked by `F.dropout`. On a
GPU another one is `nn.LSTM` as cuDNN likes it best, without dropout on weights in the one buffer that cuDNN reads. Its
persistent kernels are had through PyTorch in float16 alone, for at most 1024 units, a multiple of 128, and a batch
that is a multiple of 8: the float16 cases of 1024 units have them, and those of 1152, which is 1150 padded, have what
PyTorch gives that size. cuDNN's own interface is not driven from here: a wrong descriptor would end the process.
"""

import contextlib
import copy
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    Case,
    Contender,
    NotInstalled,
    Target,
    Work,
    compiled,
    in_double,
    optional,
    ours,
    with_gradients,
    without_gradients,
)
from torch.func import functional_call

from fastlm import testing
from fastlm.machine import cores
from fastlm.ops import dropconnect, dropconnect_mask, lstm
from fastlm.ops.lstm import reference

DROP = 0.5
RIVAL = "nn.LSTM, masked weight"
FLAT = "nn.LSTM, no dropout"
MULTIPROCESSORS = "FASTLM_CUDA_MULTIPROCESSORS"
PARAMETERS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


def layers(sizes, *, contender, backward=True):
    """A stack of one-layer functions (x, h0, c0, w_ih, w_hh, b_ih, b_hh) -> y on a flat list of inputs."""

    def forward(x, *rest):
        for i in range(len(sizes) - 1):
            x = contender(i, x, *rest[6 * i : 6 * i + 6])
        return x

    if not backward:
        return without_gradients(lambda *inputs: forward(*inputs[:-1]))
    wanted = [0, *(1 + 6 * i + j for i in range(len(sizes) - 1) for j in range(2, 6))]
    return with_gradients(forward, wanted)


def work(device, *, sizes, B, T, dtype, more=(), backward=True):
    """sizes: of the input and of each layer. more: contenders beside ours and the rival."""
    form, stack = DTYPES[dtype], partial(layers, sizes, backward=backward)
    slow = device == "cpu" and B * T * max(sizes) > 5_000_000  # seconds a call: enough without warming up
    seeds = [torch.tensor(7 + i, device=device) for i in range(len(sizes) - 1)]

    def inputs():
        def draw(*shape, scale=1.0):
            return (torch.rand(*shape, device=device) * 2 - 1).mul(scale).to(form)

        values = [draw(T, B, sizes[0])]
        for inner, outer in zip(sizes, sizes[1:], strict=False):
            scale = outer**-0.5
            values += [draw(B, outer), draw(B, outer)]
            values += [draw(4 * outer, inner, scale=scale), draw(4 * outer, outer, scale=scale)]
            values += [draw(4 * outer, scale=scale), draw(4 * outer, scale=scale)]
        return [*values, draw(T, B, sizes[-1])]

    def fast(impl, **options):
        def layer(i, x, h, c, *weights, seed=None):
            return lstm(x, h, c, *weights, weight_dropout=DROP, seed=seed, impl=impl)[0]

        def seeded(i, *inputs):
            return layer(i, *inputs, seed=seeds[i])

        run, check = (stack(contender=f) for f in (layer, seeded))
        return Contender(f"fastlm {impl}", run, check, slow=slow, **options)

    modules = [torch.nn.LSTM(*pair).to(device, form) for pair in zip(sizes, sizes[1:], strict=False)]
    for module in modules:
        module.requires_grad_(False)

    def plain(i, x, h, c, w_ih, w_hh, b_ih, b_hh, drop=lambda i, w: F.dropout(w, DROP)):
        weights = dict(zip(PARAMETERS, (w_ih, drop(i, w_hh), b_ih, b_hh), strict=True))
        return functional_call(modules[i], weights, (x, (h[None], c[None])))[0]

    def masked(i, w):
        return w * dropconnect_mask(w.shape, DROP, seeds[i], impl="reference") / (1 - DROP)

    def rival(**options):
        check = stack(contender=partial(plain, drop=masked))
        return Contender(RIVAL, stack(contender=plain), check, slow=slow, **options)

    def tf32(contender):
        """As PyTorch has it by default; compared with cuDNN in the same mode, which keeps 11 bits of its factors."""
        run, check = (in_tf32(function) for function in (contender.run, contender.check))
        plain = in_tf32(contender.plain or rival().check)
        note = "products of factors with 11 bits"
        return Contender(f"{contender.name}, TF32", run, check, contender.exact, plain, note=note)

    def flat():
        """The layers with weights of their own, in cuDNN's buffer, which a mask would have to leave at every call."""
        own = [copy.deepcopy(module).requires_grad_(backward) for module in modules]
        for module in own:
            module.flatten_parameters()

        def run(*inputs):
            with torch.set_grad_enabled(backward):
                first = x = inputs[0].detach().requires_grad_(backward)
                for i, module in enumerate(own):
                    h, c = inputs[1 + 6 * i : 3 + 6 * i]
                    x = module(x, (h[None], c[None]))[0]
            leaves = [first, *(p for module in own for p in module.parameters())]
            return x, *(torch.autograd.grad(x, leaves, inputs[-1]) if backward else ())

        check = stack(contender=partial(plain, drop=lambda i, w: w))
        true = in_double(stack(contender=lambda i, *tensors: reference(*tensors)[0]))
        return Contender(FLAT, run, check, true, check, slow=slow, note="no dropout, weights in one buffer")

    def exact(i, x, h, c, w_ih, w_hh, b_ih, b_hh):
        return reference(x, h, c, w_ih, dropconnect(w_hh, DROP, seeds[i], impl="reference"), b_ih, b_hh)[0]

    threads = cores()
    first, *others = ours("lstm", device, form, fast)
    found = [first, *(others if "others" in more or device == "cuda" else ()), rival()]
    if device == "cuda":
        found.append(flat())
        cuda = [fast("cuda")] if "cuda" in testing.impls("lstm", device) else []
        cuda += [alternating(contender) for contender in cuda]
        found += cuda[1:]
        if dtype == "fp32":
            found += [tf32(contender) for contender in (*cuda, rival(), flat())]
    if "threads" in more:
        many = [fast("auto", threads=2 * threads), rival(threads=2 * threads)]
        for entry, name in zip(many, ("fastlm", RIVAL), strict=True):
            entry.name = f"{name}, {2 * threads} threads"
        found += many
    if "compile" in more:
        found.append(Contender("torch.compile of it", compiled(rival().run), compiled(rival().check)))
    pairs = list(zip(sizes, sizes[1:], strict=False))
    gradients = ["dx", *(f"d{name}[{i}]" for i in range(len(pairs)) for name in ("w_ih", "w_hh", "b_ih", "b_hh"))]
    result = Work(
        inputs,
        found,
        exact=in_double(stack(contender=exact)),
        plain=rival().check,
        names=["y", *(gradients if backward else ())],
        # a product per weight forward, two back: the gradients of input and weight
        flops=(6.0 if backward else 2.0) * T * B * sum(4 * outer * (inner + outer) for inner, outer in pairs),
        steps=T,
    )
    if device == "cuda":
        result.add("flashrnn", partial(flashrnn, device))
    return result


def in_tf32(function):
    """The function with the setting that `conftest.py` takes back."""

    def run(*inputs):
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
        try:
            return function(*inputs)
        finally:
            torch.backends.cudnn.allow_tf32 = before

    return run


@contextlib.contextmanager
def multiprocessors(count):
    """The kernels take the GPU for one of so many, while the block lasts."""
    before = os.environ.get(MULTIPROCESSORS)
    os.environ[MULTIPROCESSORS] = str(count)
    try:
        yield
    finally:
        del os.environ[MULTIPROCESSORS]
        if before is not None:
            os.environ[MULTIPROCESSORS] = before


def alternating(contender):
    """A product and a fused kernel for each step: what a GPU too small for the weights gets, here without launches."""

    def small(function):
        def run(*inputs):
            with multiprocessors(1):
                return function(*inputs)

        return run

    name, note = f"{contender.name}, alternating, CUDA graph", "as on a GPU of one multiprocessor"
    return Contender(name, graphed(small(contender.run)), small(contender.check), note=note)


def graphed(function):
    """The function as one CUDA graph for each set of inputs, captured at its first call."""
    graphs = {}

    def run(*inputs):
        key = inputs[0].data_ptr()
        if key not in graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = function(*inputs)
            graphs[key] = graph, results
        graph, results = graphs[key]
        graph.replay()
        return results

    return run


def flashrnn(device):
    """FlashRNN takes gates that are already projected, and has no DropConnect; it is listed where installed."""
    optional("flashrnn", "flashrnn", device)
    raise NotInstalled("installed, but has no layer with weight dropout to compare with")


def layer(dtype, B=20, T=70, H=1150, *, inner=None, title=None, more=(), backward=True, **options):
    inner = H if inner is None else inner
    make = partial(work, sizes=(inner, H), B=B, T=T, dtype=dtype, more=more, backward=backward)
    title = title or f"{inner} -> {H}, B={B} T={T} {dtype}{'' if backward else ', forward'}"
    return Case("lstm", title, make, dtype, **options)


def goal(ratio, *on_gpu):
    return {"cpu": (Target(RIVAL, ratio=ratio),)} | ({"cuda": on_gpu} if on_gpu else {})


# On a GPU, microseconds of a step of 1150 units for 20, 40 and 80 rows: forward, and with backward. The least that a
# model of the kernels allows, with the exchange of h between multiprocessors as the largest part.
STEPS = 70
ON_GPU = {20: (2.1, 4.6), 40: (2.8, 6.4), 80: (4.2, 10.1)}


def pace(B, *, backward):
    """The target of a layer of 1150 units on a GPU."""
    forward, both = (1e-3 * STEPS * us for us in ON_GPU[B])
    return Target(RIVAL, ratio=3.0, ms=both) if backward else Target(ms=forward)


GOALS = {("fp32", 20): 1.7, ("bf16", 20): 3.3, ("fp32", 80): 1.15, ("bf16", 80): 1.6}
SWEEPS = [("H", H, dict(H=H)) for H in (256, 512, 800, 1150, 1550)]
SWEEPS += [("B", B, dict(B=B)) for B in (1, 4, 20, 40, 80)]
SWEEPS += [("T", T, dict(T=T)) for T in (10, 35, 70, 140)]

CASES = [
    layer(d, B, STEPS, size="quick", targets=goal(ratio, pace(B, backward=True))) for (d, B), ratio in GOALS.items()
]
CASES += [
    layer(
        d,
        B,
        STEPS,
        backward=backward,
        size="quick",
        targets={"cuda": (pace(B, backward=backward),)},
        devices=("cuda",),
    )
    for B in ON_GPU
    for d in ("fp32", "bf16")
    for backward in (False, True)
    if not (backward and (d, B) in GOALS)
]
CASES += [
    Case(
        "lstm",
        f"400 -> 1150 -> 1150 -> 400, B=20 T=70 {dtype}",
        partial(work, sizes=(400, 1150, 1150, 400), B=20, T=70, dtype=dtype),
        dtype,
        size="quick",
        targets={"cpu": (Target(RIVAL, ratio=ratio),), "cuda": (Target(RIVAL, ms=1.0),)},
    )
    for dtype, ratio in (("fp32", 1.7), ("bf16", 3.3))
]
CASES += [
    layer(
        "fp32",
        title="1150 -> 1150, B=20 T=70 fp32, with twice as many threads as cores",
        more=("threads",),
        size="quick",
        devices=("cpu",),
    ),
    layer("fp32", title="1150 -> 1150, B=20 T=70 fp32, compiled", more=("others", "compile"), slow=True),
]
CASES += [
    layer(d, B, STEPS, 400, inner=1150, backward=backward, size="quick", devices=("cuda",))
    for B in ON_GPU
    for d in ("fp32", "bf16")
    for backward in (False, True)
]
CASES += [
    layer("fp16", B, STEPS, H, backward=backward, size="quick", devices=("cuda",))
    for B in (40, 80)
    for H in (1024, 1152)
    for backward in (False, True)
]
CASES += [
    layer(d, title=f"sweep over {axis}: {value}, {d}", sweep=(f"lstm {d}", axis, value), more=("others",), **sizes)
    for d in ("fp32", "bf16")
    for axis, value, sizes in SWEEPS
]
CASES += [
    layer("fp32", 2, 3, 8, size="tiny", targets=goal(0.001)),
    layer("fp32", 2, 3, 8, title="8 -> 8, B=2 T=3 fp32, forward", backward=False, size="tiny"),
    layer("bf16", 2, 3, 8, size="tiny", more=("others", "threads")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lstm(case, measured):
    measured(case)
