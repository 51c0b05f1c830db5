"""One case or two of every operator, on any device: what `tests/test_gpu.py` runs through all that a GPU can do.

A case has inputs for a length T, a call of the operator, and the same in plain PyTorch. Masks come from a seed among
the inputs; without it the operator draws one.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from fastlm import _lib, ops, testing
from fastlm.ops import philox

Inputs = dict[str, torch.Tensor]
DROP = 0.4
SIZES = {"cpu": (5, 9), "cuda": (37, 150)}  # T and the width; the interpreter is slow
OURS = ("auto", "triton", "cuda", "aten")
KERNELS = ("triton", "cuda")


class Case(NamedTuple):
    """A call of an operator.

    Attributes:
        op: the operator. inputs: draws them on the CPU for a length and a width. call: of inputs and an implementation.
        plain: the call as a user of PyTorch writes it. wanted: the inputs to differentiate by.
        masked: the results that are zero where the mask is: "" for the operator's own, else the gradient of that input.
        random: whether it draws a mask. about: what tells it from another case of the operator.
    """

    op: str
    inputs: Callable[[int, int], Inputs]
    call: Callable[..., tuple[torch.Tensor, ...]]
    plain: Callable[..., tuple[torch.Tensor, ...]]
    wanted: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    random: bool = False
    about: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, [self.op, self.about]))


def seed() -> torch.Tensor:
    return torch.tensor(2**40 + 11)


def several(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def forget_mult_inputs(T, H):
    return dict(f=torch.rand(T, 3, H), x=torch.randn(T, 3, H), h0=torch.randn(3, H))


def forget_mult(f, x, h0):
    h, out = h0, []
    for gate, value in zip(f.unbind(), x.unbind(), strict=True):
        h = gate * value + (1 - gate) * h
        out.append(h)
    return torch.stack(out)


def qrnn_pool_inputs(T, H):
    return dict(gates=torch.randn(T, 3, 4 * H), c0=torch.randn(3, H), seed=seed())


def qrnn_pool(gates, c0, seed):
    z, f, o, i = gates.chunk(4, -1)
    keep = philox.keep_mask(z.shape, DROP, seed, philox.ZONEOUT)
    z, f, o, i = z.tanh(), f.sigmoid() * keep, o.sigmoid(), i.sigmoid()
    c, out = c0, []
    for t in range(len(z)):
        c = (1 - f[t]) * c + i[t] * z[t]
        out.append(c)
    return o * torch.stack(out), c


def lstm_inputs(T, H):
    def weight(*shape):
        return (torch.rand(shape) * 2 - 1) * H**-0.5

    state = dict(x=torch.randn(T, 3, 37), h0=torch.randn(3, H), c0=torch.randn(3, H))
    weights = dict(w_ih=weight(4 * H, 37), w_hh=weight(4 * H, H), b_ih=weight(4 * H), b_hh=weight(4 * H))
    return {**state, **weights, "seed": seed()}


def lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, seed):
    w_hh = ops.dropconnect(w_hh, DROP, seed, impl="reference")
    h, c, out = h0, c0, []
    for step in F.linear(x, w_ih, b_ih + b_hh).unbind():
        i, f, g, o = (step + F.linear(h, w_hh)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out), h, c


def embedding_dropout(weight, ids, seed):
    mask = philox.keep_mask(weight.shape[:1], DROP, seed, philox.EMBEDDING)
    return F.embedding(ids, weight) * (mask[ids] / (1 - DROP)).unsqueeze(-1).to(weight.dtype)


def rows_inputs(T, H):
    weight = torch.randn(3 * H + 1, H) * H**-0.5
    return dict(x=torch.randn(T, H), weight=weight, bias=torch.randn(3 * H + 1), target=torch.randint(3 * H, (T,)))


def linear_cross_entropy(reduction):
    def call(x, weight, bias, target, impl):
        return ops.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, impl=impl)

    def plain(x, weight, bias, target):
        return F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)

    return Case("linear_cross_entropy", rows_inputs, call, plain, ("x", "weight", "bias"), about=reduction)


def clusters_inputs(T, H):
    return {**rows_inputs(T, H), "tails": torch.randn(2, H), "tail_bias": torch.randn(2)}


def adaptive_softmax(reduction):
    def call(x, weight, bias, target, tails, tail_bias, impl):
        cutoffs = len(weight) // 4, len(weight) // 2
        return ops.adaptive_softmax(
            x, weight, target, tails, cutoffs=cutoffs, bias=bias, tail_bias=tail_bias, reduction=reduction, impl=impl
        )

    def plain(x, weight, bias, target, tails, tail_bias):
        first, second = len(weight) // 4, len(weight) // 2
        words, tombstones = F.linear(x, weight, bias), F.linear(x, tails, tail_bias)
        head = torch.cat([words[:, :first], tombstones], 1).log_softmax(1)
        parts = words[:, first:second].log_softmax(1), words[:, second:].log_softmax(1)
        log_p = torch.cat([head[:, :first], *(head[:, first + k, None] + part for k, part in enumerate(parts))], 1)
        return F.nll_loss(log_p, target, reduction=reduction)

    wanted = "x", "weight", "bias", "tails", "tail_bias"
    return Case("adaptive_softmax", clusters_inputs, call, plain, wanted, about=reduction)


def cache_inputs(T, H):
    return dict(hidden=torch.randn(T, H) * H**-0.5, ids=torch.randint(5, (T,)))


def cache_attention(hidden, ids, impl="reference"):
    found = ops.cache_attention(hidden, ids, theta=[0.3, 1.1], window=[19, 3], impl=impl)
    return tuple(x.nan_to_num(neginf=0.0) for x in found)  # of empty windows


def ring_inputs(T, H):
    query, keys = (torch.randn(*shape) * H**-0.5 for shape in ((3, H), (3, T, H)))
    return dict(query=query, keys=keys, ids=torch.randint(2 * H, (3, T)), count=torch.tensor([T, 1, T // 2]))


def cache_distribution(query, keys, ids, count, impl="reference"):
    return ops.cache_distribution(query, keys, ids, count, 2 * query.shape[1], theta=0.7, impl=impl)


CASES = [
    Case("forget_mult", forget_mult_inputs, ops.forget_mult, forget_mult, ("f", "x", "h0")),
    Case(
        "qrnn_pool",
        qrnn_pool_inputs,
        lambda gates, c0, seed=None, impl="auto": ops.qrnn_pool(
            gates, c0, pooling="ifo", zoneout=DROP, training=True, seed=seed, impl=impl
        ),
        qrnn_pool,
        ("gates", "c0"),
        masked=("gates",),
        random=True,
    ),
    Case(
        "lstm",
        lstm_inputs,
        lambda *tensors, seed=None, impl="auto", **named: ops.lstm(
            *tensors, **named, weight_dropout=DROP, seed=seed, impl=impl
        ),
        lstm,
        ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"),
        masked=("w_hh",),
        random=True,
    ),
    Case(
        "dropconnect",
        lambda T, H: dict(weight=torch.randn(36, H), seed=seed()),  # a weight has no T
        lambda weight, seed=None, impl="auto": ops.dropconnect(weight, DROP, seed, impl=impl),
        lambda weight, seed: weight * philox.keep_mask(weight.shape, DROP, seed, philox.WEIGHT) / (1 - DROP),
        ("weight",),
        masked=("", "weight"),
        random=True,
    ),
    Case(
        "dropconnect_mask",
        lambda T, H: dict(seed=seed(), count=torch.empty(36, H, dtype=torch.bool)),
        lambda seed, count, impl: ops.dropconnect_mask(count.shape, DROP, seed, impl=impl),
        lambda seed, count: philox.keep_mask(count.shape, DROP, seed, philox.WEIGHT),
        masked=("",),
    ),
    Case(
        "locked_dropout",
        lambda T, H: dict(x=torch.randn(T, 3, H), seed=seed()),
        lambda x, seed=None, impl="auto": ops.locked_dropout(x, DROP, seed, impl=impl),
        lambda x, seed: x * philox.keep_mask(x.shape[1:], DROP, seed, philox.LOCKED) / (1 - DROP),
        ("x",),
        masked=("", "x"),
        random=True,
    ),
    Case(
        "embedding_dropout",
        lambda T, H: dict(weight=torch.randn(30, H), ids=torch.randint(30, (T, 3)), seed=seed()),
        lambda weight, ids, seed=None, impl="auto": ops.embedding_dropout(weight, ids, DROP, seed, impl=impl),
        embedding_dropout,
        ("weight",),
        masked=("", "weight"),
        random=True,
    ),
    linear_cross_entropy("mean"),
    linear_cross_entropy("none"),
    adaptive_softmax("mean"),
    adaptive_softmax("none"),
    # Both keep float32 scores of 16-bit inputs, so plain PyTorch in 16 bits is no yardstick.
    Case("cache_attention", cache_inputs, cache_attention, cache_attention),
    Case("cache_distribution", ring_inputs, cache_distribution, cache_distribution),
]


def draw(case: Case, T: int, H: int, dtype: torch.dtype, device: str, *, drawn: bool = False) -> Inputs:
    """Inputs on a device, those to differentiate by as leaves; with `drawn` the operator draws its own seed."""
    found = {}
    for name, x in case.inputs(T, H).items():
        if not (drawn and name == "seed"):
            x = x.to(device, dtype if x.is_floating_point() else x.dtype)
            found[name] = x.requires_grad_(name in case.wanted)
    return found


def weights(case: Case, T: int, H: int, device: str) -> list[torch.Tensor]:
    """A gradient for each result of the case."""
    shapes = [y.shape for y in several(case.plain(**case.inputs(T, H)))]
    return [torch.randn(shape).to(device) for shape in shapes]


def outcome(case: Case, inputs: Inputs, grads: list[torch.Tensor], impl: str | None) -> dict[str, torch.Tensor]:
    """Results and gradients by name; of plain PyTorch where there is no `impl`."""
    results = several(case.plain(**inputs) if impl is None else case.call(**inputs, impl=impl))
    found = {f"result {i}": y.detach() for i, y in enumerate(results)}
    if case.wanted:
        leaves = [inputs[name] for name in case.wanted]
        upstream = [grad.to(y.dtype) for y, grad in zip(results, grads, strict=True)]
        for name, grad in zip(case.wanted, torch.autograd.grad(results, leaves, upstream), strict=True):
            found[f"gradient of {name}"] = grad
    return found


def in_double(inputs: Inputs) -> Inputs:
    """The same inputs in float64, on the CPU."""
    found = {name: x.detach().cpu() for name, x in inputs.items()}
    return {
        name: (x.double() if x.is_floating_point() else x).requires_grad_(inputs[name].requires_grad)
        for name, x in found.items()
    }


def assert_right(case: Case, inputs: Inputs, grads: list[torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """Compare with float64 by the rule of all tests; a lone number, exact by luck in plain PyTorch, by its rounding."""
    exact = outcome(case, in_double(inputs), [grad.double().cpu() for grad in grads], "reference")
    plain = outcome(case, inputs, grads, None)
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        actual = ours[name].cpu()
        if not wanted.is_floating_point():
            assert torch.equal(actual, wanted), name
        elif wanted.numel() > 1 or testing.error(actual, wanted) > torch.finfo(plain[name].dtype).eps:
            testing.assert_accurate(name, actual, plain[name].cpu(), wanted)


def pattern(case: Case, found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Where the results that show the mask are zero."""
    names = [f"gradient of {name}" if name else "result 0" for name in case.masked]
    return [(found[name] == 0).cpu() for name in names]


def runs(*devices: str, named: tuple[str, ...] = ("auto", "triton", "cpu", "cuda", "aten", "reference"), where=None):
    """Parameters (device, case, impl): all that a device has of the implementations named."""
    found = []
    for device in devices:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for case in filter(where, CASES):
            impls = [impl for impl in testing.impls(case.op, device) if impl in named]
            found += [pytest.param(device, case, i, marks=marks, id=f"{device}-{case}-{i}") for i in impls]
    return pytest.mark.parametrize(("device", "case", "impl"), found)


def dtypes(case, device):
    """Those that the operator declares, as its inputs; in the interpreter two."""
    declared = _lib.ops[case.op].dtypes
    if not declared[0].is_floating_point:
        return (torch.float32,)
    return declared if device == "cuda" else declared[:2]


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
