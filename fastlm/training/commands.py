"""What the commands of `fastlm` do: each takes parsed arguments, returns an exit status and a result for JSON."""

from __future__ import annotations

import secrets
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from fastlm.data import Vocabulary, load_corpus
from fastlm.errors import FastlmError
from fastlm.nn import NeuralCache
from fastlm.training import ablate as ablation
from fastlm.training import demo as demonstration
from fastlm.training.caching import cache_run
from fastlm.training.evaluate import UNITS, Evaluation
from fastlm.training.evaluate import evaluate as score
from fastlm.training.generate import generate as sample
from fastlm.training.listing import list_recipes, table
from fastlm.training.parallel import check_alone, join, restarted
from fastlm.training.plots import draw_ablation, draw_reproduction
from fastlm.training.progress import Progress, aligned, say
from fastlm.training.recipe import finetune_recipe, override, parse_override, read_recipe
from fastlm.training.report import write_report
from fastlm.training.reproduce import measure, publish, train_stages
from fastlm.training.reproduce import rows as reproduction_rows
from fastlm.training.run import (
    has_run,
    read_json,
    read_run,
    run_cache,
    run_corpus,
    run_model,
    run_vocabulary,
    with_overrides,
)
from fastlm.training.trainer import Interrupted, Trainer

Result = tuple[int, dict[str, Any] | None]  # None from the ranks that print nothing
INTERRUPTED = 130


def train(args: Namespace) -> Result:
    """Trains by a recipe, or goes on with a run."""
    _check_out(args)
    settings, resume = _settings(args), _goes_on(args, Path(args.out))
    if args.when is not None:
        settings["when"] = args.when
    if resume:
        config = read_run(args.out)
        file = read_recipe(args.recipe, settings) if args.recipe else with_overrides(config, settings)
        source = _source(args.data) or config.source
        corpus = run_corpus(config, source)
    elif args.data is not None and args.recipe:
        file, source = read_recipe(args.recipe, settings), _source(args.data)
        corpus = load_corpus(source, **file.recipe.corpus_settings())
    elif args.resume:
        raise FastlmError(f"no run in {args.out}: give --data and --recipe to start one")
    else:
        raise FastlmError("train needs --data and --recipe, or --resume to go on with a run")
    with join(_device(args)) as (ranks, device):
        options = {"source": source, "device": device, "resume": resume, "ranks": ranks}
        trainer = Trainer(args.out, file.recipe, corpus, finetune=file.finetune, **options)
        return _fit(trainer, f"fastlm train --out {shlex.quote(args.out)} --resume")


def recipes(args: Namespace) -> Result:
    """Lists the packaged recipes with the figures to reach."""
    rows = list_recipes()
    print(table(rows))
    return 0, {"recipes": rows}


def finetune(args: Namespace) -> Result:
    """Averaged SGD from the best weights of a run, as a run of its own in RUN/finetune."""
    run_dir = Path(args.run)
    folder, settings = run_dir / "finetune", _settings(args)
    config, resume = read_run(run_dir), _goes_on(args, folder)
    if resume:
        recipe = override(read_run(folder).recipe, settings)
    else:
        recipe = finetune_recipe(config.recipe, {**(config.finetune or {}), **settings})
    source = _source(args.data) or config.source
    corpus, start = run_corpus(config, source), None if resume else run_dir
    with join(_device(args)) as (ranks, device):
        options = {"source": source, "device": device, "resume": resume, "start": start, "ranks": ranks}
        return _fit(
            Trainer(folder, recipe, corpus, **options), f"fastlm finetune --run {shlex.quote(args.run)} --resume"
        )


def reproduce(args: Namespace) -> Result:
    """Trains a recipe through all its stages and writes the figures beside the published ones."""
    settings = _settings(args)
    file, source = read_recipe(args.recipe, settings), _source(args.data)
    run_dir = _run_dir(args, Path("runs") / file.stem)
    corpus = load_corpus(source, **file.recipe.corpus_settings())
    try:
        with join(_device(args)) as (ranks, device):
            folders = train_stages(file, corpus, run_dir, source=source, device=device, ranks=ranks)
    except Interrupted as e:
        return _stopped(e)
    if not ranks.first:
        return 0, None
    found = measure(file, corpus, folders, overrides=settings, device=device)
    print(aligned(reproduction_rows(found)))
    files = publish(found, Path(args.results or run_dir), file.stem, draw_reproduction(found))
    print("\n".join(files))
    return 0, {"run": str(run_dir), "files": files, **found}


