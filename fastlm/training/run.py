"""The run folder: what a training run needs to be gone on with, evaluated or sampled from later.

config.toml       the recipe, what its finetuning changes, and which text it was trained on
vocabulary.json   the words, so that a run can be sampled from without its text
metrics.jsonl     one JSON object per log interval and per epoch
checkpoints/last  all that goes on to the same numbers;  checkpoints/best: the weights validated best
.lock             held by the process that trains here (see `fastlm.training.lock`)
results.json      final figures, and what made them on which machine;  cache.json: those of the cache
loss.png, report.html: to look at
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastlm import __version__
from fastlm.data import Corpus, Vocabulary, load_corpus
from fastlm.errors import CheckpointError, DataError, FastlmError, RecipeError
from fastlm.models import LanguageModel
from fastlm.nn import NeuralCache
from fastlm.training.checkpoint import load_checkpoint, load_weights, write_file
from fastlm.training.forms import FORMS, check_form
from fastlm.training.metrics import finite
from fastlm.training.recipe import CHANGEABLE, Recipe, check_finetune, make_recipe, override, split_overrides

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class RunConfig:
    """What config.toml holds: the recipe, where the text came from, its digest and the size of its vocabulary.

    `finetune` has the keys that finetuning changes, None where the recipe says nothing of it.
    """

    recipe: Recipe
    source: str
    digest: str
    vocab_size: int
    finetune: dict[str, Any] | None = None


def has_run(run_dir: Path) -> bool:
    """Whether there is a run in the folder: one that was ended before its first checkpoint has no config.toml yet."""
    return (run_dir / "config.toml").exists()


def check_no_run(run_dir: Path) -> None:
    """Raises FastlmError when there is a run in the folder already."""
    if has_run(run_dir):
        raise FastlmError(f"{run_dir} holds a run already: go on with it by --resume, or give another folder")


def create_run(run_dir: Path, config: RunConfig, vocabulary: Vocabulary) -> None:
    """Makes the folder that of a run; config.toml comes last, so that what is cut short can be started again."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_file(run_dir / "vocabulary.json", json.dumps(vocabulary.to_dict(), ensure_ascii=False))
    write_config(run_dir, config)


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Writes config.toml."""
    tables = {
        "data": {"source": config.source, "digest": config.digest, "vocab_size": config.vocab_size},
        "recipe": asdict(config.recipe),
    }
    if config.finetune is not None:
        tables["finetune"] = config.finetune
    lines = [f"# Written by fastlm {__version__}."]
    for name, values in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    write_file(run_dir / "config.toml", "\n".join(lines) + "\n")


def read_run(run_dir: str | Path) -> RunConfig:
    """Reads config.toml.

    Raises:
        FastlmError: there is no run in the folder, or its config.toml cannot be read.
    """
    path = Path(run_dir) / "config.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        data, recipe, finetune = tables["data"], make_recipe(tables["recipe"]), tables.get("finetune")
        check_finetune(recipe, finetune)
        return RunConfig(recipe, data["source"], data["digest"], data["vocab_size"], finetune)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise FastlmError(f"no run in {run_dir}: {path} is missing") from e
    except (OSError, ValueError, KeyError, TypeError, RecipeError) as e:
        raise FastlmError(f"{path} cannot be read: {type(e).__name__}: {e}") from e


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The run with some keys set to other values; `finetune.KEY` is one of its finetuning.

    Raises:
        RecipeError: an unknown key, a value of the wrong type or out of range.
    """
    own, finetune = split_overrides(overrides, config.finetune)
    recipe = override(config.recipe, own)
    check_finetune(recipe, finetune)
    return replace(config, recipe=recipe, finetune=finetune)


