"""The benchmark suite: its statistic, its memory meter, its check before timing, its verdicts and its command."""

import ctypes
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastlm import bench, cli
from fastlm.errors import FastlmError

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import cases  # noqa: E402
import ceilings  # noqa: E402
import compare  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import suite  # noqa: E402

MB = 1e6


def figures(ms, name="fastlm", **more):
    return {
        "name": name,
        "note": "",
        "ms": ms,
        "p20": 0.98 * ms,
        "p80": 1.02 * ms,
        "share_of_work": 1.0,
        "extra_bytes": 5_000_000,
        **more,
    }


def a_case(*contenders, **more):
    found = {"op": "lstm", "title": "a layer", "dtype": "fp32", "flops": 2e9, "bytes": 0.0, "sweep": None}
    return {**found, "targets": [], "contenders": list(contenders), "left_out": {}, **more}


def a_run(*found, **more):
    from fastlm.machine import describe

    tops = {"copy": 30.0, "fp32": 200.0, "bf16": 400.0}
    return {
        "schema": 1,
        **describe("cpu"),
        "size": "quick",
        "ceilings": tops,
        "cases": list(found),
        "failures": {},
    } | more


def target(**parts):
    return vars(cases.Target(**parts))


def test_statistic():
    assert measure.statistic([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))
    assert measure.statistic([7.0]) == (7.0, 7.0, 7.0)


@pytest.fixture
def meter():
    if memory.peak("cpu", lambda: None)[1] is None:
        pytest.skip("this system does not tell the peak of memory")
    return lambda run, *inputs: memory.peak("cpu", run, inputs)[1] / MB


def test_memory_counts_what_a_call_needs_and_frees(meter):
    def temporary():
        torch.ones(16 << 20)  # 67 MB

    assert meter(temporary) == pytest.approx(67.1, abs=2)
    assert meter(temporary) == pytest.approx(67.1, abs=2), "once more: what is free but kept must not hide it"
    assert meter(lambda: None) < 1


def test_memory_counts_the_scratch_of_native_code(meter):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def scratch():
        blocks = [libc.malloc(100_000) for _ in range(400)]  # too small for pages of their own: they come from the heap
        for block in blocks:
            ctypes.memset(block, 1, 100_000)
        for block in blocks:
            libc.free(block)

    for _ in range(2):
        assert meter(scratch) == pytest.approx(40, abs=2)


def test_memory_leaves_inputs_and_outputs_out(meter):
    x = torch.ones(8 << 20)
    assert meter(lambda: x + 1) < 2
    assert meter(lambda: (x + 1, x[:5]), x) < 2
    assert meter(lambda: (x + 1) * 2) == pytest.approx(33.5, abs=2)
    assert meter(lambda: torch.empty(8 << 20)) == 0  # an output that was never touched


def a_work(*contenders):
    return cases.Work(
        inputs=lambda: (torch.randn(50),),
        contenders=list(contenders),
        exact=lambda x: (x.double().exp(),),
        plain=lambda x: (x.exp(),),
        names=["y"],
    )


def runner(*contenders, effort="tiny"):
    made = cases.Case("lstm", "exp", lambda device: a_work(*contenders))
    return measure.Runner(made, "cpu", measure.EFFORTS[effort])


class Benchmark:
    """The part of pytest-benchmark's fixture that is used."""

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: (x.exp() * 1.001,), "y: error"),
        (lambda x: (x.exp() * float("nan"),), "y: error nan"),
        (lambda x: (x.exp()[:-1],), "y: shape"),
        (lambda x: (x.exp(), x), "2 results, expected 1"),
    ],
)
def test_a_wrong_kernel_is_not_timed(wrong, message):
    made = runner(cases.Contender("fastlm", wrong), cases.Contender("right", lambda x: (x.exp(),)))
    with pytest.raises(cases.WrongResult, match=message):
        measure.measure(made, Benchmark())
    assert not any(entry.ms for entry in made.entries)


def test_a_wrong_or_failing_competitor_is_left_out():
    def failing(x):
        raise RuntimeError("no such thing")

    right = cases.Contender("fastlm", lambda x: (x.exp(),))
    made = runner(right, cases.Contender("wrong", lambda x: (x.exp() * 2,)), cases.Contender("failing", failing))
    measure.measure(made, Benchmark())
    assert [entry.contender.name for entry in made.entries] == ["fastlm"]
    assert made.left_out["wrong"].startswith("wrong: wrong: y: error")
    assert made.left_out["failing"] == "fails: RuntimeError: no such thing"


