"""Runs that belong together, the stages of a reproduction or the rows of an ablation: each trained to its end once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlm.data import Corpus
from fastlm.errors import DataError, FastlmError, RecipeError
from fastlm.training.forms import EPOCH, check_form
from fastlm.training.parallel import Ranks
from fastlm.training.progress import say
from fastlm.training.recipe import Recipe
from fastlm.training.report import read_events, write_report
from fastlm.training.run import check_same_run, has_run, read_json, read_run, write_config
from fastlm.training.trainer import Trainer

_EPOCH_KEYS = ("epoch", "step", "lr", "valid_nll", "valid_ppl", "valid_bpc", "averaging", "seconds", "wall_seconds")


def fit_stage(folder: Path, recipe: Recipe, corpus: Corpus, *, ranks: Ranks, **options: Any) -> None:
    """Trains a run to its end: from its start, from where it was stopped, or not at all if it is there already.

    Args:
        folder: of the run. recipe, corpus, ranks: as for `Trainer`. options: the other arguments of `Trainer`; `start`
            counts only for a run that has not begun.

    Raises:
        Interrupted: a signal came; the same call goes on.
        RecipeError, DataError: as for `is_trained`.
    """
    if is_finished(folder, recipe, corpus):
        config = read_run(folder)
        if ranks.first and config.recipe != recipe:
            write_config(folder, replace(config, recipe=recipe))  # what decides no weight, as the cache to tune from
        return
    resume = has_run(folder)
    if resume:
        say(f"{folder} is there already: going on with it (delete it to train from the start)")
    trainer = Trainer(folder, recipe, corpus, resume=resume, ranks=ranks, **options)
    say(f"training {folder}: {sum(p.numel() for p in trainer.model.parameters()):,} parameters, on {trainer.device}")
    trainer.fit()
    if ranks.first:
        write_report(folder)


def is_finished(folder: Path, recipe: Recipe, corpus: Corpus) -> bool:
    """Whether a run of this recipe on this text is there, with its results; errors as for `is_trained`."""
    return is_trained(folder, recipe, corpus) and _results_of(folder, recipe, "test_batch_size")


def is_trained(folder: Path, recipe: Recipe, corpus: Corpus) -> bool:
    """Whether the weights are there that this recipe makes of this text; keys that decide no weight may differ.

    Raises:
        RecipeError, DataError: the run in the folder cannot go on as one of this recipe, or is of another text.
    """
    if not has_run(folder):
        return False
    config = read_run(folder)
    try:
        check_same_run(config, replace(config, recipe=recipe, digest=corpus.digest))
    except (RecipeError, DataError) as e:
        raise type(e)(f"{folder}: {e}") from e
    length = ("epochs", "max_seconds")  # of what decides the weights, all that may change
    if any(getattr(config.recipe, key) != getattr(recipe, key) for key in length):
        return False
    # Where a run went on from its results, and was stopped, they are those of its recipe before.
    return _results_of(folder, recipe, *length)


def stage_record(folder: Path) -> dict[str, Any]:
    """The validated epochs of a run and, once it is finished, its results.

    `starts` has step, ranks, machine, versions and commit of every start of the training whose steps count; a run from
    before they were kept has none of its first ones.

    Raises:
        FastlmError: a file of the run cannot be read.
    """
    path, epochs = folder / "metrics.jsonl", []
    for number, record in enumerate(read_events(path), 1):
        if record["event"] == "epoch":
            try:
                check_form(record, EPOCH, f"line {number}")
            except ValueError as e:
                raise FastlmError(f"{path} cannot be read: {e}") from e
            epochs.append({**{key: record[key] for key in _EPOCH_KEYS}, "train_ppl": record["ppl"]})
    results = read_json(folder / "results.json") or {}
    results.pop("recipe", None)
    return {"starts": [], **results, "curve": epochs}


def _results_of(folder: Path, recipe: Recipe, *keys: str) -> bool:
    """Whether the results of a run are there and were made with the same values of some keys."""
    made_with = (read_json(folder / "results.json") or {}).get("recipe", {})
    return all(made_with.get(key) == getattr(recipe, key) for key in keys)
