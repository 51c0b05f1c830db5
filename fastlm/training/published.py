"""What was published for a recipe: the table [published] of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastlm.errors import RecipeError
from fastlm.training.keys import check_fields, check_known, key

STAGES = ("base", "finetuned", "cached")


@dataclass(frozen=True)
class Published:
    """Published figures in `unit`, perplexity or bits per character; 0 stands for one that was not published.

    `vocab_size` is that of the text for which the model has the published number of `parameters`. `ablation` has the
    figures (valid, test) of the model with one trick less, by the row names of `fastlm ablate`; "full" is the model
    that they are to be compared with.
    """

    data: str = key("")
    unit: str = key("ppl", choices=("ppl", "bpc"))
    vocab_size: int = key(0, least=1)
    parameters: int = key(0, least=1)
    source: str = key("")
    base_valid: float = key(0.0, least=0)
    base_test: float = key(0.0, least=0)
    finetuned_valid: float = key(0.0, least=0)
    finetuned_test: float = key(0.0, least=0)
    cached_valid: float = key(0.0, least=0)
    cached_test: float = key(0.0, least=0)
    ablation: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.ablation, Mapping):
            raise RecipeError(f"ablation must be a table, got {self.ablation!r}")
        for row, pair in self.ablation.items():
            numbers = isinstance(pair, list | tuple) and all(type(v) in (int, float) and v > 0 for v in pair)
            if not numbers or len(pair) != 2:
                raise RecipeError(f"ablation.{row} must be the figures of valid and test, got {pair!r}")
        if self.ablation and "full" not in self.ablation:
            raise RecipeError("ablation must have the figures of the full model, the row 'full'")
        object.__setattr__(self, "ablation", {row: tuple(map(float, pair)) for row, pair in self.ablation.items()})

    def figures(self, stage: str) -> dict[str, float | None]:
        """Valid and test of "base", "finetuned" or "cached"; None for what was not published."""
        return {split: getattr(self, f"{stage}_{split}") or None for split in ("valid", "test")}


def make_published(values: Mapping[str, Any]) -> Published:
    """The figures from keys and values.

    Raises:
        RecipeError: an unknown key, a missing one, a value of the wrong type or out of range.
    """
    check_known(values, [f.name for f in fields(Published)])
    for name in ("vocab_size", "parameters"):
        if name not in values:
            raise RecipeError(f"{name} is missing")
    return Published(**values)
