"""`fastlm demo`: two small models on the embedded corpus, the cache behind them, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlm.data import Corpus, load_corpus
from fastlm.training.caching import cache_run
from fastlm.training.evaluate import perplexity
from fastlm.training.progress import say
from fastlm.training.recipe import load_recipe
from fastlm.training.report import write_report
from fastlm.training.run import has_run, read_json, run_cache, run_model
from fastlm.training.trainer import Trainer

SOURCE = "stdlib"
RECIPES = {"lstm": "demo-lstm", "qrnn": "demo-qrnn"}
LEAST_GAIN = 0.20  # the cache takes at least this share off the test perplexity
MOST_OF_UNIGRAM = 0.60  # a model ends below this share of the unigram model's test perplexity
COLUMNS = {
    "model": "{}",
    "parameters": "{:,}",
    "tokens/s": "{:,.0f}",
    "valid ppl": "{:.2f}",
    "test ppl": "{:.2f}",
    "valid, cache": "{:.2f}",
    "test, cache": "{:.2f}",
    "theta": "{:.3g}",
    "lambda": "{:.3g}",
    "window": "{:,}",
}


def run_demo(out: str | Path, device: str) -> list[dict[str, Any]]:
    """Trains, tunes and tests both models, or goes on where an earlier demo in `out` was stopped.

    Returns:
        The rows of the table, the unigram model of the training text first.

    Raises:
        Interrupted: a signal came; the same command goes on.
    """
    corpus = load_corpus(SOURCE, **load_recipe(RECIPES["lstm"]).corpus_settings())
    sizes = ", ".join(f"{len(getattr(corpus, split)):,} {split}" for split in ("train", "valid", "test"))
    say(f"corpus {corpus.name}: {len(corpus.vocabulary):,} words; tokens: {sizes}")
    rows = [_unigram_row(corpus)]
    for cell, recipe in RECIPES.items():
        rows.append(_train_row(Path(out) / cell, recipe, corpus, device))
    return rows


def _unigram_row(corpus: Corpus) -> dict[str, Any]:
    valid, test = (perplexity(corpus.unigram_nll(split)) for split in ("valid", "test"))
    return {"model": "unigram", "valid ppl": valid, "test ppl": test}


def _train_row(run_dir: Path, name: str, corpus: Corpus, device: str) -> dict[str, Any]:
    resume = has_run(run_dir)
    if resume:
        say(f"{run_dir} is there already: going on with it (delete it to train from the start)")
    say(f"training {name} into {run_dir}")
    Trainer(run_dir, load_recipe(name), corpus, source=SOURCE, device=device, resume=resume).fit()
    write_report(run_dir)
    results = read_json(run_dir / "results.json")
    cache = cache_run(run_dir, run_model(run_dir, device), corpus, run_cache(run_dir), tune=True)
    return {
        "model": name,
        "parameters": results["parameters"],
        "tokens/s": results["tokens_per_second"],
        "valid ppl": cache["valid"]["plain"]["ppl"],
        "test ppl": cache["test"]["plain"]["ppl"],
        "valid, cache": cache["valid"]["cached"]["ppl"],
        "test, cache": cache["test"]["cached"]["ppl"],
        "theta": cache["theta"],
        "lambda": cache["lambda"],
        "window": cache["window"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, names left, figures right; a figure that a row does not have is a dash."""
    cells = [list(COLUMNS)]
    for row in rows:
        cells.append([form.format(row[name]) if name in row else "-" for name, form in COLUMNS.items()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def checks(rows: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """What every demo has to show: whether it does, and the sentence that says so."""
    unigram, *models = rows
    found = []
    for row in models:
        share = row["test ppl"] / unigram["test ppl"]
        gain = 1 - row["test, cache"] / row["test ppl"]
        found.append((share < MOST_OF_UNIGRAM, f"{row['model']}: {share:.0%} of the unigram perplexity (below 60 %)"))
        found.append((gain >= LEAST_GAIN, f"{row['model']}: the cache takes {gain:.0%} off (at least 20 %)"))
    return found
