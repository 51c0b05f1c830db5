"""The neural cache against a word-by-word transcription in float64, its streams, generation and tuning."""

import math

import pytest
import torch

from fastlm import nn

V, N = 7, 60


def stream(n=N, dtype=torch.float64, size=V):
    """Hidden states, next words, the model's log probabilities of all words, and its loss on the next ones."""
    hidden, ids = torch.randn(n, 5, dtype=dtype), torch.randint(size, (n,))
    log_probs = torch.randn(n, size, dtype=dtype).log_softmax(1)
    return hidden, ids, log_probs, -log_probs[torch.arange(n), ids]


def naive(hidden, ids, log_probs, theta, lambda_, window, later_than=0):
    """Losses from whole distributions, one word after the other, as the equations stand."""
    losses = []
    for t in range(len(ids)):
        p = log_probs[t].exp()
        past = slice(max(0, t - window), t)
        if t > later_than:
            weights = torch.softmax(theta * hidden[past] @ hidden[t], 0)
            cache = torch.zeros_like(p).index_add(0, ids[past], weights)
            p = lambda_ * cache + (1 - lambda_) * p
        losses.append(-p[ids[t]].log())
    return torch.stack(losses)


@pytest.mark.parametrize("window", [1, 7, N - 1, N, 500])
@pytest.mark.parametrize("theta", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.999])
def test_equals_the_equations(window, theta, lambda_):
    hidden, ids, log_probs, nll = stream()
    actual, state = nn.NeuralCache(theta, lambda_, window).score(hidden, ids, nll)
    torch.testing.assert_close(actual, naive(hidden, ids, log_probs, theta, lambda_, window))
    assert torch.equal(state.hidden, hidden[-window:]) and torch.equal(state.next_ids, ids[-window:])
    assert state.seen == N


def test_awd_lstm_lm_starts_late():
    """That code uses the cache only where strictly more than `window` words lie behind."""
    hidden, ids, log_probs, nll = stream()
    cache = nn.NeuralCache(0.7, 0.3, 20, compat="awd-lstm-lm")
    expected = naive(hidden, ids, log_probs, 0.7, 0.3, 20, later_than=20)
    actual, _ = cache.score(hidden, ids, nll)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual[:21], nll[:21]) and not torch.isclose(actual[21], nll[21])
    pieces, state = [], None
    for rows in (slice(0, 15), slice(15, 20), slice(20, None)):
        piece, state = cache.score(hidden[rows], ids[rows], nll[rows], state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces), expected)


@pytest.mark.parametrize("window", [1, 8, 25, 500])
def test_chunking_does_not_matter(window):
    hidden, ids, _, nll = stream()
    cache = nn.NeuralCache(0.7, 0.3, window)
    whole, end = cache.score(hidden, ids, nll)
    for sizes in ([1] * N, [0, 13, 0, 40, 7], [59, 1]):
        pieces, state = [], None
        for h, i, n in zip(hidden.split(sizes), ids.split(sizes), nll.split(sizes), strict=True):
            piece, state = cache.score(h, i, n, state)
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces), whole)
        assert torch.equal(state.hidden, end.hidden) and torch.equal(state.next_ids, end.next_ids)


def test_the_cache_never_sees_its_own_answer():
    """Changing the next word of the last row changes nothing but the model's part of that row."""
    hidden, ids, log_probs, nll = stream()
    ids[-1], ids[:-1] = 0, ids[:-1] % (V - 1) + 1  # the last answer never came before
    actual, _ = nn.NeuralCache(0.7, 0.3, 500).score(hidden, ids, nll)
    torch.testing.assert_close(actual[-1], nll[-1] - math.log(0.7))
    before, _ = nn.NeuralCache(0.7, 0.3, 500).score(hidden[:-1], ids[:-1], nll[:-1])
    torch.testing.assert_close(actual[:-1], before)


