"""Stacks of QRNN layers against the formulas of their paper, read out one element of the batch and one step at a time.

Bradbury, Merity, Xiong and Socher, arXiv 1611.01576, section 2. The paper's f keeps the cell, so that it is one
minus the write gate, and its W_f and b_f are those of the write gate with the other sign.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from fastlm import nn
from fastlm.ops import philox

D, H, T, S, B = 3, 4, 6, 5, 3  # inputs, hidden, steps, steps of a source, batch
SEED = 11


@dataclass(frozen=True)
class Form:
    """What a stack does of what the paper describes; the defaults are its plainest layer."""

    pooling: str = "f"
    window: int = 1
    zoneout: float = 0.0
    dense: bool = False
    bidirectional: bool = False
    lengths: tuple | None = None
    conditioned: bool = False
    attention: bool = False

    def poorer(self):
        """This form with one feature taken away, for each that it has."""
        for name in vars(self):
            if getattr(self, name) != getattr(Form, name):
                value = {"window": self.window - 1, "pooling": {"ifo": "fo", "fo": "f"}.get(self.pooling)}
                yield name, replace(self, **{name: value.get(name, getattr(Form, name))})

    def __str__(self):
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value != getattr(Form, name)) or "f"

    def options(self):
        """The arguments of the constructors."""
        return {name: getattr(self, name) for name in ("pooling", "window", "zoneout", "dense")}


def literal(module, form, x, encoding=None):
    """The output `[T, B, *]`, the last cells in the order of the module's states, the last h of each layer.

    `encoding`: outputs `[n, H]` for each element of the batch, and last h `[B, H]` for each layer.
    """
    torch.manual_seed(SEED)
    stacks = [module.layers, module.layers_reverse] if form.bidirectional else [module.layers]
    keep = [[mask(module, form, x) for _ in stacks] for _ in module.layers]
    outputs, cells, ends = [], [], []
    for b in range(x.shape[1]):
        y = x[: x.shape[0] if form.lengths is None else form.lengths[b], b].unbind()
        inputs, cells_b, ends_b = y, [], []
        for number in range(len(module.layers)):
            sides = []
            for way, stack in enumerate(stacks):
                last = encoding[1][number][b] if form.conditioned else None
                steps = one_layer(stack[number], form, y[::-1] if way else y, keep[number][way][:, b], last)
                if form.attention and number == len(module.layers) - 1:
                    h = [attend(stack[number], c, o, encoding[0][b]) for c, o in steps]
                else:
                    h = [o * c for c, o in steps]
                zeros = x.new_zeros(module.hidden_size)
                cells_b.append(steps[-1][0] if steps else zeros)
                sides.append((h[::-1] if way else h, h[-1] if h else zeros))
            h = [torch.cat(step) for step in zip(*(side[0] for side in sides), strict=True)]
            ends_b.append(torch.cat([side[1] for side in sides]))
            inputs = [torch.cat(step) for step in zip(inputs, h, strict=True)]
            y = inputs if form.dense else h
        padding = [torch.zeros_like(ends_b[-1])] * (x.shape[0] - len(h))
        outputs.append(torch.stack([*h, *padding]))
        cells.append(cells_b)
        ends.append(ends_b)
    transposed = [[torch.stack(part) for part in zip(*parts, strict=True)] for parts in (cells, ends)]
    return torch.stack(outputs, 1), *transposed


def mask(module, form, x):
    """The write gate's factor `[T, B, H]`: dropout without rescaling in training, its mean in evaluation."""
    shape = (*x.shape[:2], module.hidden_size)
    if module.training and form.zoneout:
        return philox.keep_mask(shape, form.zoneout, philox.draw_seed("cpu"), philox.ZONEOUT).double()
    return x.new_full(shape, 1 - form.zoneout)


def one_layer(layer, form, inputs, keep, last):
    """The cell and the output gate after each step, inputs in the order of reading."""
    width, c, steps = layer.hidden_size, torch.zeros(layer.hidden_size, dtype=torch.float64), []
    names = {"f": "zf", "fo": "zfo", "ifo": "zfoi"}[form.pooling]
    for t in range(len(inputs)):
        sums = {}
        for number, name in enumerate(names):
            rows = slice(number * width, (number + 1) * width)
            sums[name] = layer.linear.bias[rows].double()
            for back in range(min(form.window, t + 1)):
                columns = slice(back * len(inputs[t]), (back + 1) * len(inputs[t]))
                sums[name] = sums[name] + layer.linear.weight[rows, columns].double() @ inputs[t - back]
            if last is not None:
                sums[name] = sums[name] + layer.condition.weight[rows].double() @ last
        z, f = sums["z"].tanh(), (-sums["f"]).sigmoid()
        f = 1 - keep[t] * (1 - f)
        c = f * c + (sums["i"].sigmoid() if "i" in sums else 1 - f) * z
        steps.append((c, sums["o"].sigmoid() if "o" in sums else torch.ones_like(c)))
    return steps


