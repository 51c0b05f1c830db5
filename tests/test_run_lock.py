"""One process at a time trains in a folder; what only reads there needs no leave."""

import errno
import subprocess
import sys

import pytest
from test_trainer import Signals, metrics, recipe
from tiny_run import write_text

from fastlm.data import load_corpus
from fastlm.errors import FastlmError
from fastlm.training import lock
from fastlm.training.run import run_model
from fastlm.training.trainer import Interrupted, Trainer

pytest.importorskip("fcntl")

# Another process: takes the lock of a folder if it can, says so, and keeps it until it is ended.
HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1] + "/.lock", "a+")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    file.seek(0)
    sys.exit(f"refused by {file.read()}")
file.truncate(0)
print(os.getpid(), file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(write_text(tmp_path_factory.mktemp("text")), cache_dir=tmp_path_factory.mktemp("cache"))


def other(folder):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-S", "-c", HOLDER, folder], text=True, **pipes)


def answer(folder):
    """What another process is told that wants the folder and leaves it at once."""
    return "".join(other(folder).communicate()).strip()


def test_a_second_process_is_refused_until_the_first_has_gone(tmp_path, corpus):
    folder = tmp_path / "a"
    with pytest.raises(Interrupted):
        Signals(folder, recipe(epochs=1), corpus, at=2).fit()
    with open(folder / "metrics.jsonl", "a") as f:
        f.write("of a step after the checkpoint\n")
    before = (folder / "metrics.jsonl").read_bytes()
    with other(folder) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FastlmError, match=rf"^process {holder.pid} trains in {folder}: end it, or wait for it$"):
            Trainer(folder, recipe(epochs=1), corpus, resume=True)
        assert (folder / "metrics.jsonl").read_bytes() == before
        Trainer(folder / "finetune", recipe(epochs=1), corpus)  # a folder of its own
        holder.kill()
    Trainer(folder, recipe(epochs=1), corpus, resume=True).fit()
    assert metrics(folder)[-1]["event"] == "epoch"


def test_a_trainer_has_the_folder_until_the_end_of_fit(tmp_path, corpus):
    class Asks(Trainer):
        def _evaluate(self, *args):
            answers.append(answer(self.run_dir))
            return super()._evaluate(*args)

    answers = []
    trainer = Asks(tmp_path, recipe(epochs=1), corpus)
    refused = answer(tmp_path)
    assert refused.startswith("refused by ") and refused.split()[-1].isdigit()
    trainer.fit()
    assert answers == [refused] * 2
    assert answer(tmp_path) == "held"
    with other(tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        run_model(tmp_path)
        with pytest.raises(FastlmError, match="trains in"):
            trainer.fit()
        holder.kill()


def test_trainers_of_one_process_share_the_folder(tmp_path, corpus):
    first = Trainer(tmp_path, recipe(epochs=1), corpus)
    second = Trainer(tmp_path, recipe(epochs=1), corpus, resume=True)
    second.fit()
    assert answer(tmp_path).startswith("refused")
    del first
    assert answer(tmp_path) == "held"


def test_a_system_without_locks_trains_without(tmp_path, corpus, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    for name, flock in [("none", None), ("unsupported", unsupported)]:
        monkeypatch.setattr(lock, "flock", flock)
        Trainer(tmp_path / name, recipe(epochs=1), corpus).fit()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, corpus):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastlmError, match="^cannot write in .*file/run: Not a directory$"):
        Trainer(tmp_path / "file" / "run", recipe(), corpus)
