"""Carries the benchmarks in pytest: options, the choice of cases, the fixture that measures, the file of results.

The file is written after every case and read at the start: a run goes on where an earlier one ended, of whatever cause.
"""

import contextlib
import json
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import Case
from ceilings import measure_ceilings
from measure import EFFORTS, GPU_LOST, ON_GPU, Runner, measure
from profile_step import where_time_goes
from results import record

from fastlm.machine import describe

SIZES = {"tiny": ("tiny",), "quick": ("quick",), "full": ("quick", "full")}
FOUND, HEAD, END, LONGEST = (pytest.StashKey() for _ in range(4))


def pytest_addoption(parser):
    group = parser.getgroup("fastlm")
    group.addoption("--size", default="full", choices=list(EFFORTS), help="which cases, how many rounds (default full)")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (default cpu)")
    group.addoption("--results", metavar="FILE", help="write all that was measured to this JSON file")
    group.addoption("--seconds", type=float, help="begin no case after that time; the most telling ones come first")


def pytest_configure(config):
    path, device = config.getoption("results"), config.getoption("device")
    old = path and Path(path).exists()
    config.stash[FOUND] = (
        json.loads(Path(path).read_text()) if old else {"cases": [], "failures": {}, "not_measured": []}
    )
    seconds = config.getoption("seconds")
    config.stash[END], config.stash[LONGEST] = seconds and time.monotonic() + seconds, 0.0
    if device == "cuda":  # cuDNN would take TF32 for float32 where no other library does
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def pytest_collection_modifyitems(config, items):
    """Leave out what is not asked for, rather than skip it: a quick run is a run of fewer cases."""
    device, sizes, found = config.getoption("device"), SIZES[config.getoption("size")], config.stash[FOUND]
    done = {title(case["op"], case["title"]) for case in found["cases"]} | {*found["failures"], *found["not_measured"]}

    def case_of(item):
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return case if isinstance(case, Case) else None

    def wanted(item):
        case = case_of(item)
        fits = case is not None and device in case.devices and case.size in sizes
        return case is None or (fits and title(case.op, case.title) not in done)

    left_out = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=left_out)
    if config.stash[END]:
        places: Counter = Counter()  # operators take turns, so that none is left without a figure

        def worth(item):
            case = case_of(item)
            rank = case.rank(device) if case else 0
            places[case and case.op, rank] += 1
            return rank, places[case and case.op, rank]

        items.sort(key=worth)


def title(op: str, name: str) -> str:
    return f"{op}: {name}"


def pytest_report_teststatus(report):
    """No dot for a case that has its line already."""
    return ("passed", "", "") if report.passed and report.when == "call" else None


def _ceilings(config):
    """The best of two measurements, at the start and at the end: the machine may be slow for a while."""
    tiny = config.getoption("size") == "tiny"
    found = measure_ceilings(config.getoption("device"), tiny=tiny)
    before = config.stash[FOUND].get("ceilings")
    config.stash[FOUND]["ceilings"] = {k: max(v, before[k]) for k, v in found.items()} if before else found


def _write(config, **more):
    path, found = config.getoption("results"), config.stash[FOUND]
    if path is None or not found.get("ceilings"):
        return
    if HEAD not in config.stash:
        head = {"schema": 1, **describe(config.getoption("device")), "size": config.getoption("size")}
        config.stash[HEAD] = head
    with contextlib.suppress(FileNotFoundError):  # its folder has gone: the run was given up
        Path(path).write_text(json.dumps({**config.stash[HEAD], **found, **more}))


def _gpu_lost(device: str) -> bool:
    """Whether a kernel has failed in a way that makes every later call of the process fail."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


@pytest.fixture
def measured(request, benchmark):
    """Measure a case and keep the figures for the file of results; fails where our own result is wrong."""
    config = request.config
    device, size, found = config.getoption("device"), config.getoption("size"), config.stash[FOUND]
    effort = ON_GPU if device == "cuda" and size != "tiny" else EFFORTS[size]

    def run(case: Case):
        start, name = time.perf_counter(), title(case.op, case.title)
        if config.stash[END] and time.monotonic() + config.stash[LONGEST] > config.stash[END]:
            found["not_measured"].append(name)
            _write(config)
            pytest.skip("there is no time left")
        if "ceilings" not in found:
            _ceilings(config)
        _write(config, running=name)  # whoever finds this knows which case ended the process
        torch._dynamo.reset()
        try:
            runner = Runner(case, device, effort)
            measure(runner, benchmark)
            found["cases"].append(kept := record(runner))
            found["failures"].update(runner.failures)
            if runner.work.profiled:
                kept["profile"] = [where_time_goes(e.contender, runner.sets[0], device) for e in runner.entries]
        except Exception as e:
            found["failures"][name] = f"{type(e).__name__}: {e}"
            print(f"{name}: FAILED: {type(e).__name__}: {e}", file=sys.__stderr__, flush=True)
            traceback.clear_frames(e.__traceback__)  # else pytest keeps their tensors until the next failure
            _write(config)
            if _gpu_lost(device):
                pytest.exit(f"{name}: the GPU takes no more work from this process", GPU_LOST)
            raise
        finally:
            config.stash[LONGEST] = max(config.stash[LONGEST], min(time.perf_counter() - start, 15.0))
        _write(config)
        benchmark.extra_info.update({c["name"]: c["ms"] for c in kept["contenders"]})
        seconds = time.perf_counter() - start
        times = ", ".join(f"{c['name']} {c['ms']:.4g} ms" for c in kept["contenders"])
        print(f"{name}: {times} ({seconds:.0f} s)", file=sys.__stderr__, flush=True)

    return run


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if "ceilings" not in config.stash[FOUND] or exitstatus == GPU_LOST:
        return
    _ceilings(config)
    _write(config)
