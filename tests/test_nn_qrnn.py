"""The QRNN against a transcription of its paper, its state, lengths and directions."""

import copy
import pickle

import pytest
import torch

from fastlm import nn
from fastlm.ops import dropconnect_mask, philox

LAYERS = [
    {},
    {"window": 2},
    {"window": 3, "pooling": "ifo"},
    {"window": 2, "output_gate": False},
    {"window": 2, "reverse": True},
    {"bias": False, "zoneout": 0.3},
]
LENGTHS = [[7, 3, 0], [7, 7, 7], [1, 2, 5]]


def make(**options):
    return nn.QRNNLayer(4, 6, dtype=torch.float64, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def paper(layer, x, c=None, previous=None):
    """Step by step over one direction in evaluation: `x [T, B, I]`, `previous` the window - 1 inputs before it."""
    k, H = layer.window, layer.hidden_size
    parts = {"f": 2, "fo": 3, "ifo": 4}[layer.pooling]
    inputs = list(x.new_zeros(k - 1, *x.shape[1:]) if previous is None else previous)
    c = x.new_zeros(x.shape[1], H) if c is None else c
    outputs = []
    for step in x:
        inputs.append(step)
        total = sum(inputs[-1 - j] @ layer.linear.weight[:, j * x.shape[2] : (j + 1) * x.shape[2]].T for j in range(k))
        gates = total if layer.linear.bias is None else total + layer.linear.bias
        z, f, *rest = gates.view(-1, parts, H).unbind(1)
        f = f.sigmoid() * (1 - layer.zoneout)
        write = rest[1].sigmoid() if layer.pooling == "ifo" else f
        c = (1 - f) * c + write * z.tanh()
        outputs.append(c * rest[0].sigmoid() if rest else c)
    return torch.stack(outputs), c


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_equals_the_paper(options):
    layer, x, c = make(**options).eval(), torch.randn(7, 3, 4).double(), torch.randn(3, 6).double()
    previous = torch.randn(layer.window - 1, 3, 4).double()
    h, state = layer(x, nn.QRNNState(c, previous))
    if layer.reverse:
        expected, c_n = paper(layer, x.flip(0), c, previous)
        expected, last = expected.flip(0), torch.cat([previous, x.flip(0)])[7:]
    else:
        expected, c_n = paper(layer, x, c, previous)
        last = torch.cat([previous, x])[7:]
    close((h, *state), (expected, c_n, last))
    zeros = nn.QRNNState(torch.zeros_like(c), torch.zeros_like(previous))
    close(layer(x), layer(x, zeros))


def test_gradients_reach_input_parameters_and_state():
    layer = make(window=3, pooling="ifo")
    state = nn.QRNNState(torch.randn(2, 6).double().requires_grad_(), torch.randn(2, 2, 4).double().requires_grad_())
    inputs = [torch.randn(5, 2, 4).double().requires_grad_(), *state, *layer.parameters()]

    def total(outputs):
        return sum(o.square().sum() for o in outputs)

    actual = torch.autograd.grad(total((lambda h, s: (h, s.c))(*layer(inputs[0], state))), inputs)
    expected = torch.autograd.grad(total(paper(layer, inputs[0], *state)), inputs)
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_one_call_equals_any_split(options):
    layer, x = make(**options).eval(), torch.randn(9, 3, 4).double()
    whole, end = layer(x)
    pieces, state = [], None
    chunks = x.split([1, 0, 5, 3])
    for chunk in reversed(chunks) if layer.reverse else chunks:
        h, state = layer(chunk, state)
        pieces.append(h)
    close(torch.cat(pieces[::-1] if layer.reverse else pieces), whole)
    close(tuple(state), tuple(end))


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_equal_rows_run_alone(options, lengths):
    layer, x = make(**options).eval(), torch.randn(7, 3, 4).double()
    before = nn.QRNNState(torch.randn(3, 6).double(), torch.randn(layer.window - 1, 3, 4).double())
    h, state = layer(x, before, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        expected, after = layer(x[:n, row], nn.QRNNState(before.c[row], before.x[:, row]))
        close((h[:n, row], state.c[row], state.x[:, row]), (expected, *after))
        assert not h[n:, b].any()


def test_padding_gets_no_gradient_even_when_it_is_not_a_number():
    layer, x = make(window=2), torch.randn(5, 2, 4).double()
    x[3:, 1] = 50.0
    x.requires_grad_()
    h, state = layer(x, lengths=[5, 3])
    (h.sum() + state.c.sum()).backward()
    assert not x.grad[3:, 1].any() and x.grad[:3, 1].all() and x.grad[:, 0].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_padding_that_is_not_finite_does_not_matter(options, bad):
    layer, clean = make(**options).eval(), torch.randn(7, 3, 4).double()
    lengths = torch.tensor([7, 3, 0])
    poisoned = clean.clone()
    poisoned[3:, 1], poisoned[:, 2] = bad, bad
    results = []
    for x in (clean, poisoned):
        x.requires_grad_()
        h, state = layer(x, lengths=lengths)
        (gradient,) = torch.autograd.grad(h.sum() + state.c.sum(), x)
        results.append((h, *state, gradient))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_batch_size_may_change():
    """The old layer kept the last input inside, and failed when the batch size changed."""
    layer = nn.QRNNLayer(4, 6, window=2, save_prev_x=True)
    for batch in (3, 5, 1):
        h, state = layer(torch.randn(2, batch, 4))
        assert h.shape == (2, batch, 6) and state.c.shape == (batch, 6) and state.x.shape == (1, batch, 4)


def test_input_is_not_remembered_between_calls():
    layer, x = nn.QRNNLayer(4, 6, window=2, save_prev_x=True).eval(), torch.randn(3, 2, 4)
    first = layer(x)[0]
    layer.reset()
    close(layer(x)[0], first)
    layer(torch.randn(3, 2, 4))
    close(layer(x)[0], first)


def test_takes_a_cell_as_torchqrnn_returns_it():
    layer, x = make(window=2).eval(), torch.randn(4, 3, 4).double()
    _, state = layer(x)
    expected = layer(x, nn.QRNNState(state.c, torch.zeros(1, 3, 4).double()))
    close(layer(x, state.c), expected)
    close(layer(x, state.c.unsqueeze(0)), expected)
    assert not layer(x)[1].detach().c.requires_grad and layer(x)[1].c.requires_grad


def test_zoneout_in_training_keeps_old_cells_without_rescaling():
    layer = nn.QRNNLayer(4, 200, zoneout=0.4, output_gate=False)
    torch.nn.init.zeros_(layer.linear.weight)
    layer.linear.bias.data = torch.cat([torch.full((200,), 50.0), torch.full((200,), 50.0)])  # z = f = 1
    h, _ = layer(torch.zeros(1, 50, 4))
    assert set(h.unique().tolist()) == {0.0, 1.0} and abs(h.mean() - 0.6) < 0.03
    h, _ = layer.eval()(torch.zeros(1, 50, 4))
    close(h, torch.full_like(h, 0.6))


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_parts_of_a_batch_have_the_zoneout_of_the_whole(pooling):
    layer, x = nn.QRNNLayer(4, 5, window=2, zoneout=0.4, weight_dropout=0.3, pooling=pooling), torch.randn(6, 4, 4)
    c, seeds = torch.randn(4, 5), philox.SharedSeeds()

    def run(own, **place):
        layer.zero_grad()
        with seeds:
            h, state = layer(x[:, own], c[own], **place)
        (h.square().sum() + state.c.sum()).backward()
        return h.detach(), state.c.detach(), layer.linear.weight.grad.clone()

    whole = run(slice(0, 4))
    first, rest = run(slice(0, 1), column=0, columns=4), run(slice(1, 4), column=1, columns=4)
    close([torch.cat([first[0], rest[0]], 1), torch.cat([first[1], rest[1]]), first[2] + rest[2]], list(whole))
    assert not torch.allclose(run(slice(1, 4))[0], rest[0])  # a batch of three
    close(run(slice(0, 4), column=0, columns=4), whole)
    for column, columns, batch in [(2, 4, 4), (0, 2, 2), (1, None, 3)]:
        with pytest.raises(ValueError, match=f"3 rows from column {column} on are no part of a batch of {batch}"):
            layer(x[:, :3], column=column, columns=columns)
    with pytest.raises(ValueError, match="column must be at least 0, got -1"):
        layer(x, column=-1)
    for columns in (True, 4.0, "4"):
        with pytest.raises(TypeError, match="columns must be an integer, got "):
            layer(x, columns=columns)


def test_weight_dropout_uses_one_mask_per_call_and_trains_the_raw_weight():
    layer, x = nn.QRNNLayer(8, 16, window=2, weight_dropout=0.5), torch.randn(5, 3, 8)
    torch.manual_seed(1)
    h, _ = layer(x)
    torch.manual_seed(1)
    mask = dropconnect_mask((48, 16), 0.5, philox.draw_seed("cpu"))
    twin = nn.QRNNLayer(8, 16, window=2)
    twin.load_state_dict({"linear.weight": layer.linear.weight * mask * 2, "linear.bias": layer.linear.bias})
    close(h, twin(x)[0])
    h.sum().backward()
    assert layer.linear.weight.grad[mask].all() and not layer.linear.weight.grad[~mask].any()
    before = layer.linear.weight.clone()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert torch.equal(layer.linear.weight != before, mask)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert list(layer.state_dict()) == ["linear.weight", "linear.bias"]


def test_copies_and_training_after_evaluation():
    layer, x = nn.QRNNLayer(4, 6, window=2, weight_dropout=0.5), torch.randn(5, 3, 4)
    layer(x)
    layer.eval()(x)
    layer.train()(x)[0].sum().backward()
    assert layer.linear.weight.grad.any()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(twin.eval()(x)[0], copy.deepcopy(layer).eval()(x)[0])


def test_state_dtype_and_autocast():
    layer, x = nn.QRNNLayer(4, 6, window=2).to(torch.bfloat16), torch.randn(5, 3, 4)
    h, state = layer(x.bfloat16(), nn.QRNNState(torch.randn(3, 6), torch.randn(1, 3, 4)))
    assert h.dtype == torch.bfloat16 and state.c.dtype == state.x.dtype == torch.float32
    assert layer(x.bfloat16())[1].c.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        h, _ = nn.QRNNLayer(4, 6, window=2, weight_dropout=0.5)(x)
    assert h.dtype == torch.bfloat16
    h.float().sum().backward()


def test_stack_has_torchqrnn_keys():
    qrnn = nn.QRNN(4, 6, num_layers=2, window=2)
    shapes = {name: tuple(p.shape) for name, p in qrnn.state_dict().items()}
    assert shapes == {
        "layers.0.linear.weight": (18, 8),
        "layers.0.linear.bias": (18,),
        "layers.1.linear.weight": (18, 12),
        "layers.1.linear.bias": (18,),
    }
    assert nn.QRNNLayer(4).hidden_size == 4


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2, 4]])
def test_bidirectional_stack(dense, batch_first, lengths):
    qrnn = nn.QRNN(4, 6, 3, batch_first=batch_first, bidirectional=True, dense=dense, window=2, dtype=torch.float64)
    x = torch.randn(5, 3, 4).double()
    y, states = qrnn(x.transpose(0, 1) if batch_first else x, lengths=lengths)
    below, expected_states = x, []
    for forwards, backwards in zip(qrnn.layers, qrnn.layers_reverse, strict=True):
        (h, s), (g, r) = forwards(below, lengths=lengths), backwards(below, lengths=lengths)
        expected_states += [s, r]
        top = torch.cat([h, g], -1)
        below = torch.cat([below, top], -1) if dense else top
    close(y.transpose(0, 1) if batch_first else y, top)
    assert len(states) == 6
    for actual, expected in zip(states, expected_states, strict=True):
        close(tuple(actual), tuple(expected))


