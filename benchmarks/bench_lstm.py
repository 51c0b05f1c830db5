"""One LSTM layer with weight dropout, and the stack of three, forward and backward.

The competitor is what a user of PyTorch writes: `nn.LSTM` called with its recurrent weight masked by `F.dropout`.
"""

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
from machine import cores
from torch.func import functional_call

from fastlm.ops import dropconnect, dropconnect_mask, lstm
from fastlm.ops.lstm import reference

DROP = 0.5
RIVAL = "nn.LSTM, masked weight"
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

    def tf32():
        """cuDNN as PyTorch has it by default; it is compared with itself, for it keeps 11 bits of its factors."""
        run, check = (in_tf32(function) for function in (rival().run, rival().check))
        return Contender(f"{RIVAL}, TF32", run, check, plain=check, note="products of factors with 11 bits")

    def exact(i, x, h, c, w_ih, w_hh, b_ih, b_hh):
        return reference(x, h, c, w_ih, dropconnect(w_hh, DROP, seeds[i], impl="reference"), b_ih, b_hh)[0]

    threads = cores()
    first, *others = ours("lstm", device, form, fast)
    found = [first, *(others if "others" in more or device == "cuda" else ()), rival()]
    if device == "cuda" and dtype == "fp32":
        found.append(tf32())
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


def flashrnn(device):
    """FlashRNN takes gates that are already projected, and has no DropConnect; it is listed where installed."""
    optional("flashrnn", "flashrnn", device)
    raise NotInstalled("installed, but has no layer with weight dropout to compare with")


def layer(dtype, B=20, T=70, H=1150, *, title=None, more=(), backward=True, **options):
    make = partial(work, sizes=(H, H), B=B, T=T, dtype=dtype, more=more, backward=backward)
    return Case("lstm", title or f"{H} -> {H}, B={B} T={T} {dtype}", make, dtype, **options)


def goal(ratio, *on_gpu):
    return {"cpu": (Target(RIVAL, ratio=ratio),)} | ({"cuda": on_gpu} if on_gpu else {})


# On a GPU, microseconds of a step of 20 rows: 2.1 forward, 2.5 back.
STEPS = 70
FORWARD, BOTH = Target(ms=2.1e-3 * STEPS), Target(RIVAL, ratio=3.0, ms=4.6e-3 * STEPS)


GOALS = {("fp32", 20): 1.7, ("bf16", 20): 3.3, ("fp32", 80): 1.15, ("bf16", 80): 1.6}
SWEEPS = [("H", H, dict(H=H)) for H in (256, 512, 800, 1150, 1550)]
SWEEPS += [("B", B, dict(B=B)) for B in (1, 4, 20, 40, 80)]
SWEEPS += [("T", T, dict(T=T)) for T in (10, 35, 70, 140)]

CASES = [
    layer(d, B, STEPS, size="quick", targets=goal(ratio, BOTH if B == 20 else Target(RIVAL, ratio=3.0)))
    for (d, B), ratio in GOALS.items()
]
CASES += [
    layer(
        d,
        title=f"1150 -> 1150, B=20 T=70 {d}, forward",
        backward=False,
        size="quick",
        targets={"cuda": (FORWARD,)},
        devices=("cuda",),
    )
    for d in ("fp32", "bf16")
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