def check_same_run(old: RunConfig, new: RunConfig) -> None:
    """Raises unless a run that was started as `old` may go on as `new`.

    Raises:
        RecipeError: a value differs whose change would make it another run. DataError: the text is another one.
    """
    for key, value in asdict(new.recipe).items():
        before = getattr(old.recipe, key)
        if value != before and key not in CHANGEABLE:
            raise RecipeError(f"{key} is {before!r} in this run and cannot become {value!r}: start another one")
    if old.digest != new.digest:
        sizes = f": its vocabulary has {new.vocab_size:,} entries instead of {old.vocab_size:,}"
        what = sizes if old.vocab_size != new.vocab_size else ""
        raise DataError(f"the text {new.source} is not, or no longer, the one that this run was started with{what}")


def identity(config: RunConfig) -> dict[str, Any]:
    """What tells a run from others, as its checkpoints keep it: the digest of its text and what no run may change."""
    fixed = {key: value for key, value in asdict(config.recipe).items() if key not in CHANGEABLE}
    return {"text": config.digest, **fixed}


def check_origin(path: Path, state: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError when a checkpoint says of its run what is not `wanted`; what it does not say is right."""
    found = state.get("run", {})
    for key, value in wanted.items():
        here = list(value) if isinstance(value, tuple) else value  # as JSON has it
        there = found.get(key, here)
        if there != here:
            raise CheckpointError(f"{path} is of another run: {key} is {there!s:.16} there, {here!s:.16} here")


def run_corpus(config: RunConfig, source: str | None = None) -> Corpus:
    """The text of a run, from where it was or from `source`.

    Raises:
        DataError: it cannot be read, or is not the text of this run.
    """
    source = source or config.source
    corpus = load_corpus(source, **config.recipe.corpus_settings())
    found = {"source": source, "digest": corpus.digest, "vocab_size": len(corpus.vocabulary)}
    check_same_run(config, replace(config, **found))
    return corpus


def run_vocabulary(run_dir: str | Path) -> Vocabulary:
    """The vocabulary of a run.

    Raises:
        FastlmError: it is missing, cannot be read or is not the one that the model was made for.
    """
    path, size = Path(run_dir) / "vocabulary.json", read_run(run_dir).vocab_size
    values = read_json(path)
    if values is None:
        raise FastlmError(f"{path} is missing")
    try:
        vocabulary = Vocabulary.from_dict(values)
    except ValueError as e:
        raise FastlmError(f"{path} cannot be read: {e}") from e
    if len(vocabulary) != size:
        raise FastlmError(f"{path} has {len(vocabulary)} words, the model of this run {size}: the file is damaged")
    return vocabulary


def run_model(run_dir: str | Path, device: str = "cpu") -> LanguageModel:
    """The model of a run with the weights that were validated best, in evaluation mode."""
    config, path = read_run(run_dir), Path(run_dir) / "checkpoints" / "best"
    model = LanguageModel(config.recipe.model_config(config.vocab_size)).to(device)
    weights, state = load_checkpoint(path, device)
    check_origin(path, state, identity(config))
    load_weights(model, weights, path)
    return model.eval()


def run_cache(
    run_dir: str | Path, theta: float | None = None, lambda_: float | None = None, window: int | None = None
) -> NeuralCache:
    """The cache of a run; what is not given comes from its cache.json, else from its recipe.

    Raises:
        FastlmError: a setting is out of range, or cache.json cannot be read.
    """
    recipe, tuned = read_run(run_dir).recipe, read_json(Path(run_dir) / "cache.json")
    known = tuned or {"theta": recipe.cache_theta, "lambda": recipe.cache_lambda, "window": recipe.cache_window}
    try:
        return NeuralCache(
            known["theta"] if theta is None else theta,
            known["lambda"] if lambda_ is None else lambda_,
            known["window"] if window is None else window,
            compat=recipe.compat or None,
        )
    except ValueError as e:
        raise FastlmError(f"the cache of {run_dir} ({'cache.json' if tuned else 'config.toml'}): {e}") from e


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of results.json, cache.json or vocabulary.json, None where there is none.

    Raises:
        FastlmError: it is there and cannot be read, or is not of its form.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        check_form(value, FORMS[path.name], "it")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise FastlmError(f"{path} cannot be read: {e}") from e


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes results.json or cache.json; null stands for inf and nan."""
    write_file(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
