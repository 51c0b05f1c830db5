"""`fastlm ablate`: a recipe with each of its tricks off in turn, at equal budgets, beside the published differences.

The rows are those of the table of ablations in Merity, Keskar and Socher, arXiv 1708.02182, whose models were not
finetuned: LSTMs, trained by NT-ASGD on the words of the Penn Treebank and of WikiText-2. Other recipes have no
published differences, but for our small one of the same kind, and other texts (told by their vocabulary) none either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.data import Corpus
from fastlm.errors import FastlmError
from fastlm.training.keys import check_known
from fastlm.training.parallel import Ranks
from fastlm.training.recipe import Recipe, RecipeFile, finetune_recipe, override, read_recipe
from fastlm.training.reproduce import head
from fastlm.training.run import has_run, read_run
from fastlm.training.stages import fit_stage, stage_record

FULL, FINETUNING = "full", "finetuning"
_SPLITS = ("valid", "test")
# What to call a row, and what is different in it; nothing is, where a recipe does without the trick anyway.
_OFF: dict[str, tuple[str, Callable[[Recipe], dict[str, Any]]]] = {
    "nt-asgd": ("- NT-ASGD", lambda r: {"optimizer": "sgd" if r.optimizer == "nt-asgd" else r.optimizer}),
    "variable-bptt": ("- variable length BPTT", lambda r: {"variable_bptt": False}),
    "embedding-dropout": ("- embedding dropout", lambda r: {"embedding_dropout": 0.0}),
    "weight-decay": ("- weight decay", lambda r: {"weight_decay": 0.0}),
    "ar-tar": ("- AR/TAR", lambda r: {"ar": 0.0, "tar": 0.0}),
    "full-embedding": ("full-sized embedding", lambda r: {"embedding_size": r.hidden_size}),
    "weight-dropout": ("- weight dropout", lambda r: {"weight_dropout": 0.0}),
}
ROWS = tuple(_OFF)
_BESIDE = {"ptb-lstm-small": "ptb-lstm"}  # of whose table the differences are, where a recipe has none
_KIND = ("cell", "level", "optimizer")  # what the recipe must have in common with that of the table


def plan(recipe: Recipe, only: Sequence[str] | None = None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The rows of a recipe: what each of them changes, the full model first, and why others are left out.

    Args:
        only: names of `ROWS` to take; all, if not given.

    Raises:
        RecipeError: an unknown name.
    """
    check_known(only or (), ROWS, "row")
    changes: dict[str, dict[str, Any]] = {FULL: {}}
    left_out = {}
    for name in ROWS if only is None else [name for name in ROWS if name in only]:
        off = _OFF[name][1](recipe)
        different = {key: value for key, value in off.items() if value != getattr(recipe, key)}
        if different:
            changes[name] = different
        else:
            left_out[name] = " and ".join(f"{key} is {getattr(recipe, key)!r}" for key in off) + " in the recipe"
    return changes, left_out


def train_rows(
    file: RecipeFile,
    corpus: Corpus,
    out: Path,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    budget: Mapping[str, Any],
    finetune: bool = False,
    source: str,
    device: str,
    ranks: Ranks,
) -> dict[str, Path]:
    """Trains each row in a folder of its own in `out`, or goes on where that was stopped.

    Args:
        changes: as `plan` returns them. budget: the keys `epochs` and `max_seconds` of every row.
        finetune: finetune the full model too, with the budget once more.

    Returns:
        The folders by row.

    Raises:
        Interrupted: a signal came; the same call goes on.
        FastlmError: a row makes no model, or is there with another budget.
    """
    recipes = {row: override(file.recipe, {**budget, **changed}) for row, changed in changes.items()}
    folders = {row: out / row for row in recipes}
    if finetune:
        folders[FINETUNING] = out / FULL / "finetune"
        recipes[FINETUNING] = finetune_recipe(recipes[FULL], {**(file.finetune or {}), **budget})
    for row, recipe in recipes.items():
        recipe.model_config(len(corpus.vocabulary))  # one that makes no model is an error now, not after hours
        if has_run(folders[row]):
            before = read_run(folders[row]).recipe
            if any(getattr(before, key) != value for key, value in budget.items()):
                known = ", ".join(f"{key} {getattr(before, key):g}" for key in budget)
                raise FastlmError(f"{folders[row]} is there with another budget ({known}): give that, or another --out")
    for row, recipe in recipes.items():
        start = out / FULL if row == FINETUNING else None
        fit_stage(folders[row], recipe, corpus, start=start, source=source, device=device, ranks=ranks)
    return folders


