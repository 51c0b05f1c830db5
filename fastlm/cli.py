"""The command `fastlm`: recipes, train, finetune, reproduce, ablate, eval, cache, generate, demo, bench, info.

What a command prints goes to stdout and its progress to stderr. With `--json` the last line of stdout is one JSON
object, in which a figure that is not finite is null. A problem with what the user gave is one line on stderr and exit
status 2; Ctrl-C is status 130, a reader of the output that has gone 141.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fastlm import __version__
from fastlm.errors import FastlmError, run_for_reader

# The largest that the code behind takes: counts are 32 bits wide in places, torch's generators take 64 bits, and the
# products of theta stay within float32.
COUNT, SEED, THETA = 2**31 - 1, 2**64 - 1, math.nextafter(1e30, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_for_reader(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["info"]:
        from fastlm import info

        return info.main(arguments[1:])
    args = _parser().parse_args(arguments)
    try:
        # Imports torch, which is slow, and not there in time for --help.
        if args.command == "bench":
            from fastlm import bench as commands
        else:
            from fastlm.training import commands

        status, result = getattr(commands, args.function)(args)
    except KeyboardInterrupt:
        print("fastlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (FastlmError, OSError) as e:
        print(f"fastlm: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    if args.json and result is not None:
        print(json.dumps(_finite(result), allow_nan=False))
    return status


def _finite(value: Any) -> Any:
    """The value with None, which JSON has a word for, where a number is infinite or not one."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastlm", description="Recurrent language models at the speed of the hardware."
    )
    parser.add_argument("--version", action="version", version=f"fastlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str, function: str | None = None, device: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(function=function or name)
        sub.add_argument("--json", action="store_true", help="print one JSON object, last on stdout")
        if device:
            where = "cpu, cuda, cuda:1; auto (default) takes CUDA where it is"
            sub.add_argument("--device", default="auto", help=where)
        return sub

    command("recipes", "list the packaged recipes with the published figures: valid / test of each stage", device=False)

    train = command("train", "train a model by a recipe")
    _add_recipe(train, required=False)
    train.add_argument("--out", required=True, metavar="RUN", help="folder of the run")
    train.add_argument("--resume", action="store_true", help="go on with the run in that folder, if there is one")
    train.add_argument(
        "--when", nargs="+", type=_whole(1), metavar="EPOCH", help="epochs after which the rate is divided by 10"
    )
    _add_set(train)

    finetune = command("finetune", "go on from the best weights of a run with averaged SGD, in RUN/finetune")
    _add_run(finetune)
    finetune.add_argument(
        "--resume", action="store_true", help="go on with the finetuning of that run, if there is one"
    )
    _add_set(finetune)

    reproduce = command("reproduce", "train, finetune and tune a recipe; write its figures beside the published ones")
    _add_recipe(reproduce)
    reproduce.add_argument("--out", metavar="RUN", help="folder of the run (default runs/RECIPE); it goes on with one")
    _add_results(reproduce)
    _add_set(reproduce)

    ablate = command("ablate", "train a recipe with each trick off in turn; compare with the published differences")
    _add_recipe(ablate)
    ablate.add_argument("--out", metavar="DIR", help="folder of the runs (default runs/RECIPE-ablation)")
    _add_results(ablate)
    budget = ablate.add_mutually_exclusive_group(required=True)
    budget.add_argument("--epochs", type=_whole(1), help="the budget of every row in epochs")
    budget.add_argument(
        "--seconds", type=_number(0, 1e9, above=True), help="or in seconds of training, within the epochs of the recipe"
    )
    ablate.add_argument("--only", nargs="+", metavar="ROW", help="only these rows, as nt-asgd or weight-dropout")
    ablate.add_argument("--finetune", action="store_true", help="finetune the full model too, by the budget once more")
    _add_set(ablate)

    evaluate = command("eval", "score a text with the best weights of a run", "evaluate")
    _add_run(evaluate)
    evaluate.add_argument("--split", choices=["train", "valid", "test"], default="test")
    evaluate.add_argument("--batch-size", type=_whole(1), help="columns; default: that of the recipe for the split")
    evaluate.add_argument("--bptt", type=_whole(1), help="tokens per forward pass; default: that of the recipe")

    cache = command("cache", "score a text with the neural cache behind the model")
    _add_run(cache)
    cache.add_argument("--split", choices=["valid", "test"], default="test")
    cache.add_argument("--tune", action="store_true", help="find theta, lambda and window on the validation split")
    _add_cache(cache)

    generate = command("generate", "continue a text")
    _add_run(generate)
    generate.add_argument("--prompt", default="", help="text to continue; default: the start of a line")
    generate.add_argument("--tokens", type=_whole(0), default=100, help="how many to sample (default 100)")
    generate.add_argument("--temperature", type=_number(0), default=1.0, help="0: always the most probable token")
    generate.add_argument("--top-k", type=_whole(0), default=0, help="sample among this many tokens; 0: all")
    generate.add_argument(
        "--top-p", type=_number(0, 1, above=True), default=1.0, help="sample among this share of probability"
    )
    generate.add_argument("--cache", action="store_true", help="mix in the neural cache")
    _add_cache(generate)
    generate.add_argument(
        "--seed", type=_whole(0, SEED), help="the same seed gives the same text; default: a fresh one"
    )

    demo = command("demo", "train two small models on the embedded corpus, tune the cache, print one table")
    demo.add_argument("--out", default="runs/demo", help="folder for both runs (default runs/demo)")

    bench = command("bench", "time every operator, a training step and the encoder beside their competitors")
    bench.add_argument("--op", nargs="+", metavar="NAME", help="only these: an operator, training or host")
    sizes = bench.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="the cases that have a target and their like, few rounds")
    sizes.add_argument("--tiny", action="store_true", help="shapes of no use but to see that everything runs")
    bench.add_argument("--seconds", type=_number(0, 1e6), help="stop in that time; the most telling cases come first")
    bench.add_argument("--compare", metavar="OLD.json", help="status 1 if anything is slower than in that run")
    bench.add_argument("--out", metavar="DIR", help="where the results go; default: benchmarks/results")

    commands.add_parser("info", help="say what is installed, what runs and what would improve it")
    return parser


def _add_recipe(parser: argparse.ArgumentParser, required: bool = True) -> None:
    what = 'folder with train.txt, valid.txt, test.txt; at the byte level also one file, as enwik8; or "stdlib"'
    parser.add_argument("--data", required=required, help=what)
    parser.add_argument("--recipe", required=required, help="name of a packaged recipe or path of a TOML file")


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", metavar="DIR", help="where the figures go (default: the folder given by --out)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--data", help="where its text is now, if it has moved")


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe; may be repeated"
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    where = "default: tuned before, else from the recipe"
    parser.add_argument("--theta", type=_number(0, THETA), help=f"flatness; {where}")
    parser.add_argument("--lambda", dest="lambda_", type=_number(0, 1), help=f"share of the cache; {where}")
    parser.add_argument("--window", type=_whole(1), help=f"how many words it looks back on; {where}")


def _whole(least: int, most: int = COUNT) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value

    return whole_number


def _number(least: float, most: float = sys.float_info.max, above: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {least}, at most {most}"
            )
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
