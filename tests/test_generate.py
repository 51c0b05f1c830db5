import sys

import pytest
import torch

from fastlm.models import LanguageModel, LanguageModelConfig
from fastlm.nn import NeuralCache
from fastlm.training.generate import choose, generate

V = 17
PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture(params=["lstm", "qrnn"])
def model(request):
    model = LanguageModel(LanguageModelConfig(V, cell=request.param, embedding_size=6, hidden_size=9, num_layers=2))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model.eval()


def text(model, tokens=30, **options):
    return list(generate(model, PROMPT, tokens, **{"seed": 1, **options}))


@pytest.mark.parametrize("cache", [None, NeuralCache(0.5, 0.3, 8)])
def test_the_same_seed_gives_the_same_text(model, cache):
    assert text(model, cache=cache) == text(model, cache=cache)
    assert text(model, cache=cache) != text(model, cache=cache, seed=2)
    assert text(model, cache=cache, seed=None) != text(model, cache=cache, seed=None)
    assert len(text(model, tokens=0)) == 0


def test_the_global_generator_is_left_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    text(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_equals_the_whole_text_at_once(model):
    """Feeding one token at a time gives what one forward pass over everything gives."""
    tokens = text(model, temperature=0)
    whole = torch.tensor(PROMPT.tolist() + tokens)[:, None]
    with torch.no_grad():
        best = model.logits(model(whole).hidden)[:, 0].argmax(-1)
    assert best[len(PROMPT) - 1 : -1].tolist() == tokens


def test_the_cache_is_mixed_in_over_all_that_was_said(model, monkeypatch):
    """The distribution that is sampled from, against equations 2 and 3 of Grave, Joulin and Usunier 2016."""
    seen = []

    def spy(probabilities, *args):
        seen.append(probabilities.clone())
        return choose(probabilities, *args)

    # fastlm.training.generate is the function; its module is found by name.
    monkeypatch.setattr(sys.modules[generate.__module__], "choose", spy)
    theta, share, window, temperature = 0.5, 0.4, 6, 0.8
    tokens = text(model, tokens=12, cache=NeuralCache(theta, share, window), temperature=temperature)
    whole = torch.tensor(PROMPT.tolist() + tokens)
    with torch.no_grad():
        out = model(whole[:, None])
        plain = torch.softmax(model.logits(out.hidden)[:, 0] / temperature, -1)
    for step, probabilities in enumerate(seen):
        t = len(PROMPT) - 1 + step
        first = max(0, t - window)
        a = torch.softmax(theta * (out.raw[first:t, 0] @ out.raw[t, 0]), 0)
        of_cache = torch.zeros(V).index_add_(0, whole[first + 1 : t + 1], a)
        torch.testing.assert_close(probabilities, (1 - share) * plain[t] + share * of_cache, rtol=1e-4, atol=1e-6)


def test_a_prompt_of_one_token_has_an_empty_cache(model):
    tokens = list(generate(model, PROMPT[:1], 4, cache=NeuralCache(1.0, 0.5, 3), seed=0))
    assert len(tokens) == 4


def test_banned_tokens_are_never_sampled(model):
    usual = text(model, tokens=60)
    often = max(set(usual), key=usual.count)
    assert often not in text(model, tokens=60, banned=often)


@pytest.mark.parametrize("cache", [None, NeuralCache(0.5, 0.3, 8), NeuralCache(0.5, 1.0, 8)])
@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-40, 1e-3, 1.0])
def test_the_likeliest_token_may_be_banned(model, temperature, cache):
    with torch.no_grad():
        model.decoder_bias[2] = 1000.0
    assert text(model, tokens=3, temperature=0) == [2, 2, 2]
    tokens = list(generate(model, torch.tensor([2, 2, 2]), 9, temperature=temperature, cache=cache, banned=2, seed=0))
    assert len(tokens) == 9 and 2 not in tokens
    if cache is None and 0 < temperature < 1e-3:
        assert tokens == list(generate(model, torch.tensor([2, 2, 2]), 9, temperature=0, banned=2))


def sampled(probabilities, n=400, greedy=False, top_k=0, top_p=1.0):
    generator = torch.Generator().manual_seed(0)
    return {choose(torch.tensor(probabilities), greedy, top_k, top_p, generator) for _ in range(n)}


def test_choosing():
    p = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert sampled(p) == {0, 1, 2, 3, 4}
    assert sampled(p, greedy=True) == {1}
    assert sampled(p, top_k=2) == {1, 3}
    assert sampled(p, top_k=1) == {1}
    assert sampled(p, top_k=99) == {0, 1, 2, 3, 4}
    assert sampled(p, top_p=0.35) == {1}
    assert sampled(p, top_p=0.6) == {1, 3}
    assert sampled(p, top_p=0.75) == {1, 3, 4}
    assert sampled(p, top_p=1e-9) == {1}
    assert sampled(p, top_k=3, top_p=0.9) == {1, 3, 4}
    assert sampled([0.0, 0.5, 0.0]) == {1}


def test_sampling_follows_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    drawn = [choose(torch.tensor([0.2, 0.8]), False, 0, 1.0, generator) for _ in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_bad_values(model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        generate(model, PROMPT, 3, **options)
    with pytest.raises(ValueError, match="prompt"):
        generate(model, PROMPT[:0], 3)
