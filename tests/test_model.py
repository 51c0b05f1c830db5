"""The language model: published sizes, the forward pass and loss from their parts, states, and transforms."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastlm import nn
from fastlm.models import LanguageModel, LanguageModelConfig, detach_state, join_states, map_state, state_columns
from fastlm.ops import philox

CELLS = ["lstm", "qrnn", "gru"]
DROPOUTS = ("embedding", "input", "hidden", "output", "weight")
OFF = {f"{name}_dropout": 0.0 for name in DROPOUTS}
WIKITEXT_103 = (2800, 20_000, 76_000)
TOKENS = torch.randint(11, (6, 3), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(11, (6, 3), generator=torch.Generator().manual_seed(2))


def make(cell="lstm", **options):
    return LanguageModel(LanguageModelConfig(11, cell, **{"embedding_size": 4, "hidden_size": 7, **options}))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "parameters, options",
    [
        (24_221_600, {"vocab_size": 10_000}),
        (33_556_078, {"vocab_size": 33_278}),
        (24_020_150, {"vocab_size": 10_000, "cell": "qrnn", "hidden_size": 1550, "num_layers": 4}),
        (33_354_628, {"vocab_size": 33_278, "cell": "qrnn", "hidden_size": 1550, "num_layers": 4}),
        (13_787_851, {"vocab_size": 51, "embedding_size": 200, "hidden_size": 1000}),
        (47_270_045, {"vocab_size": 205, "hidden_size": 1840}),
        (
            153_886_638,
            {"vocab_size": 267_735, "cell": "qrnn", "hidden_size": 2500, "num_layers": 4, "cutoffs": WIKITEXT_103},
        ),
    ],
)
def test_published_parameter_counts(parameters, options):
    model = LanguageModel(LanguageModelConfig(**options), device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.state_dict().values()) == parameters


def test_initial_values():
    model = make(hidden_size=100, embedding_size=50, tie_weights=False)
    assert not model.decoder_bias.any()
    for weight, bound in [
        (model.encoder.embedding.weight, 0.1),
        (model.decoder_weight, 0.1),
        (model.layers[0].weight_ih_l0, 0.1),
        (model.layers[1].bias_hh_l0, 0.1),
        (make(hidden_size=25).layers[1].weight_hh_l0, 0.2),
        (make(hidden_size=25).layers[2].weight_ih_l0, 0.5),
    ]:
        assert bound * 0.9 < weight.abs().max() <= bound


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [True, False])
def test_forward_from_its_parts(cell, tied):
    """Without dropout the model is embedding, layers and a linear map, with a weight shared when tied."""
    model = make(cell, tie_weights=tied).eval()
    assert model.config.output_size == (4 if tied else 7)
    x = model.encoder.embedding(TOKENS)
    for layer in model.layers:
        x = layer(x)[0]
    output = model(TOKENS)
    close((output.raw, output.hidden), (x, x))
    weight = model.encoder.embedding.weight if tied else model.decoder_weight
    close(model.logits(x), x @ weight.T + model.decoder_bias)
    score = model.score(TOKENS, TARGETS)
    expected = F.cross_entropy(model.logits(x).flatten(0, 1), TARGETS.flatten(), reduction="none").view(6, 3)
    close((score.nll, score.raw), (expected, x))
    assert score.nll.dtype == torch.float32


def test_windows_of_the_qrnn():
    model = make("qrnn", window=3, zoneout=0.1)
    assert [layer.window for layer in model.layers] == [3, 1, 1]
    assert [layer.zoneout for layer in model.layers] == [0.1] * 3


@pytest.mark.parametrize("cell", CELLS)
def test_every_dropout_stands_where_it_should(cell):
    """The model's training pass, step by step with the seeds in the order in which they are drawn."""
    model = make(cell, embedding_dropout=0.2, input_dropout=0.3, hidden_dropout=0.4, output_dropout=0.5)
    torch.manual_seed(3)
    output = model(TOKENS)
    torch.manual_seed(3)
    x = nn.LockedDropout(0.3)(nn.EmbeddingDropout(model.encoder.embedding, 0.2)(TOKENS))
    for layer in model.layers[:-1]:
        x = nn.LockedDropout(0.4)(layer(x)[0])
    raw = model.layers[-1](x)[0]
    close((output.raw, output.hidden), (raw, nn.LockedDropout(0.5)(raw)))
    assert all(getattr(layer, "weight_dropout", getattr(layer, "p", None)) == 0.5 for layer in model.layers)


