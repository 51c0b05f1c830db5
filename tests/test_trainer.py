import json
import math
import os
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
from test_checkpoint import full_disk
from tiny_run import SMALL, write_text

from fastlm.data import load_corpus
from fastlm.errors import CheckpointError, DataError, FastlmError, RecipeError
from fastlm.training import trainer as module
from fastlm.training.board import Board
from fastlm.training.checkpoint import load_checkpoint, save_checkpoint
from fastlm.training.evaluate import evaluate
from fastlm.training.parallel import Ranks
from fastlm.training.recipe import finetune_recipe, make_recipe
from fastlm.training.run import read_run, run_model
from fastlm.training.trainer import Interrupted, Trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(write_text(tmp_path_factory.mktemp("text")), cache_dir=tmp_path_factory.mktemp("cache"))


def recipe(**changes):
    return make_recipe({**SMALL, **changes})


def metrics(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


def assert_same_run(a, b):
    """Every tensor of both checkpoints bit for bit, the rest but for the clock."""
    for name in ("last/model", "last/optimizer", "best/model"):
        files = [x / "checkpoints" / f"{name}.safetensors" for x in (a, b)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    states = [json.loads((x / "checkpoints" / "last" / "state.json").read_text())["state"] for x in (a, b)]
    for key in states[0].keys() - {"seconds", "wall_seconds", "interval", "epoch_sums", "metrics_bytes", "starts"}:
        assert states[0][key] == states[1][key], key
    assert metrics(a) == metrics(b)


class Signals(Trainer):
    """Gets a signal in the middle of a step."""

    def __init__(self, *args, at, number=signal.SIGINT, **kwargs):
        super().__init__(*args, **kwargs)
        self.at, self.number = at, number

    def _train_step(self, *args):
        if self.step + 1 == self.at:
            os.kill(os.getpid(), self.number)
        return super()._train_step(*args)


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({}, 4),  # SGD, in the middle of an epoch
        ({"switch": True}, 17),  # NT-ASGD after its switch
        ({"optimizer": "asgd", "nonmono": 5, "compat": "awd-lstm-lm"}, 13),
        ({"optimizer": "adam", "lr": 1e-2, "when": [1]}, 12),
        ({"optimizer": "sgd", "when": [1], "variable_bptt": False}, 5),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, corpus, changes, at, cell):
    switch = changes.get("switch", False)
    settings = recipe(cell=cell, **{k: v for k, v in changes.items() if k != "switch"})

    def prepared(trainer):
        if switch:  # no validation is better than this one: averaging starts with the second epoch
            trainer.optimizer.trigger.log = [0.0]
        return trainer

    straight = prepared(Trainer(tmp_path / "a", settings, corpus))
    expected = straight.fit()
    interrupted = prepared(Signals(tmp_path / "b", settings, corpus, at=at))
    with pytest.raises(Interrupted):
        interrupted.fit()
    if switch:
        assert 3 < interrupted.optimizer.averaged_steps < straight.optimizer.averaged_steps
    torch.manual_seed(99)
    resumed = Trainer(tmp_path / "b", settings, corpus, resume=True)
    assert resumed.step == at
    assert resumed.fit() == expected
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("level", "changes"),
    [
        ("char", {"cell": "qrnn", "window": 3, "bptt": 80, "epochs": 2}),
        ("word", {"cell": "gru", "bptt": 40, "optimizer": "adam", "lr": 1e-2, "when": [1]}),
        ("byte", {"bptt": 80, "epochs": 1}),
    ],
)
def test_every_step_may_be_one_that_is_resumed_at(tmp_path, corpus, level, changes):
    settings = recipe(level=level, **changes)
    if level != "word":
        corpus = load_corpus(write_text(tmp_path / "text"), level=level, cache_dir=tmp_path / "cache")
    straight = Trainer(tmp_path / "a", settings, corpus)
    expected, at = straight.fit(), 0
    while at < straight.step:
        interrupted = Signals(tmp_path / "b", settings, corpus, at=at + 1, resume=at > 0)
        with pytest.raises(Interrupted):
            interrupted.fit()
        at = interrupted.step
        torch.manual_seed(99)
    assert Trainer(tmp_path / "b", settings, corpus, resume=True).fit() == expected
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_full_disk_says_which_file(tmp_path, corpus, monkeypatch):
    # TensorBoard's own thread would raise beside the test: a board that writes nothing, as that of the second rank.
    monkeypatch.setattr(module, "Board", lambda folder, step, _: Board(folder, step, Ranks(1, 2)))
    trainer = Trainer(tmp_path / "a", recipe(), corpus)
    with full_disk(40), pytest.raises(OSError, match="metrics.jsonl"):
        trainer.fit()
    assert Trainer(tmp_path / "a", recipe(), corpus, resume=True).step == 0