def test_a_lone_number_may_be_as_far_off_as_its_dtype_rounds():
    work = cases.Work(lambda: (), [], exact=lambda: (torch.tensor(1.0).double(),), plain=lambda: (torch.tensor(1.0),))
    for dtype, right in (("bf16", True), ("fp32", False)):
        case = cases.Case("lstm", "x", lambda device: work, dtype)
        check = cases.verify, case, work, cases.Contender("fastlm", None), (torch.tensor(1.004),), {}, ()
        if right:
            assert check[0](*check[1:])[0] == pytest.approx(0.004, rel=1e-3)
        else:
            with pytest.raises(cases.WrongResult):
                check[0](*check[1:])


def test_contenders_take_turns():
    calls = []

    def named(name):
        def run(x):
            calls.append(name)
            return (x.exp(),)

        return run

    names = ["fastlm", "a", "b"]
    made = runner(*(cases.Contender(name, named(name)) for name in names))
    measure.measure(made, Benchmark())
    rounds = len(made.entries[0].ms)
    assert rounds >= 2 and all(len(entry.ms) == rounds for entry in made.entries)
    calls = calls[6:]  # the check and the warming up
    assert len(calls) == 6 * rounds
    for start in range(0, len(calls), 6):  # one that is not timed and one that is, of each
        turn = calls[start : start + 6]
        assert turn[0::2] == turn[1::2] and sorted(turn[::2]) == sorted(names) and turn[-1] == "fastlm"


def test_a_contender_has_its_threads_and_its_share():
    before, seen = torch.get_num_threads(), []

    def run(x):
        seen.append(torch.get_num_threads())
        return (x.exp(),)

    made = runner(cases.Contender("fastlm", run, threads=before + 1, slow=True, share=1e-9))
    measure.measure(made, Benchmark())
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    assert min(made.entries[0].ms) > 1000  # nanoseconds at least, scaled by 1e9


def test_ceiling_is_that_of_the_scarcer_thing():
    tops = {"copy": 10.0, "fp32": 100.0, "bf16": 200.0}
    assert ceilings.floor_ms(tops, "fp32", 1e9, 1e6) == (10.0, "GEMM")
    assert ceilings.floor_ms(tops, "bf16", 1e9, 1e6) == (5.0, "GEMM")
    assert ceilings.floor_ms(tops, "fp32", 1e6, 1e9) == (100.0, "copy")
    top = results.ceiling(a_case(figures(20.0)), tops)
    assert top == {"share": 1.0, "limit": "GEMM", "rate": 100.0, "unit": "GFLOP/s"}


@pytest.mark.parametrize(
    ("parts", "text", "met"),
    [
        (dict(against="rival", ratio=1.9), ">= 1.9x", True),
        (dict(against="rival", ratio=2.1), ">= 2.1x", False),
        (dict(against="rival", ratio=1.0, memory=0.5), ">= 1x, <= 0.5 of its memory", True),
        (dict(against="rival", memory=0.4), "<= 0.4 of its memory", False),
        (dict(against="absent", ratio=1.0), ">= 1x", None),
        (dict(ms=9.0), "<= 9 ms", False),
        (dict(share=0.5), ">= 50% of ceiling", True),
    ],
)
def test_verdict_of_a_target(parts, text, met):
    case = a_case(figures(10.0), figures(20.0, "rival", extra_bytes=10_000_000))
    assert results.judge(case, target(**parts), 0.6) == (text, met)


