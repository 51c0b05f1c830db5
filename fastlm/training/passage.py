"""Looks into the cache: for every word of a passage, what it was given and which earlier words it came from."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.data import Vocabulary
from fastlm.models import LanguageModel
from fastlm.nn import NeuralCache
from fastlm.training.evaluate import stream


def trace_passage(
    model: LanguageModel,
    vocabulary: Vocabulary,
    ids: Tensor,
    cache: NeuralCache,
    start: int,
    length: int,
    top: int = 5,
) -> list[dict]:
    """Follows the cache over the words `start` to `start + length` of a text that is read from its beginning.

    Args:
        ids: [N] int64. start: at least 1, the first word is never predicted. top: how many look-backs to keep.

    Returns:
        For every word: `word`; its probability to the `model` alone, to the `cache` alone and `mixed`; `looked`, the
        earlier words with the largest weights, each with `back` (how many words ago), `word` and `weight`.
    """
    hidden, next_ids, nll = (torch.cat(p) for p in zip(*stream(model, ids[: start + length]), strict=True))
    mixed, _ = cache.score(hidden, next_ids, nll)
    hidden, next_ids, nll, mixed = hidden.float().cpu(), next_ids.cpu(), nll.cpu(), mixed.cpu()
    words = []
    for row in range(start - 1, len(nll)):
        first = max(0, row - cache.window)
        weights = torch.softmax(cache.theta * (hidden[first:row] @ hidden[row]), 0)
        words.append(
            {
                "word": vocabulary.words[next_ids[row]],
                "model": nll[row].neg().exp().item(),
                "cache": weights[next_ids[first:row] == next_ids[row]].sum().item(),
                "mixed": mixed[row].neg().exp().item(),
                "looked": [
                    {
                        "back": row - first - i,
                        "word": vocabulary.words[next_ids[first + i]],
                        "weight": weights[i].item(),
                    }
                    for i in weights.topk(min(top, len(weights))).indices.tolist()
                ],
            }
        )
    return words
