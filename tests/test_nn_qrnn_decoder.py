"""The QRNN decoder as a module; its numbers are in test_qrnn_paper.py."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn

POOLINGS = ["f", "fo", "ifo"]
LENGTHS = [5, 2, 0]


def make(dtype=torch.float64, **options):
    return nn.QRNNDecoder(4, 6, 2, **{"window": 3, "dtype": dtype, **options})


def encoding(dtype=torch.float64, lengths=None, **options):
    encoder = nn.QRNN(4, 6, 2, window=2, dtype=dtype, **options)
    return encoder.encode(torch.randn(5, 3, 4, dtype=dtype), lengths)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def flat(output, states):
    return [output, *(part for state in states for part in state)]


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_step_by_step_is_the_same_as_at_once(pooling, attention):
    decoder = make(pooling=pooling, attention=attention, dense=True, zoneout=0.2).eval()
    source, x = encoding(lengths=LENGTHS), torch.randn(6, 3, 4).double()
    whole, end = decoder(x, source)
    for sizes in ([1] * 6, [2, 0, 3, 1]):
        pieces, states = [], None
        for piece in x.split(sizes):
            y, states = decoder(piece, source, states)
            pieces.append(y)
        close(flat(torch.cat(pieces), states), flat(whole, end))


def test_batch_first_moves_the_input_and_the_output_only():
    decoder, turned = make(), make(batch_first=True)
    turned.load_state_dict(decoder.state_dict())
    encoder, turned_encoder = (nn.QRNN(4, 6, 2, batch_first=first, dtype=torch.float64) for first in (False, True))
    turned_encoder.load_state_dict(encoder.state_dict())
    source, x = torch.randn(5, 3, 4).double(), torch.randn(7, 3, 4).double()
    seen, same = encoder.encode(source, LENGTHS), turned_encoder.encode(source.transpose(0, 1), LENGTHS)
    close((seen.output, *seen.last), (same.output, *same.last))
    y, states = decoder(x, seen, lengths=[7, 0, 3])
    z, same_states = turned(x.transpose(0, 1), same, lengths=[7, 0, 3])
    close(flat(z.transpose(0, 1), same_states), flat(y, states))


def test_what_the_source_has_beyond_its_lengths_is_not_seen():
    decoder, x = make(), torch.randn(6, 3, 4).double()
    clean = encoding(lengths=LENGTHS)
    outputs = []
    for padding in (0.0, 7.0, math.nan, math.inf):
        memory = clean.output.detach().clone()
        memory[2:, 1], memory[:, 2] = padding, padding
        memory.requires_grad_()
        y, _ = decoder(x, clean._replace(output=memory))
        (gradient,) = torch.autograd.grad(y.square().sum(), memory)
        outputs.append((y, gradient))
        assert not gradient[2:, 1].any() and not gradient[:, 2].any() and gradient[:2, 1].all()
    assert all(torch.equal(a, b) for pair in outputs[1:] for a, b in zip(pair, outputs[0], strict=True))


def test_a_source_without_steps_has_nothing_to_see(monkeypatch):
    decoder, x = make().eval(), torch.randn(6, 3, 4).double()
    last = tuple(torch.zeros(3, 6).double() for _ in range(2))
    expected, _ = decoder(x, nn.QRNNEncoding(torch.zeros(1, 3, 6).double(), last))
    for lengths in (None, [0, 0, 0]):
        empty = nn.QRNN(4, 6, 2, dtype=torch.float64).encode(torch.zeros(0, 3, 4).double(), lengths)
        y, _ = decoder(x, empty)
        assert empty.output.shape == (0, 3, 6)
        close(y, expected)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in decoder.parameters())

    def plain(query, keys, values, mask, scale):  # whose softmax over nothing is not a number
        scores = (query @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ values

    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    close(decoder(x, nn.QRNNEncoding(torch.randn(5, 3, 6).double(), last, [0, 0, 0]))[0], expected)


def test_padding_of_the_input_changes_nothing():
    decoder, source, lengths = make(), encoding(), torch.tensor([6, 3, 0])
    clean = torch.randn(6, 3, 4).double()
    poisoned = clean.clone()
    poisoned[3:, 1], poisoned[:, 2] = math.nan, math.nan
    results = []
    for x in (clean, poisoned):
        x.requires_grad_()
        y, states = decoder(x, source, lengths=lengths)
        (gradient,) = torch.autograd.grad(y.sum() + states[1].c.sum(), x, retain_graph=True)
        results.append([*flat(y, states), gradient])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][0][3:, 1].any() and not results[1][-1][3:, 1].any()


def test_dropout_between_layers_is_applied():
    decoder, source, x = make(dropout=1.0), encoding(), torch.randn(6, 3, 4).double()
    silent, _ = decoder.layers[1](torch.zeros(6, 3, 6).double(), source.last[1], source.output, None)
    close(decoder(x, source)[0], silent)
    assert not torch.allclose(decoder.eval()(x, source)[0], silent)


def test_keys_and_copies():
    decoder, source, x = make(), encoding(), torch.randn(6, 3, 4).double()
    shapes = {name: tuple(p.shape) for name, p in decoder.state_dict().items()}
    assert shapes == {
        "layers.0.linear.weight": (18, 12),
        "layers.0.linear.bias": (18,),
        "layers.0.condition.weight": (18, 6),
        "layers.1.linear.weight": (18, 18),
        "layers.1.linear.bias": (18,),
        "layers.1.condition.weight": (18, 6),
        "layers.1.context.weight": (6, 6),
        "layers.1.cell.weight": (6, 6),
    }
    twin = make()
    twin.load_state_dict(decoder.state_dict())
    for other in (twin, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        close(other(x, source)[0], decoder(x, source)[0])
    assert not any("context" in name for name in make(attention=False).state_dict())
    assert not any("bias" in name for name in make(bias=False).state_dict())


def test_weight_dropout_draws_a_mask_per_call():
    decoder, source, x = make(weight_dropout=0.5), encoding(), torch.randn(6, 3, 4).double()
    assert not torch.equal(decoder(x, source)[0], decoder(x, source)[0])
    decoder.eval()
    assert torch.equal(decoder(x, source)[0], decoder(x, source)[0])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_16_bits_and_autocast(pooling):
    exact = make(pooling=pooling)
    source, x = encoding(lengths=LENGTHS), torch.randn(6, 3, 4).double()
    expected, _ = exact(x, source)
    decoder = copy.deepcopy(exact).bfloat16()
    half = nn.QRNNEncoding(source.output.bfloat16(), tuple(h.bfloat16() for h in source.last), source.lengths)
    states = [nn.QRNNState(torch.zeros(3, 6), torch.zeros(2, 3, n)) for n in (4, 6)]
    y, states = decoder(x.bfloat16(), half, states)
    assert y.dtype == torch.bfloat16 and states[1].c.dtype == states[1].x.dtype == torch.float32
    assert (y.double() - expected).abs().max() < 0.02
    decoder = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = decoder(x.float(), half)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and decoder.layers[1].context.weight.grad.any()
    assert (y.double() - expected).abs().max() < 0.02


def test_compiles_without_a_break():
    encoder, decoder = nn.QRNN(4, 3, 1, window=2, bidirectional=True), nn.QRNNDecoder(4, 6, window=2)

    def both(source, x, source_lengths, lengths):
        return decoder(x, encoder.encode(source, source_lengths), lengths=lengths)[0]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    args = torch.randn(5, 3, 4), torch.randn(6, 3, 4), torch.tensor(LENGTHS), torch.tensor([6, 0, 4])
    y = compiled(*args)
    close(y, both(*args))
    y.square().sum().backward()
    assert encoder.layers_reverse[0].linear.weight.grad.any() and decoder.layers[0].condition.weight.grad.any()


def test_attention_learns_to_read_backwards():
    """Symbols that do not recur, in reverse: among those left, a guess costs 1.8 nats on average."""
    losses = {}
    for attention in (True, False):
        torch.manual_seed(0)
        symbols = torch.nn.Embedding(11, 16)  # the last one starts
        encoder, decoder = nn.QRNN(16, 32, window=2), nn.QRNNDecoder(16, 32, attention=attention)
        head = torch.nn.Linear(32, 10)
        modules = torch.nn.ModuleList([symbols, encoder, decoder, head])
        optimizer = torch.optim.Adam(modules.parameters(), lr=0.01)
        for _ in range(150):
            source = torch.rand(32, 10).argsort(1)[:, :8].T
            target = source.flip(0)
            before = torch.cat([torch.full((1, 32), 10), target[:-1]])
            y, _ = decoder(symbols(before), encoder.encode(symbols(source)))
            loss = F.cross_entropy(head(y).flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[attention] = loss.item()
    assert losses[True] < 0.05 and losses[False] > 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_on_a_gpu_equals_the_cpu(pooling, bidirectional):
    options = {"pooling": pooling, "dense": True, "dtype": torch.float32}
    encoder = nn.QRNN(4, 6 // (1 + bidirectional), 2, window=2, bidirectional=bidirectional, **options)
    decoder = nn.QRNNDecoder(4, 6, 2, window=3, **options)
    source, x = torch.randn(5, 3, 4), torch.randn(7, 3, 4)

    def run(device):
        modules = encoder.to(device), decoder.to(device)
        inputs = [t.to(device).requires_grad_() for t in (source, x)]
        y, states = modules[1](inputs[1], modules[0].encode(inputs[0], LENGTHS), lengths=[7, 0, 3])
        parameters = [p for module in modules for p in module.parameters()]
        grads = torch.autograd.grad(y.square().sum(), [*inputs, *parameters], allow_unused=True)
        return [t.cpu() for t in [*flat(y, states), *(grad for grad in grads if grad is not None)]]

    expected = run("cpu")
    torch.testing.assert_close(run("cuda"), expected, rtol=1e-4, atol=1e-5)


def test_wrong_arguments():
    for options, message in [
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"window": 0}, "window must be positive"),
        ({"pooling": "of"}, "pooling must be"),
        ({"dropout": 1.5}, "dropout must lie in"),
        ({"zoneout": -1}, "zoneout must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            nn.QRNNDecoder(4, 6, **options)
    with pytest.raises(TypeError, match="bidirectional"):
        nn.QRNNDecoder(4, 6, bidirectional=True)
    decoder, source, x = make(), encoding(), torch.randn(6, 3, 4).double()
    wide = encoding(bidirectional=True)
    for args, message in [
        ((x[0], source), r"input must have shape \[T, B, I\], got \[3, 4\]"),
        ((x[..., :3], source), r"input must have shape \[T, B, 4\]"),
        ((x[:, :2], source), r"encoding.last\[0\] must have shape \[B, H\] = \[2, 6\], got \[3, 6\]"),
        ((x, wide), r"encoding.last\[0\] must have shape \[B, H\] = \[3, 6\], got \[3, 12\]"),
        ((x, source._replace(last=source.last[:1])), "encoding.last must have 2 tensors, got 1"),
        ((x, source._replace(output=wide.output)), r"encoding.output must have shape \[S, B, H\] = \[5, 3, 6\]"),
        ((x, source._replace(lengths=[6, 1, 1])), r"encoding.lengths must lie in \[0, T\] = \[0, 5\]"),
        ((x, source, [None]), "hidden must have 2 states, got 1"),
        ((x, source, None, [7, 1, 1]), r"lengths must lie in \[0, T\] = \[0, 6\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder(*args)
    for args, message in [
        ((x, source.output), "encoding must be what QRNN.encode returns, got Tensor"),
        ((x.float(), source), r"encoding.last\[0\] must be torch.float32 like input"),
        ((x, source._replace(output=source.output.float())), "encoding.output must be torch.float64 like input"),
        ((x.long(), source), "input must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((torch.nn.utils.rnn.pack_sequence([x[:, 0]]), source), "got a PackedSequence"),
    ]:
        with pytest.raises(TypeError, match=message):
            decoder(*args)