def ablate(args: Namespace) -> Result:
    """Trains a recipe with each trick off in turn and compares with the published differences."""
    settings = _settings(args)
    file, source = read_recipe(args.recipe, settings), _source(args.data)
    out = _run_dir(args, Path("runs") / f"{file.stem}-ablation")
    changes, left_out = ablation.plan(file.recipe, args.only)
    if args.seconds is None:
        budget = {"epochs": args.epochs, "max_seconds": 0.0}
    else:
        budget = {"epochs": file.recipe.epochs, "max_seconds": args.seconds}
    corpus = load_corpus(source, **file.recipe.corpus_settings())
    try:
        with join(_device(args)) as (ranks, device):
            where = {"source": source, "device": device, "ranks": ranks}
            folders = ablation.train_rows(file, corpus, out, changes, budget=budget, finetune=args.finetune, **where)
    except Interrupted as e:
        return _stopped(e)
    if not ranks.first:
        return 0, None
    found = ablation.compare(file, corpus, folders, changes, left_out, overrides=settings, budget=budget)
    print(aligned(ablation.rows(found)))
    files = publish(found, Path(args.results or out), f"{file.stem}-ablation", draw_ablation(found))
    print("\n".join([*ablation.remarks(found), *files]))
    return 0, {"run": str(out), "files": files, **found}


def evaluate(args: Namespace) -> Result:
    """Scores a split with the best weights."""
    config = read_run(args.run)
    recipe, corpus = config.recipe, run_corpus(config, _source(args.data))
    model, ids = run_model(args.run, _device(args)), getattr(corpus, args.split)
    columns = args.batch_size or (recipe.test_batch_size if args.split == "test" else recipe.eval_batch_size)
    with Progress(args.split, len(ids)) as progress:
        result = score(model, ids, columns, args.bptt or recipe.bptt, recipe.compat or None, progress.advance)
    print(_line(args.split, result, recipe.unit))
    return 0, {"split": args.split, "batch_size": columns, **result.to_dict()}


def cache(args: Namespace) -> Result:
    """Scores a split with the cache behind the best weights."""
    check_alone("cache")
    if args.tune and args.lambda_ is not None:
        raise FastlmError("--tune finds lambda by itself; theta and window may be given with it")
    config = read_run(args.run)
    corpus, unit = run_corpus(config, _source(args.data)), config.recipe.unit
    settings, model = _cache(args), run_model(args.run, _device(args))
    grid = {"thetas": None if args.theta is None else [args.theta], "windows": args.window and [args.window]}
    result = cache_run(args.run, model, corpus, settings, [args.split], tune=args.tune, **grid)
    print(f"theta {result['theta']:.4g}, lambda {result['lambda']:.4g}, window {result['window']}")
    for split in ("valid", "test"):
        if split in result:
            digits = 2 if unit == "ppl" else 4
            plain, cached = (result[split][kind][unit] for kind in ("plain", "cached"))
            gain = f"{cached / plain - 1 if plain else 0:+.1%}"  # a text may cost no bits at all
            print(f"{split}: {UNITS[unit]} {plain:.{digits}f}, with the cache {cached:.{digits}f} ({gain})")
    return 0, {key: value for key, value in result.items() if key != "passage"}


def generate(args: Namespace) -> Result:
    """Continues a text with the best weights."""
    read_run(args.run)
    vocabulary = run_vocabulary(args.run)
    ids = _prompt(args.prompt, vocabulary)
    # 53 bits: JSON is also read by programs whose numbers are all doubles.
    seed = secrets.randbits(53) if args.seed is None else args.seed
    cache = _cache(args) if args.cache else None
    if cache is not None:
        # A longer window would only be room that stays empty.
        cache.window = min(cache.window, len(ids) + args.tokens)
    model = run_model(args.run, _device(args))
    sampled = sample(
        model,
        torch.tensor(ids),
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        cache=cache,
        banned=vocabulary.unk_id,
        seed=seed,
    )
    text = vocabulary.decode([*(ids if args.prompt else []), *sampled])
    print(text)
    return 0, {"prompt": args.prompt, "text": text, "seed": seed}


