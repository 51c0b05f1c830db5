"""Recipes: every hyper-parameter of a training run, in one TOML file.

The packaged ones lie in `fastlm/recipes`. Reading is strict: an unknown key, a wrong type or a value out of
range is a `RecipeError` that names the key, never a silent default.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from fastlm.errors import RecipeError
from fastlm.models import LanguageModelConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What may change when a run goes on: nothing that would change the numbers of the steps already planned.
CHANGEABLE = {
    *("epochs", "max_seconds", "log_interval", "save_interval", "test_batch_size"),
    *("cache_theta", "cache_lambda", "cache_window"),
}
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple[int, ...]": tuple}
_TYPE_NAMES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}


def _key(default: Any, **limits: Any) -> Any:
    """A recipe key; `limits` are `least`, `above`, `below`, `most` and `choices`."""
    return field(default=default, metadata=limits)


def _probability(default: float) -> Any:
    return _key(default, least=0, below=1)


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of one training run; defaults are those of awd-lstm-lm's command line.

    `compat = "awd-lstm-lm"` follows that program where fastlm does otherwise: the vocabulary comes from all
    three files, averaged steps use the rate of the window before, and losses are divided by the length of the
    text instead of by the number of predicted tokens.
    """

    # Data. What the training text has less often than `min_count`, or beyond the `max_vocabulary` most frequent (0: no
    # limit; <eos> and <unk> are counted), is read as <unk>. For the words of "stdlib" a min_count of 1 means 2.
    level: str = _key("word", choices=("word", "char", "byte"))
    compat: str = _key("", choices=("", "awd-lstm-lm"))
    min_count: int = _key(1, least=1)
    max_vocabulary: int = _key(0, least=0)
    # Model: see LanguageModelConfig. `window` is that of the first QRNN layer.
    cell: str = _key("lstm", choices=("lstm", "qrnn", "gru"))
    embedding_size: int = _key(400, least=1)
    hidden_size: int = _key(1150, least=1)
    num_layers: int = _key(3, least=1)
    tie_weights: bool = _key(True)
    window: int = _key(2, least=1)
    zoneout: float = _probability(0.0)
    embedding_dropout: float = _probability(0.1)
    input_dropout: float = _probability(0.65)
    hidden_dropout: float = _probability(0.3)
    output_dropout: float = _probability(0.4)
    weight_dropout: float = _probability(0.5)
    ar: float = _key(2.0, least=0)
    tar: float = _key(1.0, least=0)
    # Optimisation. `when`: epochs after which lr is divided by 10 (sgd and adam). `clip` 0: no clipping.
    optimizer: str = _key("nt-asgd", choices=("nt-asgd", "asgd", "sgd", "adam"))
    lr: float = _key(30.0, above=0)
    when: tuple[int, ...] = _key((), least=1)
    nonmono: int = _key(5, least=0)
    weight_decay: float = _key(1.2e-6, least=0)
    clip: float = _key(0.25, least=0)
    batch_size: int = _key(80, least=1)
    # bfloat16: the products of training in 16 bits, by autocast; weights, optimiser, states and evaluation in float32.
    precision: str = _key("float32", choices=("float32", "bfloat16"))
    accumulate: int = _key(1, least=1)  # pieces of the batch whose gradients are computed one after the other
    bptt: int = _key(70, least=1)
    variable_bptt: bool = _key(True)
    epochs: int = _key(500, least=1)
    max_seconds: float = _key(0.0, least=0)  # of training, validation not counted; 0: no limit
    seed: int = _key(1111, least=0, below=2**63)
    # Evaluation: the published figures were made with 10 and 1.
    eval_batch_size: int = _key(10, least=1)
    test_batch_size: int = _key(1, least=1)
    # The cache that `fastlm cache` takes when it is told nothing else.
    cache_theta: float = _key(1.0, least=0)
    cache_lambda: float = _key(0.1, least=0, most=1)
    cache_window: int = _key(500, least=1)
    # Housekeeping.
    log_interval: int = _key(200, least=1)  # steps
    save_interval: float = _key(600.0, above=0)  # seconds between checkpoints inside an epoch

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _check(f.name, f.type, f.metadata, getattr(self, f.name)))
        if self.when and self.optimizer in ("nt-asgd", "asgd"):
            raise RecipeError(f"'when' goes with optimizer sgd or adam, not with {self.optimizer}")
        if self.max_vocabulary in (1, 2):
            raise RecipeError(f"max_vocabulary must be 0 or at least 3, got {self.max_vocabulary}")
        if (self.min_count, self.max_vocabulary) != (1, 0) and (self.compat or self.level == "byte"):
            raise RecipeError("min_count and max_vocabulary go neither with compat nor with the byte level")

    def corpus_settings(self) -> dict[str, Any]:
        """The keyword arguments of `load_corpus` for the text of this recipe."""
        # The default count is left to load_corpus, which has one of its own for "stdlib".
        return {
            "level": self.level,
            "compat": self.compat or None,
            "min_count": None if self.min_count == 1 else self.min_count,
            "max_size": self.max_vocabulary or None,
        }

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        """The model of this recipe over a vocabulary of `vocab_size`."""
        names = [f.name for f in fields(LanguageModelConfig) if f.name != "vocab_size"]
        try:
            return LanguageModelConfig(vocab_size=vocab_size, **{n: getattr(self, n) for n in names})
        except ValueError as e:
            raise RecipeError(f"this recipe makes no model: {e}") from e


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = resources.files("fastlm.recipes")
    return sorted(f.name[: -len(".toml")] for f in folder.iterdir() if f.name.endswith(".toml"))


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        name_or_path: the name of a packaged recipe, or the path of a TOML file.
        overrides: keys to set on top of it.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key, a value of the wrong type or out of range.
    """
    name = str(name_or_path)
    try:
        if name in recipe_names():
            text = resources.files("fastlm.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
        elif name.endswith(".toml") or Path(name).is_file():
            text = Path(name).read_text(encoding="utf-8")
        else:
            known = ", ".join(recipe_names())
            raise RecipeError(f"no recipe {name!r}: give the path of a .toml file or one of {known}")
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise RecipeError(f"recipe {name} cannot be read: {e}") from e
    try:
        return make_recipe({**values, **(overrides or {})})
    except RecipeError as e:
        raise RecipeError(f"recipe {name}: {e}") from e


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from keys and values; what is not given has its default.

    Raises:
        RecipeError: an unknown key, a value of the wrong type or out of range.
    """
    known = [f.name for f in fields(Recipe)]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; the nearest valid one is {nearest[0]!r}" if nearest else ""
            raise RecipeError(f"unknown key {key!r}{hint}")
    return Recipe(**values)


