import math

import pytest
import torch

from fastlm.errors import DataError
from fastlm.models import LanguageModel, LanguageModelConfig
from fastlm.nn import NeuralCache
from fastlm.training.evaluate import Evaluation, cache_evaluate, evaluate, stream, tune_cache

V = 23


@pytest.fixture(params=["lstm", "qrnn"])
def model(request):
    config = LanguageModelConfig(V, cell=request.param, embedding_size=6, hidden_size=9, num_layers=2)
    model = LanguageModel(config)
    with torch.no_grad():  # far from uniform, so that mistakes show
        for p in model.parameters():
            p.mul_(4)
    return model.train()


@pytest.fixture
def ids():
    return torch.randint(0, V, (101,))


def exact(model, columns):
    """nll [T, B] and hidden [T, B, D] of all predictions at once, by the plain forward pass in float64."""
    model = model.double().eval()
    with torch.no_grad():
        out = model(columns[:-1])
        log_p = torch.log_softmax(model.logits(out.hidden), -1)
    model.float().train()
    return -log_p.gather(-1, columns[1:, :, None])[..., 0], out.raw


@pytest.mark.parametrize(("batch_size", "bptt"), [(1, 7), (4, 5), (4, 1000), (10, 1), (50, 3)])
def test_divides_by_what_was_predicted(model, ids, batch_size, bptt):
    rows = len(ids) // batch_size
    columns = ids[: rows * batch_size].view(batch_size, rows).t()
    nll = exact(model, columns)[0]
    result = evaluate(model, ids, batch_size, bptt)
    assert result.tokens == nll.numel() == (rows - 1) * batch_size
    assert result.nll == pytest.approx(nll.mean().item(), rel=1e-5)
    old = evaluate(model, ids, batch_size, bptt, compat="awd-lstm-lm")
    assert old.nll == pytest.approx(result.nll * (rows - 1) / rows, rel=1e-12)
    assert model.training


def test_scores_in_evaluation_mode_without_gradients(model, ids):
    first, second = evaluate(model, ids, 4, 7), evaluate(model, ids, 4, 7)
    assert first == second
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert evaluate(model, ids, 4, 7) == first
    assert not model.training


def test_training_mode_comes_back_after_an_exception(model, ids):
    def on_window(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, ids, 4, 7, on_window=on_window)
    assert model.training


def test_says_how_far_it_is(model, ids):
    seen = []
    result = evaluate(model, ids, 4, 7, on_window=seen.append)
    assert sum(seen) == result.tokens


def test_a_text_too_short_for_the_batch(model):
    with pytest.raises(DataError):
        evaluate(model, torch.zeros(5, dtype=torch.int64), 4, 7)


def test_figures():
    result = Evaluation(math.log(8), 10)
    assert result.to_dict() == {"nll": math.log(8), "tokens": 10, "ppl": pytest.approx(8), "bpc": pytest.approx(3)}
    assert Evaluation(1e4, 1).ppl == math.inf


@pytest.mark.parametrize("chunk", [1, 13, 100, 1000])
def test_stream_pairs_each_state_with_the_word_that_followed(model, ids, chunk):
    nll, raw = exact(model, ids[:, None])
    hidden, next_ids, streamed = (torch.cat(p) for p in zip(*stream(model, ids, chunk), strict=True))
    assert torch.equal(next_ids, ids[1:])
    torch.testing.assert_close(hidden.double(), raw[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(streamed.double(), nll[:, 0], rtol=1e-4, atol=1e-4)


def cached_nll(model, ids, theta, share, window):
    """Grave, Joulin and Usunier 2016, equations 2 to 4, one word at a time."""
    nll, raw = (x[:, 0] for x in exact(model, ids[:, None]))
    following, mixed = ids[1:], []
    for t in range(len(nll)):
        first = max(0, t - window)
        p = nll[t].neg().exp()
        if t > first:
            a = torch.softmax(theta * (raw[first:t] @ raw[t]), 0)
            p = (1 - share) * p + share * a[following[first:t] == following[t]].sum()
        mixed.append(-p.log())
    return torch.stack(mixed)


@pytest.mark.parametrize("window", [1, 10, 500])
@pytest.mark.parametrize("chunk", [1, 17, 1000])
def test_cache_equals_one_word_at_a_time(model, ids, window, chunk):
    expected = cached_nll(model, ids, 0.7, 0.3, window).mean().item()
    plain, cached = cache_evaluate(model, ids, NeuralCache(0.7, 0.3, window), chunk=chunk)
    assert cached.nll == pytest.approx(expected, rel=1e-4)
    assert plain.nll == pytest.approx(evaluate(model, ids, 1, 50).nll, rel=1e-5)
    assert plain.tokens == cached.tokens == len(ids) - 1


def test_the_cache_never_sees_its_own_answer(model):
    """In a text without repetition a cache can only lose: exactly its share, from the second prediction on."""
    ids, share = torch.randperm(V), 0.25
    plain, cached = cache_evaluate(model, ids, NeuralCache(1.0, share, 100), chunk=5)
    lost = -math.log(1 - share) * (V - 2) / (V - 1)
    assert cached.nll - plain.nll == pytest.approx(lost, rel=1e-4)


def test_every_text_starts_with_an_empty_cache(model, ids):
    cache = NeuralCache(0.7, 0.3, 50)
    first = cache_evaluate(model, ids, cache)
    assert cache_evaluate(model, ids, cache) == first


def test_tuning_finds_what_scoring_confirms(model):
    ids = torch.arange(7).repeat(12)
    cache = NeuralCache(9.0, 0.9, 9)
    found, plain, cached = tune_cache(model, ids, cache, thetas=[0.1, 0.5], windows=[3, 20], chunk=11)
    assert (cache.theta, cache.lambda_, cache.window) == (found.theta, found.lambda_, found.window)
    again = cache_evaluate(model, ids, cache)
    assert (found.theta, found.window) in {(t, w) for t in (0.1, 0.5) for w in (3, 20)}
    assert plain.nll == pytest.approx(again[0].nll, rel=1e-4)
    assert cached.nll == pytest.approx(again[1].nll, rel=1e-3)
    for theta in (0.1, 0.5):
        for window in (3, 20):
            other = cache_evaluate(model, ids, NeuralCache(theta, found.lambda_, window))[1]
            assert other.nll >= cached.nll - 1e-3
