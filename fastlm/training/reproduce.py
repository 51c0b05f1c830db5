"""`fastlm reproduce`: trains a recipe, finetunes, tunes the cache, and writes all of it beside the published figures.

The file <recipe>.json has the recipe and what was set on top of it, for each stage the final figures, those of every
epoch and, for each start of the training, ranks, machine, versions and commit; <recipe>.png is its curve.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastlm.data import Corpus
from fastlm.errors import FastlmError
from fastlm.machine import describe
from fastlm.training.caching import cache_run
from fastlm.training.checkpoint import write_file
from fastlm.training.parallel import Ranks
from fastlm.training.plots import MISSING
from fastlm.training.progress import say
from fastlm.training.recipe import RecipeFile, finetune_recipe
from fastlm.training.run import has_run, run_cache, run_model, write_json
from fastlm.training.stages import fit_stage, is_trained, stage_record


def train_stages(
    file: RecipeFile, corpus: Corpus, run_dir: Path, *, source: str, device: str, ranks: Ranks
) -> dict[str, Path]:
    """Trains a recipe in `run_dir` and, where its file has a table [finetune], finetunes it in `run_dir`/finetune.

    Returns:
        The folders of the stages, "base" and perhaps "finetuned".

    Raises:
        Interrupted: a signal came; the same call goes on.
        FastlmError: the recipe cannot be finetuned, or the finetuning that is there started from other weights.
    """
    tuned = None if file.finetune is None else finetune_recipe(file.recipe, file.finetune)
    folder, options = run_dir / "finetune", {"source": source, "device": device, "ranks": ranks}
    if has_run(folder) and not is_trained(run_dir, file.recipe, corpus):
        raise FastlmError(f"{folder} started from weights that {run_dir} would go on from: delete it to finetune again")
    fit_stage(run_dir, file.recipe, corpus, finetune=file.finetune, **options)
    if tuned is None:
        return {"base": run_dir}
    fit_stage(folder, tuned, corpus, start=run_dir, **options)
    return {"base": run_dir, "finetuned": folder}


def measure(
    file: RecipeFile, corpus: Corpus, folders: Mapping[str, Path], *, overrides: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """Tunes the cache behind the last of the runs that `train_stages` made, and gathers what there is to know.

    Returns:
        What goes into <recipe>.json. `stages` has "base", "finetuned" and "cached", as far as the recipe has them;
        "cached" is left out where the tokens are no words and nothing was published.
    """
    published = file.published
    stages = {stage: stage_record(folder) for stage, folder in folders.items()}
    if file.recipe.level == "word" or (published and published.figures("cached")["test"]):
        stages["cached"] = _tuned(list(folders.values())[-1], corpus, device)
    for stage, record in stages.items():
        record["published"] = published and published.figures(stage)
    return {
        **head(file, corpus, overrides),
        "finetune": file.finetune,
        "source": published and published.source,
        "stages": stages,
    }


def head(file: RecipeFile, corpus: Corpus, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of results says of the recipe and the text."""
    sizes = {split: len(getattr(corpus, split)) for split in ("train", "valid", "test")}
    return {
        "recipe": file.stem,
        "unit": file.recipe.unit,
        "overrides": dict(overrides),
        "values": asdict(file.recipe),
        "text": {"name": corpus.name, "digest": corpus.digest, "vocabulary": len(corpus.vocabulary), "tokens": sizes},
    }


def publish(found: Mapping[str, Any], folder: Path, name: str, png: bytes | None) -> list[str]:
    """Writes <name>.json and, where matplotlib is there, <name>.png into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", found)
    if png is None:
        say(f"no picture: {MISSING}")
        return [str(folder / f"{name}.json")]
    write_file(folder / f"{name}.png", png)
    return [str(folder / f"{name}.json"), str(folder / f"{name}.png")]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Measured and published figures as a table: valid / test of each stage, titles first."""
    lines = [["", f"{found['unit']}, valid / test", "published"]]
    for stage, record in found["stages"].items():
        measured = {split: record[split][found["unit"]] for split in ("valid", "test")}
        lines.append([stage, _pair(measured), _pair(record["published"])])
    return lines


def _pair(figures: Mapping[str, float | None] | None) -> str:
    values = [] if figures is None else ["-" if value is None else f"{value:.4g}" for value in figures.values()]
    return " / ".join(values) if any(value != "-" for value in values) else "-"


def _tuned(folder: Path, corpus: Corpus, device: str) -> dict[str, Any]:
    began = time.perf_counter()
    found = cache_run(folder, run_model(folder, device), corpus, run_cache(folder), tune=True)
    scores = {split: found[split]["cached"] for split in ("valid", "test")}
    plain = {split: found[split]["plain"] for split in scores}  # a column at a time, unlike the stages before
    settings = {key: found[key] for key in ("theta", "lambda", "window")}
    machine = describe(device.partition(":")[0])
    return {**settings, **scores, "plain": plain, "wall_seconds": time.perf_counter() - began, "machine": machine}