def test_first_word_and_certain_words():
    hidden, ids, _, nll = stream(4)
    actual, _ = nn.NeuralCache(0.7, 1.0, 10).score(hidden, torch.zeros_like(ids), nll)
    torch.testing.assert_close(actual, torch.cat([nll[:1], torch.zeros(3).double()]))
    actual, _ = nn.NeuralCache(0.7, 1.0, 10).score(hidden, torch.arange(4), nll)
    assert actual[0] == nll[0] and (actual[1:] == math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_inputs_that_require_gradients(dtype):
    hidden, ids, _, nll = stream(dtype=dtype)
    exact, _ = nn.NeuralCache(0.7, 0.3, 20).score(hidden.double(), ids, nll.double())
    actual, state = nn.NeuralCache(0.7, 0.3, 20).score(hidden.requires_grad_(), ids, nll.requires_grad_())
    assert actual.dtype == torch.float64 and not actual.requires_grad and not state.hidden.requires_grad
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compat", [None, "awd-lstm-lm"])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_generation_gives_what_scoring_gives(window, compat):
    """Step by step, ring buffer and all: the distribution at the next word is the score of that word."""
    hidden, ids, log_probs, nll = stream(20, torch.float32)
    cache = nn.NeuralCache(0.7, 0.3, window, compat=compat)
    expected, _ = cache.score(hidden, ids, nll)
    state, read = None, torch.tensor(0)
    for t in range(20):
        mixture, state = cache.step(hidden[t : t + 1], read.reshape(1), log_probs[t : t + 1], state)
        torch.testing.assert_close(mixture.exp().sum(), torch.tensor(1.0))
        torch.testing.assert_close(-mixture[0, ids[t]].double(), expected[t], rtol=1e-5, atol=1e-5)
        read = ids[t]


def test_streams_of_a_batch_are_apart_and_may_be_permuted():
    cache = nn.NeuralCache(0.7, 0.5, 3)
    hidden, ids = torch.randn(6, 2, 5), torch.randint(V, (6, 2))
    log_probs = torch.randn(6, 2, V).log_softmax(-1)
    together = alone = None
    for t in range(6):
        if t == 3:  # as a beam does
            together = together._replace(**{k: getattr(together, k)[[1, 0]] for k in ("keys", "ids", "hidden")})
            hidden, ids, log_probs = hidden.flip(1), ids.flip(1), log_probs.flip(1)
        mixture, together = cache.step(hidden[t], ids[t], log_probs[t], together)
        row = slice(0, 1) if t < 3 else slice(1, 2)
        expected, alone = cache.step(hidden[t, row], ids[t, row], log_probs[t, row], alone)
        torch.testing.assert_close(mixture[row], expected)
    before = [x.clone() for x in alone[:3]]  # a step leaves the state it was given as it was
    cache.step(hidden[0, row], ids[0, row], log_probs[0, row], alone)
    assert all(torch.equal(x, old) for x, old in zip(alone, before, strict=False))


def test_tuning_finds_the_best_lambda_of_every_pair():
    hidden, ids, log_probs, nll = stream()
    ids[1::2] = ids[::2]  # words come in pairs, so that a cache helps
    nll = -log_probs[torch.arange(N), ids]
    cache = nn.NeuralCache(0.0, 0.0, 1)
    thetas, windows = [0.0, 0.5], [9, 1]
    tuning = cache.tune(hidden, ids, nll, thetas=thetas, windows=windows)
    assert [(r.window, r.theta) for r in tuning.table] == [(w, t) for w in windows for t in thetas]
    for result in tuning.table:

        def ppl(lambda_, result=result):
            scored, _ = nn.NeuralCache(result.theta, lambda_, result.window).score(hidden, ids, nll)
            return scored.mean().exp().item()

        assert math.isclose(ppl(result.lambda_), result.ppl, rel_tol=1e-9)
        assert all(ppl(x / 8) >= result.ppl - 1e-9 for x in range(8))
    best = min(tuning.table, key=lambda r: r.ppl)
    assert (tuning.theta, tuning.lambda_, tuning.window, tuning.ppl) == (
        best.theta,
        best.lambda_,
        best.window,
        best.ppl,
    )
    assert (cache.theta, cache.lambda_, cache.window) == tuning[:3]
    assert best.ppl < nll.mean().exp()


def test_tuning_at_the_ends_of_lambda():
    hidden, ids, log_probs, nll = stream(40)
    useless = nn.NeuralCache(1.0, 0.5, 5)
    tuning = useless.tune(hidden, torch.arange(40), nll, thetas=[1.0], windows=[5])
    assert tuning.lambda_ == 0.0 and math.isclose(tuning.ppl, nll.mean().exp().item())
    tuning = useless.tune(hidden, torch.zeros(40).long(), nll, thetas=[1.0], windows=[5])
    assert tuning.lambda_ > 1 - 1e-6
    hopeless = useless.tune(hidden, torch.zeros(40).long(), nll + 1000, thetas=[1.0], windows=[5])
    assert hopeless.lambda_ > 0.9  # the model gives the words no chance that float64 could hold


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["hidden", "nll"])
def test_tuning_refuses_what_is_not_finite(name, bad):
    hidden, ids, _, nll = stream(40)
    (hidden if name == "hidden" else nll)[17] = bad
    cache = nn.NeuralCache(1.0, 0.5, 5)
    with pytest.raises(ValueError, match=f"{name} must be finite, got NaN or infinity"):
        cache.tune(hidden, ids, nll, thetas=[0.0, 0.5], windows=[5])
    assert (cache.theta, cache.lambda_, cache.window) == (1.0, 0.5, 5)


