"""Trains an LSTM or QRNN by the loop of awd-lstm-lm in plain PyTorch: what a run of fastlm must agree with.

    python benchmarks/train_plain.py --data ptb --recipe ptb-lstm-small --out plain.json
    python benchmarks/train_plain.py --draw plain.json benchmarks/results/reproduction/ptb-lstm-small.json

The loop follows salesforce/awd-lstm-lm's main.py at 1d466ec line by line: window lengths of NumPy's generator, the
learning rate of a window in proportion to its length, SGD until the validation loss is worse than the best of all but
the last `nonmono` (of all, if that is 0, where the original fails), then `torch.optim.ASGD(t0=0, lambd=0)` whose
averages are validated. The model is `awd_plain.py`.
Text, vocabulary and hyper-parameters are those of the recipe, random numbers are PyTorch's and NumPy's own; so the
curves of both can only agree as two seeds do. Nothing of fastlm but the reading of recipe and text takes part.
"""

import argparse
import json
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from awd_plain import PlainAWD
from plots import COLOURS, figure_of, png_of
from torch import Tensor

from fastlm.data import batchify, load_corpus
from fastlm.machine import describe
from fastlm.training import load_recipe
from fastlm.training.recipe import parse_override


def check(recipe) -> None:
    """Raises ValueError for a recipe that the loop, or its model, does not know."""
    wanted = {
        "cell": ("lstm", "qrnn"),
        "optimizer": ("nt-asgd", "sgd", "adam"),
        **{"tie_weights": (True,), "zoneout": (0.0,), "cutoffs": ((),), "compat": ("",)},
        **{"precision": ("float32",), "accumulate": (1,)},
    }
    for key, values in wanted.items():
        if getattr(recipe, key) not in values:
            raise ValueError(f"the plain loop takes {key} {' or '.join(map(str, values))}, got {getattr(recipe, key)}")


def train(recipe, corpus, on_epoch, model=None, checkpoint=None) -> dict[str, float]:
    """Trains for the epochs of the recipe, or its seconds; returns the validation and test loss of the best weights.

    Args:
        on_epoch: called with the figures of every epoch. model: to start from. checkpoint: a file that keeps what the
            next epoch needs; with one that is there already, it goes on, with `on_epoch` of the epochs before first.

    Raises:
        ValueError: the loop does not know the recipe, or the checkpoint is of another recipe or text.
    """
    check(recipe)
    identity = {**asdict(replace(recipe, epochs=1, max_seconds=0.0)), "text": corpus.digest}
    identity = json.dumps(identity, sort_keys=True)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    model = model or PlainAWD(recipe.model_config(len(corpus.vocabulary)))
    data = batchify(corpus.train, recipe.batch_size)
    optimizer = _optimizer(model, recipe, averaging=False)
    best, kept, log, seconds, rows = math.inf, None, [], 0.0, []
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        if saved["identity"] != identity:
            raise ValueError(f"{checkpoint} is of another recipe or text: delete it, or give another --out")
        best, kept, log, seconds, rows = saved["progress"]
        model.load_state_dict(saved["weights"])
        optimizer = _optimizer(model, recipe, averaging="lambd" in saved["optimizer"]["param_groups"][0])
        optimizer.load_state_dict(saved["optimizer"])
        words, *position = saved["numpy"]
        np.random.set_state(("MT19937", words.numpy(), *position))
        torch.set_rng_state(saved["torch"])
    for row in rows:
        on_epoch(row)
    for epoch in range(len(rows) + 1, recipe.epochs + 1):
        began = time.perf_counter()
        train_loss = _epoch(model, data, optimizer, recipe)
        seconds += time.perf_counter() - began
        averaging = isinstance(optimizer, torch.optim.ASGD)
        with _averages(optimizer) if averaging else nullcontext():
            valid = evaluate(model, corpus.valid, recipe.eval_batch_size, recipe.bptt)
            if valid < best:
                best, kept = valid, {name: value.clone() for name, value in model.state_dict().items()}
        rows.append({"epoch": epoch, "train_nll": train_loss, "valid_nll": valid, "averaging": averaging})
        if recipe.optimizer == "nt-asgd" and not averaging:
            if len(log) > recipe.nonmono and valid > min(log[: len(log) - recipe.nonmono]):
                optimizer = _optimizer(model, recipe, averaging=True)
            log.append(valid)
        if epoch in recipe.when:
            optimizer.param_groups[0]["lr"] /= 10.0
        if checkpoint is not None:
            _, words, *position = np.random.get_state()
            saved = {"weights": model.state_dict(), "optimizer": optimizer.state_dict(), "identity": identity}
            saved |= {"numpy": [torch.from_numpy(words), *position], "torch": torch.get_rng_state()}
            new = checkpoint.with_suffix(".new")
            torch.save({**saved, "progress": [best, kept, log, seconds, rows]}, new)
            new.replace(checkpoint)
        on_epoch(rows[-1])
        if 0 < recipe.max_seconds <= seconds:
            break
    model.load_state_dict(kept)
    return {
        "valid_nll": best,
        "test_nll": evaluate(model, corpus.test, recipe.test_batch_size, recipe.bptt),
        "seconds": seconds,
    }


