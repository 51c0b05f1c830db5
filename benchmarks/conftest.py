"""Carries the benchmarks in pytest: options, the choice of cases, the fixture that measures, the file of results."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import Case
from ceilings import measure_ceilings
from machine import describe
from measure import EFFORTS, Runner, measure
from profile_step import where_time_goes
from results import record

SIZES = {"tiny": ("tiny",), "quick": ("quick",), "full": ("quick", "full")}
CASES, FAILURES, CEILINGS = (pytest.StashKey() for _ in range(3))


def pytest_addoption(parser):
    group = parser.getgroup("fastlm")
    group.addoption("--size", default="full", choices=list(EFFORTS), help="which cases, how many rounds (default full)")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (default cpu)")
    group.addoption("--results", metavar="FILE", help="write all that was measured to this JSON file")


def pytest_configure(config):
    config.stash[CASES], config.stash[FAILURES], config.stash[CEILINGS] = [], {}, None


def pytest_collection_modifyitems(config, items):
    """Leave out what is not asked for, rather than skip it: a quick run is a run of fewer cases."""
    device, sizes = config.getoption("device"), SIZES[config.getoption("size")]

    def wanted(item):
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return not isinstance(case, Case) or (device in case.devices and case.size in sizes)

    left_out = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=left_out)


def pytest_report_teststatus(report):
    """No dot for a case that has its line already."""
    return ("passed", "", "") if report.passed and report.when == "call" else None


def _ceilings(config):
    """The best of two measurements, at the start and at the end: the machine may be slow for a while."""
    tiny = config.getoption("size") == "tiny"
    found, before = measure_ceilings(config.getoption("device"), tiny=tiny), config.stash[CEILINGS]
    config.stash[CEILINGS] = {k: max(v, before[k]) for k, v in found.items()} if before else found


@pytest.fixture
def measured(request, benchmark):
    """Measure a case and keep the figures for the file of results; fails where our own result is wrong."""
    config = request.config
    device, effort = config.getoption("device"), EFFORTS[config.getoption("size")]

    def run(case: Case):
        start = time.perf_counter()
        if config.stash[CEILINGS] is None:
            _ceilings(config)
        torch._dynamo.reset()
        try:
            runner = Runner(case, device, effort)
            measure(runner, benchmark)
        except Exception as e:
            config.stash[FAILURES][f"{case.op}: {case.title}"] = f"{type(e).__name__}: {e}"
            raise
        kept = record(runner)
        if runner.work.profiled:
            kept["profile"] = [where_time_goes(e.contender, runner.sets[0]) for e in runner.entries]
        config.stash[CASES].append(kept)
        benchmark.extra_info.update({c["name"]: c["ms"] for c in kept["contenders"]})
        seconds = time.perf_counter() - start
        times = ", ".join(f"{c['name']} {c['ms']:.4g} ms" for c in kept["contenders"])
        print(f"{case.op}: {case.title}: {times} ({seconds:.0f} s)", file=sys.__stderr__, flush=True)

    return run


def pytest_sessionfinish(session):
    config = session.config
    path = config.getoption("results")
    if path is None or not config.stash[CEILINGS]:
        return
    _ceilings(config)
    found = {
        "schema": 1,
        **describe(config.getoption("device")),
        "size": config.getoption("size"),
        "ceilings": config.stash[CEILINGS],
        "cases": config.stash[CASES],
        "failures": config.stash[FAILURES],
    }
    with contextlib.suppress(FileNotFoundError):  # its folder has gone: the run was given up
        Path(path).write_text(json.dumps(found))