def test_stack_carries_its_states_and_takes_cells():
    qrnn, x = nn.QRNN(4, 6, 2, window=2, dtype=torch.float64), torch.randn(8, 3, 4).double()
    whole, end = qrnn(x)
    first, middle = qrnn(x[:3])
    rest, last = qrnn(x[3:], middle)
    close(torch.cat([first, rest]), whole)
    for a, e in zip(last, end, strict=True):
        close(tuple(a), tuple(e))
    cells = torch.stack([s.c for s in middle])
    assert not torch.allclose(qrnn(x[3:], cells)[0], rest)  # the last inputs are lost with it
    close(qrnn(x[3:], cells)[1][0].c.shape, last[0].c.shape)


def test_dropout_between_layers_is_applied():
    """The successor of the old stack bound the dropped output to a loop variable and lost it."""
    qrnn, x = nn.QRNN(4, 6, 2, dropout=1.0), torch.randn(5, 3, 4)
    silent = qrnn.layers[1](torch.zeros(5, 3, 6))[0]
    close(qrnn(x)[0], silent)
    assert not torch.allclose(qrnn.eval()(x)[0], silent)


def test_given_layers():
    layers = [nn.QRNNLayer(4, 6, window=2), nn.QRNNLayer(6, 5)]
    qrnn, x = nn.QRNN(4, 6, layers=layers), torch.randn(5, 3, 4)
    close(qrnn(x)[0], layers[1](layers[0](x)[0])[0])
    with pytest.raises(ValueError, match="layers must be absent"):
        nn.QRNN(4, 6, layers=layers, bidirectional=True)


