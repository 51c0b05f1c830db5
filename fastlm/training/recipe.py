"""Recipes: every hyper-parameter of a training run, in one TOML file.

The packaged ones lie in `fastlm/recipes`. A file may also have the table [finetune], keys that are different when the
run is finetuned, and [published], the figures to reach. Reading is strict: an unknown table or key, a wrong type or a
value out of range is a `RecipeError` that names it, never a silent default.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from fastlm.errors import RecipeError
from fastlm.models import LanguageModelConfig
from fastlm.training.keys import check_fields, check_known
from fastlm.training.keys import key as _key
from fastlm.training.keys import probability as _probability
from fastlm.training.published import Published, make_published

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What may change when a run goes on: nothing that would change the numbers of the steps already planned.
CHANGEABLE = {
    *("epochs", "max_seconds", "log_interval", "save_interval", "test_batch_size", "cuda_graphs"),
    *("cache_theta", "cache_lambda", "cache_window"),
}
TABLES = ("finetune", "published")


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
    # First ids of the tails of an adaptive softmax; none: a plain one. Ids go by frequency, under compat by first use.
    cutoffs: tuple[int, ...] = _key((), least=1)
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
    cuda_graphs: bool = _key(False)  # launch forward and backward as one, on a GPU; without effect on a CPU
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
        check_fields(self)
        if self.when and self.optimizer in ("nt-asgd", "asgd"):
            raise RecipeError(f"'when' goes with optimizer sgd or adam, not with {self.optimizer}")
        if list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise RecipeError(f"cutoffs must increase, got {list(self.cutoffs)}")
        if self.max_vocabulary in (1, 2):
            raise RecipeError(f"max_vocabulary must be 0 or at least 3, got {self.max_vocabulary}")
        if (self.min_count, self.max_vocabulary) != (1, 0) and (self.compat or self.level == "byte"):
            raise RecipeError("min_count and max_vocabulary go neither with compat nor with the byte level")

    @property
    def unit(self) -> str:
        """In what its figures are given: "ppl", for characters and bytes "bpc"."""
        return "ppl" if self.level == "word" else "bpc"

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


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file holds: the `recipe`, the keys that its finetuning changes and the figures to reach.

    `finetune` is None where the file has no such table, `published` likewise.
    """

    name: str
    recipe: Recipe
    finetune: dict[str, Any] | None = None
    published: Published | None = None

    @property
    def stem(self) -> str:
        """The name without folder and suffix, where it is a path."""
        return Path(self.name).name.removesuffix(".toml")


def read_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> RecipeFile:
    """Reads a recipe file.

    Args:
        name_or_path: the name of a packaged recipe, or the path of a TOML file.
        overrides: keys to set on top of it; `finetune.KEY` is a key of the table [finetune].

    Raises:
        RecipeError: no such recipe, not TOML, an unknown table or key, a value of the wrong type or out of range.
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
        tables = {key: values.pop(key) for key in list(values) if isinstance(values[key], dict)}
        check_known(tables, TABLES, "table")
        own, finetune = split_overrides(overrides or {}, tables.get("finetune"))
        recipe = make_recipe({**values, **own})
        check_finetune(recipe, finetune)
        return RecipeFile(name, recipe, finetune, _published(tables.get("published")))
    except RecipeError as e:
        raise RecipeError(f"recipe {name}: {e}") from e


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The hyper-parameters of a recipe file; arguments and errors as for `read_recipe`."""
    return read_recipe(name_or_path, overrides).recipe


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from keys and values; what is not given has its default.

    Raises:
        RecipeError: an unknown key, a value of the wrong type or out of range.
    """
    check_known(values, [f.name for f in fields(Recipe)])
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
    return _averaged(recipe, overrides)


def split_overrides(
    overrides: Mapping[str, Any], finetune: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Parts keys such as `finetune.epochs` from the others and puts them into the table; None: there is no table."""
    own = {key: value for key, value in overrides.items() if not key.startswith("finetune.")}
    added = {key.removeprefix("finetune."): value for key, value in overrides.items() if key not in own}
    return own, None if finetune is None and not added else {**(finetune or {}), **added}


def check_finetune(recipe: Recipe, finetune: Mapping[str, Any] | None) -> None:
    """Raises RecipeError unless the keys of a table [finetune] go with the recipe."""
    try:
        _averaged(recipe, finetune or {})
    except RecipeError as e:
        raise RecipeError(f"[finetune]: {e}") from e


def _averaged(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    return override(recipe, {"optimizer": "asgd", "when": (), "max_seconds": 0.0, **overrides})


def _published(values: Mapping[str, Any] | None) -> Published | None:
    try:
        return None if values is None else make_published(values)
    except RecipeError as e:
        raise RecipeError(f"[published]: {e}") from e


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