def test_interrupted_twice_while_averaging(tmp_path, corpus):
    settings = recipe(optimizer="asgd", nonmono=5)
    expected = Trainer(tmp_path / "a", settings, corpus).fit()
    with pytest.raises(Interrupted):
        Signals(tmp_path / "b", settings, corpus, at=2).fit()
    with pytest.raises(Interrupted):
        Signals(tmp_path / "b", settings, corpus, at=11, resume=True, number=signal.SIGTERM).fit()
    assert Trainer(tmp_path / "b", settings, corpus, resume=True).fit() == expected
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_killed_between_checkpoints_makes_the_same_steps_again(tmp_path, corpus):
    expected = Trainer(tmp_path / "a", recipe(), corpus).fit()

    class Dies(Trainer):
        def _train_step(self, *args):
            if self.step == 14:
                raise MemoryError
            return super()._train_step(*args)

    with pytest.raises(MemoryError):
        Dies(tmp_path / "b", recipe(), corpus).fit()
    with open(tmp_path / "b" / "metrics.jsonl", "a") as f:
        f.write('{"event": "tr')
    assert Trainer(tmp_path / "b", recipe(), corpus, resume=True).fit() == expected
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_signal_during_validation_is_obeyed(tmp_path, corpus, monkeypatch):
    expected = Trainer(tmp_path / "a", recipe(), corpus).fit()
    trainer = Trainer(tmp_path / "b", recipe(), corpus)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    with monkeypatch.context() as m:
        m.setattr(module, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            trainer.fit()
    resumed = Trainer(tmp_path / "b", recipe(), corpus, resume=True)
    assert resumed.epoch_done and resumed.epoch == 0
    assert resumed.fit() == expected
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_signal_during_the_test_leaves_the_last_checkpoint_alone(tmp_path, corpus, monkeypatch):
    settings = recipe(optimizer="asgd", nonmono=5)
    Trainer(tmp_path / "a", settings, corpus).fit()
    Trainer(tmp_path / "a", recipe(optimizer="asgd", nonmono=5, epochs=5), corpus, resume=True).fit()
    trainer = Trainer(tmp_path / "b", settings, corpus)
    last, kept = tmp_path / "b" / "checkpoints" / "last", {}

    def interrupted(model, ids, *args):
        if ids is corpus.test:
            kept.update({f.name: f.read_bytes() for f in last.iterdir()})
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(model, ids, *args)

    with monkeypatch.context() as m:
        m.setattr(module, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            trainer.fit()
    assert kept == {f.name: f.read_bytes() for f in last.iterdir()}
    Trainer(tmp_path / "b", recipe(optimizer="asgd", nonmono=5, epochs=5), corpus, resume=True).fit()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_handlers_are_restored_and_threads_may_train(tmp_path, corpus):
    before = signal.getsignal(signal.SIGINT)
    Trainer(tmp_path / "a", recipe(epochs=1), corpus).fit()
    assert signal.getsignal(signal.SIGINT) is before
    results = []
    thread = threading.Thread(target=lambda: results.append(Trainer(tmp_path / "b", recipe(epochs=1), corpus).fit()))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_training_learns_and_the_best_weights_are_the_ones_tested(tmp_path, corpus):
    trainer = Trainer(tmp_path / "a", recipe(epochs=6, ar=0, tar=0, lr=2.0), corpus)
    test = trainer.fit()
    epochs = [r for r in metrics(tmp_path / "a") if r["event"] == "epoch"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    best = min(r["valid_nll"] for r in epochs)
    model = run_model(tmp_path / "a")
    assert evaluate(model, corpus.valid, 2, 10).nll == best
    assert evaluate(model, corpus.test, 1, 10) == test
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["valid"]["nll"] == best and results["test"]["nll"] == test.nll
    assert results["parameters"] == sum(p.numel() for p in model.parameters())


def test_metrics_have_what_a_plot_needs(tmp_path, corpus):
    Trainer(tmp_path / "a", recipe(epochs=2), corpus).fit()
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {r["event"] for r in records} == {"train", "epoch"}
    for record in records:
        assert {"step", "epoch", "lr", "loss", "ppl", "tokens_per_second", "seconds"} <= record.keys()
        assert record["ppl"] == pytest.approx(math.exp(record["loss"]))
    assert [r["step"] for r in records if r["event"] == "train"][:2] == [3, 6]
    assert [r["epoch"] for r in records if r["event"] == "epoch"] == [1, 2]


def test_averages_are_validated_and_the_raw_weights_kept(tmp_path, corpus):
    trainer = Trainer(tmp_path / "a", recipe(optimizer="asgd", epochs=1), corpus)
    trainer.fit()
    last, state = load_checkpoint(tmp_path / "a" / "checkpoints" / "last")
    best, _ = load_checkpoint(tmp_path / "a" / "checkpoints" / "best")
    names = [name for name, _ in trainer.model.named_parameters()]
    averages = [state["optimizer"]["state"][i]["average"] for i in range(len(names))]
    assert all(torch.equal(best[name], a) for name, a in zip(names, averages, strict=True))
    assert not torch.equal(last[names[0]], best[names[0]])


def test_rate_follows_the_window_and_the_steps(tmp_path, corpus, monkeypatch):
    rates = []
    trainer = Trainer(tmp_path / "a", recipe(optimizer="sgd", lr=1.0, when=[1], epochs=2), corpus)
    lengths = []
    step = trainer.optimizer.step
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: (rates.append(trainer.optimizer.param_groups[0]["lr"]), step())
    )
    train_step = trainer._train_step

    def spy(inputs, targets, lr_scale):
        lengths.append((trainer.epoch, lr_scale))
        return train_step(inputs, targets, lr_scale)

    monkeypatch.setattr(trainer, "_train_step", spy)
    trainer.fit()
    assert rates == pytest.approx([scale * (1.0 if epoch == 0 else 0.1) for epoch, scale in lengths])
    assert len(set(rates)) > 3


@pytest.mark.parametrize(("compat", "used"), [("", [15, 30, 60, 30]), ("awd-lstm-lm", [15, 15, 30, 60])])
def test_averaged_steps_under_compat_use_the_rate_of_the_window_before(tmp_path, corpus, compat, used):
    changes = {"optimizer": "asgd", "compat": compat, "bptt": 30, "clip": 0, "weight_decay": 0, "lr": 2.0}
    trainer = Trainer(tmp_path / "a", recipe(**changes), corpus)
    ids = corpus.train[:244].view(61, 4)
    rates = []
    for length in [15, 30, 60, 30]:
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer._train_step(ids[:length], ids[1 : length + 1], length / 30)
        moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trainer.model.parameters(), strict=True)])
        grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        rates.append((moved @ grads / (grads @ grads)).item())
    assert rates == pytest.approx([2.0 * length / 30 for length in used], rel=1e-3)


