"""Evaluation: negative log-likelihood of a text under a model, with and without the neural cache.

Sums are taken in float64 and divided by the number of tokens that were predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.data import eval_windows
from fastlm.models import LanguageModel
from fastlm.nn import CacheTuning, NeuralCache

UNITS = {"ppl": "perplexity", "bpc": "bits per character"}
CHUNK = 1024  # tokens per forward pass of a single stream; results do not depend on it


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text: `nll` is the mean per token in nats, over `tokens` predicted tokens."""

    nll: float
    tokens: int

    @property
    def ppl(self) -> float:
        """Perplexity, exp(nll)."""
        return perplexity(self.nll)

    @property
    def bpc(self) -> float:
        """Bits per token; per character where the tokens are characters."""
        return bits(self.nll)

    def to_dict(self) -> dict[str, float]:
        """All four figures, for JSON."""
        return {"nll": self.nll, "tokens": self.tokens, "ppl": self.ppl, "bpc": self.bpc}


def perplexity(nll: float) -> float:
    """exp(nll), infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 709 else math.inf


def bits(nll: float) -> float:
    """Nats in bits."""
    return nll / math.log(2)


def figure(nll: float, unit: str, digits: int = 2) -> str:
    """A loss in its unit: `ppl 61.20`, or `bpc 1.1750` with two digits more."""
    return f"ppl {perplexity(nll):.{digits}f}" if unit == "ppl" else f"bpc {bits(nll):.{digits + 2}f}"


def evaluate(
    model: LanguageModel,
    ids: Tensor,
    batch_size: int = 10,
    bptt: int = 70,
    compat: str | None = None,
    on_window: Callable[[int], None] | None = None,
) -> Evaluation:
    """Scores a text in `batch_size` contiguous columns; the first token of each is never predicted.

    Args:
        model: put into evaluation mode for the time being.
        ids: [N] int64.
        batch_size: number of columns; N mod `batch_size` tokens at the end are left out.
        bptt: tokens per forward pass; the hidden state is carried, so the result does not depend on it.
        compat: "awd-lstm-lm" divides by the length of the columns instead of by what was predicted, as that
            program does; perplexities come out a little lower.
        on_window: called after each forward pass with the number of tokens it scored.

    Raises:
        DataError: the text is too short for `batch_size` columns.
    """
    total, tokens = _zero(model), 0
    with _evaluating(model):
        for _, nll, _ in _score(model, ids, batch_size, bptt):
            total += nll.double().sum()
            tokens += nll.numel()
            if on_window is not None:
                on_window(nll.numel())
    divisor = tokens + batch_size if compat == "awd-lstm-lm" else tokens
    return Evaluation(total.item() / divisor, tokens)


def stream(model: LanguageModel, ids: Tensor, chunk: int = CHUNK) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Runs a text through the model as a single stream, for the cache.

    Args:
        ids: [N] int64, at least 2.
        chunk: tokens per forward pass; the values do not depend on it.

    Yields:
        hidden [n, D], the last layer's raw output; next_ids [n], the words that followed; nll [n], in nats.
    """
    with _evaluating(model):
        for targets, nll, raw in _score(model, ids, 1, chunk):
            yield raw[:, 0], targets[:, 0], nll[:, 0]


def cache_evaluate(
    model: LanguageModel,
    ids: Tensor,
    cache: NeuralCache,
    chunk: int = CHUNK,
    on_window: Callable[[int], None] | None = None,
) -> tuple[Evaluation, Evaluation]:
    """Scores a text as one stream, without and with a cache that starts empty.

    Args:
        ids: [N] int64. chunk, on_window: as in `stream` and `evaluate`.
    """
    plain, mixed = _zero(model), _zero(model)
    state, tokens = None, 0
    for hidden, next_ids, nll in stream(model, ids, chunk):
        with_cache, state = cache.score(hidden, next_ids, nll, state)
        plain += nll.double().sum()
        mixed += with_cache.double().sum()
        tokens += len(nll)
        if on_window is not None:
            on_window(len(nll))
    return Evaluation(plain.item() / tokens, tokens), Evaluation(mixed.item() / tokens, tokens)


def tune_cache(
    model: LanguageModel,
    ids: Tensor,
    cache: NeuralCache,
    *,
    thetas: Sequence[float] | None = None,
    windows: Sequence[int] | None = None,
    chunk: int = CHUNK,
    on_window: Callable[[int], None] | None = None,
) -> tuple[CacheTuning, Evaluation, Evaluation]:
    """Finds theta, lambda and window of a cache on a text, which should be the validation split, and sets them.

    The text goes through the model once; its hidden states ([N, D]) are kept for the whole grid.

    Args:
        ids: [N] int64. thetas, windows: the grid; `NeuralCache.tune` knows one by itself. chunk, on_window: as in
            `stream` and `evaluate`.

    Returns:
        What was found, and the scores of the text without and with it.
    """
    parts = []
    for part in stream(model, ids, chunk):
        parts.append(part)
        if on_window is not None:
            on_window(len(part[2]))
    hidden, next_ids, nll = (torch.cat(p) for p in zip(*parts, strict=True))
    grid = {k: v for k, v in [("thetas", thetas), ("windows", windows)] if v is not None}
    tuning = cache.tune(hidden, next_ids, nll, **grid)
    return tuning, Evaluation(nll.double().mean().item(), len(nll)), Evaluation(math.log(tuning.ppl), len(nll))


def _score(model: LanguageModel, ids: Tensor, columns: int, bptt: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """targets [T, B], nll [T, B] and raw hidden [T, B, D] of one window after the other, on the model's device."""
    device, state = _zero(model).device, None
    for inputs, targets in eval_windows(ids, columns, bptt):
        with torch.no_grad():
            out = model.score(inputs.to(device), targets, state)
        state = out.state
        yield targets.to(device), out.nll, out.raw


@contextmanager
def _evaluating(model: LanguageModel):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _zero(model: LanguageModel) -> Tensor:
    """A sum to add to, float64 and on the model's device."""
    return torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