def evaluate(model: PlainAWD, ids: Tensor, columns: int, bptt: int) -> float:
    """Mean loss in nats over the predicted tokens."""
    data, total = batchify(ids, columns), 0.0
    model.eval()
    state = model.start(columns)
    with torch.no_grad():
        for i in range(0, len(data) - 1, bptt):
            length = min(bptt, len(data) - 1 - i)
            _, nll, state = model.loss(data[i : i + length], data[i + 1 : i + 1 + length], state)
            total += length * nll.item()
    model.train()
    return total / (len(data) - 1)


def _epoch(model, data, optimizer, recipe) -> float:
    state, total, i = model.start(recipe.batch_size), 0.0, 0
    while i < len(data) - 2:
        base = recipe.bptt if np.random.random() < 0.95 else recipe.bptt / 2
        drawn = max(5, int(np.random.normal(base, 5))) if recipe.variable_bptt else recipe.bptt
        rate = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = rate * drawn / recipe.bptt
        length = min(drawn, len(data) - 1 - i)
        optimizer.zero_grad()
        loss, nll, state = model.loss(data[i : i + length], data[i + 1 : i + 1 + length], state)
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = rate
        total += length * nll.item()
        i += length
    return total / i


def _optimizer(model, recipe, averaging: bool):
    settings = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    if averaging:
        return torch.optim.ASGD(model.parameters(), **settings, t0=0, lambd=0.0)
    return (torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.SGD)(model.parameters(), **settings)


@contextmanager
def _averages(optimizer):
    """The averages in the place of the parameters for the length of the block."""
    params = optimizer.param_groups[0]["params"]
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, [optimizer.state[p]["ax"] for p in params])
        yield
        torch._foreach_copy_(params, kept)


def draw(plain: dict, reproduction: dict) -> bytes:
    """Both programs' validation perplexity by epoch, as a PNG; `reproduction` is a file of `fastlm reproduce`."""
    figure = figure_of(8, 4.5)
    axes = figure.add_subplot()
    ours = [(row["epoch"], row["valid_ppl"], row["averaging"]) for row in reproduction["stages"]["base"]["curve"]]
    theirs = [(row["epoch"], math.exp(row["valid_nll"]), row["averaging"]) for row in plain["epochs"]]
    curves = ("fastlm", ours), ("awd-lstm-lm's loop on plain nn.LSTM", theirs)
    for (name, rows), colour in zip(curves, COLOURS, strict=False):
        epochs, values, averaging = zip(*rows, strict=True)
        axes.plot(epochs, values, "-", color=colour, label=f"{name}: {min(values):.1f} by epoch {epochs[-1]}")
        for switched, shape in ((False, "o"), (True, "s")):
            points = [(e, v) for e, v, a in rows if a is switched]
            if points:
                axes.plot(*zip(*points, strict=True), shape, color=colour, markersize=4)
    axes.set(xlabel="epoch (squares: averaged weights)", ylabel="validation perplexity", yscale="log")
    axes.set_title(f"{reproduction['recipe']}: fused and plain training", fontsize=10)
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    return png_of(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a recipe by the loop of awd-lstm-lm in plain PyTorch.")
    parser.add_argument("--data")
    parser.add_argument("--recipe")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("PLAIN.json", "REPRODUCTION.json"))
    args = parser.parse_args()
    if args.draw:
        args.draw[0].with_suffix(".png").write_bytes(draw(*(json.loads(path.read_text()) for path in args.draw)))
        return
    if not (args.data and args.recipe and args.out):
        parser.error("give --data, --recipe and --out, or --draw")
    recipe = load_recipe(args.recipe, dict(parse_override(text) for text in args.set))
    corpus = load_corpus(args.data, **recipe.corpus_settings())
    found = {"recipe": args.recipe, "set": args.set, **describe("cpu"), "epochs": []}
    checkpoint = args.out.with_suffix(".pt")  # a run that was stopped goes on from its last epoch

    def on_epoch(row):
        found["epochs"].append(row)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"epoch {row['epoch']} valid ppl {math.exp(row['valid_nll']):.2f}", flush=True)

    try:
        found.update(train(recipe, corpus, on_epoch, checkpoint=checkpoint))
    except ValueError as e:
        parser.error(str(e))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
