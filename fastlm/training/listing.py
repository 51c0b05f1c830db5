"""`fastlm recipes`: the packaged recipes, and what to expect of them."""

from __future__ import annotations

from typing import Any

from fastlm.training.progress import aligned
from fastlm.training.published import STAGES
from fastlm.training.recipe import RecipeFile, read_recipe, recipe_names

OURS = "ours"  # the source of a recipe that nobody has published
_COLUMNS = ("name", "model", "text", "parameters", "unit", *STAGES, "source")


def list_recipes() -> list[dict[str, Any]]:
    """A row for each packaged recipe: its name, the model, and what was published of it.

    Returns:
        `name`, `model` and `finetune` (the keys that finetuning changes, None without that stage) of all; `data`,
        `vocab_size`, `parameters`, `unit` and, for each stage, the figures of "valid" and "test" of those that were
        published, else None; `source`, which is "ours" for the others.
    """
    return [_row(read_recipe(name)) for name in recipe_names()]


def _row(file: RecipeFile) -> dict[str, Any]:
    recipe, published = file.recipe, file.published
    sizes = f"{recipe.num_layers} x {recipe.hidden_size}, {recipe.embedding_size}"
    row = {"name": file.name, "model": f"{recipe.cell.upper()} {sizes}", "level": recipe.level}
    row |= {key: published and getattr(published, key) for key in ("data", "vocab_size", "parameters", "unit")}
    row |= {stage: published and published.figures(stage) for stage in STAGES}
    return row | {"finetune": file.finetune, "source": published.source if published else OURS}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: valid / test of each stage, a dash for what was not published."""
    lines = [list(_COLUMNS)]
    for row in rows:
        parameters = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else "-"
        figures = [_pair(row[stage]) for stage in STAGES]
        text = row["data"] or f"{row['level']}s"
        lines.append([row["name"], row["model"], text, parameters, row["unit"] or "-", *figures, row["source"]])
    return aligned(lines)


def _pair(figures: dict[str, float | None] | None) -> str:
    if not figures or figures["test"] is None:
        return "-"
    return " / ".join("-" if value is None else f"{value:g}" for value in figures.values())