def test_hidden_is_carried_within_an_epoch_and_reset_between(tmp_path, corpus, monkeypatch):
    trainer = Trainer(tmp_path / "a", recipe(epochs=2), corpus)
    starts = []
    loss = trainer.model.loss

    def spy(inputs, targets, state, **options):
        starts.append((trainer.epoch, all((t == 0).all() for layer in state for t in layer if t is not None)))
        return loss(inputs, targets, state, **options)

    monkeypatch.setattr(trainer.model, "loss", spy)
    trainer.fit()
    for epoch in (0, 1):
        fresh = [zero for e, zero in starts if e == epoch]
        assert fresh[0] and not any(fresh[1:])


@pytest.mark.parametrize("optimizer", ["nt-asgd", "sgd"])
def test_gradients_are_clipped(tmp_path, corpus, monkeypatch, optimizer):
    trainer = Trainer(tmp_path / "a", recipe(clip=0.01, epochs=1, optimizer=optimizer), corpus)
    norms = []
    step = trainer.optimizer.step

    def spy(**options):
        step(**options)
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())

    monkeypatch.setattr(trainer.optimizer, "step", spy)
    trainer.fit()
    assert max(norms) <= 0.01 * 1.001


def test_a_budget_stops_after_the_step_and_validates(tmp_path, corpus):
    trainer = Trainer(tmp_path / "a", recipe(max_seconds=1e-6, epochs=50), corpus)
    trainer.fit()
    assert trainer.step == 1
    assert [r["event"] for r in metrics(tmp_path / "a")] == ["epoch"]
    # With a larger budget the run goes on in the middle of the epoch and ends as if it had never been stopped.
    Trainer(tmp_path / "a", recipe(epochs=2), corpus, resume=True).fit()
    Trainer(tmp_path / "b", recipe(epochs=2), corpus).fit()
    a, b = (load_checkpoint(tmp_path / x / "checkpoints" / "last")[0] for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_finetuning_starts_from_the_best_stops_by_itself_and_is_tested(tmp_path, corpus):
    settings = recipe(lr=10.0, epochs=3)
    Trainer(tmp_path / "a", settings, corpus).fit()
    best, state = load_checkpoint(tmp_path / "a" / "checkpoints" / "best")
    fine = finetune_recipe(settings, {"epochs": 60, "lr": 20.0, "nonmono": 1})
    trainer = Trainer(tmp_path / "a" / "finetune", fine, corpus, start=tmp_path / "a")
    assert all(torch.equal(v, best[k]) for k, v in trainer.model.state_dict().items())
    test = trainer.fit()
    assert trainer.stopped and trainer.epoch < 60
    assert trainer.optimizer.averaged_steps == trainer.step
    results = json.loads((tmp_path / "a" / "finetune" / "results.json").read_text())
    assert results["test"]["nll"] == test.nll
    assert results["valid"]["nll"] <= state["valid"]["nll"]


def test_finetuning_a_model_of_adam_needs_a_rate():
    with pytest.raises(RecipeError, match="lr"):
        finetune_recipe(recipe(optimizer="adam", lr=1e-3), {})
    assert finetune_recipe(recipe(optimizer="adam", lr=1e-3), {"lr": 5}).optimizer == "asgd"


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path, corpus):
    trainer = Trainer(tmp_path / "a", recipe(epochs=1), corpus)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(FastlmError, match="loss is nan"):
        trainer.fit()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1], parse_constant=refuse)
    assert record["loss"] is None and record["ppl"] is None and record["step"] == 3
    weights, _ = load_checkpoint(tmp_path / "a" / "checkpoints" / "last")
    assert not any(torch.isnan(w).any() for w in weights.values())


