"""Text from a language model, with or without the neural cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.models import LanguageModel
from fastlm.nn import NeuralCache


def generate(
    model: LanguageModel,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cache: NeuralCache | None = None,
    banned: int | None = None,
    seed: int | None = None,
) -> Iterator[int]:
    """Samples tokens one by one; the same seed gives the same text on the same machine.

    Args:
        model: in evaluation mode.
        prompt: [N] int64, at least one token.
        tokens: how many to sample.
        temperature: divides the model's logits, before the cache is mixed in; 0 takes the most probable token.
        top_k: samples among this many most probable tokens only; 0 among all.
        top_p: samples among the fewest tokens whose probabilities reach this sum.
        cache: mixes in what was said so far, the prompt included.
        banned: an id that is never sampled, as that of `<unk>`; the others share its probability.
        seed: of the sampling; a fresh one when not given.

    Yields:
        The sampled ids.

    Raises:
        ValueError: an argument is out of range.
    """
    if prompt.dim() != 1 or not len(prompt):
        raise ValueError(f"prompt must be a [N] tensor of at least one id, got shape {list(prompt.shape)}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return _sample(model, prompt, tokens, temperature, top_k, top_p, cache, banned, generator)


def choose(probabilities: Tensor, greedy: bool, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One id from a distribution [V] that need not sum to one; equal probabilities are ranked by id."""
    ordered, ids = probabilities.double().cpu().sort(descending=True, stable=True)
    if greedy:
        return int(ids[0])
    if top_k:
        ordered = ordered[:top_k]
    before = ordered.cumsum(0) - ordered
    # The first one always stays: nothing lies before it.
    ordered = ordered.where(before < top_p * ordered.sum(), 0.0)
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])


def _sample(model, prompt, tokens, temperature, top_k, top_p, cache, banned, generator) -> Iterator[int]:
    window = prompt.to(next(model.parameters()).device)[:, None]  # [T, 1]
    state = memory = None
    with torch.no_grad():
        for _ in range(tokens):
            out = model(window, state)
            state = out.state
            logits = model.logits(out.hidden).double()
            if banned is not None:
                logits[..., banned] = -torch.inf
            # Less their maximum, the logits stand any temperature: the largest stays 0, the others go to -inf at worst.
            logits = logits - logits.amax(-1, keepdim=True)
            log_p = torch.log_softmax(logits / temperature if temperature else logits, -1).float()
            if cache is None:
                probabilities = log_p[-1, 0].exp()
            else:
                for raw, ids, row in zip(out.raw, window, log_p, strict=True):
                    mixed, memory = cache.step(raw, ids, row, memory)
                probabilities = mixed[0].exp()
                if banned is not None:
                    probabilities[banned] = 0.0
                    # A cache that holds nothing else, at lambda 1, has no say.
                    total = probabilities.sum()
                    probabilities = torch.where(total > 0, probabilities / total, log_p[-1, 0].exp())
            token = choose(probabilities, temperature == 0, top_k, top_p, generator)
            yield token
            window = torch.full_like(window[:1], token)
