"""The benchmarks on a GPU, as far as a CPU can tell: the same code with PyTorch's calls to CUDA replaced by notes."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import bench_lstm  # noqa: E402
import cases  # noqa: E402
import ceilings  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import profile_step  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import suite  # noqa: E402

from fastlm import machine  # noqa: E402
from fastlm.errors import FastlmError  # noqa: E402


class AsCuda(str):
    """Where the code asks, "cuda"; where PyTorch does, "cpu"."""

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"

    def __hash__(self):
        return hash("cuda")


GPU = AsCuda("cpu")


@pytest.fixture
def calls(monkeypatch):
    """What would have been asked of the GPU, in order; its events read the clock of the host."""
    noted = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            noted.append("record")
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def note(name, value=None):
        monkeypatch.setattr(torch.cuda, name, lambda *_: noted.append(name) or value, raising=False)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep"):
        note(name)
    note("memory_allocated", 1_000_000)
    note("max_memory_allocated", 8_000_000)
    note("get_device_name", "NVIDIA H200")
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return noted


def test_time_is_between_events_with_the_host_ahead(calls):
    result, ms, host = measure.timed(GPU, lambda: calls.append("run") or 7, ahead=0.5)
    assert result == 7 and 0 <= host <= ms
    assert calls == ["synchronize", "_sleep", "record", "run", "record", "synchronize"]
    calls.clear()
    measure.timed(GPU, lambda: calls.append("run"))
    assert calls == ["synchronize", "record", "run", "record", "synchronize"]


def test_memory_is_what_the_allocator_says(calls):
    x = torch.ones(250_000)
    result, extra = memory.peak(GPU, lambda: (x + 1, x[:3]), [x])
    assert extra == 8_000_000 - 1_000_000 - result[0].nbytes
    assert calls == [
        *("empty_cache", "synchronize", "reset_peak_memory_stats", "memory_allocated", "synchronize"),
        "max_memory_allocated",
    ]
    assert memory.held(GPU) == 1_000_000


def test_inputs_are_more_than_the_level_2_cache_holds(calls):
    work = cases.Work(lambda: (torch.ones(8 << 20), 3), [], exact=None, plain=None)  # 32 MB
    assert len(measure.input_sets(GPU, work)) == 4
    work.inputs = lambda: (torch.ones(5),)
    assert len(measure.input_sets(GPU, work)) == 16


def test_ceilings(calls):
    found = ceilings.measure_ceilings(GPU, tiny=True)
    assert set(found) == {"copy", "fp32", "bf16"} and min(found.values()) > 0


def tiny_cases():
    found = [case for name in suite.BENCHMARKS for case in importlib.import_module(f"bench_{name}").CASES]
    return [case for case in found if case.size == "tiny" and "cuda" in case.devices]


class Benchmark:
    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


@pytest.mark.parametrize("case", tiny_cases(), ids=str)
def test_a_case(case, calls):
    """What a case does on a GPU alone: other contenders, more rows, the host ahead."""
    runner = measure.Runner(case, GPU, measure.EFFORTS["tiny"])
    measure.measure(runner, Benchmark())
    kept = results.record(runner)
    assert not runner.failures and (kept["input_sets"] > 1 or case.op == "cache_attention")
    for entry in kept["contenders"]:
        assert entry["host_ms"] > 0 and entry["extra_bytes"] is not None and entry["rounds"] >= 2
    assert ("_sleep" in calls) == (case.op != "training")
    names = [entry["name"] for entry in kept["contenders"]]
    if case.op == "lstm":
        assert "fastlm aten" in names
        assert {bench_lstm.RIVAL, bench_lstm.FLAT} < set(names) and kept["steps"] == 3
        assert sum(name.endswith("TF32") for name in names) == (2 if case.dtype == "fp32" else 0)
    if case.op == "training":
        profile = profile_step.where_time_goes(runner.entries[0].contender, runner.sets[0], GPU)
        assert profile["name"] == "fastlm"


def test_the_alternating_path_is_one_graph_a_set_of_inputs(monkeypatch):
    """Captured after a run that allocates, on a GPU that passes for one of a single multiprocessor."""
    noted = []

    class Graph:
        def replay(self):
            noted.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        noted.append("capture")
        yield

    stream = type("Stream", (), {"wait_stream": lambda *_: None})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.delenv(bench_lstm.MULTIPROCESSORS, raising=False)

    def run(x):
        noted.append(os.environ[bench_lstm.MULTIPROCESSORS])
        return x + 1

    contender = bench_lstm.alternating(cases.Contender("fastlm cuda", run, run))
    first, second = torch.zeros(1), torch.ones(1)
    assert [contender.run(x).item() for x in (first, second, first)] == [1.0, 2.0, 1.0]
    assert noted == ["1", "capture", "1", "replay"] * 2 + ["replay"]
    assert contender.check(first).item() == 1.0 and bench_lstm.MULTIPROCESSORS not in os.environ


def a_work(**contenders):
    makers = [cases.Contender(name.replace("_", " "), run) for name, run in contenders.items()]
    return cases.Work(lambda: (torch.randn(50),), makers, lambda x: (x.double().exp(),), lambda x: (x.exp(),))


def right(x):
    return (x.exp(),)


def test_another_implementation_that_is_wrong_is_a_failure_and_the_case_is_timed(calls):
    case = cases.Case("lstm", "exp", lambda _: a_work(fastlm=right, fastlm_triton=lambda x: (x.exp() * 2,)))
    runner = measure.Runner(case, GPU, measure.EFFORTS["tiny"])
    measure.measure(runner, Benchmark())
    assert list(runner.failures) == ["lstm: exp: fastlm triton"] and len(runner.entries) == 1
    assert runner.left_out["fastlm triton"].startswith("wrong: fastlm triton: result 0: error")


def test_on_a_gpu_no_contender_is_slow(calls):
    work = a_work(fastlm=right)
    work.contenders[0].slow = True
    runner = measure.Runner(cases.Case("lstm", "exp", lambda _: work), GPU, measure.EFFORTS["tiny"])
    measure.measure(runner, Benchmark())
    assert runner.entries[0].queued > 0, "a call that is not timed came before"


def test_what_is_known_of_the_machine(calls, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 3201 MHz, 1980 MHz, 120.5 W, 40'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.describe(GPU)
    assert found["machine"] == "nvidia-h200" and found["gpu"] == "NVIDIA H200"
    assert found["gpu_state"]["clocks.sm"] == "1980 MHz" and len(found["gpu_state"]) == 6
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpu_state() is None


def a_run(**more):
    contender = dict(note="", p20=1.0, p80=1.0, share_of_work=1.0, extra_bytes=3_000_000_000)
    ours = dict(contender, name="fastlm", note="impl triton", ms=1.0, host_ms=2.0)
    other = dict(contender, name="fastlm cuda", ms=0.5, host_ms=0.1)
    goal = vars(cases.Target(ms=2.0, mb=2000.0))
    case = dict(op="lstm", title="a layer", dtype="fp32", flops=1e9, bytes=0.0, sweep=None, targets=[goal])
    case |= dict(contenders=[ours, other], left_out={}, products="bf16", steps=50)
    head = {**machine.describe("cpu"), "device": "cuda", "gpu": "NVIDIA H200", "size": "full", "schema": 1}
    tops = {"copy": 4000.0, "fp32": 500.0, "bf16": 1000.0}
    return head | {"ceilings": tops, "cases": [case], "failures": {}, "not_measured": ["lstm: late"]} | more


def test_the_report_of_a_gpu():
    text = report.as_markdown(a_run())
    for wanted in (
        "auto took for lstm: triton.",
        "The host takes longer than the GPU: lstm: a layer: fastlm 2 ms.",
        "Not measured, for want of time: lstm: late.",
        "lstm: a layer, us a step: fastlm 20.00, fastlm cuda 10.00.",
        "<= 2 ms, <= 2,000 MB | NO | 100% of GEMM",
        "0.50x",
    ):
        assert wanted in text, text
    on_cpu = report.as_markdown(a_run(device="cpu"))
    assert "auto took" not in on_cpu and "us a step" not in on_cpu


def test_the_most_telling_cases_come_first():
    goal = {"cuda": (cases.Target(ms=1.0),)}
    ranks = [cases.Case("lstm", "x", None, **options).rank("cuda") for options in (
        dict(targets=goal), dict(targets={"cpu": goal["cuda"]}), dict(sweep=("lstm", "H", 3)), dict(slow=True),
    )]  # fmt: skip
    assert ranks == [0, 1, 2, 3]


def run_pytest(path, *options):
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_forget_mult.py", "-q", "-p", "no:cacheprovider"]
    command += ["--size", "tiny", "--benchmark-quiet", "--results", str(path), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_run_goes_on_where_another_ended_and_ends_in_time(tmp_path):
    path = tmp_path / "results.json"
    begun = {"ceilings": {"copy": 1e9, "fp32": 1.0, "bf16": 1.0}, "cases": [], "failures": {}, "not_measured": []}
    path.write_text(json.dumps(begun))
    done = run_pytest(path, "--seconds", "0.0001")
    found = json.loads(path.read_text())
    assert done.returncode == 0, done.stdout
    assert found["not_measured"] == ["forget_mult: (3,2,5) fp32, forward + backward"] and not found["cases"]
    path.write_text(json.dumps({**begun, "failures": {found["not_measured"][0]: "the process ended: SIGSEGV"}}))
    done = run_pytest(path)
    found = json.loads(path.read_text())
    assert done.returncode == 5 and not found["cases"] and len(found["failures"]) == 1, done.stdout
    assert found["ceilings"]["copy"] == 1e9 and found["ceilings"]["fp32"] > 1.0, "the best of both runs"


def test_a_case_that_ends_its_process_costs_no_other(monkeypatch):
    statuses, limits = [-11, measure.GPU_LOST, 0], []

    def fake(command, folder, limit):
        path = Path(command[command.index("--results") + 1])
        found = json.loads(path.read_text()) if path.exists() else {"cases": [], "failures": {}}
        limits.append(limit)
        status = statuses.pop(0)
        if status < 0:
            found["running"] = "lstm: first"
        elif status == measure.GPU_LOST:
            found["failures"]["lstm: second"] = "RuntimeError: an illegal memory access"
        else:
            found["cases"].append("third")
        path.write_text(json.dumps(found))
        return status

    monkeypatch.setattr(suite, "_pytest", fake)
    found = suite._measure(["lstm"], "cuda", "quick", 100.0)
    assert found["cases"] == ["third"] and not statuses and "running" not in found
    assert found["failures"]["lstm: first"] == "the process ended: SIGSEGV" and "lstm: second" in found["failures"]
    assert limits[0] == pytest.approx(100 + suite.AFTER_THE_LAST, abs=1)

    statuses += [-9]
    monkeypatch.setattr(suite, "_pytest", lambda *_: -9)
    with pytest.raises(FastlmError, match="no case was measured on cuda"):
        suite._measure(["lstm"], "cuda", "quick")


def test_a_case_that_hangs_is_given_up(monkeypatch, tmp_path):
    assert suite._pytest([sys.executable, "-c", "import time; time.sleep(60)"], str(tmp_path), 1.0) == suite.OUT_OF_TIME

    def hangs(command, folder, limit):
        begun = {"cases": ["done"], "failures": {}, "not_measured": [], "running": "lstm: hangs"}
        Path(command[command.index("--results") + 1]).write_text(json.dumps(begun))
        return suite.OUT_OF_TIME

    monkeypatch.setattr(suite, "_pytest", hangs)
    found = suite._measure(["lstm"], "cuda", "quick", 1.0)
    assert found == {"cases": ["done"], "failures": {}, "not_measured": ["lstm: hangs"]}