def test_a_folder_with_a_run_is_not_written_over(tmp_path, corpus):
    Trainer(tmp_path / "a", recipe(), corpus)
    with pytest.raises(FastlmError, match="--resume"):
        Trainer(tmp_path / "a", recipe(), corpus)


def test_nothing_to_resume(tmp_path, corpus):
    with pytest.raises(FastlmError, match="no run in"):
        Trainer(tmp_path / "a", recipe(), corpus, resume=True)
    Trainer(tmp_path / "b", recipe(), corpus)
    (tmp_path / "b" / "checkpoints" / "last" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer(tmp_path / "b", recipe(), corpus, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_byte_in_a_checkpoint_is_one_line(tmp_path, corpus, name):
    Trainer(tmp_path / "a", recipe(), corpus)
    file = tmp_path / "a" / "checkpoints" / "last" / name
    data = file.read_bytes()
    for k in range(9):
        at = len(data) * (2 * k + 1) // 18
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointError) as e:
            Trainer(tmp_path / "a", recipe(), corpus, resume=True)
        assert "\n" not in str(e.value) and "damaged" in str(e.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(epochs=s.pop("epoch")), "KeyError: 'epoch'"),
        (lambda s: s.update(step="4"), "TypeError: step is '4'"),
        (lambda s: s["optimizer"].pop("ntasgd"), "ValueError"),
        (lambda s: s.update(loader=None), "TypeError"),
        (lambda s: s["ranks"][0].update(rng=[]), "TypeError"),
    ],
)
def test_a_whole_checkpoint_with_another_state_is_one_line(tmp_path, corpus, change, words):
    Trainer(tmp_path / "a", recipe(), corpus)
    path = tmp_path / "a" / "checkpoints" / "last"
    weights, state = load_checkpoint(path)
    change(state)
    save_checkpoint(path, weights, state)
    with pytest.raises(CheckpointError, match=words) as e:
        Trainer(tmp_path / "a", recipe(), corpus, resume=True)
    assert "\n" not in str(e.value)