def test_compiles_without_a_break():
    qrnn = nn.QRNN(4, 6, window=2, bidirectional=True, weight_dropout=0.5, zoneout=0.1)
    compiled = torch.compile(qrnn, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 4)
    compiled(x)[0].square().sum().backward()
    assert qrnn.layers_reverse[0].linear.weight.grad.any()
    qrnn.eval()
    close(compiled(x)[0], qrnn(x)[0])


def test_wrong_arguments():
    for options, message in [
        ({"window": 0}, "window must be positive"),
        ({"pooling": "of"}, "pooling must be 'f', 'fo' or 'ifo', got 'of'"),
        ({"zoneout": 2.0}, "zoneout must lie in"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            nn.QRNNLayer(4, **options)
    layer, x = nn.QRNNLayer(4, 6, window=2), torch.randn(5, 3, 4)
    for args, message in [
        ((torch.randn(5, 3, 5),), r"input must have shape \[T, B, 4\], got \[5, 3, 5\]"),
        ((x, torch.zeros(2, 6)), r"hidden.c must have shape \[B, H\] = \[3, 6\]"),
        ((x, nn.QRNNState(torch.zeros(3, 6), torch.zeros(0, 3, 4))), "hidden.x must have shape"),
        ((x, None, [1, 2]), "lengths must have shape"),
        ((x, None, [1, 2, 6]), r"lengths must lie in \[0, T\] = \[0, 5\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(*args)
    for lengths in ([1.0, 2.0, 5.0], torch.tensor([1.5, 2, 3])):
        with pytest.raises(TypeError, match="lengths must be an int64 or int32 tensor, got torch.float32"):
            layer(x, None, lengths)
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    for module in (layer, nn.QRNN(4, 6), nn.QRNN(4, 6, batch_first=True)):
        with pytest.raises(TypeError, match="got a PackedSequence: give the padded tensor and its lengths"):
            module(packed)
    with pytest.raises(ValueError, match="hidden must have 2 states, got 1"):
        nn.QRNN(4, 6, 2)(x, [None])