def test_table():
    targets = [target(against="rival", ratio=1.5), target(ms=9.0)]
    both = a_case(figures(10.0), figures(20.0, "rival"), figures(5000.0, "slow", share_of_work=0.1), targets=targets)
    missing = a_case(figures(0.1234), title="lone", targets=[target(against="gone", ratio=2.0)])
    run = a_run(both, missing, a_case(figures(1.0), sweep={"series": "lstm", "axis": "H", "value": 3}))
    first, second, third = report.table(run)
    assert first[:7] == ["lstm: a layer", "10.0 (9.8-10.2)", "rival", "20.0 (19.6-20.4)", "2.00x",
                         ">= 1.5x; <= 9 ms", "NO"]  # fmt: skip
    assert first[7:] == ["100% of GEMM, 200 GFLOP/s", "5.0", "5.0"]
    assert second[:5] == ["", "", "slow *", "5,000 (4,900-5,100)", "500.00x"]
    assert third[1:3] == ["0.12 (0.12-0.13)", "-"] and third[5:7] == [">= 2x", "?"]
    lines = report.as_text(run).splitlines()
    place = lines[0].index("competitor")
    assert lines[1][place:].startswith("rival") and lines[2][place:].startswith("slow *")
    markdown = report.as_markdown(run, targets_only=True)
    assert markdown.count("\n| ") == 4 and run["machine"].replace("-", " ") not in markdown.partition("\n\n")[0]


def test_table_goes_into_the_readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.START}old{report.END}\nafter\n")
    run = a_run(a_case(figures(10.0), figures(20.0, "rival"), targets=[target(ms=9.0)]))
    report.fill_readme(run, path)
    once = path.read_text()
    report.fill_readme(run, path)
    assert path.read_text() == once
    assert once.startswith(f"before\n{report.START}\n\n| work |") and once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once and f"results/{run['machine']}-ratios.png" in once
    path.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        report.fill_readme(run, path)
    assert (ROOT / "README.md").read_text().count(report.START) == 1


def test_compare_calls_what_is_beyond_the_noise():
    old = a_run(a_case(figures(100.0), figures(100.0, "rival")))
    for ms, slower, faster in ((103.0, 0, 0), (110.0, 1, 0), (90.0, 0, 1)):
        verdict = compare.compare(old, a_run(a_case(figures(ms), figures(300.0, "rival"))))
        assert (len(verdict["slower"]), len(verdict["faster"]), verdict["compared"]) == (slower, faster, 1)
    assert verdict["faster"] == ["lstm: a layer | fastlm: 100 -> 90 ms"]
    noisy = a_run(a_case(figures(110.0, p20=90.0, p80=140.0)))
    assert compare.compare(old, noisy)["slower"] == []


def test_compare_takes_out_the_drift_of_the_machine():
    def run(ms, rival):
        rivals = [figures(rival, name) for name in ("a", "b", "c")]
        return a_run(a_case(figures(ms), *rivals))

    assert compare.compare(run(100.0, 50.0), run(120.0, 60.0))["slower"] == []
    assert len(compare.compare(run(100.0, 50.0), run(120.0, 50.0))["slower"]) == 1
    assert len(compare.compare(run(100.0, 50.0), run(120.0, 40.0))["slower"]) == 1


def test_compare_refuses_another_machine(tmp_path):
    run = a_run(a_case(figures(1.0)))
    for key, other in (("machine", "another"), ("threads", 99), ("device", "cuda")):
        with pytest.raises(FastlmError, match=f"of another {key}"):
            compare.check_same({**run, key: other}, run)
    for content in ("", "[]", '{"schema": 2}', "{}"):
        (tmp_path / "old.json").write_text(content)
        with pytest.raises(FastlmError, match="not a file of benchmark results"):
            compare.read_old(tmp_path / "old.json")


def test_plots():
    sweeps = [
        a_case(figures(ms), figures(2 * ms, "rival"), sweep={"series": "lstm fp32", "axis": "B", "value": value})
        for value, ms in ((1, 1.0), (80, 5.0))
    ]
    run = a_run(a_case(figures(3.0), figures(1.0, "rival"), targets=[target(against="rival", ratio=2.0)]), *sweeps)
    pictures = plots.draw(run)
    assert set(pictures) == {"ratios", "speed"}
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures.values())
    assert set(plots.draw(a_run())) == set()


def every_case():
    return [case for name in suite.BENCHMARKS for case in importlib.import_module(f"bench_{name}").CASES]


def test_every_benchmark_has_a_case_of_each_size_and_a_name_for_each():
    found = every_case()
    assert len({str(case) for case in found}) == len(found)
    for name in suite.BENCHMARKS:
        assert {case.op for case in importlib.import_module(f"bench_{name}").CASES} == {name}
        assert {"tiny", "quick"} <= {case.size for case in found if case.op == name}
    assert all(len(case.targets.get("cpu", ())) for case in found if case.size == "quick" and case.op == "host")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One run of everything on tiny shapes, by the command."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # threads would only wait for each other
        status = cli.main(["bench", "--tiny", "--out", str(out), "--device", "cpu"])
    return SimpleNamespace(status=status, out=out, files=sorted(path.name for path in out.iterdir()))


