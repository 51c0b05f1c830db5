"""TensorBoard's files: what is written, when a run goes on, and without the package."""

import importlib.util
import sys
import types

import pytest
from test_trainer import Signals, metrics, recipe
from tiny_run import write_text

from fastlm.data import load_corpus
from fastlm.training.board import Board
from fastlm.training.parallel import Ranks
from fastlm.training.trainer import Interrupted, Trainer

SETTINGS = {"epochs": 2, "log_interval": 2}


class Writer:
    """Stands for SummaryWriter."""

    made: list = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((step, tag, value))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    """Those that are made, of a tensorboard that seems to be installed."""
    find, Writer.made = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or find(name))
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Writer.made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(write_text(tmp_path_factory.mktemp("text")), cache_dir=tmp_path_factory.mktemp("cache"))


def test_figures_of_the_run_are_written(tmp_path, corpus, writers):
    Trainer(tmp_path / "a", recipe(**SETTINGS), corpus).fit()
    (writer,) = writers
    assert writer.folder == str(tmp_path / "a" / "tensorboard") and writer.purge_step == 1 and writer.closed
    records = metrics(tmp_path / "a")
    for event, key, tag in [
        ("train", "loss", "train/loss"),
        ("train", "ppl", "train/ppl"),
        ("train", "bpc", "train/bpc"),
        ("train", "lr", "lr"),
        ("epoch", "ppl", "epoch/train_ppl"),
        ("epoch", "bpc", "epoch/train_bpc"),
        ("epoch", "valid_bpc", "valid/bpc"),
        ("epoch", "valid_nll", "valid/loss"),
        ("epoch", "valid_ppl", "valid/ppl"),
    ]:
        expected = [(r["step"], r[key]) for r in records if r["event"] == event]
        assert [(step, value) for step, name, value in writer.scalars if name == tag] == expected, tag
    assert "tokens_per_second" in {tag for _, tag, _ in writer.scalars}


def test_a_run_that_goes_on_hides_the_steps_it_makes_again(tmp_path, corpus, writers):
    with pytest.raises(Interrupted):
        Signals(tmp_path / "a", recipe(**SETTINGS), corpus, at=5).fit()
    assert writers[0].closed
    Trainer(tmp_path / "a", recipe(**SETTINGS), corpus, resume=True).fit()
    assert writers[1].purge_step == 6 and min(step for step, *_ in writers[1].scalars) == 6


def test_only_the_first_rank_writes(tmp_path, writers):
    Board(tmp_path, 0, Ranks(1, 2)).close()
    assert not writers


def test_without_the_package_nothing_is_written(tmp_path, corpus, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    Trainer(tmp_path / "a", recipe(epochs=1), corpus).fit()
    assert not (tmp_path / "a" / "tensorboard").exists()


class Broken(types.ModuleType):
    """Stands for a tensorboard that does not agree with the protobuf beside it."""

    def __getattr__(self, name):
        raise TypeError("Descriptors cannot be created directly.\nDowngrade the protobuf package.")


def unwritable(folder, purge_step):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("loaded", "said"),
    [
        (None, "ModuleNotFoundError: import of "),
        (Broken("broken"), "TypeError: Descriptors cannot be created directly.\n"),
        (types.SimpleNamespace(SummaryWriter=unwritable), "PermissionError: [Errno 13] Permission denied\n"),
    ],
    ids=["missing", "broken", "unwritable"],
)
def test_a_package_that_does_not_load_is_said(tmp_path, writers, monkeypatch, capsys, loaded, said):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", loaded)
    Board(tmp_path, 0, Ranks()).write({"event": "train"})
    err = capsys.readouterr().err
    assert f"nothing is written for TensorBoard: {said}" in err and err.count("\n") == 1


@pytest.mark.parametrize("method", ["add_scalar", "close"])
def test_a_disk_that_fills_up_ends_no_training(tmp_path, corpus, writers, monkeypatch, capsys, method):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, method, fails)
    Trainer(tmp_path / "a", recipe(**SETTINGS), corpus).fit()
    assert (tmp_path / "a" / "results.json").exists()
    said = "nothing is written for TensorBoard: OSError: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err.count(said) == 1


def test_tensorboard_reads_it(tmp_path, corpus):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Interrupted):
        Signals(tmp_path / "a", recipe(**SETTINGS), corpus, at=5).fit()
    killed = Board(tmp_path / "a" / "tensorboard", 5, Ranks())  # after a step that is in no checkpoint
    figures = dict.fromkeys(("loss", "ppl", "bpc", "lr", "tokens_per_second"), 1.0)
    killed.write({"event": "train", "step": 6, **figures})
    killed.close()
    Trainer(tmp_path / "a", recipe(**SETTINGS), corpus, resume=True).fit()
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    for event, tag in [("train", "train/loss"), ("epoch", "valid/loss")]:
        steps = [r["step"] for r in metrics(tmp_path / "a") if r["event"] == event]
        assert [scalar.step for scalar in events.Scalars(tag)] == steps