def compare(
    file: RecipeFile,
    corpus: Corpus,
    folders: Mapping[str, Path],
    changes: Mapping[str, Mapping[str, Any]],
    left_out: Mapping[str, str],
    *,
    overrides: Mapping[str, Any],
    budget: Mapping[str, Any],
) -> dict[str, Any]:
    """What goes into <recipe>-ablation.json: each row's figures, and how far they are from those of the full model.

    `delta` and `published` of a row are differences in the unit of the file, of valid and of test; `published` is None
    where there is none.
    """
    model, table = _published(file, len(corpus.vocabulary))
    records = {row: stage_record(folder) for row, folder in folders.items()}
    rows = []
    for row, record in records.items():
        scores = {split: record[split][file.recipe.unit] for split in _SPLITS}
        delta = {split: scores[split] - records[FULL][split][file.recipe.unit] for split in _SPLITS}
        published = None
        if row in table:
            published = {split: table[row][i] - table[FULL][i] for i, split in enumerate(_SPLITS)}
        averaged = [epoch["epoch"] for epoch in record["curve"] if epoch["averaging"]]
        rows.append(
            {
                **{"row": row, "label": label(row), "changes": dict(changes.get(row, {})), **record},
                **{"averaged_from": averaged[0] if averaged else None, "delta": delta, "published": published},
            }
        )
    return {
        **head(file, corpus, overrides),
        "budget": dict(budget),
        "published_model": {"recipe": model, **dict(zip(_SPLITS, table[FULL], strict=True))} if table else None,
        "rows": rows,
        "left_out": dict(left_out),
    }


def label(row: str) -> str:
    """What to call a row in a table or a picture."""
    return {FULL: "full model", FINETUNING: "+ finetuning"}.get(row) or _OFF[row][0]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The rows of what `compare` returned as a table, titles first."""
    unit, lines = found["unit"], [["", f"valid {found['unit']}", "test", "delta", "published delta"]]
    for row in found["rows"]:
        figures = [f"{row[split][unit]:.4g}" for split in _SPLITS]
        deltas = [_pair(row[key]) if row["row"] != FULL else "" for key in ("delta", "published")]
        lines.append([row["label"], *figures, *deltas])
    return lines


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know: rows that are left out, what is not published, a row that is no news."""
    said = [f"left out: {label(row)}: {reason}" for row, reason in found["left_out"].items()]
    if found["published_model"] is None:
        said.append("no differences were published for a model of this kind on this text")
    full, names = found["rows"][0], {row["row"] for row in found["rows"]}
    if "nt-asgd" in names and full["averaged_from"] is None:
        said.append("the full model was never averaged within this budget, so that its NT-ASGD was plain SGD too")
    return said


def _pair(deltas: Mapping[str, float] | None) -> str:
    return "-" if deltas is None else " / ".join(f"{value:+.2f}" for value in deltas.values())


def _published(file: RecipeFile, words: int) -> tuple[str | None, dict[str, tuple[float, float]]]:
    """The recipe whose published ablations are those to compare with, and its table; a text has so many `words`."""
    theirs = read_recipe(_BESIDE.get(file.name, file.name))
    same = all(getattr(file.recipe, key) == getattr(theirs.recipe, key) for key in _KIND)
    if theirs.published is None or not theirs.published.ablation or not same or words != theirs.published.vocab_size:
        return None, {}
    return theirs.stem, theirs.published.ablation
