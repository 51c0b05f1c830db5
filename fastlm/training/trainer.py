"""The training loop: variable-length BPTT, all regularisers, NT-ASGD, checkpoints; killed, it goes on bit for bit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.data import BPTTLoader, Corpus, batchify
from fastlm.errors import CheckpointError, FastlmError
from fastlm.machine import describe
from fastlm.models import LanguageModel, map_state
from fastlm.optim import NTASGD, NonMonotone
from fastlm.training.board import Board
from fastlm.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastlm.training.evaluate import Evaluation, evaluate, figure
from fastlm.training.lock import lock_run
from fastlm.training.metrics import MetricsFile, Sums
from fastlm.training.parallel import Ranks
from fastlm.training.progress import Progress, duration, say
from fastlm.training.recipe import Recipe
from fastlm.training.run import (
    RunConfig,
    check_no_run,
    check_origin,
    check_same_run,
    create_run,
    identity,
    read_run,
    write_config,
    write_json,
)
from fastlm.training.signals import StopRequest
from fastlm.training.step import TrainStep, make_optimizer
from fastlm.training.throughput import find_ceiling

_COUNTERS = ("step", "validated_step", "epoch", "epoch_done", "stopped", "tokens", "seconds", "wall_seconds")


class Interrupted(Exception):
    """A signal came: the run has been saved and can be gone on with."""


class Trainer:
    """One training run in one folder.

    Seeds torch's generators with the seed of the recipe; everything random comes from them and from the loader.

    Args:
        run_dir: the folder of the run (see `fastlm.training.run`).
        recipe: its hyper-parameters.
        corpus: its text.
        source: where the text was read from, to find it again; the name of the corpus when not given.
        device: where to train.
        resume: go on with the run that is in the folder, instead of starting one there.
        start: the folder of a run whose best weights to start from and whose validation loss to better.
        finetune: keys that finetuning the run will change, written into its config.toml.
        ranks: the processes that train it together (see `fastlm.training.parallel`).

    Raises:
        FastlmError: there is a run in the folder already, or, with `resume`, none that could be gone on with; another
            process trains there.
        RecipeError: the ranks have different recipes or texts, or cannot share the batch evenly.
    """

    def __init__(
        self,
        run_dir: str | Path,
        recipe: Recipe,
        corpus: Corpus,
        *,
        source: str | None = None,
        device: str | torch.device = "cpu",
        resume: bool = False,
        start: str | Path | None = None,
        finetune: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ):
        self.run_dir, self.recipe, self.corpus = Path(run_dir), recipe, corpus
        self.device, self.ranks = torch.device(device), ranks or Ranks()
        self.ranks.check_same(recipe=recipe, text=corpus.digest, run=resume)  # one may not see the folder of the others
        self._columns = self.ranks.columns(recipe.batch_size)
        for split, columns in [("valid", recipe.eval_batch_size), ("test", recipe.test_batch_size)]:
            batchify(getattr(corpus, split), columns)  # too short a text is an error now, not after an epoch
        self.loader = BPTTLoader(
            corpus.train, recipe.batch_size, recipe.bptt, variable=recipe.variable_bptt, seed=recipe.seed
        )
        torch.manual_seed(recipe.seed)
        self.model = LanguageModel(recipe.model_config(len(corpus.vocabulary))).to(self.device)
        self.optimizer = make_optimizer(recipe, self.model)
        self._make_step = TrainStep(recipe, self.model, self.optimizer, self.ranks)
        self.stopper = NonMonotone(recipe.nonmono) if recipe.optimizer == "asgd" else None

        self.step = self.validated_step = self.epoch = self.tokens = 0
        self.seconds = 0.0  # of training, validation not counted
        self.wall_seconds, self._clock = 0.0, time.perf_counter()  # of all, but for what a killed process lost
        self.epoch_done = self.stopped = False
        self.starts: list[dict[str, Any]] = []  # where each part of the steps was made, and by what
        self.best: Evaluation | None = None
        self.hidden: Any = None
        self._interval, self._epoch = Sums(self.device), Sums(self.device)

        self._stop = StopRequest()
        self._metrics = MetricsFile(self.run_dir / "metrics.jsonl" if self.ranks.first else Path(os.devnull))
        self._checkpoints = self.run_dir / "checkpoints"
        config = RunConfig(recipe, source or corpus.name, corpus.digest, len(corpus.vocabulary), finetune)
        self._identity = identity(config)
        if resume:
            check_same_run(read_run(self.run_dir), config)
            self._take_folder()
            self._load()
            if self.ranks.first:
                write_config(self.run_dir, config)
        else:
            # By all ranks, so that all of them say why: rank 0 writes config.toml after they have met in `save`.
            check_no_run(self.run_dir)
            if start is not None:
                best = Path(start) / "checkpoints" / "best"
                weights, state = load_checkpoint(best)
                with _fitting(best):
                    check_origin(best, state, {**identity(read_run(start)), "text": corpus.digest})
                    valid = Evaluation(**state["valid"])
                load_weights(self.model, weights, best)
            self._take_folder()
            if start is not None:
                self._save_best(valid)
            self.save()
            if self.ranks.first:
                create_run(self.run_dir, config, corpus.vocabulary)

    def fit(self) -> Evaluation:
        """Trains until the epochs or the seconds are spent, then scores the test split with the best weights.

        Raises:
            Interrupted: a signal came; everything has been saved.
            FastlmError: the loss is not a number any more, or a checkpoint cannot be written.
        """
        if self._unfinished():
            where = describe(self.device.type)
            self.starts.append({"step": self.step, "ranks": self.ranks.size, **where})
        self._ceiling = find_ceiling(self.model, self.device, self._make_step.dtype, self.ranks)
        with (
            self._alone(),
            self._stop,
            closing(Board(self.run_dir / "tensorboard", self.step, self.ranks)) as self._board,
        ):
            try:
                while self._unfinished():
                    if not self.epoch_done and not self._out_of_time():
                        self._train_epoch()
                    self._validate()
            except Interrupted:
                self.save()
                raise
            # The last validation has saved, and the test puts other weights into the model: nothing is saved after it.
            return self._test()

    def save(self) -> None:
        """Writes checkpoints/last: with it the run goes on to the same numbers, bit for bit on the same machine."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        # Copied, so that a state that is the end of a long tensor does not bring all of it to the other ranks.
        hidden = self.hidden and map_state(lambda t: t.cpu().clone(), self.hidden)
        self._look_at_clock()
        state = {
            **{name: getattr(self, name) for name in _COUNTERS},
            "run": self._identity,
            "starts": self.starts,
            "best": self.best and asdict(self.best),
            "interval": self._interval.values(),
            "epoch_sums": self._epoch.values(),
            "metrics_bytes": self._metrics.size(),
            "stopper": self.stopper and self.stopper.log,
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "ranks": self.ranks.gather({"hidden": hidden, "rng": rng}),
        }
        if self.ranks.first:
            save_checkpoint(self._checkpoints / "last", self.model.state_dict(), state)
        self.ranks.gather(None)  # torchrun ends all ranks when one has left, which must not be before it is written
        self._saved_at = self.seconds

    def _take_folder(self) -> None:
        """Locks the folder until the end of `fit`; a refusal is that of all ranks, which would wait for the first."""
        refusal = None
        if self.ranks.first:
            try:
                self._lock = lock_run(self.run_dir)
            except FastlmError as e:
                refusal = str(e)
        refusal = self.ranks.gather(refusal)[0]
        if refusal:
            raise FastlmError(refusal)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._take_folder()  # once more, for a second `fit`
        try:
            yield
        finally:
            self._lock = None

    def _load(self) -> None:
        path = self._checkpoints / "last"
        weights, state = load_checkpoint(path)
        with _fitting(path):
            check_origin(path, state, self._identity)
        load_weights(self.model, weights, path)
        with _fitting(path):
            self._restore(state, path)

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        if len(state["ranks"]) != self.ranks.size:
            before = len(state["ranks"])
            raise CheckpointError(f"{path} is of {before} ranks and cannot go on with {self.ranks.size}")
        own = state["ranks"][self.ranks.rank]
        for name in _COUNTERS:
            if type(state[name]) is not type(getattr(self, name)):
                raise TypeError(f"{name} is {state[name]!r}")
            setattr(self, name, state[name])
        self.starts = state.get("starts", [])  # of runs from before they were kept
        self.best = state["best"] and Evaluation(**state["best"])
        self._interval = Sums(self.device, *state["interval"])
        self._epoch = Sums(self.device, *state["epoch_sums"])
        if self.stopper is not None:
            self.stopper.log = state["stopper"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        if own["hidden"] is not None:
            saved = iter([tensor.to(self.device) for layer in own["hidden"] for tensor in layer])
            self.hidden = map_state(lambda _: next(saved), self.model.init_state(self.recipe.batch_size))
        torch.set_rng_state(own["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in own["rng"]:
            torch.cuda.set_rng_state(own["rng"]["cuda"], self.device)
        # Lines written after the checkpoint belong to steps that will be made again.
        self._metrics.truncate(state["metrics_bytes"])
        self._saved_at = self.seconds

    def _train_epoch(self) -> None:
        self.model.train()
        total = self.loader.length * self.recipe.batch_size
        with Progress(f"epoch {self.epoch + 1}", total, self._epoch.tokens) as progress:
            before = time.perf_counter()
            for inputs, targets, lr_scale in self.loader:
                # The targets stay on the host: an adaptive softmax sorts them there.
                own = [ids[:, self._columns] for ids in (inputs, targets)]
                nll = self._train_step(own[0].to(self.device), own[1], lr_scale)
                now = time.perf_counter()
                stop, seconds = self.ranks.agree(bool(self._stop), now - before)
                self._count(nll, targets.numel(), seconds)
                before = now
                progress.advance(targets.numel())
                if self.step % self.recipe.log_interval == 0:
                    self._log_interval(progress)
                self._obey(stop)
                if self._out_of_time():
                    return
                if self.seconds - self._saved_at > self.recipe.save_interval:
                    self.save()
                    before = time.perf_counter()
        self.epoch_done = True

    def _train_step(self, inputs: Tensor, targets: Tensor, lr_scale: float) -> Tensor:
        nll, self.hidden = self._make_step(inputs, targets, self.hidden, self._lr(), lr_scale)
        return nll

    def _count(self, nll: Tensor, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self._interval.add(nll, tokens, seconds)
        self._epoch.add(nll, tokens, seconds)

    def _log_interval(self, progress: Progress) -> None:
        figures = self._figures(self._interval)
        self._write({"event": "train", **figures})
        if not math.isfinite(figures["loss"]):
            raise FastlmError(f"the training loss is {figures['loss']} at step {self.step}: try a lower lr")
        rate = figures["tokens_per_second"]
        left = self.recipe.epochs * progress.total - self.epoch * progress.total - self._epoch.tokens
        seconds = left / rate
        if self.recipe.max_seconds:
            seconds = min(seconds, self.recipe.max_seconds - self.seconds)
        progress.note(
            f"step {self.step} | loss {figures['loss']:.3f} | {figure(figures['loss'], self.recipe.unit, 1)} | "
            f"{rate:,.0f} tokens/s | ETA {duration(seconds)}"
        )
        self._interval = Sums(self.device)

    def _validate(self) -> None:
        averaging = isinstance(self.optimizer, NTASGD) and self.optimizer.averaging
        with self._average():
            valid = self._evaluate("validation", self.corpus.valid, self.recipe.eval_batch_size)
            if not math.isfinite(valid.nll):
                raise FastlmError(f"the validation loss is {valid.nll} at step {self.step}: try a lower lr")
            if self.best is None or valid.nll < self.best.nll:
                self._save_best(valid)
        figures = self._figures(self._epoch)
        scores = {f"valid_{k}": v for k, v in valid.to_dict().items()}
        self._look_at_clock()
        wall = {"wall_seconds": round(self.wall_seconds, 3)}
        self._write({"event": "epoch", **figures, **wall, **scores, "averaging": averaging})
        rate = figures["tokens_per_second"]
        speed = f"{rate:,.0f} tokens/s" + (f", {self._ceiling.words(rate)}" if self._ceiling else "")
        train_figure, valid_figure = (figure(nll, self.recipe.unit) for nll in (figures["loss"], valid.nll))
        say(
            f"epoch {self.epoch + 1} | step {self.step} | train {train_figure} | valid loss {valid.nll:.4f} "
            f"| valid {valid_figure} | {speed} | {duration(self.seconds)}"
        )
        self.validated_step = self.step
        if self.epoch_done:
            self._end_epoch(valid)
        self.save()

    def _end_epoch(self, valid: Evaluation) -> None:
        if isinstance(self.optimizer, NTASGD) and self.optimizer.observe(valid.nll):
            say("the validation loss has stopped improving: averaging from here on")
        if self.stopper is not None:
            self.stopped = self.stopper.observe(valid.nll)
        self.epoch += 1
        self.epoch_done = False
        self.hidden = None
        self._epoch = Sums(self.device)

    def _test(self) -> Evaluation:
        path = self._checkpoints / "best"
        weights, state = load_checkpoint(path)
        # The last weights are kept in their own checkpoint and are needed no more.
        load_weights(self.model, weights, path)
        test = self._evaluate("test", self.corpus.test, self.recipe.test_batch_size)
        self._look_at_clock()
        results = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": self.epoch,
            "steps": self.step,
            "seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "tokens_per_second": self.tokens / self.seconds,
            **(self._ceiling.to_dict(self.tokens / self.seconds) if self._ceiling else {}),
            "valid": Evaluation(**state["valid"]).to_dict(),
            "test": test.to_dict(),
            "starts": self.starts,
            "recipe": asdict(self.recipe),
        }
        if self.ranks.first:
            write_json(self.run_dir / "results.json", results)
        return test

    def _evaluate(self, label: str, ids: Tensor, columns: int) -> Evaluation:
        result = None
        if self.ranks.first:
            with Progress(label, len(ids)) as progress, suppress(Interrupted):

                def on_window(tokens: int) -> None:
                    progress.advance(tokens)
                    self._obey(bool(self._stop))

                result = evaluate(self.model, ids, columns, self.recipe.bptt, self.recipe.compat or None, on_window)
        result = self.ranks.gather(result)[0]
        self._obey(result is None)
        return result

    def _figures(self, sums: Sums) -> dict[str, Any]:
        where = {"step": self.step, "epoch": self.epoch + 1, "lr": self._lr(), "seconds": round(self.seconds, 3)}
        return {**where, **sums.figures()}

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        self._board.write(record)

    def _look_at_clock(self) -> None:
        now = time.perf_counter()
        self.wall_seconds += now - self._clock
        self._clock = now

    def _save_best(self, valid: Evaluation) -> None:
        self.best = valid
        state = {"run": self._identity, "valid": asdict(valid), "step": self.step, "epoch": self.epoch + 1}
        if self.ranks.first:
            save_checkpoint(self._checkpoints / "best", self.model.state_dict(), state)

    def _obey(self, stop: bool) -> None:
        if stop:
            raise Interrupted(f"stopped at step {self.step}, in epoch {self.epoch + 1}")

    def _average(self) -> AbstractContextManager:
        return self.optimizer.average() if isinstance(self.optimizer, NTASGD) else nullcontext()

    def _lr(self) -> float:
        return self.recipe.lr / 10 ** sum(self.epoch >= e for e in self.recipe.when)

    def _out_of_time(self) -> bool:
        return 0 < self.recipe.max_seconds <= self.seconds

    def _unfinished(self) -> bool:
        return self.validated_step != self.step or not self._finished()

    def _finished(self) -> bool:
        return self.epoch >= self.recipe.epochs or self.stopped or self._out_of_time()


@contextmanager
def _fitting(path: str | Path) -> Iterator[None]:
    """Errors inside mean that a whole checkpoint does not hold what is looked for in it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        what = " ".join(str(e).split())
        raise CheckpointError(f"{path} does not hold the state of such a run: {type(e).__name__}: {what}") from e
