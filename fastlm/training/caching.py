"""The neural cache behind a run: tuned on its validation split, scored on its test split, shown in its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.data import Corpus
from fastlm.models import LanguageModel
from fastlm.nn import NeuralCache
from fastlm.training.evaluate import Evaluation, cache_evaluate, tune_cache
from fastlm.training.passage import trace_passage
from fastlm.training.progress import Progress
from fastlm.training.report import write_report
from fastlm.training.run import write_json

PASSAGE = 200  # words of the test text that the report shows


def cache_run(
    run_dir: str | Path,
    model: LanguageModel,
    corpus: Corpus,
    cache: NeuralCache,
    splits: Sequence[str] = ("test",),
    *,
    tune: bool = False,
    thetas: Sequence[float] | None = None,
    windows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Scores texts without and with a cache, writes cache.json and the report.

    Args:
        run_dir: the run that `model` is of. corpus: its text. cache: its settings. splits: the texts to score.
        tune: find the settings on the validation split first, which is then scored too, over `thetas` and `windows`.

    Returns:
        The content of cache.json: theta, lambda, window, whether they were `tuned`; for each split the scores
        `plain` and `cached`; the `passage` of the report.
    """
    scores = {}
    if tune:
        with Progress("tuning the cache", len(corpus.valid)) as progress:
            _, *scores["valid"] = tune_cache(
                model, corpus.valid, cache, thetas=thetas, windows=windows, on_window=progress.advance
            )
    for split in splits:
        if split not in scores:
            ids = getattr(corpus, split)
            with Progress(f"{split} with the cache", len(ids)) as progress:
                scores[split] = cache_evaluate(model, ids, cache, on_window=progress.advance)
    length = min(PASSAGE, len(corpus.test) - 1)
    # As early as the cache is full, for the text is read again up to there.
    start = min(1 + cache.window, len(corpus.test) - length)
    result = {
        "theta": cache.theta,
        "lambda": cache.lambda_,
        "window": cache.window,
        "tuned": tune,
        **{split: _both(*pair) for split, pair in scores.items()},
        "passage": trace_passage(model, corpus.vocabulary, corpus.test, cache, start, length),
    }
    write_json(Path(run_dir) / "cache.json", result)
    write_report(run_dir)
    return result


def _both(plain: Evaluation, cached: Evaluation) -> dict[str, Any]:
    return {"plain": plain.to_dict(), "cached": cached.to_dict()}
