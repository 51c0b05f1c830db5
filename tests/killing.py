"""Runs of `fastlm` that are killed, as programs: `python killing.py PROGRAM FOLDER ...`, each prints one JSON object.

Their children are forked from a process that has imported everything and has no threads, so that starting one costs
milliseconds. Such a process a test is not.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo as _for_optimizers  # noqa: F401, imported at their first step

from fastlm import cli
from fastlm.training import commands as _for_the_children  # noqa: F401
from fastlm.training.checkpoint import save_checkpoint
from fastlm.training.metrics import read_metrics

PHASES = ("sgd", "averaged", "finetune")
KILLS = ["sgd"] * 4 + ["averaged"] * 8 + ["finetune"] * 8
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")  # audited; a replacement is a rename
_A_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def start(function, log, change=None):
    """Calls a function in a child, which kills itself just before its n-th change to a file system; its id."""
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115, until it dies
    if change is not None:
        _die_before(change)
    os._exit(function())


def ended(pid):
    """The exit status of a child, which is waited for; that of one that was killed is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die_before(change):
    left = change

    def count(event, arguments):
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def job(folder):
    """The two commands of a user, in a loop until both are through; the same ones every time."""
    train = ["train", "--data", folder.parent / "text", "--recipe", folder.parent / "recipe.toml", "--out", folder]
    finetune = ["finetune", "--run", folder, "--set", "nonmono=50"]
    return lambda: next((s for c in (train, finetune) if (s := cli.main([*map(str, c), "--resume"]))), 0)


def phase(folder):
    """How far a run is, by the lines it has written."""
    if read_metrics(folder / "finetune" / "metrics.jsonl"):
        return "finetune"
    return "averaged" if any(r.get("averaging") for r in read_metrics(folder / "metrics.jsonl")) else "sgd"


def at_random(folder, seed):
    """A run undisturbed, then the same one killed 20 times, at random moments of each phase."""
    rng, log = random.Random(seed), folder / "log"
    before = time.perf_counter()
    status, died = ended(start(job(folder / "undisturbed"), log)), []
    longest = (time.perf_counter() - before) / 20
    # The machine may be quicker now, and a phase over before its kills are done: then all over again, with less time.
    while died != KILLS and longest > 1e-4:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        died = _killed(folder / "killed", log, rng, longest)
        longest /= 2
    return {"statuses": [status, ended(start(job(folder / "killed"), log))], "died": died}


def _killed(run, log, rng, longest):
    """Starts a run and kills it, again and again; the phases that it died in, None where it ended first."""
    died = []
    for wanted in KILLS:
        pid = start(job(run), log)
        while PHASES.index(phase(run)) < PHASES.index(wanted) and os.waitid(os.P_PID, pid, _A_LOOK) is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        died.append(phase(run) if ended(pid) == -signal.SIGKILL else None)
    return died


def at_each_change(folder):
    """A run undisturbed, then the same one killed just before its first change to a file, its second, ..."""
    log = folder / "log"
    statuses = [ended(start(job(folder / "undisturbed"), log))]
    while statuses[-1] in (0, -signal.SIGKILL) and statuses.count(0) < 2:
        statuses.append(ended(start(job(folder / "killed"), log, len(statuses))))
    return {"statuses": statuses}


def while_saving(folder):
    """A checkpoint that replaces another, killed just before its first change to a file, its second, ..."""

    def save(path, value):
        weights = {"a": torch.full((3,), value), "b": torch.full((2,), value)}
        save_checkpoint(path, weights, {"value": value, "rng": torch.full((5,), value)})
        return 0

    statuses = []
    while not statuses or statuses[-1] == -signal.SIGKILL:
        path = folder / str(len(statuses)) / "last"
        save(path, 1.0)
        statuses.append(ended(start(lambda path=path: save(path, 2.0), folder / "log", len(statuses) + 1)))
    return {"statuses": statuses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # every run that is over draws its curves again
    name, folder, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](Path(folder), *arguments)))