def test_run_of_everything(tiny):
    assert tiny.status == 0
    name = f"{a_run()['machine']}-tiny"
    assert {f"{name}.json", f"{name}.md", f"{name}-ratios.png"} == set(tiny.files)
    run = json.loads((tiny.out / f"{name}.json").read_text())
    assert run["schema"] == 1 and run["size"] == "tiny" and not run["failures"]
    assert set(run["ceilings"]) == {"copy", "fp32", "bf16"} and all(rate > 0 for rate in run["ceilings"].values())
    wanted = {(case.op, case.title) for case in every_case() if case.size == "tiny"}
    assert {(case["op"], case["title"]) for case in run["cases"]} == wanted
    for case in run["cases"]:
        assert case["contenders"][0]["name"] == "fastlm"
        for entry in case["contenders"]:
            assert 0 < entry["p20"] <= entry["ms"] <= entry["p80"] and entry["rounds"] >= 1, entry
            assert entry["error"] <= 2 * entry["plain_error"] + 8e-3
    missing = {reason for case in run["cases"] for reason in case["left_out"].values()}
    assert all(text.endswith(("not installed", "alone", "this PyTorch has none")) for text in missing), missing
    steps = [case for case in run["cases"] if case["op"] == "training"]
    assert all(len(case["profile"]) == 2 and case["profile"][0]["operators"] for case in steps)
    compare.check_same({**run, "threads": a_run()["threads"]}, a_run())


def command(capsys, *arguments):
    status = cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.strip()


def test_compare_decides_the_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "_measure", lambda *_: a_run(a_case(figures(100.0))))
    old = tmp_path / "old.json"
    for ms, status in ((50.0, 1), (100.0, 0), (200.0, 0)):
        old.write_text(json.dumps(a_run(a_case(figures(ms)))))
        arguments = [
            "--quick",
            "--op",
            "lstm",
            "--compare",
            str(old),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            "--json",
        ]
        got, out, _ = command(capsys, *arguments)
        assert got == status and ("slower: lstm: a layer | fastlm: 50 -> 100 ms" in out) == (ms == 50.0)
        last = json.loads(out.splitlines()[-1])
        assert len(last["comparison"]["slower"]) == status
    assert (tmp_path / f"{a_run()['machine']}-lstm.json").exists(), "a part of the benchmarks has a file of its own"
    monkeypatch.setattr(suite, "_measure", lambda *_: a_run(failures={"lstm: a layer": "WrongResult: y"}))
    status, out, _ = command(capsys, "--out", str(tmp_path), "--device", "cpu")
    assert status == 1 and "FAILED: lstm: a layer: WrongResult: y" in out


def test_problems_are_one_line(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise AssertionError("measured although something is wrong")

    monkeypatch.setattr(suite, "_measure", fails)
    (tmp_path / "file").write_text("{}")
    (tmp_path / "other.json").write_text(json.dumps({**a_run(), "machine": "abacus"}))
    for arguments, message in [
        (["--op", "gru"], "no benchmark 'gru'; there are adaptive_softmax,"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["--compare", str(tmp_path / "none.json")], "none.json"),
        (["--compare", str(tmp_path / "file")], "not a file of benchmark results"),
        (["--compare", str(tmp_path / "other.json")], "of another machine: abacus there"),
        (["--out", str(tmp_path / "file")], str(tmp_path / "file")),
    ]:
        status, _, err = command(capsys, *arguments)
        assert status == 2 and err.startswith("fastlm: ") and message in err and "\n" not in err, err


@pytest.mark.parametrize(
    ("where", "error", "status"),
    [("_measure", KeyboardInterrupt(), 130), ("write_file", OSError(28, "No space left on device"), 2)],
)
def test_interrupted_and_full(where, error, status, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(suite, "_measure", lambda *_: a_run(a_case(figures(1.0))))
    monkeypatch.setattr(suite, where, fail)
    got, _, err = command(capsys, "--out", str(tmp_path), "--device", "cpu")
    assert got == status and err.count("\n") == 0


def test_without_the_source_tree(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    status, _, err = command(capsys)
    assert status == 2 and "source tree" in err and "\n" not in err