def demo(args: Namespace) -> Result:
    """Trains, tunes and tests two small models and checks what they reach."""
    check_alone("demo")
    _check_out(args)
    try:
        rows = demonstration.run_demo(args.out, _device(args))
    except Interrupted as e:
        return _stopped(e)
    print(demonstration.table(rows))
    print()
    found = demonstration.checks(rows)
    for holds, sentence in found:
        print(f"{'ok  ' if holds else 'FAIL'}  {sentence}")
    print(f"look at {args.out}/lstm/report.html and {args.out}/qrnn/report.html")
    passed = all(holds for holds, _ in found)
    return 0 if passed else 1, {"rows": rows, "passed": passed}


def _stopped(e: Interrupted) -> Result:
    say(f"{e}; go on with the same command")
    return INTERRUPTED, {"interrupted": True}


def _fit(trainer: Trainer, again: str) -> Result:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(f"{trainer.run_dir}: {parameters:,} parameters, {len(trainer.corpus.train):,} tokens, on {trainer.device}")
    try:
        test = trainer.fit()
    except Interrupted as e:
        say(f"{e}; go on with: {again}")
        return INTERRUPTED, {"run": str(trainer.run_dir), "interrupted": True} if trainer.ranks.first else None
    if not trainer.ranks.first:
        return 0, None
    write_report(trainer.run_dir)
    print(_line("valid", trainer.best, trainer.recipe.unit))
    print(_line("test", test, trainer.recipe.unit))
    return 0, {"run": str(trainer.run_dir), **read_json(trainer.run_dir / "results.json")}


def _line(split: str, result: Evaluation, unit: str) -> str:
    bits = "" if unit == "ppl" else f"{UNITS[unit]} {result.bpc:.4f}, "
    return f"{split}: {bits}perplexity {result.ppl:.2f}, loss {result.nll:.4f}, {result.tokens:,} tokens"


def _check_out(args: Namespace) -> None:
    if not args.out:
        raise FastlmError("--out must name a folder, got an empty name")


def _settings(args: Namespace) -> dict[str, Any]:
    return dict(parse_override(text) for text in args.set)


def _run_dir(args: Namespace, default: Path) -> Path:
    if args.out is not None:
        _check_out(args)
    return default if args.out is None else Path(args.out)


def _goes_on(args: Namespace, folder: Path) -> bool:
    """Whether to go on with the run in a folder: there is one, and --resume says so or torchrun has started anew."""
    return (args.resume or restarted()) and has_run(folder)


def _source(data: str | None) -> str | None:
    """What to write down as the source of a text: its full path, so that it is found from anywhere."""
    if data == "":
        raise FastlmError("--data must name a folder or a file, got an empty name")
    return data if data in (None, demonstration.SOURCE) else str(Path(data).resolve())


def _device(args: Namespace) -> str:
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=args.device)
        probe.item()  # a device that has no values, as meta, fails here
        return str(probe.device)
    except (RuntimeError, AssertionError) as e:
        raise FastlmError(f"--device {args.device}: {str(e).splitlines()[0]}") from e


def _cache(args: Namespace) -> NeuralCache:
    return run_cache(args.run, args.theta, args.lambda_, args.window)


def _prompt(text: str, vocabulary: Vocabulary) -> list[int]:
    ids = vocabulary.encode(text)
    if vocabulary.level != "byte":
        unknown = [w for w in (text.split() if vocabulary.level == "word" else text) if w not in vocabulary]
        unknown = [w for w in dict.fromkeys(unknown) if w != "\n"]
        if unknown:
            say(f"not in the vocabulary, read as <unk>: {' '.join(unknown)}")
    if ids:
        return ids
    if vocabulary.eos_id is None:
        raise FastlmError("this vocabulary has no line end to start from: give a --prompt")
    return [vocabulary.eos_id]