def test_tuning_passes_over_results_that_are_not_finite(monkeypatch):
    hidden, ids, _, nll = stream(40)
    cache, whole = nn.NeuralCache(1.0, 0.5, 5), nn.NeuralCache._log_cache

    def spoiled(self, *args):
        log_cache, empty = whole(self, *args)
        log_cache[:, bad] = math.nan
        return log_cache, empty

    monkeypatch.setattr(nn.NeuralCache, "_log_cache", spoiled)
    bad = 0
    tuning = cache.tune(hidden, ids, nll, thetas=[0.5, 0.2], windows=[5])
    assert tuning.theta == 0.2 and math.isfinite(tuning.ppl) and math.isnan(tuning.table[0].ppl)
    bad = slice(None)
    with pytest.raises(ValueError, match="hidden and nll must give a finite perplexity"):
        cache.tune(hidden, ids, nll, thetas=[0.5, 0.2], windows=[5])
    with pytest.raises(ValueError, match="hidden and nll must give a finite perplexity"):
        cache.tune(hidden, ids, nll + 1e4, thetas=[0.5], windows=[5])


def test_tuning_of_the_late_start_leaves_the_first_words_out():
    hidden, ids, _, nll = stream(40)
    cache = nn.NeuralCache(1.0, 0.5, 5, compat="awd-lstm-lm")
    tuning = cache.tune(hidden, ids, nll, thetas=[0.5], windows=[39, 10])
    assert tuning.table[0].lambda_ == 0.0  # no word has more than 39 behind it
    scored, _ = cache.score(hidden, ids, nll)
    assert math.isclose(scored.mean().exp().item(), tuning.ppl)


def test_state_dict_holds_the_settings_as_a_tensor():
    cache = nn.NeuralCache(0.6625523432485668, 0.12785920428335693, 3785)
    other = nn.NeuralCache(0.0, 0.0, 1)
    other.load_state_dict(cache.state_dict())
    assert (other.theta, other.lambda_, other.window) == (0.6625523432485668, 0.12785920428335693, 3785)
    assert all(isinstance(v, torch.Tensor) for v in cache.state_dict().values())
    assert repr(other) == "NeuralCache(theta=0.6625523432485668, lambda_=0.12785920428335693, window=3785)"


def test_wrong_arguments():
    for args, message in [
        ((-1.0, 0.1, 5), "theta must lie in"),
        ((1e30, 0.1, 5), "theta must lie in"),
        ((1.0, 1.1, 5), "lambda_ must lie in"),
        ((1.0, 0.1, 0), "window must be an integer >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            nn.NeuralCache(*args)
    with pytest.raises(ValueError, match="compat must be"):
        nn.NeuralCache(1.0, 0.1, 5, compat="fastai")
    cache, (hidden, ids, log_probs, nll) = nn.NeuralCache(1.0, 0.1, 5), stream()
    with pytest.raises(ValueError, match="nll must have shape"):
        cache.score(hidden, ids, nll[:-1])
    with pytest.raises(ValueError, match="next_ids must have shape"):
        cache.score(hidden, ids[:-1], nll)
    with pytest.raises(ValueError, match="nll must hold at least one word"):
        cache.tune(hidden[:0], ids[:0], nll[:0])
    with pytest.raises(ValueError, match=r"log_probs must have shape \[B, V\]"):
        cache.step(hidden, ids, nll)
    _, state = cache.step(hidden, ids, log_probs)
    with pytest.raises(ValueError, match="state.keys must have shape"):
        cache.step(hidden[:2], ids[:2], log_probs[:2], state)
