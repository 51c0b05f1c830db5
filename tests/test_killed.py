"""A run is never lost: killed by SIGKILL at any moment and started again by the same command, it ends the same."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PACKAGE_ROOT
from test_trainer import assert_same_run, metrics
from tiny_run import SMALL, write_text

from fastlm.training.checkpoint import load_checkpoint, save_checkpoint

KILLED = -9
# A rate this high lets the second validation be worse than the first, which starts the averaging.
SETTINGS = {**SMALL, "lr": 20, "bptt": 20, "epochs": 6, "save_interval": 0.02}


@pytest.fixture
def program(tmp_path):
    """Runs a program of killing.py on a text and a recipe; takes its arguments and returns what it printed."""

    def run(name, *arguments, **changes):
        write_text(tmp_path / "text", lines=400)
        recipe = {**SETTINGS, **changes}
        (tmp_path / "recipe.toml").write_text("".join(f"{key} = {value}\n" for key, value in recipe.items()))
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FASTLM_CACHE": str(tmp_path / "corpora")}
        command = [sys.executable, Path(__file__).with_name("killing.py"), name, tmp_path, *map(str, arguments)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        log = tmp_path / "log"
        assert done.returncode == 0, done.stderr
        print(log.read_text()[-3000:] if log.exists() else "no log")  # for the report of a failure
        return json.loads(done.stdout)

    return run


def results(run):
    found = json.loads((run / "results.json").read_text())
    return {k: v for k, v in found.items() if "second" not in k and k != "starts"}


def assert_same_job(folder):
    for name in ("", "finetune"):
        undisturbed, killed = folder / "undisturbed" / name, folder / "killed" / name
        assert_same_run(undisturbed, killed)
        assert results(undisturbed) == results(killed)
        assert (
            load_checkpoint(killed / "checkpoints" / "best")[1]
            == load_checkpoint(undisturbed / "checkpoints" / "best")[1]
        )
        assert {path.name for path in killed.iterdir()} == {path.name for path in undisturbed.iterdir()}
    epochs = {
        name: [r for r in metrics(folder / "killed" / name) if r["event"] == "epoch"] for name in ("", "finetune")
    }
    averaging = [r["averaging"] for r in epochs[""]]
    assert averaging[:2] == [False, False] and averaging[-1], "the run was to switch by itself"
    assert all(r["averaging"] for r in epochs["finetune"])


def test_twenty_random_kills_change_nothing(tmp_path, program):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    done = program("at_random", seed)
    assert done["statuses"] == [0, 0]
    assert done["died"] == ["sgd"] * 4 + ["averaged"] * 8 + ["finetune"] * 8
    assert_same_job(tmp_path)


def test_a_kill_before_every_change_to_a_file(tmp_path, program):
    """The n-th start dies before its n-th change: from the first folder made to the last line of the report."""
    done = program("at_each_change", epochs=3, save_interval=1000)
    assert set(done["statuses"][1:-1]) == {KILLED} and done["statuses"][0] == done["statuses"][-1] == 0
    assert len(done["statuses"]) > 20
    assert_same_job(tmp_path)


def test_a_kill_while_saving_leaves_one_whole_checkpoint(tmp_path, program):
    statuses = program("while_saving")["statuses"]
    assert statuses == [KILLED] * (len(statuses) - 1) + [0]
    found = []
    for k in range(len(statuses)):
        path = tmp_path / str(k) / "last"
        weights, state = load_checkpoint(path)
        tensors = [*weights.values(), state["rng"]]
        assert all((tensor == state["value"]).all() for tensor in tensors) and len(tensors) == 3
        found.append(state["value"])
        save_checkpoint(path, {"a": torch.zeros(3)}, {"value": 3.0})
        assert load_checkpoint(path)[1] == {"value": 3.0} and os.listdir(path.parent) == ["last"]
    assert found == sorted(found) and set(found) == {1.0, 2.0}
