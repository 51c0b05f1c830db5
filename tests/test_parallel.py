import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import PACKAGE_ROOT
from test_trainer import Signals, assert_same_run, metrics, recipe
from tiny_run import SMALL, write_text

from fastlm.data import load_corpus
from fastlm.errors import CheckpointError, FastlmError, RecipeError
from fastlm.training.checkpoint import load_checkpoint
from fastlm.training.parallel import Ranks, join
from fastlm.training.trainer import Interrupted, Trainer

SCENARIOS = {  # with all dropouts
    "lstm": {"clip": 0.05},  # NT-ASGD
    "qrnn": {"cell": "qrnn", "optimizer": "adam", "lr": 1e-3, "clip": 0.1, "accumulate": 2, "zoneout": 0.3},
    "sgd": {"optimizer": "sgd", "clip": 0.0, "epochs": 1},  # whose steps are as long as the gradient
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(write_text(tmp_path_factory.mktemp("text")), cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def two_ranks():
    """Runs a function of this file in two processes; it takes the ranks and what else is given."""

    def run(function, *args):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        torch.multiprocessing.spawn(_process, (port, function, args), nprocs=2)

    return run


def _process(rank, port, function, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with join("cpu") as (ranks, device):
        assert (ranks.rank, ranks.size, device) == (rank, 2, "cpu")
        function(ranks, *args)
    assert not torch.distributed.is_initialized()


def _trained(folder, name, corpus, ranks=None, **changes):
    trainer = Trainer(folder / name, recipe(**{**SCENARIOS[name], **changes}), corpus, ranks=ranks)
    if name == "lstm":  # no validation is better than this one: averaging starts with the second epoch
        trainer.optimizer.trigger.log = [0.0]
    trainer.fit()


def _train_both(ranks, folder, corpus):
    for name in SCENARIOS:
        _trained(folder, name, corpus, ranks)


def test_two_ranks_make_the_steps_of_one(tmp_path, corpus, two_ranks):
    one, two = tmp_path / "one", tmp_path / "two"
    two_ranks(_train_both, two, corpus)
    for name in SCENARIOS:
        _trained(one, name, corpus, accumulate=1)
        (weights, state), (others, other) = (load_checkpoint(x / name / "checkpoints" / "last") for x in (one, two))
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, rtol=1e-4, atol=2e-5)
        for index, entry in state["optimizer"]["state"].items():
            for key, value in entry.items():
                torch.testing.assert_close(other["optimizer"]["state"][index][key], value, rtol=1e-4, atol=2e-5)
        for a, b in zip(metrics(one / name), metrics(two / name), strict=True):
            assert a.keys() == b.keys() and a["event"] == b["event"]
            for key in a.keys() - {"event"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key
        if name == "lstm":
            assert 0 < state["optimizer"]["ntasgd"]["averaged_steps"] < state["step"]


INTERRUPTIONS = {"asgd": {"optimizer": "asgd", "nonmono": 5}, "qrnn": {"cell": "qrnn", "zoneout": 0.2}}


def _interrupt_each(ranks, folder, corpus):
    for name, changes in INTERRUPTIONS.items():
        _stop_and_go_on(ranks, folder / name, corpus, changes)


def _stop_and_go_on(ranks, folder, corpus, changes):
    settings = recipe(**changes)
    expected = Trainer(folder / "a", settings, corpus, ranks=ranks).fit()
    # The signal comes to rank 1 alone in a step, then to rank 0 alone while it validates.
    stopped = Signals(folder / "b", settings, corpus, ranks=ranks, at=4 if ranks.rank == 1 else -1)
    with pytest.raises(Interrupted):
        stopped.fit()
    assert stopped.step == 4
    torch.manual_seed(99)
    stopped = Trainer(folder / "b", settings, corpus, ranks=ranks, resume=True)
    if ranks.first:
        validate = stopped._evaluate
        stopped._evaluate = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), validate(*args))[1]
    with pytest.raises(Interrupted):
        stopped.fit()
    assert stopped.epoch_done
    weights = ranks.gather([p.detach() for p in stopped.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    resumed = Trainer(folder / "b", settings, corpus, ranks=ranks, resume=True)
    assert ranks.gather(resumed.fit()) == [expected] * 2


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, corpus, two_ranks):
    two_ranks(_interrupt_each, tmp_path, corpus)
    for name, changes in INTERRUPTIONS.items():
        assert_same_run(tmp_path / name / "a", tmp_path / name / "b")
        with pytest.raises(CheckpointError, match="is of 2 ranks and cannot go on with 1$"):
            Trainer(tmp_path / name / "a", recipe(**changes), corpus, resume=True)


def _budget_is_that_of_rank_0(ranks, folder, corpus):
    agree = Ranks.agree
    with pytest.MonkeyPatch.context() as m:
        # Without the clock of rank 0, rank 1 would stop long before it.
        m.setattr(Ranks, "agree", lambda self, stop, _: agree(self, stop, 10.0 if self.first else 1000.0))
        trainer = Trainer(folder / "budget", recipe(max_seconds=35), corpus, ranks=ranks)
        trainer.fit()
    assert (trainer.step, trainer.seconds) == (4, 40.0)


def _refusals(ranks, folder, corpus):
    _budget_is_that_of_rank_0(ranks, folder, corpus)
    if ranks.first:
        Trainer(folder / "alone", recipe(), corpus)
    ranks.gather(None)
    with open(folder / "alone" / ".lock") as taken:
        if ranks.first:  # it alone asks for the lock
            fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(FastlmError, match=r"^process \d+ trains in"):
            Trainer(folder / "alone", recipe(), corpus, ranks=ranks, resume=True)
    with pytest.raises(CheckpointError, match="is of 1 ranks and cannot go on with 2"):
        Trainer(folder / "alone", recipe(), corpus, ranks=ranks, resume=True)
    with pytest.raises(FastlmError, match="holds a run already"):
        Trainer(folder / "alone", recipe(), corpus, ranks=ranks)
    with pytest.raises(RecipeError, match="batch_size must be a multiple of the 2 ranks, got 3"):
        Trainer(folder / "b", recipe(batch_size=3), corpus, ranks=ranks)
    with pytest.raises(RecipeError, match="accumulate must divide the 2 columns of each rank, got 4"):
        Trainer(folder / "b", recipe(accumulate=4), corpus, ranks=ranks)
    with pytest.raises(RecipeError, match="were not given the same run"):  # one does not see the folder
        Trainer(folder / "alone", recipe(), corpus, ranks=ranks, resume=ranks.first)
    with pytest.raises(RecipeError, match="were not given the same recipe"):
        Trainer(folder / "b", recipe(seed=ranks.rank), corpus, ranks=ranks)
    assert not (folder / "b").exists()
    if not ranks.first:
        os._exit(0)
    with pytest.raises(FastlmError, match="rank 0 lost the other ranks"):
        ranks.gather(None)


def test_refusals_budget_and_a_rank_that_goes(tmp_path, corpus, two_ranks):
    two_ranks(_refusals, tmp_path, corpus)


def test_a_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("cpu") as (ranks, device):
        assert ranks == Ranks() and device == "cpu" and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(FastlmError, match="cannot join the other ranks"), join("cpu"):
        pass


@pytest.fixture
def torchrun(tmp_path):
    """Starts `fastlm train` on a small text in two processes; takes the folder, keys of the recipe, the program."""

    def start(folder="run", *, program=("-m", "--", "fastlm.cli"), restarts=0, **changes):
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        cache = str(tmp_path / "cache")
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FASTLM_CACHE": cache}
        settings = {**SMALL, "log_interval": 1, **changes}
        (tmp_path / "small.toml").write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
        options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
        text = ["--data", write_text(tmp_path / "text"), "--recipe", tmp_path / "small.toml"]
        arguments = [*options, *program, "train", *text, "--out", tmp_path / folder, "--json"]
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


# The command, but for a rank that dies while the other waits for it, the first time.
DIES = """
import os, signal, sys, time
from fastlm import cli
from fastlm.training.parallel import Ranks

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "1"):
    time.sleep(1)  # the other comes first, and must not take what torchrun still knows of the rank that died

agree, steps = Ranks.agree, []

def dies(self, *args):
    steps.append(self.rank)
    if len(steps) == 6 and self.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return agree(self, *args)

Ranks.agree = dies
status = cli.main()
print(f"{len(steps)} steps", file=sys.stderr)
sys.exit(status)
"""


def test_torchrun_trains_one_rank_speaks_and_one_that_is_killed_changes_nothing(tmp_path, torchrun):
    settings = {"optimizer": "asgd", "nonmono": 5, "epochs": 1, "save_interval": 1e-6}
    process = torchrun(**settings)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    assert [line.split(":")[0] for line in printed.splitlines()[:2]] == ["valid", "test"]
    assert len(printed.splitlines()) == 3
    results = json.loads(printed.splitlines()[2])
    assert said.count("| step 1 |") == 1
    assert len(metrics(tmp_path / "run")) == results["steps"] + 1
    assert (tmp_path / "run" / "report.html").exists()

    (tmp_path / "dies.py").write_text(DIES)
    process = torchrun("killed", program=[tmp_path / "dies.py"], restarts=1, **settings)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    # The step of the last checkpoint, at which rank 1 died, was the fifth.
    assert said.count(f"{results['steps'] - 5} steps\n") == 2, said
    killed = json.loads(printed.splitlines()[-1])
    assert killed["test"] == results["test"]
    assert [(start["step"], start["ranks"]) for start in killed["starts"]] == [(0, 2), (5, 2)]
    assert_same_run(tmp_path / "run", tmp_path / "killed")


def test_torchrun_hands_a_signal_on(tmp_path, torchrun):
    with torchrun(epochs=100_000) as process:
        said = ""
        for line in process.stderr:
            said += line
            if "| step 3 |" in line:
                process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
        assert process.wait() != 0
    assert json.loads(printed)["interrupted"]
    (step,) = re.findall(r"stopped at step (\d+)", said)
    _, state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last")
    assert state["step"] == int(step)