@pytest.mark.parametrize("cell", CELLS)
def test_loss_from_its_parts(cell):
    """AR is on the dropped output, TAR on the raw one, both means over all elements."""
    model = make(cell, ar=2.0, tar=3.0)
    torch.manual_seed(3)
    loss, nll, state = model.loss(TOKENS, TARGETS)
    torch.manual_seed(3)
    hidden, raw, expected_state = model(TOKENS)
    cross_entropy = F.cross_entropy(model.logits(hidden).flatten(0, 1), TARGETS.flatten())
    tar = torch.stack([raw[t + 1] - raw[t] for t in range(5)]).pow(2).mean()
    close(loss, cross_entropy + 2 * hidden.pow(2).mean() + 3 * tar)
    close(nll, cross_entropy)
    assert not nll.requires_grad and loss.requires_grad
    for a, e in zip(state, expected_state, strict=True):
        close(tuple(a), tuple(e))


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_has_no_temporal_regulariser(cell):
    """Old code took a mean over nothing: NaN."""
    model = make(cell, ar=0.0, tar=1.0)
    loss, nll, _ = model.loss(TOKENS[:1], TARGETS[:1])
    assert torch.equal(loss, nll)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_learns(cell, tied):
    """The raw recurrent weights, the last word of the vocabulary and the decoder's bias among them."""
    model = make(cell, tie_weights=tied, ar=0.0, tar=0.0, embedding_dropout=0.0)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(torch.full_like(TOKENS, 10), TARGETS).loss.backward()
        optimizer.step()
    for name, p in model.state_dict().items():
        assert not torch.equal(p, before[name]), name
    moved = model.encoder.embedding.weight != before["encoder.embedding.weight"]
    assert moved[10].all() and (tied or not moved[:10].any())


@pytest.mark.parametrize("cell", CELLS)
def test_one_call_equals_any_split(cell):
    model = make(cell, window=3).eval()
    whole, end = (lambda s: (s.nll, s.state))(model.score(TOKENS, TARGETS))
    pieces, state = [], None
    for tokens, targets in zip(TOKENS.split([1, 3, 2]), TARGETS.split([1, 3, 2]), strict=True):
        nll, _, state = model.score(tokens, targets, state)
        pieces.append(nll)
    close(torch.cat(pieces), whole)
    for a, e in zip(state, end, strict=True):
        close(tuple(a), tuple(e))


@pytest.mark.parametrize("cell", CELLS)
def test_state_is_explicit(cell):
    model = make(cell)
    zeros = model.init_state(3)
    _, _, state = model.loss(TOKENS, TARGETS)
    assert [[s.shape for s in layer] for layer in state] == [[s.shape for s in layer] for layer in zeros]
    assert any(s.requires_grad for layer in state for s in layer)
    cut = detach_state(state)
    assert not any(s.requires_grad for layer in cut for s in layer)
    model.loss(TOKENS, TARGETS, cut).loss.backward()
    doubled = map_state(lambda s: s * 2, cut)
    close([s * 2 for layer in cut for s in layer], [s for layer in doubled for s in layer])
    model(TOKENS[:, :1])  # another batch size, with nothing to reset
    with pytest.raises(ValueError, match=r"must have shape|must be"):
        make("lstm" if cell == "gru" else cell)(TOKENS[:, :2], make("lstm" if cell == "gru" else cell).init_state(3))


@pytest.mark.parametrize("cell", CELLS)
def test_parts_of_a_batch_under_shared_seeds_are_the_batch(cell):
    model, seeds = make(cell, window=3, zoneout=0.4 * (cell == "qrnn")), philox.SharedSeeds()
    state = map_state(torch.randn_like, model.init_state(3))

    def part(columns):
        with seeds:
            place = {"column": columns.start, "columns": 3}
            loss, nll, after = model.loss(
                TOKENS[:, columns], TARGETS[:, columns], state_columns(state, columns), **place
            )
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        return loss.detach(), nll, grads, detach_state(after)

    *whole, after = part(slice(0, 3))
    *parts, states = zip(*(part(slice(i, i + 1)) for i in range(3)), strict=True)
    close(list(join_states(states)), list(after))
    loss, nll = (torch.stack(values).mean() for values in parts[:2])
    grads = [torch.stack(grads).mean(0) for grads in zip(*parts[2], strict=True)]
    close([loss, nll, *grads], [*whole[:2], *whole[2]])