def test_a_start_that_cannot_be_made_leaves_the_folder_free(tmp_path, corpus):
    Trainer(tmp_path / "a", recipe(), corpus)
    fine, folder = finetune_recipe(recipe(), {"epochs": 1}), tmp_path / "a" / "finetune"
    checkpoints = tmp_path / "a" / "checkpoints"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Trainer(folder, fine, corpus, start=tmp_path / "a")
    shutil.copytree(checkpoints / "last", checkpoints / "best")
    with pytest.raises(CheckpointError, match="KeyError: 'valid'"):
        Trainer(folder, fine, corpus, start=tmp_path / "a")
    shutil.rmtree(checkpoints / "best")
    assert not folder.exists()
    Trainer(tmp_path / "a", recipe(), corpus, resume=True).fit()
    with pytest.raises(CheckpointError, match="best is of another run: text is"):
        Trainer(folder, fine, replace(corpus, digest="other"), start=tmp_path / "a")
    Trainer(folder, fine, corpus, start=tmp_path / "a").fit()


def test_a_run_whose_first_checkpoint_is_cut_short_can_be_started_again(tmp_path, corpus, monkeypatch):
    def full(path, *args):
        raise CheckpointError(f"cannot save {path}: the disk is full")

    with monkeypatch.context() as m:
        m.setattr(module, "save_checkpoint", full)
        with pytest.raises(CheckpointError, match="full"):
            Trainer(tmp_path / "a", recipe(), corpus)
    Trainer(tmp_path / "a", recipe(), corpus)
    assert Trainer(tmp_path / "a", recipe(), corpus, resume=True).step == 0


def test_another_recipe_or_text_cannot_be_resumed(tmp_path, corpus):
    Trainer(tmp_path / "a", recipe(), corpus)
    with pytest.raises(RecipeError, match="hidden_size is 12 in this run and cannot become 13"):
        Trainer(tmp_path / "a", recipe(hidden_size=13), corpus, resume=True)
    with pytest.raises(DataError, match="the one that this run was started with"):
        Trainer(tmp_path / "a", recipe(), replace(corpus, digest="other"), resume=True)
    assert read_run(tmp_path / "a").recipe == recipe()


def test_a_text_too_short_for_the_batch_is_an_error_at_the_start(tmp_path, corpus):
    for key in ("batch_size", "eval_batch_size", "test_batch_size"):
        with pytest.raises(DataError):
            Trainer(tmp_path / "a", recipe(**{key: 10_000}), corpus)
    assert not (tmp_path / "a").exists()


def test_the_run_folder_remembers_its_recipe(tmp_path, corpus):
    settings = recipe(cell="qrnn", optimizer="adam", when=[2, 3])
    Trainer(tmp_path / "a", settings, corpus, source='some\\where "else"')
    config = read_run(tmp_path / "a")
    assert config.recipe == settings
    assert (config.source, config.digest, config.vocab_size) == (
        'some\\where "else"',
        corpus.digest,
        len(corpus.vocabulary),
    )