def override(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some keys set to other values; RecipeError as `make_recipe`."""
    return make_recipe({**asdict(recipe), **values})


def finetune_recipe(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe that goes on from the best weights: averaging from the first step, until validation gets worse.

    Raises:
        RecipeError: the model was trained by Adam, whose rate says nothing about that of SGD, and none is given.
    """
    if recipe.optimizer == "adam" and "lr" not in overrides:
        raise RecipeError("finetuning is averaged SGD and this run was made by adam: set a rate, as in --set lr=5")
    return override(recipe, {"optimizer": "asgd", "when": (), "max_seconds": 0.0, **overrides})


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `key=value`; the value is read as TOML, and as a plain string where it is not TOML.

    Raises:
        RecipeError: there is no `=` or no key.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"cannot set {text!r}: write key=value")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return key.strip(), parsed


def _check(name: str, type_name: str, limits: Mapping[str, Any], value: Any) -> Any:
    expected = _TYPES[type_name]
    if expected is tuple:
        if not isinstance(value, list | tuple) or any(type(v) is not int for v in value):
            raise RecipeError(f"{name} must be a list of integers, got {value!r}")
        for v in value:
            _check_limits(name, limits, v)
        return tuple(value)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise RecipeError(f"{name} must be {_TYPE_NAMES[type_name]}, got {value!r}")
    if expected is float and not math.isfinite(value):
        raise RecipeError(f"{name} must be finite, got {value!r}")
    _check_limits(name, limits, value)
    return value


def _check_limits(name: str, limits: Mapping[str, Any], value: Any) -> None:
    if "choices" in limits and value not in limits["choices"]:
        choices = ", ".join(repr(c) for c in limits["choices"])
        raise RecipeError(f"{name} must be one of {choices}, got {value!r}")
    for rule, holds, words in [
        ("least", lambda v, x: v >= x, "at least"),
        ("above", lambda v, x: v > x, "greater than"),
        ("most", lambda v, x: v <= x, "at most"),
        ("below", lambda v, x: v < x, "less than"),
    ]:
        if rule in limits and not holds(value, limits[rule]):
            raise RecipeError(f"{name} must be {words} {limits[rule]}, got {value!r}")