@pytest.mark.parametrize("cell", CELLS)
def test_a_part_of_a_batch_must_lie_in_it(cell):
    for place in ({"column": 1}, {"column": 2, "columns": 4}, {"columns": 2}):
        with pytest.raises(ValueError, match="3 rows from column . on are no part of a batch of"):
            make(cell).loss(TOKENS, TARGETS, **place)


@pytest.mark.parametrize("cell", CELLS)
def test_train_eval_train_and_copies(cell):
    model = make(cell)
    model.loss(TOKENS, TARGETS).loss.backward()
    keys = list(model.state_dict())
    expected = model.eval().score(TOKENS, TARGETS).nll
    assert torch.equal(model.score(TOKENS, TARGETS).nll, expected)
    model.train().zero_grad()
    model.loss(TOKENS, TARGETS).loss.backward()
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin.eval().score(TOKENS, TARGETS).nll, expected)
    other = make(cell)
    other.load_state_dict(model.state_dict())
    close(other.eval().score(TOKENS, TARGETS).nll, expected)


def test_expanded_gradient():
    model = make(**OFF)
    model(TOKENS).hidden.sum().backward()
    expected = [p.grad for p in model.layers.parameters()]
    model.zero_grad()
    model(TOKENS).hidden.backward(torch.ones(6, 3, 4))
    close([p.grad for p in model.layers.parameters()], expected)


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
def test_loss_compiles_without_a_break(cell):
    model = make(cell, num_layers=2, **OFF)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(TOKENS, TARGETS).loss
    close(loss, model.loss(TOKENS, TARGETS).loss)
    loss.backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
@torch.no_grad()
def test_exports_for_any_length(cell):
    model = make(cell).eval()
    state, dim = model.init_state(3), torch.export.Dim
    fixed = map_state(lambda s: (dim.STATIC,) * s.dim(), state)
    program = torch.export.export(model, (TOKENS, state), dynamic_shapes=({0: dim("T", min=2)}, fixed)).module()
    for tokens in (TOKENS, TARGETS.repeat(2, 1)):
        close(program(tokens, state).raw, model(tokens, state).raw)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    model = make(cell)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nll, state = model.loss(TOKENS, TARGETS)
        model.loss(TOKENS, TARGETS, detach_state(state))
    assert nll.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_sixteen_bit_parameters(cell):
    model = make(cell).to(torch.bfloat16)
    loss, _, state = model.loss(TOKENS, TARGETS)
    loss.backward()
    kept = map_state(torch.Tensor.float, detach_state(state))
    if cell != "gru":  # PyTorch's layer takes states of its own dtype only
        after = model.loss(TOKENS, TARGETS, kept).state
        assert {s.dtype for layer in after for s in layer} == {torch.float32}


def test_wrong_arguments():
    for options, message in [
        ({"cell": "rnn"}, "cell must be 'lstm', 'qrnn' or 'gru', got 'rnn'"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"weight_dropout": 1.5}, "weight_dropout must lie in"),
        ({"zoneout": -1.0}, "zoneout must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            LanguageModelConfig(11, **options)
    model = make()
    with pytest.raises(ValueError, match=r"tokens must have shape \[T, B\]"):
        model(TOKENS[0])
    with pytest.raises(TypeError, match="tokens must be an int64 or int32 tensor"):
        model(TOKENS.float())
    for id in (-1, 11):
        tokens = TOKENS.clone()
        tokens[2, 1] = id
        with pytest.raises(ValueError, match=rf"tokens must lie in \[0, 11\), the vocabulary, got {id}"):
            model(tokens)
    gru = make("gru")
    with pytest.raises(ValueError, match=r"state\[0\] must hold one tensor \[1, B, H\], got 2"):
        gru(TOKENS, model.init_state(3))
    with pytest.raises(ValueError, match=r"state\[0\] must have shape \[layers, B, H\] = \[1, 3, 7\], got \[1, 2, 7\]"):
        gru(TOKENS, gru.init_state(2))
    with pytest.raises(ValueError, match="target"):
        model.loss(TOKENS, TARGETS[:, :2])