def attend(layer, c, o, source):
    """h_t of the last layer: the sum of the source by its likeness to the cell, and the cell, behind the gate."""
    scores = [(c @ h).exp() for h in source]
    k = sum((score / sum(scores) * h for score, h in zip(scores, source, strict=True)), torch.zeros_like(c))
    return o * (layer.context.weight.double() @ k + layer.cell.weight.double() @ c)


def encode(encoder, form, source):
    """What the decoder's formulas take."""
    y, _, ends = literal(encoder, form, source)
    return [y[: S if form.lengths is None else form.lengths[b], b] for b in range(B)], ends


def modes(forms):
    """The cases of a test: evaluation, and training for what differs there."""
    cases = [(form, training) for form in forms for training in (False, True)[: 1 + bool(form.zoneout)]]
    return [pytest.param(*case, id=f"{case[0]}-{'training' if case[1] else 'evaluation'}") for case in cases]


def agree(actual, expected, dtype):
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    return all(
        a.shape == e.shape and torch.allclose(a.double(), e, rtol=10 * tolerance, atol=tolerance)
        for a, e in zip(actual, expected, strict=True)
    )


def gradients(outputs, inputs):
    """Of a sum in which every element of the outputs has a weight of its own."""
    generator = torch.Generator().manual_seed(5)
    total = sum((y.double() * torch.rand(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    return torch.autograd.grad(total, inputs)


STACKS = [
    *(Form(pooling=pooling, window=window) for pooling in ("f", "fo", "ifo") for window in (1, 2, 5)),
    Form("f", zoneout=0.3),
    Form("ifo", 2, zoneout=0.4),
    Form("fo", 2, dense=True),
    Form("fo", 2, bidirectional=True),
    Form("fo", 3, lengths=(6, 2, 0)),
    Form("ifo", 3, zoneout=0.4, dense=True, bidirectional=True, lengths=(2, 6, 5)),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@DTYPES
@pytest.mark.parametrize(("form", "training"), modes(STACKS))
def test_a_stack(form, training, dtype):
    qrnn = nn.QRNN(D, H, 3, bidirectional=form.bidirectional, dtype=dtype, **form.options()).train(training)
    x = torch.randn(T, B, D, dtype=dtype, requires_grad=True)
    inputs = [x, *qrnn.parameters()]

    def flat(output, cells, ends):
        return [output, *cells, *ends]

    torch.manual_seed(SEED)
    y, states = qrnn(x, lengths=form.lengths and list(form.lengths))
    torch.manual_seed(SEED)
    encoding = qrnn.encode(x, form.lengths and list(form.lengths))
    actual = flat(y, [state.c for state in states], encoding.last)
    expected = flat(*literal(qrnn, form, x.double()))
    assert torch.equal(encoding.output, y) and agree(actual, expected, dtype)
    assert agree(gradients(actual, inputs), [g.double() for g in gradients(expected, inputs)], dtype)
    for name, poorer in form.poorer():
        assert not agree([y], literal(qrnn, poorer, x.double())[:1], dtype), f"{name} does not matter"


DECODERS = [
    Form("fo", 2, conditioned=True),
    *(Form(pooling, 2, conditioned=True, attention=True) for pooling in ("f", "fo", "ifo")),
    Form("ifo", 3, zoneout=0.4, dense=True, conditioned=True, attention=True, lengths=(2, 6, 0)),
]
ENCODERS = [Form("fo", 2), Form("ifo", 2, zoneout=0.3, dense=True, bidirectional=True, lengths=(5, 1, 0))]


@DTYPES
@pytest.mark.parametrize("below", ENCODERS, ids=str)
@pytest.mark.parametrize(("form", "training"), modes(DECODERS))
def test_a_decoder(form, below, training, dtype):
    width = H // 2 if below.bidirectional else H
    encoder = nn.QRNN(D, width, 2, bidirectional=below.bidirectional, dtype=dtype, **below.options()).train(training)
    decoder = nn.QRNNDecoder(D, H, 2, attention=form.attention, dtype=dtype, **form.options()).train(training)
    source, x = (torch.randn(n, B, D, dtype=dtype, requires_grad=True) for n in (S, T))
    inputs = [source, x, *encoder.parameters(), *decoder.parameters()]

    def modules():
        torch.manual_seed(SEED)
        encoding = encoder.encode(source, below.lengths and torch.tensor(below.lengths))
        torch.manual_seed(SEED)
        y, states = decoder(x, encoding, lengths=form.lengths and torch.tensor(form.lengths))
        return [y, *(state.c for state in states)]

    def paper(form, below):
        y, cells, _ = literal(decoder, form, x.double(), encode(encoder, below, source.double()))
        return [y, *cells]

    actual, expected = modules(), paper(form, below)
    assert agree(actual, expected, dtype)
    assert agree(gradients(actual, inputs), [g.double() for g in gradients(expected, inputs)], dtype)
    for name, poorer in form.poorer():
        assert not agree(actual[:1], paper(poorer, below)[:1], dtype), f"{name} of the decoder does not matter"
    if below.lengths:
        assert not agree(actual[:1], paper(form, replace(below, lengths=None))[:1], dtype)
